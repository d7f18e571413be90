package e2e

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// audience is that of tokens for agents.
const audience = "kiln-agent"

// testTokens calls an agent as ServiceAccounts of two namespaces do, with nothing but a
// token and the agents' authority.
func testTokens(t *testing.T, in *installation) {
	for _, ns := range []string{namespace, restricted} {
		in.kubectl(t, "create", "serviceaccount", "ci", "-n", ns)
		// What docs/install.md gives a CI job.
		in.kubectl(t, "create", "role", "kiln-ci", "-n", ns, "--verb=create", "--resource=builds.kiln.build")
		in.kubectl(t, "create", "rolebinding", "kiln-ci", "-n", ns, "--role=kiln-ci", "--serviceaccount="+ns+":ci")
	}
	in.kubectl(t, "create", "serviceaccount", "nobody", "-n", namespace)
	// A right in another namespace is none in one's own.
	in.kubectl(t, "create", "rolebinding", "kiln-nobody", "-n", restricted, "--role=kiln-ci", "--serviceaccount="+namespace+":nobody")

	address, config := in.agentAddresses(t)[0], in.agentTLS(t)
	token := func(account, ns string, more ...string) string {
		return in.kubectl(t, append([]string{"create", "token", account, "-n", ns}, more...)...)
	}
	as := func(token string) agentv1.BuildServiceClient {
		return dialAgent(t, address, config, grpc.WithPerRPCCredentials(bearer(token)))
	}
	ours := token("ci", namespace, "--audience", audience)
	ci, other := as(ours), as(token("ci", restricted, "--audience", audience))
	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	list := func(c agentv1.BuildServiceClient) ([]*agentv1.Build, error) {
		out, err := c.ListBuilds(ctx, &agentv1.ListBuildsRequest{})
		return out.GetBuilds(), err
	}
	for _, c := range []agentv1.BuildServiceClient{ci, other} {
		require.Eventually(t, func() bool { // the API server hears of a new Role a moment later
			_, err := list(c)
			return err == nil
		}, time.Minute, time.Second, "a ServiceAccount that may create Builds is refused")
	}

	t.Run("who is refused", func(t *testing.T) {
		header, rest, _ := strings.Cut(ours, ".")
		claims, signature, _ := strings.Cut(rest, ".")
		forged := header + "." + claims + "." + strings.Repeat("A", len(signature))
		for name, c := range map[string]struct {
			client agentv1.BuildServiceClient
			code   codes.Code
			want   string
		}{
			"no token":                 {dialAgent(t, address, config), codes.Unauthenticated, "neither a client certificate nor a bearer token"},
			"no right":                 {as(token("nobody", namespace, "--audience", audience)), codes.PermissionDenied, "may not create builds.kiln.build in namespace " + namespace},
			"the API server's token":   {as(token("ci", namespace)), codes.Unauthenticated, audience},
			"another service's token":  {as(token("ci", namespace, "--audience", "vault")), codes.Unauthenticated, audience},
			"a token without meaning":  {as("hello"), codes.Unauthenticated, audience},
			"a signature that is none": {as(forged), codes.Unauthenticated, audience},
		} {
			_, err := list(c.client)
			require.Equal(t, c.code, status.Code(err), "%s: %v", name, err)
			require.ErrorContains(t, err, c.want, name)
			_, err = c.client.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "refused", Spec: scratch()})
			require.Equal(t, c.code, status.Code(err), "%s: %v", name, err)
			require.NotContains(t, err.Error(), ours)
		}
		_, err := ci.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: "refused"})
		require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
	})

	t.Run("the tenant is the namespace", func(t *testing.T) {
		started, err := ci.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "by-token", Spec: scratch()})
		require.NoError(t, err)
		require.Equal(t, namespace, started.GetBuild().GetTenant())
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result(t, ctx, ci, "by-token").GetState())
		builds, err := list(ci)
		require.NoError(t, err)
		require.Contains(t, ids(builds), namespace+"/by-token")

		builds, err = list(other)
		require.NoError(t, err)
		require.NotContains(t, ids(builds), namespace+"/by-token")
		_, err = other.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: "by-token"})
		require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
		_, err = other.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "by-token"})
		require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
		for name, call := range map[string]func() error{
			"get": func() error {
				_, err := other.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: "by-token", Tenant: namespace})
				return err
			},
			"list": func() error {
				_, err := other.ListBuilds(ctx, &agentv1.ListBuildsRequest{Tenant: namespace})
				return err
			},
			"start": func() error {
				_, err := other.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "theirs", Tenant: namespace, Spec: scratch()})
				return err
			},
		} {
			require.Equal(t, codes.PermissionDenied, status.Code(call()), name)
		}
		// The same ID is another build in another namespace.
		_, err = other.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "by-token", Spec: scratch()})
		require.NoError(t, err)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result(t, ctx, other, "by-token").GetState())
	})

	t.Run("images of the node are no tenant's to ask for", func(t *testing.T) {
		// The image that the agent itself runs from.
		spec := &agentv1.BuildSpec{Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{Inline: "FROM " + in.Registry() + "/kiln/agent:dev\n"}}}
		probe, err := ci.Probe(ctx, &agentv1.ProbeRequest{Spec: spec})
		require.NoError(t, err)
		require.Zero(t, probe.GetLocalBaseBytes())
		for _, agent := range in.agents(t) {
			probe, err := agent.Probe(ctx, &agentv1.ProbeRequest{Tenant: namespace, Spec: spec})
			require.NoError(t, err)
			require.Greater(t, probe.GetLocalBaseBytes(), int64(1<<20))
		}
	})

	t.Run("the command", func(t *testing.T) {
		dir := t.TempDir()
		write := func(name, text string) string {
			path := filepath.Join(dir, name)
			require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
			return path
		}
		t.Setenv("NO_PROXY", "*") // nothing is between the test and the Pods
		ca := write("ca.crt", string(in.secretData(t, "kiln-agent-tls", "ca.crt")))
		write("Dockerfile", in.dockerfile("echo built-by-token"))
		write("file", "x")
		agent := func(token string) []string {
			return []string{"--agent", "tcp://" + address, "--tlscacert", ca, "--tlsservername", agentName, "--token-file", write("token", token+"\n")}
		}
		_, progress, err := in.kiln(append(append([]string{"build", "--progress", "plain"}, agent(ours)...), dir)...)
		require.NoError(t, err, progress)
		require.Contains(t, progress, "built-by-token")
		out, progress, err := in.kiln(append([]string{"ps"}, agent(ours)...)...)
		require.NoError(t, err, progress)
		require.Contains(t, out, "by-token")

		nobody := token("nobody", namespace, "--audience", audience)
		for _, args := range [][]string{{"build", dir}, {"ps"}} {
			_, progress, err = in.kiln(append(args, agent(nobody)...)...)
			require.Error(t, err)
			require.Contains(t, progress, "may not create builds.kiln.build")
			require.NotContains(t, progress, nobody)
		}
	})
}

// bearer is a token that is shown with each call.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }

// scratch is a build that runs nothing.
func scratch() *agentv1.BuildSpec {
	return &agentv1.BuildSpec{
		Sandbox:  agentv1.SandboxClass_SANDBOX_CLASS_GVISOR,
		Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{Inline: "FROM scratch\nLABEL a=b\n"}},
	}
}

// result watches a build to its end.
func result(t *testing.T, ctx context.Context, c agentv1.BuildServiceClient, id string) *agentv1.BuildResult {
	t.Helper()
	stream, err := c.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: id})
	require.NoError(t, err)
	var last *agentv1.Event
	for {
		msg, err := stream.Recv()
		if err == io.EOF {
			return last.GetResult()
		}
		require.NoError(t, err)
		last = msg.GetEvent()
	}
}

func ids(builds []*agentv1.Build) []string {
	var out []string
	for _, b := range builds {
		out = append(out, b.GetTenant()+"/"+b.GetBuildId())
	}
	return out
}
