package gvisor

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

func TestTimeout(t *testing.T) {
	e := newEnv(t)
	began := time.Now()
	res, out := e.limited(sandbox.Limits{Timeout: 2 * time.Second}, "trap '' TERM INT HUP; echo on; busybox sleep 60 & wait; busybox sleep 60")
	require.Equal(t, sandbox.LimitTimeout, res.EndedBy)
	require.Equal(t, 137, res.ExitCode)
	require.Equal(t, "on\n", out)
	require.Less(t, time.Since(began), 20*time.Second)
	require.Positive(t, res.Usage.CPU)

	// A step that is cancelled is not one that took too long.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	step := e.step("busybox sleep 60")
	step.Limits.Timeout = time.Minute
	_, err := e.r.Run(ctx, step, nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// TestDiskBombs has the sandbox refuse what is too much, without a look at the node's
// disk.
func TestDiskBombs(t *testing.T) {
	e := newEnv(t)
	for _, tt := range []struct {
		name, script string
		limits       sandbox.Limits
		want         sandbox.Limit
		out          string
	}{
		{"one file", "busybox yes >/x; e=$?; busybox stat -c %s /x; exit $e", sandbox.Limits{DiskBytes: 16 << 20}, sandbox.LimitDisk, "16777216\n"},
		{"many files", "i=0; while busybox dd if=/dev/zero of=/f$i bs=1M count=4 2>/dev/null; do i=$((i+1)); done; echo $i; exit 1", sandbox.Limits{DiskBytes: 16 << 20}, sandbox.LimitDisk, "4\n"},
		{"a file without a name", "exec 3>/f; busybox rm /f; busybox dd if=/dev/zero bs=1M >&3 2>/dev/null && exit 0; busybox dd if=/dev/zero of=/g bs=1M count=1 2>/dev/null || echo full; exit 1", sandbox.Limits{DiskBytes: 16 << 20}, "", "full\n"},
		{"inodes", "i=0; while busybox mkdir /d$i 2>/dev/null; do i=$((i+1)); done; [ $i -lt 200 ] || exit 0; echo full; exit 1", sandbox.Limits{Inodes: 200}, sandbox.LimitInodes, "full\n"},
		{"both", "i=0; while : >/d$i; do i=$((i+1)); done; exit 1", sandbox.Limits{Inodes: 100, DiskBytes: 1 << 20}, sandbox.LimitInodes, "No space left"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			res, out := e.limited(tt.limits, tt.script)
			require.NotZero(t, res.ExitCode, out)
			require.Empty(t, res.EndedBy)
			require.Contains(t, out, tt.out)
			if tt.want != "" {
				require.Equal(t, []sandbox.Limit{tt.want}, res.Reached, "%+v", res)
			}
		})
	}

	// The next step may write as much as it likes.
	res, out := e.limited(sandbox.Limits{}, "busybox dd if=/dev/zero of=/x bs=1M count=40 && busybox mkdir /d && : >/d/f")
	require.Zero(t, res.ExitCode, out)
	require.InDelta(t, 40<<20, res.Usage.DiskBytes, 1<<20)
	require.Empty(t, res.Reached)
}

// TestDiskBombInAMount writes through to the node's disk, where somebody has to look.
func TestDiskBombInAMount(t *testing.T) {
	e := newEnv(t)
	step := e.step("i=0; while :; do busybox dd if=/dev/zero of=/cache/f$i bs=1M count=4 2>/dev/null; i=$((i+1)); done")
	step.Mounts = append(step.Mounts, sandbox.Mount{Destination: "/cache", Tree: sandbox.Tree{Dir: t.TempDir()}})
	step.Limits.DiskBytes = 64 << 20
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	res, err := e.r.Run(ctx, step, nil)
	require.NoError(t, err)
	require.Equal(t, sandbox.LimitDisk, res.EndedBy)
	require.Greater(t, res.Usage.DiskBytes, int64(64<<20))
}

func TestOpenFilesBomb(t *testing.T) {
	e := newEnv(t)
	const open = "ulimit -Hn; ulimit -n $(ulimit -Hn) && i=3; while [ $i -lt 100 ]; do eval \"exec $i</bin/busybox\" || exit 9; i=$((i+1)); done; echo all"
	res, out := e.limited(sandbox.Limits{OpenFiles: 64}, open)
	require.NotZero(t, res.ExitCode)
	require.Contains(t, out, "64\n")
	require.NotContains(t, out, "all")
	res, out = e.limited(sandbox.Limits{}, open)
	require.Zero(t, res.ExitCode, out)
	require.True(t, strings.HasPrefix(out, "1048576\n"), out)
	require.Contains(t, out, "all")
}

func TestShmSize(t *testing.T) {
	e := newEnv(t)
	const fill = "busybox dd if=/dev/zero of=/dev/shm/x bs=1M count=100 2>/dev/null; busybox stat -c %s /dev/shm/x"
	_, out := e.limited(sandbox.Limits{ShmBytes: 8 << 20}, fill)
	require.Equal(t, "8388608\n", out)
	_, out = e.limited(sandbox.Limits{}, fill)
	require.Equal(t, "67108864\n", out)
}
