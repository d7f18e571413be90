package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// newNamespace makes a network namespace with its loopback up, calls inside on a
// thread that is in it, and returns the file that holds it.
func newNamespace(inside func(ns *os.File) error) (*os.File, error) {
	type result struct {
		ns  *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		host, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- result{nil, fmt.Errorf("open own network namespace: %w", err)}
			return
		}
		ns, err := enterNew(inside)
		// A thread that cannot come back must never run other code: it stays
		// locked, and the runtime ends it with this goroutine.
		if back := unix.Setns(int(host.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		} else if err == nil {
			ns.Close()
			ns, err = nil, fmt.Errorf("return to own network namespace: %w", back)
		}
		host.Close()
		done <- result{ns, err}
	}()
	r := <-done
	return r.ns, r.err
}

func enterNew(inside func(ns *os.File) error) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("make network namespace: %w: kiln needs CAP_SYS_ADMIN", err)
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open new network namespace: %w", err)
	}
	if err := loopbackUp(); err != nil {
		ns.Close()
		return nil, err
	}
	if inside != nil {
		if err := inside(ns); err != nil {
			ns.Close()
			return nil, err
		}
	}
	return ns, nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	return nil
}

// newEgress makes a namespace with a device to the node in a slot of the claim.
// host is a netlink handle of the node's namespace, and inside one of the new one.
func newEgress(host *netlink.Handle, c *claim, slot int) (ns *os.File, inside *netlink.Handle, err error) {
	name := c.link(slot)
	node, step := c.ends(slot)
	defer func() {
		if err == nil {
			return
		}
		if inside != nil {
			inside.Close()
		}
		if ns != nil {
			ns.Close()
		}
		ns, inside, err = nil, nil, errors.Join(err, removeLink(host, name))
	}()

	ns, err = newNamespace(func(ns *os.File) (err error) {
		if inside, err = openInside(); err == nil {
			err = plug(host, inside, ns, name, c.group(), node, step)
		}
		return err
	})
	if err != nil {
		return ns, inside, err
	}
	// The node's end speaks no IPv6 and takes no packet with a foreign source.
	// IPv6 goes first, before the device comes up with an address.
	for _, s := range [][2]string{
		{"ipv6/conf/" + name + "/disable_ipv6", "1"},
		{"ipv4/conf/" + name + "/rp_filter", "1"},
		{"ipv4/conf/" + name + "/forwarding", "1"},
	} {
		if err := sysctl(s[0], s[1]); err != nil {
			return ns, inside, err
		}
	}
	link, err := host.LinkByName(name)
	if err != nil {
		return ns, inside, fmt.Errorf("find device %s: %w", name, err)
	}
	if err := host.AddrAdd(link, &netlink.Addr{IPNet: ipNet(node, stepBits)}); err != nil {
		return ns, inside, fmt.Errorf("give %s to device %s: %w", node, name, err)
	}
	if err := host.LinkSetUp(link); err != nil {
		return ns, inside, fmt.Errorf("bring device %s up: %w", name, err)
	}
	return ns, inside, nil
}

// openInside returns a netlink handle of the calling thread's namespace.
func openInside() (*netlink.Handle, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink in namespace: %w", err)
	}
	return h, nil
}

// plug runs on a thread inside ns. It makes the pair of devices and sets the
// step's end up.
func plug(host, in *netlink.Handle, ns *os.File, name string, group uint32, node, step netip.Addr) error {
	if err := sysctl("ipv6/conf/default/disable_ipv6", "1"); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	attrs.Group = group
	err := host.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())})
	if err != nil {
		return fmt.Errorf("add device %s: %w", name, err)
	}
	eth0, err := in.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0 in namespace: %w", err)
	}
	if err := in.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(step, stepBits)}); err != nil {
		return fmt.Errorf("give %s to eth0: %w", step, err)
	}
	if err := in.LinkSetUp(eth0); err != nil {
		return fmt.Errorf("bring eth0 up: %w", err)
	}
	route := &netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: node.AsSlice()}
	if err := in.RouteAdd(route); err != nil {
		return fmt.Errorf("add default route by %s: %w", node, err)
	}
	return nil
}

func removeLink(host *netlink.Handle, name string) error {
	link, err := host.LinkByName(name)
	if err == nil {
		err = host.LinkDel(link)
	}
	if err == nil || linkGone(err) {
		return nil
	}
	return fmt.Errorf("remove device %s: %w", name, err)
}

// sysctl writes a network setting of the calling thread's namespace. A kernel
// without IPv6 has none of its settings, and nothing to turn off.
func sysctl(key, value string) error {
	err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0)
	if errors.Is(err, os.ErrNotExist) {
		if _, none := os.Stat("/proc/sys/net/ipv6"); none != nil && key[:4] == "ipv6" {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("set net/%s: %w", key, err)
	}
	return nil
}
