package netns

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// askTimeout is how long a resolver of the node may take for an answer.
	askTimeout = 3 * time.Second
	// askTries is how often each is asked.
	askTries = 2
	// maxAnswers bounds the addresses of an answer, so that it fits into a packet.
	maxAnswers = 13
	// maxAliases bounds how many names may lead to one another.
	maxAliases = 16
)

var errQuery = errors.New("not a query for one name")

// record is an address of a name.
type record struct {
	addr netip.Addr
	ttl  uint32 // seconds
}

// parseQuery reads what a step sent. The header is as far as it could be read.
func parseQuery(msg []byte) (dnsmessage.Header, dnsmessage.Question, error) {
	var p dnsmessage.Parser
	head, err := p.Start(msg)
	if err != nil {
		return head, dnsmessage.Question{}, err
	}
	questions, err := p.AllQuestions()
	if err != nil {
		return head, dnsmessage.Question{}, err
	}
	if head.Response || head.OpCode != 0 || len(questions) != 1 || questions[0].Class != dnsmessage.ClassINET {
		return head, dnsmessage.Question{}, errQuery
	}
	return head, questions[0], nil
}

// reply makes an answer to a query. It is nil when it cannot be made.
func reply(query dnsmessage.Header, q *dnsmessage.Question, code dnsmessage.RCode, found []record) []byte {
	m := dnsmessage.Message{Header: dnsmessage.Header{
		ID: query.ID, Response: true, OpCode: query.OpCode, RecursionDesired: query.RecursionDesired, RecursionAvailable: true, RCode: code,
	}}
	if q != nil {
		m.Questions = []dnsmessage.Question{*q}
	}
	for _, r := range found {
		m.Answers = append(m.Answers, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: r.ttl},
			Body:   &dnsmessage.AResource{A: r.addr.As4()},
		})
	}
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}

// ask asks the node's resolvers, one after the other, for the addresses of a name.
func (r *resolver) ask(q dnsmessage.Question) ([]record, dnsmessage.RCode) {
	for range askTries {
		for _, server := range r.upstream {
			found, code, err := exchange(r.ctx, server, q)
			if err == nil && (code == dnsmessage.RCodeSuccess || code == dnsmessage.RCodeNameError) {
				return found, code
			}
			if r.ctx.Err() != nil {
				return nil, dnsmessage.RCodeServerFailure
			}
		}
	}
	return nil, dnsmessage.RCodeServerFailure
}

// exchange asks one resolver, by TCP when the answer is too long for a packet.
func exchange(ctx context.Context, server netip.AddrPort, q dnsmessage.Question) ([]record, dnsmessage.RCode, error) {
	var random [2]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, 0, err
	}
	id := binary.BigEndian.Uint16(random[:])
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: id, RecursionDesired: true}, Questions: []dnsmessage.Question{q}}
	query, err := m.Pack()
	if err != nil {
		return nil, 0, fmt.Errorf("ask for a name: %w", err)
	}
	for _, network := range []string{"udp", "tcp"} {
		answer, err := send(ctx, network, server, query, func(msg []byte) bool { return isAnswerTo(msg, id, q) })
		if err != nil {
			return nil, 0, fmt.Errorf("ask %s for a name: %w", server, err)
		}
		found, code, truncated, err := parseAnswer(answer, q)
		if err != nil {
			return nil, 0, fmt.Errorf("read answer of %s: %w", server, err)
		}
		if !truncated || network == "tcp" {
			return found, code, nil
		}
	}
	return nil, 0, errors.New("unreachable")
}

// send sends a query and returns the first message that is the answer.
func send(ctx context.Context, network string, server netip.AddrPort, query []byte, isAnswer func([]byte) bool) ([]byte, error) {
	d := net.Dialer{Timeout: askTimeout}
	c, err := d.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	_ = c.SetDeadline(time.Now().Add(askTimeout))
	if network == "tcp" {
		if err := writeMessage(c, query); err != nil {
			return nil, err
		}
		msg, err := readMessage(c)
		if err == nil && !isAnswer(msg) {
			err = errors.New("the answer is to another question")
		}
		return msg, err
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	buf := make([]byte, maxMessage)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return nil, err
		}
		if isAnswer(buf[:n]) {
			return buf[:n], nil
		}
	}
}

// isAnswerTo tells whether msg answers a question that was asked with an ID.
func isAnswerTo(msg []byte, id uint16, q dnsmessage.Question) bool {
	var p dnsmessage.Parser
	head, err := p.Start(msg)
	if err != nil || !head.Response || head.ID != id {
		return false
	}
	got, err := p.Question()
	return err == nil && got.Type == q.Type && got.Class == q.Class && strings.EqualFold(got.Name.String(), q.Name.String())
}

// parseAnswer returns the addresses to which the name of q leads, by whichever other
// names. A time is the shortest on the way.
func parseAnswer(msg []byte, q dnsmessage.Question) (found []record, code dnsmessage.RCode, truncated bool, err error) {
	var p dnsmessage.Parser
	head, err := p.Start(msg)
	if err != nil {
		return nil, 0, false, err
	}
	if err := p.SkipAllQuestions(); err != nil {
		return nil, 0, false, err
	}
	type alias struct {
		to  string
		ttl uint32
	}
	aliases, addrs := map[string]alias{}, map[string][]record{}
	for {
		h, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			break
		}
		if err != nil {
			return nil, 0, head.Truncated, truncatedOr(head, err)
		}
		owner := canonicalName(h.Name.String())
		switch {
		case h.Class == dnsmessage.ClassINET && h.Type == dnsmessage.TypeA:
			a, err := p.AResource()
			if err != nil {
				return nil, 0, head.Truncated, truncatedOr(head, err)
			}
			addrs[owner] = append(addrs[owner], record{netip.AddrFrom4(a.A), h.TTL})
		case h.Class == dnsmessage.ClassINET && h.Type == dnsmessage.TypeCNAME:
			c, err := p.CNAMEResource()
			if err != nil {
				return nil, 0, head.Truncated, truncatedOr(head, err)
			}
			aliases[owner] = alias{canonicalName(c.CNAME.String()), h.TTL}
		default:
			if err := p.SkipAnswer(); err != nil {
				return nil, 0, head.Truncated, truncatedOr(head, err)
			}
		}
	}
	name, ttl := canonicalName(q.Name.String()), ^uint32(0)
	for range maxAliases {
		for _, a := range addrs[name] {
			found = append(found, record{a.addr, min(a.ttl, ttl)})
		}
		next, ok := aliases[name]
		if !ok || len(found) > 0 {
			break
		}
		name, ttl = next.to, min(ttl, next.ttl)
	}
	return found, head.RCode, head.Truncated, nil
}

// truncatedOr forgives what cannot be read of an answer that says that it is not whole.
func truncatedOr(head dnsmessage.Header, err error) error {
	if head.Truncated {
		return nil
	}
	return err
}

func canonicalName(name string) string { return strings.TrimSuffix(strings.ToLower(name), ".") }
