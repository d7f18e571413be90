package egress

import (
	"fmt"
	"net"
	"net/netip"
)

// Policy decides what may be connected to. The zero value denies the ranges of
// this package and the node's own addresses. It is not changed once it is in use;
// its methods may be called concurrently.
type Policy struct {
	// Exceptions may be reached whatever the rules say.
	Exceptions []Exception
	// Deny has ranges besides those of the package.
	Deny []Range
	// DenyPrivate denies the ranges of private networks too.
	DenyPrivate bool
	// Resolver finds the addresses of names; nil: that of the system.
	Resolver *net.Resolver
	// NodeAddresses returns the node's own; it is called for every connection. Nil:
	// those of the network interfaces.
	NodeAddresses func() ([]netip.Addr, error)
}

// DeniedError is why a connection was not made.
type DeniedError struct {
	// Host is the name that was asked for; empty when it was an address.
	Host string
	// Address is what the connection would have been made to.
	Address netip.AddrPort
	// Range is the rule that denies it.
	Range Range
}

func (e *DeniedError) Error() string {
	to := e.Address.String()
	if e.Host != "" {
		to = fmt.Sprintf("%s (%s)", e.Host, to)
	}
	a := e.Address.Addr().WithZone("")
	return fmt.Sprintf("connection to %s denied for builds: %s is %s; to allow it, an administrator adds %q or %q to fetch.allow in the configuration of the agent",
		to, e.Range.Prefix, e.Range.What, e.Address, netip.PrefixFrom(a, a.BitLen()))
}

// Timeout and Temporary make it an error of package net that is not worth another
// attempt.
func (e *DeniedError) Timeout() bool { return false }

// Temporary is false.
func (e *DeniedError) Temporary() bool { return false }

// Check returns a *DeniedError when a connection to to, that was asked for by the
// name host, must not be made. host may be empty.
func (p *Policy) Check(host string, to netip.AddrPort) error {
	if _, err := netip.ParseAddr(host); err == nil {
		host = "" // the address says the same
	}
	// The kernel takes a mapped address for the IPv4 address that it is.
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	for _, e := range p.Exceptions {
		if e.covers(host, to) {
			return nil
		}
	}
	deny := func(r Range) error { return &DeniedError{Host: host, Address: to, Range: r} }
	if !to.Addr().IsValid() {
		return deny(Range{What: "no address"})
	}
	own, err := p.nodeAddresses()
	if err != nil {
		return fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, a := range readings(to.Addr()) {
		if r, ok := p.find(a); ok {
			return deny(r)
		}
		for _, o := range own {
			if o.WithZone("").Unmap() == a {
				return deny(Range{single(a), thisHost})
			}
		}
	}
	return nil
}

// find returns the rule that denies a, which is read as itself only.
func (p *Policy) find(a netip.Addr) (Range, bool) {
	lists := [][]Range{denied, p.Deny, nil}
	if p.DenyPrivate {
		lists[2] = privateRanges
	}
	for _, list := range lists {
		for _, r := range list {
			if r.Prefix.Contains(a) {
				return r, true
			}
		}
	}
	return Range{}, false
}

func (p *Policy) nodeAddresses() ([]netip.Addr, error) {
	if p.NodeAddresses != nil {
		return p.NodeAddresses()
	}
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range list {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, prefix.Addr())
		}
	}
	return out, nil
}
