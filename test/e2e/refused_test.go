package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

func testPolicy(t *testing.T, in *installation) {
	in.apply(t, `apiVersion: kiln.build/v1alpha1
kind: SandboxPolicy
metadata: {name: gvisor-only}
spec:
  namespaceSelector: {matchLabels: {tier: restricted}}
  sandboxClasses: {required: gvisor, default: gvisor}
`)
	t.Cleanup(func() { in.kubectl(t, "delete", "sandboxpolicy", "gvisor-only") })
	build := func(name, class string) string {
		return strings.Replace(manifest(name, "  runtimeClassName: "+class+"\n"+in.inline("true")), "namespace: "+namespace, "namespace: "+restricted, 1)
	}
	require.Eventually(t, func() bool {
		out, err := in.tryKubectl(build("refused", "userns"), "apply", "--dry-run=server", "-f", "-")
		return err != nil && strings.Contains(out, "gvisor-only") && strings.Contains(out, "runtimeClassName")
	}, 30*time.Second, 500*time.Millisecond, "the API server takes a build that policy refuses")
	out, err := in.tryKubectl(build("allowed", "gvisor"), "apply", "-f", "-")
	require.NoError(t, err, out)

	// The same request past the API server, with the controller's own certificate.
	for _, agent := range in.agents(t) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		spec := &agentv1.BuildSpec{
			Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{Inline: "FROM scratch\n"}},
			Sandbox:  agentv1.SandboxClass_SANDBOX_CLASS_USERNS,
		}
		_, err := agent.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "bypass", Tenant: restricted, Spec: spec})
		require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)
		require.ErrorContains(t, err, "gvisor-only")
		_, err = agent.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: "bypass", Tenant: restricted})
		require.Equal(t, codes.NotFound, status.Code(err), "a refused build leaves no record")
	}
}

// secretData returns what a Secret of kiln's namespace has under key.
func (in *installation) secretData(t *testing.T, secret, key string) []byte {
	t.Helper()
	text := in.kubectl(t, "get", "secret", secret, "-n", "kiln-system", "-o", "jsonpath={.data['"+strings.ReplaceAll(key, ".", "\\.")+"']}")
	out, err := base64.StdEncoding.DecodeString(text)
	require.NoError(t, err)
	require.NotEmpty(t, out, "%s of %s", key, secret)
	return out
}

// agentName is the name in the agents' certificate.
const agentName = "kiln-agent.kiln-system.svc"

// agentTLS is how clients without a certificate connect to an agent.
func (in *installation) agentTLS(t *testing.T) *tls.Config {
	t.Helper()
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(in.secretData(t, "kiln-agent-tls", "ca.crt")))
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: agentName}
}

// agentAddresses returns where the agents listen.
func (in *installation) agentAddresses(t *testing.T) []string {
	t.Helper()
	ips := in.kubectl(t, "get", "pods", "-n", "kiln-system", "-l", "app.kubernetes.io/name=kiln-agent", "-o", "jsonpath={.items[*].status.podIP}")
	var out []string
	for _, ip := range strings.Fields(ips) {
		out = append(out, ip+":7420")
	}
	require.Len(t, out, len(in.Nodes()))
	return out
}

// dialAgent returns a client of an agent. The connection ends with the test.
func dialAgent(t *testing.T, address string, config *tls.Config, opts ...grpc.DialOption) agentv1.BuildServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(address, append(opts, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithNoProxy())...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return agentv1.NewBuildServiceClient(conn)
}

// agents returns clients of all agents that are who the controller is.
func (in *installation) agents(t *testing.T) []agentv1.BuildServiceClient {
	t.Helper()
	config := in.agentTLS(t)
	config.Certificates = []tls.Certificate{controllerIdentity(t, in.secretData(t, "kiln-ca", "tls.crt"), in.secretData(t, "kiln-ca", "tls.key"))}
	var out []agentv1.BuildServiceClient
	for _, address := range in.agentAddresses(t) {
		out = append(out, dialAgent(t, address, config))
	}
	return out
}

func testBadInput(t *testing.T, in *installation) {
	for name, c := range map[string]struct{ spec, want string }{
		"image name":        {"  output: {image: \"Not A Name\"}\n" + in.inline("true"), "spec.output.image"},
		"two sources":       {"  source: {git: {url: \"https://g.example/a\"}, http: {url: \"https://h.example/a.tar\"}}\n", "spec.source"},
		"path that escapes": {"  source: {inline: [{path: ../x, content: a}]}\n", "spec.source.inline[0].path"},
		"unknown field":     {"  privileged: true\n", "privileged"},
	} {
		out, err := in.tryKubectl(manifest("bad", c.spec), "apply", "-f", "-")
		require.Error(t, err, name)
		require.Contains(t, out, c.want, name)
	}
	for name, c := range map[string]struct{ spec, reason, want string }{
		"missing-secret":    {"  secrets: [{id: a, secretRef: {name: none, key: k}}]\n" + in.inline("true"), buildv1.ReasonMissingInput, "spec.secrets[0]"},
		"missing-configmap": {"  source: {configMaps: [{name: none}]}\n", buildv1.ReasonMissingInput, "spec.source.configMaps[0]"},
		"missing-class":     {"  runtimeClassName: none\n" + in.inline("true"), buildv1.ReasonMissingInput, "spec.runtimeClassName"},
		"bad-dockerfile":    {"  strategy: {dockerfile: {inline: \"FRM scratch\"}}\n", buildv1.ReasonInvalidInput, "FRM"},
		"no-such-image":     {"  strategy: {dockerfile: {inline: \"FROM " + in.SecureRegistry() + "/none/none:1\"}}\n", buildv1.ReasonPullFailed, "none/none"},
		"no-such-ref":       {"  source: {git: {url: \"https://" + in.address.String() + ":1/none.git\", revision: none}}\n", buildv1.ReasonSourceFailed, "none.git"},
		"failing-step":      {in.inline("echo the reason; exit 3"), buildv1.ReasonStepFailed, "exit code: 3"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := in.tryKubectl(manifest(name, c.spec), "apply", "-f", "-")
			if err != nil { // refused at the door is as good, when it names the field
				require.Contains(t, out, c.want)
				return
			}
			b := in.ended(t, name)
			require.Equal(t, buildv1.PhaseFailed, b.Status.Phase)
			require.Equal(t, c.reason, b.Status.FailureDetails.Reason, explanation(b))
			require.Contains(t, b.Status.FailureDetails.Message, c.want)
		})
	}
}
