package netns

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox/egress"
)

// judge fills the chain of a slot. open is the set of reach.Any when it is there
// already. With resolver the step has a resolver of its own, which teaches what else it
// may reach, and no other.
func (f *filter) judge(c *nftables.Chain, slot int, reach egress.Reach, open string, resolver bool) error {
	n := namesOf(slot)
	node, step := f.claim.ends(slot)
	accept, refuse := verdict(expr.VerdictAccept), goTo(n.refuse)
	f.addRule(c, address(offsetSource, netip.PrefixFrom(step, 32), expr.CmpOpNeq), verdict(expr.VerdictDrop))
	if resolver {
		f.addRule(c, address(offsetDestination, netip.PrefixFrom(node, 32), expr.CmpOpEq), anyPort(dnsPort), accept)
		f.addRule(c, anyPort(dnsPort), refuse)
		f.addRule(c, anyPort(dnsTLSPort), refuse)
	} else {
		for _, ns := range f.nameservers {
			f.addRule(c, address(offsetDestination, netip.PrefixFrom(ns, 32), expr.CmpOpEq), anyPort(dnsPort), accept)
		}
	}
	f.addRule(c, address(offsetDestination, f.pool, expr.CmpOpEq), refuse)
	for _, to := range reach.Named {
		match := address(offsetDestination, netip.PrefixFrom(to.Addr(), 32), expr.CmpOpEq)
		if to.Port() != 0 {
			match = rule(match, anyPort(to.Port()))
		}
		f.addRule(c, match, goTo(n.reach))
	}
	f.addRule(c, notUnicast(), refuse)
	within := func(spans []egress.Span, match []expr.Any) error {
		if len(spans) == 0 {
			return nil
		}
		s := &nftables.Set{Anonymous: true, Interval: true, KeyType: nftables.TypeIPAddr}
		if err := f.addSet(s, elementsOf(spans)); err != nil {
			return err
		}
		f.addRule(c, match, loadAddr(), inSet(s.Name, s.ID), goTo(n.reach))
		return nil
	}
	if open != "" {
		f.addRule(c, loadAddr(), inSet(open, 0), goTo(n.reach))
	} else if err := within(reach.Any, nil); err != nil {
		return err
	}
	for _, p := range reach.Ports {
		if err := within(p.Spans, anyPort(p.Port)); err != nil {
			return err
		}
	}
	if resolver {
		if err := f.judgeLearned(c, n); err != nil {
			return err
		}
	}
	f.addRule(c, refuse)
	return nil
}

// judgeLearned adds what the step's resolver teaches. A connection may go on when its
// address has been forgotten, for as long as it is not quiet.
func (f *filter) judgeLearned(c *nftables.Chain, n slotNames) error {
	for _, s := range []*nftables.Set{
		{Name: n.hosts, KeyType: nftables.TypeIPAddr, HasTimeout: true, Size: maxLearned},
		{Name: n.ports, KeyType: addrPortType, HasTimeout: true, Size: maxLearned},
		{Name: n.connections, KeyType: contactType, HasTimeout: true, Dynamic: true, Size: maxLearned},
	} {
		if err := f.addSet(s, nil); err != nil {
			return err
		}
	}
	remember := []expr.Any{&expr.Dynset{
		SrcRegKey: regAddr, SetName: n.connections, Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: quiet,
	}}
	f.addRule(c, state(expr.CtStateBitESTABLISHED), transport(true), loadContact(true), inSet(n.connections, 0), remember, verdict(expr.VerdictAccept))
	f.addRule(c, loadAddr(), inSet(n.hosts, 0), transport(true), loadContact(true), remember, goTo(n.reach))
	f.addRule(c, loadAddr(), inSet(n.hosts, 0), transport(false), goTo(n.reach))
	f.addRule(c, transport(true), loadAddr(), loadPort(regAddrPort), inSet(n.ports, 0), loadContact(true), remember, goTo(n.reach))
	return nil
}

var addrPortType = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)

// restrict has the filter judge a slot by another policy. With a port, the step's
// resolver listens there, on the node's end.
func (f *filter) restrict(slot int, reach egress.Reach, port uint16) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.slots[slot].restricted = true
	c := &nftables.Chain{Name: namesOf(slot).chain, Table: f.table}
	f.nft.FlushChain(c)
	err := f.judge(c, slot, reach, "", port != 0)
	if err == nil && port != 0 {
		err = f.nft.SetAddElements(f.resolvers(), []nftables.SetElement{{
			Key: linkKey(f.claim.link(slot)), Val: binaryutil.BigEndian.PutUint16(port),
		}})
	}
	if err == nil {
		err = f.flush()
	}
	if err != nil {
		return fmt.Errorf("restrict a network: %w", err)
	}
	f.slots[slot].resolver = port != 0
	return nil
}

func (f *filter) resolvers() *nftables.Set {
	return &nftables.Set{Table: f.table, Name: mapResolvers, IsMap: true, KeyType: nftables.TypeIFName, DataType: nftables.TypeInetService}
}

// learn lets a slot reach an address for a time, on ports or on all.
func (f *filter) learn(slot int, a netip.Addr, ports []uint16, every bool, ttl time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := namesOf(slot)
	set := &nftables.Set{Table: f.table, Name: n.hosts, KeyType: nftables.TypeIPAddr, HasTimeout: true}
	keys := [][]byte{a.AsSlice()}
	if !every {
		set.Name, set.KeyType, keys = n.ports, addrPortType, nil
		for _, p := range ports {
			keys = append(keys, append(a.AsSlice(), byte(p>>8), byte(p), 0, 0))
		}
	}
	var plain, timed []nftables.SetElement
	for _, k := range keys {
		plain = append(plain, nftables.SetElement{Key: k})
		timed = append(timed, nftables.SetElement{Key: k, Timeout: ttl})
	}
	// An element that is there would keep its time: it makes place, be it there or not.
	err := f.nft.SetAddElements(set, timed)
	if err == nil {
		err = f.nft.SetDeleteElements(set, plain)
	}
	if err == nil {
		err = f.nft.SetAddElements(set, timed)
	}
	if err == nil {
		err = f.flush()
	}
	if err != nil {
		return fmt.Errorf("let a step reach %s: %w", a, err)
	}
	return nil
}
