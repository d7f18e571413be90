package record

import (
	"errors"
	"fmt"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

var (
	// ErrNotFound says that there is no such build.
	ErrNotFound = errors.New("no such build")
	// ErrClosed says that the store was closed.
	ErrClosed = errors.New("the store of builds is closed")
	// ErrDamaged says that the events of a build cannot be read.
	ErrDamaged = errors.New("the events of the build are damaged on disk")
	// ErrPageToken says that a page token is none of List's.
	ErrPageToken = errors.New("not a page token of this list")
)

// ExistsError says that a build with the same tenant and ID is there.
type ExistsError struct {
	// Build is the one that is there.
	Build *agentv1.Build
}

func (e *ExistsError) Error() string {
	return fmt.Sprintf("build %q of tenant %q exists", e.Build.GetBuildId(), e.Build.GetTenant())
}

// RangeError says that an event was asked for that will never be there.
type RangeError struct {
	// Offset is what was asked for.
	Offset uint64
	// Events is how many the build has.
	Events uint64
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("offset %d is beyond the build's end: it has %d events", e.Offset, e.Events)
}
