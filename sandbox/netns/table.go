package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox/egress"
)

const (
	offsetSource      = 12 // in the IPv4 header
	offsetDestination = 16
)

// addTable installs the packet filter of a claim. pool is the subnet of all
// processes' steps.
func addTable(c *claim, pool netip.Prefix, nameservers []netip.Addr) error {
	nft, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	t := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: c.table()})
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		return nft.AddChain(&nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: prio})
	}
	input := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	output := chain("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter)
	forward := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	nat := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	add := func(c *nftables.Chain, parts ...[]expr.Any) {
		var all []expr.Any
		for _, p := range parts {
			all = append(all, p...)
		}
		nft.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: all})
	}

	from := device(expr.MetaKeyIIFNAME, c.linksPrefix())
	to := device(expr.MetaKeyOIFNAME, c.linksPrefix())
	drop := verdict(expr.VerdictDrop)
	accept := verdict(expr.VerdictAccept)

	// To the node: only its resolvers. From the node: only answers.
	for _, ns := range nameservers {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			rule := [][]expr.Any{from, address(offsetDestination, netip.PrefixFrom(ns, 32), expr.CmpOpEq), port53(proto), accept}
			add(input, rule...)
			add(forward, rule...)
		}
	}
	add(input, from, drop)
	add(output, to, answers(), accept)
	add(output, to, drop)

	// Through the node: to the outside only, under the step's own address.
	add(forward, to, answers(), accept)
	add(forward, to, drop)
	add(forward, from, address(offsetSource, c.prefix, expr.CmpOpNeq), drop)
	for _, p := range append([]netip.Prefix{pool}, egress.DeniedIPv4()...) {
		add(forward, from, address(offsetDestination, p, expr.CmpOpEq), drop)
	}
	add(nat, address(offsetSource, c.prefix, expr.CmpOpEq), []expr.Any{&expr.Masq{}})

	if err := nft.Flush(); err != nil {
		return fmt.Errorf("install nftables table %s: %w", t.Name, err)
	}
	return nil
}

func delTable(c *claim) error {
	nft, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	nft.DelTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: c.table()})
	if err := nft.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove nftables table %s: %w", c.table(), err)
	}
	return nil
}

// device matches packets whose device name starts with prefix.
func device(key expr.MetaKey, prefix string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(prefix)},
	}
}

func address(offset uint32, p netip.Prefix, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

func port53(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(53)},
	}
}

// answers matches packets of connections that the other side began.
func answers() []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4, Xor: make([]byte, 4),
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func verdict(kind expr.VerdictKind) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind}}
}
