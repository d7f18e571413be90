package escape

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/test/escape/hostile"
)

// guard notes everything that is done to the goals of attacks, reading too.
type guard struct {
	fd     int
	places []string
	before []string

	mu sync.Mutex
	// err is the first thing that was seen.
	err error
}

// newGuard watches from now on. It ends with the test.
func newGuard(t *testing.T, e *env, goals []hostile.Goal) *guard {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	g := &guard{fd: fd, places: []string{"/", "/tmp", os.TempDir(), "/dev", "/dev/shm", "/etc", "/root", "/usr", "/var", ".", e.Root, filepath.Join(e.Root, "store"), filepath.Join(e.Root, "store/snapshots"), filepath.Join(e.Root, "store/snapshots/snapshots")}}
	g.before = devices(t)
	for _, goal := range goals {
		for _, path := range []string{goal.Dir, filepath.Join(goal.Dir, goal.File)} {
			_, err := unix.InotifyAddWatch(fd, path, unix.IN_ALL_EVENTS)
			require.NoError(t, err)
		}
	}
	return g
}

// check returns an error when something was done to a goal; during may be what did it.
func (g *guard) check(during string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var buf [4096]byte
	n, err := unix.Read(g.fd, buf[:])
	if g.err == nil && !errors.Is(err, unix.EAGAIN) {
		g.err = fmt.Errorf("what it tries to reach was touched (%d bytes of events, %v), near %q", n, err, during)
	}
	return g.err
}

// finish wants nothing to have been made where attacks try to, and all devices of
// the node to be what they were.
func (g *guard) finish(t *testing.T) {
	t.Helper()
	require.NoError(t, g.check("the end"))
	for _, dir := range g.places {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, entry := range entries {
			require.NotContains(t, entry.Name(), "kiln-marker", "in %s", dir)
		}
	}
	require.Equal(t, g.before, devices(t))
}

// devices lists /dev with modes and numbers.
func devices(t *testing.T) []string {
	t.Helper()
	var out []string
	require.NoError(t, filepath.WalkDir("/dev", func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == "/dev/pts" || path == "/dev/fd" || path == "/dev/shm" || path == "/dev/mqueue" {
			if err == nil && d.IsDir() {
				return fs.SkipDir
			}
			return nil // other programs' terminals come and go
		}
		if st, err := os.Lstat(path); err == nil {
			sys := st.Sys().(*syscall.Stat_t)
			out = append(out, fmt.Sprint(path, " ", st.Mode(), " ", sys.Rdev, " ", sys.Uid, ":", sys.Gid))
		}
		return nil
	}))
	return out
}

func links(st os.FileInfo) uint64 { return uint64(st.Sys().(*syscall.Stat_t).Nlink) }

// peakMemory returns what tells by how many bytes the memory of this process, which
// is the agent too, has grown at most since the call.
func peakMemory(t *testing.T) func() int64 {
	t.Helper()
	// Otherwise Go may keep as much garbage as there is of everything else, which in a
	// process with all entries is more than any attack gets.
	before := debug.SetGCPercent(25)
	t.Cleanup(func() { debug.SetGCPercent(before) })
	debug.FreeOSMemory()
	require.NoError(t, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0))
	now := memory(t, "VmRSS")
	return func() int64 { return memory(t, "VmHWM") - now }
}

func memory(t *testing.T, field string) int64 {
	t.Helper()
	data, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			require.NoError(t, err)
			return n << 10
		}
	}
	t.Fatal("no " + field)
	return 0
}
