package engine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/gvisor"
	"github.com/kiln-build/kiln/sandbox/netns"
	"github.com/kiln-build/kiln/sandbox/userns"
)

// runtimes are the sandbox runtimes of a node, made at the first step of their
// class or by warm, so that commands that run no step need nothing of the node. All engines
// share them: a sandbox that was prepared ahead has seen no input of anyone.
type runtimes struct {
	cfg NodeConfig
	// expected is set when sandboxes are prepared for steps that are known to come, and
	// for no later build.
	expected *expectedSteps
	// warming is what makes runtimes that nobody waits for.
	warming sync.WaitGroup

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
	rt, err := r.make(ctx, class)
	if err != nil {
		return nil, err
	}
	r.made[class] = rt
	return rt, nil
}

// make makes the runtime of a class, which begins to prepare sandboxes. The caller
// holds mu.
func (r *runtimes) make(ctx context.Context, class sandbox.Class) (sandbox.Runtime, error) {
	if r.networks == nil {
		networks, err := netns.New(ctx, netns.Config{Policy: stepEgress(r.cfg.Fetch)})
		if err != nil {
			return nil, fmt.Errorf("prepare networks: %w", err)
		}
		r.networks = networks
	}
	state := StepsDir(r.cfg.Root, class)
	switch class {
	case sandbox.GVisor:
		cfg := gvisor.Config{RunscPath: r.cfg.RunscPath, StateDir: state, Networks: r.networks}
		if r.expected != nil {
			cfg.Expect = r.expected.left
		}
		rt, err := gvisor.New(ctx, cfg)
		if err != nil {
			return nil, err
		}
		rt.Warm(sandbox.NetworkEgress)
		return rt, nil
	case sandbox.Userns:
		rt, err := userns.New(ctx, userns.Config{StateDir: state, Networks: r.networks})
		if err != nil {
			return nil, err
		}
		return rt, nil
	default:
		_, err := sandbox.ParseClass(string(class))
		return nil, err
	}
}

// warm makes the runtimes of classes in the background, one after another. Errors
// are left to the steps that need them.
func (r *runtimes) warm(classes []sandbox.Class) {
	r.warming.Go(func() {
		for _, class := range classes {
			_, _ = r.get(context.Background(), class)
		}
	})
}

// close releases the runtimes and the networks.
func (r *runtimes) close() error {
	r.warming.Wait()
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

// StepsDir returns where an engine with the given state directory keeps what its
// running steps in sandboxes of class use. Steps need no way through it.
func StepsDir(root string, class sandbox.Class) string {
	if class == sandbox.Userns {
		return filepath.Join(root, "userns")
	}
	return filepath.Join(root, "steps")
}
