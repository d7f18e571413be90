// Package egresstest has what tests of egress policies need: names whose addresses
// the test decides.
package egresstest

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"
)

// Names returns a resolver that asks a name server of the test on loopback, which
// calls answer for the address of each name that it is asked for; an invalid address
// is no such name. A resolver asks for IPv4 and IPv6 addresses, so it may ask twice,
// and concurrently with others.
func Names(t testing.TB, answer func(name string) netip.Addr) *net.Resolver {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			m.Response = true
			m.Additionals = nil
			if a := answer(strings.TrimSuffix(q.Name.String(), ".")); !a.IsValid() {
				m.RCode = dnsmessage.RCodeNameError
			} else if h := (dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class}); q.Type == dnsmessage.TypeA && a.Is4() {
				m.Answers = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.AResource{A: a.As4()}}}
			} else if q.Type == dnsmessage.TypeAAAA && a.Is6() {
				m.Answers = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}}}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = server.WriteTo(out, from)
			}
		}
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", server.LocalAddr().String())
	}}
}
