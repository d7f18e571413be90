// Package netnstest has what tests of step networks need: a network namespace that plays
// the node, and behind it one that plays the world, with servers and names.
package netnstest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/netns"
)

// Addresses of the world. Each but NameServer has a server of TCP on port 80 that says
// "hello from" and its address.
const (
	Allowed    = "203.0.113.2"
	Other      = "203.0.113.3"
	NameServer = "203.0.113.53"
	Metadata   = "169.254.169.254"
	Pod        = "10.244.3.9"
	// Node is the node's own, with such a server too.
	Node = "203.0.113.1"
)

// Names are what NameServer knows.
var Names = map[string][]string{
	"allowed.test": {Allowed}, "a.sub.test": {Other}, "other.test": {Other}, "rebind.test": {Metadata, Pod, Node, "127.0.0.1"},
}

const nodeEnv = "KILN_TEST_NETNS_NODE"

// InNode tells whether the test runs in a namespace that plays the node. If not, it has run
// the test again in a process that does, and there is nothing left to do.
func InNode(t *testing.T) bool {
	t.Helper()
	if os.Getenv(nodeEnv) != "" {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=100s")
	cmd.Env = append(os.Environ(), nodeEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), "--- PASS: "+t.Name())
	return false
}

// World makes the world behind the node, and servers on the node itself. They last as
// long as the test.
func World(t *testing.T) {
	t.Helper()
	up(t, "lo")
	var uplink netlink.Link
	ns, err := netns.Isolated(func() error { return nil })
	require.NoError(t, err)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "w0"
	require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "w1", PeerNamespace: netlink.NsFd(ns.Fd())}))
	uplink, err = netlink.LinkByName("w0")
	require.NoError(t, err)
	require.NoError(t, netlink.AddrAdd(uplink, address(Node)))
	up(t, "w0")
	require.NoError(t, netlink.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: net.ParseIP(Allowed)}))
	require.NoError(t, inside(int(ns.Fd()), func() error {
		l, err := netlink.LinkByName("w1")
		if err != nil {
			return err
		}
		for _, a := range []string{Allowed, Other, NameServer, Metadata, Pod} {
			if err := netlink.AddrAdd(l, address(a)); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		for _, a := range []string{Allowed, Other, Metadata, Pod} {
			greet(t, a)
		}
		return serveNames(t)
	}))
	greet(t, Node)
	t.Cleanup(func() { ns.Close() })
}

func address(a string) *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(a).To4(), Mask: net.CIDRMask(24, 32)}}
}

func up(t *testing.T, name string) {
	l, err := netlink.LinkByName(name)
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetUp(l))
}

// inside runs fn on a thread in a namespace.
func inside(ns int, fn func() error) error {
	done := make(chan error)
	go func() {
		// The thread is locked for ever: it ends with this goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	return <-done
}

func greet(t *testing.T, a string) {
	l, err := net.Listen("tcp4", a+":80")
	require.NoError(t, err)
	var serving sync.WaitGroup
	t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "hello from %s\n", a)
			c.Close()
		}
	})
}

func serveNames(t *testing.T) error {
	u, err := net.ListenPacket("udp4", NameServer+":53")
	if err != nil {
		return err
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { u.Close(); serving.Wait() })
	serving.Go(func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			if out, err := answer(buf[:n]); err == nil {
				_, _ = u.WriteTo(out, from)
			}
		}
	})
	return nil
}

func answer(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	if len(m.Questions) != 1 {
		return nil, errors.New("not one question")
	}
	q := m.Questions[0]
	m.Response, m.Additionals = true, nil
	addrs, ok := Names[strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))]
	if !ok {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addrs {
		if q.Type == dnsmessage.TypeA {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 300}, Body: &dnsmessage.AResource{A: netip.MustParseAddr(a).As4()},
			})
		}
	}
	return m.Pack()
}

// Networks are those of the node, whose steps may reach what p says.
func Networks(t *testing.T, p *egress.Policy) *netns.Manager {
	t.Helper()
	m, err := netns.New(t.Context(), netns.Config{StateDir: t.TempDir(), Nameservers: []netip.Addr{netip.MustParseAddr(NameServer)}, Policy: p})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// Allow is a policy that denies Pods, and with a list all that is not in it.
func Allow(t *testing.T, list ...string) *egress.Policy {
	t.Helper()
	p := &egress.Policy{Deny: []egress.Range{{Prefix: netip.MustParsePrefix("10.244.0.0/16"), What: "a Pod"}}}
	if len(list) > 0 {
		allow, err := egress.ParseExceptions(list)
		require.NoError(t, err)
		p.Rules = func() []egress.Rules { return []egress.Rules{{Name: "test", Allow: allow}} }
	}
	return p
}

// Try is a script for busybox that prints "yes" or "no" and the destination for each of
// some destinations, by whether a server there says hello. NameServer may be in them: it
// is asked for other.test.
func Try(destinations ...string) string {
	var s strings.Builder
	s.WriteString("cat /etc/resolv.conf\n")
	for _, d := range destinations {
		what := "echo | nc -w 3 '" + d + "' 80 2>/dev/null | grep -q 'hello from'"
		if d == NameServer {
			what = "nslookup -type=a other.test " + d + " 2>/dev/null | grep -q " + Other
		}
		fmt.Fprintf(&s, "if %s; then echo 'yes %s'; else echo 'no %s'; fi\n", what, d, d)
	}
	return s.String()
}

// Cases are policies for a step, what it tries, and what comes of it.
var Cases = []struct {
	Name string
	// Allow is the step's list; nil: it is not restricted.
	Allow []string
	// Yes and No are destinations that it reaches and that it does not.
	Yes, No []string
}{
	{
		Name: "what everyone may",
		Yes:  []string{Allowed, Other, "allowed.test", NameServer},
		No: []string{
			Metadata, Pod, Node, "rebind.test",
			// Other ways to write the address of the metadata service.
			"2852039166", "0251.0376.0251.0376", "0xa9fea9fe", "169.254.43518", "::ffff:169.254.169.254",
		},
	},
	{
		// The same listeners are there when a policy names them.
		Name: "what a policy names", Allow: []string{"0.0.0.0/0", Metadata, "10.244.3.0/24", Node + ":80"},
		Yes: []string{Allowed, Metadata, Pod, Node, "2852039166", "0251.0376.0251.0376"},
	},
	{Name: "addresses", Allow: []string{Allowed + ":80"}, Yes: []string{Allowed}, No: []string{Other, "other.test", "allowed.test", Metadata}},
	{Name: "ports", Allow: []string{Allowed + ":81"}, No: []string{Allowed}},
	{
		Name: "names", Allow: []string{"allowed.test:80", "*.sub.test", "rebind.test"},
		Yes: []string{"allowed.test", Allowed, "a.sub.test", "A.SUB.test"}, No: []string{"other.test", "sub.test", "rebind.test", Metadata, Pod, Node, NameServer},
	},
}
