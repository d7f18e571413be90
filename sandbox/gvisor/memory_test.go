package gvisor

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// TestMemoryIsEmpty has programs beside and after each other, and steps, that get memory
// which others gave back.
func TestMemoryIsEmpty(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	e.program("memory")
	c := e.chain("memory")
	for range 2 {
		out := e.ok(c.step("for i in 1 2 3 4 5; do /bin/memory 2 & /bin/memory 2 || exit 1; wait $! || exit 1; done"))
		require.NotContains(t, out, "byte")
	}
}

// TestRightsToMemory has a program write where it may only read since a moment ago.
func TestRightsToMemory(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	e.program("memory")
	out, res := e.run(e.step("exec /bin/memory 1 write"))
	require.NotZero(t, res.ExitCode, out)
	require.NotContains(t, out, "wrote")
	require.Contains(t, out, "unexpected fault address")
}

// TestProgramsInTurnNeedNoMoreMemory has programs after each other with a limit that has
// room for one of them, but not for what the one before gave back.
func TestProgramsInTurnNeedNoMoreMemory(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	e.program("memory")
	res, out := e.limited(sandbox.Limits{MemoryBytes: 120 << 20}, "for i in 1 2 3 4 5 6 7 8 9 10; do /bin/memory 1 || exit 1; done")
	require.False(t, res.Has(sandbox.LimitMemory), out)
	require.Zero(t, res.ExitCode, out)
}
