package queue

import "time"

type ticketState int

const (
	waiting ticketState = iota
	admitted
	refused  // its wait was ended by the queue
	released // by its owner
)

// Ticket is a build's place in the queue, and then its right to run.
type Ticket struct {
	queue    *Queue
	request  Request
	arrival  uint64
	admitted chan struct{} // closed when the wait is over

	// What follows is guarded by queue.mu.
	state     ticketState
	err       error
	overtaken int       // builds that came later and started before
	position  int       // place, from 1
	message   string    // what it waits for, besides its place
	reported  int       // place that was reported last
	told      string    // message that was reported last
	noDisk    time.Time // since when it waits for disk while nothing runs; zero: it does not
}

// Admitted is closed when the build may run, or when its wait has ended without:
// Err tells which.
func (t *Ticket) Admitted() <-chan struct{} { return t.admitted }

// Err returns nil when the build may run, and a *DiskError when its wait was ended.
// It is valid after Admitted is closed.
func (t *Ticket) Err() error {
	t.queue.mu.Lock()
	defer t.queue.mu.Unlock()
	return t.err
}

// Position returns the place in the queue, from 1; 0 when it does not wait.
func (t *Ticket) Position() int {
	t.queue.mu.Lock()
	defer t.queue.mu.Unlock()
	if t.state != waiting {
		return 0
	}
	return t.position
}

// Release leaves the queue, or gives back what was reserved. It may be called more
// than once.
func (t *Ticket) Release() {
	q := t.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	switch t.state {
	case waiting:
		q.leave(t)
	case admitted:
		owner := q.tenants[t.request.Tenant]
		owner.running--
		q.running--
		q.used = q.used.minus(t.request.Needs)
		q.drop(owner)
	case refused, released:
	}
	t.state = released
	q.admit()
}
