package nodeengine_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// TestLogFloods has steps write 100 MB in one line of bytes that are no text, and go on.
func TestLogFloods(t *testing.T) {
	c, _ := limitedAgent(t, func(string) agent.TenantRules { return agent.TenantRules{} })
	const limit = 1 << 20
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		change := func(s *agentv1.BuildSpec) { s.Resources = &agentv1.Resources{LogBytes: limit, LogRate: 1 << 30} }
		for _, tt := range []struct {
			name, step string
			flood      int
			state      agentv1.BuildState
		}{
			{"goes-on", "/bin/busybox printf '\\\\033[2J\\\\007'; /bin/busybox head -c 100000000 /dev/zero; echo the end", 100_000_000, agentv1.BuildState_BUILD_STATE_SUCCEEDED},
			{"fails", "/bin/busybox head -c 10000000 /dev/zero | /bin/busybox tr '\\\\000' '\\\\377' >&2; echo the end; exit 3", 10_000_000, agentv1.BuildState_BUILD_STATE_FAILED},
		} {
			events := build(t, agenttest.Context(t, "a"), c, tt.name+"-"+name, class, base+sh(tt.step), change)
			result := agenttest.CheckEvents(t, events, 0)
			require.Equal(t, tt.state, result.GetState(), "%v", result.GetFailure().GetReason())
			out := agenttest.Output(events)
			require.Equal(t, 1, strings.Count(out, "[output clipped, log limit 1MiB reached]"))
			require.LessOrEqual(t, len(out), limit+4096)
			require.Greater(t, len(out), limit/2)
			require.Equal(t, tt.state == agentv1.BuildState_BUILD_STATE_FAILED, strings.Contains(out, "the end"), "the end of a step that fails is there")
			used := result.GetSteps()[len(result.GetSteps())-1].GetUsage()
			require.Equal(t, []string{"log"}, used.GetLimitsReached())
			require.InDelta(t, tt.flood, used.GetLogBytes(), 100)
		}
	})
}
