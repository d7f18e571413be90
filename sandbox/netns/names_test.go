package netns

import (
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables/binaryutil"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// zone is a name server's data, which a test may change.
type zone struct {
	mu  sync.Mutex
	ttl uint32
	// addrs by name; an alias is in aliases.
	addrs   map[string][]string
	aliases map[string]string
	asked   []string
	// short has answers by UDP cut.
	short bool
}

func (z *zone) answer(query []byte, udp bool) []byte {
	z.mu.Lock()
	defer z.mu.Unlock()
	head, q, err := parseQuery(query)
	if err != nil {
		return nil
	}
	name := canonicalName(q.Name.String())
	z.asked = append(z.asked, name)
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: head.ID, Response: true}, Questions: []dnsmessage.Question{q}}
	header := func(name string) dnsmessage.ResourceHeader {
		return dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name + "."), Class: dnsmessage.ClassINET, TTL: z.ttl}
	}
	if to, ok := z.aliases[name]; ok {
		m.Answers = append(m.Answers, dnsmessage.Resource{Header: header(name), Body: &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(to + ".")}})
		name = to
	}
	addrs, ok := z.addrs[name]
	if !ok {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addrs {
		m.Answers = append(m.Answers, dnsmessage.Resource{Header: header(name), Body: &dnsmessage.AResource{A: netip.MustParseAddr(a).As4()}})
	}
	if udp && z.short {
		m.Truncated, m.Answers = true, nil
	}
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}

// serve serves the zone in the namespace at w.
func (z *zone) serve(t testing.TB, w string) {
	t.Helper()
	require.NoError(t, in(t, w, func() error {
		u, err := net.ListenPacket("udp4", dnsServer+":53")
		if err != nil {
			return err
		}
		l, err := net.Listen("tcp4", dnsServer+":53")
		if err != nil {
			return err
		}
		var serving sync.WaitGroup
		t.Cleanup(func() { u.Close(); l.Close(); serving.Wait() })
		serving.Go(func() {
			buf := make([]byte, 1500)
			for {
				n, from, err := u.ReadFrom(buf)
				if err != nil {
					return
				}
				u.WriteTo(z.answer(buf[:n], true), from)
			}
		})
		serving.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				if q, err := readMessage(c); err == nil {
					writeMessage(c, z.answer(q, false))
				}
				c.Close()
			}
		})
		return nil
	}))
}

// ask asks server from the namespace at path.
func ask(t testing.TB, path, network, server, name string, kind dnsmessage.Type) (addrs []string, code dnsmessage.RCode, err error) {
	t.Helper()
	q := dnsmessage.Question{Name: dnsmessage.MustNewName(name + "."), Type: kind, Class: dnsmessage.ClassINET}
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 7, RecursionDesired: true}, Questions: []dnsmessage.Question{q}}
	query, err := m.Pack()
	require.NoError(t, err)
	var msg []byte
	err = in(t, path, func() error {
		c, err := net.DialTimeout(network, server+":53", time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(4 * time.Second))
		if network == "tcp" {
			if err := writeMessage(c, query); err != nil {
				return err
			}
			msg, err = readMessage(c)
			return err
		}
		if _, err := c.Write(query); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		n, err := c.Read(buf)
		msg = buf[:n]
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	found, code, _, err := parseAnswer(msg, q)
	for _, r := range found {
		addrs = append(addrs, r.addr.String())
	}
	return addrs, code, err
}

func TestNames(t *testing.T) {
	w := world(t, "7777", server, metadata, pod, "198.51.100.3", "198.51.100.4", dnsServer)
	z := &zone{ttl: 300, addrs: map[string][]string{
		"deb.test": {server}, "a.b.example.org": {"198.51.100.3"}, "example.org": {"198.51.100.3"}, "evil.test": {server},
		"rebind.test": {metadata, pod, "127.0.0.1", "198.51.100.1"}, "half.test": {metadata, "198.51.100.4"}, "cdn.test": {"198.51.100.4"},
	}, aliases: map[string]string{"www.test": "cdn.test"}}
	z.serve(t, w)
	m := managerWith(t, t.TempDir(), nil)
	p := &egress.Policy{Deny: cluster(t), Rules: rulesOf(egress.Rules{Allow: exceptions(t, "deb.test:7777", "*.example.org", "rebind.test", "half.test", "www.test", "gone.test")})}
	n := restricted(t, m, p)
	node := n.Nameservers()[0].String()
	lookup := func(network, name string) ([]string, dnsmessage.RCode) {
		addrs, code, err := ask(t, n.Path(), network, node, name, dnsmessage.TypeA)
		require.NoError(t, err, name)
		return addrs, code
	}

	refusedFast(t, n, server+":7777")
	addrs, code := lookup("udp", "DEB.test")
	require.Equal(t, []string{server}, addrs)
	require.Zero(t, code)
	reached(t, n, server+":7777")
	refusedFast(t, n, server+":7778") // the name is listed with a port

	refusedFast(t, n, "198.51.100.3:7777")
	addrs, _ = lookup("tcp", "a.b.example.org")
	require.Equal(t, []string{"198.51.100.3"}, addrs)
	reached(t, n, "198.51.100.3:7777")

	for _, name := range []string{"example.org", "evil.test", "xexample.org", "secret.evil.test"} {
		for _, network := range []string{"udp", "tcp"} {
			addrs, code = lookup(network, name)
			require.Empty(t, addrs, name)
			require.Equal(t, dnsmessage.RCodeRefused, code, name)
		}
	}
	z.mu.Lock()
	require.NotContains(t, z.asked, "secret.evil.test", "what is refused is asked of nobody")
	z.mu.Unlock()
	_, code = lookup("udp", "gone.test")
	require.Equal(t, dnsmessage.RCodeNameError, code)

	// An answer that points to where nobody may go is no answer.
	addrs, code = lookup("udp", "rebind.test")
	require.Empty(t, addrs)
	require.Equal(t, dnsmessage.RCodeRefused, code)
	addrs, _ = lookup("udp", "half.test")
	require.Equal(t, []string{"198.51.100.4"}, addrs)
	reached(t, n, "198.51.100.4:7777")
	for _, a := range []string{metadata, pod, "198.51.100.1"} {
		refusedFast(t, n, a+":7777")
	}

	// Other names on the way, other kinds of records, answers that are long.
	z.mu.Lock()
	z.short = true
	z.mu.Unlock()
	addrs, _ = lookup("udp", "www.test")
	require.Equal(t, []string{"198.51.100.4"}, addrs)
	for _, kind := range []dnsmessage.Type{dnsmessage.TypeAAAA, dnsmessage.TypeTXT, 65} {
		addrs, code, err := ask(t, n.Path(), "udp", node, "deb.test", kind)
		require.NoError(t, err)
		require.Empty(t, addrs)
		require.Zero(t, code)
	}

	// Other resolvers, also where the addresses are allowed.
	_, _, err := ask(t, n.Path(), "udp", dnsServer, "deb.test", dnsmessage.TypeA)
	require.Error(t, err)
	wide := restricted(t, m, &egress.Policy{Rules: rulesOf(egress.Rules{Allow: exceptions(t, "198.51.100.0/24")})})
	reached(t, wide, server+":7777")
	for _, network := range []string{"udp", "tcp"} {
		_, _, err = ask(t, wide.Path(), network, dnsServer, "deb.test", dnsmessage.TypeA)
		require.Error(t, err)
	}
	refusedFast(t, wide, dnsServer+":853")
	_, code, err = ask(t, wide.Path(), "udp", wide.Nameservers()[0].String(), "deb.test", dnsmessage.TypeA)
	require.NoError(t, err)
	require.Equal(t, dnsmessage.RCodeRefused, code, "no name is listed")
	// Without a list the node's resolver answers everything.
	free := acquire(t, m, sandbox.NetworkEgress)
	addrs, _, err = ask(t, free.Path(), "tcp", dnsServer, "rebind.test", dnsmessage.TypeA)
	require.NoError(t, err)
	require.Len(t, addrs, 4)
	refusedFast(t, free, metadata+":7777")
	// Only who asked may connect.
	other := restricted(t, m, p)
	refusedFast(t, other, server+":7777")

	c, err := n.Contacts()
	require.NoError(t, err)
	got := map[string]int64{}
	for _, l := range c.Refused.List {
		if l.Protocol == "dns" {
			require.False(t, l.Address.IsValid())
			got[l.Name] = l.Count
		}
	}
	require.Equal(t, map[string]int64{"example.org": 2, "evil.test": 2, "xexample.org": 2, "secret.evil.test": 2, "rebind.test": 1}, got)
	require.True(t, slices.ContainsFunc(c.Reached.List, func(c sandbox.Contact) bool {
		c.Count = 0
		return c == sandbox.Contact{Address: netip.MustParseAddr(server), Name: "deb.test", Protocol: "tcp", Port: 7777}
	}), c.Reached.List)
}

// A name's addresses may be reached for as long as its answer says; a connection that
// has begun goes on.
func TestNamesAreForgotten(t *testing.T) {
	w := world(t, "7777", server, dnsServer)
	z := &zone{addrs: map[string][]string{"deb.test": {server}}}
	z.serve(t, w)
	m := managerWith(t, t.TempDir(), nil)
	n := restricted(t, m, &egress.Policy{Rules: rulesOf(egress.Rules{Allow: exceptions(t, "deb.test")})})
	addrs, _, err := ask(t, n.Path(), "udp", n.Nameservers()[0].String(), "deb.test", dnsmessage.TypeA)
	require.NoError(t, err)
	require.Equal(t, []string{server}, addrs)
	var c net.Conn
	require.NoError(t, in(t, n.Path(), func() (err error) {
		c, err = net.Dial("tcp", server+":7777")
		return err
	}))
	defer c.Close()
	time.Sleep(minLifetime + time.Second)
	require.ErrorIs(t, dialOnce(t, n.Path(), "tcp", server+":7777"), syscall.ECONNREFUSED)
	_, err = c.Write([]byte("hello"))
	require.NoError(t, err)
	c.SetDeadline(time.Now().Add(time.Second))
	_, err = io.ReadFull(c, make([]byte, 5))
	require.NoError(t, err)
}

func FuzzQuery(f *testing.F) {
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 7}, Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("deb.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	q, err := m.Pack()
	require.NoError(f, err)
	f.Add(q)
	r := &resolver{policy: &egress.Policy{Narrow: exceptions(f, "1.2.3.4")}, names: map[netip.Addr]string{}, refused: map[string]int64{}}
	f.Fuzz(func(t *testing.T, msg []byte) {
		answer := r.answer(msg)
		if answer == nil {
			return
		}
		var p dnsmessage.Parser
		head, err := p.Start(answer)
		require.NoError(t, err)
		require.True(t, head.Response)
		require.Contains(t, []dnsmessage.RCode{dnsmessage.RCodeFormatError, dnsmessage.RCodeRefused}, head.RCode)
		require.Equal(t, binaryutil.BigEndian.Uint16(msg), head.ID)
	})
}

func FuzzAnswer(f *testing.F) {
	q := dnsmessage.Question{Name: dnsmessage.MustNewName("www.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	z := &zone{ttl: 9, addrs: map[string][]string{"cdn.test": {"1.2.3.4"}}, aliases: map[string]string{"www.test": "cdn.test"}}
	m := dnsmessage.Message{Questions: []dnsmessage.Question{q}}
	query, err := m.Pack()
	require.NoError(f, err)
	f.Add(z.answer(query, false))
	f.Fuzz(func(t *testing.T, msg []byte) {
		isAnswerTo(msg, 0, q)
		found, _, truncated, err := parseAnswer(msg, q)
		if err != nil || truncated {
			return
		}
		for _, r := range found {
			require.True(t, r.addr.Is4())
		}
	})
}
