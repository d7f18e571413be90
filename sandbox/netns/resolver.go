package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

const (
	// maxQueries bounds queries of one step that are being answered, and maxStreams
	// its connections; more of them wait or are not heard.
	maxQueries, maxStreams = 32, 8
	// streamIdle is how long a connection of a step may say nothing.
	streamIdle = 10 * time.Second
	// minLifetime is how long an address may be used whose answer says less: a program
	// needs a moment from the answer to the connection.
	minLifetime = 5 * time.Second
	// maxLifetime bounds it.
	maxLifetime = 24 * time.Hour
	maxMessage  = 64 << 10 // bytes of a message of DNS
)

// lifetime is how long an address may be used whose answer has a ttl in seconds.
func lifetime(ttl uint32) time.Duration {
	return min(max(time.Duration(ttl)*time.Second, minLifetime), maxLifetime)
}

// resolver answers one step's queries for the names that its policy allows, and lets
// the step reach the addresses that it answers with, where the policy allows these too.
type resolver struct {
	policy   *egress.Policy
	upstream []netip.AddrPort
	// learn lets the step reach an address.
	learn func(a netip.Addr, ports []uint16, every bool, ttl uint32) error

	packets net.PacketConn
	streams net.Listener
	// ctx ends with the resolver.
	ctx     context.Context
	stop    context.CancelFunc
	serving sync.WaitGroup
	queries chan struct{} // one for each that is being answered

	mu sync.Mutex // guards what follows
	// names are of the addresses that were answered.
	names map[netip.Addr]string
	// refused counts queries by name, more those for which there is no room.
	refused map[string]int64
	more    int64
}

// newResolver serves on a free port of address until close.
func newResolver(address netip.Addr, upstream []netip.AddrPort, policy *egress.Policy, learn func(netip.Addr, []uint16, bool, uint32) error) (*resolver, error) {
	r := &resolver{
		policy: policy, upstream: upstream, learn: learn, queries: make(chan struct{}, maxQueries),
		names: map[netip.Addr]string{}, refused: map[string]int64{},
	}
	var err error
	for range 10 { // until a port is free for both
		if r.packets, err = net.ListenPacket("udp4", netip.AddrPortFrom(address, 0).String()); err != nil {
			break
		}
		if r.streams, err = net.Listen("tcp4", r.packets.LocalAddr().String()); err == nil {
			break
		}
		r.packets.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("listen for the names that a step asks for: %w", err)
	}
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.serving.Go(r.servePackets)
	r.serving.Go(r.serveStreams)
	return r, nil
}

func (r *resolver) port() uint16 { return uint16(r.packets.LocalAddr().(*net.UDPAddr).Port) }

// close ends it and waits for what it began.
func (r *resolver) close() error {
	r.stop()
	err := errors.Join(r.packets.Close(), r.streams.Close())
	r.serving.Wait()
	return err
}

func (r *resolver) servePackets() {
	for {
		buf := make([]byte, 1500)
		n, from, err := r.packets.ReadFrom(buf)
		if r.ctx.Err() != nil {
			return
		}
		if err != nil {
			continue // such as an answer that a program no longer wanted
		}
		select {
		case r.queries <- struct{}{}:
		case <-r.ctx.Done():
			return
		}
		r.serving.Go(func() {
			defer func() { <-r.queries }()
			if answer := r.answer(buf[:n]); answer != nil {
				_, _ = r.packets.WriteTo(answer, from)
			}
		})
	}
}

func (r *resolver) serveStreams() {
	open := make(chan struct{}, maxStreams)
	for {
		c, err := r.streams.Accept()
		if r.ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // no descriptors, for one
			continue
		}
		select {
		case open <- struct{}{}:
		default:
			c.Close()
			continue
		}
		r.serving.Go(func() {
			defer func() { <-open }()
			defer c.Close()
			defer context.AfterFunc(r.ctx, func() { c.Close() })()
			r.serveStream(c)
		})
	}
}

func (r *resolver) serveStream(c net.Conn) {
	for {
		_ = c.SetDeadline(time.Now().Add(streamIdle))
		query, err := readMessage(c)
		if err != nil {
			return
		}
		answer := r.answer(query)
		if answer == nil {
			return
		}
		_ = c.SetDeadline(time.Now().Add(streamIdle))
		if writeMessage(c, answer) != nil {
			return
		}
	}
}

// readMessage reads a message of a stream, which begins with its length.
func readMessage(c io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(c, msg)
	return msg, err
}

func writeMessage(c io.Writer, msg []byte) error {
	_, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...))
	return err
}

// answer answers a query; nil: it is none.
func (r *resolver) answer(query []byte) []byte {
	head, q, err := parseQuery(query)
	if err != nil {
		if head.Response || len(query) < 12 {
			return nil
		}
		return reply(head, nil, dnsmessage.RCodeFormatError, nil)
	}
	name := q.Name.String()
	if !r.policy.Resolves(name) {
		r.refuse(name)
		return reply(head, &q, dnsmessage.RCodeRefused, nil)
	}
	// Steps have no IPv6, and no use for other records.
	if q.Type != dnsmessage.TypeA {
		return reply(head, &q, dnsmessage.RCodeSuccess, nil)
	}
	found, code := r.ask(q)
	var pass []record
	for _, a := range found {
		ports, every := r.policy.Ports(name, a.addr)
		if !every && len(ports) == 0 {
			continue // it points to where the step may not go
		}
		if len(pass) == maxAnswers || !r.remember(a.addr, name) || r.learn(a.addr, ports, every, a.ttl) != nil {
			continue
		}
		pass = append(pass, a)
	}
	if len(found) > 0 && len(pass) == 0 {
		r.refuse(name)
		code = dnsmessage.RCodeRefused
	}
	return reply(head, &q, code, pass)
}

// remember keeps the name of an address, and tells whether there was room.
func (r *resolver) remember(a netip.Addr, name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.names[a]; !known && len(r.names) == maxLearned {
		return false
	}
	r.names[a] = canonicalName(name)
	return true
}

func (r *resolver) refuse(name string) {
	name = canonicalName(name)
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.refused[name]; !known && len(r.refused) == maxContacts {
		r.more++
		return
	}
	r.refused[name]++
}

// describe adds names to contacts, and the names that were refused.
func (r *resolver) describe(c *sandbox.Contacts) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, list := range [][]sandbox.Contact{c.Reached.List, c.Refused.List} {
		for i := range list {
			list[i].Name = r.names[list[i].Address]
		}
	}
	c.Refused.More += r.more
	for name, count := range r.refused {
		if len(c.Refused.List) == maxContacts {
			c.Refused.More += count
			continue
		}
		c.Refused.List = append(c.Refused.List, sandbox.Contact{Name: name, Protocol: "dns", Port: dnsPort, Count: count})
	}
}
