package snapshot

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// never is longer than a test.
const never = time.Hour

func openBolt(t *testing.T, dir string) *bolt.DB {
	t.Helper()
	db, err := bolt.Open(filepath.Join(dir, "test.db"), 0o600, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db
}

func isLazy(t *testing.T, db Database) (lazy bool) {
	t.Helper()
	require.NoError(t, db.Update(func(tx *bolt.Tx) error {
		lazy = tx.DB().NoSync
		return nil
	}))
	return lazy
}

func TestDatabasesAreSyncedAfterBuilds(t *testing.T) {
	root := t.TempDir()
	mark := filepath.Join(root, syncMark)
	s, removed, err := openDeferredSync(DeferredSyncConfig{Root: root, Files: true}, 50*time.Millisecond)
	require.NoError(t, err)
	require.False(t, removed)
	db := openBolt(t, root)
	require.NoError(t, s.Add(db))
	require.False(t, isLazy(t, db))
	require.NoFileExists(t, mark)

	for range 2 {
		s.Begin()
		s.Begin()
		s.End()
		time.Sleep(100 * time.Millisecond)
		require.True(t, isLazy(t, db), "one build still runs")
		id, err := mountID(root)
		require.NoError(t, err)
		b, err := os.ReadFile(mark)
		require.NoError(t, err)
		require.Equal(t, id+"\n", string(b))
		s.End()
		require.Eventually(t, func() bool {
			_, err := os.Stat(mark)
			return errors.Is(err, os.ErrNotExist)
		}, 10*time.Second, 10*time.Millisecond)
		require.False(t, isLazy(t, db))
	}

	s.Begin()
	s.End()
	require.NoError(t, s.Close())
	require.False(t, isLazy(t, db))
	require.NoFileExists(t, mark)
	s.Begin()
	require.False(t, isLazy(t, db), "it is closed")
	s.End()
}

func TestDatabasesThatComeAndGo(t *testing.T) {
	root := t.TempDir()
	s, _, err := openDeferredSync(DeferredSyncConfig{Root: root}, never)
	require.NoError(t, err)
	s.Begin()
	store, err := Open(t.Context(), filepath.Join(root, "store"))
	require.NoError(t, err)
	require.NoError(t, s.Add(store.Databases()...))
	require.Len(t, store.Databases(), 2)
	for _, db := range store.Databases() {
		require.True(t, isLazy(t, db))
	}
	require.NoError(t, s.Remove(store.Databases()...))
	for _, db := range store.Databases() {
		require.False(t, isLazy(t, db))
	}
	s.End()
	s.Begin()
	for _, db := range store.Databases() {
		require.False(t, isLazy(t, db))
	}
	s.End()
	require.NoError(t, store.Close())
	require.NoError(t, s.Close())
}

// TestKilledProcessLosesNothing opens again what was not closed, in the same boot.
func TestKilledProcessLosesNothing(t *testing.T) {
	root := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(root, "state"), 0o700))
	killed, _, err := openDeferredSync(DeferredSyncConfig{Root: root}, never)
	require.NoError(t, err)
	killed.Begin()
	t.Cleanup(func() { close(killed.stop); killed.stopped.Wait() })

	s, removed, err := openDeferredSync(DeferredSyncConfig{Root: root, State: []string{"state"}}, 50*time.Millisecond)
	require.NoError(t, err)
	require.False(t, removed)
	require.DirExists(t, filepath.Join(root, "state"))
	db := openBolt(t, root)
	require.NoError(t, s.Add(db))
	require.Eventually(t, func() bool { return !isLazy(t, db) }, 10*time.Second, 10*time.Millisecond, "it is synced also when no build follows")
	require.NoError(t, s.Close())
	require.NoFileExists(t, filepath.Join(root, syncMark))
}

func TestNodeThatWentDown(t *testing.T) {
	root := t.TempDir()
	id, err := mountID(root)
	require.NoError(t, err)
	for name, mark := range map[string]string{"another boot": "0" + id, "another mount": id + "1", "cut off": ""} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.MkdirAll(filepath.Join(root, "state", "below"), 0o700))
			require.NoError(t, os.WriteFile(filepath.Join(root, "keep"), nil, 0o600))
			require.NoError(t, os.WriteFile(filepath.Join(root, syncMark), []byte(mark), 0o600))
			s, removed, err := openDeferredSync(DeferredSyncConfig{Root: root, State: []string{"state", "missing"}}, never)
			require.NoError(t, err)
			require.True(t, removed)
			require.NoFileExists(t, filepath.Join(root, syncMark))
			require.NoDirExists(t, filepath.Join(root, "state"))
			require.FileExists(t, filepath.Join(root, "keep"))
			require.NoError(t, s.Close())
		})
	}
}

// TestNoMarkNoDeferring has a mark that cannot be made.
func TestNoMarkNoDeferring(t *testing.T) {
	root := t.TempDir()
	s, _, err := openDeferredSync(DeferredSyncConfig{Root: root}, never)
	require.NoError(t, err)
	db := openBolt(t, t.TempDir())
	require.NoError(t, s.Add(db))
	require.NoError(t, os.Mkdir(filepath.Join(root, syncMark), 0o700))
	require.NoError(t, os.Mkdir(filepath.Join(root, syncMark, "full"), 0o700))
	s.Begin()
	require.False(t, isLazy(t, db))
	s.End()
	require.NoError(t, s.Close())
}

// TestMarkIsThereWhileDatabasesAreLazy has builds begin in all moments of a sync.
func TestMarkIsThereWhileDatabasesAreLazy(t *testing.T) {
	root := t.TempDir()
	s, _, err := openDeferredSync(DeferredSyncConfig{Root: root}, 0)
	require.NoError(t, err)
	db := openBolt(t, root)
	require.NoError(t, s.Add(db))
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 250 {
				s.Begin()
				if err := db.Update(func(tx *bolt.Tx) error {
					_, err := os.Stat(filepath.Join(root, syncMark))
					if !tx.DB().NoSync {
						return errors.New("a build's commit is synced")
					}
					return err
				}); err != nil {
					t.Error(err)
				}
				s.End()
			}
		})
	}
	all.Wait()
	require.NoError(t, s.Close())
	require.NoFileExists(t, filepath.Join(root, syncMark))
}

// TestPowerFails looks at what the disk has at a moment: what a node would have that lost
// its power then.
func TestPowerFails(t *testing.T) {
	disk, dir := filepath.Join(t.TempDir(), "disk"), filepath.Join(t.TempDir(), "disk")
	mount := func(image, dir string) {
		require.NoError(t, os.Mkdir(dir, 0o700))
		run(t, "mount", "-o", "loop", image, dir)
		t.Cleanup(func() {
			require.Eventually(t, func() bool {
				runtime.GC() // containerd leaves files of its checks for the collector to close
				return exec.Command("umount", dir).Run() == nil
			}, time.Minute, 50*time.Millisecond)
		})
	}
	require.NoError(t, os.WriteFile(disk, nil, 0o600))
	require.NoError(t, os.Truncate(disk, 96<<20))
	run(t, "mkfs.ext4", "-q", disk)
	mount(disk, dir)
	open := func(dir string, quiet time.Duration) (*DeferredSync, *Store, bool, func()) {
		s, removed, err := openDeferredSync(DeferredSyncConfig{Root: dir, State: []string{"store"}, Files: true}, quiet)
		require.NoError(t, err)
		store, err := Open(t.Context(), filepath.Join(dir, "store"))
		require.NoError(t, err)
		closeAll := sync.OnceFunc(func() { require.NoError(t, errors.Join(s.Close(), store.Close())) })
		t.Cleanup(closeAll) // before the disk is unmounted
		require.NoError(t, s.Add(store.Databases()...))
		return s, store, removed, closeAll
	}
	ctx := namespaces.WithNamespace(context.Background(), Namespace)
	s, store, removed, closeAll := open(dir, 500*time.Millisecond)
	require.False(t, removed)
	require.NoError(t, s.onRoot(unix.Syncfs))

	s.Begin()
	text := strings.Repeat("what a step has written\n", 1000)
	mounts, err := store.Snapshots().Prepare(ctx, "active", "")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(mounts[0].Source, "file"), []byte(text), 0o600))
	require.NoError(t, store.Snapshots().Commit(ctx, "committed", "active"))
	building := filepath.Join(t.TempDir(), "building")
	run(t, "cp", "--sparse=always", disk, building)
	s.End()
	require.Eventually(t, func() bool {
		_, err := os.Stat(s.path())
		return errors.Is(err, os.ErrNotExist)
	}, 10*time.Second, 10*time.Millisecond)
	quiet := filepath.Join(t.TempDir(), "quiet")
	run(t, "cp", "--sparse=always", disk, quiet)
	closeAll()

	after := filepath.Join(t.TempDir(), "after")
	mount(building, after)
	s, store, removed, closeAll = open(after, never)
	require.True(t, removed, "the mark is on the disk, and what was written is not")
	_, err = store.Snapshots().Prepare(ctx, "active", "")
	require.NoError(t, err)
	closeAll()

	after = filepath.Join(t.TempDir(), "after")
	mount(quiet, after)
	s, store, removed, closeAll = open(after, never)
	require.False(t, removed, "all is on the disk")
	info, err := store.Snapshots().Stat(ctx, "committed")
	require.NoError(t, err)
	require.Equal(t, snapshots.KindCommitted, info.Kind)
	mounts, err = store.Snapshots().View(ctx, "view", "committed")
	require.NoError(t, err)
	b, err := os.ReadFile(filepath.Join(mounts[0].Source, "file"))
	require.NoError(t, err)
	require.True(t, text == string(b), "the file is %.100q", b)
	closeAll()
}

func run(t *testing.T, program string, args ...string) {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", program, args, out)
}
