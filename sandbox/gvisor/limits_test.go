package gvisor

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// eat makes busybox use the given megabytes of memory, and says when it has them.
const eat = `eat() { busybox dd if=/dev/zero of=/dev/null bs=${1}M count=1 2>/dev/null && echo ate $1; }; `

// limited runs a step with limits.
func (e *env) limited(l sandbox.Limits, script string) (*sandbox.Result, string) {
	e.t.Helper()
	step := e.step(script)
	step.Limits = l
	dir := e.t.TempDir()
	step.Root.Upper, step.Root.Work = filepath.Join(dir, "u"), filepath.Join(dir, "w")
	for _, d := range []string{step.Root.Upper, step.Root.Work} {
		require.NoError(e.t, os.Mkdir(d, 0o755))
	}
	var out bytes.Buffer
	step.Process.Stdout, step.Process.Stderr = &out, &out
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	res, err := e.r.Run(ctx, step, nil)
	require.NoError(e.t, err, out.String())
	return res, out.String()
}

func TestMemoryLimit(t *testing.T) {
	e := newEnv(t)
	beside := make(chan string, 1)
	step := e.step(eat + "eat 20; sleep 2; eat 20")
	step.Limits.MemoryBytes = 1 << 30
	go func() {
		var out bytes.Buffer
		step.Process.Stdout = &out
		res, err := e.r.Run(context.Background(), step, nil)
		if err != nil || res.ExitCode != 0 || res.Has(sandbox.LimitMemory) {
			out.WriteString("failed")
		}
		beside <- out.String()
	}()
	res, out := e.limited(sandbox.Limits{MemoryBytes: 96 << 20}, eat+"eat 300; exit $?")
	require.True(t, res.Has(sandbox.LimitMemory), out)
	require.NotZero(t, res.ExitCode)
	require.NotContains(t, out, "ate")
	require.LessOrEqual(t, res.Usage.PeakMemory, int64(100<<20), "a process that is being killed may go beyond")
	require.Greater(t, res.Usage.PeakMemory, int64(60<<20))
	require.Equal(t, 2, strings.Count(<-beside, "ate 20"), "the step beside it")

	// The next sandboxes have no limit.
	res, out = e.limited(sandbox.Limits{}, eat+"eat 60")
	require.Zero(t, res.ExitCode)
	require.False(t, res.Has(sandbox.LimitMemory))
	require.Contains(t, out, "ate 60")
	require.Greater(t, res.Usage.PeakMemory, int64(60<<20))

	// A limit that the sandbox itself does not fit in.
	res, _ = e.limited(sandbox.Limits{MemoryBytes: 2 << 20}, "true")
	require.True(t, res.Has(sandbox.LimitMemory))
	require.NotZero(t, res.ExitCode)
}

// TestPIDLimit has the limit end the sandbox, which cannot do without a process that
// it is refused.
func TestPIDLimit(t *testing.T) {
	e := newEnv(t)
	const many = "i=0; while [ $i -lt 200 ]; do busybox sleep 3 & i=$((i+1)); done; echo reached"
	res, out := e.limited(sandbox.Limits{PIDs: 100}, many)
	require.NotZero(t, res.ExitCode)
	require.True(t, res.Has(sandbox.LimitPIDs))
	require.NotContains(t, out, "reached")
	res, out = e.limited(sandbox.Limits{}, many)
	require.Zero(t, res.ExitCode)
	require.False(t, res.Has(sandbox.LimitPIDs))
	require.Contains(t, out, "reached", "the next sandboxes have no limit")
}

func TestCPULimit(t *testing.T) {
	e := newEnv(t)
	const busy = "busybox timeout 1 sh -c 'while :; do :; done'; true"
	res, _ := e.limited(sandbox.Limits{CPUMillis: 200}, busy)
	require.Positive(t, res.Usage.Throttled)
	require.Positive(t, res.Usage.CPU)
	res, _ = e.limited(sandbox.Limits{}, busy)
	require.Zero(t, res.Usage.Throttled)
}
