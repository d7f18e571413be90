package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

const inNode, asVictim = "KILN_NETNS_TEST_NODE", "KILN_NETNS_TEST_VICTIM"

// TestMain runs the tests in a network namespace of their own, which plays the
// node: they change forwarding and packet filters.
func TestMain(m *testing.M) {
	if dir := os.Getenv(asVictim); dir != "" {
		victim(dir)
	}
	if os.Getenv(inNode) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), inNode+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // Pdeathsig is about the thread
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if err := loopbackUp(); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

var nodeResolver = netip.MustParseAddr("198.51.100.53")

func newManager(t testing.TB, dir string) *Manager {
	t.Helper()
	m, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{nodeResolver}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func acquire(t testing.TB, m *Manager, mode sandbox.NetworkMode) sandbox.Network {
	t.Helper()
	n, err := m.Acquire(context.Background(), mode)
	require.NoError(t, err)
	return n
}

// in runs fn on a thread in the namespace at path.
func in(t testing.TB, path string, fn func() error) error {
	t.Helper()
	ns, err := os.Open(path)
	require.NoError(t, err)
	defer ns.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		host, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- err
			return
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			host.Close()
			done <- err
			return
		}
		res := fn()
		if unix.Setns(int(host.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		host.Close()
		done <- res
	}()
	return <-done
}

// dial connects from the namespace at path, and expects an echo. A datagram may
// get lost once, while the kernel brings a device up.
func dial(t testing.TB, path, proto, addr string) error {
	if dialOnce(t, path, proto, addr) == nil {
		return nil
	}
	return dialOnce(t, path, proto, addr)
}

func dialOnce(t testing.TB, path, proto, addr string) error {
	return in(t, path, func() error {
		c, err := net.DialTimeout(proto, addr, 700*time.Millisecond)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(700 * time.Millisecond))
		if _, err := c.Write([]byte("hello")); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 5))
		return err
	})
}

// echo serves on addr, on both protocols, in the namespace of the caller.
func echo(t testing.TB, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	require.NoError(t, err)
	u, err := net.ListenPacket("udp", addr)
	require.NoError(t, err)
	var serving sync.WaitGroup
	t.Cleanup(func() { l.Close(); u.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { io.Copy(c, c); c.Close() })
		}
	})
	serving.Go(func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			u.WriteTo(buf[:n], from)
		}
	})
}

// world is a namespace behind the node, without a route to steps: it can answer
// only to the node's own address. addrs are served on the given port.
func world(t testing.TB, port string, addrs ...string) (path string) {
	t.Helper()
	ns, err := newNamespace(nil)
	require.NoError(t, err)
	t.Cleanup(func() { ns.Close() })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "uplink"
	require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "uplink", PeerNamespace: netlink.NsFd(ns.Fd())}))
	l, err := netlink.LinkByName("uplink")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, netlink.LinkDel(l)) })
	require.NoError(t, netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.MustParseAddr("198.51.100.1"), 24)}))
	require.NoError(t, netlink.LinkSetUp(l))
	require.NoError(t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IPv4(198, 51, 100, 2)}))
	path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())
	require.NoError(t, in(t, path, func() error {
		l, err := netlink.LinkByName("uplink")
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.MustParseAddr(a), 24)}); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		for _, a := range addrs {
			echo(t, net.JoinHostPort(a, port))
		}
		return nil
	}))
	return path
}

func TestReach(t *testing.T) {
	w := world(t, "7777", "198.51.100.2", "169.254.169.254")
	m := newManager(t, t.TempDir())
	none := acquire(t, m, sandbox.NetworkNone)
	out := acquire(t, m, sandbox.NetworkEgress)
	other := acquire(t, m, sandbox.NetworkEgress)
	node, _ := m.claim.ends(out.(*network).slot)
	_, otherAddr := m.claim.ends(other.(*network).slot)

	require.NoError(t, dial(t, out.Path(), "tcp", "198.51.100.2:7777"))
	require.NoError(t, dial(t, out.Path(), "udp", "198.51.100.2:7777"))
	require.Error(t, dial(t, none.Path(), "tcp", "198.51.100.2:7777"))
	require.Equal(t, []netip.Addr{nodeResolver}, out.Nameservers())
	require.Empty(t, none.Nameservers())

	t.Run("not the node", func(t *testing.T) {
		echo(t, "0.0.0.0:7778")
		require.NoError(t, in(t, other.Path(), func() error { echo(t, "0.0.0.0:7779"); return nil }))
		for _, a := range []string{node.String() + ":7778", "198.51.100.1:7778", "127.0.0.1:7778", otherAddr.String() + ":7779", "169.254.169.254:7777"} {
			require.Error(t, dial(t, out.Path(), "tcp", a), a)
			require.Error(t, dial(t, out.Path(), "udp", a), a)
			require.Error(t, dial(t, none.Path(), "tcp", a), a)
		}
		// The listeners do answer, where they may be asked.
		require.NoError(t, dial(t, "/proc/self/ns/net", "tcp", node.String()+":7778"))
		require.NoError(t, dial(t, other.Path(), "tcp", "127.0.0.1:7779"))
	})
	t.Run("not the step", func(t *testing.T) {
		require.Error(t, dial(t, "/proc/self/ns/net", "tcp", otherAddr.String()+":7779"))
		require.NoError(t, in(t, w, func() error {
			return netlink.RouteAdd(&netlink.Route{Dst: ipNet(m.claim.prefix.Addr(), claimBits), Gw: net.IPv4(198, 51, 100, 1)})
		}))
		require.NoError(t, in(t, other.Path(), func() error { echo(t, "0.0.0.0:7780"); return nil }))
		require.Error(t, dial(t, w, "tcp", otherAddr.String()+":7780"))
	})
	t.Run("no forged source", func(t *testing.T) {
		require.Error(t, in(t, out.Path(), func() error {
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			forged := netip.MustParseAddr("203.0.113.9")
			if err := netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(forged, 32)}); err != nil {
				return nil
			}
			d := net.Dialer{Timeout: 700 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: forged.AsSlice()}}
			c, err := d.Dial("tcp", "198.51.100.2:7777")
			if err == nil {
				c.Close()
			}
			return err
		}))
	})
	require.NoError(t, other.Release())
	require.NoError(t, out.Release())
	require.NoError(t, out.Release())
	require.NoError(t, none.Release())
}

// A nodeResolver on an address of the node is reachable on port 53, and nothing else
// there is.
func TestResolverOnNode(t *testing.T) {
	world(t, "7777", "198.51.100.2")
	m, err := New(context.Background(), Config{StateDir: t.TempDir(), Nameservers: []netip.Addr{netip.MustParseAddr("198.51.100.1")}})
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	echo(t, "198.51.100.1:53")
	echo(t, "198.51.100.1:54")
	n := acquire(t, m, sandbox.NetworkEgress)
	for _, proto := range []string{"udp", "tcp"} {
		require.NoError(t, dial(t, n.Path(), proto, "198.51.100.1:53"))
		require.Error(t, dial(t, n.Path(), proto, "198.51.100.1:54"))
	}
}

func TestContents(t *testing.T) {
	m := newManager(t, t.TempDir())
	for _, mode := range []sandbox.NetworkMode{sandbox.NetworkNone, sandbox.NetworkEgress} {
		n := acquire(t, m, mode)
		require.NoError(t, in(t, n.Path(), func() error {
			links, err := whole(netlink.LinkList)
			require.NoError(t, err)
			names := map[string]net.Flags{}
			for _, l := range links {
				if l.Attrs().Flags&net.FlagUp != 0 {
					names[l.Attrs().Name] = l.Attrs().Flags
				}
			}
			require.Contains(t, names, "lo")
			if mode == sandbox.NetworkNone {
				require.Len(t, names, 1)
				return nil
			}
			require.Len(t, names, 2)
			eth0, err := netlink.LinkByName("eth0")
			require.NoError(t, err)
			addrs, err := netlink.AddrList(eth0, netlink.FAMILY_ALL)
			require.NoError(t, err)
			require.Len(t, addrs, 1)
			return nil
		}))
	}
	_, err := m.Acquire(context.Background(), "host")
	require.ErrorContains(t, err, "network mode")
}

func TestUsableNameservers(t *testing.T) {
	var all []netip.Addr
	for _, s := range []string{"127.0.0.53", "10.0.0.1", "fd00::1", "::ffff:10.0.0.1", "0.0.0.0", "10.0.0.2"} {
		all = append(all, netip.MustParseAddr(s))
	}
	require.Equal(t, []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}, usable(all))

	m, err := New(context.Background(), Config{StateDir: t.TempDir(), Nameservers: all[:1]})
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	_, err = m.Acquire(context.Background(), sandbox.NetworkEgress)
	require.ErrorContains(t, err, "no nameserver")
}

func BenchmarkAcquire(b *testing.B) {
	for _, mode := range []sandbox.NetworkMode{sandbox.NetworkNone, sandbox.NetworkEgress} {
		b.Run(string(mode), func(b *testing.B) {
			m := newManager(b, b.TempDir())
			acquire(b, m, mode)
			for b.Loop() {
				n := acquire(b, m, mode)
				require.NoError(b, n.Release())
			}
		})
	}
}

// TestUnused tells networks apart that a packet was in.
func TestUnused(t *testing.T) {
	world(t, "7777", "198.51.100.2")
	m := newManager(t, t.TempDir())
	tests := []struct {
		name string
		use  func(path string)
	}{
		{"nothing", nil},
		{"a socket", func(path string) {
			require.NoError(t, in(t, path, func() error {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					return err
				}
				c, err := net.Dial("udp", "198.51.100.2:7777")
				if err != nil {
					return err
				}
				return errors.Join(l.Close(), c.Close())
			}))
		}},
		{"the world", func(path string) { require.NoError(t, dial(t, path, "tcp", "198.51.100.2:7777")) }},
		{"what is refused", func(path string) { require.Error(t, dial(t, path, "udp", "169.254.169.254:7777")) }},
		{"an address that nobody has", func(path string) { require.Error(t, dial(t, path, "udp", "10.63.255.254:7777")) }},
		{"the loopback device", func(path string) { require.Error(t, dial(t, path, "tcp", "127.0.0.1:7777")) }},
	}
	for _, mode := range []sandbox.NetworkMode{sandbox.NetworkEgress, sandbox.NetworkNone} {
		for i, tt := range tests {
			if mode == sandbox.NetworkNone && i > 0 && tt.name != "the loopback device" {
				continue
			}
			n := acquire(t, m, mode)
			unused, err := n.Unused()
			require.NoError(t, err)
			require.True(t, unused, "%s: new", mode)
			if tt.use != nil {
				tt.use(n.Path())
			}
			time.Sleep(50 * time.Millisecond) // for what the kernel sends of its own
			unused, err = n.Unused()
			require.NoError(t, err)
			require.Equal(t, i < 2, unused, "%s: %s", mode, tt.name)
		}
	}
}
