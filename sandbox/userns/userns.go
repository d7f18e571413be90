// Package userns runs build steps on the node's kernel, in user namespaces.
//
// It promises that no process of a step has an ID on the node below FirstID, and
// that no two sandboxes have the same IDs at the same time, also when several
// processes use the package. The kernel shifts IDs while a step runs; on disk its
// layers stay as an image needs them. A step's processes and mounts are gone when Run
// returns, its cgroup and network soon after, and all of them when Close returns. If
// this process is killed, its steps are killed too; what remains of them is gone when
// the next New returns.
//
// Sandboxes are made ahead, because making one takes longer than most steps: a
// process in its namespaces and cgroup, with everything mounted that is the same for
// all steps, waits for a step. It has seen nothing of any build, serves one step, and
// is never used again. Only a network in which no packet was goes to a new sandbox, for
// the direct successor of its step. The program that waits is a few instructions long (see package
// script); all decisions are made here. What a step finds is what runc would give it,
// and tests compare the two.
package userns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/cgroup"
)

// DefaultUIDRangeDir is where processes of this node agree on who uses which IDs.
const DefaultUIDRangeDir = "/run/kiln/uidranges"

// DefaultCgroupParent is the cgroup below which each step has its own.
const DefaultCgroupParent = "/kiln"

// Config says where the runtime finds and keeps things.
type Config struct {
	// StateDir belongs to one runtime.
	StateDir string
	// Networks gives steps their network. Without it steps can have none.
	Networks sandbox.Networks
	// CgroupParent is the cgroup of all steps; empty means DefaultCgroupParent.
	CgroupParent string
	// UIDRangeDir is shared by all runtimes of the node; empty means
	// DefaultUIDRangeDir.
	UIDRangeDir string
}

func (c Config) withDefaults() Config {
	if c.CgroupParent == "" {
		c.CgroupParent = DefaultCgroupParent
	}
	if c.UIDRangeDir == "" {
		c.UIDRangeDir = DefaultUIDRangeDir
	}
	return c
}

// Runtime implements sandbox.Runtime.
type Runtime struct {
	cfg    Config
	lock   *os.File
	zygote *zygote
	ranges *ranges
	// cgroups makes the cgroups of sandboxes, and claim is the one around them in
	// the unified hierarchy.
	cgroups *cgroup.Node
	claim   *os.File
	// template is the spec of a step, of which sandboxes are made.
	template *specs.Spec
	filters  *filters
	facts    *factCache
	pool     *pool

	background sync.WaitGroup

	// mu guards what follows.
	mu      sync.Mutex
	running map[string]*running
	cells   int   // made so far
	failed  error // what could not be released in the background
}

var _ sandbox.Runtime = (*Runtime)(nil)

// New returns a runtime that owns cfg.StateDir, after it has removed what a
// killed process left there.
func New(ctx context.Context, cfg Config) (_ *Runtime, err error) {
	cfg = cfg.withDefaults()
	if !filepath.IsAbs(cfg.StateDir) {
		return nil, fmt.Errorf("state directory %q is not absolute", cfg.StateDir)
	}
	if err := os.MkdirAll(memDir(cfg), 0o711); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	// The kernel lists mounts without symlinks.
	if cfg.StateDir, err = filepath.EvalSymlinks(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("resolve state directory: %w", err)
	}
	lock, err := lockFile(filepath.Join(cfg.StateDir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("lock state directory %s: %w", cfg.StateDir, err)
	}
	if lock == nil {
		return nil, fmt.Errorf("state directory %s is in use by another process: give each its own", cfg.StateDir)
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unmountBelow(memDir(cfg)); err != nil {
		return nil, fmt.Errorf("clean up after a former process: %w", err)
	}
	if err := mountState(memDir(cfg)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unmountState(memDir(cfg)))
		}
	}()
	for _, dir := range []string{stepsDir(cfg), roomDir(cfg)} {
		if err := os.Mkdir(dir, 0o711); err != nil {
			return nil, fmt.Errorf("make state directory: %w", err)
		}
	}
	r := &Runtime{cfg: cfg, lock: lock, ranges: newRanges(cfg.UIDRangeDir), facts: newFactCache(), running: map[string]*running{}}
	r.template = sandbox.BaseSpec(&sandbox.Step{}, sandbox.Process{}, sandbox.UserIDs{}, "", true)
	r.filters = newFilters(r.template)
	if r.cgroups, err = openCgroups(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.cgroups.Close())
		}
	}()
	if err := r.recover(); err != nil {
		return nil, fmt.Errorf("clean up after a former process: %w", err)
	}
	if r.claim, err = r.claimCgroup(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.removeCgroups()
			r.claim.Close()
		}
	}()
	if err := limitDevices(r.claim); err != nil {
		return nil, err
	}
	if r.zygote, err = newZygote(roomDir(cfg)); err != nil {
		return nil, err
	}
	r.pool = newPool(r)
	return r, nil
}

// Class implements sandbox.Runtime.
func (r *Runtime) Class() sandbox.Class { return sandbox.Userns }

// Close implements sandbox.Runtime.
func (r *Runtime) Close() error {
	r.mu.Lock()
	n := len(r.running)
	r.mu.Unlock()
	if n > 0 {
		return fmt.Errorf("close userns runtime: %d steps are still running", n)
	}
	errs := []error{r.pool.close()}
	r.background.Wait()
	r.zygote.close()
	r.removeCgroups()
	r.mu.Lock()
	errs = append(errs, r.failed)
	r.mu.Unlock()
	return errors.Join(append(errs, r.claim.Close(), r.cgroups.Close(), unmountState(memDir(r.cfg)), r.ranges.close(), r.lock.Close())...)
}

// discardLater releases the sandbox of a step that is over.
func (r *Runtime) discardLater(c *cell) {
	r.background.Go(func() { r.fail(r.discard(c)) })
}

// fail keeps an error of something in the background for Close.
func (r *Runtime) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = errors.Join(r.failed, err)
}

// memDir holds everything that lives as long as a step.
func memDir(cfg Config) string   { return filepath.Join(cfg.StateDir, "run") }
func stepsDir(cfg Config) string { return filepath.Join(memDir(cfg), "steps") }
func roomDir(cfg Config) string  { return filepath.Join(memDir(cfg), "zygote") }

// lockFile opens and locks path; it returns nil when someone else has the lock.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, err
}
