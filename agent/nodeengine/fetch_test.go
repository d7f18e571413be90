package nodeengine_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// TestDeniedAddressesEndABuildAsDenied has builds name a service of the node in every
// place that the agent fetches from.
func TestDeniedAddressesEndABuildAsDenied(t *testing.T) {
	var asked atomic.Int32
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		_, _ = io.WriteString(w, "secret")
	}))
	t.Cleanup(service.Close)
	address := service.Listener.Addr().String()
	t.Setenv("TMPDIR", os.TempDir())
	root := t.TempDir()
	node, err := engine.OpenNode(context.Background(), engine.NodeConfig{Root: root, Fetch: &egress.Policy{}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, node.Close()) })
	c := agenttest.Serve(t, agenttest.New(t, nodeengine.New(node), func(c *agent.Config) { c.Root = root }))
	ctx := agenttest.Context(t, "a")
	for id, tt := range map[string]struct {
		dockerfile string
		change     func(*agentv1.BuildSpec)
	}{
		"add":     {"FROM scratch\nADD http://" + address + "/x /x\n", nil},
		"add-git": {"FROM scratch\nADD http://" + address + "/x.git /x\n", nil},
		"from":    {"FROM " + address + "/x\nCOPY Dockerfile /\n", nil},
		"push": {"FROM scratch\nCOPY Dockerfile /\n", func(s *agentv1.BuildSpec) {
			s.Outputs = []*agentv1.Output{{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: address + "/x:1"}}}}
		}},
		"source": {"", func(s *agentv1.BuildSpec) {
			s.Source = &agentv1.Source{From: &agentv1.Source_Git{Git: &agentv1.GitSource{Url: "https://" + address + "/x.git", Revision: "main"}}}
		}},
	} {
		t.Run(id, func(t *testing.T) {
			result := agenttest.CheckEvents(t, build(t, ctx, c, id, agentv1.SandboxClass_SANDBOX_CLASS_USERNS, tt.dockerfile, tt.change), 0)
			require.Equal(t, agentv1.BuildState_BUILD_STATE_FAILED, result.GetState(), "%v", result)
			require.Equal(t, agentv1.FailureReason_FAILURE_REASON_DENIED, result.GetFailure().GetReason(), "%v", result)
			require.Contains(t, result.GetFailure().GetMessage(), address+" denied for builds: 127.0.0.0/8 is the loopback of the node; to allow it")
		})
	}
	require.Zero(t, asked.Load())
}
