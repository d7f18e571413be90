// Package gvisor runs build steps on gVisor's user-space kernel with runsc.
//
// Every step has a sandbox of its own. Its root is an overlay inside the sandbox
// over a read-only view of the step's layers; the sandbox keeps what the step
// writes to itself and gives it out as one stream when the step ends, and package
// upper writes that into the step's upper directory. Other mounts write through.
//
// The package promises that a step has no way to the node's kernel but through
// gVisor, that nothing of a sandbox is left when Run returns, and that whatever a
// killed process left behind is gone after New on the same state directory.
package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
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
	// CgroupParent is the cgroup under which every sandbox gets one of its own;
	// empty leaves sandboxes in the cgroup of this process.
	CgroupParent string
}

// Runtime implements sandbox.Runtime.
type Runtime struct {
	cfg   Config
	runsc string
	pause *os.File

	mu    sync.Mutex
	steps map[string]*running
}

// running is a step whose process can have company.
type running struct {
	ctl        control
	rootfs     string
	noNewPrivs bool
	ended      <-chan struct{}
}

var _ sandbox.Runtime = (*Runtime)(nil)

// New returns a runtime on cfg.StateDir, after it has released what a killed
// process left there.
func New(ctx context.Context, cfg Config) (*Runtime, error) {
	runsc, err := findRunsc(cfg)
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(cfg.StateDir) {
		return nil, fmt.Errorf("gvisor: state directory %q is not absolute", cfg.StateDir)
	}
	r := &Runtime{cfg: cfg, runsc: runsc, steps: map[string]*running{}}
	for _, dir := range []string{r.stepsDir(), r.sharedDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("gvisor: make state directory: %w", err)
		}
	}
	// The kernel names places without symlinks; so must we, to know them again.
	if r.cfg.StateDir, err = filepath.EvalSymlinks(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("gvisor: find state directory: %w", err)
	}
	if err := r.recover(ctx); err != nil {
		return nil, fmt.Errorf("gvisor: clean up after an earlier process: %w", err)
	}
	if r.pause, err = writePause(r.cfg.StateDir); err != nil {
		return nil, fmt.Errorf("gvisor: %w", err)
	}
	return r, nil
}

// Check tells whether this node can run gVisor sandboxes. What it lacks is a
// *sandbox.UnavailableError.
func Check(ctx context.Context, cfg Config) error {
	runsc, err := findRunsc(cfg)
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, runsc, "--version").CombinedOutput()
	if err != nil {
		return unavailable("a runsc that runs", "Install runsc for this machine.", fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out))))
	}
	if _, err := pauseProgram(); err != nil {
		return unavailable("support for this processor", "Use the userns sandbox on this node.", err)
	}
	if os.Geteuid() != 0 {
		return unavailable("root privileges", "Start the agent as root.", nil)
	}
	if err := probeMount(); err != nil {
		return unavailable("the right to mount (CAP_SYS_ADMIN)", "Give the agent's container CAP_SYS_ADMIN and no profile that denies mount.", err)
	}
	return nil
}

// probeMount asks for a file system without attaching it.
func probeMount() error {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func unavailable(missing, fix string, err error) error {
	return &sandbox.UnavailableError{Class: sandbox.GVisor, Missing: missing, Fix: fix, Err: err}
}

func findRunsc(cfg Config) (string, error) {
	name := cfg.RunscPath
	if name == "" {
		name = "runsc"
	}
	p, err := exec.LookPath(name)
	if err == nil {
		p, err = filepath.Abs(p)
	}
	if err != nil {
		missing := "runsc on the PATH"
		if cfg.RunscPath != "" {
			missing = "runsc at " + cfg.RunscPath
		}
		return "", unavailable(missing, "Build it with `make build` or install gVisor.", err)
	}
	return p, nil
}

// Class implements sandbox.Runtime.
func (r *Runtime) Class() sandbox.Class { return sandbox.GVisor }

// Close implements sandbox.Runtime.
func (r *Runtime) Close() error {
	return errors.Join(r.pause.Close(), r.releaseShared())
}

func (r *Runtime) stepsDir() string  { return filepath.Join(r.cfg.StateDir, "steps") }
func (r *Runtime) sharedDir() string { return filepath.Join(r.cfg.StateDir, "shared") }

func (r *Runtime) lookup(id string) *running {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.steps[id]
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
