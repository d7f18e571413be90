package queue

import (
	"cmp"
	"time"
)

// Limits is what a node gives to builds. Zero numbers of slots and of waiting
// builds, and zero times, mean DefaultLimits'; zero resources are not limited.
type Limits struct {
	// Slots is how many builds run at once.
	Slots int
	// Queued and QueuedPerTenant are how many builds wait.
	Queued, QueuedPerTenant int
	// Total is what the builds that run may reserve together.
	Total Resources
	// MinFreeDisk is how many bytes of the disk stay free when a build starts,
	// besides what it reserves.
	MinFreeDisk int64
	// Overtakes is how many builds may start before one that came earlier and does
	// not fit yet. After that nothing starts until it does.
	Overtakes int
	// DiskPatience is how long a build waits for free disk while nothing runs that
	// could free it.
	DiskPatience time.Duration
	// DiskInterval is how often free disk is looked at while a build waits for it.
	DiskInterval time.Duration
	// PositionInterval is the least time between two reports of one build's place.
	PositionInterval time.Duration
}

// DefaultLimits is what a configuration that says nothing gets.
var DefaultLimits = Limits{
	Slots: 4, Queued: 256, QueuedPerTenant: 64, Overtakes: 16,
	DiskPatience: 2 * time.Minute, DiskInterval: 5 * time.Second, PositionInterval: time.Second,
}

func (l Limits) withDefaults() Limits {
	d := DefaultLimits
	l.Slots, l.Queued, l.QueuedPerTenant = cmp.Or(l.Slots, d.Slots), cmp.Or(l.Queued, d.Queued), cmp.Or(l.QueuedPerTenant, d.QueuedPerTenant)
	l.Overtakes, l.DiskPatience = cmp.Or(l.Overtakes, d.Overtakes), cmp.Or(l.DiskPatience, d.DiskPatience)
	l.DiskInterval, l.PositionInterval = cmp.Or(l.DiskInterval, d.DiskInterval), cmp.Or(l.PositionInterval, d.PositionInterval)
	return l
}

// Resources is what a build reserves.
type Resources struct {
	// CPUMillis is CPU time per time, in thousandths.
	CPUMillis int64
	// MemoryBytes and DiskBytes are bytes.
	MemoryBytes, DiskBytes int64
}

func (r Resources) plus(o Resources) Resources {
	return Resources{r.CPUMillis + o.CPUMillis, r.MemoryBytes + o.MemoryBytes, r.DiskBytes + o.DiskBytes}
}

func (r Resources) minus(o Resources) Resources {
	return r.plus(Resources{-o.CPUMillis, -o.MemoryBytes, -o.DiskBytes})
}

// within tells whether r fits into total, of which zero fields are no limit.
func (r Resources) within(total Resources) bool { return r.exceeds(total) == nil }

func (r Resources) exceeds(total Resources) *TooLargeError {
	for _, d := range []TooLargeError{
		{"cpu_millis", r.CPUMillis, total.CPUMillis},
		{"memory_bytes", r.MemoryBytes, total.MemoryBytes},
		{"disk_bytes", r.DiskBytes, total.DiskBytes},
	} {
		if d.Total > 0 && d.Wanted > d.Total {
			return &d
		}
	}
	return nil
}
