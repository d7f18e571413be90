package sandbox

import (
	"errors"
	"fmt"
	"time"
)

// Limits bound what all processes of a step together use of the node. The zero value
// of a field is no limit. A runtime that cannot hold a step to one of its limits does
// not run it.
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
}

// Usage is what all processes of a step together used of the node.
type Usage struct {
	// CPU is the CPU time.
	CPU time.Duration
	// PeakMemory is the most memory that was used at a time, in bytes, 0 when the
	// kernel does not tell.
	PeakMemory int64
	// Throttled is how often the CPU limit made the step wait.
	Throttled int64
}

// minMemory keeps a mistaken unit from looking like a step that needs too much.
const minMemory = 1 << 20

func (l Limits) validate() error {
	switch {
	case l.CPUMillis < 0 || l.MemoryBytes < 0 || l.PIDs < 0:
		return errors.New("a limit is negative")
	case l.MemoryBytes > 0 && l.MemoryBytes < minMemory:
		return fmt.Errorf("memory limit of %d bytes is too small: want %d or more", l.MemoryBytes, minMemory)
	}
	return nil
}
