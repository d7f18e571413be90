// Package gvisor runs build steps on gVisor's user-space kernel with runsc.
//
// Every step has a sandbox of its own. Its root is an overlay inside the sandbox
// over a read-only view of the step's layers; the sandbox keeps what the step
// writes to itself and gives it out as one stream when the step ends, and package
// upper writes that into the step's upper directory. Other mounts write through.
//
// Sandboxes are started ahead of the steps that get them. Such a one has seen no
// input of anyone: the step's files, process and limits come to it when it is
// taken, and it ends with the step.
//
// The package promises that a step has no way to the node's kernel but through
// gVisor, that no process of a step runs and nothing can write to its files when
// Run returns, that nothing of any sandbox is left when Close returns, and that
// whatever a killed process left behind is gone after New on the same state
// directory.
package gvisor

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/cgroup"
)

// Config tells where the runtime finds what it needs.
type Config struct {
	// RunscPath is the runsc program; empty means runsc on the PATH.
	RunscPath string
	// StateDir holds what belongs to running sandboxes. Only one Runtime may use
	// it at a time.
	StateDir string
	// Networks hands out the network namespaces of steps that have a network.
	Networks sandbox.Networks
	// CgroupParent is the cgroup under which every sandbox gets one of its own, an
	// absolute path; empty means DefaultCgroupParent.
	CgroupParent string
	// Prepared is how many sandboxes of the usual kind are kept ready once a step
	// has run or Warm was called; 0 means DefaultPrepared, and less means none.
	Prepared int
	// Expect, if set, tells how many steps may come, and less than 0 when that is not
	// known. No more sandboxes are kept ready than that. It must not block.
	Expect func() int
}

// DefaultCgroupParent is the cgroup of all sandboxes of the node.
const DefaultCgroupParent = "/kiln/gvisor"

// Runtime implements sandbox.Runtime.
type Runtime struct {
	cfg   Config
	runsc string
	// pause is the file with the program of the sandboxes' own containers.
	pause string
	// image is the file with the root of the sandboxes' own containers.
	image string
	// id is a random part of the names of sandboxes.
	id       string
	cgroups  *cgroup.Node
	starters *starters
	pool     *pool
	boxes    atomic.Int64

	mu    sync.Mutex
	steps map[string]*running // guarded by mu
}

// running is a step whose process can have company.
type running struct {
	ctl        control
	container  string
	rootfs     string
	noNewPrivs bool
	ended      <-chan struct{}
}

var _ sandbox.Runtime = (*Runtime)(nil)

// New returns a runtime on cfg.StateDir, after it has released what a killed
// process left there.
func New(ctx context.Context, cfg Config) (_ *Runtime, err error) {
	runsc, err := findRunsc(cfg)
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(cfg.StateDir) {
		return nil, fmt.Errorf("gvisor: state directory %q is not absolute", cfg.StateDir)
	}
	if cfg.CgroupParent == "" {
		cfg.CgroupParent = DefaultCgroupParent
	}
	r := &Runtime{cfg: cfg, runsc: runsc, id: strings.ToLower(rand.Text()[:8]), steps: map[string]*running{}}
	for _, dir := range []string{r.stepsDir(), r.sharedDir(), r.startersDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("gvisor: make state directory: %w", err)
		}
	}
	// The kernel names places without symlinks; so must we, to know them again.
	if r.cfg.StateDir, err = filepath.EvalSymlinks(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("gvisor: find state directory: %w", err)
	}
	if r.cgroups, err = cgroup.Open(); err != nil {
		return nil, fmt.Errorf("gvisor: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.cgroups.Close())
		}
	}()
	if err := r.recover(ctx); err != nil {
		return nil, fmt.Errorf("gvisor: clean up after an earlier process: %w", err)
	}
	if r.image, err = writeImage(r.cfg.StateDir); err != nil {
		return nil, fmt.Errorf("gvisor: %w", err)
	}
	if r.pause, err = writePause(r.cfg.StateDir); err != nil {
		return nil, fmt.Errorf("gvisor: %w", err)
	}
	ahead := cfg.Prepared
	if ahead == 0 {
		ahead = DefaultPrepared
	}
	r.starters, r.pool = newStarters(r), newPool(r, max(ahead, 0))
	return r, nil
}

// Class implements sandbox.Runtime.
func (r *Runtime) Class() sandbox.Class { return sandbox.GVisor }

// Warm starts preparing sandboxes for steps with the given network, and returns
// at once. What goes wrong is left to the step that needs a sandbox to tell.
func (r *Runtime) Warm(network sandbox.NetworkMode) { r.pool.warm(usual(network)) }

// Close implements sandbox.Runtime.
func (r *Runtime) Close() error {
	err := errors.Join(r.pool.close(), r.starters.close(), r.releaseShared())
	r.cgroups.Tidy(r.cfg.CgroupParent)
	return errors.Join(err, r.cgroups.Close())
}

// boxID names a sandbox. The name is unique on the node, also among the cgroups of
// agents that cannot see each other.
func (r *Runtime) boxID() string { return fmt.Sprintf("%s-%d", r.id, r.boxes.Add(1)) }

func (r *Runtime) stepsDir() string  { return filepath.Join(r.cfg.StateDir, "steps") }
func (r *Runtime) sharedDir() string { return filepath.Join(r.cfg.StateDir, "shared") }

func (r *Runtime) lookup(id string) *running {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.steps[id]
}

// reserve takes a step's ID until set is called with nil.
func (r *Runtime) reserve(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, taken := r.steps[id]; taken {
		return errors.New("a step of this ID runs already")
	}
	r.steps[id] = nil // no process yet
	return nil
}

func (r *Runtime) set(id string, s *running) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s == nil {
		delete(r.steps, id)
	} else {
		r.steps[id] = s
	}
}
