package gitcmd

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/kiln-build/kiln/sandbox/egress"
)

// headerTimeout bounds how long git may take to say where it wants to.
const headerTimeout = 30 * time.Second

// proxy is an HTTP proxy that connects by a policy. It serves git's namespace only.
type proxy struct {
	policy *egress.Policy
	// upstream returns the proxy that a request has to use, nil for none.
	upstream  func(*http.Request) (*url.URL, error)
	server    *http.Server
	transport *http.Transport
	served    sync.WaitGroup
	tunnels   sync.WaitGroup
	// ctx ends with the proxy.
	ctx  context.Context
	stop context.CancelFunc
}

// startProxy serves l, and bound for connections to one host, until close.
func startProxy(l, bound net.Listener, policy *egress.Policy) *proxy {
	p := &proxy{policy: policy, upstream: http.ProxyFromEnvironment, transport: policy.Transport()}
	p.ctx, p.stop = context.WithCancel(context.Background())
	forward := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.Out.Host = r.In.Host },
		Transport:     p.transport,
		FlushInterval: -1,
		ErrorHandler:  func(w http.ResponseWriter, r *http.Request, err error) { p.refuse(w, r.Host, err) },
	}
	p.server = &http.Server{
		ReadHeaderTimeout: headerTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Context().Value(http.LocalAddrContextKey).(net.Addr).String() == bound.Addr().String() && !p.mayReach(w, r) {
				return
			}
			switch {
			case r.Method == http.MethodConnect:
				p.tunnel(w, r)
			case r.URL.Scheme == "http" && r.URL.Host != "":
				forward.ServeHTTP(w, r)
			default:
				http.Error(w, "this is a proxy", http.StatusBadRequest)
			}
		}),
	}
	for _, l := range []net.Listener{l, bound} {
		p.served.Go(func() { _ = p.server.Serve(l) }) // ends with close
	}
	return p
}

// close ends all connections and waits for what serves them.
func (p *proxy) close() error {
	p.stop()
	err := p.server.Close()
	p.served.Wait()
	p.tunnels.Wait()
	p.transport.CloseIdleConnections()
	return err
}

// refuse answers why there is no connection. git shows plain text of HTTP's errors
// to the user.
func (p *proxy) refuse(w http.ResponseWriter, host string, err error) {
	code := http.StatusBadGateway
	var denied *egress.DeniedError
	if errors.As(err, &denied) {
		code, err = http.StatusForbidden, denied
		logrus.WithError(denied).Warn("git was kept from an address")
	}
	if p.ctx.Err() != nil {
		err = errors.New("the agent ends")
	}
	http.Error(w, "connect to "+host+": "+err.Error(), code)
}

// tunnel serves CONNECT: it connects both sides until one of them is done.
func (p *proxy) tunnel(w http.ResponseWriter, r *http.Request) {
	p.tunnels.Add(1)
	defer p.tunnels.Done()
	there, err := p.dial(r, r.Host)
	if err != nil {
		p.refuse(w, r.Host, err)
		return
	}
	defer there.Close()
	here, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		p.refuse(w, r.Host, err)
		return
	}
	defer here.Close()
	stop := context.AfterFunc(p.ctx, func() {
		here.Close()
		there.Close()
	})
	defer stop()
	if _, err := io.WriteString(here, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	var out sync.WaitGroup
	out.Go(func() {
		_, _ = io.Copy(there, buffered)
		closeWrite(there)
	})
	_, _ = io.Copy(here, there)
	closeWrite(here)
	// What git still has to say has nobody to read it.
	there.Close()
	here.Close()
	out.Wait()
}

func closeWrite(c net.Conn) {
	if t, ok := c.(interface{ CloseWrite() error }); ok {
		_ = t.CloseWrite()
	}
}
