package mountns

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestThreadsMoveInPlace has a program enter a namespace while its threads come and go.
// It has no cgo, which this test has with the race detector.
func TestThreadsMoveInPlace(t *testing.T) {
	program := filepath.Join(t.TempDir(), "inplace")
	build := exec.Command("go", "build", "-o", program, "./testdata/inplace")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	before, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	own, err := os.Readlink("/proc/self/ns/mnt")
	require.NoError(t, err)

	// run returns what the threads see: namespace, root, directory.
	run := func(t *testing.T, mount string, env ...string) []string {
		dir := t.TempDir()
		var out bytes.Buffer
		cmd := exec.Command(program, mount)
		cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, append(os.Environ(), env...), &out, &out
		require.Error(t, cmd.Run(), "the program kills itself")
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		require.Equal(t, "life", lines[0], out.String())
		require.Greater(t, len(lines), 1, out.String())
		for _, l := range lines[1:] {
			require.True(t, strings.HasPrefix(l, "thread "), "executed again: %s", out.String())
			require.Equal(t, lines[1], l, "all threads see the same")
		}
		seen := strings.Fields(lines[1])[1:]
		require.NotEqual(t, own, seen[0])
		if len(env) == 0 {
			require.Equal(t, dir, seen[2], "the working directory stays")
		}
		return seen
	}
	t.Run("threads that come and go", func(t *testing.T) {
		for range 30 {
			require.Equal(t, "/", run(t, t.TempDir())[1])
		}
	})
	t.Run("a root of its own", func(t *testing.T) {
		root := t.TempDir()
		require.NoError(t, unix.Mount(root, root, "", unix.MS_BIND, "")) // only a mount point can be made a slave
		defer func() { require.NoError(t, unix.Unmount(root, unix.MNT_DETACH)) }()
		for _, dir := range []string{"proc", "mnt"} {
			require.NoError(t, os.Mkdir(filepath.Join(root, dir), 0o755))
		}
		require.NoError(t, unix.Mount("/proc", filepath.Join(root, "proc"), "", unix.MS_BIND, ""))
		defer func() { require.NoError(t, unix.Unmount(filepath.Join(root, "proc"), unix.MNT_DETACH)) }()
		seen := run(t, "/mnt", "INPLACE_ROOT="+root)
		require.Equal(t, []string{"/", "/"}, seen[1:], "as one sees it from there")
		entries, err := os.ReadDir(filepath.Join(root, "mnt"))
		require.NoError(t, err)
		require.Empty(t, entries)
	})
	after, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.Equal(t, string(before), string(after))
}
