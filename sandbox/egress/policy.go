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
	// Exceptions may be reached although a range is denied. They do not get around
	// Rules.
	Exceptions []Exception
	// Deny has ranges besides those of the package.
	Deny []Range
	// DenyPrivate denies the ranges of private networks too.
	DenyPrivate bool
	// Rules returns what policies say, all of which must permit a connection. It is
	// called for every connection; nil: there are none.
	Rules func() []Rules
	// Narrow is a list that a build gives itself: all that it may reach of what the
	// rest permits; none: all of that. It takes nothing out of a denial.
	Narrow []Exception
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
	// Range is what denies it; empty when an allow-list lacks it.
	Range Range
	// Rules names the policy that the range or the list is of; empty: the agent's
	// configuration.
	Rules string
}

func (e *DeniedError) Error() string {
	to := e.Address.String()
	if e.Host != "" {
		to = fmt.Sprintf("%s (%s)", e.Host, to)
	}
	a := e.Address.Addr().WithZone("")
	switch {
	case e.Rules == "":
		return fmt.Sprintf("connection to %s denied for builds: %s is %s; to allow it, an administrator adds %q or %q to fetch.allow in the configuration of the agent",
			to, e.Range.Prefix, e.Range.What, e.Address, netip.PrefixFrom(a, a.BitLen()))
	case e.Range.Prefix.IsValid():
		return fmt.Sprintf("connection to %s denied for builds: %s denies %s", to, e.Rules, e.Range.Prefix)
	}
	return fmt.Sprintf("connection to %s denied for builds: %s says what may be reached, and does not list it", to, e.Rules)
}

// Timeout and Temporary make it an error of package net that is not worth another
// attempt.
func (e *DeniedError) Timeout() bool { return false }

// Temporary is false.
func (e *DeniedError) Temporary() bool { return false }

// Check returns a *DeniedError when a connection to to, that was asked for by the
// name host, must not be made. host may be empty.
func (p *Policy) Check(host string, to netip.AddrPort) error {
	host, to = plain(host, to)
	rules := p.all()
	if err := p.checkRanges(host, to, rules); err != nil {
		return err
	}
	for _, r := range rules {
		if err := r.check(host, to); err != nil {
			return err
		}
	}
	return nil
}

// plain returns what a connection is judged by.
func plain(host string, to netip.AddrPort) (string, netip.AddrPort) {
	if _, err := netip.ParseAddr(host); err == nil {
		host = "" // the address says the same
	}
	// The kernel takes a mapped address for the IPv4 address that it is.
	return host, netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
}

// checkRanges judges by what is denied to everyone. rules may name what is not.
func (p *Policy) checkRanges(host string, to netip.AddrPort, rules []Rules) error {
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
		for _, r := range p.denied(a) {
			if !p.lifts(rules, to, r.Prefix) {
				return deny(r)
			}
		}
		for _, o := range own {
			if o.WithZone("").Unmap() == a && !p.lifts(rules, to, single(a)) {
				return deny(Range{single(a), thisHost})
			}
		}
	}
	return nil
}

// lifts tells whether rules, other than the build's own, name to as a part of what is
// denied.
func (p *Policy) lifts(rules []Rules, to netip.AddrPort, denied netip.Prefix) bool {
	for _, r := range rules {
		if r.Name != OwnList && r.named(to, denied) {
			return true
		}
	}
	return false
}

// denied returns the ranges that have a, which is read as itself only.
func (p *Policy) denied(a netip.Addr) []Range {
	lists := [][]Range{denied, p.Deny, nil}
	if p.DenyPrivate {
		lists[2] = privateRanges
	}
	var out []Range
	for _, list := range lists {
		for _, r := range list {
			if r.Prefix.Contains(a) {
				out = append(out, r)
			}
		}
	}
	return out
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
