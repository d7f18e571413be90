package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// network is one namespace.
type network struct {
	m           *Manager
	ns          *os.File
	inside      *netlink.Handle // a netlink socket in the namespace
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

// Unused implements sandbox.Network.
func (n *network) Unused() (bool, error) {
	links, err := n.inside.LinkList()
	if err != nil {
		return false, fmt.Errorf("list devices of a network: %w", err)
	}
	for _, l := range links {
		if s := l.Attrs().Statistics; s == nil || s.RxPackets+s.TxPackets+s.RxDropped+s.TxDropped > 0 {
			return false, nil
		}
	}
	return true, nil
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

// close ends the resolver and lets go of the namespace.
func (n *network) close() error {
	var err error
	if n.resolver != nil {
		err = n.resolver.close()
	}
	n.inside.Close()
	return errors.Join(err, n.ns.Close())
}
