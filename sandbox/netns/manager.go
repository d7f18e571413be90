package netns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// DefaultStateDir holds the locks of the subnets in use.
const DefaultStateDir = "/run/kiln/subnets"

// DefaultSubnet is what steps get their addresses from.
var DefaultSubnet = netip.MustParsePrefix("10.63.0.0/16")

// ErrClosed is returned by Acquire after Close.
var ErrClosed = errors.New("network manager is closed")

// ahead is how many namespaces of a used mode are kept ready.
const ahead = 2

// Config configures New. The zero value is a good one.
type Config struct {
	// StateDir must be the same for all processes that share a subnet on a node.
	// Empty means DefaultStateDir.
	StateDir string
	// Subnet is divided among the node's kiln processes. It is IPv4 and at least
	// a /22. The zero value means DefaultSubnet.
	Subnet netip.Prefix
	// Nameservers are given to steps in place of the node's.
	Nameservers []netip.Addr
	// Policy says what steps may reach that are not restricted further; nil: what the
	// zero Policy says.
	Policy *egress.Policy
}

// Manager makes and keeps network namespaces. It implements sandbox.Networks.
type Manager struct {
	cfg   Config
	claim *claim
	host  *netlink.Handle
	slots chan int      // free slots of the claim
	wake  chan struct{} // the keeper has something to do
	stop  chan struct{}
	done  chan struct{} // the keeper has ended

	egressMu    sync.Mutex // guards the set-up of the node
	egressReady bool
	nameservers []netip.Addr
	// upstream are the resolvers that those of steps ask. filter judges what steps send.
	upstream []netip.AddrPort
	filter   *filter

	mu       sync.Mutex
	closed   bool
	failed   error // what the keeper could not release
	making   sync.WaitGroup
	ready    map[sandbox.NetworkMode][]*network
	used     map[sandbox.NetworkMode]bool
	open     map[*network]struct{} // acquired, not released
	released []*network
}

var _ sandbox.Networks = (*Manager)(nil)

// New claims a subnet, removes what killed processes left and starts the keeper.
// The node is not changed before the first egress namespace.
func New(ctx context.Context, cfg Config) (*Manager, error) {
	if cfg.StateDir == "" {
		cfg.StateDir = DefaultStateDir
	}
	if !cfg.Subnet.IsValid() {
		cfg.Subnet = DefaultSubnet
	}
	cfg.Subnet = cfg.Subnet.Masked()
	if !cfg.Subnet.Addr().Is4() || cfg.Subnet.Bits() > claimBits {
		return nil, fmt.Errorf("subnet %s: give an IPv4 subnet of /%d or larger", cfg.Subnet, claimBits)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory of networks: %w", err)
	}
	if err := sweep(cfg.StateDir, cfg.Subnet); err != nil {
		return nil, err
	}
	c, err := takeClaim(cfg.StateDir, cfg.Subnet)
	if err != nil {
		return nil, err
	}
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		c.lock.Close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	m := &Manager{
		cfg: cfg, claim: c, host: host,
		slots: make(chan int, slots), wake: make(chan struct{}, 1),
		stop: make(chan struct{}), done: make(chan struct{}),
		ready: map[sandbox.NetworkMode][]*network{},
		used:  map[sandbox.NetworkMode]bool{},
		open:  map[*network]struct{}{},
	}
	for s := range slots {
		m.slots <- s
	}
	go m.keep()
	return m, nil
}

func (m *Manager) nudge() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Acquire implements sandbox.Networks. When all addresses are in use it waits
// for a step to end.
func (m *Manager) Acquire(ctx context.Context, mode sandbox.NetworkMode) (sandbox.Network, error) {
	if mode != sandbox.NetworkNone && mode != sandbox.NetworkEgress {
		return nil, fmt.Errorf("network mode %q: give %q or %q", mode, sandbox.NetworkNone, sandbox.NetworkEgress)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, ErrClosed
	}
	m.used[mode] = true
	m.nudge()
	if pool := m.ready[mode]; len(pool) > 0 {
		n := pool[len(pool)-1]
		m.ready[mode] = pool[:len(pool)-1]
		m.open[n] = struct{}{}
		m.mu.Unlock()
		return n, nil
	}
	m.making.Add(1)
	m.mu.Unlock()
	defer m.making.Done()

	n, err := m.create(ctx, mode)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		m.released = append(m.released, n)
		return nil, ErrClosed
	}
	m.open[n] = struct{}{}
	return n, nil
}

func (m *Manager) create(ctx context.Context, mode sandbox.NetworkMode) (*network, error) {
	n := &network{m: m, slot: -1}
	var err error
	if mode == sandbox.NetworkNone {
		n.ns, err = newNamespace(func(*os.File) (err error) {
			n.inside, err = openInside()
			return err
		})
	} else {
		if n.nameservers, err = m.prepareEgress(); err != nil {
			return nil, err
		}
		if n.slot, err = m.takeSlot(ctx); err != nil {
			return nil, err
		}
		// The filter is there before the device is.
		if err = m.filter.open(n.slot); err == nil {
			n.ns, n.inside, err = newEgress(m.host, m.claim, n.slot)
		}
		if err != nil {
			m.slots <- n.slot
		}
	}
	if err != nil {
		if n.inside != nil {
			n.inside.Close()
		}
		return nil, err
	}
	n.path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.ns.Fd())
	return n, nil
}

// takeSlot takes a free slot, and waits for one until ctx is over.
func (m *Manager) takeSlot(ctx context.Context) (int, error) {
	select {
	case s := <-m.slots:
		return s, nil
	default:
	}
	select {
	case s := <-m.slots:
		return s, nil
	case <-ctx.Done():
		return -1, fmt.Errorf("wait for a free network: %w", ctx.Err())
	case <-m.stop:
		return -1, ErrClosed
	}
}

// prepareEgress sets the node up, once: nameservers, packet filter, forwarding,
// in this order, so that nothing is forwarded without the filter.
func (m *Manager) prepareEgress() ([]netip.Addr, error) {
	m.egressMu.Lock()
	defer m.egressMu.Unlock()
	if m.egressReady {
		return m.nameservers, nil
	}
	all := m.cfg.Nameservers
	if len(all) == 0 {
		var err error
		if all, err = nodeNameservers(); err != nil {
			return nil, err
		}
	}
	ns := usable(all)
	if len(ns) == 0 {
		return nil, errors.New("no nameserver for steps: /etc/resolv.conf names only loopback or IPv6 ones; configure an IPv4 nameserver, or use network mode none")
	}
	policy := m.cfg.Policy
	if policy == nil {
		policy = &egress.Policy{}
	}
	filter, err := newFilter(m.claim, m.cfg.Subnet, ns, policy)
	if err != nil {
		return nil, err
	}
	if err := enableForwarding(m.cfg.StateDir); err != nil {
		return nil, errors.Join(err, filter.close())
	}
	for _, a := range all {
		m.upstream = append(m.upstream, netip.AddrPortFrom(a.Unmap(), dnsPort))
	}
	m.filter, m.nameservers, m.egressReady = filter, ns, true
	return ns, nil
}
