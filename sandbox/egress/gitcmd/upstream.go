package gitcmd

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// directHeader marks requests of the command for other protocols, which proxies of
// the environment are not for.
const directHeader = "Kiln-Direct"

// dial connects to address, host:port, for CONNECT: by the proxy that the environment
// names for HTTPS, if there is one.
func (p *proxy) dial(r *http.Request, address string) (net.Conn, error) {
	target := &http.Request{URL: &url.URL{Scheme: "https", Host: address}}
	if r.Header.Get(directHeader) != "" {
		return p.policy.DialContext(r.Context(), "tcp", address)
	}
	upstream, err := p.upstream(target)
	if err != nil {
		return nil, fmt.Errorf("find proxy of the environment: %w", err)
	}
	if upstream == nil {
		return p.policy.DialContext(r.Context(), "tcp", address)
	}
	if upstream.Scheme != "http" && upstream.Scheme != "https" {
		return nil, fmt.Errorf("proxy of the environment: git cannot use %s here, only http and https", upstream.Scheme)
	}
	if err := p.policy.CheckURL(r.Context(), target.URL); err != nil {
		return nil, err
	}
	conn, err := p.policy.DialContext(r.Context(), "tcp", hostPort(upstream))
	if err != nil {
		return nil, fmt.Errorf("reach proxy of the environment: %w", err)
	}
	if upstream.Scheme == "https" {
		conn = tls.Client(conn, &tls.Config{ServerName: upstream.Hostname()})
	}
	through, err := connectThrough(r.Context(), conn, upstream, address)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("connect by the proxy of the environment: %w", err)
	}
	return through, nil
}

// connectThrough asks the proxy at the other end of conn for a connection to address.
func connectThrough(ctx context.Context, conn net.Conn, upstream *url.URL, address string) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{}}
	if user := upstream.User; user != nil {
		password, _ := user.Password()
		basic := &http.Request{Header: http.Header{}}
		basic.SetBasicAuth(user.Username(), password)
		req.Header.Set("Proxy-Authorization", basic.Header.Get("Authorization"))
	}
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answers %s", resp.Status)
	}
	return &buffered{conn, in}, nil
}

// buffered is a connection of which a part was read ahead.
type buffered struct {
	net.Conn
	in io.Reader
}

func (b *buffered) Read(p []byte) (int, error) { return b.in.Read(p) }

// CloseWrite ends what is sent.
func (b *buffered) CloseWrite() error {
	if c, ok := b.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// hostPort returns the address of a proxy.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443"}[u.Scheme]
		if port == "" {
			port = "80"
		}
	}
	return net.JoinHostPort(u.Hostname(), port)
}
