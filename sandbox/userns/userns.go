// Package userns runs build steps with runc in user namespaces.
//
// It promises that no process of a step has an ID on the node below FirstID, and
// that two owners never run under the same IDs at the same time, also when
// several processes use the package. The kernel shifts IDs while a step runs; on
// disk its layers stay as an image needs them. A step's processes, cgroup,
// namespaces and mounts are gone when Run returns; what a killed process left is
// gone when New returns.
package userns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// DefaultUIDRangeDir is where processes of this node agree on who uses which IDs.
const DefaultUIDRangeDir = "/run/kiln/uidranges"

// DefaultCgroupParent is the cgroup below which each step has its own.
const DefaultCgroupParent = "/kiln"

// Config says where the runtime finds and keeps things.
type Config struct {
	// RuncPath is the runc program; empty means runc on the PATH.
	RuncPath string
	// StateDir belongs to one runtime. All directories above it have to be
	// searchable by everyone, because steps run under IDs that own nothing.
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
	if c.RuncPath == "" {
		c.RuncPath = "runc"
	}
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
	runc   *runc
	ranges *ranges

	mu      sync.Mutex
	running map[string]*running
}

// running is a step between the start and the end of its first process.
type running struct {
	step  *sandbox.Step
	ready bool
	// rootfs is where the step's root is mounted on the node.
	rootfs     string
	noNewPrivs bool
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
	if err := searchable(memDir(cfg)); err != nil {
		return nil, err
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
	for _, dir := range []string{stepsDir(cfg), runcDir(cfg)} {
		if err := os.Mkdir(dir, 0o711); err != nil {
			return nil, fmt.Errorf("make state directory: %w", err)
		}
	}
	rc, err := newRunc(cfg.RuncPath, runcDir(cfg))
	if err != nil {
		return nil, err
	}
	r := &Runtime{cfg: cfg, lock: lock, runc: rc, running: map[string]*running{}}
	r.ranges = newRanges(cfg.UIDRangeDir, rc)
	if err := r.recover(); err != nil {
		rc.close()
		return nil, fmt.Errorf("clean up after a former process: %w", err)
	}
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
	r.runc.removeCgroup(r.cgroupParent())
	r.runc.removeCgroup(r.cfg.CgroupParent)
	r.runc.close()
	return errors.Join(unmountState(memDir(r.cfg)), r.ranges.close(), r.lock.Close())
}

// memDir holds everything that lives as long as a step.
func memDir(cfg Config) string   { return filepath.Join(cfg.StateDir, "run") }
func stepsDir(cfg Config) string { return filepath.Join(memDir(cfg), "steps") }
func runcDir(cfg Config) string  { return filepath.Join(memDir(cfg), "runc") }

// searchable refuses a directory that a process with unknown IDs cannot reach.
func searchable(dir string) error {
	for ; ; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err != nil {
			return fmt.Errorf("check state directory: %w", err)
		}
		if st.Mode().Perm()&0o001 == 0 {
			return fmt.Errorf("directory %s is not searchable for everyone, so that steps could not reach their root: chmod o+x it, or choose another state directory", dir)
		}
		if dir == "/" {
			return nil
		}
	}
}

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

// Check tells whether this node can run steps of this class. The error is a
// *sandbox.UnavailableError.
func Check(ctx context.Context, cfg Config) error {
	cfg = cfg.withDefaults()
	missing := func(what, fix string, err error) error {
		return &sandbox.UnavailableError{Class: sandbox.Userns, Missing: what, Fix: fix, Err: err}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil || caps[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return missing("CAP_SYS_ADMIN", "run as root, or give the agent's container CAP_SYS_ADMIN", err)
	}
	path, err := exec.LookPath(cfg.RuncPath)
	if err != nil {
		return missing("runc", "install runc 1.2 or later, or set its path", err)
	}
	rc, err := newRunc(path, runcDir(cfg))
	if err != nil {
		return missing("a usable runc", "install runc 1.2 or later", err)
	}
	defer rc.close()
	ns, err := newUserNS(rc, FirstID)
	if err != nil {
		return missing("user namespaces", "set the sysctl user.max_user_namespaces above 0", err)
	}
	defer ns.Close()
	if err := tryOverlay(cfg.StateDir, ns); err != nil {
		return missing("overlays of idmapped mounts", "use Linux 6.13 or later, and ext4, xfs, btrfs or tmpfs for the state directory", err)
	}
	return ctx.Err()
}
