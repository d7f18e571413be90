package netns

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	claimBits = 22 // what one process claims
	stepBits  = 30 // what one step gets: the node's end and its own
	slots     = 1 << (stepBits - claimBits)

	linkPrefix  = "kn"
	tablePrefix = "kiln-"
)

// claim is a subnet that this process alone uses, for as long as the lock is open.
type claim struct {
	prefix netip.Prefix
	lock   *os.File
}

// hexAddr names a subnet in device and table names.
func hexAddr(p netip.Prefix) string {
	a := p.Addr().As4()
	return hex.EncodeToString(a[:])
}

func addrAt(p netip.Prefix, n uint32) netip.Addr {
	a := p.Addr().As4()
	var out [4]byte
	binary.BigEndian.PutUint32(out[:], binary.BigEndian.Uint32(a[:])+n)
	return netip.AddrFrom4(out)
}

func (c *claim) table() string       { return tablePrefix + hexAddr(c.prefix) }
func (c *claim) linksPrefix() string { return linkPrefix + hexAddr(c.prefix) + "-" }
func (c *claim) link(slot int) string {
	return fmt.Sprintf("%s%02x", c.linksPrefix(), slot)
}

// group is the link group of the claim's devices: the kernel deletes a whole
// group for the price of one device.
func (c *claim) group() uint32 {
	a := c.prefix.Addr().As4()
	return binary.BigEndian.Uint32(a[:])
}

// ends are the addresses of the node and of the step in a slot.
func (c *claim) ends(slot int) (node, step netip.Addr) {
	base := uint32(slot) << (32 - stepBits)
	return addrAt(c.prefix, base+1), addrAt(c.prefix, base+2)
}

func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func claimPath(dir string, p netip.Prefix) string {
	return filepath.Join(dir, fmt.Sprintf("%s-%d.lock", p.Addr(), p.Bits()))
}

// dumpTries is how often a list is asked for that changes while the kernel gives it.
const dumpTries = 50

// whole returns a list of the kernel's. The kernel says so when the list changed while
// it was given, and may then have left something out; it is asked for again.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range dumpTries {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return nil, err
}

// takeClaim claims the first subnet in pool that no other process holds and to
// which the node has no route of its own.
func takeClaim(dir string, pool netip.Prefix) (*claim, error) {
	routes, err := whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for n := range 1 << (claimBits - pool.Bits()) {
		p := netip.PrefixFrom(addrAt(pool, uint32(n)<<(32-claimBits)), claimBits)
		if routed(routes, p) {
			continue
		}
		lock, err := lockFile(claimPath(dir, p))
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("lock subnet %s: %w", p, err)
		}
		return &claim{prefix: p, lock: lock}, nil
	}
	return nil, fmt.Errorf("no free /%d in %s: every one is held by another kiln process or routed by this node; give another subnet", claimBits, pool)
}

func routed(routes []netlink.Route, p netip.Prefix) bool {
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		if ok && ones > 0 && netip.PrefixFrom(a, ones).Overlaps(p) {
			return true
		}
	}
	return false
}

// sweep removes the devices and tables of processes that are gone: those whose
// subnet lies in pool and whose lock is free.
func sweep(dir string, pool netip.Prefix) error {
	stale := map[netip.Prefix]*claim{}
	defer func() {
		for _, c := range stale {
			if c != nil {
				c.lock.Close()
			}
		}
	}()
	find := func(name, prefix string) (*claim, error) {
		rest, ok := strings.CutPrefix(name, prefix)
		if !ok || len(rest) < 8 {
			return nil, nil
		}
		raw, err := hex.DecodeString(rest[:8])
		if err != nil {
			return nil, nil // somebody else's name
		}
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte(raw)), claimBits)
		if p != p.Masked() || !pool.Contains(p.Addr()) {
			return nil, nil
		}
		if c, seen := stale[p]; seen {
			return c, nil
		}
		lock, err := lockFile(claimPath(dir, p))
		if errors.Is(err, unix.EWOULDBLOCK) {
			stale[p] = nil // its process lives
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("lock subnet %s: %w", p, err)
		}
		stale[p] = &claim{prefix: p, lock: lock}
		return stale[p], nil
	}

	links, err := whole(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("list network devices: %w", err)
	}
	for _, l := range links {
		c, err := find(l.Attrs().Name, linkPrefix)
		if err != nil {
			return err
		}
		if c == nil {
			continue
		}
		// A killed process's namespaces take their devices along, at a time of
		// the kernel's choosing: gone is as good as removed.
		if err := netlink.LinkDel(l); err != nil && !linkGone(err) {
			return fmt.Errorf("remove stale device %s: %w", l.Attrs().Name, err)
		}
	}
	nft, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	tables, err := nft.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	for _, t := range tables {
		c, err := find(t.Name, tablePrefix)
		if err != nil {
			return err
		}
		if c == nil {
			continue
		}
		nft.DelTable(t)
		if err := nft.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove stale nftables table %s: %w", t.Name, err)
		}
	}
	return nil
}

func linkGone(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.Is(err, unix.ENODEV) || errors.As(err, &missing)
}

func ipNet(a netip.Addr, bits int) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, 32)}
}
