package gitcmd

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox/egress"
)

// TestProxyOfTheEnvironment has a proxy of the environment for HTTPS, which knows a
// name that nobody else does.
func TestProxyOfTheEnvironment(t *testing.T) {
	target, asked := listen(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	corporate := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Header.Get("Proxy-Authorization") != "Basic dTpw" || r.Host != "only.proxy.invalid:443" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		there, err := net.Dial("tcp", target)
		if err != nil {
			return
		}
		defer there.Close()
		here, in, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer here.Close()
		_, _ = io.WriteString(here, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(there, in) }()
		_, _ = io.Copy(here, there)
	}))
	t.Cleanup(corporate.Close)
	upstream, err := url.Parse(corporate.URL)
	require.NoError(t, err)
	upstream.User = url.UserPassword("u", "p")

	for _, tt := range []struct {
		allow        []string
		host, header string
		status       int
	}{
		{[]string{upstream.Host}, "only.proxy.invalid:443", "", http.StatusOK},
		{[]string{upstream.Host}, "only.proxy.invalid:443", "1", http.StatusBadGateway},
		{[]string{upstream.Host}, "127.0.0.1:443", "", http.StatusForbidden},
		{[]string{upstream.Host}, "other.proxy.invalid:443", "", http.StatusBadGateway},
		{nil, "only.proxy.invalid:443", "", http.StatusForbidden},
	} {
		exceptions, err := egress.ParseExceptions(tt.allow)
		require.NoError(t, err)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		bound, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		p := startProxy(l, bound, &egress.Policy{Exceptions: exceptions})
		p.upstream = http.ProxyURL(upstream)
		conn, err := net.Dial("tcp", l.Addr().String())
		require.NoError(t, err)
		req, err := http.NewRequest(http.MethodConnect, "http://"+tt.host, nil)
		require.NoError(t, err)
		if tt.header != "" {
			req.Header.Set(directHeader, tt.header)
		}
		before := asked.Load()
		status, err := page(conn, req)
		require.NoError(t, err)
		require.Equal(t, tt.status, status, "%+v", tt)
		if tt.status == http.StatusOK {
			require.Greater(t, asked.Load(), before)
		} else {
			require.Equal(t, before, asked.Load())
		}
		require.NoError(t, conn.Close())
		require.NoError(t, p.close())
	}
}

// page asks a proxy for a connection and, when it has one, for a page.
func page(conn net.Conn, req *http.Request) (int, error) {
	if err := req.Write(conn); err != nil {
		return 0, err
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return resp.StatusCode, resp.Body.Close()
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return 0, err
	}
	got, err := http.ReadResponse(in, nil)
	if err != nil {
		return 0, err
	}
	defer got.Body.Close()
	_, err = io.Copy(io.Discard, got.Body)
	return got.StatusCode, err
}
