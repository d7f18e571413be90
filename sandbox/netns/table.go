package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox/egress"
)

// Names in the table. Those of a slot have its number behind them.
const (
	setTransport = "transport" // the protocols that have ports
	setOpen      = "open"      // what the policy of everyone lets be reached
	mapSlots     = "slots"     // the chain of a device
	mapResolvers = "resolvers" // the port of a device's own resolver
)

// filter is the packet filter of a claim. It stands in the network namespace of this
// process, which steps cannot change. What a step sends is judged before the node's own
// translation of addresses: by the address that the step knows.
type filter struct {
	claim       *claim
	pool        netip.Prefix
	nameservers []netip.Addr
	// reach is what the policy of everyone lets be reached.
	reach egress.Reach
	table *nftables.Table

	mu    sync.Mutex // guards what follows
	nft   *nftables.Conn
	setID uint32
	slots map[int]*slotState // those whose chains and sets are there
}

// newFilter installs the packet filter of a claim. pool is the subnet of all processes'
// steps.
func newFilter(c *claim, pool netip.Prefix, nameservers []netip.Addr, policy *egress.Policy) (*filter, error) {
	nft, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	f := &filter{
		claim: c, pool: pool, nameservers: nameservers, reach: policy.Reach(), nft: nft,
		table: &nftables.Table{Family: nftables.TableFamilyIPv4, Name: c.table()},
		slots: map[int]*slotState{},
	}
	if err := f.install(); err != nil {
		return nil, errors.Join(err, nft.CloseLasting())
	}
	return f, nil
}

func (f *filter) install() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nft.AddTable(f.table)
	for _, s := range []struct {
		set      *nftables.Set
		elements []nftables.SetElement
	}{
		{&nftables.Set{Name: setTransport, KeyType: nftables.TypeInetProto}, []nftables.SetElement{{Key: []byte{unix.IPPROTO_TCP}}, {Key: []byte{unix.IPPROTO_UDP}}}},
		{&nftables.Set{Name: setOpen, KeyType: nftables.TypeIPAddr, Interval: true}, elementsOf(f.reach.Any)},
		{&nftables.Set{Name: mapSlots, KeyType: nftables.TypeIFName, DataType: nftables.TypeVerdict, IsMap: true}, nil},
		{&nftables.Set{Name: mapResolvers, KeyType: nftables.TypeIFName, DataType: nftables.TypeInetService, IsMap: true}, nil},
	} {
		if err := f.addSet(s.set, s.elements); err != nil {
			return err
		}
	}
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		return f.nft.AddChain(&nftables.Chain{Name: name, Table: f.table, Type: kind, Hooknum: hook, Priority: prio})
	}
	from := device(expr.MetaKeyIIFNAME, f.claim.linksPrefix())
	to := device(expr.MetaKeyOIFNAME, f.claim.linksPrefix())
	drop, accept := verdict(expr.VerdictDrop), verdict(expr.VerdictAccept)

	// From a step: to the chain of its slot. There is no other way.
	steps := chain("steps", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle)
	f.addRule(steps, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: mapSlots, DestRegister: 0, IsDestRegSet: true},
	})
	f.addRule(steps, from, drop)
	resolvers := chain("resolvers", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	f.addRule(resolvers, from, anyPort(dnsPort), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: mapResolvers, DestRegister: 1, IsDestRegSet: true},
		&expr.Redir{RegisterProtoMin: 1},
	})

	// What others translate must lead neither to the node nor to where nobody may go.
	translated := ctBits(expr.CtKeySTATUS, destinationNAT)
	input := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	f.addRule(input, from, translated, address(offsetDestination, f.claim.prefix, expr.CmpOpNeq), drop)
	forward := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	f.addRule(forward, to, answers(), accept)
	f.addRule(forward, to, drop)
	for _, p := range append([]netip.Prefix{f.pool}, egress.DeniedIPv4()...) {
		f.addRule(forward, from, translated, address(offsetDestination, p, expr.CmpOpEq), drop)
	}

	// From the node: only answers.
	output := chain("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter)
	f.addRule(output, to, answers(), accept)
	f.addRule(output, to, drop)

	nat := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	f.addRule(nat, address(offsetSource, f.claim.prefix, expr.CmpOpEq), []expr.Any{&expr.Masq{}})
	if err := f.flush(); err != nil {
		return fmt.Errorf("install nftables table %s: %w", f.table.Name, err)
	}
	return nil
}

// close removes the table.
func (f *filter) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nft.DelTable(f.table)
	err := f.nft.Flush()
	if err != nil && !errors.Is(err, unix.ENOENT) {
		err = fmt.Errorf("remove nftables table %s: %w", f.table.Name, err)
	} else {
		err = nil
	}
	return errors.Join(err, f.nft.CloseLasting())
}

// flush has the kernel take the batch. The caller holds mu.
func (f *filter) flush() error {
	err := f.nft.Flush()
	if err != nil {
		// There may be answers left on the connection; without one, each batch has its own.
		err = errors.Join(err, f.nft.CloseLasting())
	}
	return err
}

// addRule adds a rule to the batch. The caller holds mu.
func (f *filter) addRule(c *nftables.Chain, parts ...[]expr.Any) {
	f.nft.AddRule(&nftables.Rule{Table: f.table, Chain: c, Exprs: rule(parts...)})
}

// maxElements is how many elements of a set fit into one message.
const maxElements = 512

// addSet adds a set to the batch. The caller holds mu.
func (f *filter) addSet(s *nftables.Set, elements []nftables.SetElement) error {
	f.setID++
	s.Table, s.ID = f.table, f.setID
	if s.Anonymous {
		s.Name, s.Constant = "__set%d", true
	}
	if err := f.nft.AddSet(s, nil); err != nil {
		return fmt.Errorf("add nftables set %s: %w", s.Name, err)
	}
	for some := range slices.Chunk(elements, maxElements) {
		if s.Anonymous {
			// The library refuses elements of a set without a name of its own.
			named := *s
			named.Anonymous = false
			if err := f.nft.SetAddElements(&named, some); err != nil {
				return fmt.Errorf("fill nftables set: %w", err)
			}
			continue
		}
		if err := f.nft.SetAddElements(s, some); err != nil {
			return fmt.Errorf("fill nftables set %s: %w", s.Name, err)
		}
	}
	return nil
}

// elementsOf returns spans as the elements of a set of intervals.
func elementsOf(spans []egress.Span) []nftables.SetElement {
	var out []nftables.SetElement
	for _, s := range spans {
		out = append(out, nftables.SetElement{Key: s.First.AsSlice()})
		if after := s.Last.Next(); after.IsValid() {
			out = append(out, nftables.SetElement{Key: after.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

// linkKey is a device's name as a key of a map.
func linkKey(name string) []byte {
	key := make([]byte, nftables.TypeIFName.Bytes)
	copy(key, name)
	return key
}
