package upload

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// ErrTakenOver says that a part is not taken any more.
var ErrTakenOver = errors.New("another request sends this upload now, or its build has ended")

// partKey names an archive that arrives in parts.
type partKey struct {
	key
	build string
}

// partial is an archive that arrives in parts: what has arrived, from its start.
type partial struct {
	key   partKey
	size  int64 // announced
	store *Store

	mu   sync.Mutex
	w    *Writer // guarded by mu, with all that it has; nil: it is gone
	turn *Part   // guarded by mu; the one that may write; nil: none
}

// Part takes one part of an archive. It is for one goroutine, which ends it with End.
type Part struct {
	partial *partial // nil: the archive is there
	lost    chan struct{}
	arrived Arrived
}

// Arrived is how much of an archive is there.
type Arrived struct {
	// Bytes of it, from its start.
	Bytes int64
	// Whole says that it is all, and that its digest is right.
	Whole bool
	// Expires is until when that is kept when nothing more happens.
	Expires time.Time
}

// Resume begins to take a part of an archive that is for a build of a tenant, whose
// names are valid. The part starts where those before it ended; one that is being
// taken ends. The error is a *LimitError or a *MismatchError, as that of Create.
func (s *Store) Resume(tenant, build string, d digest.Digest, size int64) (*Part, error) {
	if err := s.check(d, size); err != nil {
		return nil, err
	}
	k := partKey{key{tenant, d}, build}
	for {
		p, whole, err := s.partial(k, size)
		if err != nil {
			return nil, err
		}
		part := &Part{partial: p, lost: make(chan struct{}), arrived: whole}
		if whole.Whole || p.begin(part) {
			return part, nil
		}
		// It has ended since it was looked up.
	}
}

// partial returns what has arrived of an archive: the whole, or what may be only the
// beginning.
func (s *Store) partial(k partKey, size int64) (*partial, Arrived, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.archives[k.key]; a != nil && (a.holds > 0 || s.now().Before(a.expires)) {
		if a.size != size {
			return nil, Arrived{}, sizeError(a.size, size)
		}
		return nil, Arrived{Bytes: size, Whole: true, Expires: s.renew(a)}, nil
	}
	p := s.partials[k]
	if p == nil {
		w, err := s.create(k.key, size)
		if err != nil {
			return nil, Arrived{}, err
		}
		p = &partial{key: k, size: size, store: s, w: w}
		s.partials[k] = p
		return p, Arrived{}, nil
	}
	if p.size != size {
		return nil, Arrived{}, sizeError(p.size, size)
	}
	return p, Arrived{}, nil
}

func sizeError(announced, size int64) error {
	return &MismatchError{fmt.Sprintf("size: %d bytes were announced before, not %d", announced, size)}
}

// begin gives a part its turn, unless the archive is gone.
func (p *partial) begin(part *Part) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w == nil {
		return false
	}
	p.yield()
	p.turn = part
	p.renew()
	part.arrived.Bytes = p.w.got
	return true
}

// yield ends the turn of whoever has it. The caller holds mu.
func (p *partial) yield() {
	if p.turn != nil {
		close(p.turn.lost)
		p.turn = nil
	}
}

// renew keeps what is there for another while. The caller holds mu.
func (p *partial) renew() { p.w.until = p.store.now().Add(p.store.limits.Age) }

// Arrived tells what was there when the part began, or ended.
func (t *Part) Arrived() Arrived { return t.arrived }

// TakenOver is closed when the part is not taken any more.
func (t *Part) TakenOver() <-chan struct{} { return t.lost }

// Write takes the next piece. The error is ErrTakenOver, or a *MismatchError when there
// is more than was announced.
func (t *Part) Write(data []byte) (int, error) {
	if t.arrived.Whole {
		return 0, &MismatchError{fmt.Sprintf("data: more than the announced %d bytes arrived", t.arrived.Bytes)}
	}
	p := t.partial
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.turn != t {
		return 0, ErrTakenOver
	}
	p.renew()
	return p.w.Write(data)
}

// End keeps what has arrived, and verifies the archive when that is all of it. An error
// other than ErrTakenOver means that nothing is left and all has to be sent again; it is
// a *MismatchError when what arrived is something else.
func (t *Part) End() (Arrived, error) {
	if t.arrived.Whole {
		return t.arrived, nil
	}
	p := t.partial
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.turn != t {
		return Arrived{}, ErrTakenOver
	}
	p.turn = nil
	t.arrived = Arrived{Bytes: p.w.got, Expires: p.w.until}
	if p.w.got < p.w.size {
		return t.arrived, nil
	}
	expires, err := p.w.Commit()
	p.forget()
	if err != nil {
		return Arrived{}, err
	}
	t.arrived = Arrived{Bytes: t.arrived.Bytes, Whole: true, Expires: expires}
	return t.arrived, nil
}

// forget takes the archive off the store's list. The caller holds mu.
func (p *partial) forget() {
	p.w = nil
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	delete(p.store.partials, p.key)
}

// drop removes what has arrived.
func (p *partial) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remove()
}

// dropIfIdle removes what has arrived when that was too long ago.
func (p *partial) dropIfIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w != nil && !p.store.now().Before(p.w.until) {
		p.remove()
	}
}

// remove is drop for a caller that holds mu. A file that cannot be removed now is
// removed by the next Open.
func (p *partial) remove() {
	if p.w == nil {
		return
	}
	p.yield()
	_ = p.w.Abort()
	p.forget()
}

// Forget removes the parts of a tenant's build that has ended, or has its source.
func (s *Store) Forget(tenant, build string) {
	for _, p := range s.parts(func(k partKey) bool { return k.tenant == tenant && k.build == build }) {
		p.drop()
	}
}

// parts returns the archives that arrive in parts and are wanted.
func (s *Store) parts(wanted func(partKey) bool) []*partial {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*partial
	for k, p := range s.partials {
		if wanted(k) {
			out = append(out, p)
		}
	}
	return out
}
