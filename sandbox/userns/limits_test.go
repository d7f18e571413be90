package userns

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
const eat = `eat() { x=$(dd if=/dev/zero bs=1M count=$1 2>/dev/null | tr '\0' x); echo ate ${#x}; }; `

// limited runs a step with limits.
func limited(t *testing.T, r *Runtime, l sandbox.Limits, script string) (*sandbox.Result, string) {
	t.Helper()
	step := newStep(t, script)
	step.Limits = l
	var out bytes.Buffer
	step.Process.Stdout, step.Process.Stderr = &out, &out
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	res, err := r.Run(ctx, step, nil)
	require.NoError(t, err, out.String())
	return res, out.String()
}

func TestMemoryLimit(t *testing.T) {
	r := newRuntime(t)
	beside := make(chan string, 1)
	go func() {
		step := newStep(t, eat+"eat 40; sleep 1; eat 40")
		step.Limits.MemoryBytes = 512 << 20
		var out bytes.Buffer
		step.Process.Stdout = &out
		res, err := r.Run(context.Background(), step, nil)
		if err != nil || res.ExitCode != 0 || res.Has(sandbox.LimitMemory) {
			out.WriteString("failed")
		}
		beside <- out.String()
	}()
	res, out := limited(t, r, sandbox.Limits{MemoryBytes: 32 << 20}, eat+"eat 100; exit $?")
	require.True(t, res.Has(sandbox.LimitMemory), out)
	require.NotZero(t, res.ExitCode)
	require.NotContains(t, out, "ate")
	require.LessOrEqual(t, res.Usage.PeakMemory, int64(36<<20), "a process that is being killed may go beyond")
	require.Greater(t, res.Usage.PeakMemory, int64(16<<20))
	require.Equal(t, 2, strings.Count(<-beside, "ate 41943040"), "the step beside it")

	// A child that is killed, of a shell that goes on.
	res, out = limited(t, r, sandbox.Limits{MemoryBytes: 32 << 20}, eat+"(eat 100) 2>/dev/null; echo $?")
	require.True(t, res.Has(sandbox.LimitMemory), out)
	require.Zero(t, res.ExitCode)
	require.Contains(t, out, "137")

	// What is in memory file systems counts.
	res, out = limited(t, r, sandbox.Limits{MemoryBytes: 32 << 20}, "dd if=/dev/zero of=/dev/shm/x bs=1M count=60; e=$?; ls -l /dev/shm; exit $e")
	require.True(t, res.Has(sandbox.LimitMemory), out)
	require.NotZero(t, res.ExitCode)

	// The next sandboxes have no limit.
	res, out = limited(t, r, sandbox.Limits{}, eat+"eat 60")
	require.Zero(t, res.ExitCode)
	require.False(t, res.Has(sandbox.LimitMemory))
	require.Contains(t, out, "ate 62914560")
	require.Greater(t, res.Usage.PeakMemory, int64(60<<20))
}

func TestPIDLimit(t *testing.T) {
	r := newRuntime(t)
	res, out := limited(t, r, sandbox.Limits{PIDs: 20}, "i=0; while [ $i -lt 60 ]; do sleep 5 & i=$((i+1)); done; echo not reached")
	require.NotZero(t, res.ExitCode)
	require.Contains(t, out, "fork")
	require.NotContains(t, out, "not reached")
	require.True(t, res.Has(sandbox.LimitPIDs))

	// A fork bomb ends with the step and hurts nobody else.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	step := newStep(t, "bomb() { bomb & bomb & }; bomb 2>/dev/null; sleep 30")
	step.Limits.PIDs = 50
	_, err := r.Run(ctx, step, nil)
	if err != nil { // the shell itself may be refused a process and end
		require.ErrorIs(t, err, context.DeadlineExceeded)
	}
	res, _ = limited(t, r, sandbox.Limits{}, "i=0; while [ $i -lt 60 ]; do sleep 0.2 & i=$((i+1)); done; wait")
	require.Zero(t, res.ExitCode, "the next sandboxes have no limit")
	require.False(t, res.Has(sandbox.LimitPIDs))
}

func TestCPULimit(t *testing.T) {
	r := newRuntime(t)
	const busy = "timeout 1 sh -c 'while :; do :; done'; true" // not as the first process, which nothing ends
	res, _ := limited(t, r, sandbox.Limits{CPUMillis: 200}, busy)
	require.Positive(t, res.Usage.Throttled)
	require.Less(t, res.Usage.CPU, 700*time.Millisecond)
	require.Positive(t, res.Usage.CPU)
	res, _ = limited(t, r, sandbox.Limits{}, busy)
	require.Zero(t, res.Usage.Throttled)
}

// TestExecIsLimited has a process that joins a step count as one of it.
func TestExecIsLimited(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "sleep 60")
	step.Limits = sandbox.Limits{MemoryBytes: 32 << 20, PIDs: 10}
	ctx, cancel := context.WithCancel(context.Background())
	up, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		_, _ = r.Run(ctx, step, func() { close(up) })
	}()
	<-up
	var out bytes.Buffer
	res, err := r.Exec(context.Background(), step.ID, sandbox.Process{
		Args: []string{"/bin/sh", "-c", "cut -d: -f3 /proc/self/cgroup | sort -u; " + eat + "eat 100"}, Cwd: "/", Env: []string{"PATH=/bin"}, Stdout: &out,
	})
	require.NoError(t, err)
	require.NotZero(t, res.ExitCode)
	require.Equal(t, 1, strings.Count(out.String(), "/\n"), "it is in the step's cgroup in all hierarchies that matter: %s", out.String())
	require.NotContains(t, out.String(), "ate")
	cancel()
	<-done
}

// TestLimitsAreGoneWithTheSandbox wants no cgroup of a step that has ended.
func TestLimitsAreGoneWithTheSandbox(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "true")
	step.Limits = sandbox.Limits{MemoryBytes: 64 << 20, CPUMillis: 1000, PIDs: 100}
	var name string
	res, err := r.Run(context.Background(), step, func() {
		r.running[step.ID].mu.RLock()
		defer r.running[step.ID].mu.RUnlock()
		name = r.cgroupOf(r.running[step.ID].cell)
		set, err := filepath.Glob("/sys/fs/cgroup/*" + name)
		require.NoError(t, err)
		require.NotEmpty(t, set)
	})
	require.NoError(t, err)
	require.Zero(t, res.ExitCode)
	require.Eventually(t, func() bool {
		left, err := filepath.Glob("/sys/fs/cgroup/*" + name)
		return err == nil && len(left) == 0
	}, 5*time.Second, 10*time.Millisecond)
}

// TestTooLittleMemory has a limit that the step's own program hardly fits in.
func TestTooLittleMemory(t *testing.T) {
	r := newRuntime(t)
	res, out := limited(t, r, sandbox.Limits{MemoryBytes: 1 << 20}, eat+"eat 20")
	require.True(t, res.Has(sandbox.LimitMemory), out)
	step := newStep(t, "true")
	step.Limits.MemoryBytes = 1
	_, err := r.Run(context.Background(), step, nil)
	require.ErrorContains(t, err, "too small")
	_, err = os.Stat(filepath.Join(stepsDir(r.cfg), step.ID))
	require.ErrorIs(t, err, os.ErrNotExist)
}
