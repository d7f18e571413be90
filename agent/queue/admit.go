package queue

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// line returns the tenants that wait, the one whose turn it is first: it has the
// fewest builds running, and among those was served longest ago.
func (q *Queue) line() []*tenant {
	var line []*tenant
	for _, t := range q.tenants {
		if len(t.waiting) > 0 {
			line = append(line, t)
		}
	}
	slices.SortFunc(line, compareTurns)
	return line
}

func compareTurns(a, b *tenant) int {
	return cmp.Or(cmp.Compare(a.running, b.running), cmp.Compare(a.turn, b.turn), cmp.Compare(a.waiting[0].arrival, b.waiting[0].arrival))
}

// admit lets run what can. The caller holds mu.
func (q *Queue) admit() {
	if q.closed {
		return
	}
	for q.running < q.limits.Slots && q.admitOne() {
	}
	q.reportSoon()
}

// admitOne lets the first build run that fits, and tells whether there was one.
func (q *Queue) admitOne() bool {
	var passed []*Ticket
	for _, owner := range q.line() {
		t := owner.waiting[0]
		if !owner.mayRun(t.request) {
			t.message = fmt.Sprintf("waits until another build of the tenant ends: %d run, which is its limit", owner.running)
			continue
		}
		if q.fits(t) {
			for _, p := range passed {
				p.overtaken++
			}
			q.start(owner, t)
			return true
		}
		if t.state != waiting {
			return true // its wait was ended: the line has changed
		}
		if t.overtaken >= q.limits.Overtakes {
			return false
		}
		passed = append(passed, t)
	}
	return false
}

// fits tells whether t can run now, and notes what it waits for when not.
func (q *Queue) fits(t *Ticket) bool {
	if !q.used.plus(t.request.Needs).within(q.limits.Total) {
		t.message, t.noDisk = "waits until other builds give back CPU, memory or disk", time.Time{}
		return false
	}
	free, ok := q.free()
	want := q.limits.MinFreeDisk + t.request.Needs.DiskBytes
	if !ok || free >= want {
		t.message, t.noDisk = "", time.Time{}
		return true
	}
	t.message = fmt.Sprintf("waits for free disk: %d bytes are free, %d are needed", free, want)
	q.waitForDisk(t, &DiskError{Wanted: want, Free: free})
	return false
}

// waitForDisk looks again later, and ends the wait of t when nothing runs that
// could free disk and its patience is over.
func (q *Queue) waitForDisk(t *Ticket, err *DiskError) {
	now := time.Now()
	switch {
	case q.running > 0:
		t.noDisk = time.Time{}
	case t.noDisk.IsZero():
		t.noDisk = now
	case now.Sub(t.noDisk) >= q.limits.DiskPatience:
		q.leave(t)
		t.state, t.err = refused, err
		close(t.admitted)
		return
	}
	if q.disk == nil {
		q.disk = time.AfterFunc(q.limits.DiskInterval, q.lookAtDisk)
	}
}

func (q *Queue) lookAtDisk() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.disk = nil
	q.admit()
}

// start lets t run.
func (q *Queue) start(owner *tenant, t *Ticket) {
	owner.waiting = owner.waiting[1:]
	q.queued--
	q.turn += turnStep
	owner.turn = q.turn
	owner.running++
	q.running++
	q.used = q.used.plus(t.request.Needs)
	t.state, t.position = admitted, 0
	close(t.admitted)
}

// leave takes t out of those that wait.
func (q *Queue) leave(t *Ticket) {
	owner := q.tenants[t.request.Tenant]
	owner.waiting = slices.DeleteFunc(owner.waiting, func(o *Ticket) bool { return o == t })
	q.queued--
	t.position = 0
	q.drop(owner)
}

// drop forgets a tenant that has nothing here.
func (q *Queue) drop(owner *tenant) {
	if owner.running == 0 && len(owner.waiting) == 0 {
		delete(q.tenants, owner.name)
	}
}

// places returns the order in which those who wait would start if every build that
// runs went on and everything fitted. The caller holds mu.
func (q *Queue) places() map[*Ticket]int {
	places := make(map[*Ticket]int, q.queued)
	var line []*tenant
	for _, t := range q.line() {
		twin := *t
		line = append(line, &twin)
	}
	turn := q.turn
	for len(line) > 0 {
		i := 0
		for j := range line {
			if compareTurns(line[j], line[i]) < 0 {
				i = j
			}
		}
		next := line[i]
		places[next.waiting[0]] = len(places) + 1
		next.waiting = next.waiting[1:]
		next.running++
		turn += turnStep
		next.turn = turn
		if len(next.waiting) == 0 {
			line = slices.Delete(line, i, i+1)
		}
	}
	return places
}

// reportSoon sees to it that places are reported. The caller holds mu.
func (q *Queue) reportSoon() {
	if q.reports != nil || q.queued == 0 || q.closed {
		return
	}
	q.reports = time.AfterFunc(q.limits.PositionInterval, q.report)
}

// report tells those whose place has changed.
func (q *Queue) report() {
	q.reporting.Lock()
	defer q.reporting.Unlock()
	for _, moved := range q.collect() {
		moved()
	}
}

// collect returns the reports that are due.
func (q *Queue) collect() []func() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.reports = nil
	if q.closed {
		return nil
	}
	var due []func()
	for t, place := range q.places() {
		t.position = place
		if place == t.reported && t.message == t.told {
			continue
		}
		t.reported, t.told = place, t.message
		if moved, message := t.request.Moved, t.message; moved != nil {
			due = append(due, func() { moved(place, message) })
		}
	}
	return due
}
