package egress

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kiln-build/kiln/sandbox/egress/egresstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// web is a server on loopback that counts requests, and its port.
func web(t *testing.T, h http.HandlerFunc) (port string, asked *atomic.Int32) {
	t.Helper()
	asked = &atomic.Int32{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		h(w, r)
	}))
	t.Cleanup(s.Close)
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	require.NoError(t, err)
	return port, asked
}

func hello(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }

func get(t *testing.T, p *Policy, url string) error {
	t.Helper()
	tr := p.Transport()
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

func TestEverySpellingOfLoopbackIsDenied(t *testing.T) {
	port, asked := web(t, hello)
	p := &Policy{}
	for _, host := range []string{"127.0.0.1", "localhost", "127.8.8.8", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]", "[::ffff:0:0]"} {
		err := get(t, p, "http://"+host+":"+port)
		var denied *DeniedError
		require.ErrorAs(t, err, &denied, host)
		require.Contains(t, err.Error(), "fetch.allow")
	}
	// The C library takes these for addresses; whoever resolves them, they do not connect.
	for _, host := range []string{"2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1"} {
		require.Error(t, get(t, p, "http://"+host+":"+port), host)
	}
	require.Zero(t, asked.Load())
}

func TestExceptionConnects(t *testing.T) {
	port, asked := web(t, hello)
	e, err := ParseExceptions([]string{"127.0.0.1:" + port})
	require.NoError(t, err)
	require.NoError(t, get(t, &Policy{Exceptions: e}, "http://127.0.0.1:"+port))
	require.EqualValues(t, 1, asked.Load())
}

func TestNamesOfDeniedAddresses(t *testing.T) {
	port, asked := web(t, hello)
	p := &Policy{Resolver: egresstest.Names(t, func(name string) netip.Addr {
		return map[string]netip.Addr{
			"four.example": netip.MustParseAddr("127.0.0.1"), "six.example": netip.MustParseAddr("::1"), "mapped.example": netip.MustParseAddr("::ffff:127.0.0.1"),
		}[name]
	})}
	for _, host := range []string{"four.example", "six.example", "mapped.example"} {
		err := get(t, p, "http://"+host+":"+port)
		var denied *DeniedError
		require.ErrorAs(t, err, &denied, host)
		require.Equal(t, host, denied.Host)
	}
	require.Zero(t, asked.Load())
	// A name that is trusted is trusted wherever it leads.
	var err error
	p.Exceptions, err = ParseExceptions([]string{"four.example"})
	require.NoError(t, err)
	require.NoError(t, get(t, p, "http://four.example:"+port))
	require.EqualValues(t, 1, asked.Load())
}

// TestRebinding has a name whose address is allowed when it is asked for first,
// and denied from then on.
func TestRebinding(t *testing.T) {
	port, asked := web(t, hello)
	var lookups atomic.Int32
	p := &Policy{Resolver: egresstest.Names(t, func(string) netip.Addr {
		if lookups.Add(1) <= 2 { // A and AAAA
			return netip.MustParseAddr("93.184.216.34")
		}
		return netip.MustParseAddr("127.0.0.1")
	})}
	u := &url.URL{Scheme: "http", Host: "rebind.example:" + port}
	require.NoError(t, p.CheckURL(t.Context(), u))
	var denied *DeniedError
	require.ErrorAs(t, get(t, p, u.String()), &denied)
	require.Zero(t, asked.Load())
}

func TestRedirectToDenied(t *testing.T) {
	secret, asked := web(t, hello)
	front, _ := web(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://127.0.0.1:"+secret, http.StatusFound)
	})
	e, err := ParseExceptions([]string{"127.0.0.1:" + front})
	require.NoError(t, err)
	var denied *DeniedError
	require.ErrorAs(t, get(t, &Policy{Exceptions: e}, "http://127.0.0.1:"+front), &denied)
	require.Zero(t, asked.Load())
	require.NoError(t, get(t, &Policy{Exceptions: append(e, Exception{prefix: netip.MustParsePrefix("127.0.0.0/8")})}, "http://127.0.0.1:"+front))
	require.EqualValues(t, 1, asked.Load())
}

func TestOtherNetworksAreNotDialed(t *testing.T) {
	for _, network := range []string{"unix", "udp", "ip", ""} {
		_, err := (&Policy{}).DialContext(t.Context(), network, "93.184.216.34:80")
		require.ErrorContains(t, err, "is not for builds", network)
	}
	_, err := (&Policy{}).DialContext(t.Context(), "tcp", "no port")
	require.Error(t, err)
}

func TestURLs(t *testing.T) {
	p := world()
	for raw, want := range map[string]string{
		"http://169.254.169.254/x": ":80 ", "https://127.0.0.1/": ":443 ", "https://[::1]:7/": "::1]:7 ", "ssh://git@10.9.8.7/r": ":22 ", "git://127.0.0.1/r": ":9418 ",
	} {
		u, err := url.Parse(raw)
		require.NoError(t, err)
		require.ErrorContains(t, p.CheckURL(t.Context(), u), want)
	}
	require.NoError(t, p.CheckURL(t.Context(), &url.URL{Scheme: "https", Host: "10.1.2.3"}))
	require.Error(t, p.CheckURL(t.Context(), &url.URL{Scheme: "https", Host: "10.1.2.3:99999"}))
}
