package escape

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/egress/egresstest"
)

// All spellings of addresses are in the tests of sandbox/egress and agent/engine;
// these go through a build.
var _ = register(
	entry{
		ID: "http/addresses", Severity: readsNode, Once: noStep,
		Threat: "ADD fetches from the metadata service, the node's loopback or the node's own address.",
		Test:   httpAddresses, Off: httpAddressesOff, Without: "the policy of what the agent fetches",
	},
	entry{
		ID: "http/redirect", Severity: readsNode, Once: noStep,
		Threat: "A server on the internet redirects the agent to the metadata service or the node's loopback.",
		Test:   httpRedirect, Off: httpRedirectOff, Without: "the policy of what the agent fetches",
	},
	entry{
		ID: "http/rebinding", Severity: readsNode, Once: noStep,
		Threat: "A name has a harmless address when it is checked, and one of the node's when it is connected to.",
		Test:   httpRebinding, Off: httpRebindingOff, Without: "the check of the address that the kernel connects to",
	},
	entry{
		ID: "http/file-name", Severity: escapesToNode, Once: noStep,
		Threat: "A server's Content-Disposition or a URL names a file with parents, slashes, NUL or line breaks, so that what is fetched is written elsewhere.",
		Test:   httpFileName,
	},
	entry{
		ID: "http/credentials-redirect", Severity: readsNode, Once: noStep,
		Threat: "A server that gets a build's HTTP credentials redirects to another host, for the agent to repeat them there.",
		Test:   httpCredentialsRedirect, Off: credentialsRedirectPlain, Without: "the rule that a redirect to another host loses them",
	},
)

// unpoliced returns e with a node that may fetch from anywhere.
func (e *env) unpoliced(t *testing.T) *env {
	t.Helper()
	w := *e.world
	w.Root = filepath.Join(t.TempDir(), "root")
	w.Node = w.open(t, w.Root, nil)
	return &env{world: &w, Class: e.Class}
}

// internal are servers that no build may reach.
func internal(t *testing.T, e *env) []*oracle {
	t.Helper()
	return []*oracle{e.oracle(t, metadataAddress+":80", nil), e.oracle(t, "127.0.0.1:0", nil), e.oracle(t, nodeAddress+":0", nil)}
}

func (e *env) add(t *testing.T, url string) result {
	t.Helper()
	return e.Build(t, build{Dockerfile: "FROM scratch\nADD " + url + " /got\n"})
}

func httpAddresses(t *testing.T, e *env) {
	for _, o := range internal(t, e) {
		r := e.add(t, o.URL+"/x")
		require.ErrorContains(t, r.Err, "denied for builds", o.URL)
		require.NotContains(t, r.Log+r.Err.Error(), secretBody)
		require.Empty(t, o.Requests())
	}
}

func httpAddressesOff(t *testing.T, e *env) bool {
	e = e.unpoliced(t)
	for _, o := range internal(t, e) {
		if e.add(t, o.URL+"/x").Read(t, "got") != secretBody {
			return false
		}
	}
	return true
}

func redirectTo(url string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, url, http.StatusTemporaryRedirect)
	})
}

func httpRedirect(t *testing.T, e *env) {
	for _, o := range internal(t, e) {
		front := e.outsideOracle(t, redirectTo(o.URL+"/x"))
		r := e.add(t, front.URL+"/x")
		require.ErrorContains(t, r.Err, "denied for builds", o.URL)
		require.NotEmpty(t, front.Requests())
		require.Empty(t, o.Requests())
	}
}

func httpRedirectOff(t *testing.T, e *env) bool {
	e = e.unpoliced(t)
	for _, o := range internal(t, e) {
		if e.add(t, e.outsideOracle(t, redirectTo(o.URL+"/x")).URL+"/x").Read(t, "got") != secretBody {
			return false
		}
	}
	return true
}

// rebinding returns a policy whose names have a harmless address at the first look-up
// and the node's loopback later, and the URL of a server there.
func rebinding(t *testing.T, e *env) (*egress.Policy, *oracle, string) {
	t.Helper()
	o := e.oracle(t, "127.0.0.1:0", nil)
	var lookups atomic.Int32
	p := &egress.Policy{Resolver: egresstest.Names(t, func(string) netip.Addr {
		if lookups.Add(1) <= 2 { // one for each kind of address
			return netip.MustParseAddr(outsideAddress)
		}
		return netip.MustParseAddr("127.0.0.1")
	})}
	_, port, err := net.SplitHostPort(o.Address)
	require.NoError(t, err)
	return p, o, "http://rebind.example:" + port + "/"
}

// fetch checks a URL first, and then gets it by a transport.
func fetch(t *testing.T, p *egress.Policy, tr *http.Transport, url string) (string, error) {
	t.Helper()
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	require.NoError(t, p.CheckURL(t.Context(), req.URL), "the first address is a good one")
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func httpRebinding(t *testing.T, e *env) {
	p, o, url := rebinding(t, e)
	_, err := fetch(t, p, p.Transport(), url)
	var denied *egress.DeniedError
	require.ErrorAs(t, err, &denied)
	require.Empty(t, o.Requests())
}

func httpRebindingOff(t *testing.T, e *env) bool {
	p, _, url := rebinding(t, e)
	got, err := fetch(t, p, &http.Transport{DialContext: (&net.Dialer{Resolver: p.Resolver}).DialContext}, url)
	require.NoError(t, err)
	return got == secretBody
}

func httpFileName(t *testing.T, e *env) {
	outside := filepath.Join(t.TempDir(), "kiln-marker")
	up := strings.Repeat("../", 20)
	guard := newGuard(t, e, nil)
	for _, name := range []string{
		up + outside[1:], outside, "..", ".", "", "/", "a/../../b", `..\..\b`, ".wh.got", ".wh..wh..opq", "kiln-marker\x00x", "kiln-marker\nx", strings.Repeat("x", 10_000), "%2e%2e%2fb",
	} {
		s := e.oracle(t, allowedLoopback+":0", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Disposition", `attachment; filename="`+strings.NewReplacer("\n", "%0a", "\x00", "%00").Replace(name)+`"; filename*=UTF-8''`+strings.ReplaceAll(name, "/", "%2F"))
			_, _ = io.WriteString(w, "x")
		}))
		for _, path := range []string{"/", "/x", "/..%2f..%2fkiln-marker", "/.."} {
			r := e.Build(t, build{Dockerfile: "FROM scratch\nADD " + s.URL + path + " /dst/\n"})
			require.NoFileExists(t, outside)
			if r.Err == nil {
				entries, err := os.ReadDir(r.Dir)
				require.NoError(t, err)
				require.Len(t, entries, 1, "%q put something beside /dst", name)
			}
		}
	}
	guard.finish(t)
}

func httpCredentialsRedirect(t *testing.T, e *env) {
	away := e.outsideOracle(t, nil)
	front := e.oracle(t, allowedLoopback+":0", redirectTo(away.URL+"/x"))
	for _, secret := range []string{"HTTP_AUTH_TOKEN_", "HTTP_AUTH_HEADER_"} {
		before := len(away.Requests())
		r := e.Build(t, build{Dockerfile: "FROM scratch\nADD " + front.URL + "/x /got\n", Secrets: map[string]string{secret + allowedLoopback: e.Canary}})
		require.NoError(t, r.Err)
		require.True(t, front.leaked(), "the server itself gets them")
		require.Greater(t, len(away.Requests()), before)
		require.False(t, away.leaked(), "the credentials went to another host")
		e.CheckNode(t, r)
	}
}

// credentialsRedirectPlain has a client that sends on every redirect what it sent
// first.
func credentialsRedirectPlain(t *testing.T, e *env) bool {
	away := e.outsideOracle(t, nil)
	front := e.oracle(t, allowedLoopback+":0", redirectTo(away.URL+"/x"))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, front.URL, nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+e.Canary)
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		req.Header = via[0].Header
		return nil
	}}
	resp, err := client.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	return away.leaked()
}

// lieTime is how long a build with a server that stalls is given.
const lieTime = 3 * time.Second

// endless sends until the client has had enough.
func endless(w http.ResponseWriter, r *http.Request) {
	buf := make([]byte, 64<<10)
	for r.Context().Err() == nil {
		if _, err := w.Write(buf); err != nil {
			return
		}
	}
}

func stall(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
