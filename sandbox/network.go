package sandbox

import (
	"context"
	"net/netip"

	"github.com/kiln-build/kiln/sandbox/egress"
)

// Networks hands out network namespaces for steps.
//
// A namespace belongs to whoever acquired it until Release: to one step, or to it and its
// direct successors, one after the other. Implementations may prepare namespaces ahead, but
// never hand out one that has been handed out before.
// Methods may be called concurrently.
type Networks interface {
	// Acquire returns a namespace of the given mode for one step. What it may reach is
	// what the implementation was made with, until Restrict.
	Acquire(ctx context.Context, mode NetworkMode) (Network, error)
	// Close releases everything that was prepared ahead.
	Close() error
}

// Network is a network namespace for steps.
type Network interface {
	// Path is a file that holds the namespace, for setns and for an OCI spec.
	Path() string
	// Nameservers are the resolvers that work from inside; none when there is no
	// network. Restrict may change them.
	Nameservers() []netip.Addr
	// Restrict has the namespace reach what policy permits, and nothing else. It is
	// called once at most, before the first process of the step. With mode none there
	// is nothing to restrict.
	Restrict(policy *egress.Policy) error
	// Contacts tells what was reached and what was refused so far.
	Contacts() (Contacts, error)
	// Unused reports whether no packet was ever in the namespace, neither from or to the
	// outside nor on its loopback device. What steps may do in one leaves nothing then, when
	// all of their processes are gone.
	Unused() (bool, error)
	// Release gives the namespace back. Everything in it is gone afterwards.
	Release() error
}

// Contacts is what a step did with its network, as far as it left its namespace. Names
// that its resolver refused are among what was refused.
type Contacts struct {
	Reached, Refused ContactList
}

// ContactList has destinations in no order, as many as are kept.
type ContactList struct {
	List []Contact
	// More counts attempts at further destinations.
	More int64
}

// Contact is a destination that a step tried to reach.
type Contact struct {
	// Address is not valid when a name was refused.
	Address netip.Addr
	// Name is what the step's own resolver was asked for to get the address; empty: the
	// step has no resolver of its own, or did not ask.
	Name string
	// Protocol is "tcp", "udp", "icmp", "dns" for a name that was refused, or the
	// number of another protocol.
	Protocol string
	// Port is 0 when the protocol has none.
	Port uint16
	// Count is how many attempts there were: connections for TCP, packets until the
	// first answer for all else.
	Count int64
}
