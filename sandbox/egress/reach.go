package egress

import (
	"net/netip"
	"slices"
)

// Reach is what a Policy lets be reached by IPv4 address alone, for a packet filter.
// The node's own addresses are not seen to: they change while a filter stands.
type Reach struct {
	// Any is where every protocol and port may be reached.
	Any []Span
	// Ports is where, besides, a port may be reached by TCP and UDP.
	Ports []PortReach
	// Named holds the single addresses that the policy names, each with the port,
	// or 0 for all, of an entry of an allow-list. Only these may be reached although
	// they are the node's own.
	Named []netip.AddrPort
}

// PortReach is where a port may be reached.
type PortReach struct {
	Port  uint16
	Spans []Span
}

// Span is a range of IPv4 addresses with both its ends.
type Span struct{ First, Last netip.Addr }

// Reach works out what p says about addresses that no name led to.
func (p *Policy) Reach() Reach {
	var out Reach
	starts := p.starts()
	fixed := *p
	rules := p.all()
	fixed.Rules, fixed.Narrow = func() []Rules { return rules }, nil
	fixed.NodeAddresses = func() ([]netip.Addr, error) { return nil, nil }
	// No entry has port 0.
	out.Any = fixed.spans(starts, 0)
	for _, port := range fixed.ports() {
		spans := fixed.spans(starts, port)
		if !slices.Equal(spans, out.Any) {
			out.Ports = append(out.Ports, PortReach{port, spans})
		}
	}
	for _, r := range rules {
		for _, e := range r.Allow {
			if e.named() || !e.prefix.IsSingleIP() || !e.prefix.Addr().Is4() {
				continue
			}
			to := netip.AddrPortFrom(e.prefix.Addr(), e.port)
			if fixed.Check("", to) == nil && fixed.lifts(rules, to, single(to.Addr())) && !slices.Contains(out.Named, to) {
				out.Named = append(out.Named, to)
			}
		}
	}
	return out
}

// spans returns where the policy permits a port, given the addresses at which what it
// says may change.
func (p *Policy) spans(starts []netip.Addr, port uint16) []Span {
	var out []Span
	for i, a := range starts {
		if p.Check("", netip.AddrPortFrom(a, port)) != nil {
			continue
		}
		last := netip.AddrFrom4([4]byte{255, 255, 255, 255})
		if i+1 < len(starts) {
			last = starts[i+1].Prev()
		}
		if n := len(out); n > 0 && out[n-1].Last.Next() == a {
			out[n-1].Last = last
		} else {
			out = append(out, Span{a, last})
		}
	}
	return out
}

// starts returns the addresses at which what the policy says may change, in order.
func (p *Policy) starts() []netip.Addr {
	out := []netip.Addr{netip.IPv4Unspecified()}
	add := func(prefix netip.Prefix) {
		if !prefix.IsValid() || !prefix.Addr().Is4() {
			return
		}
		out = append(out, prefix.Addr())
		if after := lastOf(prefix).Next(); after.IsValid() {
			out = append(out, after)
		}
	}
	for _, list := range [][]Range{denied, privateRanges, p.Deny} {
		for _, r := range list {
			add(r.Prefix)
		}
	}
	for _, e := range p.Exceptions {
		add(e.prefix)
	}
	for _, r := range p.all() {
		for _, e := range r.Allow {
			add(e.prefix)
		}
		for _, d := range r.Deny {
			add(d.Prefix)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// ports returns the ports that lists mention with addresses, in order.
func (p *Policy) ports() []uint16 {
	lists := [][]Exception{p.Exceptions}
	for _, r := range p.all() {
		lists = append(lists, r.Allow)
	}
	var out []uint16
	for _, list := range lists {
		for _, e := range list {
			if e.port != 0 && !e.named() {
				out = append(out, e.port)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
