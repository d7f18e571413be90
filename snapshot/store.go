// Package snapshot is the node's build store: layers as overlay snapshots,
// content-addressed blobs, leases that protect them, and their collection.
//
// It is made of containerd's own libraries, run in this process: no daemon is
// needed. The store promises that what a lease or a labelled reference protects
// stays, that everything else goes at the next collection, and that a process
// killed at any point leaves a store that opens. It mounts nothing itself.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// Namespace is the containerd namespace that the store's objects live in.
const Namespace = "kiln"

// Snapshotter is the name of the store's snapshotter. BuildKit computes layers
// straight from an overlay's upper directory when it has this name.
const Snapshotter = "overlayfs"

// openTimeout bounds the wait for the metadata file, which another process may
// hold for an instant while it closes.
const openTimeout = 5 * time.Second

// Store is an open build store. Its methods may be called concurrently. One
// process at a time may have a store open; see Lock.
type Store struct {
	// DB holds the metadata of content, snapshots and leases.
	DB *metadata.DB

	bolt    *bolt.DB
	layers  *storage.MetaStore
	overlay snapshots.Snapshotter
}

// Open opens the store in the directory root, making it when it is missing.
func Open(ctx context.Context, root string) (_ *Store, err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("make build store: %w", err)
	}
	s := &Store{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := s.openSnapshots(filepath.Join(root, "snapshots")); err != nil {
		return nil, fmt.Errorf("open snapshots in %s: %w", root, err)
	}
	dir := filepath.Join(root, "snapshots", "snapshots")
	if err := s.removeLeft(ctx, dir); err != nil {
		return nil, err
	}
	if err := spread(dir); err != nil {
		return nil, err
	}
	content, err := local.NewStore(filepath.Join(root, "content"))
	if err != nil {
		return nil, fmt.Errorf("open content in %s: %w", root, err)
	}
	s.bolt, err = bolt.Open(filepath.Join(root, "metadata.db"), 0o600, &bolt.Options{
		Timeout:        openTimeout,
		FreelistType:   bolt.FreelistMapType,
		NoFreelistSync: true,
	})
	if err != nil {
		return nil, fmt.Errorf("open metadata in %s: %w", root, err)
	}
	s.DB = metadata.NewDB(s.bolt, content, map[string]snapshots.Snapshotter{Snapshotter: s.overlay})
	if err := s.DB.Init(ctx); err != nil {
		return nil, fmt.Errorf("read metadata in %s: %w", root, err)
	}
	return s, nil
}

func (s *Store) openSnapshots(dir string) (err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if s.layers, err = storage.NewMetaStore(filepath.Join(dir, "metadata.db")); err != nil {
		return err
	}
	s.overlay, err = overlay.NewSnapshotter(dir, overlay.WithMetaStore(s.layers))
	return err
}

// Databases returns the store's databases, for a DeferredSync.
func (s *Store) Databases() []Database {
	return []Database{s.bolt, metaStoreDatabase{s.layers}}
}

// metaStoreDatabase is a snapshotter's own database.
type metaStoreDatabase struct{ *storage.MetaStore }

// Update implements Database.
func (m metaStoreDatabase) Update(fn func(*bolt.Tx) error) error {
	_, t, err := m.TransactionContext(context.Background(), true)
	if err != nil {
		return err
	}
	tx, ok := t.(*bolt.Tx)
	if !ok {
		return errors.Join(fmt.Errorf("database of snapshots: its transaction is a %T", t), t.Rollback())
	}
	if err := fn(tx); err != nil {
		return errors.Join(err, t.Rollback())
	}
	return t.Commit()
}

// removeLeft removes directories of snapshots that have no record. A process that was
// killed between the two has left them, and the next snapshot would get the number
// of one.
func (s *Store) removeLeft(ctx context.Context, dir string) error {
	err := s.overlay.(snapshots.Cleaner).Cleanup(ctx)
	if errdefs.IsNotFound(err) { // there never was a record
		if err = os.RemoveAll(dir); err == nil {
			err = os.Mkdir(dir, 0o700)
		}
	}
	if err != nil {
		return fmt.Errorf("remove what is left of snapshots in %s: %w", dir, err)
	}
	return nil
}

// Snapshots returns the store's snapshotter. Callers set Namespace in the
// context.
func (s *Store) Snapshots() snapshots.Snapshotter { return s.DB.Snapshotter(Snapshotter) }

// Close closes the store. Whoever holds mounts of its snapshots must have
// released them.
func (s *Store) Close() error {
	var errs []error
	if s.overlay != nil {
		errs = append(errs, s.overlay.Close())
	}
	if s.bolt != nil {
		errs = append(errs, s.bolt.Close())
	}
	return errors.Join(errs...)
}
