package egress

import (
	"fmt"
	"net/netip"
)

// Range is a set of addresses with one meaning.
type Range struct {
	// Prefix has the addresses.
	Prefix netip.Prefix
	// What says what they are, as a noun with its article, for messages.
	What string
}

const (
	metadata  = "a metadata service of a cloud"
	loopback  = "the loopback of the node"
	linkLocal = "link-local, where metadata services are"
	multicast = "multicast"
	thisHost  = "the node itself"
	private   = "a private network"
)

// denied are the ranges that no build may reach. They are sorted by no rule; an
// address is in the first that has it.
var denied = []Range{
	{netip.MustParsePrefix("0.0.0.0/8"), thisHost},
	{netip.MustParsePrefix("127.0.0.0/8"), loopback},
	{netip.MustParsePrefix("169.254.0.0/16"), linkLocal},
	{netip.MustParsePrefix("100.100.100.200/32"), metadata},
	{netip.MustParsePrefix("168.63.129.16/32"), metadata},
	{netip.MustParsePrefix("192.0.0.192/32"), metadata},
	{netip.MustParsePrefix("224.0.0.0/4"), multicast},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved or broadcast"},
	{netip.MustParsePrefix("::/128"), thisHost},
	{netip.MustParsePrefix("::1/128"), loopback},
	{netip.MustParsePrefix("fe80::/10"), linkLocal},
	{netip.MustParsePrefix("fd00:ec2::/64"), metadata},
	{netip.MustParsePrefix("fd20:ce::254/128"), metadata},
	{netip.MustParsePrefix("ff00::/8"), multicast},
}

// privateRanges are networks whose addresses mean something only where they are
// used.
var privateRanges = []Range{
	{netip.MustParsePrefix("10.0.0.0/8"), private},
	{netip.MustParsePrefix("172.16.0.0/12"), private},
	{netip.MustParsePrefix("192.168.0.0/16"), private},
	{netip.MustParsePrefix("100.64.0.0/10"), private},
	{netip.MustParsePrefix("198.18.0.0/15"), private},
	{netip.MustParsePrefix("fc00::/7"), private},
	{netip.MustParsePrefix("fec0::/10"), private},
}

// DeniedIPv4 returns the IPv4 ranges that no build may reach, wherever it runs.
func DeniedIPv4() []netip.Prefix {
	var out []netip.Prefix
	for _, r := range denied {
		if r.Prefix.Addr().Is4() {
			out = append(out, r.Prefix)
		}
	}
	return out
}

// ParseRange reads a CIDR or an address; what says what its addresses are.
func ParseRange(s, what string) (Range, error) {
	e, err := ParseException(s)
	if err != nil || e.host != "" || e.port != 0 {
		return Range{}, fmt.Errorf(`%q: want a CIDR or an IP address, such as "10.96.0.0/12"`, s)
	}
	return Range{Prefix: e.prefix, What: what}, nil
}
