package nodestore

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// registry is a host that serves blobs over loopback and records requests.
type registry struct {
	*httptest.Server
	blobs map[digest.Digest][]byte
	// answer, when it is set, answers instead of serving blobs; it returns false to
	// have the blob served after all.
	answer func(w http.ResponseWriter, r *http.Request) bool

	mu       sync.Mutex
	requests []string
	sent     int
}

func newRegistry(t *testing.T) *registry {
	t.Helper()
	r := &registry{blobs: map[digest.Digest][]byte{}}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

// host is the registry as image names have it.
func (r *registry) host() string { return strings.TrimPrefix(r.URL, "http://") }

func (r *registry) add(data string) ocispecs.Descriptor {
	blob := digest.FromString(data)
	r.blobs[blob] = []byte(data)
	return ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayer, Digest: blob, Size: int64(len(data))}
}

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = append(r.requests, req.Method+" "+req.URL.Path)
	if r.answer != nil && r.answer(w, req) {
		return
	}
	_, name, _ := strings.Cut(req.URL.Path, "/blobs/")
	data, ok := r.blobs[digest.Digest(name)]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	from := 0
	if s, ok := strings.CutPrefix(req.Header.Get("Range"), "bytes="); ok {
		from, _ = strconv.Atoi(strings.TrimSuffix(s, "-"))
		w.Header().Set("Content-Range", "bytes "+strconv.Itoa(from)+"-"+strconv.Itoa(len(data)-1)+"/"+strconv.Itoa(len(data)))
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(data)-from))
	if from > 0 {
		w.WriteHeader(http.StatusPartialContent)
	}
	if req.Method == http.MethodGet {
		n, _ := w.Write(data[from:])
		r.sent += n
	}
}

func (r *registry) log() (requests []string, sent int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.requests, r.sent
}

// puller pulls through a node.
type puller struct {
	t       *testing.T
	fetcher func(repo string) remotes.Fetcher
	mu      sync.Mutex
	loans   []Loan
}

func newPuller(t *testing.T, node Node) *puller {
	t.Helper()
	p := &puller{t: t}
	base := &http.Transport{}
	t.Cleanup(base.CloseIdleConnections)
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost), docker.WithClient(&http.Client{Transport: base}))
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: Lending(hosts, node, func(l Loan) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.loans = append(p.loans, l)
	})})
	p.fetcher = func(repo string) remotes.Fetcher {
		f, err := resolver.Fetcher(context.Background(), repo+":latest")
		require.NoError(t, err)
		return f
	}
	return p
}

func (p *puller) fetch(repo string, desc ocispecs.Descriptor) (string, error) {
	rc, err := p.fetcher(repo).Fetch(context.Background(), desc)
	if err != nil {
		return "", err
	}
	defer rc.Close()
	data, err := io.ReadAll(rc)
	return string(data), err
}

func TestBlobOfTheNodeIsNotFetched(t *testing.T) {
	r, node := newRegistry(t), newMemory()
	layer := r.add(strings.Repeat("layer ", 1<<19))
	repo := r.host() + "/team/base"
	node.add(repo, layer.Digest, r.blobs[layer.Digest])
	p := newPuller(t, node)

	got, err := p.fetch(repo, layer)
	require.NoError(t, err)
	require.Equal(t, string(r.blobs[layer.Digest]), got)
	requests, sent := r.log()
	require.Equal(t, []string{"HEAD /v2/team/base/blobs/" + layer.Digest.String()}, requests)
	require.Zero(t, sent)
	require.Equal(t, []Loan{{Repository: repo, Blob: layer.Digest, Size: layer.Size}}, p.loans)
	lent, holding := node.counts()
	require.Equal(t, 1, lent)
	require.Zero(t, holding, "the hold is released")
}

func TestBlobIsFetchedWhenTheNodeCannotLend(t *testing.T) {
	for name, prepare := range map[string]func(node *memory, repo string, layer ocispecs.Descriptor, data []byte){
		"absent":                func(*memory, string, ocispecs.Descriptor, []byte) {},
		"of another repository": func(m *memory, repo string, l ocispecs.Descriptor, data []byte) { m.add(repo+"2", l.Digest, data) },
		"of another registry":   func(m *memory, _ string, l ocispecs.Descriptor, data []byte) { m.add("other:5000/r", l.Digest, data) },
		"of another size":       func(m *memory, repo string, l ocispecs.Descriptor, data []byte) { m.add(repo, l.Digest, data[1:]) },
		"runtime down":          func(m *memory, _ string, _ ocispecs.Descriptor, _ []byte) { m.down = errdefs.ErrUnavailable },
	} {
		t.Run(name, func(t *testing.T) {
			r, node := newRegistry(t), newMemory()
			layer := r.add("the layer")
			prepare(node, r.host()+"/r", layer, []byte("the layer"))
			got, err := newPuller(t, node).fetch(r.host()+"/r", layer)
			require.NoError(t, err)
			require.Equal(t, "the layer", got)
			lent, holding := node.counts()
			require.Zero(t, lent)
			require.Zero(t, holding)
		})
	}
}

// TestTenantIsLentNothingItCouldNotPull has a node with a private image, whose
// digest a tenant knows.
func TestTenantIsLentNothingItCouldNotPull(t *testing.T) {
	const secret = "a private layer"
	layer := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayer, Digest: digest.FromString(secret), Size: int64(len(secret))}
	for name, tc := range map[string]struct {
		// ownRegistry has the tenant pull from a registry of its own, which answers
		// as it likes.
		ownRegistry bool
		answer      func(w http.ResponseWriter, r *http.Request) bool
	}{
		"registry refuses the credentials": {answer: status(http.StatusForbidden)},
		"registry asks for credentials":    {answer: status(http.StatusUnauthorized)},
		"registry does not have it":        {answer: status(http.StatusNotFound)},
		"registry fails":                   {answer: status(http.StatusInternalServerError)},
		"registry redirects to nowhere": {answer: func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}},
		"tenant's registry says yes to everything": {ownRegistry: true, answer: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", strconv.Itoa(len(secret)))
			if r.Method == http.MethodGet {
				_, _ = w.Write([]byte(strings.Repeat("x", len(secret))))
			}
			return true
		}},
	} {
		t.Run(name, func(t *testing.T) {
			r, node := newRegistry(t), newMemory()
			r.answer = tc.answer
			repo := r.host() + "/private"
			if tc.ownRegistry {
				node.add("registry.example:5000/private", layer.Digest, []byte(secret))
			} else {
				node.add(repo, layer.Digest, []byte(secret))
			}
			got, _ := newPuller(t, node).fetch(repo, layer)
			require.NotContains(t, got, secret)
			lent, holding := node.counts()
			require.Zero(t, lent)
			require.Zero(t, holding)
		})
	}
}

func status(code int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(code)
		return true
	}
}

// TestPrivateImageIsLentToWhomTheRegistryKnows has a registry that asks for a
// password, as a pull with and without it sees it.
func TestPrivateImageIsLentToWhomTheRegistryKnows(t *testing.T) {
	r, node := newRegistry(t), newMemory()
	layer := r.add("a private layer")
	repo := r.host() + "/private"
	node.add(repo, layer.Digest, r.blobs[layer.Digest])
	r.answer = func(w http.ResponseWriter, req *http.Request) bool {
		if _, password, ok := req.BasicAuth(); ok && password == "right" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	for password, want := range map[string]int{"right": 1, "wrong": 0} {
		base := &http.Transport{}
		defer base.CloseIdleConnections()
		client := &http.Client{Transport: base}
		authorizer := docker.NewDockerAuthorizer(docker.WithAuthClient(client), docker.WithAuthCreds(func(string) (string, string, error) { return "user", password, nil }))
		hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost), docker.WithClient(client), docker.WithAuthorizer(authorizer))
		fetcher, err := docker.NewResolver(docker.ResolverOptions{Hosts: Lending(hosts, node, nil)}).Fetcher(context.Background(), repo+":1")
		require.NoError(t, err)
		before, _ := node.counts()
		var data []byte
		rc, err := fetcher.Fetch(context.Background(), layer)
		if err == nil {
			data, err = io.ReadAll(rc)
			rc.Close()
		}
		after, holding := node.counts()
		require.Equal(t, want, after-before, password)
		require.Zero(t, holding)
		if password == "right" {
			require.NoError(t, err)
			require.Equal(t, "a private layer", string(data))
		} else {
			require.Error(t, err)
			require.Empty(t, data)
		}
	}
	_, sent := r.log()
	require.Zero(t, sent)
}

func TestCorruptCopyFailsOnceAndIsThenFetched(t *testing.T) {
	r, node := newRegistry(t), newMemory()
	layer := r.add("the layer")
	repo := r.host() + "/r"
	node.add(repo, layer.Digest, []byte("THE LAYER"))
	p := newPuller(t, node)

	_, err := p.fetch(repo, layer)
	require.ErrorContains(t, err, layer.Digest.String())
	require.True(t, errdefs.IsDataLoss(err), err)
	_, holding := node.counts()
	require.Zero(t, holding)

	got, err := p.fetch(repo, layer)
	require.NoError(t, err)
	require.Equal(t, "the layer", got)
}

func TestCredentialsStayWithTheRegistry(t *testing.T) {
	other := newRegistry(t)
	layer := other.add("the layer")
	var leaked []string
	other.answer = func(_ http.ResponseWriter, r *http.Request) bool {
		leaked = append(leaked, r.Header.Get("Authorization"), r.Header.Get("Cookie"))
		return false
	}
	r, node := newRegistry(t), newMemory()
	r.answer = func(w http.ResponseWriter, req *http.Request) bool {
		http.Redirect(w, req, other.URL+req.URL.Path, http.StatusTemporaryRedirect)
		return true
	}
	repo := r.host() + "/r"
	node.add(repo, layer.Digest, []byte("the layer"))
	base := &http.Transport{}
	defer base.CloseIdleConnections()
	hosts, err := Lending(docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost), docker.WithClient(&http.Client{Transport: base})), node, nil)(r.host())
	require.NoError(t, err)
	req, err := http.NewRequest(http.MethodGet, r.URL+"/v2/r/blobs/"+layer.Digest.String(), nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer canary")
	req.Header.Set("Cookie", "canary")
	resp, err := hosts[0].Client.Do(req)
	require.NoError(t, err)
	data, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, "the layer", string(data))
	lent, _ := node.counts()
	require.Equal(t, 1, lent, "the redirect is followed")
	require.Equal(t, []string{"", ""}, leaked)
}

func TestPartsOfBlobsComeFromTheRegistry(t *testing.T) {
	r, node := newRegistry(t), newMemory()
	layer := r.add("the layer")
	repo := r.host() + "/r"
	node.add(repo, layer.Digest, []byte("the layer"))
	rc, err := newPuller(t, node).fetcher(repo).Fetch(context.Background(), layer)
	require.NoError(t, err)
	defer rc.Close()
	_, err = rc.(io.Seeker).Seek(4, io.SeekStart)
	require.NoError(t, err)
	rest, err := io.ReadAll(rc)
	require.NoError(t, err)
	require.Equal(t, "layer", string(rest))
	lent, _ := node.counts()
	require.Zero(t, lent)
}

// TestRuntimeThatEndsInTheMiddleOfABlob has the rest come from the registry, whether it
// can send parts or not.
func TestRuntimeThatEndsInTheMiddleOfABlob(t *testing.T) {
	for _, parts := range []bool{true, false} {
		r, node := newRegistry(t), newMemory()
		text := strings.Repeat("layer ", 1<<19)
		layer := r.add(text)
		repo := r.host() + "/r"
		r.answer = func(_ http.ResponseWriter, req *http.Request) bool {
			if !parts {
				req.Header.Del("Range")
			}
			return false
		}
		node.add(repo, layer.Digest, []byte(text))
		node.ends = readAhead + 100
		got, err := newPuller(t, node).fetch(repo, layer)
		require.NoError(t, err)
		require.True(t, text == got)
		lent, holding := node.counts()
		require.Equal(t, 1, lent)
		require.Zero(t, holding)
	}
}

func TestHoldIsReleasedWhenThePullStops(t *testing.T) {
	r, node := newRegistry(t), newMemory()
	layer := r.add(strings.Repeat("layer ", 1<<19))
	repo := r.host() + "/r"
	node.add(repo, layer.Digest, r.blobs[layer.Digest])
	rc, err := newPuller(t, node).fetcher(repo).Fetch(context.Background(), layer)
	require.NoError(t, err)
	_, err = io.ReadFull(rc, make([]byte, 10))
	require.NoError(t, err)
	_, holding := node.counts()
	require.Equal(t, 1, holding)
	require.NoError(t, rc.Close())
	_, holding = node.counts()
	require.Zero(t, holding)
}

func TestHostsErrorIsPassedOn(t *testing.T) {
	want := errors.New("no such registry")
	_, err := Lending(func(string) ([]docker.RegistryHost, error) { return nil, want }, newMemory(), nil)("r")
	require.ErrorIs(t, err, want)
}

// FuzzBlobOf looks for a URL that is taken for a blob of another repository than
// the one which the registry would see.
func FuzzBlobOf(f *testing.F) {
	d := digest.FromString("x").String()
	for _, path := range []string{
		"/v2/team/base/blobs/" + d, "/v2/a/blobs/b/blobs/" + d, "/v2/blobs/" + d, "/v2//blobs/" + d, "/v2/../x/blobs/" + d,
		"/v2/A/blobs/" + d, "/v2/a/blobs/sha256:0", "/v2/a/manifests/" + d, "/v2/a/blobs/" + d + "/..", "/v2/library/a:tag/blobs/" + d,
	} {
		f.Add(path)
	}
	tr := &transport{lender: &lender{}, domain: "registry.example:5000", host: "registry.example:5000", prefix: "/v2/"}
	f.Fuzz(func(t *testing.T, path string) {
		req := &http.Request{Method: http.MethodGet, Header: http.Header{}}
		req.URL = mustURL("http://registry.example:5000/")
		req.URL.Path = path
		repo, blob, ok := tr.blobOf(req)
		if !ok {
			return
		}
		require.NoError(t, blob.Validate())
		require.Equal(t, path, "/v2/"+strings.TrimPrefix(repo.Name(), "registry.example:5000/")+"/blobs/"+blob.String())
	})
}
