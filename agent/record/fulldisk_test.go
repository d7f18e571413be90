package record

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// smallDisk mounts a file system of a size for one test.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size="+size))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	return dir
}

// fill writes to a file until the disk is full.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	require.NoError(t, err)
	defer f.Close()
	block := make([]byte, 4096)
	for err == nil {
		_, err = f.Write(block)
	}
	require.ErrorIs(t, err, unix.ENOSPC)
}

func TestResultsAreStoredOnAFullDisk(t *testing.T) {
	disk := smallDisk(t, "24m")
	dir := filepath.Join(disk, "builds")
	s := open(t, dir, Options{})
	var writers []*Writer
	for i := range 8 {
		w := create(t, s, "a", id(i))
		require.NoError(t, w.Start())
		writers = append(writers, w)
	}
	fill(t, disk)
	for _, w := range writers {
		var full error
		for range 100 {
			full = errors.Join(full, w.Append(logEvent(strings.Repeat("x", 64<<10))))
		}
		require.ErrorIs(t, full, unix.ENOSPC)
	}
	_, err := s.Create(build("a", "no-room"))
	if err != nil {
		require.ErrorContains(t, err, "no space left")
		_, err := s.Get(Key{"a", "no-room"})
		require.ErrorIs(t, err, ErrNotFound)
	}
	for i, w := range writers {
		require.NoError(t, w.Finish(succeeded()), "build %d", i)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, checkWhole(t, events(t, s, "a", id(i), 0)).GetState())
	}
	require.NoError(t, s.Close())

	// The next start takes the reserve back when it can.
	require.NoError(t, os.Remove(filepath.Join(disk, "filler")))
	s = open(t, dir, Options{})
	fi, err := os.Stat(filepath.Join(dir, reserveName))
	require.NoError(t, err)
	require.EqualValues(t, reserveBytes, fi.Size())
	for i := range writers {
		checkWhole(t, events(t, s, "a", id(i), 0))
	}
	require.NoError(t, s.Close())
}
