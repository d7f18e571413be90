package gvisor

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// describe lists a tree: type, mode, owner, links, device, link target, content
// and extended attributes of everything in it.
func describe(t *testing.T, dir string) map[string]string {
	out := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
		// The node's overlay links whiteouts to each other.
		if !d.IsDir() && st.Mode&unix.S_IFMT != unix.S_IFCHR {
			s += fmt.Sprintf(" links=%d rdev=%d", st.Nlink, st.Rdev)
		}
		if d.Type()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			s += " -> " + target
		}
		if d.Type().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %.60q", data)
		}
		buf := make([]byte, 4096)
		n, err := unix.Llistxattr(p, buf)
		if err == nil {
			names := strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00")
			sort.Strings(names)
			for _, name := range names {
				if name == "" || strings.HasPrefix(name, "trusted.overlay.") && name != "trusted.overlay.opaque" {
					continue
				}
				v := make([]byte, 4096)
				n, err := unix.Lgetxattr(p, name, v)
				if err != nil {
					return err
				}
				s += fmt.Sprintf(" %s=%q", name, v[:n])
			}
		}
		rel, _ := filepath.Rel(dir, p)
		out[rel] = s
		return nil
	}))
	return out
}

const writes = `set -e
mkdir -p /data/a/b; echo one >/data/a/b/f; chown 33:44 /data/a/b/f; chmod 4750 /data/a/b/f
ln /data/a/b/f /data/hard; ln -s ../nowhere /data/soft; mkfifo /data/fifo
chmod 1777 /data/a; chown 33 /data/a/b
rm /gone; rm -r /removed; rm -r /replaced; mkdir /replaced; echo new >/replaced/new
echo more >>/changed; chmod 600 /moded; touch -t 202001020304 /data/old
mkdir /fresh; rm -r /kept/sub; mkdir /kept/sub; mv /kept/file /kept/moved
ln -s x /data/chowned; chown -h 33:44 /data/chowned
rm /tolink; ln -s changed /tolink; chmod 700 /kept
>/data/empty; chown 65534:65534 /data/empty
mkdir /tmp; echo t >/tmp/t
`

func fill(t *testing.T, lower string) {
	for _, d := range []string{"removed/x", "replaced/old", "kept/sub/deep"} {
		require.NoError(t, os.MkdirAll(filepath.Join(lower, d), 0o755))
	}
	for _, f := range []string{"gone", "changed", "moded", "kept/file", "tolink", "removed/x/y", "kept/untouched"} {
		require.NoError(t, os.WriteFile(filepath.Join(lower, f), []byte(f), 0o644))
	}
}

// TestLayerLikeTheNodesOverlay runs one script in a sandbox and another time on
// an overlay of the node, and compares the upper directories.
func TestLayerLikeTheNodesOverlay(t *testing.T) {
	e := newEnv(t)
	fill(t, e.lower)
	e.ok(e.step(writes))
	got := describe(t, e.upper)

	want := kernelUpper(t, e.lower, writes)
	require.Equal(t, want, got)
	st, err := os.Stat(e.upper + "/data/old")
	require.NoError(t, err)
	require.Equal(t, "2020-01-02 03:04", st.ModTime().UTC().Format("2006-01-02 15:04"))

	// A second step sees what the first wrote, and its writes join them.
	out := e.ok(e.step("test ! -e /gone; ls /replaced; cat /changed; rm /data/hard; echo again >/gone; rm -r /fresh; mkdir /removed"))
	require.Equal(t, "new\nchangedmore\n", out)
	require.NoFileExists(t, e.upper+"/data/hard")
	_, err = os.Lstat(e.upper + "/fresh")
	require.ErrorIs(t, err, os.ErrNotExist, "nothing is below it that a whiteout could hide")
	data, err := os.ReadFile(e.upper + "/gone")
	require.NoError(t, err)
	require.Equal(t, "again\n", string(data))
}

// kernelUpper runs script on an overlay of the node and returns what it left in
// the upper directory.
func kernelUpper(t *testing.T, lower, script string) map[string]string {
	dir := t.TempDir()
	for _, d := range []string{"u", "w", "m"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	merged := filepath.Join(dir, "m")
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/u,workdir=%s/w,index=off,metacopy=off,redirect_dir=off", lower, dir, dir)
	require.NoError(t, unix.Mount("overlay", merged, "overlay", 0, opts))
	defer func() { require.NoError(t, unix.Unmount(merged, 0)) }()
	chroot(t, merged, script)
	return describe(t, filepath.Join(dir, "u"))
}

// TestRootAttributes checks that a step that leaves / alone leaves its attributes.
func TestRootAttributes(t *testing.T) {
	e := newEnv(t)
	for _, d := range []string{e.lower, e.upper} {
		require.NoError(t, os.Chmod(d, 0o711))
		require.NoError(t, os.Chown(d, 7, 8))
	}
	require.Equal(t, "711 7:8\n", e.ok(e.step("stat -c '%a %u:%g' /; echo x >/x")))
	var st unix.Stat_t
	require.NoError(t, unix.Stat(e.upper, &st))
	require.EqualValues(t, 0o40711, st.Mode)
	require.EqualValues(t, 7, st.Uid)
	require.EqualValues(t, 8, st.Gid)
	require.Equal(t, "750\n", e.ok(e.step("chmod 750 /; stat -c %a /")))
	require.NoError(t, unix.Stat(e.upper, &st))
	require.EqualValues(t, 0o40750, st.Mode)
}

// TestManyFiles is the shape of a package installation.
func TestManyFiles(t *testing.T) {
	e := newEnv(t)
	e.ok(e.step("set -e; for d in $(seq 20); do mkdir -p /pkg/$d; for f in $(seq 100); do echo $f >/pkg/$d/$f; done; done"))
	n := 0
	require.NoError(t, filepath.WalkDir(e.upper, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			n++
		}
		return err
	}))
	require.Equal(t, 2000, n)
}
