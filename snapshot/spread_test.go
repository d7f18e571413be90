package snapshot

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestSnapshotsAreApartOnDisk has the flag on ext4, and a store as good on what knows no such flag.
func TestSnapshotsAreApartOnDisk(t *testing.T) {
	root := t.TempDir()
	for range 2 { // a new store and an old one
		s, err := Open(context.Background(), root)
		require.NoError(t, err)
		require.NoError(t, s.Close())
		dir, err := os.Open(filepath.Join(root, "snapshots", "snapshots"))
		require.NoError(t, err)
		defer dir.Close()
		var fs unix.Statfs_t
		require.NoError(t, unix.Fstatfs(int(dir.Fd()), &fs))
		flags, err := unix.IoctlGetUint32(int(dir.Fd()), unix.FS_IOC_GETFLAGS)
		if fs.Type == unix.EXT4_SUPER_MAGIC {
			require.NoError(t, err)
			require.NotZero(t, flags&topDir)
		}
	}
	require.NoError(t, spread("/proc"))
	require.ErrorIs(t, spread(filepath.Join(root, "missing")), os.ErrNotExist)
}
