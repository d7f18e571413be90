package egress

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

func list(t testing.TB, entries ...string) []Exception {
	t.Helper()
	out, err := ParseExceptions(entries)
	require.NoError(t, err)
	return out
}

func ranges(t testing.TB, entries ...string) (out []Range) {
	t.Helper()
	for _, e := range entries {
		r, err := ParseRange(e, "denied here")
		require.NoError(t, err)
		out = append(out, r)
	}
	return out
}

func constant(r ...Rules) func() []Rules { return func() []Rules { return r } }

func TestAllowLists(t *testing.T) {
	p := world()
	p.Deny = ranges(t, "10.96.0.0/12")
	p.Rules = constant(Rules{Name: "a", Allow: list(t, "93.184.216.0/24", "8.8.8.8:53", "10.96.0.0/16:443", "10.0.0.0/8:80", "*.example.org", "deb.test:80", "10.9.8.7:5000")})
	for _, c := range []struct {
		host, to string
		allowed  bool
	}{
		{"", "93.184.216.34:1", true}, {"", "93.184.217.34:1", false}, {"any", "93.184.216.34:1", true}, {"", "[::ffff:93.184.216.34]:1", true},
		{"", "[64:ff9b::5db8:d822]:1", false}, {"", "8.8.8.8:53", true}, {"", "8.8.8.8:54", false},
		// An entry within a denied range names it; a larger one does not.
		{"", "10.96.1.1:443", true}, {"", "10.96.1.1:444", false}, {"", "10.97.1.1:443", false}, {"", "10.97.1.1:80", false}, {"", "10.1.1.1:80", true},
		{"", "10.9.8.7:5000", true}, {"", "10.9.8.7:80", false}, {"", "10.9.8.7:22", false},
		{"a.example.org", "1.2.3.4:9", true}, {"A.B.Example.ORG.", "1.2.3.4:9", true}, {"example.org", "1.2.3.4:9", false}, {"", "1.2.3.4:9", false},
		{"xexample.org", "1.2.3.4:9", false}, {"a.example.org.evil", "1.2.3.4:9", false}, {".example.org", "1.2.3.4:9", false},
		{"deb.test", "1.2.3.4:80", true}, {"deb.test", "1.2.3.4:443", false},
		// A name takes nothing out of a denial.
		{"a.example.org", "127.0.0.1:9", false}, {"a.example.org", "169.254.169.254:80", false}, {"a.example.org", "10.97.0.1:80", false},
		{"a.example.org", "[::ffff:169.254.169.254]:80", false}, {"a.example.org", "10.9.8.7:80", false},
	} {
		err := p.Check(c.host, netip.MustParseAddrPort(c.to))
		require.Equal(t, c.allowed, err == nil, "%s %s: %v", c.host, c.to, err)
	}
	require.ErrorContains(t, p.Check("", netip.MustParseAddrPort("1.2.3.4:9")), "denied for builds: a says what may be reached, and does not list it")
}

func TestAllRulesMustPermit(t *testing.T) {
	p := world()
	p.DenyPrivate = true
	p.Rules = constant(
		Rules{Name: "a", Allow: list(t, "10.1.0.0/16", "*.example.org"), Deny: ranges(t, "10.1.2.0/24")},
		Rules{Name: "b", Allow: list(t, "10.0.0.0/8", "a.example.org"), Deny: ranges(t, "10.1.3.0/24")},
	)
	p.Exceptions = list(t, "192.168.1.1")
	for to, allowed := range map[string]bool{
		"10.1.1.1:1": true, "10.1.2.1:1": false, "10.1.3.1:1": false, "10.2.1.1:1": false, "1.2.3.4:1": false, "192.168.1.1:1": false,
	} {
		require.Equal(t, allowed, p.Check("", netip.MustParseAddrPort(to)) == nil, to)
	}
	require.NoError(t, p.Check("a.example.org", netip.MustParseAddrPort("1.2.3.4:1")))
	require.Error(t, p.Check("b.example.org", netip.MustParseAddrPort("1.2.3.4:1")))
	require.True(t, p.Resolves("a.example.org"))
	require.True(t, p.Resolves("b.example.org"), "it may lead to addresses that the second list has")
	require.False(t, p.Resolves("example.org"))
	require.NoError(t, p.Check("b.example.org", netip.MustParseAddrPort("10.1.1.1:1")))
}

func TestBuildsNarrowOnly(t *testing.T) {
	p := world()
	p.Narrow = list(t, "127.0.0.1", "169.254.169.254", "1.2.3.4", "a.test")
	require.True(t, p.Restricted())
	require.False(t, world().Restricted())
	for to, allowed := range map[string]bool{"127.0.0.1:1": false, "169.254.169.254:80": false, "1.2.3.4:1": true, "1.2.3.5:1": false} {
		require.Equal(t, allowed, p.Check("", netip.MustParseAddrPort(to)) == nil, to)
	}
	require.True(t, p.Resolves("a.test"))
	p.Rules = constant(Rules{Name: "a", Allow: list(t, "b.test", "127.0.0.1")})
	require.True(t, p.Resolves("b.test"), "it may lead to what the build lists by address")
	require.Error(t, p.Check("b.test", netip.MustParseAddrPort("5.5.5.5:1")))
	require.False(t, p.Resolves("a.test") && p.Check("a.test", netip.MustParseAddrPort("5.5.5.5:1")) == nil)
	require.NoError(t, p.Check("", netip.MustParseAddrPort("127.0.0.1:1")), "the policy names it, and the build wants it")
}

func TestPorts(t *testing.T) {
	p := world()
	p.Rules = constant(Rules{Allow: list(t, "deb.test:80", "deb.test:443", "any.test", "1.1.1.1:22")})
	ports, every := p.Ports("deb.test", netip.MustParseAddr("5.5.5.5"))
	require.False(t, every)
	require.ElementsMatch(t, []uint16{80, 443}, ports)
	_, every = p.Ports("any.test", netip.MustParseAddr("5.5.5.5"))
	require.True(t, every)
	ports, every = p.Ports("any.test", netip.MustParseAddr("127.0.0.1"))
	require.False(t, every)
	require.Empty(t, ports)
}

// TestReachIsWhatCheckSays compares the two at all ends of ranges and around them.
func TestReachIsWhatCheckSays(t *testing.T) {
	for name, p := range map[string]*Policy{
		"zero":    {},
		"private": {DenyPrivate: true, Exceptions: list(t, "10.1.2.3:80", "10.2.0.0/16"), Deny: ranges(t, "93.184.216.0/24")},
		"lists": {Deny: ranges(t, "10.96.0.0/12"), Rules: constant(
			Rules{Name: "a", Allow: list(t, "0.0.0.0/0:443", "10.96.0.1", "1.2.3.0/24", "255.255.255.255:9"), Deny: ranges(t, "1.2.3.128/25")},
			Rules{Name: "b", Allow: list(t, "0.0.0.0/0")})},
		"narrow": {Narrow: list(t, "127.0.0.1", "8.8.8.8", "9.9.9.0/24:53", "a.test")},
	} {
		t.Run(name, func(t *testing.T) {
			p.NodeAddresses = func() ([]netip.Addr, error) { return nil, nil }
			r := p.Reach()
			in := func(spans []Span, a netip.Addr) bool {
				for _, s := range spans {
					if a.Compare(s.First) >= 0 && a.Compare(s.Last) <= 0 {
						return true
					}
				}
				return false
			}
			for _, start := range p.starts() {
				for _, a := range []netip.Addr{start, start.Next(), start.Prev()} {
					if !a.IsValid() {
						continue
					}
					for _, port := range []uint16{1, 9, 53, 80, 443} {
						want := p.Check("", netip.AddrPortFrom(a, port)) == nil
						got := in(r.Any, a)
						for _, pr := range r.Ports {
							got = got || pr.Port == port && in(pr.Spans, a)
						}
						require.Equal(t, want, got, "%s:%d", a, port)
					}
				}
			}
		})
	}
	r := (&Policy{Deny: ranges(t, "10.0.0.0/8"), Rules: constant(Rules{Allow: list(t, "10.0.0.1:5000", "10.0.0.0/24")})}).Reach()
	require.Equal(t, []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:5000")}, r.Named)
	require.Empty(t, (&Policy{Narrow: list(t, "8.8.8.8")}).Reach().Named)
}
