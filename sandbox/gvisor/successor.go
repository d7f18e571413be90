package gvisor

import (
	"slices"
	"time"

	"github.com/kiln-build/kiln/sandbox"
)

// successor is what a step must be to run in a sandbox that had another one: its direct
// successor, with the same limits. Nothing else of the first step is there: its processes,
// mounts and IPC objects are gone, and a sandbox whose kernel it has set anything in is
// not kept.
type successor struct {
	*sandbox.Successor
	kind   kind
	limits sandbox.Limits
}

// successorOf returns what the successor of a step must be; nil: it can have none.
func successorOf(step *sandbox.Step) *successor {
	n := sandbox.SuccessorOf(step)
	if n == nil {
		return nil
	}
	return &successor{Successor: n, kind: kindOf(step), limits: step.Limits}
}

func (n *successor) is(step *sandbox.Step) bool {
	return n.Is(step) && kindOf(step) == n.kind && step.Limits == n.limits
}

const (
	// patience is how long a sandbox waits for a successor of its step. Solvers take
	// some milliseconds to come to the next step, on a busy node many.
	patience = time.Second
	// maxParked bounds how many wait at a time.
	maxParked = 8
	// maxKeptMemory is what a sandbox may occupy, in bytes, to be kept: a new one
	// occupies a third of it.
	maxKeptMemory = 64 << 20
)

// park keeps a sandbox for a successor of the step that it had, which then is the
// pool's to release.
func (p *pool) park(b *box) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		p.discard(b)
		return
	}
	p.parked = append(p.parked, b)
	b.expiry = time.AfterFunc(patience, func() { p.expire(b) })
	p.dropParked(maxParked)
}

// dropParked discards the oldest that wait until n are left. The caller holds mu.
func (p *pool) dropParked(n int) {
	for len(p.parked) > n {
		b := p.parked[0]
		p.parked = p.parked[1:]
		b.expiry.Stop()
		p.discard(b)
	}
}

// expire discards a sandbox that nobody came for.
func (p *pool) expire(b *box) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.parked, b); i >= 0 {
		p.parked = slices.Delete(p.parked, i, i+1)
		p.discard(b)
	}
}

// resume returns the sandbox that had the step before, if one waits; nil: none does. It
// is the caller's to release.
func (p *pool) resume(step *sandbox.Step) *box {
	if step.Build == "" {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, b := range p.parked {
		if !b.next.is(step) {
			continue
		}
		p.parked = slices.Delete(p.parked, i, i+1)
		b.expiry.Stop()
		b.next = nil
		if b.alive() {
			return b
		}
		p.discard(b)
		break
	}
	return nil
}

// mayKeep tells whether the sandbox could have a successor of the step, which has ended.
func (s *stepRun) mayKeep(res *sandbox.Result) bool {
	return res.ExitCode == 0 && res.EndedBy == "" && s.next != nil && s.collects()
}

// keep has the sandbox wait for a successor when the step has ended, if nothing of what
// it did is left.
func (s *stepRun) keep(res *sandbox.Result) {
	if !s.kept || len(res.Reached) > 0 || len(res.Network.Reached.List)+len(res.Network.Refused.List) > 0 {
		return
	}
	used, err := s.box.cgroup.Memory()
	if limit := s.step.Limits.MemoryBytes; err != nil || used > maxKeptMemory || limit > 0 && used > limit/4 {
		return
	}
	// Where usage cannot be counted anew, every step has a sandbox of its own.
	if s.box.cgroup.Restart() != nil {
		return
	}
	s.box.next = s.next
}

// hand gives the sandbox to the pool, for a successor of the step.
func (s *stepRun) hand() error {
	release := func() error {
		defer s.box.releasing.Done()
		return s.releaseMounts()
	}
	s.box.releasing.Add(1)
	var err error
	if s.writesThrough() {
		err = release()
	} else {
		s.r.pool.later(release)
	}
	s.r.pool.park(s.box)
	return err
}
