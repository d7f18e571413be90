package sandbox

import (
	"context"
	"net/netip"
)

// Networks hands out network namespaces for steps.
//
// A namespace belongs to one step from Acquire to Release. Implementations may
// prepare namespaces ahead, but never give one that a step has used to another.
// Methods may be called concurrently.
type Networks interface {
	// Acquire returns a namespace of the given mode for one step.
	Acquire(ctx context.Context, mode NetworkMode) (Network, error)
	// Close releases everything that was prepared ahead.
	Close() error
}

// Network is the network namespace of one step.
type Network interface {
	// Path is a file that holds the namespace, for setns and for an OCI spec.
	Path() string
	// Nameservers are the resolvers that work from inside; none when there is no
	// network.
	Nameservers() []netip.Addr
	// Release gives the namespace back. Everything in it is gone afterwards.
	Release() error
}
