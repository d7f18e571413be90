package stepfs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/mountns"
)

func TestMain(m *testing.M) {
	if err := mountns.Enter(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

const firstID = 1879048192

// census fails the test when it leaves mounts or descriptors behind.
func census(t *testing.T) {
	t.Helper()
	count := func() (string, int) {
		info, err := os.ReadFile("/proc/self/mountinfo")
		require.NoError(t, err)
		name, _, _ := strings.Cut(t.Name(), "/")
		var mounts strings.Builder
		for line := range strings.Lines(string(info)) {
			if strings.Contains(line, name) { // not those of others
				mounts.WriteString(line)
			}
		}
		fds, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return mounts.String(), len(fds)
	}
	mounts, fds := count()
	t.Cleanup(func() {
		m, f := count()
		require.Equal(t, mounts, m, "mounts left behind")
		require.Equal(t, fds, f, "descriptors left behind")
	})
}

// idMap returns the shift of a new user namespace.
func idMap(t *testing.T) *IDMap {
	t.Helper()
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: firstID, Size: 65536}}
	cmd := exec.Command("/bin/cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(ns) })
	require.NoError(t, stdin.Close())
	require.NoError(t, cmd.Wait())
	return &IDMap{UserNS: ns, UID: firstID, GID: firstID}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func owner(t *testing.T, path string) uint32 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(path, &st))
	return st.Uid
}

func mounted(t *testing.T, tree sandbox.Tree, opts Options) string {
	t.Helper()
	target := filepath.Join(t.TempDir(), "target")
	unmount, err := Make(tree, target, opts)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, unmount())
		require.NoFileExists(t, target)
	})
	return target
}

func overlayTree(t *testing.T, lowers int) sandbox.Tree {
	t.Helper()
	dir := t.TempDir()
	tree := sandbox.Tree{Upper: filepath.Join(dir, "s", "fs"), Work: filepath.Join(dir, "s", "work")}
	require.NoError(t, os.MkdirAll(tree.Upper, 0o755))
	require.NoError(t, os.MkdirAll(tree.Work, 0o700))
	for i := range lowers {
		l := filepath.Join(dir, fmt.Sprintf("a-rather-long-name-of-a-layer-%0100d", i))
		write(t, filepath.Join(l, fmt.Sprint("f", i)), fmt.Sprint(i))
		write(t, filepath.Join(l, "same"), fmt.Sprint(i))
		tree.Lower = append(tree.Lower, l)
	}
	return tree
}

func TestDir(t *testing.T) {
	census(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "f"), "x")
	rw := mounted(t, sandbox.Tree{Dir: dir}, Options{})
	write(t, filepath.Join(rw, "g"), "y")
	require.FileExists(t, filepath.Join(dir, "g"))
	ro := mounted(t, sandbox.Tree{Dir: dir}, Options{Readonly: true})
	require.ErrorIs(t, os.WriteFile(filepath.Join(ro, "h"), nil, 0o644), unix.EROFS)
	file := mounted(t, sandbox.Tree{Dir: filepath.Join(dir, "f")}, Options{})
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "x", string(content))
}

func TestSubpathStaysInTree(t *testing.T) {
	census(t)
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "etc"), 0o755))
	write(t, filepath.Join(dir, "etc", "hostname"), "inside")
	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, "abs")))
	require.NoError(t, os.Symlink("../../../../../../etc", filepath.Join(dir, "rel")))
	for _, tree := range []sandbox.Tree{{Dir: dir}, {Lower: []string{dir}}, {Lower: []string{dir, t.TempDir()}}} {
		for _, m := range []*IDMap{nil, idMap(t)} {
			for _, sub := range []string{"abs/hostname", "rel/hostname", "../etc/hostname", "/etc/hostname"} {
				got, err := os.ReadFile(mounted(t, tree, Options{Subpath: sub, IDMap: m}))
				require.NoError(t, err, sub)
				require.Equal(t, "inside", string(got), sub)
			}
		}
	}
	_, err := Make(sandbox.Tree{Dir: dir}, filepath.Join(t.TempDir(), "x"), Options{Subpath: "missing"})
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestSingleLowerIsReadonly(t *testing.T) {
	census(t)
	for _, n := range []int{1, 3} {
		tree := overlayTree(t, n)
		tree.Upper, tree.Work = "", ""
		target := mounted(t, tree, Options{})
		require.ErrorIs(t, os.WriteFile(filepath.Join(target, "same"), nil, 0o644), unix.EROFS)
		require.FileExists(t, filepath.Join(target, fmt.Sprint("f", n-1)))
	}
}

func TestOverlayWithManyLowers(t *testing.T) {
	census(t)
	for _, m := range []*IDMap{nil, idMap(t)} {
		tree := overlayTree(t, 200)
		target := mounted(t, tree, Options{IDMap: m, Volatile: true})
		content, err := os.ReadFile(filepath.Join(target, "same"))
		require.NoError(t, err)
		require.Equal(t, "0", string(content), "the first lower is the topmost")
		require.FileExists(t, filepath.Join(target, "f199"))
	}
}

func TestOverlayWrites(t *testing.T) {
	for name, shift := range map[string]bool{"plain": false, "shifted": true} {
		t.Run(name, func(t *testing.T) {
			census(t)
			tree := overlayTree(t, 2)
			opts := Options{Volatile: true}
			base := uint32(0)
			if shift {
				opts.IDMap = idMap(t)
				base = opts.IDMap.UID
			}
			for range 2 { // the work directory can be used again
				target := filepath.Join(t.TempDir(), "target")
				unmount, err := Make(tree, target, opts)
				require.NoError(t, err)
				require.Equal(t, base, owner(t, target))
				os.Remove(filepath.Join(target, "f1"))
				file := filepath.Join(target, "same")
				require.NoError(t, os.Chown(file, int(base+33), int(base+34)))
				require.NoError(t, unmount())
			}
			require.Equal(t, uint32(33), owner(t, filepath.Join(tree.Upper, "same")))
			var st unix.Stat_t
			require.NoError(t, unix.Lstat(filepath.Join(tree.Upper, "f1"), &st))
			require.Equal(t, uint32(unix.S_IFCHR), st.Mode&unix.S_IFMT)
			require.Zero(t, st.Rdev)
		})
	}
}

func TestDirShifted(t *testing.T) {
	census(t)
	m := idMap(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "f"), "x")
	target := mounted(t, sandbox.Tree{Dir: dir}, Options{IDMap: m})
	require.Equal(t, m.UID, owner(t, filepath.Join(target, "f")))
	require.NoError(t, os.Chown(filepath.Join(target, "f"), int(m.UID+7), -1))
	require.Equal(t, uint32(7), owner(t, filepath.Join(dir, "f")))
}

func TestTmpfs(t *testing.T) {
	census(t)
	m := idMap(t)
	target := mounted(t, sandbox.Tree{Tmpfs: &sandbox.Tmpfs{Size: 1 << 20}}, Options{IDMap: m})
	require.Equal(t, m.UID, owner(t, target))
	err := os.WriteFile(filepath.Join(target, "big"), make([]byte, 2<<20), 0o644)
	require.ErrorIs(t, err, unix.ENOSPC)
}

func TestAttributes(t *testing.T) {
	census(t)
	dir := t.TempDir()
	options := func(target string) string {
		info, err := os.ReadFile("/proc/self/mountinfo")
		require.NoError(t, err)
		for line := range strings.Lines(string(info)) {
			if f := strings.Fields(line); f[4] == target {
				return f[5]
			}
		}
		t.Fatalf("%s is not mounted", target)
		return ""
	}
	require.Contains(t, options(mounted(t, sandbox.Tree{Dir: dir}, Options{})), "nosuid,nodev")
	root := options(mounted(t, overlayTree(t, 1), Options{Suid: true}))
	require.Contains(t, root, "nodev")
	require.NotContains(t, root, "nosuid")
}

func TestFailureLeavesNothing(t *testing.T) {
	census(t)
	m := idMap(t)
	tree := overlayTree(t, 1)
	tree.Lower = append(tree.Lower, filepath.Join(t.TempDir(), "missing"))
	target := filepath.Join(t.TempDir(), "target")
	for _, o := range []Options{{}, {IDMap: m}, {IDMap: &IDMap{UserNS: -1, UID: 1, GID: 1}}} {
		_, err := Make(tree, target, o)
		require.Error(t, err)
		require.NoFileExists(t, target)
	}
}
