package escape

import (
	"io"
	"net/http"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// oracle is an HTTP server that notes who gets through to it.
type oracle struct {
	// URL has no slash at its end; Address is its host and port.
	URL, Address string

	mu       sync.Mutex
	requests []*http.Request
}

// secretBody is what an oracle answers that has no handler. It never may be in
// anything that a build makes.
const secretBody = "canary-of-an-internal-service"

// oracle serves h on the node at address, such as "127.0.0.1:0"; nil: it answers
// secretBody.
func (w *world) oracle(t *testing.T, address string, h http.Handler) *oracle {
	t.Helper()
	return w.serve(t, false, address, h)
}

// outsideOracle serves h outside of the node, where builds may get.
func (w *world) outsideOracle(t *testing.T, h http.Handler) *oracle {
	t.Helper()
	return w.serve(t, true, outsideAddress+":0", h)
}

func (w *world) serve(t *testing.T, outside bool, address string, h http.Handler) *oracle {
	t.Helper()
	if h == nil {
		h = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, secretBody) })
	}
	l := w.listen(t, outside, address)
	o := &oracle{Address: l.Addr().String(), URL: "http://" + l.Addr().String()}
	s := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		o.mu.Lock()
		o.requests = append(o.requests, r.Clone(r.Context()))
		o.mu.Unlock()
		h.ServeHTTP(rw, r)
	})}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		<-served
	})
	return o
}

// Requests returns what has come so far.
func (o *oracle) Requests() []*http.Request {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]*http.Request(nil), o.requests...)
}

// serveFile serves a file, where builds may fetch from, under a name that the server
// says.
func (w *world) serveFile(t *testing.T, name string) *oracle {
	t.Helper()
	return w.outsideOracle(t, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Disposition", `attachment; filename="`+name+`"`)
		_, _ = io.WriteString(rw, "content")
	}))
}
