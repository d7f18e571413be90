package userns

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

func TestTimeout(t *testing.T) {
	r := newRuntime(t)
	began := time.Now()
	res, out := limited(t, r, sandbox.Limits{Timeout: time.Second}, "trap '' TERM INT HUP; echo on; sleep 60 & wait; sleep 60")
	require.Equal(t, sandbox.LimitTimeout, res.EndedBy)
	require.Equal(t, 137, res.ExitCode)
	require.Equal(t, "on\n", out)
	require.Less(t, time.Since(began), 20*time.Second)
	require.Positive(t, res.Usage.CPU)

	// A step that is cancelled is not one that took too long.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	step := newStep(t, "sleep 60")
	step.Limits.Timeout = time.Minute
	_, err := r.Run(ctx, step, nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// TestDiskBombs fills the disk in each way that the limit has to see.
func TestDiskBombs(t *testing.T) {
	r := newRuntime(t)
	const many = "i=0; while :; do dd if=/dev/zero of=/f$i bs=1M count=4 2>/dev/null; i=$((i+1)); done"
	for _, tt := range []struct{ name, script string }{
		{"one file", "yes >/x; exit 1"},
		{"many files", many},
		{"files in a mount", strings.ReplaceAll(many, "/f", "/cache/f")},
		{"files without names", "i=0; while [ $i -lt 40 ]; do (exec 3>/f$i; rm /f$i; dd if=/dev/zero bs=1M count=8 >&3 2>/dev/null; sleep 60) & i=$((i+1)); done; wait"},
		{"files that were kept as holes", "truncate -s 30M /a /b /c; for f in a b c; do yes | head -c 30000000 | dd of=/$f conv=notrunc 2>/dev/null; done; sleep 60"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cache := openDir(t)
			step := newStep(t, tt.script)
			step.Mounts = []sandbox.Mount{{Destination: "/cache", Tree: sandbox.Tree{Dir: cache}}}
			step.Limits.DiskBytes = 64 << 20
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			res, err := r.Run(ctx, step, nil)
			require.NoError(t, err)
			if tt.name == "one file" {
				// The process that writes is ended, and not the step, which goes on.
				require.True(t, res.Has(sandbox.LimitDisk), "%+v", res)
				return
			}
			require.Equal(t, sandbox.LimitDisk, res.EndedBy, "%+v", res)
			size := diskUse(t, step.Root.Upper) + diskUse(t, cache)
			require.Less(t, size, int64(2<<30), "it is ended soon")
		})
	}

	// The next step may write as much as it likes.
	res, out := limited(t, r, sandbox.Limits{}, "dd if=/dev/zero of=/x bs=1M count=100 && mkdir /d && touch /d/f")
	require.Zero(t, res.ExitCode, out)
	require.InDelta(t, 100<<20, res.Usage.DiskBytes, 1<<20)
	require.GreaterOrEqual(t, res.Usage.IOWrite, int64(100<<20))
}

// TestTooMuchAtTheEnd has a step that has ended before anybody looked.
func TestTooMuchAtTheEnd(t *testing.T) {
	r := newRuntime(t)
	res, _ := limited(t, r, sandbox.Limits{DiskBytes: 1 << 20}, "for i in 1 2 3; do dd if=/dev/zero of=/$i bs=900k count=1; done")
	require.Equal(t, sandbox.LimitDisk, res.EndedBy)
	res, _ = limited(t, r, sandbox.Limits{Inodes: 64}, "mkdir $(seq 1 100)")
	require.Equal(t, sandbox.LimitInodes, res.EndedBy)
	res, out := limited(t, r, sandbox.Limits{DiskBytes: 4 << 20, Inodes: 200}, "for i in 1 2 3; do dd if=/dev/zero of=/$i bs=900k count=1; done; mkdir $(seq 10 100)")
	require.Zero(t, res.ExitCode, out)
	require.Empty(t, res.Reached)
	require.GreaterOrEqual(t, res.Usage.Inodes, int64(94))
	require.Less(t, res.Usage.Inodes, int64(100), "with mount points")
}

func TestInodeBomb(t *testing.T) {
	r := newRuntime(t)
	res, _ := limited(t, r, sandbox.Limits{Inodes: 1000}, "i=0; while :; do mkdir -p /d/$i; : >/d/$i/f; i=$((i+1)); done")
	require.Equal(t, sandbox.LimitInodes, res.EndedBy)
	require.Equal(t, 137, res.ExitCode)
}

func TestOpenFilesBomb(t *testing.T) {
	r := newRuntime(t)
	const open = "ulimit -Hn; ulimit -n $(ulimit -Hn) && i=3; while [ $i -lt 100 ]; do eval \"exec $i</etc/passwd\" || exit 9; i=$((i+1)); done; echo all"
	res, out := limited(t, r, sandbox.Limits{OpenFiles: 64}, open)
	require.NotZero(t, res.ExitCode)
	require.Contains(t, out, "64\n")
	require.NotContains(t, out, "all")
	res, out = limited(t, r, sandbox.Limits{}, open)
	require.Zero(t, res.ExitCode, out)
	require.Contains(t, out, "all")
	most, err := strconv.Atoi(strings.Fields(out)[0])
	require.NoError(t, err)
	require.LessOrEqual(t, most, sandbox.DefaultOpenFiles)

	// Nobody gets more than the limit by asking, nor in a process that joins the step.
	step := newStep(t, "ulimit -Hn; sleep 30")
	step.Limits.OpenFiles = 64
	step.Process.Rlimits = []sandbox.Rlimit{{Type: "RLIMIT_NOFILE", Soft: 4096, Hard: 4096}}
	started := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	var first bytes.Buffer
	step.Process.Stdout = &first
	go func() {
		_, err := r.Run(ctx, step, func() { close(started) })
		done <- err
	}()
	<-started
	var second bytes.Buffer
	_, err = r.Exec(t.Context(), step.ID, sandbox.Process{Args: []string{"/bin/sh", "-c", "ulimit -Hn"}, Cwd: "/", Env: []string{"PATH=/bin"}, Stdout: &second})
	require.NoError(t, err)
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	require.Equal(t, "64\n", first.String())
	require.Equal(t, "64\n", second.String())
}

func TestShmSize(t *testing.T) {
	r := newRuntime(t)
	const fill = "dd if=/dev/zero of=/dev/shm/x bs=1M count=100 2>/dev/null; stat -c %s /dev/shm/x"
	_, out := limited(t, r, sandbox.Limits{ShmBytes: 8 << 20}, fill)
	require.Equal(t, "8388608\n", out)
	_, out = limited(t, r, sandbox.Limits{}, fill)
	require.Equal(t, "67108864\n", out)
}

// TestManyFilesWithinTheLimit is a step that looks like a bomb for a while, and is
// none: it removes what it wrote.
func TestManyFilesWithinTheLimit(t *testing.T) {
	r := newRuntime(t)
	res, out := limited(t, r, sandbox.Limits{DiskBytes: 32 << 20},
		"i=0; while [ $i -lt 30 ]; do dd if=/dev/zero of=/x bs=1M count=20 2>/dev/null || exit 1; rm /x; i=$((i+1)); done; echo fine")
	require.Zero(t, res.ExitCode, out)
	require.Equal(t, "fine\n", out)
	require.Empty(t, res.Reached)
}

// diskUse returns the bytes of disk that dir occupies.
func diskUse(t *testing.T, dir string) int64 {
	t.Helper()
	out, err := exec.Command("du", "-s", "--block-size=1", filepath.Clean(dir)).Output()
	require.NoError(t, err)
	n, err := strconv.ParseInt(strings.Fields(string(out))[0], 10, 64)
	require.NoError(t, err)
	_ = os.RemoveAll(filepath.Join(dir, "f0")) // some of it at once
	return n
}
