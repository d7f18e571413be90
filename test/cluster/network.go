package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	maxNodes    = 8
	maxClusters = 32

	bridge     = "br0"    // on the control plane: all machines and the caller
	uplink     = "eth0"   // a node's end of its line to the bridge
	linkPrefix = "kiln-"  // of the caller's end, before the cluster's identity
	callerLine = "caller" // the other end, on the bridge
)

// addresses are the networks of one cluster, by its number below maxClusters.
type addresses struct{ number byte }

// machines is the network of machines: the control plane is .1, node i (counted
// from 0) .11+i, the caller .254.
func (a addresses) machines() netip.Prefix { return prefix(213, a.number, 24) }

// services is the network of Services; .1 is the API server.
func (a addresses) services() netip.Prefix { return prefix(214, a.number, 24) }

// pods is the network of all Pods.
func (a addresses) pods() netip.Prefix { return prefix(215, a.number*maxNodes, 21) }

// podsOf is the network of the Pods of node i.
func (a addresses) podsOf(i int) netip.Prefix {
	return prefix(215, a.number*maxNodes+byte(i), 24)
}

func (a addresses) control() netip.Addr    { return host(a.machines(), 1) }
func (a addresses) node(i int) netip.Addr  { return host(a.machines(), byte(11+i)) }
func (a addresses) caller() netip.Addr     { return host(a.machines(), 254) }
func (a addresses) apiService() netip.Addr { return host(a.services(), 1) }

func prefix(second, third byte, bits int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, second, third, 0}), bits)
}

func host(p netip.Prefix, n byte) netip.Addr {
	b := p.Addr().As4()
	b[3] = n
	return netip.AddrFrom4(b)
}

// linkName is the name of the caller's end of the line to the cluster.
func linkName(dir string) string { return linkPrefix + identity(dir) }

// reserve chooses networks that overlap no route of the caller, and makes the
// caller's line to the control plane. pid is the process that holds it.
func reserve(ctx context.Context, dir string, pid int) (addresses, error) {
	// Two clusters that start at once must not choose the same. An abstract
	// socket is a lock of exactly the caller's network namespace.
	var mutex net.Listener
	for {
		var err error
		if mutex, err = net.Listen("unix", "@kiln-cluster-networks"); err == nil {
			break
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return addresses{}, fmt.Errorf("reserve networks: %w", err)
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return addresses{}, fmt.Errorf("reserve networks: %w", err)
		}
	}
	defer mutex.Close()

	routes, err := settled(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, 0)
	})
	if err != nil {
		return addresses{}, fmt.Errorf("list routes: %w", err)
	}
	a, err := choose(routes)
	if err != nil {
		return a, err
	}
	if err := connect(nil, linkName(dir), callerLine, pid); err != nil {
		return a, err
	}
	h, err := netlink.NewHandle()
	if err != nil {
		return a, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	if err := configure(h, linkName(dir), netip.PrefixFrom(a.caller(), a.machines().Bits())); err != nil {
		return a, err
	}
	return a, errors.Join(
		route(h, a.pods(), a.control()),
		route(h, a.services(), a.control()))
}

// settled calls a listing of the kernel again as long as it is disturbed by a
// change.
func settled[T any](list func() ([]T, error)) ([]T, error) {
	for range 100 {
		if l, err := list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return l, err
		}
	}
	return nil, netlink.ErrDumpInterrupted
}

// choose finds the first number whose networks overlap none of the routes; a
// default route counts for nothing.
func choose(routes []netlink.Route) (addresses, error) {
	var taken []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		if addr, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok && ones > 0 {
			taken = append(taken, netip.PrefixFrom(addr, ones))
		}
	}
next:
	for n := range maxClusters {
		a := addresses{byte(n)}
		for _, t := range taken {
			if t.Overlaps(a.machines()) || t.Overlaps(a.services()) || t.Overlaps(a.pods()) {
				continue next
			}
		}
		return a, nil
	}
	return addresses{}, errors.New("reserve networks: 10.213.0.0/16, 10.214.0.0/16 and 10.215.0.0/16 are all in use")
}

// wire connects the machines. c.machines are complete.
func (c *Cluster) wire(a addresses) error {
	control, err := c.Control().netlink()
	if err != nil {
		return err
	}
	defer control.Close()
	if err := control.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	if err := configure(control, "lo", netip.Prefix{}); err != nil {
		return err
	}
	if err := configure(control, bridge, netip.PrefixFrom(a.control(), a.machines().Bits())); err != nil {
		return err
	}
	for _, n := range c.Nodes() {
		if err := connect(control, n.name, uplink, n.PID()); err != nil {
			return err
		}
	}
	for _, line := range append([]string{callerLine}, c.nodeNames()...) {
		if err := attach(control, line); err != nil {
			return err
		}
	}
	// The API server reaches Pods, and Services by the proxy of the first node.
	if err := c.routePods(control, a, -1); err != nil {
		return err
	}
	if err := route(control, a.services(), a.node(0)); err != nil {
		return err
	}
	for i := range c.Nodes() {
		if err := c.wireNode(a, i); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) wireNode(a addresses, i int) error {
	h, err := c.Nodes()[i].netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := configure(h, "lo", netip.Prefix{}); err != nil {
		return err
	}
	if err := configure(h, uplink, netip.PrefixFrom(a.node(i), a.machines().Bits())); err != nil {
		return err
	}
	return errors.Join(
		route(h, netip.PrefixFrom(netip.IPv4Unspecified(), 0), a.control()),
		c.routePods(h, a, i))
}

// routePods adds the routes to the Pods of every node but one.
func (c *Cluster) routePods(h *netlink.Handle, a addresses, except int) error {
	for i := range c.Nodes() {
		if i == except {
			continue
		}
		if err := route(h, a.podsOf(i), a.node(i)); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) nodeNames() []string {
	var names []string
	for _, n := range c.Nodes() {
		names = append(names, n.name)
	}
	return names
}

// netlink returns a handle in the machine's network namespace.
func (m *Machine) netlink() (*netlink.Handle, error) {
	ns, err := netns.GetFromPid(m.PID())
	if err != nil {
		return nil, fmt.Errorf("open network namespace of %s: %w", m.name, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil, fmt.Errorf("open netlink of %s: %w", m.name, err)
	}
	return h, nil
}

// connect adds a virtual line from the handle's namespace (nil for the caller's)
// to that of a process.
func connect(h *netlink.Handle, name, peer string, pid int) error {
	if h == nil {
		h = new(netlink.Handle)
	}
	line := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: name},
		PeerName:      peer,
		PeerNamespace: netlink.NsPid(pid),
	}
	if err := h.LinkAdd(line); err != nil {
		return fmt.Errorf("add network device %s: %w", name, err)
	}
	return nil
}

// configure gives a device an address, if one is given, and switches it on.
func configure(h *netlink.Handle, name string, address netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find network device %s: %w", name, err)
	}
	if address.IsValid() {
		if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(address)}); err != nil {
			return fmt.Errorf("add address %s to %s: %w", address, name, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("switch %s on: %w", name, err)
	}
	return nil
}

// attach makes a device a port of the bridge.
func attach(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find network device %s: %w", name, err)
	}
	master, err := h.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge: %w", err)
	}
	if err := h.LinkSetMaster(link, master); err != nil {
		return fmt.Errorf("attach %s to bridge: %w", name, err)
	}
	return configure(h, name, netip.Prefix{})
}

func route(h *netlink.Handle, to netip.Prefix, via netip.Addr) error {
	if err := h.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("add route to %s: %w", to, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// removeLink removes the caller's line to a cluster, if it is there. The devices
// of machines end with their namespaces.
func removeLink(ctx context.Context, dir string) error {
	for {
		link, err := netlink.LinkByName(linkName(dir))
		if _, ok := errors.AsType[netlink.LinkNotFoundError](err); ok {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find network device of cluster: %w", err)
		}
		// The kernel removes it too, when the control plane's namespace is gone.
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove network device of cluster: %w", err)
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return fmt.Errorf("remove network device of cluster: %w", err)
		}
	}
}
