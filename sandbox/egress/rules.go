package egress

import "net/netip"

// Rules is what one policy says about where builds may connect to.
type Rules struct {
	// Name of the policy, for refusals.
	Name string
	// Allow is all that may be reached; none: what is not denied. An address or CIDR
	// in it that lies within a denied range names that part of the range, and so takes
	// it out of the denial. A larger one does not, and a host name never does.
	Allow []Exception
	// Deny has ranges that may not be reached, besides those of everyone.
	Deny []Range
}

// named tells whether an entry of the allow-list is about to and lies within r.
func (r Rules) named(to netip.AddrPort, within netip.Prefix) bool {
	for _, e := range r.Allow {
		if e.named() || !e.covers("", to) || e.prefix.Addr().Is4() != within.Addr().Is4() {
			continue
		}
		if e.prefix.Bits() >= within.Bits() && within.Contains(e.prefix.Addr()) {
			return true
		}
	}
	return false
}

// check returns a *DeniedError when r does not permit a connection.
func (r Rules) check(host string, to netip.AddrPort) error {
	for _, a := range readings(to.Addr()) {
		for _, d := range r.Deny {
			if d.Prefix.Contains(a) && !r.named(to, d.Prefix) {
				return &DeniedError{Host: host, Address: to, Range: d, Rules: r.Name}
			}
		}
	}
	if len(r.Allow) == 0 {
		return nil
	}
	for _, e := range r.Allow {
		if e.covers(host, to) {
			return nil
		}
	}
	return &DeniedError{Host: host, Address: to, Rules: r.Name}
}

// mayName tells whether the allow-list permits connections to a host of that name,
// given addresses that it likes.
func (r Rules) mayName(host string) (lists, byAddress bool) {
	for _, e := range r.Allow {
		switch {
		case e.names(host):
			lists = true
		case !e.named():
			byAddress = true
		}
	}
	return lists, byAddress
}

// all returns all rules, of which the build's own are the last.
func (p *Policy) all() []Rules {
	var out []Rules
	if p.Rules != nil {
		out = p.Rules()
	}
	if len(p.Narrow) > 0 {
		out = append(out[:len(out):len(out)], Rules{Name: OwnList, Allow: p.Narrow})
	}
	return out
}

// OwnList names the list that a build gives itself.
const OwnList = "the build's own list"

// Restricted tells whether there is an allow-list. Then only names that it has are
// resolved.
func (p *Policy) Restricted() bool {
	for _, r := range p.all() {
		if len(r.Allow) > 0 {
			return true
		}
	}
	return false
}

// Resolves tells whether a name is one that may be asked for: an allow-list has it,
// and every other has it too or has addresses that it may lead to.
func (p *Policy) Resolves(name string) bool {
	listed := false
	for _, r := range p.all() {
		if len(r.Allow) == 0 {
			continue
		}
		lists, byAddress := r.mayName(name)
		if !lists && !byAddress {
			return false
		}
		listed = listed || lists
	}
	return listed
}

// Ports returns the ports, of those that the allow-lists mention, on which a host may
// be reached at an address that its name has, and whether it may be on all.
func (p *Policy) Ports(name string, a netip.Addr) (ports []uint16, every bool) {
	// No entry has port 0, so only those without a port say yes to it.
	if p.Check(name, netip.AddrPortFrom(a, 0)) == nil {
		return nil, true
	}
	seen := map[uint16]bool{0: true}
	for _, r := range p.all() {
		for _, e := range r.Allow {
			if seen[e.port] {
				continue
			}
			seen[e.port] = true
			if p.Check(name, netip.AddrPortFrom(a, e.port)) == nil {
				ports = append(ports, e.port)
			}
		}
	}
	return ports, false
}
