package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// Addresses of the world: a server, a metadata service, a Pod, a Service, and a name
// server that policies know.
const (
	server, metadata, pod, service, dnsServer = "198.51.100.2", "169.254.169.254", "10.244.3.9", "10.96.0.1", "198.51.100.53"
)

func exceptions(t testing.TB, list ...string) []egress.Exception {
	t.Helper()
	out, err := egress.ParseExceptions(list)
	require.NoError(t, err)
	return out
}

func cluster(t testing.TB) []egress.Range {
	var out []egress.Range
	for _, s := range []string{"10.244.0.0/16", "10.96.0.0/12"} {
		r, err := egress.ParseRange(s, "the cluster's")
		require.NoError(t, err)
		out = append(out, r)
	}
	return out
}

func rulesOf(r ...egress.Rules) func() []egress.Rules { return func() []egress.Rules { return r } }

// managerWith makes a manager whose steps may reach what p says.
func managerWith(t testing.TB, dir string, p *egress.Policy) *Manager {
	t.Helper()
	m, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{netip.MustParseAddr(dnsServer)}, Policy: p})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func restricted(t testing.TB, m *Manager, p *egress.Policy) sandbox.Network {
	t.Helper()
	n := acquire(t, m, sandbox.NetworkEgress)
	require.NoError(t, n.Restrict(p))
	return n
}

// refusedFast wants connections to be refused, and at once. Of the kernel's answers to
// UDP there are only so many in a second.
func refusedFast(t testing.TB, n sandbox.Network, to string) {
	t.Helper()
	var err error
	for range 3 {
		var slow net.Error
		if err = dialOnce(t, n.Path(), "tcp", to); !errors.As(err, &slow) || !slow.Timeout() {
			break // else a busy machine has lost a packet
		}
	}
	require.ErrorIs(t, err, syscall.ECONNREFUSED, to)
	require.Error(t, dialOnce(t, n.Path(), "udp", to), to)
}

func reached(t testing.TB, n sandbox.Network, to string) {
	t.Helper()
	for _, proto := range []string{"tcp", "udp"} {
		err := dial(t, n.Path(), proto, to)
		if err != nil { // a busy machine may lose a few
			err = dial(t, n.Path(), proto, to)
		}
		require.NoError(t, err, "%s by %s", to, proto)
	}
}

func TestDeniedRanges(t *testing.T) {
	world(t, "7777", server, metadata, pod, service)
	dir := t.TempDir()
	open := acquire(t, managerWith(t, dir, nil), sandbox.NetworkEgress)
	m := managerWith(t, dir, &egress.Policy{Deny: cluster(t)})
	closed := acquire(t, m, sandbox.NetworkEgress)
	for _, n := range []sandbox.Network{open, closed} {
		reached(t, n, server+":7777")
		refusedFast(t, n, metadata+":7777")
	}
	// The ranges of the cluster are denied because the policy says so.
	for _, a := range []string{pod, service} {
		reached(t, open, a+":7777")
		refusedFast(t, closed, a+":7777")
	}
	named := restricted(t, m, &egress.Policy{Deny: cluster(t), Rules: rulesOf(egress.Rules{Allow: exceptions(t, "0.0.0.0/0", service+":7777")})})
	reached(t, named, service+":7777")
	reached(t, named, server+":7777")
	refusedFast(t, named, pod+":7777")
	refusedFast(t, named, service+":7778")

	t.Run("addresses that the node gets later", func(t *testing.T) {
		l, err := netlink.LinkByName("uplink")
		require.NoError(t, err)
		late := netip.MustParseAddr("203.0.113.44")
		require.NoError(t, netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(late, 32)}))
		echo(t, "203.0.113.44:7780")
		refusedFast(t, open, "203.0.113.44:7780")
		byName := restricted(t, m, &egress.Policy{Rules: rulesOf(egress.Rules{Allow: exceptions(t, "203.0.113.44:7780")})})
		reached(t, byName, "203.0.113.44:7780")
		wide := restricted(t, m, &egress.Policy{Rules: rulesOf(egress.Rules{Allow: exceptions(t, "203.0.113.0/24")})})
		refusedFast(t, wide, "203.0.113.44:7780")
		own := restricted(t, m, &egress.Policy{Narrow: exceptions(t, "203.0.113.44:7780")})
		refusedFast(t, own, "203.0.113.44:7780")
	})
}

// translate has the node send what is for some addresses to others, as Services do.
func translate(t testing.TB, addrs map[string]string) {
	t.Helper()
	nft, err := nftables.New()
	require.NoError(t, err)
	table := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "services"})
	chain := nft.AddChain(&nftables.Chain{
		Name: "pre", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
	})
	for from, to := range addrs {
		nft.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule(
			address(offsetDestination, netip.PrefixFrom(netip.MustParseAddr(from), 32), expr.CmpOpEq),
			[]expr.Any{
				&expr.Immediate{Register: 1, Data: netip.MustParseAddr(to).AsSlice()},
				&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
			},
		)})
	}
	require.NoError(t, nft.Flush())
	t.Cleanup(func() {
		nft.DelTable(table)
		require.NoError(t, nft.Flush())
	})
}

// TestTranslatedAddresses: what counts is the address that the step knows, and what is
// never open is not, whatever leads there.
func TestTranslatedAddresses(t *testing.T) {
	world(t, "7777", server, metadata)
	echo(t, "0.0.0.0:7777")
	node := "198.51.100.1"
	translate(t, map[string]string{service: server, "203.0.113.5": metadata, "203.0.113.6": node})
	dir := t.TempDir()
	open := acquire(t, managerWith(t, dir, nil), sandbox.NetworkEgress)
	closed := acquire(t, managerWith(t, dir, &egress.Policy{Deny: cluster(t)}), sandbox.NetworkEgress)
	reached(t, open, service+":7777")
	refusedFast(t, closed, service+":7777")
	for _, a := range []string{"203.0.113.5", "203.0.113.6"} {
		require.Error(t, dialOnce(t, open.Path(), "tcp", a+":7777"), a)
	}
	// The node itself gets there.
	require.NoError(t, dial(t, "/proc/self/ns/net", "tcp", metadata+":7777"))
}

func TestContacts(t *testing.T) {
	world(t, "7777", server, metadata)
	m := managerWith(t, t.TempDir(), nil)
	n := acquire(t, m, sandbox.NetworkEgress)
	c, err := n.Contacts()
	require.NoError(t, err)
	require.Empty(t, c)
	for range 3 {
		require.NoError(t, dial(t, n.Path(), "tcp", server+":7777"))
		require.ErrorIs(t, dialOnce(t, n.Path(), "tcp", metadata+":80"), syscall.ECONNREFUSED)
	}
	require.ErrorIs(t, dialOnce(t, n.Path(), "udp", metadata+":81"), syscall.EHOSTUNREACH)
	require.NoError(t, dial(t, n.Path(), "udp", server+":7777"))
	c, err = n.Contacts()
	require.NoError(t, err)
	// A busy machine may lose a packet, which is then sent again.
	atLeast := func(list []sandbox.Contact, want ...sandbox.Contact) {
		t.Helper()
		require.Len(t, list, len(want))
		for _, w := range want {
			i := slices.IndexFunc(list, func(c sandbox.Contact) bool { return c.Protocol == w.Protocol })
			require.GreaterOrEqual(t, list[i].Count, w.Count)
			w.Count = list[i].Count
			require.Equal(t, w, list[i])
		}
	}
	atLeast(c.Reached.List,
		sandbox.Contact{Address: netip.MustParseAddr(server), Protocol: "tcp", Port: 7777, Count: 3},
		sandbox.Contact{Address: netip.MustParseAddr(server), Protocol: "udp", Port: 7777, Count: 1})
	atLeast(c.Refused.List,
		sandbox.Contact{Address: netip.MustParseAddr(metadata), Protocol: "tcp", Port: 80, Count: 3},
		sandbox.Contact{Address: netip.MustParseAddr(metadata), Protocol: "udp", Port: 81, Count: 1})
	require.Zero(t, c.Reached.More+c.Refused.More)

	// There is room for so many, and the rest is counted.
	require.NoError(t, in(t, n.Path(), func() error {
		s, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return err
		}
		defer s.Close()
		for i := range maxContacts + 50 {
			to := binary.BigEndian.AppendUint32(nil, 0xcb007100+uint32(i)) // 203.0.113.0 and on
			if _, err := s.WriteTo([]byte("x"), &net.UDPAddr{IP: to, Port: 9}); err != nil && !errors.Is(err, syscall.EHOSTUNREACH) {
				return err
			}
		}
		return nil
	}))
	c, err = n.Contacts()
	require.NoError(t, err)
	require.Len(t, c.Reached.List, maxContacts)
	require.GreaterOrEqual(t, c.Reached.More, int64(52))
	require.Len(t, c.Refused.List, 2)
}

// TestNothingIsLeftOfASlot wants the next network of a slot to know nothing of the one
// before.
func TestNothingIsLeftOfASlot(t *testing.T) {
	w := world(t, "7777", server, pod, dnsServer)
	(&zone{ttl: 300, addrs: map[string][]string{"deb.test": {server}}}).serve(t, w)
	m := managerWith(t, t.TempDir(), nil)
	first := restricted(t, m, &egress.Policy{Rules: rulesOf(egress.Rules{Allow: exceptions(t, "deb.test")})})
	slot := first.(*network).slot
	_, _, err := ask(t, first.Path(), "udp", first.Nameservers()[0].String(), "deb.test", dnsmessage.TypeA)
	require.NoError(t, err)
	require.NoError(t, dial(t, first.Path(), "tcp", server+":7777"))
	refusedFast(t, first, pod+":7777")
	// No other slot is left.
	for len(m.slots) > 0 {
		select {
		case <-m.slots:
		default:
		}
	}
	require.NoError(t, first.Release())
	var next sandbox.Network
	for next == nil || next.(*network).slot != slot {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		next, err = m.Acquire(ctx, sandbox.NetworkEgress)
		require.NoError(t, err)
	}
	c, err := next.Contacts()
	require.NoError(t, err)
	require.Empty(t, c)
	require.Equal(t, []netip.Addr{netip.MustParseAddr(dnsServer)}, next.Nameservers())
	reached(t, next, pod+":7777")
	_, _, err = ask(t, next.Path(), "udp", dnsServer, "deb.test", dnsmessage.TypeA)
	require.NoError(t, err)
	sets, err := m.filter.nft.GetSets(m.filter.table)
	require.NoError(t, err)
	for _, s := range sets {
		require.NotEqual(t, namesOf(slot).hosts, s.Name)
	}
}

// BenchmarkStep is what a step's network costs the step itself: to take one, and to read
// what it did.
func BenchmarkStep(b *testing.B) {
	lists := &egress.Policy{Rules: rulesOf(egress.Rules{Allow: exceptions(b, "deb.test:80", "*.example.org", "198.51.100.0/24")})}
	for name, p := range map[string]*egress.Policy{"open": nil, "restricted": lists} {
		b.Run(name, func(b *testing.B) {
			m := managerWith(b, b.TempDir(), nil)
			require.NoError(b, acquire(b, m, sandbox.NetworkEgress).Release())
			for b.Loop() {
				b.StopTimer()
				n := acquire(b, m, sandbox.NetworkEgress)
				b.StartTimer()
				if p != nil {
					require.NoError(b, n.Restrict(p))
				}
				_, err := n.Contacts()
				require.NoError(b, err)
				b.StopTimer()
				require.NoError(b, n.Release())
				b.StartTimer()
			}
		})
	}
}
