package netns

import (
	"net"
	"net/netip"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	offsetSource      = 12 // in the IPv4 header
	offsetDestination = 16
	offsetPort        = 2 // of the destination, in the headers of TCP and UDP

	// dnsPort and dnsTLSPort are where resolvers are.
	dnsPort, dnsTLSPort = 53, 853

	// Registers of 32 bits, which follow each other: a key is put together there.
	regAddr, regProto, regPort = 8, 9, 10
	// regAddrPort is behind regAddr in a key without a protocol.
	regAddrPort = 9

	destinationNAT = 1 << 5 // of the status of a connection
)

// rule puts parts together.
func rule(parts ...[]expr.Any) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
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

func protocol(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

// transport matches TCP and UDP, or all else.
func transport(yes bool) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: setTransport, Invert: !yes},
	}
}

// anyPort matches TCP and UDP to a port.
func anyPort(n uint16) []expr.Any {
	return rule(transport(true), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offsetPort, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(n)},
	})
}

func loadAddr() []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: regAddr, Base: expr.PayloadBaseNetworkHeader, Offset: offsetDestination, Len: 4}}
}

func loadPort(register uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: offsetPort, Len: 2}}
}

// loadContact puts the address, protocol and port of a packet into the registers of a
// key; the port is 0 when the protocol has none.
func loadContact(withPort bool) []expr.Any {
	key := rule(loadAddr(), []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: regProto}})
	if withPort {
		return rule(key, loadPort(regPort))
	}
	return rule(key, []expr.Any{&expr.Immediate{Register: regPort, Data: make([]byte, 4)}})
}

// inSet matches when the key that begins in regAddr is in a set.
func inSet(name string, id uint32) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: regAddr, SetName: name, SetID: id}}
}

// state matches packets of connections in one of the given states.
func state(bits uint32) []expr.Any { return ctBits(expr.CtKeySTATE, bits) }

// answers matches packets of connections that the other side began.
func answers() []expr.Any { return state(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED) }

func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: key},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Xor: make([]byte, 4), Mask: binaryutil.NativeEndian.PutUint32(bits)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// notUnicast matches packets to the node's own addresses, whichever it has now, and to
// groups.
func notUnicast() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_UNICAST)},
	}
}

func verdict(kind expr.VerdictKind) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind}}
}

func goTo(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}
}
