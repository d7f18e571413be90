package userns

import (
	"context"
	"slices"
	"time"

	"github.com/kiln-build/kiln/sandbox"
)

const (
	// patience is how long a network waits for a successor of the step that had it. Solvers
	// take some milliseconds to come to the next step, on a busy node many.
	patience = time.Second
	// maxHeirs bounds how many wait at a time.
	maxHeirs = 8
)

// heir is a new sandbox with the network of a step that is over, for the direct successor
// of it. Making a network and taking it away takes the kernel longer than all the rest of
// a sandbox.
type heir struct {
	next   *sandbox.Successor
	expiry *time.Timer
	// made is closed when it is known whether there is a sandbox.
	made chan struct{}
	// cell is the sandbox, or nil. The pool's mu guards it and left, which tells that nobody
	// comes for it any more.
	cell *cell
	left bool
}

// bequeath has a sandbox made with the network of c for a successor of its step, if no
// packet was in it. c has ended, and is released.
func (p *pool) bequeath(c *cell, next *sandbox.Successor) {
	h := &heir{next: next, made: make(chan struct{})}
	p.mu.Lock()
	p.heirs = append(p.heirs, h)
	h.expiry = time.AfterFunc(patience, func() { p.expire(h) })
	p.dropHeirs(maxHeirs)
	p.mu.Unlock()
	p.r.background.Go(func() {
		if unused, err := c.network.Unused(); err == nil && unused {
			network := c.network
			c.network = nil
			// The step that comes for it makes a sandbox of its own where this fails, and meets
			// the error itself.
			if made, err := p.r.newCell(p.ctx, next.Network(), network); err == nil {
				p.mu.Lock()
				h.cell = made
				if h.left {
					p.leave(h)
				}
				p.mu.Unlock()
			}
		}
		close(h.made)
		p.r.fail(p.r.discard(c))
	})
}

// succeed returns the sandbox for a direct successor, or nil. It waits for one that is being made.
func (p *pool) succeed(ctx context.Context, step *sandbox.Step) *cell {
	p.mu.Lock()
	i := slices.IndexFunc(p.heirs, func(h *heir) bool { return h.next.Is(step) })
	if i < 0 {
		p.mu.Unlock()
		return nil
	}
	h := p.heirs[i]
	p.heirs = slices.Delete(p.heirs, i, i+1)
	h.expiry.Stop()
	p.mu.Unlock()
	select {
	case <-h.made:
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		p.leave(h)
		return nil
	}
	return h.cell
}

// leave discards what nobody comes for any more. The caller holds mu.
func (p *pool) leave(h *heir) {
	h.left = true
	if h.cell != nil {
		p.r.discardLater(h.cell)
		h.cell = nil
	}
}

// expire discards an heir that nobody came for.
func (p *pool) expire(h *heir) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.heirs, h); i >= 0 {
		p.heirs = slices.Delete(p.heirs, i, i+1)
		p.leave(h)
	}
}

// dropHeirs discards the oldest until n are left. The caller holds mu.
func (p *pool) dropHeirs(n int) {
	for len(p.heirs) > n {
		h := p.heirs[0]
		p.heirs = p.heirs[1:]
		h.expiry.Stop()
		p.leave(h)
	}
}

// mayBequeath reports whether a step has left something for a successor: it has succeeded, and
// has a network, of which bequeath finds out whether it was used.
func mayBequeath(c *cell, res *sandbox.Result) bool {
	return c.network != nil && res.ExitCode == 0 && res.EndedBy == ""
}
