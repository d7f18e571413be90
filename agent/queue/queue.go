package queue

import (
	"fmt"
	"sync"
	"time"
)

// Request is a build that asks to run.
type Request struct {
	// Tenant is who it is for.
	Tenant string
	// Needs is what it reserves while it runs; no field is below 0.
	Needs Resources
	// MaxRunning and MaxQueued bound the builds of the tenant, besides the queue's
	// own limits; 0: nothing more.
	MaxRunning, MaxQueued int
	// Moved is told the build's place in the queue, from 1, when that has changed,
	// and what it waits for when that is not a place alone. It may be nil, is called
	// from one goroutine at a time, and must not block for long.
	Moved func(position int, message string)
}

// Stats is what a queue holds.
type Stats struct {
	// Running and Queued are numbers of builds.
	Running, Queued int
	// Used is what those that run reserve.
	Used Resources
}

// Queue admits builds. Its methods may be called concurrently.
type Queue struct {
	limits   Limits
	freeDisk func() (int64, error)

	mu      sync.Mutex
	tenants map[string]*tenant // guarded by mu; those with a build
	used    Resources          // guarded by mu
	running int                // guarded by mu
	queued  int                // guarded by mu
	arrival uint64             // guarded by mu; number of the last arrival
	turn    uint64             // guarded by mu; the last admission's, in steps of turnStep
	reports *time.Timer        // guarded by mu; of places that changed
	disk    *time.Timer        // guarded by mu; looks at free disk again
	closed  bool               // guarded by mu

	reporting sync.Mutex // held while places are reported
}

// turnStep leaves room between two admissions for tenants that come new.
const turnStep = 2

// tenant is what one tenant has in the queue.
type tenant struct {
	name    string
	waiting []*Ticket // in the order of arrival
	running int
	turn    uint64 // of its last admission
}

// New returns an empty queue. freeDisk tells how many bytes of disk are free; it
// may be nil when MinFreeDisk is 0.
func New(limits Limits, freeDisk func() (int64, error)) *Queue {
	return &Queue{limits: limits.withDefaults(), freeDisk: freeDisk, tenants: map[string]*tenant{}, turn: turnStep}
}

// Limits returns the limits, with defaults filled in.
func (q *Queue) Limits() Limits { return q.limits }

// Fits tells whether a build can ever run: a *TooLargeError when not.
func (q *Queue) Fits(needs Resources) error {
	if err := needs.exceeds(q.limits.Total); err != nil {
		return err
	}
	return nil
}

// Check returns the error that Enter would return for such a request now.
func (q *Queue) Check(r Request) error {
	if err := q.Fits(r.Needs); err != nil {
		return err
	}
	if err := q.checkDisk(); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.checkRoom(r)
}

// Enter puts a build into the queue. The caller releases the ticket, whether it was
// admitted or not. The error is a *TooLargeError or a *FullError.
func (q *Queue) Enter(r Request) (*Ticket, error) {
	if err := q.Fits(r.Needs); err != nil {
		return nil, err
	}
	if err := q.checkDisk(); err != nil {
		return nil, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.checkRoom(r); err != nil {
		return nil, err
	}
	q.arrival++
	t := &Ticket{queue: q, request: r, arrival: q.arrival, admitted: make(chan struct{})}
	owner := q.tenants[r.Tenant]
	if owner == nil {
		// It stands behind all but the one that was served last, so that a tenant
		// that comes back for each build gains nothing by it.
		owner = &tenant{name: r.Tenant, turn: q.turn - 1}
		q.tenants[r.Tenant] = owner
	}
	owner.waiting = append(owner.waiting, t)
	q.queued++
	q.admit()
	if t.state == waiting {
		t.position = q.places()[t]
		t.reported = t.position
		q.reportSoon()
	}
	return t, nil
}

// checkRoom refuses a build that would have to wait where too many do.
func (q *Queue) checkRoom(r Request) error {
	owner := q.tenants[r.Tenant]
	if owner == nil {
		owner = &tenant{}
	}
	most := q.limits.QueuedPerTenant
	if r.MaxQueued > 0 {
		most = min(most, r.MaxQueued)
	}
	switch {
	case q.closed:
		return &FullError{"closed", "the queue is closed"}
	case q.queued == 0 && q.running < q.limits.Slots && owner.mayRun(r):
		return nil // a slot is free that nobody waits for
	case q.queued >= q.limits.Queued:
		return &FullError{"queue", fmt.Sprintf("%d builds wait on this node, which is its limit; try another node, or later", q.queued)}
	case len(owner.waiting) >= most:
		return &FullError{"queue-per-tenant", fmt.Sprintf("%d builds of tenant %q wait on this node, which is its limit; try another node, or later", len(owner.waiting), r.Tenant)}
	}
	return nil
}

// mayRun tells whether the tenant's own limit lets one more of its builds run.
func (t *tenant) mayRun(r Request) bool { return r.MaxRunning <= 0 || t.running < r.MaxRunning }

// checkDisk refuses a build while the disk has less free than its minimum.
func (q *Queue) checkDisk() error {
	free, ok := q.free()
	if ok && free < q.limits.MinFreeDisk {
		return &FullError{"disk-free", fmt.Sprintf("the node's disk has %d bytes free, and builds start with %d at least; prune caches, or try another node", free, q.limits.MinFreeDisk)}
	}
	return nil
}

// free returns the free disk, and whether it matters and is known.
func (q *Queue) free() (int64, bool) {
	if q.freeDisk == nil || q.limits.MinFreeDisk == 0 {
		return 0, false
	}
	free, err := q.freeDisk()
	return free, err == nil
}

// Stats returns what the queue holds now.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	return Stats{Running: q.running, Queued: q.queued, Used: q.used}
}

// Close stops the queue's timers. Tickets that wait are not admitted any more.
func (q *Queue) Close() {
	q.mu.Lock()
	q.closed = true
	for _, t := range []*time.Timer{q.reports, q.disk} {
		if t != nil {
			t.Stop()
		}
	}
	q.mu.Unlock()
	// A report that had begun is over when this returns.
	q.reporting.Lock()
	defer q.reporting.Unlock()
}
