package queue

import "fmt"

// FullError says that a build cannot wait here now; another node, or later, may do.
type FullError struct {
	// Rule is the limit: "queue", "queue-per-tenant" or "disk-free".
	Rule string
	// Message says it for people.
	Message string
}

func (e *FullError) Error() string { return e.Message }

// TooLargeError says that a build can never run here.
type TooLargeError struct {
	// Resource is what it needs too much of: "cpu_millis", "memory_bytes" or
	// "disk_bytes", as in agentv1.Resources.
	Resource string
	// Wanted and Total are what it needs and what the node has.
	Wanted, Total int64
}

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("the build needs %s of %d, and this node gives builds %d in all", e.Resource, e.Wanted, e.Total)
}

// DiskError ends the wait of a build for free disk.
type DiskError struct {
	// Wanted and Free are bytes.
	Wanted, Free int64
}

func (e *DiskError) Error() string {
	return fmt.Sprintf("the node's disk has %d bytes free, and the build may start with %d: nothing was freed in time", e.Free, e.Wanted)
}
