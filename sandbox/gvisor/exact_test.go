package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestExactLayer has a program make all kinds of files, in a sandbox and on an
// overlay of the node, and compares what the layers hold.
func TestExactLayer(t *testing.T) {
	e := newEnv(t)
	e.program("exact")
	e.ok(e.step("/bin/exact"))

	dir := t.TempDir()
	for _, d := range []string{"u", "w", "m"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/u,workdir=%s/w", e.lower, dir, dir)
	require.NoError(t, unix.Mount("overlay", dir+"/m", "overlay", 0, opts))
	chroot(t, dir+"/m", "/bin/exact")
	require.NoError(t, unix.Unmount(dir+"/m", 0))

	want, got := exact(t, dir+"/u/exact"), exact(t, e.upper+"/exact")
	require.Len(t, want, 11)
	require.Equal(t, want, got)
	var st unix.Stat_t
	for _, sparse := range []string{"sparse", "hole"} {
		require.NoError(t, unix.Stat(e.upper+"/exact/"+sparse, &st))
		require.Less(t, st.Blocks*512, int64(1<<20), sparse)
	}

	// What one step wrote is what the next sees.
	e.ok(e.step("test -p /exact/fifo && test -S /exact/socket && rm /exact/linked /exact/socket"))
	require.NoError(t, unix.Lstat(e.upper+"/exact/capable", &st))
	require.EqualValues(t, 1, st.Nlink)
	value := make([]byte, 64)
	n, err := unix.Getxattr(e.upper+"/exact/capable", "security.capability", value)
	require.NoError(t, err)
	require.Equal(t, 20, n)
}

// exact describes the files of a directory, and itself, with their times.
func exact(t *testing.T, dir string) map[string]string {
	out := map[string]string{}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	names := []string{"."}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	for _, name := range names {
		p := filepath.Join(dir, name)
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(p, &st))
		s := fmt.Sprintf("%o %d:%d size=%d mtime=%d.%09d", st.Mode, st.Uid, st.Gid, st.Size, st.Mtim.Sec, st.Mtim.Nsec)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			s += fmt.Sprint(" links=", st.Nlink)
		} else {
			s = fmt.Sprintf("%o %d:%d mtime=%d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			f, err := os.Open(p)
			require.NoError(t, err)
			for _, off := range []int64{0, 100 << 20, 1<<20 - 5, 1<<36 - 1} {
				b := make([]byte, 4)
				n, _ := f.ReadAt(b, off)
				s += fmt.Sprintf(" %q", b[:n])
			}
			require.NoError(t, f.Close())
		}
		for _, attr := range []string{"security.capability", "user.empty", "user.binary", "user.=name\xff"} {
			v := make([]byte, 512)
			if n, err := unix.Lgetxattr(p, attr, v); err == nil {
				s += fmt.Sprintf(" %s=%q", attr, v[:n])
			}
		}
		out[name] = s
	}
	return out
}
