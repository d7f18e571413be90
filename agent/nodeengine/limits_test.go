package nodeengine_test

import (
	"context"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// TestMemoryLimit has steps that need more than they may have, and the same ones when
// they may have it: limits are no part of what a step is.
func TestMemoryLimit(t *testing.T) {
	c := newAgent(t, t.TempDir())
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		ctx := agenttest.Context(t, "a")
		limited := func(memory int64) func(*agentv1.BuildSpec) {
			return func(s *agentv1.BuildSpec) { s.Resources = &agentv1.Resources{MemoryBytes: memory, CpuMillis: 4000} }
		}
		file := base + sh("true") + sh("/bin/busybox dd if=/dev/zero of=/dev/null count=1 bs=300M")
		result := agenttest.CheckEvents(t, build(t, ctx, c, "oom-"+name, class, file, limited(128<<20)), 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_FAILED, result.GetState(), "%v", result)
		f := result.GetFailure()
		require.Equal(t, agentv1.FailureReason_FAILURE_REASON_OUT_OF_MEMORY, f.GetReason(), "%v", f)
		require.Contains(t, f.GetMessage(), "the limit of 128MiB was reached")
		require.Contains(t, f.GetStep(), "bs=300M")
		require.NotZero(t, f.GetExitCode())

		result = agenttest.CheckEvents(t, build(t, ctx, c, "more-"+name, class, file, limited(1<<30)), 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
		require.Len(t, cachedRuns(result), 1, "the step that ended well: %v", result)
		result = agenttest.CheckEvents(t, build(t, ctx, c, "cached-"+name, class, file, nil), 0)
		require.Len(t, cachedRuns(result), 2, "%v", result)

		// Who only says so is not out of memory.
		result = agenttest.CheckEvents(t, build(t, ctx, c, "says-"+name, class, base+sh("echo exit code: 1: out of memory: no; exit 1"), nil), 0)
		require.Equal(t, agentv1.FailureReason_FAILURE_REASON_STEP_FAILED, result.GetFailure().GetReason(), "%v", result)
	})
}

// TestMostOfADomain has limits of the engine for builds that ask for none.
func TestMostOfADomain(t *testing.T) {
	t.Setenv("TMPDIR", os.TempDir()) // the node changes it
	root := t.TempDir()
	node, err := engine.OpenNode(context.Background(), engine.NodeConfig{
		Root: root, RunscPath: agenttest.RepoBin(t, "runsc"),
		Limits: func(d engine.Domain) sandbox.Limits {
			if d.Tenant == "b" {
				return sandbox.Limits{MemoryBytes: 128 << 20, PIDs: 60}
			}
			return sandbox.Limits{}
		},
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, node.Close()) })
	c := agenttest.Serve(t, agenttest.New(t, nodeengine.New(node), func(c *agent.Config) { c.Root = root }))
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		memory := base + sh("/bin/busybox dd if=/dev/zero of=/dev/null count=1 bs=300M")
		result := agenttest.CheckEvents(t, build(t, agenttest.Context(t, "b"), c, "oom-"+name, class, memory, nil), 0)
		require.Equal(t, agentv1.FailureReason_FAILURE_REASON_OUT_OF_MEMORY, result.GetFailure().GetReason(), "%v", result)
		result = agenttest.CheckEvents(t, build(t, agenttest.Context(t, "a"), c, "oom-"+name, class, memory, nil), 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)

		forks := base + sh("i=0; while [ $i -lt 100 ]; do /bin/busybox sleep 2 & i=$((i+1)); done; wait")
		result = agenttest.CheckEvents(t, build(t, agenttest.Context(t, "b"), c, "pids-"+name, class, forks, nil), 0)
		require.Equal(t, agentv1.FailureReason_FAILURE_REASON_PROCESS_LIMIT, result.GetFailure().GetReason(), "%v", result)
		require.Contains(t, result.GetFailure().GetMessage(), "the limit of 60 processes and threads was reached")
	})
}
