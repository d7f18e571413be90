package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestConformance runs containerd's own suite over the whole store: metadata and
// overlay together, as builds use them. The suite knows by this name that a
// directory of a lower layer cannot be renamed.
func TestConformance(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := Open(ctx, root)
		if err != nil {
			return nil, nil, err
		}
		return s.Snapshots(), s.Close, nil
	})
}

func TestReopenKeepsWhatWasWritten(t *testing.T) {
	ctx := namespaces.WithNamespace(context.Background(), Namespace)
	root := t.TempDir()
	s, err := Open(ctx, root)
	require.NoError(t, err)
	_, err = s.Snapshots().Prepare(ctx, "active", "")
	require.NoError(t, err)
	require.NoError(t, s.Snapshots().Commit(ctx, "committed", "active"))
	require.NoError(t, s.Close())

	s, err = Open(ctx, root)
	require.NoError(t, err)
	defer s.Close()
	info, err := s.Snapshots().Stat(ctx, "committed")
	require.NoError(t, err)
	require.Equal(t, snapshots.KindCommitted, info.Kind)
}

// TestKilledWhileASnapshotIsMade has a directory for which there is no record.
func TestKilledWhileASnapshotIsMade(t *testing.T) {
	ctx := namespaces.WithNamespace(context.Background(), Namespace)
	root := t.TempDir()
	left := filepath.Join(root, "snapshots", "snapshots", "1")
	require.NoError(t, os.MkdirAll(filepath.Join(left, "fs", "half"), 0o755))
	s, err := Open(ctx, root)
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Snapshots().Prepare(ctx, "new", "")
	require.NoError(t, err)
	require.DirExists(t, filepath.Join(left, "fs"), "the new snapshot has its number")
	require.NoDirExists(t, filepath.Join(left, "fs", "half"))
}

func TestCollectionRemovesWhatNothingProtects(t *testing.T) {
	ctx := namespaces.WithNamespace(context.Background(), Namespace)
	s, err := Open(ctx, t.TempDir())
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Snapshots().Prepare(ctx, "orphan", "")
	require.NoError(t, err)
	_, err = s.Snapshots().Prepare(ctx, "kept", "", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().Format(time.RFC3339)}))
	require.NoError(t, err)
	_, err = s.DB.GarbageCollect(ctx)
	require.NoError(t, err)
	_, err = s.Snapshots().Stat(ctx, "orphan")
	require.Error(t, err)
	_, err = s.Snapshots().Stat(ctx, "kept")
	require.NoError(t, err)
}

func TestLockTellsWhoHoldsIt(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	unlock, err := Lock(context.Background(), root, nil)
	require.NoError(t, err)
	holder, held := Holder(root)
	require.True(t, held)
	require.Contains(t, holder, "process ")

	ctx, cancel := context.WithCancelCause(context.Background())
	stop := errors.New("enough")
	_, err = Lock(ctx, root, func(h string) {
		require.Equal(t, holder, h)
		cancel(stop)
	})
	require.ErrorIs(t, err, stop)
	require.ErrorContains(t, err, holder)

	require.NoError(t, unlock())
	_, held = Holder(root)
	require.False(t, held)
	unlock, err = Lock(context.Background(), root, nil)
	require.NoError(t, err)
	require.NoError(t, unlock())
}
