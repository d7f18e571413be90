package netns

import (
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	// maxContacts bounds how many destinations of a step are noted, of those that it
	// reached and of those that it was refused, each.
	maxContacts = 256
	// maxLearned bounds how many addresses a step may learn from its resolver, and how
	// many connections to them it may have.
	maxLearned = 4096
	// quiet is how long a connection to a learned address may say nothing.
	quiet = time.Hour
	// icmpProhibited is the code that says that a filter forbids it.
	icmpProhibited = 13
)

// slotNames are the chains and sets of a slot.
type slotNames struct {
	chain, reach, refuse      string
	reached, refused          string
	hosts, ports, connections string
}

func namesOf(slot int) slotNames {
	n := func(what string) string { return fmt.Sprintf("%s-%02x", what, slot) }
	return slotNames{
		chain: n("step"), reach: n("reach"), refuse: n("refuse"), reached: n("reached"), refused: n("refused"),
		hosts: n("hosts"), ports: n("ports"), connections: n("connections"),
	}
}

var contactType = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)

// slotState is what the filter has of a slot.
type slotState struct {
	// restricted and resolver say that its chain is not that of everyone, and has sets
	// for what a resolver of the step's own teaches.
	restricted, resolver bool
	// full says that more destinations were counted than there is room for.
	full bool
}

// open has the filter judge what comes from the device of a slot, by the policy of
// everyone.
func (f *filter) open(slot int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.slots[slot] != nil {
		return nil
	}
	n := namesOf(slot)
	for _, set := range []string{n.reached, n.refused} {
		if err := f.addSet(&nftables.Set{Name: set, KeyType: contactType, Dynamic: true, Size: maxContacts}, nil); err != nil {
			return err
		}
	}
	f.note(n)
	c := f.nft.AddChain(&nftables.Chain{Name: n.chain, Table: f.table})
	if err := f.judge(c, slot, f.reach, setOpen, false); err != nil {
		return err
	}
	slots := &nftables.Set{Table: f.table, Name: mapSlots, IsMap: true, KeyType: nftables.TypeIFName, DataType: nftables.TypeVerdict}
	err := f.nft.SetAddElements(slots, []nftables.SetElement{{
		Key: linkKey(f.claim.link(slot)), VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: n.chain},
	}})
	if err == nil {
		err = f.flush()
	}
	if err != nil {
		return fmt.Errorf("add packet filter of a network: %w", err)
	}
	f.slots[slot] = &slotState{}
	return nil
}

// note adds the chains at whose end packets are let through or not. Both note what the
// first packet of a connection wants.
func (f *filter) note(n slotNames) {
	accept := verdict(expr.VerdictAccept)
	prohibited := []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: icmpProhibited}}
	for _, noted := range []struct {
		chain, set string
		ends       []end
	}{
		{n.reach, n.reached, []end{{transport(true), true, accept}, {transport(false), false, accept}}},
		// Programs are told at once, so that they do not wait.
		{n.refuse, n.refused, []end{
			{protocol(unix.IPPROTO_TCP), true, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}},
			{transport(true), true, prohibited}, {transport(false), false, prohibited},
		}},
	} {
		c := f.nft.AddChain(&nftables.Chain{Name: noted.chain, Table: f.table})
		begins := state(expr.CtStateBitNEW)
		for _, e := range noted.ends {
			add := []expr.Any{&expr.Dynset{
				SrcRegKey: regAddr, SetName: noted.set, Operation: uint32(unix.NFT_DYNSET_OP_ADD), Exprs: []expr.Any{&expr.Counter{}},
			}}
			f.addRule(c, begins, e.match, loadContact(e.withPort), add, e.do)
		}
		// What the set has no room for is counted.
		f.addRule(c, begins, []expr.Any{&expr.Counter{}})
		for _, e := range noted.ends {
			f.addRule(c, e.match, e.do)
		}
	}
}

// end is what happens to packets of some protocols.
type end struct {
	match    []expr.Any
	withPort bool
	do       []expr.Any
}

// reset makes a slot, whose device is gone, ready for the next network.
func (f *filter) reset(slot int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, now := namesOf(slot), f.slots[slot]
	if now == nil {
		return nil
	}
	if now.full {
		for _, name := range []string{n.reach, n.refuse} {
			f.nft.FlushChain(&nftables.Chain{Table: f.table, Name: name})
		}
		f.note(n)
	}
	if now.restricted {
		c := &nftables.Chain{Name: n.chain, Table: f.table}
		f.nft.FlushChain(c)
		if err := f.judge(c, slot, f.reach, setOpen, false); err != nil {
			return err
		}
	}
	if now.resolver {
		if err := f.nft.SetDeleteElements(f.resolvers(), []nftables.SetElement{{Key: linkKey(f.claim.link(slot))}}); err != nil {
			return fmt.Errorf("reset a network: %w", err)
		}
		for _, name := range []string{n.hosts, n.ports, n.connections} {
			f.nft.DelSet(&nftables.Set{Table: f.table, Name: name})
		}
	}
	for _, name := range []string{n.reached, n.refused} {
		f.nft.FlushSet(&nftables.Set{Table: f.table, Name: name})
	}
	if err := f.flush(); err != nil {
		return fmt.Errorf("reset a network: %w", err)
	}
	f.slots[slot] = &slotState{}
	return nil
}
