package netns

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
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

var resolver = netip.MustParseAddr("198.51.100.53")

func newManager(t testing.TB, dir string) *Manager {
	t.Helper()
	m, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{resolver}})
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
		defer host.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		res := fn()
		if unix.Setns(int(host.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- res
	}()
	return <-done
}

// dial connects from the namespace at path, and expects an echo.
func dial(t testing.TB, path, proto, addr string) error {
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
	require.Equal(t, []netip.Addr{resolver}, out.Nameservers())
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

// A resolver on an address of the node is reachable on port 53, and nothing else
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
			links, err := netlink.LinkList()
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

type census struct {
	links, tables, fds, netns int
	forward                   string
}

func count(t testing.TB) census {
	t.Helper()
	links, err := netlink.LinkList()
	require.NoError(t, err)
	nft, err := nftables.New()
	require.NoError(t, err)
	tables, err := nft.ListTables()
	require.NoError(t, err)
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	forward, err := os.ReadFile(ipForward)
	require.NoError(t, err)
	spaces := map[string]bool{}
	tasks, err := os.ReadDir("/proc/self/task")
	require.NoError(t, err)
	for _, task := range tasks {
		if l, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil {
			spaces[l] = true
		}
	}
	for _, fd := range fds {
		if l, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(l, "net:") {
			spaces[l] = true
		}
	}
	return census{len(links), len(tables), len(fds), len(spaces), strings.TrimSpace(string(forward))}
}

func TestCloseLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	before := count(t)
	require.Equal(t, "0", before.forward)
	a, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{resolver}})
	require.NoError(t, err)
	b, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{resolver}})
	require.NoError(t, err)
	require.NotEqual(t, a.claim.prefix, b.claim.prefix)
	for range 5 {
		for _, m := range []*Manager{a, b} {
			require.NoError(t, acquire(t, m, sandbox.NetworkEgress).Release())
			require.NoError(t, acquire(t, m, sandbox.NetworkNone).Release())
		}
	}
	acquire(t, a, sandbox.NetworkEgress) // never released
	require.NoError(t, a.Close())
	require.NoError(t, a.Close())
	require.Equal(t, "1", count(t).forward, "another manager still forwards")
	_, err = a.Acquire(context.Background(), sandbox.NetworkNone)
	require.ErrorIs(t, err, ErrClosed)
	require.NoError(t, b.Close())
	require.Equal(t, before, count(t))
}

func TestAddressesRunOut(t *testing.T) {
	m := newManager(t, t.TempDir())
	first := acquire(t, m, sandbox.NetworkEgress)
	// Take all slots but those of the pool, without the price of their devices.
	for len(m.slots) > 0 {
		select {
		case <-m.slots:
		default:
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	var err error
	for err == nil {
		_, err = m.Acquire(ctx, sandbox.NetworkEgress)
	}
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, first.Release())
	ctx, cancel = context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err = m.Acquire(ctx, sandbox.NetworkEgress)
	require.NoError(t, err)
}

// victim makes namespaces and waits to be killed.
func victim(dir string) {
	m, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{resolver}})
	if err == nil {
		_, err = m.Acquire(context.Background(), sandbox.NetworkEgress)
	}
	fmt.Println(err)
	time.Sleep(time.Minute)
	os.Exit(1)
}

func TestRecoverAfterKill(t *testing.T) {
	dir := t.TempDir()
	before := count(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asVictim+"="+dir)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "<nil>\n", line)
	during := count(t)
	require.Greater(t, during.links, before.links)
	require.NoError(t, cmd.Process.Kill())
	cmd.Wait()
	require.Equal(t, before.tables+1, count(t).tables)

	m, err := New(context.Background(), Config{StateDir: dir})
	require.NoError(t, err)
	require.Equal(t, "10.63.0.0/22", m.claim.prefix.String(), "the subnet is free again")
	after := count(t)
	require.Equal(t, before.links, after.links)
	require.Equal(t, before.tables, after.tables)
	require.NoError(t, m.Close())
	require.Equal(t, "1", count(t).forward)

	// The one that uses forwarding next puts it back.
	m = newManager(t, dir)
	acquire(t, m, sandbox.NetworkEgress)
	require.NoError(t, m.Close())
	require.Equal(t, before, count(t))
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
