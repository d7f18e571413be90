package sandbox

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// Limits bound what all processes of a step together use of the node, and for how
// long. The zero value of a field is no limit unless the field says otherwise. A
// runtime that cannot hold a step to one of its limits does not run it.
//
// What a sandbox needs for itself counts: a user-namespace sandbox needs less than a
// megabyte, gVisor's kernel some tens.
type Limits struct {
	// CPUMillis is CPU time per time, in thousandths of a processor.
	CPUMillis int64
	// MemoryBytes is memory in bytes, with what the step has in tmpfs and in /dev/shm.
	// Steps with a limit get no swap. A step that needs more has a process killed.
	MemoryBytes int64
	// PIDs is how many processes and threads may exist. One more cannot be started.
	PIDs int64
	// OpenFiles is how many files each process may have open (RLIMIT_NOFILE), 0 means
	// DefaultOpenFiles. One more cannot be opened. Rlimits of a Process may only ask
	// for less.
	OpenFiles int64
	// Timeout is how long the step may run, from the start of its process. The step is
	// killed then.
	Timeout time.Duration
	// DiskBytes is how much the step may have on the node's disk at a time, in bytes:
	// what is new or changed in its root and in its writable mounts. A file that the
	// step changes counts whole, as it does in a layer. Where the disk itself cannot
	// refuse more, the step is killed soon after; see docs/sandboxes.md.
	DiskBytes int64
	// Inodes is how many files, directories and other inodes the step may have on the
	// node's disk at a time, counted as DiskBytes is.
	Inodes int64
	// LogBytes is how much output of the step is passed on, in bytes; the rest is
	// dropped, and the step goes on. It is kept by whoever gives Process its writers,
	// and not by a runtime. 0 means the keeper's default.
	LogBytes int64
	// LogRate is how many bytes of output a second are passed on, as LogBytes.
	LogRate int64
	// ShmBytes is the size of /dev/shm in bytes; 0 means DefaultShmBytes.
	ShmBytes int64
}

const (
	// DefaultOpenFiles is how many files a process of a step may have open.
	DefaultOpenFiles = 1 << 20
	// DefaultShmBytes is the size of a step's /dev/shm in bytes.
	DefaultShmBytes = 64 << 20
)

// Limit names a field of Limits.
type Limit string

// The limits that a step can run into, named as users write them.
const (
	LimitMemory  Limit = "memory"
	LimitPIDs    Limit = "pids"
	LimitTimeout Limit = "timeout"
	LimitDisk    Limit = "disk"
	LimitInodes  Limit = "inodes"
	LimitLog     Limit = "log"
)

// Usage is what all processes of a step together used of the node.
type Usage struct {
	// CPU is the CPU time.
	CPU time.Duration
	// PeakMemory is the most memory that was used at a time, in bytes, 0 when the
	// kernel does not tell.
	PeakMemory int64
	// Throttled is how often the CPU limit made the step wait, and ThrottledTime how
	// long.
	Throttled     int64
	ThrottledTime time.Duration
	// IORead and IOWrite are what was read from and written to disks, in bytes, as far
	// as the kernel counts it for the step. What comes from or stays in memory is not
	// in it.
	IORead, IOWrite int64
	// DiskBytes and Inodes are what the step left on the node's disk at its end,
	// counted as in Limits; 0 when it was not counted.
	DiskBytes, Inodes int64
	// LogBytes is how much output the step wrote, in bytes. A runtime leaves it 0.
	LogBytes int64
}

const (
	// minMemory keeps a mistaken unit from looking like a step that needs too much.
	minMemory = 1 << 20
	// minOpenFiles is what a shell and a dynamic loader need.
	minOpenFiles = 16
	// minTimeout, minDisk and minShm are less than any step needs.
	minTimeout = time.Second
	minDisk    = 1 << 20
	minShm     = 4 << 10
	// minInodes is what a sandbox itself needs for mount points.
	minInodes = 64
	// maxLogBytes bounds what an agent keeps in memory of a step that runs.
	maxLogBytes = 64 << 20
)

// Validate refuses limits that no step could run in, or that are none.
func (l Limits) Validate() error {
	for _, f := range []struct {
		name       string
		value, min int64
	}{
		{"CPU", l.CPUMillis, 1}, {"memory", l.MemoryBytes, minMemory}, {"process", l.PIDs, 1}, {"open files", l.OpenFiles, minOpenFiles},
		{"disk", l.DiskBytes, minDisk}, {"inode", l.Inodes, minInodes},
		{"log", l.LogBytes, 1}, {"log rate", l.LogRate, 1}, {"/dev/shm", l.ShmBytes, minShm},
	} {
		switch {
		case f.value < 0:
			return fmt.Errorf("%s limit of %d is negative", f.name, f.value)
		case f.value > 0 && f.value < f.min:
			return fmt.Errorf("%s limit of %d is too small: want %d or more", f.name, f.value, f.min)
		}
	}
	switch {
	case l.Timeout < 0 || l.Timeout > 0 && l.Timeout < minTimeout:
		return fmt.Errorf("timeout of %s is too short: want %s or more", l.Timeout, minTimeout)
	case l.OpenFiles > DefaultOpenFiles:
		return fmt.Errorf("open files limit of %d is too large: want %d or less", l.OpenFiles, DefaultOpenFiles)
	case l.LogBytes > maxLogBytes:
		return fmt.Errorf("log limit of %d bytes is too large: want %d or less", l.LogBytes, maxLogBytes)
	}
	return nil
}

// softOpenFiles is how many files a process may have open until it asks for more, as
// programs that close all descriptors expect.
const softOpenFiles = 1024

// Hold returns p with the resource limits that l has for each process: those of p that
// are within l, and one of open files in any case, so that what the agent may open is
// nothing that a step inherits. No process of a step leaves its memory behind when it
// crashes: neither in the layer nor on the node.
func (l Limits) Hold(p Process) Process {
	most := uint64(DefaultOpenFiles)
	if l.OpenFiles > 0 {
		most = uint64(l.OpenFiles)
	}
	held := []Rlimit{{Type: rlimitOpenFiles, Soft: min(softOpenFiles, most), Hard: most}, {Type: rlimitCore, Soft: noCore, Hard: noCore}}
	for _, r := range p.Rlimits {
		switch r.Type {
		case rlimitOpenFiles:
			held[0] = Rlimit{Type: r.Type, Soft: min(r.Soft, most), Hard: min(r.Hard, most)}
		case rlimitCore:
		default:
			held = append(held, r)
		}
	}
	p.Rlimits = held
	return p
}

const (
	rlimitOpenFiles = "RLIMIT_NOFILE"
	rlimitCore      = "RLIMIT_CORE"
	// noCore is the limit with which Linux writes no core file, and gives none to the
	// program of core_pattern, which runs as root of the node. With 0 it would do that.
	noCore = 1
)

// ReachedError is the cause for which a runtime ends a step that has run into a limit.
type ReachedError struct{ Limit Limit }

func (e *ReachedError) Error() string { return fmt.Sprintf("the step reached its %s limit", e.Limit) }

// Reach notes in r that the step ran into a limit.
func (r *Result) Reach(l Limit) {
	if !slices.Contains(r.Reached, l) {
		r.Reached = append(r.Reached, l)
	}
}

// Has tells whether the step ran into a limit.
func (r *Result) Has(l Limit) bool { return slices.Contains(r.Reached, l) }

// EndedBy returns the result of a step that was killed because its context ended with
// a ReachedError, and false when cause is something else.
func EndedBy(cause error) (*Result, bool) {
	var reached *ReachedError
	if !errors.As(cause, &reached) {
		return nil, false
	}
	return &Result{ExitCode: killed, EndedBy: reached.Limit, Reached: []Limit{reached.Limit}}, true
}

// killed is the exit code of a process that SIGKILL ended.
const killed = 128 + 9
