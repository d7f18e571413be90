package gvisor

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/kiln-build/kiln/sandbox"
)

// DefaultPrepared is how many sandboxes of a kind are kept ready.
const DefaultPrepared = 2

var errClosed = errors.New("the runtime is closed")

// pool keeps sandboxes ready that no step has had. It also takes away those that
// are done with, behind the back of the steps.
type pool struct {
	r     *Runtime
	ahead int
	// ctx ends when nothing is to be prepared any more.
	ctx  context.Context
	stop context.CancelFunc
	// making are the sandboxes being started, releasing those being taken away.
	making, releasing sync.WaitGroup

	mu     sync.Mutex // guards what follows
	closed bool
	kinds  map[kind]*stock
	parked []*box // wait for a successor of the step that they had, the oldest first
	failed error  // what could not be released
}

// stock is the sandboxes of one kind. waiting counts the steps that wait for one,
// errs the starts that failed and that no step has heard of.
type stock struct {
	ready           []*box
	making, waiting int
	errs            []error
	changed         chan struct{} // closed and replaced when something changes
}

func newPool(r *Runtime, ahead int) *pool {
	p := &pool{r: r, ahead: ahead, kinds: map[kind]*stock{}}
	p.ctx, p.stop = context.WithCancel(context.Background())
	return p
}

// stockOf returns the stock of a kind. The caller holds mu.
func (p *pool) stockOf(k kind) *stock {
	s := p.kinds[k]
	if s == nil {
		s = &stock{changed: make(chan struct{})}
		p.kinds[k] = s
	}
	return s
}

func (s *stock) change() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// fill starts what is missing: one sandbox for every step that waits, and those
// ahead, for which at most two starts share the processors with the steps. The
// caller holds mu.
func (p *pool) fill(k kind, s *stock) {
	for !p.closed {
		have, want := len(s.ready)+s.making, s.waiting+p.aheadOf(k)
		if have >= want || s.making >= max(s.waiting, maxAheadAtOnce) {
			return
		}
		s.making++
		p.making.Go(func() { p.make(k, s) })
	}
}

// maxAheadAtOnce bounds how many sandboxes that nobody waits for start at a time.
const maxAheadAtOnce = 2

// aheadOf tells how many sandboxes of a kind are kept ready: only of the usual
// ones, for others may never be asked for again, and for no more steps than there are.
func (p *pool) aheadOf(k kind) int {
	if k != usual(k.network) {
		return 0
	}
	if expect := p.r.cfg.Expect; expect != nil {
		if n := expect(); n >= 0 {
			return min(n, p.ahead)
		}
	}
	return p.ahead
}

func (p *pool) make(k kind, s *stock) {
	b, err := p.r.newBox(p.ctx, k)
	var missing *sandbox.UnavailableError
	if err != nil && !errors.As(err, &missing) && p.ctx.Err() == nil {
		// It may have been killed, or who starts it, by a node that is short of memory or an
		// operator. The step that waits has nothing to do with that.
		b, err = p.r.newBox(p.ctx, k)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.making--
	switch {
	case err == nil && (p.closed || len(s.ready) >= s.waiting+p.aheadOf(k)):
		p.discard(b) // who waited for it does no more
	case err == nil:
		s.ready = append(s.ready, b)
		p.fill(k, s)
	case s.waiting > len(s.ready):
		s.errs = append(s.errs, err)
	}
	// An error that no step waits for is left to the next step to meet.
	s.change()
}

// take hands out a sandbox of kind k, which then is the caller's to release.
func (p *pool) take(ctx context.Context, k kind) (*box, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stockOf(k)
	s.waiting++
	defer func() { s.waiting-- }()
	for {
		if p.closed {
			return nil, errClosed
		}
		for len(s.ready) > 0 {
			b := s.ready[0]
			s.ready = s.ready[1:]
			if !b.alive() {
				p.discard(b)
				continue
			}
			s.waiting--
			p.fill(k, s)
			s.waiting++
			return b, nil
		}
		if len(s.errs) > 0 {
			err := s.errs[0]
			s.errs = s.errs[1:]
			return nil, err
		}
		p.fill(k, s)
		changed := s.changed
		p.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		p.mu.Lock()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// warm starts preparing sandboxes of kind k.
func (p *pool) warm(k kind) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fill(k, p.stockOf(k))
}

// discard takes a sandbox away in the background. The caller may hold mu.
func (p *pool) discard(b *box) {
	b.kill()
	p.later(b.release)
}

// later runs what releases something in the background.
func (p *pool) later(release func() error) {
	p.releasing.Go(func() { p.fail(release()) })
}

// fail keeps what could not be released, if err is not nil, for close to tell.
func (p *pool) fail(err error) {
	if err != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.failed = errors.Join(p.failed, err)
	}
}

// close takes away everything that was prepared and waits for it.
func (p *pool) close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.stop()
	// One by one they would end as slowly as they start.
	p.r.starters.kill()
	p.making.Wait()
	p.mu.Lock()
	for _, s := range p.kinds {
		for _, b := range s.ready {
			p.discard(b)
		}
		s.ready = nil
		s.change()
	}
	p.dropParked(0)
	p.mu.Unlock()
	p.releasing.Wait()
	if p.failed != nil {
		return fmt.Errorf("gvisor: take away sandboxes: %w", p.failed)
	}
	return nil
}
