package egress

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Times of the transport's connections.
const (
	dialTimeout      = 30 * time.Second
	keepAlive        = 60 * time.Second
	idleTimeout      = 120 * time.Second
	handshakeTimeout = 10 * time.Second
	continueTimeout  = 5 * time.Second
)

// DialContext connects as net.Dialer does, by TCP only, and to no address that p
// denies. The error then wraps a *DeniedError.
func (p *Policy) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return p.dial(ctx, network, address, p.Check)
}

// dial connects to an address that check permits.
func (p *Policy) dial(ctx context.Context, network, address string, check func(string, netip.AddrPort) error) (net.Conn, error) {
	if network != "tcp" && network != "tcp4" && network != "tcp6" {
		return nil, fmt.Errorf("connect to %s: network %q is not for builds", address, network)
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("connect to %q: %w", address, err)
	}
	d := net.Dialer{
		Timeout: dialTimeout, KeepAlive: keepAlive, Resolver: p.Resolver,
		// The kernel gets exactly the address that is checked here.
		Control: func(_, to string, _ syscall.RawConn) error {
			addr, err := netip.ParseAddrPort(to)
			if err != nil {
				return fmt.Errorf("check address %q: %w", to, err)
			}
			return check(host, addr)
		},
	}
	return d.DialContext(ctx, network, address)
}

// CheckURL resolves the host of u and checks every address of it. A name that cannot
// be resolved passes when no allow-list keeps it from being asked for: it may be known
// only to who will connect.
func (p *Policy) CheckURL(ctx context.Context, u *url.URL) error {
	port, err := portOf(u)
	if err != nil {
		return err
	}
	resolver := p.Resolver
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	addrs, err := resolver.LookupNetIP(ctx, "ip", u.Hostname())
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return p.checkName(u.Hostname(), port)
	}
	for _, a := range addrs {
		if err := p.Check(u.Hostname(), netip.AddrPortFrom(a, port)); err != nil {
			return err
		}
	}
	return nil
}

// checkName judges a name that has no address here.
func (p *Policy) checkName(host string, port uint16) error {
	for _, r := range p.all() {
		if len(r.Allow) == 0 {
			continue
		}
		listed := slices.ContainsFunc(r.Allow, func(e Exception) bool { return e.names(host) && (e.port == 0 || e.port == port) })
		if !listed {
			return &DeniedError{Host: host, Address: netip.AddrPortFrom(netip.IPv4Unspecified(), port), Rules: r.Name}
		}
	}
	return nil
}

func portOf(u *url.URL) (uint16, error) {
	if s := u.Port(); s != "" {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil {
			return 0, fmt.Errorf("port %q of a URL: want a number up to 65535", s)
		}
		return uint16(n), nil
	}
	switch u.Scheme {
	case "http":
		return 80, nil
	case "ssh":
		return 22, nil
	case "git":
		return 9418, nil
	}
	return 443, nil
}

// Transport returns a new transport whose connections p allows. Where the
// environment says to use a proxy, the proxy's address must be allowed, but in no
// allow-list, and so must every address that the target's name has here; what the proxy
// then connects to is its own matter. HTTP/2 is off: its flow control slows pushes.
func (p *Policy) Transport() *http.Transport {
	var proxies sync.Map // addresses of the environment's proxies
	return &http.Transport{
		Proxy: func(req *http.Request) (*url.URL, error) {
			proxy, err := http.ProxyFromEnvironment(req)
			if proxy == nil || err != nil {
				return nil, err
			}
			port, err := portOf(proxy)
			if err != nil {
				return nil, err
			}
			proxies.Store(net.JoinHostPort(proxy.Hostname(), strconv.Itoa(int(port))), true)
			return proxy, p.CheckURL(req.Context(), req.URL)
		},
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if _, ok := proxies.Load(address); !ok {
				return p.DialContext(ctx, network, address)
			}
			return p.dial(ctx, network, address, func(host string, to netip.AddrPort) error {
				host, to = plain(host, to)
				return p.checkRanges(host, to, nil)
			})
		},
		MaxIdleConns:          30,
		MaxIdleConnsPerHost:   4,
		IdleConnTimeout:       idleTimeout,
		TLSHandshakeTimeout:   handshakeTimeout,
		ExpectContinueTimeout: continueTimeout,
		TLSNextProto:          map[string]func(string, *tls.Conn) http.RoundTripper{},
	}
}
