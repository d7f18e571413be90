package agent

import (
	"context"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/engine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// newNodeAgent returns an agent over real engines, and its client.
func newNodeAgent(t *testing.T, root string) agentv1.BuildServiceClient {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir()) // the node changes it
	node, err := engine.OpenNode(context.Background(), engine.NodeConfig{
		Root: root, RuncPath: repoBin(t, "runc"), RunscPath: repoBin(t, "runsc"),
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, node.Close()) })
	return serve(t, newAgent(t, NodeEngines(node), func(c *Config) { c.Root = root }))
}

const busyboxDockerfile = `FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "echo hello from a step; echo 1 > /one"]
`

func uploaded(digest string) *agentv1.BuildSpec {
	return &agentv1.BuildSpec{
		Source:   &agentv1.Source{From: &agentv1.Source_Upload{Upload: &agentv1.UploadedSource{Digest: digest}}},
		Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}},
	}
}

func TestBuildInRealSandboxes(t *testing.T) {
	c := newNodeAgent(t, t.TempDir())
	for _, class := range []agentv1.SandboxClass{agentv1.SandboxClass_SANDBOX_CLASS_GVISOR, agentv1.SandboxClass_SANDBOX_CLASS_USERNS} {
		t.Run(class.String(), func(t *testing.T) {
			ctx := testContext(t, "a")
			id := "ok-" + className(class)
			spec := uploaded(sendAll(t, ctx, c, busyboxTar(t, map[string]string{"Dockerfile": busyboxDockerfile})))
			spec.Sandbox, spec.CacheScope = class, "scope"
			resp, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec})
			require.NoError(t, err)
			require.Equal(t, class, resp.GetBuild().GetSandbox())
			events := watch(t, ctx, c, id, 0)
			result := checkEvents(t, events, 0)
			require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
			require.Contains(t, output(events), "hello from a step")
			require.NotEmpty(t, result.GetSteps())

			// The archive has gone with the build that named it.
			_, err = c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id + "-again", Spec: spec})
			require.ErrorContains(t, err, "upload it again")
		})
	}
}
