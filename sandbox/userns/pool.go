package userns

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/kiln-build/kiln/sandbox"
)

const (
	// ahead is how many sandboxes of a mode that steps use are kept ready.
	ahead = 2
	// idle is after how long without a step they are taken away again.
	idle = 30 * time.Second
)

// pool keeps sandboxes ready. Each has IDs, namespaces and a network of its own, and
// none has served a step.
type pool struct {
	r *Runtime
	// ctx ends when nothing is to be made any more.
	ctx    context.Context
	cancel context.CancelFunc
	wake   chan struct{} // a sandbox was taken
	done   chan struct{} // the keeper has ended

	// mu guards what follows.
	mu    sync.Mutex
	used  map[sandbox.NetworkMode]bool
	ready map[sandbox.NetworkMode][]*cell
	heirs []*heir // the oldest first
}

// newPool starts with the mode that most steps use.
func newPool(r *Runtime) *pool {
	ctx, cancel := context.WithCancel(context.Background())
	p := &pool{
		r: r, ctx: ctx, cancel: cancel, wake: make(chan struct{}, 1), done: make(chan struct{}),
		used: map[sandbox.NetworkMode]bool{}, ready: map[sandbox.NetworkMode][]*cell{},
	}
	mode := sandbox.NetworkEgress
	if r.cfg.Networks == nil {
		mode = sandbox.NetworkNone
	}
	p.want(mode)
	go p.keep()
	return p
}

// want has sandboxes of a mode kept ready from now on.
func (p *pool) want(mode sandbox.NetworkMode) {
	p.mu.Lock()
	p.used[mode] = true
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// take returns a ready sandbox of a mode, or nil.
func (p *pool) take(mode sandbox.NetworkMode) *cell {
	defer p.want(mode)
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.ready[mode]
	if len(list) == 0 {
		return nil
	}
	p.ready[mode] = list[1:]
	return list[0]
}

// keep fills the pool until ctx is over.
func (p *pool) keep() {
	defer close(p.done)
	timer := time.NewTimer(idle)
	defer timer.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-p.wake:
			for p.ctx.Err() == nil && p.fill() {
			}
			timer.Reset(idle)
		case <-timer.C:
			p.r.fail(p.empty())
		}
	}
}

// fill makes one sandbox that is missing, and reports whether there may be more.
func (p *pool) fill() bool {
	for _, mode := range []sandbox.NetworkMode{sandbox.NetworkEgress, sandbox.NetworkNone} {
		p.mu.Lock()
		missing := p.used[mode] && len(p.ready[mode]) < ahead
		p.mu.Unlock()
		if !missing {
			continue
		}
		c, err := p.r.newCell(p.ctx, mode, nil)
		p.mu.Lock()
		if err != nil {
			p.used[mode] = false // the next step meets the error itself
		} else {
			p.ready[mode] = append(p.ready[mode], c)
		}
		p.mu.Unlock()
		return true
	}
	return false
}

// empty releases all sandboxes that are ready.
func (p *pool) empty() error {
	p.mu.Lock()
	ready := p.ready
	p.ready, p.used = map[sandbox.NetworkMode][]*cell{}, map[sandbox.NetworkMode]bool{}
	p.mu.Unlock()
	var errs []error
	for _, list := range ready {
		for _, c := range list {
			errs = append(errs, p.r.discard(c))
		}
	}
	return errors.Join(errs...)
}

// close ends the keeper and releases all that is ready.
func (p *pool) close() error {
	p.cancel()
	<-p.done
	p.mu.Lock()
	p.dropHeirs(0)
	p.mu.Unlock()
	return p.empty()
}

// take returns a sandbox for one step.
func (r *Runtime) take(ctx context.Context, step *sandbox.Step) (*cell, error) {
	c := r.pool.succeed(ctx, step)
	if c == nil {
		c = r.pool.take(step.Network)
	}
	for ; c != nil; c = r.pool.take(step.Network) {
		if c.alive() {
			return c, nil
		}
		r.discardLater(c) // something else of the node has killed it
	}
	c, err := r.newCell(ctx, step.Network, nil)
	if err != nil {
		return nil, fmt.Errorf("make sandbox: %w", err)
	}
	return c, nil
}
