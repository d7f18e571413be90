package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

// TestSnapshotsAreMountedVolatile mounts a snapshot twice, one after the other, as copying files
// into it does: its end must not sync the disk, and must not keep the kernel from the next mount.
func TestSnapshotsAreMountedVolatile(t *testing.T) {
	ctx := namespaces.WithNamespace(context.Background(), snapshot.Namespace)
	store, err := snapshot.Open(ctx, t.TempDir())
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	s := volatileSnapshotter{containerdsnapshot.NewSnapshotter(snapshot.Snapshotter, store.Snapshots(), snapshot.Namespace, nil)}
	require.NoError(t, s.Prepare(ctx, "base", ""))
	require.NoError(t, s.Commit(ctx, "layer", "base"))
	require.NoError(t, s.Prepare(ctx, "active", "layer"))
	m, err := s.Mounts(ctx, "active")
	require.NoError(t, err)
	for range 2 {
		dir := t.TempDir()
		mounts, release, err := m.Mount()
		require.NoError(t, err)
		require.NoError(t, mount.All(mounts, dir))
		info, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
		require.NoError(t, err)
		require.Len(t, info, 1)
		require.Contains(t, info[0].VFSOptions, "volatile")
		require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
		require.NoError(t, mount.Unmount(dir, 0))
		require.NoError(t, release())
	}
	require.NoError(t, s.Commit(ctx, "made", "active"))

	// What is only read is mounted as before.
	view, err := s.View(ctx, "view", "made", snapshots.WithLabels(nil))
	require.NoError(t, err)
	mounts, release, err := view.Mount()
	require.NoError(t, err)
	require.NotContains(t, mounts[0].Options, "volatile")
	require.NoError(t, release())
	require.NoError(t, store.Snapshots().Remove(ctx, "view"))

	// A snapshot may go before its mount is given back.
	require.NoError(t, s.Prepare(ctx, "gone", "layer"))
	m, err = s.Mounts(ctx, "gone")
	require.NoError(t, err)
	_, release, err = m.Mount()
	require.NoError(t, err)
	require.NoError(t, store.Snapshots().Remove(ctx, "gone"))
	_, err = store.DB.GarbageCollect(ctx)
	require.NoError(t, err)
	require.NoError(t, release())
}

// TestCopyingDoesNotSyncTheDisk has a file that is not on disk yet, and copies others in a build.
func TestCopyingDoesNotSyncTheDisk(t *testing.T) {
	n := openTestNode(t)
	c := serveProxy(t, n.pickTenant(Domain{Tenant: "a", Sandbox: sandbox.Userns}))
	// Others may sync at any time, but not each time.
	for i := range 5 {
		f, err := os.Create(filepath.Join(t.TempDir(), "dirty"))
		require.NoError(t, err)
		defer f.Close()
		const size = 8 << 20
		_, err = f.Write(make([]byte, size))
		require.NoError(t, err)
		_, log, err := build(t, c, fmt.Sprintf("FROM scratch\nCOPY busybox /a%d\nCOPY busybox /b\n", i), nil, nil)
		require.NoError(t, err, log)
		var pages unix.Cachestat_t
		require.NoError(t, unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &pages, 0))
		if pages.Dirty*uint64(os.Getpagesize()) == size {
			return
		}
	}
	t.Fatal("all that others had written was on disk after each build")
}
