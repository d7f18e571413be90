package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/gvisor"
	"github.com/kiln-build/kiln/sandbox/netns"
	"github.com/kiln-build/kiln/sandbox/userns"
)

// runtimes are the sandbox runtimes of a node, made at the first step of their
// class, so that commands that run none need nothing of the node. All engines
// share them: a sandbox that was prepared ahead has seen no input of anyone.
type runtimes struct {
	cfg NodeConfig

	// mu guards what follows.
	mu       sync.Mutex
	made     map[sandbox.Class]sandbox.Runtime
	networks sandbox.Networks
}

func newRuntimes(cfg NodeConfig) *runtimes {
	return &runtimes{cfg: cfg, made: map[sandbox.Class]sandbox.Runtime{}}
}

// get returns the runtime of a class.
func (r *runtimes) get(ctx context.Context, class sandbox.Class) (sandbox.Runtime, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if rt := r.made[class]; rt != nil {
		return rt, nil
	}
	// What a runtime prepares outlives the step that needs it first.
	ctx = context.WithoutCancel(ctx)
	err := makeSearchable(runDir)
	if err != nil {
		return nil, err
	}
	if r.networks == nil {
		if r.networks, err = netns.New(ctx, netns.Config{}); err != nil {
			return nil, fmt.Errorf("prepare networks: %w", err)
		}
	}
	state := StepsDir(r.cfg.Root, class)
	var rt sandbox.Runtime
	switch class {
	case sandbox.GVisor:
		rt, err = asRuntime(gvisor.New(ctx, gvisor.Config{RunscPath: r.cfg.RunscPath, StateDir: state, Networks: r.networks}))
	case sandbox.Userns:
		rt, err = asRuntime(userns.New(ctx, userns.Config{RuncPath: r.cfg.RuncPath, StateDir: state, Networks: r.networks}))
	default:
		_, err = sandbox.ParseClass(string(class))
	}
	if err != nil {
		return nil, err
	}
	r.made[class] = rt
	return rt, nil
}

// close releases the runtimes and the networks.
func (r *runtimes) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, rt := range r.made {
		errs = append(errs, rt.Close())
	}
	if r.networks != nil {
		errs = append(errs, r.networks.Close())
	}
	r.made, r.networks = nil, nil
	return errors.Join(errs...)
}

// runDir holds what concerns running processes of kiln only.
const runDir = "/run/kiln"

// makeSearchable lets steps pass through dir, but not list it.
func makeSearchable(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		return fmt.Errorf("make run directory searchable: %w", err)
	}
	return nil
}

// StepsDir returns where an engine with the given state directory keeps what its
// running steps in sandboxes of class use.
//
// The roots of steps in user namespaces are mounted in a place of their own: such
// a step is nobody on the node and could not pass through a state directory that
// is root's alone. gVisor's files hold what steps write and stay on disk.
func StepsDir(root string, class sandbox.Class) string {
	if class == sandbox.Userns {
		return filepath.Join(runDir, "steps", digest.FromString(root).Encoded()[:16])
	}
	return filepath.Join(root, "steps")
}

// asRuntime keeps a nil pointer from becoming a runtime that is not nil.
func asRuntime[R sandbox.Runtime](r R, err error) (sandbox.Runtime, error) {
	if err != nil {
		return nil, err
	}
	return r, nil
}
