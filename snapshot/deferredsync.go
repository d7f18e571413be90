package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (
	// syncMark is a file in the state directory. While it is there its databases may be
	// ahead of the disk; it has the mountID with which that is no harm.
	syncMark = "unsynced"
	// syncQuiet is how long nothing has to run before all is synced. By then the kernel
	// has written most of it on its own (vm.dirty_expire_centisecs).
	syncQuiet = 30 * time.Second
)

// Database is a bbolt database, or what stands before one.
type Database interface {
	// Update runs fn in a transaction that writes.
	Update(fn func(*bolt.Tx) error) error
}

// DeferredSync has the databases of a state directory synced after builds and not at
// each of the hundreds of commits of a build, each of which would wait for the disk.
//
// A process that is killed loses nothing, as the kernel has what was written. When the
// node itself goes down meanwhile, or its disk, no order holds between what reached the
// disk, neither within a database nor between it and the files that it speaks of. So a
// mark says, durably and before the first commit that is not synced, that this may be;
// and who opens the directory in another boot or mount and finds the mark removes what
// it is about, which is a cache. Between builds every commit is synced.
//
// Its methods may be called concurrently.
type DeferredSync struct {
	cfg DeferredSyncConfig
	// mount is the mountID of the state directory; empty: nothing is deferred.
	mount string
	quiet time.Duration
	// timer goes off when all is to be synced.
	timer   *time.Timer
	stop    chan struct{}
	stopped sync.WaitGroup

	// mu guards what follows.
	mu        sync.Mutex
	databases []Database
	users     int
	// marked is whether the mark is there.
	marked bool
	// lazy is whether databases commit without a sync. They do only while it is there.
	lazy   bool
	closed bool
}

// DeferredSyncConfig says what a DeferredSync is about.
type DeferredSyncConfig struct {
	// Root is the state directory. The caller holds its lock.
	Root string
	// State names what is in Root and belongs to the databases, with themselves. It is
	// removed when the node or its disk went down before they were synced.
	State []string
	// Files has the files beside the databases synced, too, before the mark goes. That is
	// all of the file system's, takes a while, and is for a process that stays.
	Files bool
}

// OpenDeferredSync removes what a node or disk that went down has left half-written, and returns
// what defers from now on, and whether something was removed. It has to come before the
// databases are opened. The caller calls Close.
func OpenDeferredSync(cfg DeferredSyncConfig) (_ *DeferredSync, removed bool, err error) {
	return openDeferredSync(cfg, syncQuiet)
}

func openDeferredSync(cfg DeferredSyncConfig, quiet time.Duration) (_ *DeferredSync, removed bool, err error) {
	s := &DeferredSync{cfg: cfg, quiet: quiet, stop: make(chan struct{})}
	if s.mount, err = mountID(cfg.Root); err != nil {
		logrus.WithError(err).Warn("the cache's databases are synced at each commit")
	}
	last, err := readLine(s.path())
	if err == nil {
		s.marked = true
		if s.lazy = last == s.mount && s.mount != ""; !s.lazy {
			for _, name := range cfg.State {
				if err := os.RemoveAll(filepath.Join(cfg.Root, name)); err != nil {
					return nil, false, fmt.Errorf("remove what is left half-written of a node that went down: %w", err)
				}
			}
			removed, err = true, s.unmark()
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, fmt.Errorf("state directory: %w", err)
	}
	s.timer = time.NewTimer(quiet)
	s.stopped.Go(s.run)
	return s, removed, nil
}

// readLine returns what a file of one short line has.
func readLine(path string) (string, error) {
	b, err := os.ReadFile(path)
	return string(bytes.TrimSpace(b)), err
}

// Add has databases synced as the others are from now on.
func (s *DeferredSync) Add(databases ...Database) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.databases = append(s.databases, databases...)
	if !s.lazy {
		return nil
	}
	return setAll(databases, true)
}

// Remove syncs databases, which are about to be closed, and forgets them.
func (s *DeferredSync) Remove(databases ...Database) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.databases = slices.DeleteFunc(s.databases, func(db Database) bool { return slices.Contains(databases, db) })
	if !s.lazy {
		return nil
	}
	return setAll(databases, false)
}

// Begin announces a build, or what else commits a lot. The caller calls End. When the
// mark cannot be made, on a full disk say, commits are synced as between builds.
func (s *DeferredSync) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users++
	if s.closed || s.lazy || s.mount == "" {
		return
	}
	err := s.mark()
	if err == nil {
		s.lazy = true
		err = setAll(s.databases, true)
	}
	if err != nil {
		logrus.WithError(err).Warn("the cache's databases are synced at each commit")
	}
}

// End says that what Begin announced is over.
func (s *DeferredSync) End() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users--; s.users == 0 {
		s.timer.Reset(s.quiet)
	}
}

// Close syncs what is not synced. It comes before the databases are closed, when nothing
// uses them any more.
func (s *DeferredSync) Close() error {
	close(s.stop)
	s.stopped.Wait()
	s.timer.Stop()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	return s.sync()
}

func (s *DeferredSync) run() {
	for {
		select {
		case <-s.stop:
			return
		case <-s.timer.C:
		}
		if err := s.sync(); err != nil {
			logrus.WithError(err).Error("sync the cache's databases; when the node goes down now, the cache is removed")
			s.timer.Reset(s.quiet)
		}
	}
}

// sync syncs all that is not synced, unless something that Begin announced runs. A build
// that begins meanwhile waits only for the databases.
func (s *DeferredSync) sync() error {
	s.mu.Lock()
	if !s.marked || s.users > 0 && !s.closed {
		s.mu.Unlock()
		return nil
	}
	err := setAll(s.databases, false)
	s.lazy = err != nil
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if s.cfg.Files {
		if err := s.onRoot(unix.Syncfs); err != nil {
			return fmt.Errorf("sync the file system of %s: %w", s.cfg.Root, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lazy { // something has begun
		return nil
	}
	return s.unmark()
}

func (s *DeferredSync) path() string { return filepath.Join(s.cfg.Root, syncMark) }

// mark makes the mark. The caller holds mu.
func (s *DeferredSync) mark() (err error) {
	if s.marked {
		return nil
	}
	f, err := os.OpenFile(s.path(), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(s.mount + "\n")
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = s.onRoot(unix.Fsync)
	}
	if err != nil {
		return errors.Join(err, os.Remove(s.path()))
	}
	s.marked = true
	return nil
}

// unmark removes the mark. The caller holds mu, or has s for itself.
func (s *DeferredSync) unmark() error {
	if err := os.Remove(s.path()); err != nil {
		return err
	}
	s.marked = false
	return s.onRoot(unix.Fsync)
}

// onRoot calls do with the state directory, open.
func (s *DeferredSync) onRoot(do func(fd int) error) error {
	d, err := os.Open(s.cfg.Root)
	if err != nil {
		return err
	}
	defer d.Close()
	return do(int(d.Fd()))
}

// setAll has databases commit without a sync or with one. One that did without has
// everything synced when this returns.
func setAll(databases []Database, lazy bool) error {
	var errs []error
	for _, db := range databases {
		// Commits read the flag, and there is only one at a time.
		errs = append(errs, db.Update(func(tx *bolt.Tx) error {
			tx.DB().NoSync = lazy
			return nil
		}))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sync databases of the cache: %w", err)
	}
	return nil
}
