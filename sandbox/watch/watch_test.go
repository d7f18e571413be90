package watch

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// write writes a file of n bytes that are not zero.
func write(t *testing.T, n int, path ...string) {
	t.Helper()
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i) | 1
	}
	require.NoError(t, os.WriteFile(filepath.Join(path...), data, 0o600))
}

func TestCount(t *testing.T) {
	dir := t.TempDir()
	write(t, 10<<10, dir, "a")
	require.NoError(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "b")))
	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, "link")))
	require.NoError(t, os.Truncate(filepath.Join(dir, "a"), 1<<40))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "d/e"), 0o755))
	write(t, 5000, dir, "d/e/c")
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	got := tree{dir: dir, fresh: true}.count(nil)
	require.EqualValues(t, 6, got.inodes, "a, link, d, e, c, fifo")
	require.GreaterOrEqual(t, got.bytes, int64(16<<10))
	require.Less(t, got.bytes, int64(64<<10), "a hole is nothing")

	// A file, and things that are not there.
	require.EqualValues(t, 1, tree{dir: filepath.Join(dir, "fifo"), fresh: true}.count(nil).inodes)
	require.Zero(t, tree{dir: filepath.Join(dir, "gone"), fresh: true}.count(nil))
	require.EqualValues(t, 1, tree{dir: filepath.Join(dir, "link"), fresh: true}.count(nil).inodes, "no symlink is followed")
}

// TestCountWhatChanged has a tree with files of others.
func TestCountWhatChanged(t *testing.T) {
	dir := t.TempDir()
	write(t, 1<<20, dir, "old")
	write(t, 1<<20, dir, "appended")
	require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	time.Sleep(20 * time.Millisecond)
	tr := tree{dir: dir, since: now()}
	require.Zero(t, tr.count(nil).bytes)
	time.Sleep(20 * time.Millisecond)
	write(t, 8<<10, dir, "d/new")
	require.NoError(t, os.Chtimes(filepath.Join(dir, "d/new"), time.Unix(1, 0), time.Unix(1, 0)))
	got := tr.count(nil)
	require.GreaterOrEqual(t, got.bytes, int64(8<<10))
	require.Less(t, got.bytes, int64(64<<10))
	f, err := os.OpenFile(filepath.Join(dir, "appended"), os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteString("x")
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.Greater(t, tr.count(nil).bytes, int64(1<<20), "a file that has changed counts whole")
}

// TestDeepTree has more directories in each other than there may be descriptors.
func TestDeepTree(t *testing.T) {
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	low := unix.Rlimit{Cur: 260, Max: limit.Max}
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }()
	dir := t.TempDir()
	const depth = 500
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	for range depth {
		for _, name := range []string{"a", "d", "z"} {
			require.NoError(t, unix.Mkdirat(fd, name, 0o755))
		}
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Close(fd))
		fd = next
	}
	require.NoError(t, unix.Close(fd))
	before, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	require.EqualValues(t, 3*depth, tree{dir: dir, fresh: true}.count(nil).inodes)
	after, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	require.Len(t, after, len(before))
	require.NoError(t, exec.Command("rm", "-rf", dir).Run())
}

// stepOn returns a step that writes to dir.
func stepOn(dir string) *sandbox.Step {
	return &sandbox.Step{Root: sandbox.Tree{Lower: []string{"/"}, Upper: dir, Work: "/nowhere"}}
}

// ended waits for the end of ctx, and returns the limit that it ended for.
func ended(t *testing.T, ctx context.Context) sandbox.Limit {
	t.Helper()
	select {
	case <-ctx.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("nothing ended the step")
	}
	res, ok := sandbox.EndedBy(context.Cause(ctx))
	require.True(t, ok, "%v", context.Cause(ctx))
	return res.EndedBy
}

func TestEndsAStepBeyondALimit(t *testing.T) {
	t.Run("time", func(t *testing.T) {
		ctx, w, err := Start(t.Context(), Config{Step: stepOn(t.TempDir()), Limits: sandbox.Limits{Timeout: time.Second}})
		require.NoError(t, err)
		began := time.Now()
		require.Equal(t, sandbox.LimitTimeout, ended(t, ctx))
		require.Greater(t, time.Since(began), 900*time.Millisecond)
		w.Stop()
	})
	t.Run("disk", func(t *testing.T) {
		dir := t.TempDir()
		ctx, w, err := Start(t.Context(), Config{Step: stepOn(dir), Limits: sandbox.Limits{DiskBytes: 8 << 20}})
		require.NoError(t, err)
		write(t, 7<<20, dir, "a")
		time.Sleep(4 * interval)
		require.NoError(t, ctx.Err())
		write(t, 7<<20, dir, "b")
		require.Equal(t, sandbox.LimitDisk, ended(t, ctx))
		w.Stop()
	})
	t.Run("disk in a mount", func(t *testing.T) {
		dir, cache := t.TempDir(), t.TempDir()
		write(t, 20<<20, cache, "old")
		time.Sleep(20 * time.Millisecond)
		step := stepOn(dir)
		step.Mounts = []sandbox.Mount{{Destination: "/c", Tree: sandbox.Tree{Dir: cache}}}
		ctx, w, err := Start(t.Context(), Config{Step: step, Limits: sandbox.Limits{DiskBytes: 8 << 20}})
		require.NoError(t, err)
		write(t, 5<<20, dir, "a")
		time.Sleep(4 * interval)
		require.NoError(t, ctx.Err())
		write(t, 5<<20, cache, "b")
		require.Equal(t, sandbox.LimitDisk, ended(t, ctx))
		w.Stop()
	})
	t.Run("inodes", func(t *testing.T) {
		dir := t.TempDir()
		ctx, w, err := Start(t.Context(), Config{Step: stepOn(dir), Limits: sandbox.Limits{Inodes: 500}})
		require.NoError(t, err)
		for i := range 600 {
			write(t, 0, dir, fmt.Sprint(i))
		}
		require.Equal(t, sandbox.LimitInodes, ended(t, ctx))
		w.Stop()
	})
	t.Run("a file without a name", func(t *testing.T) {
		dir := t.TempDir()
		ctx, w, err := Start(t.Context(), Config{
			Step: stepOn(dir), Limits: sandbox.Limits{DiskBytes: 8 << 20},
			Processes: func() ([]int, error) { return []int{os.Getpid()}, nil },
		})
		require.NoError(t, err)
		write(t, 16, dir, "a")
		f, err := os.OpenFile(filepath.Join(dir, "a"), os.O_WRONLY, 0)
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, os.Remove(f.Name()))
		_, err = f.Write(make([]byte, 9<<20))
		require.NoError(t, err)
		require.Equal(t, sandbox.LimitDisk, ended(t, ctx))
		w.Stop()
	})
}

// TestIdleCount has somebody else free as much as the step takes.
func TestIdleCount(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	write(t, 20<<20, other, "x")
	ctx, w, err := Start(t.Context(), Config{Step: stepOn(dir), Limits: sandbox.Limits{DiskBytes: 8 << 20}})
	require.NoError(t, err)
	defer w.Stop()
	require.NoError(t, os.Remove(filepath.Join(other, "x")))
	write(t, 10<<20, dir, "a")
	require.Equal(t, sandbox.LimitDisk, ended(t, ctx))
}

func TestCancelIsNoLimit(t *testing.T) {
	parent, cancel := context.WithCancel(t.Context())
	ctx, w, err := Start(parent, Config{Step: stepOn(t.TempDir()), Limits: sandbox.Limits{Timeout: time.Hour, DiskBytes: 1 << 20}})
	require.NoError(t, err)
	cancel()
	<-ctx.Done()
	_, ok := sandbox.EndedBy(context.Cause(ctx))
	require.False(t, ok)
	w.Stop()
	w.Stop()
}

func TestAccount(t *testing.T) {
	tests := []struct {
		name    string
		limits  sandbox.Limits
		bytes   int
		ended   sandbox.Limit
		reached []sandbox.Limit
	}{
		{name: "no limit", bytes: 3 << 20},
		{name: "within", limits: sandbox.Limits{DiskBytes: 8 << 20, Inodes: 100}, bytes: 3 << 20},
		{name: "as much as fits", limits: sandbox.Limits{DiskBytes: 8 << 20}, bytes: 8 << 20, reached: []sandbox.Limit{sandbox.LimitDisk}},
		{name: "too much", limits: sandbox.Limits{DiskBytes: 8 << 20}, bytes: 9 << 20, ended: sandbox.LimitDisk, reached: []sandbox.Limit{sandbox.LimitDisk}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			_, w, err := Start(t.Context(), Config{Step: stepOn(dir), Limits: tt.limits})
			require.NoError(t, err)
			write(t, tt.bytes, dir, "a")
			w.Stop()
			var res sandbox.Result
			w.Account(&res, sandbox.Usage{})
			require.Equal(t, tt.ended, res.EndedBy)
			require.Equal(t, tt.reached, res.Reached)
			require.EqualValues(t, 1, res.Usage.Inodes)
			require.InDelta(t, tt.bytes, res.Usage.DiskBytes, 64<<10)
		})
	}
}

// BenchmarkStep is what watching costs a step that ends at once.
func BenchmarkStep(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		_, w, err := Start(b.Context(), Config{Step: stepOn(dir), Limits: sandbox.Limits{DiskBytes: 1 << 30, Inodes: 1 << 20, Timeout: time.Hour}})
		require.NoError(b, err)
		w.Stop()
		w.Account(&sandbox.Result{}, sandbox.Usage{})
	}
}
