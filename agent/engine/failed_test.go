package engine

import (
	"fmt"
	"runtime/debug"
	"testing"

	"github.com/moby/buildkit/client"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// TestWhatFailedStepsWroteIsPruned has Go collect no garbage of its own accord.
func TestWhatFailedStepsWroteIsPruned(t *testing.T) {
	c := newTestEngine(t, sandbox.Userns)
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for i := range 5 {
		_, _, err := build(t, c, busyboxStage+fmt.Sprintf("RUN echo %d > /written; exit 3\n", i), nil, nil)
		require.ErrorContains(t, err, "exit code: 3")
	}
	require.NoError(t, c.Prune(t.Context(), nil, client.PruneAll))
	left, err := c.DiskUsage(t.Context())
	require.NoError(t, err)
	require.Empty(t, left)
}
