package nodeengine_test

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// newNodeAgent returns an agent over real engines, and its client.
func newNodeAgent(t *testing.T, root string) agentv1.BuildServiceClient {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir()) // the node changes it
	node, err := engine.OpenNode(context.Background(), engine.NodeConfig{
		Root: root, RuncPath: agenttest.RepoBin(t, "runc"), RunscPath: agenttest.RepoBin(t, "runsc"),
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, node.Close()) })
	return agenttest.Serve(t, agenttest.New(t, nodeengine.New(node), func(c *agent.Config) { c.Root = root }))
}

const busyboxDockerfile = `FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "echo hello from a step; echo 1 > /one"]
`

func TestBuildInRealSandboxes(t *testing.T) {
	c := newNodeAgent(t, t.TempDir())
	for _, class := range []agentv1.SandboxClass{agentv1.SandboxClass_SANDBOX_CLASS_GVISOR, agentv1.SandboxClass_SANDBOX_CLASS_USERNS} {
		t.Run(class.String(), func(t *testing.T) {
			ctx := agenttest.Context(t, "a")
			id := "ok-" + strings.ToLower(strings.TrimPrefix(class.String(), "SANDBOX_CLASS_"))
			spec := agenttest.Uploaded(agenttest.SendAll(t, ctx, c, agenttest.BusyboxTar(t, map[string]string{"Dockerfile": busyboxDockerfile})))
			spec.Sandbox, spec.CacheScope = class, "scope"
			resp, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec})
			require.NoError(t, err)
			require.Equal(t, class, resp.GetBuild().GetSandbox())
			events := agenttest.Watch(t, ctx, c, id, 0)
			result := agenttest.CheckEvents(t, events, 0)
			require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
			require.Contains(t, agenttest.Output(events), "hello from a step")
			require.NotEmpty(t, result.GetSteps())

			// The archive has gone with the build that named it.
			_, err = c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id + "-again", Spec: spec})
			require.ErrorContains(t, err, "upload it again")
		})
	}
}
