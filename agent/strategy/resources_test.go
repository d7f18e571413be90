package strategy

import (
	"testing"
	"time"

	"github.com/moby/buildkit/client/llb"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent/steplimits"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// TestLimitsOfAStepAreNoPartOfIt has the same step with limits and without: what it is
// stays the same, and what it is described with tells the limits.
func TestLimitsOfAStepAreNoPartOfIt(t *testing.T) {
	step := func(r *agentv1.Resources) *llb.Definition {
		def, err := llb.Scratch().Run(append(stepResources(r), llb.Args([]string{"x"}))...).Root().Marshal(t.Context())
		require.NoError(t, err)
		return def
	}
	plain := step(nil)
	limited := step(&agentv1.Resources{MemoryBytes: 1 << 30, Pids: 100, DiskBytes: 1 << 30, StepTimeout: durationpb.New(time.Minute)})
	require.Equal(t, plain.Def, limited.Def)
	var told []string
	for _, m := range limited.Metadata {
		if text := m.Description[steplimits.Key]; text != "" {
			told = append(told, text)
			require.EqualValues(t, 1<<30, m.LinuxResources.GetMemory())
		}
	}
	require.Equal(t, []string{"pids=100,disk=1073741824,timeout=1m0s"}, told)
}
