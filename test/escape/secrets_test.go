package escape

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// copied is what the entries about steps take away: it shows that a secret would be
// found.
const copied = "the mount's own file system: the step copies it into its layer"

var _ = register(
	entry{
		ID: "secrets/mounted", Threat: "A secret that a step had as a file is in a layer, the log, the history, the provenance or on the disk afterwards.",
		Severity: reachesTenant,
		Test:     func(t *testing.T, e *env) { require.Empty(t, withSecret(t, e, "wc -c < /run/secrets/s")) },
		Without:  copied,
		Off:      func(t *testing.T, e *env) bool { return withSecret(t, e, "cp /run/secrets/s /copied") != "" },
	},
	entry{
		ID: "secrets/environment", Threat: "A secret that a step had in its environment is in a layer, the log, the history, the provenance or on the disk afterwards.",
		Severity: reachesTenant,
		Test:     func(t *testing.T, e *env) { require.Empty(t, withSecret(t, e, "echo ${#S}")) },
		Without:  copied,
		Off:      func(t *testing.T, e *env) bool { return withSecret(t, e, "echo $S > /copied") != "" },
	},
	entry{
		ID: "secrets/failed-step", Threat: "A secret is in the error, or left on the disk, when its step fails.",
		Severity: reachesTenant,
		Test:     func(t *testing.T, e *env) { require.Empty(t, withSecret(t, e, "echo > /written; exit 9")) },
	},
	entry{
		ID: "secrets/ssh-key", Threat: "The private key behind an SSH mount is somewhere that a step, a layer or the disk shows.",
		Severity: reachesTenant, Test: sshKey,
	},
	entry{
		ID: "secrets/registry-password", Threat: "The password for a registry is in a message, the history or on the disk after it was used.",
		Severity: reachesTenant, Test: registryPassword,
		Once: "the agent fetches; no step runs",
	},
	entry{
		ID: "secrets/git-token", Threat: "The token for a git server is in a message, the history, a URL or on the disk after it was used.",
		Severity: reachesTenant, Test: gitToken,
		Once: "the agent fetches; no step runs",
	},
	entry{
		ID: "secrets/url-userinfo", Threat: "A password in the URL of a build's source is in its record, its events or on the disk.",
		Severity: reachesTenant, Test: urlUserinfo,
		Once: "it is the agent's API; no step runs",
	},
	entry{
		ID: "secrets/agent-record", Threat: "Credentials of a call to the agent are in events, the record, metrics, traces or files of the build.",
		Severity: reachesTenant, Test: agentRecord,
		Once: "it is the agent's API",
	},
	entry{
		ID: "secrets/environment-of-agent", Threat: "A step, or a front end's attribute, gets at the agent's own environment and files.",
		Severity: readsNode,
		Test: func(t *testing.T, e *env) {
			r := e.MustBuild(t, build{
				Dockerfile: "FROM tools\nARG " + CanaryEnv + "\nRUN env; cat /proc/self/environ /proc/1/environ " + e.CanaryFile + "; echo $" + CanaryEnv + "; true\n",
				Attrs:      map[string]string{"build-arg:" + CanaryEnv + "X": "1"},
			})
			e.CheckNode(t, r)
		},
	},
	entry{
		ID: "secrets/of-the-agent-by-id", Threat: "A Dockerfile names a variable or a file of the agent as a secret, which no client gave.",
		Severity: readsNode,
		Test: func(t *testing.T, e *env) {
			for _, id := range []string{CanaryEnv, e.CanaryFile, "../../.." + e.CanaryFile} {
				r := e.Build(t, build{
					Dockerfile: "FROM tools\nRUN --mount=type=secret,id=" + id + ",target=/s,required=true cat /s\n", Secrets: map[string]string{"other": "x"},
				})
				require.Error(t, r.Err, id)
				e.CheckNode(t, r)
			}
		},
	},
)

// withSecret builds with a step that has a secret and a command, and says where it is
// found afterwards; "" is nowhere.
func withSecret(t *testing.T, e *env, command string) string {
	t.Helper()
	secret := random(t)
	file := "FROM tools\nRUN --mount=type=secret,id=s --mount=type=secret,id=s,env=S --mount=type=cache,target=/c " + command + "\n"
	r := e.Build(t, build{Dockerfile: file, Secrets: map[string]string{"s": secret}, Attrs: map[string]string{"attest:provenance": "mode=max"}})
	found := r.Contains(secret)
	e.clientOf(t, attacker, func(ctx context.Context, c *client.Client) {
		if strings.Contains(historyOf(t, ctx, c), secret) {
			found += " history"
		}
	})
	return found + onDisk(t, e, secret)
}

// Contains says where a secret is found in what the build gave.
func (r result) Contains(secret string) string {
	var out string
	for _, f := range forms(secret) {
		if strings.Contains(r.Log, f) {
			out += " log"
		}
		if r.Err != nil && strings.Contains(r.Err.Error(), f) {
			out += " error"
		}
		for _, s := range r.Status {
			for _, v := range s.Vertexes {
				if strings.Contains(v.Name+v.Error, f) {
					out += " status"
				}
			}
		}
		if r.Response != nil {
			for k, v := range r.Response.ExporterResponse {
				if strings.Contains(v, f) {
					out += " answer " + k
				}
			}
		}
	}
	return out + grep(r.Dir, secret)
}

// onDisk says which files of the agent have a secret, in any form.
func onDisk(t *testing.T, e *env, secret string) string {
	t.Helper()
	return grep(e.Root, secret)
}

func grep(dir, secret string) string {
	args := []string{"-rlaF"}
	for _, f := range forms(secret) {
		args = append(args, "-e", f)
	}
	// It fails when it finds nothing, and for what goes away meanwhile.
	out, _ := exec.Command("grep", append(args, "--devices=skip", dir)...).Output()
	return strings.TrimSpace(string(out))
}

func sshKey(t *testing.T, e *env) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	block, err := ssh.MarshalPrivateKey(key, "")
	require.NoError(t, err)
	file := filepath.Join(e.dir(t), "key")
	require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(block), 0o600))
	provider, err := sshprovider.NewSSHAgentProvider([]sshprovider.AgentConfig{{ID: "default", Paths: []string{file}}})
	require.NoError(t, err)
	r := e.MustBuild(t, build{
		Dockerfile: "FROM tools\nRUN --mount=type=ssh test -S $SSH_AUTH_SOCK && cp -r /run /copied; ls -laR /run; cat " + file + "; cat $SSH_AUTH_SOCK; true\n",
		Session:    []session.Attachable{provider},
	})
	// The seed is what must not be anywhere; a line of the file has it. As bytes it may
	// have a line break, which grep would take for two patterns.
	for _, secret := range []string{hex.EncodeToString(key.Seed()), strings.Split(string(pem.EncodeToMemory(block)), "\n")[3]} {
		require.Empty(t, r.Contains(secret))
		require.Empty(t, grep(e.Root, secret))
	}
}

func registryPassword(t *testing.T, e *env) {
	secret := random(t)
	used := false
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte("someone:"+secret))
	o := e.oracle(t, allowedLoopback+":0", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == want {
			used = true
			http.Error(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"for `+r.Header.Get("X-None")+`"}]}`, http.StatusNotFound)
			return
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="private"`)
		http.Error(w, "", http.StatusUnauthorized)
	}))
	auth := authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{AuthConfigProvider: authprovider.LoadAuthConfig(&configfile.ConfigFile{
		AuthConfigs: map[string]types.AuthConfig{o.Address: {ServerAddress: o.Address, Username: "someone", Password: secret}},
	})})
	r := e.Build(t, build{Dockerfile: "FROM " + o.Address + "/private:1\n", Session: []session.Attachable{auth}})
	require.Error(t, r.Err)
	require.True(t, used, "the password was sent: %v", r.Err)
	require.Empty(t, r.Contains(secret))
	require.Empty(t, r.Contains(strings.TrimPrefix(want, "Basic ")))
	require.Empty(t, grep(e.Root, secret))
	require.Empty(t, grep(e.Root, strings.TrimPrefix(want, "Basic ")))
}

func gitToken(t *testing.T, e *env) {
	secret := random(t)
	used := false
	o := e.oracle(t, allowedLoopback+":0", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, password, _ := r.BasicAuth(); password == secret {
			used = true
			http.Error(w, "", http.StatusNotFound)
			return
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="private"`)
		http.Error(w, "", http.StatusUnauthorized)
	}))
	r := e.Build(t, build{Dockerfile: "FROM scratch\nADD " + o.URL + "/repo.git /x\n", Secrets: map[string]string{"GIT_AUTH_TOKEN": secret}})
	require.Error(t, r.Err)
	require.True(t, used, "the token was sent: %v", r.Err)
	encoded := base64.StdEncoding.EncodeToString([]byte("x-access-token:" + secret))
	for _, s := range []string{secret, encoded} {
		require.Empty(t, r.Contains(s))
		require.Empty(t, grep(e.Root, s))
	}
}

func urlUserinfo(t *testing.T, e *env) {
	secret := random(t)
	ctx, id := agenttest.Context(t, attacker), "userinfo-"+random(t)[:20]
	o := e.oracle(t, allowedLoopback+":0", http.NotFoundHandler())
	spec := agenttest.Dockerfile("FROM scratch\n")
	spec.Source = &agentv1.Source{From: &agentv1.Source_Git{Git: &agentv1.GitSource{Url: "http://someone:" + secret + "@" + o.Address + "/repo.git"}}}
	_, err := e.Agent.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec})
	if err != nil {
		require.NotContains(t, err.Error(), secret)
	} else {
		for _, ev := range agenttest.Watch(t, ctx, e.Agent, id, 0) {
			require.NotContains(t, prototext.Format(ev), secret)
		}
	}
	require.Empty(t, grep(e.Root, secret))
}

// agentRecord has an agent of its own, whose metrics and traces are looked at.
func agentRecord(t *testing.T, e *env) {
	secret, password := random(t), random(t)
	spans := tracetest.NewInMemoryExporter()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	defer func() { require.NoError(t, tracer.Shutdown(context.Background())) }()
	metrics := prometheus.NewRegistry()
	root := e.dir(t)
	c := agenttest.Serve(t, agenttest.New(t, nodeengine.New(e.Node), func(c *agent.Config) {
		c.Root, c.Tracer, c.Metrics = root, tracer, agent.NewMetrics(metrics)
	}))
	ctx, id := agenttest.Context(t, attacker), "record-"+random(t)[:20]
	spec := agenttest.Uploaded(agenttest.SendAll(t, ctx, c, agenttest.BusyboxTar(t, map[string]string{
		"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nRUN --mount=type=secret,id=s [\"/bin/busybox\", \"wc\", \"-c\", \"/run/secrets/s\"]\n",
	})))
	spec.Sandbox = agentv1.SandboxClass_SANDBOX_CLASS_USERNS
	spec.Secrets = []*agentv1.SecretRef{{Id: "s"}}
	_, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec, Credentials: &agentv1.Credentials{
		Secrets:    map[string][]byte{"s": []byte(secret)},
		Registries: map[string]*agentv1.RegistryCredential{"registry.example": {Username: "someone", Password: password}},
	}})
	require.NoError(t, err)
	var all bytes.Buffer
	for _, ev := range agenttest.Watch(t, ctx, c, id, 0) {
		all.WriteString(prototext.Format(ev))
	}
	require.Contains(t, all.String(), "BUILD_STATE_SUCCEEDED")
	got, err := c.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: id})
	require.NoError(t, err)
	all.WriteString(prototext.Format(got))
	families, err := metrics.Gather()
	require.NoError(t, err)
	require.NotEmpty(t, families)
	for _, f := range families {
		all.WriteString(f.String())
	}
	for _, s := range spans.GetSpans() {
		all.WriteString(s.Name)
		for _, a := range s.Attributes {
			all.WriteString(a.Value.String())
		}
	}
	require.NotEmpty(t, spans.GetSpans())
	for _, s := range []string{secret, password} {
		checkText(t, "what the agent tells", all.String(), s)
		require.Empty(t, grep(root, s))
		require.Empty(t, grep(e.Root, s))
	}
}
