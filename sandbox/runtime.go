package sandbox

import (
	"context"
	"fmt"
	"strings"
)

// Class names a kind of sandbox. It is what users write after --sandbox and what
// a policy allows or requires.
type Class string

const (
	// GVisor runs a step on gVisor's user-space kernel (runsc).
	GVisor Class = "gvisor"
	// Userns runs a step on the node's kernel, in a user namespace whose ID range no
	// other step on the node has at the same time.
	Userns Class = "userns"
)

// Classes lists every class, strongest first.
var Classes = []Class{GVisor, Userns}

// ParseClass returns the class that s names. The error lists the valid names.
func ParseClass(s string) (Class, error) {
	names := make([]string, 0, len(Classes))
	for _, c := range Classes {
		if s == string(c) {
			return c, nil
		}
		names = append(names, string(c))
	}
	return "", fmt.Errorf("unknown sandbox %q: want one of %s", s, strings.Join(names, ", "))
}

// Runtime runs build steps in sandboxes of one class.
//
// A step goes through these states:
//
//	preparing → running → collecting → ended
//
// Run owns the step from its call to its return: when it returns, whatever the
// outcome, also when ctx is cancelled, no process of the step runs, and nothing
// can write to its trees any more. The files that the step wrote are then
// complete in the upper directory of its root (or in its writable mounts), and
// not before. What else Run made for the step (mounts, namespaces, cgroups,
// descriptors, files) it may release shortly after its return, and has released
// when Close returns. What a killed process of ours leaves behind is released by
// the next New on the same state directory.
//
// All methods may be called concurrently.
type Runtime interface {
	// Class tells which class of sandbox this runtime makes.
	Class() Class

	// Run runs step until its process ends, calling started once as soon as the
	// process runs. A process that ran and failed is not an error: Result tells
	// how it ended. An error means that the step could not be run or collected;
	// when ctx ends first it wraps context.Cause(ctx), and the step's processes
	// are gone.
	Run(ctx context.Context, step *Step, started func()) (*Result, error)

	// Exec runs another process inside the step with the given ID, which must be
	// running, and returns when that process ends. ErrNotRunning is returned
	// when there is no such step.
	Exec(ctx context.Context, stepID string, process Process) (*Result, error)

	// Close releases what the runtime prepared ahead. It must be called after
	// the last Run has returned.
	Close() error
}

// Result tells how a process of a step ended.
type Result struct {
	// ExitCode is the exit status, or 128 plus the signal number when a signal
	// ended the process.
	ExitCode int
	// Reached are the limits that the step ran into: a process of it was killed for
	// memory, could not be started, or got no more disk. The node's own end of memory
	// counts as LimitMemory. A step can go on after some and end well. What it wrote
	// may be lost after others.
	Reached []Limit
	// EndedBy is the one of them for which the runtime itself ended the step, or
	// refuses what it left; "" when it did not. The step has failed then, whatever
	// ExitCode is.
	EndedBy Limit
	// Usage is what the step used. It is zero in the result of Exec.
	Usage Usage
	// Network is what the step did with its network. It is empty in the result of
	// Exec, whose process counts with its step.
	Network Contacts
}

// UnavailableError says that this node cannot run a class of sandbox.
type UnavailableError struct {
	Class Class
	// Missing names what the node lacks, as a noun phrase ("runsc on the PATH").
	Missing string
	// Fix tells in one sentence how to get it.
	Fix string
	// Err is the cause, when there is one.
	Err error
}

func (e *UnavailableError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "sandbox %s is not available on this node: missing %s", e.Class, e.Missing)
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	if e.Fix != "" {
		fmt.Fprintf(&b, " (%s)", e.Fix)
	}
	return b.String()
}

func (e *UnavailableError) Unwrap() error { return e.Err }
