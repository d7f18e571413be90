package netns

import (
	"errors"
	"net/netip"
	"os"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// network is one namespace.
type network struct {
	m           *Manager
	ns          *os.File
	path        string
	slot        int // -1 without a device
	nameservers []netip.Addr
	// resolver is the step's own; nil: it uses the nameservers of all.
	resolver *resolver
}

var _ sandbox.Network = (*network)(nil)

func (n *network) Path() string              { return n.path }
func (n *network) Nameservers() []netip.Addr { return n.nameservers }

// Restrict implements sandbox.Network.
func (n *network) Restrict(policy *egress.Policy) error {
	if n.slot < 0 {
		return nil
	}
	f := n.m.filter
	if !policy.Restricted() {
		return f.restrict(n.slot, policy.Reach(), 0)
	}
	node, _ := n.m.claim.ends(n.slot)
	learn := func(a netip.Addr, ports []uint16, every bool, ttl uint32) error {
		return f.learn(n.slot, a, ports, every, lifetime(ttl))
	}
	r, err := newResolver(node, n.m.upstream, policy, learn)
	if err != nil {
		return err
	}
	if err := f.restrict(n.slot, policy.Reach(), r.port()); err != nil {
		return errors.Join(err, r.close())
	}
	n.resolver, n.nameservers = r, []netip.Addr{node}
	return nil
}

// Contacts implements sandbox.Network.
func (n *network) Contacts() (sandbox.Contacts, error) {
	if n.slot < 0 {
		return sandbox.Contacts{}, nil
	}
	c, err := n.m.filter.contacts(n.slot)
	if err == nil && n.resolver != nil {
		n.resolver.describe(&c)
	}
	return c, err
}

// Release hands the namespace to the keeper: the kernel takes long to remove
// one. Errors show at Close. A second call does nothing.
func (n *network) Release() error {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	if _, held := n.m.open[n]; !held {
		return nil
	}
	delete(n.m.open, n)
	n.m.released = append(n.m.released, n)
	n.m.nudge()
	return nil
}

// stop ends the resolver.
func (n *network) stop() error {
	if n.resolver == nil {
		return nil
	}
	return n.resolver.close()
}
