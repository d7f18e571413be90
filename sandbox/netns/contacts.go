package netns

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// contacts reads what the filter has noted of a slot.
func (f *filter) contacts(slot int) (sandbox.Contacts, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out sandbox.Contacts
	n := namesOf(slot)
	for _, noted := range []struct {
		set, chain string
		list       *sandbox.ContactList
	}{{n.reached, n.reach, &out.Reached}, {n.refused, n.refuse, &out.Refused}} {
		elements, err := f.nft.GetSetElements(&nftables.Set{Table: f.table, Name: noted.set, KeyType: contactType})
		if err != nil {
			return out, fmt.Errorf("read what a step reached: %w", err)
		}
		for _, e := range elements {
			if c, ok := contactOf(e); ok {
				noted.list.List = append(noted.list.List, c)
			}
		}
		if len(elements) < maxContacts {
			continue
		}
		if noted.list.More, err = f.overflow(noted.chain); err != nil {
			return out, err
		}
		f.slots[slot].full = f.slots[slot].full || noted.list.More > 0
	}
	return out, nil
}

// overflow returns what the one counter of a chain has counted. The caller holds mu.
func (f *filter) overflow(chain string) (int64, error) {
	rules, err := f.nft.GetRules(f.table, &nftables.Chain{Name: chain, Table: f.table})
	if err != nil {
		return 0, fmt.Errorf("read what a step reached: %w", err)
	}
	for _, r := range rules {
		for _, e := range r.Exprs {
			if c, ok := e.(*expr.Counter); ok {
				return int64(c.Packets), nil
			}
		}
	}
	return 0, nil
}

// contactOf reads an element whose key is an address, a protocol and a port, each from
// the begin of four bytes.
func contactOf(e nftables.SetElement) (sandbox.Contact, bool) {
	if len(e.Key) != 12 {
		return sandbox.Contact{}, false
	}
	c := sandbox.Contact{
		Address: netip.AddrFrom4([4]byte(e.Key)), Protocol: protocolName(e.Key[4]), Port: binary.BigEndian.Uint16(e.Key[8:]), Count: 1,
	}
	if e.Counter != nil {
		c.Count = int64(min(e.Counter.Packets, math.MaxInt64))
	}
	return c, true
}

func protocolName(n byte) string {
	switch n {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP:
		return "icmp"
	}
	return strconv.Itoa(int(n))
}
