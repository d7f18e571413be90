package engine

import (
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/sandbox"
)

// StepReport tells what a step used and how it ended. It is about one process that
// the solver ran; steps from the cache have none.
type StepReport struct {
	// Domain is whose step it was. Several builds of a domain may wait for one step.
	Domain Domain
	// Vertex and Name are what clients of the solver know the step by; empty for a
	// process that a front end or a client runs for itself.
	Vertex digest.Digest
	Name   string
	// Duration is how long the step ran, with what its sandbox took.
	Duration time.Duration
	// Limits are those that held.
	Limits sandbox.Limits
	// Result tells how it ended; nil when it could not be run or was cancelled.
	Result *sandbox.Result
	// Err is the step's error as the solver gets it, nil when it ended well.
	Err error
}
