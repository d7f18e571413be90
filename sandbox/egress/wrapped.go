package egress

import "net/netip"

// wrapping is a form of IPv6 address that has an IPv4 address in it, to which a
// gateway or the kernel may connect in its place.
type wrapping struct {
	prefix netip.Prefix
	// at are the offsets of the IPv4 address's bytes.
	at [4]int
	// inverted says that all bits of the IPv4 address are.
	inverted bool
}

var wrappings = []wrapping{
	// Compatible and translated addresses.
	{netip.MustParsePrefix("::/96"), last, false},
	{netip.MustParsePrefix("::ffff:0:0:0/96"), last, false},
	// NAT64: the well-known prefix, and the one for local use in each of the
	// lengths that it may be divided into.
	{netip.MustParsePrefix("64:ff9b::/96"), last, false},
	{localNAT64, last, false},
	{localNAT64, [4]int{6, 7, 9, 10}, false},
	{localNAT64, [4]int{7, 9, 10, 11}, false},
	{localNAT64, [4]int{9, 10, 11, 12}, false},
	// 6to4, and Teredo with its server and its client.
	{netip.MustParsePrefix("2002::/16"), [4]int{2, 3, 4, 5}, false},
	{netip.MustParsePrefix("2001::/32"), [4]int{4, 5, 6, 7}, false},
	{netip.MustParsePrefix("2001::/32"), last, true},
}

// localNAT64 is the prefix of NAT64 for local use.
var localNAT64 = netip.MustParsePrefix("64:ff9b:1::/48")

// last are the offsets of the last 32 bits.
var last = [4]int{12, 13, 14, 15}

// readings returns the addresses that a, which is not a mapped one, may mean: itself,
// without a zone, and every IPv4 address that it wraps.
func readings(a netip.Addr) []netip.Addr {
	a = a.WithZone("")
	out := []netip.Addr{a}
	if !a.Is6() {
		return out
	}
	b := a.As16()
	for _, w := range wrappings {
		if !w.prefix.Contains(a) {
			continue
		}
		// In the wrong one of several divisions the address begins with zeros,
		// and no gateway forwards what does.
		if v4 := w.inner(b); w.prefix != localNAT64 || v4.As4()[0] != 0 {
			out = append(out, v4)
		}
	}
	// ISATAP has its mark in the interface's half, below any prefix.
	if b[8]&^0x02 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe {
		out = append(out, netip.AddrFrom4([4]byte(b[12:16])))
	}
	return out
}

func (w wrapping) inner(b [16]byte) netip.Addr {
	var v4 [4]byte
	for i, at := range w.at {
		v4[i] = b[at]
		if w.inverted {
			v4[i] ^= 0xff
		}
	}
	return netip.AddrFrom4(v4)
}
