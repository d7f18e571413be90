package egress

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

// world is a policy of a node whose own addresses are known.
func world() *Policy {
	return &Policy{NodeAddresses: func() ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("10.9.8.7"), netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("fe80::7%eth0")}, nil
	}}
}

func TestAddresses(t *testing.T) {
	for addr, want := range map[string]string{
		"93.184.216.34": "", "10.1.2.3": "", "192.168.1.1": "", "100.64.0.1": "", "126.255.255.255": "", "128.0.0.1": "", "1.0.0.0": "",
		"2606:2800:220:1::1": "", "fd12:3456::1": "", "64:ff9b::5db8:d822": "", "2002:5db8:d822::1": "", "64:ff9b:1::5db8:d822": "",

		"127.0.0.1": "loopback", "127.255.255.254": "loopback", "0.0.0.0": "the node itself", "0.1.2.3": "the node itself",
		"169.254.169.254": "link-local", "169.254.0.1": "link-local", "100.100.100.200": "metadata", "168.63.129.16": "metadata",
		"192.0.0.192": "metadata", "224.0.0.1": "multicast", "239.1.1.1": "multicast", "255.255.255.255": "reserved", "240.0.0.1": "reserved",
		"10.9.8.7": "the node itself",

		"::": "the node itself", "::1": "loopback", "fe80::1": "link-local", "fe80::1%eth0": "link-local", "ff02::1": "multicast",
		"fd00:ec2::254": "metadata", "fd20:ce::254": "metadata", "2001:db8::7": "the node itself", "::1%lo": "loopback",

		"::ffff:127.0.0.1": "loopback", "::ffff:a9fe:a9fe": "link-local", "::ffff:10.9.8.7": "the node itself", "::127.0.0.1": "loopback",
		"::ffff:0:127.0.0.1": "loopback", "64:ff9b::127.0.0.1": "loopback", "64:ff9b::169.254.169.254": "link-local",
		"64:ff9b::10.9.8.7": "the node itself", "64:ff9b:1::169.254.169.254": "link-local", "64:ff9b:1:7f00:0:100::": "loopback",
		"64:ff9b:1:a:7f:0:100:0": "loopback", "64:ff9b:1:a:a9:fea9:fe00:0": "reserved",
		"2002:7f00:1::1": "loopback", "2002:a9fe:a9fe::": "link-local", "2002:a09:807::1": "the node itself",
		"2001:0:7f00:1::1": "loopback", "2001:0:102:304::5601:5601": "link-local", "2001:db8::5efe:127.0.0.1": "loopback",
		"2001:db8::200:5efe:169.254.169.254": "link-local",
	} {
		err := world().Check("", netip.AddrPortFrom(netip.MustParseAddr(addr), 80))
		if want == "" {
			require.NoError(t, err, addr)
			continue
		}
		var denied *DeniedError
		require.ErrorAs(t, err, &denied, addr)
		require.Contains(t, denied.Range.What, want, addr)
	}
	require.Error(t, world().Check("", netip.AddrPort{}))
}

func TestParseRange(t *testing.T) {
	for s, want := range map[string]string{"10.0.0.0/8": "10.0.0.0/8", "10.1.2.3": "10.1.2.3/32", "fd00::1": "fd00::1/128", "::ffff:10.1.2.3": "10.1.2.3/32"} {
		r, err := ParseRange(s, "x")
		require.NoError(t, err)
		require.Equal(t, Range{netip.MustParsePrefix(want), "x"}, r)
	}
	for _, s := range []string{"", "host", "10.0.0.1/8", "10.1.2.3:80"} {
		_, err := ParseRange(s, "x")
		require.Error(t, err, s)
	}
}

func TestPrivateNetworksCanBeDenied(t *testing.T) {
	p := world()
	p.DenyPrivate = true
	for _, addr := range []string{"10.1.2.3", "172.31.0.1", "192.168.1.1", "100.64.0.1", "fd12::1", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3"} {
		require.ErrorContains(t, p.Check("", netip.AddrPortFrom(netip.MustParseAddr(addr), 443)), "is a private network", addr)
	}
	require.NoError(t, p.Check("", netip.MustParseAddrPort("93.184.216.34:443")))
}

func TestAdditionalRanges(t *testing.T) {
	p := world()
	p.Deny = []Range{{netip.MustParsePrefix("10.96.0.1/32"), "the API server"}}
	require.ErrorContains(t, p.Check("", netip.MustParseAddrPort("10.96.0.1:443")), "10.96.0.1/32 is the API server")
	require.ErrorContains(t, p.Check("", netip.MustParseAddrPort("[::ffff:10.96.0.1]:443")), "is the API server")
	require.NoError(t, p.Check("", netip.MustParseAddrPort("10.96.0.2:443")))
}

func TestExceptions(t *testing.T) {
	p := world()
	var err error
	p.Exceptions, err = ParseExceptions([]string{"127.0.0.1:5000", "169.254.7.0/24", "fe80::1", "[::1]:7", "Registry.Internal.:443", "any.internal"})
	require.NoError(t, err)
	for _, c := range []struct {
		host, to string
		allowed  bool
	}{
		{"", "127.0.0.1:5000", true}, {"", "127.0.0.1:5001", false}, {"", "127.0.0.2:5000", false}, {"", "[::ffff:127.0.0.1]:5000", true},
		{"localhost", "127.0.0.1:5000", true}, {"", "[64:ff9b::127.0.0.1]:5000", false},
		{"", "169.254.7.9:1", true}, {"", "169.254.8.9:1", false}, {"", "[fe80::1%eth0]:80", true}, {"", "[fe80::2]:80", false},
		{"", "[::1]:7", true}, {"", "[::1]:8", false},
		{"registry.internal", "127.0.0.1:443", true}, {"registry.internal.", "127.0.0.1:443", true}, {"REGISTRY.internal", "127.0.0.1:443", true},
		{"registry.internal", "127.0.0.1:80", false}, {"x.registry.internal", "127.0.0.1:443", false}, {"", "127.0.0.1:443", false},
		{"any.internal", "127.0.0.1:9", true}, {"evil", "127.0.0.1:9", false},
	} {
		err := p.Check(c.host, netip.MustParseAddrPort(c.to))
		require.Equal(t, c.allowed, err == nil, "%s %s: %v", c.host, c.to, err)
	}
}

func TestRefusalSaysWhatToDo(t *testing.T) {
	err := world().Check("Metadata.internal", netip.MustParseAddrPort("169.254.169.254:80"))
	require.EqualError(t, err, `connection to Metadata.internal (169.254.169.254:80) denied for builds: 169.254.0.0/16 is link-local, where metadata services are; `+
		`to allow it, an administrator adds "169.254.169.254:80" or "169.254.169.254/32" to fetch.allow in the configuration of the agent`)
	require.NotContains(t, world().Check("127.0.0.1", netip.MustParseAddrPort("127.0.0.1:80")).Error(), "(")
}

func TestExceptionsThatCannotBeRead(t *testing.T) {
	for _, s := range []string{
		"", "::ffff:127.0.0.0/104", "10.0.0.1/8", "10.0.0.0/33", "127.1", "2130706433", "0x7f000001", "0x7f.1", "host:", "host:0", "host:65536", "host:x", "a b", "fe80::1%eth0",
		"*", "*.", "*x.example", "a.*.example", "*.1.2", "[10.0.0.1]:80", "[fd00::/8]", "fd00::/8:443", "10.0.0.0/8:0", "http://host", "host/path", "-a", "a:1:2", "127.0.0.1:0", "::1:", "[::1]", "host name:80", "1.2.3.4.5", "é.example",
	} {
		_, err := ParseException(s)
		require.Error(t, err, s)
	}
	_, err := ParseExceptions([]string{"a", "10.0.0.1/8"})
	require.ErrorContains(t, err, `did you mean "10.0.0.0/8"?`)
}

func TestUnknownNodeAddressesDeny(t *testing.T) {
	p := &Policy{NodeAddresses: func() ([]netip.Addr, error) { return nil, errors.New("no netlink") }}
	require.ErrorContains(t, p.Check("", netip.MustParseAddrPort("93.184.216.34:80")), "no netlink")
}

func FuzzParseException(f *testing.F) {
	for _, s := range []string{"10.0.0.0/8", "10.0.0.0/8:443", "[fd00::/8]:443", "*.example.org:80", "127.0.0.1:5000", "[::1]:7", "registry.internal:443", "fe80::/10", "127.1", "::ffff:1.2.3.4"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := ParseException(s)
		if err != nil {
			return
		}
		again, err := ParseException(e.String())
		require.NoError(t, err)
		require.Equal(t, e, again)
	})
}

// FuzzCheck wants an address that wraps a denied one to be denied, and the same
// verdict for all spellings of one address.
func FuzzCheck(f *testing.F) {
	for _, s := range []string{"127.0.0.1", "::1", "64:ff9b::7f00:1", "2002:7f00:1::", "fe80::1%eth0", "93.184.216.34", "::ffff:10.9.8.7"} {
		f.Add(s, uint16(80))
	}
	p := world()
	f.Fuzz(func(t *testing.T, s string, port uint16) {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return
		}
		verdict := p.Check("", netip.AddrPortFrom(a, port)) == nil
		require.Equal(t, verdict, p.Check(s, netip.AddrPortFrom(a, port)) == nil)
		require.Equal(t, verdict, p.Check("", netip.AddrPortFrom(a.WithZone(""), port)) == nil)
		if v4 := a.Unmap(); v4.Is4() {
			b := v4.As4()
			for _, w := range []netip.Addr{
				netip.AddrFrom16(v4.As16()),
				netip.AddrFrom16([16]byte{0, 0x64, 0xff, 0x9b, 12: b[0], 13: b[1], 14: b[2], 15: b[3]}),
				netip.AddrFrom16([16]byte{0x20, 2, b[0], b[1], b[2], b[3], 15: 1}),
			} {
				require.Equal(t, verdict, p.Check("", netip.AddrPortFrom(w, port)) == nil, "%s in %s", v4, w)
			}
		}
		if a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() {
			require.False(t, verdict)
		}
	})
}
