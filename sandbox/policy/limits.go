package policy

import "time"

// Limits of a build's steps, each of one step; 0 is no limit.
type Limits struct {
	// CPUMillis is CPU time per time in thousandths.
	CPUMillis int64
	// MemoryBytes is memory.
	MemoryBytes int64
	// PIDs is processes and threads.
	PIDs int64
	// DiskBytes is what the step may write.
	DiskBytes int64
	// Inodes is how many files and directories it may make.
	Inodes int64
	// OpenFiles is how many files one of its processes may have open.
	OpenFiles int64
	// LogBytes is how much output of it is kept.
	LogBytes int64
	// LogRate is how many bytes of output a second are kept.
	LogRate int64
	// ShmBytes is the size of its /dev/shm.
	ShmBytes int64
	// StepTimeout is how long it may run.
	StepTimeout time.Duration
}

// limit is one field of Limits.
type limit struct {
	// key is its name among limits of resources; "" for the timeout.
	key string
	// unit is what it counts.
	unit string
	of   func(*Limits) *int64
}

// limits are all fields of Limits.
var limits = []limit{
	{"cpu", "thousandths of a CPU", func(l *Limits) *int64 { return &l.CPUMillis }},
	{"memory", "bytes", func(l *Limits) *int64 { return &l.MemoryBytes }},
	{"kiln.build/pids", "processes", func(l *Limits) *int64 { return &l.PIDs }},
	{"ephemeral-storage", "bytes", func(l *Limits) *int64 { return &l.DiskBytes }},
	{"kiln.build/inodes", "files", func(l *Limits) *int64 { return &l.Inodes }},
	{"kiln.build/open-files", "open files", func(l *Limits) *int64 { return &l.OpenFiles }},
	{"kiln.build/log-bytes", "bytes", func(l *Limits) *int64 { return &l.LogBytes }},
	{"kiln.build/log-rate", "bytes a second", func(l *Limits) *int64 { return &l.LogRate }},
	{"kiln.build/shm", "bytes", func(l *Limits) *int64 { return &l.ShmBytes }},
	{"", "", func(l *Limits) *int64 { return (*int64)(&l.StepTimeout) }},
}

// field names the limit in a Build.
func (l limit) field() string {
	if l.key == "" {
		return "spec.stepTimeout"
	}
	return "spec.resources.limits[" + l.key + "]"
}

// rule names the limit in a SandboxPolicy.
func (l limit) rule() string {
	if l.key == "" {
		return "maxStepTimeout"
	}
	return "maxResources.limits[" + l.key + "]"
}

// Or returns l with what it leaves out taken from byDefault, and cut to most where it is
// taken, else from most.
func (l Limits) Or(byDefault, most Limits) Limits {
	for _, f := range limits {
		if got := f.of(&l); *got == 0 {
			*got = tighter(*f.of(&byDefault), *f.of(&most))
		}
	}
	return l
}

// Most returns the tightest of all maxima for each limit.
func Most(all []Rules) Limits {
	var most Limits
	for i := range all {
		for _, f := range limits {
			m := f.of(&most)
			*m = tighter(*m, *f.of(&all[i].Max))
		}
	}
	return most
}

// checkLimits refuses what got has above most, or leaves open. field names a limit in the
// request.
func checkLimits(deny denyFunc, field func(limit) string, got, most Limits) {
	for _, f := range limits {
		g, m := *f.of(&got), *f.of(&most)
		switch {
		case g < 0:
			deny(field(f), f.rule(), "a limit cannot be negative")
		case m <= 0 || (g != 0 && g <= m):
		case f.key == "":
			deny(field(f), f.rule(), "at most %s", time.Duration(m))
		default:
			deny(field(f), f.rule(), "at most %d %s", m, f.unit)
		}
	}
}
