package escape

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(
	entry{
		ID: "registry/token-realm", Severity: readsNode, Once: noStep,
		Threat: "A registry says that its tokens come from the node's loopback, from the metadata service, or from another host whose credentials the build has.",
		Test:   registryTokenRealm, Off: registryTokenRealmOff, Without: "the policy of what the agent fetches",
	},
	entry{
		ID: "registry/redirect-credentials", Severity: readsNode, Once: noStep,
		Threat: "A registry redirects blobs and manifests to another host, for the agent to repeat the registry's credentials there.",
		Test:   registryRedirect, Off: credentialsRedirectPlain, Without: "the rule that a redirect to another host loses them",
	},
	entry{
		ID: "registry/foreign-layers", Severity: readsNode, Once: noStep,
		Threat: "A manifest's layers have URLs at the node's loopback or the metadata service, or at a host that is to get the registry's credentials.",
		Test:   registryForeign,
	},
	entry{
		ID: "registry/challenge", Severity: takesNodeDown, Once: noStep,
		Threat: "A registry's WWW-Authenticate is huge, not closed, or names realms that are no web address.",
		Test:   registryChallenge,
	},
	entry{
		ID: "registry/lies", Severity: takesNodeDown, Once: noStep,
		Threat: "A registry stalls, sends without end, ends early, or sends other bytes than digest and size say, for manifests and layers.",
		Test:   registryLies,
	},
)

// credentials are a build's for hosts, which a client offers.
type credentials struct {
	auth.UnimplementedAuthServer
	of map[string]string
}

var _ session.Attachable = (*credentials)(nil)

func (c *credentials) Register(s *grpc.Server) { auth.RegisterAuthServer(s, c) }

func (c *credentials) Credentials(_ context.Context, req *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	if secret := c.of[req.Host]; secret != "" {
		return &auth.CredentialsResponse{Username: "user", Secret: secret}, nil
	}
	return &auth.CredentialsResponse{}, nil
}

// hostileRegistry serves one image as NAME:latest, until instead has another answer.
type hostileRegistry struct {
	*oracle
	image   hostile.Image
	instead func(w http.ResponseWriter, r *http.Request, what string) bool
}

// registryOf serves an image where builds may fetch. instead is asked first for each
// request with what it is for: "" (the API itself), "manifests" or "blobs".
func registryOf(t *testing.T, e *env, im hostile.Image, instead func(w http.ResponseWriter, r *http.Request, what string) bool) *hostileRegistry {
	t.Helper()
	reg := &hostileRegistry{image: im, instead: instead}
	reg.oracle = e.oracle(t, allowedLoopback+":0", reg)
	return reg
}

func (reg *hostileRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	what, ref := "", ""
	if len(parts) >= 4 {
		what, ref = parts[len(parts)-2], parts[len(parts)-1]
	}
	if reg.instead != nil && reg.instead(w, r, what) {
		return
	}
	if what == "" {
		return
	}
	d := reg.image.Manifest
	if ref != "latest" {
		d = ocispecs.Descriptor{MediaType: "application/octet-stream"}
		for digest := range reg.image.Blobs {
			if digest.String() == ref {
				d.Digest = digest
			}
		}
		if ref == reg.image.Manifest.Digest.String() {
			d = reg.image.Manifest
		}
	}
	data, ok := reg.image.Blobs[d.Digest]
	if !ok {
		http.Error(w, "not here", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", d.MediaType)
	w.Header().Set("Docker-Content-Digest", d.Digest.String())
	w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	if r.Method != http.MethodHead {
		_, _ = w.Write(data)
	}
}

// pull builds FROM the registry's image.
func (reg *hostileRegistry) pull(t *testing.T, ctx context.Context, e *env, creds map[string]string) result {
	t.Helper()
	return e.BuildContext(t, ctx, build{Dockerfile: "FROM " + reg.Address + "/image\nCOPY <<X /after\ny\nX\n", Session: []session.Attachable{&credentials{of: creds}}})
}

// imageOf is an image with one file of random bytes.
func imageOf(t *testing.T, change func(*ocispecs.Image, *ocispecs.Manifest)) hostile.Image {
	t.Helper()
	return hostile.NewImage([][]byte{hostile.Tar(hostile.Plain, hostile.Entry{Type: hostile.File, Name: "file", Mode: 0o644, Body: random(t)})}, change)
}

// withRealm is a registry that wants a token from a realm.
func withRealm(t *testing.T, e *env, realm string) *hostileRegistry {
	t.Helper()
	return registryOf(t, e, imageOf(t, nil), func(w http.ResponseWriter, r *http.Request, _ string) bool {
		if r.Header.Get("Authorization") != "" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm+`",service="x"`)
		http.Error(w, "who are you?", http.StatusUnauthorized)
		return true
	})
}

func registryTokenRealm(t *testing.T, e *env) {
	for _, o := range internal(t, e) {
		reg := withRealm(t, e, o.URL+"/token")
		r := reg.pull(t, t.Context(), e, map[string]string{reg.Address: e.Canary})
		require.ErrorContains(t, r.Err, "denied for builds", o.URL)
		require.Empty(t, o.Requests())
		e.CheckNode(t, r)
	}
	// The build has credentials for the realm's host, and none for the registry.
	realm := e.outsideOracle(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"token":"x"}`) }))
	reg := withRealm(t, e, realm.URL+"/token")
	r := reg.pull(t, t.Context(), e, map[string]string{realm.Address: e.Canary, outsideAddress: e.Canary})
	require.NoError(t, r.Err)
	require.NotEmpty(t, realm.Requests())
	require.False(t, realm.leaked(), "a registry's challenge got another host's credentials out")
}

func registryTokenRealmOff(t *testing.T, e *env) bool {
	e = e.unpoliced(t)
	for _, o := range internal(t, e) {
		reg := withRealm(t, e, o.URL+"/token")
		_ = reg.pull(t, t.Context(), e, nil)
		if len(o.Requests()) == 0 {
			return false
		}
	}
	return true
}

func registryRedirect(t *testing.T, e *env) {
	im := imageOf(t, nil)
	away := e.outsideOracle(t, &hostileRegistry{image: im})
	for _, redirected := range []string{"blobs", "manifests"} {
		reg := registryOf(t, e, im, func(w http.ResponseWriter, r *http.Request, what string) bool {
			if user, password, _ := r.BasicAuth(); user != "user" || password != e.Canary {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				http.Error(w, "who are you?", http.StatusUnauthorized)
				return true
			}
			if what != redirected {
				return false
			}
			http.Redirect(w, r, away.URL+r.URL.RequestURI(), http.StatusTemporaryRedirect)
			return true
		})
		before := len(away.Requests())
		r := reg.pull(t, t.Context(), e, map[string]string{reg.Address: e.Canary, outsideAddress: e.Canary, away.Address: e.Canary})
		require.NoError(t, r.Err)
		require.True(t, reg.leaked(), "the registry itself gets them")
		require.Greater(t, len(away.Requests()), before)
		require.False(t, away.leaked(), "the credentials went to another host")
		e.CheckNode(t, r)
	}
}

func registryForeign(t *testing.T, e *env) {
	inside := internal(t, e)
	away := e.outsideOracle(t, http.HandlerFunc(stallNever))
	var urls []string
	for _, o := range append(inside, away) {
		urls = append(urls, o.URL+"/layer")
	}
	urls = append(urls, "file://"+e.CanaryFile, "unix:///run/x", "http+unix://%2frun%2fx/layer")
	im := imageOf(t, func(_ *ocispecs.Image, m *ocispecs.Manifest) {
		m.Layers[0].URLs = urls
		m.Layers[0].MediaType = "application/vnd.oci.image.layer.nondistributable.v1.tar"
	})
	layer := im.Blobs
	reg := registryOf(t, e, im, func(w http.ResponseWriter, r *http.Request, what string) bool {
		if user, _, _ := r.BasicAuth(); user == "" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return true
		}
		if what != "blobs" {
			return false
		}
		for d, data := range layer {
			if strings.HasSuffix(r.URL.Path, d.String()) && len(data)%512 == 0 { // the layer: only its URLs have it
				http.Error(w, "not here", http.StatusNotFound)
				return true
			}
		}
		return false
	})
	r := reg.pull(t, t.Context(), e, map[string]string{reg.Address: e.Canary, outsideAddress: e.Canary, away.Address: e.Canary})
	require.Error(t, r.Err)
	for _, o := range inside {
		require.Empty(t, o.Requests(), o.URL)
	}
	require.False(t, away.leaked())
	e.CheckNode(t, r)
}

func stallNever(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "not here", http.StatusNotFound)
}

func registryChallenge(t *testing.T, e *env) {
	grown := peakMemory(t)
	for _, challenge := range []string{
		"", "Bearer", `Bearer realm="`, `Bearer realm="",service=""`, `Bearer realm="file://` + e.CanaryFile + `"`, `Bearer realm="gopher://127.0.0.1/"`, `Bearer realm="http://[::1"`, `Bearer realm="//127.0.0.1/x"`,
		`Bearer realm="http://` + outsideAddress + `:1/"`, "Bearer " + strings.Repeat(`a="b",`, 100_000), "Basic " + strings.Repeat(`"`, 900_000), `Digest realm="x"`, `NTLM`, "Negotiate", `Bearer realm="http://\"x"`, "\x7f\x01", strings.Repeat("Bearer ", 50_000),
	} {
		reg := registryOf(t, e, imageOf(t, nil), func(w http.ResponseWriter, _ *http.Request, _ string) bool {
			w.Header().Set("WWW-Authenticate", challenge)
			http.Error(w, strings.Repeat("x", 1<<20), http.StatusUnauthorized)
			return true
		})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		r := reg.pull(t, ctx, e, map[string]string{reg.Address: e.Canary})
		cancel()
		require.Error(t, r.Err, "%.100q", challenge)
		require.Less(t, len(r.Err.Error()), 64<<10, "the error repeats what the registry says")
		e.CheckNode(t, r)
	}
	require.Less(t, grown(), int64(256<<20))
}

func registryLies(t *testing.T, e *env) {
	e = e.small(t)
	grown := peakMemory(t)
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"stall": stall, "endless": endless,
		"short": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000000")
			_, _ = io.WriteString(w, "{")
		},
		"other bytes": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"schemaVersion":2}`) },
		"nothing":     func(http.ResponseWriter, *http.Request) {},
		"500":         func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusInternalServerError) },
		"429": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "86400")
			http.Error(w, "later", http.StatusTooManyRequests)
		},
		"redirect to itself": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.String(), http.StatusFound) },
	} {
		for _, lied := range []string{"manifests", "blobs"} {
			reg := registryOf(t, e, imageOf(t, nil), func(w http.ResponseWriter, r *http.Request, what string) bool {
				if what == lied && r.Method != http.MethodHead {
					answer(w, r)
					return true
				}
				return false
			})
			ctx, cancel := context.WithTimeout(t.Context(), lieTime)
			start := time.Now()
			r := reg.pull(t, ctx, e, nil)
			cancel()
			took := time.Since(start)
			require.Error(t, r.Err, "%s for %s", name, lied)
			require.Less(t, took, lieTime+10*time.Second, "%s for %s: it ends when it is cancelled", name, lied)
			t.Logf("%s for %s: %v: %.160v", name, lied, took.Round(time.Millisecond), r.Err)
		}
	}
	require.Less(t, grown(), int64(256<<20))
	e.reclaimed(t)
	e.healthy(t)
}
