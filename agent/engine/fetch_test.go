package engine

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/stretchr/testify/require"
	"github.com/tonistiigi/fsutil"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/egress/egresstest"
)

const loopbackDenied = "127.0.0.0/8 is the loopback of the node"

// policedEngine is an engine that fetches from the addresses in allow besides what
// every build may fetch from.
func policedEngine(t *testing.T, resolver *net.Resolver, allow ...string) *client.Client {
	t.Helper()
	exceptions, err := egress.ParseExceptions(allow)
	require.NoError(t, err)
	t.Setenv("TMPDIR", os.TempDir())
	path, defaultClient := os.Getenv("PATH"), http.DefaultClient
	e, err := New(context.Background(), Config{
		NodeConfig: NodeConfig{Root: t.TempDir(), Fetch: &egress.Policy{Exceptions: exceptions, Resolver: resolver}}, Sandbox: sandbox.GVisor,
	})
	require.NoError(t, err)
	c, err := e.Client(context.Background())
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, c.Close())
		require.NoError(t, e.Close())
		require.Equal(t, path, os.Getenv("PATH"))
		require.Same(t, defaultClient, http.DefaultClient)
	})
	return c
}

// oracle is a server on loopback that counts who gets through to it.
type oracle struct {
	address, port string
	asked         atomic.Int32
}

func newOracle(t *testing.T, h http.Handler) *oracle {
	t.Helper()
	o := &oracle{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.asked.Add(1)
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	o.address = s.Listener.Addr().String()
	_, o.port, _ = net.SplitHostPort(o.address)
	return o
}

var secret = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "secret") })

func redirect(to string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, to, http.StatusTemporaryRedirect)
	})
}

func add(t *testing.T, c *client.Client, url string) (string, error) {
	t.Helper()
	out, _, err := build(t, c, "FROM scratch\nADD "+url+" /got\n", nil, nil)
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(filepath.Join(out, "got"))
	require.NoError(t, err)
	return string(data), nil
}

func TestAddFromDeniedAddress(t *testing.T) {
	o := newOracle(t, secret)
	c := policedEngine(t, nil)
	for url, rule := range map[string]string{
		"http://" + o.address + "/x":                 loopbackDenied,
		"http://localhost:" + o.port + "/x":          "is the loopback of the node",
		"https://" + o.address + "/x":                loopbackDenied,
		"http://[::ffff:127.0.0.1]:" + o.port + "/x": "is the loopback of the node",
		"http://0.0.0.0:" + o.port + "/x":            "0.0.0.0/8 is the node itself",
		"http://169.254.169.254/latest/meta-data/":   "169.254.0.0/16 is link-local, where metadata services are",
	} {
		_, err := add(t, c, url)
		require.ErrorContains(t, err, rule, url)
		require.ErrorContains(t, err, "fetch.allow", url)
	}
	require.Zero(t, o.asked.Load())
}

func TestAddFromAllowedAddress(t *testing.T) {
	o := newOracle(t, secret)
	got, err := add(t, policedEngine(t, nil, o.address), "http://"+o.address+"/x")
	require.NoError(t, err)
	require.Equal(t, "secret", got)
}

// TestNoPolicyFetchesFromLoopback is the engine of a user's own machine, and what a
// denied address would have given away.
func TestNoPolicyFetchesFromLoopback(t *testing.T) {
	o := newOracle(t, secret)
	got, err := add(t, newTestEngine(t, sandbox.GVisor), "http://"+o.address+"/x")
	require.NoError(t, err)
	require.Equal(t, "secret", got)
}

func TestAddFollowsNoRedirectToDenied(t *testing.T) {
	o := newOracle(t, secret)
	front := newOracle(t, redirect("http://"+o.address+"/x"))
	_, err := add(t, policedEngine(t, nil, front.address), "http://"+front.address+"/x")
	require.ErrorContains(t, err, loopbackDenied)
	require.Zero(t, o.asked.Load())
	require.Positive(t, front.asked.Load())
}

// TestAddFromNameThatChangesItsAddress has a name that is harmless when it is asked
// for first; its server then changes its address and has the client come again.
func TestAddFromNameThatChangesItsAddress(t *testing.T) {
	o := newOracle(t, secret)
	var changed atomic.Bool
	l, err := net.Listen("tcp", "127.0.0.7:"+o.port)
	require.NoError(t, err)
	front := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		changed.Store(true)
		w.Header().Set("Connection", "close")
		redirect("http://rebind.example:"+o.port+"/again").ServeHTTP(w, r)
	})}}
	front.Start()
	t.Cleanup(front.Close)
	resolver := egresstest.Names(t, func(string) netip.Addr {
		if changed.Load() {
			return netip.MustParseAddr("127.0.0.1")
		}
		return netip.MustParseAddr("127.0.0.7")
	})
	_, err = add(t, policedEngine(t, resolver, "127.0.0.7:"+o.port), "http://rebind.example:"+o.port+"/x")
	require.ErrorContains(t, err, "rebind.example (127.0.0.1:"+o.port+") denied for builds: "+loopbackDenied)
	require.True(t, changed.Load())
	require.Zero(t, o.asked.Load())
}

func quietRegistry() http.Handler { return registry.New(registry.Logger(log.New(io.Discard, "", 0))) }

func TestRegistriesAtDeniedAddresses(t *testing.T) {
	o := newOracle(t, quietRegistry())
	c := policedEngine(t, nil)
	_, _, err := build(t, c, "FROM "+o.address+"/base\nCOPY a /a\n", map[string]string{"a": ""}, nil)
	require.ErrorContains(t, err, loopbackDenied, "pull")
	require.ErrorContains(t, push(t, c, o.address+"/image"), loopbackDenied, "push")

	require.ErrorContains(t, withCache(t, c, o.address, true), loopbackDenied, "cache export")
	require.NoError(t, withCache(t, c, o.address, false), "a cache that cannot be read is a warning")
	require.Zero(t, o.asked.Load())
}

// withCache builds with a cache in a registry to export to or else to import from.
func withCache(t *testing.T, c *client.Client, registry string, export bool) error {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\nCOPY Dockerfile /a\n"), 0o644))
	fs, err := fsutil.NewFS(dir)
	require.NoError(t, err)
	opt := client.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{}, LocalMounts: map[string]fsutil.FS{"context": fs, "dockerfile": fs},
		Exports: []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": "stays.example/image"}}},
	}
	cache := []client.CacheOptionsEntry{{Type: "registry", Attrs: map[string]string{"ref": registry + "/cache", "mode": "max"}}}
	if export {
		opt.CacheExports = cache
	} else {
		opt.CacheImports = cache
	}
	_, err = c.Solve(t.Context(), nil, opt, nil)
	return err
}

func push(t *testing.T, c *client.Client, ref string) error {
	t.Helper()
	def, err := llb.Scratch().File(llb.Mkfile("/a", 0o644, nil)).Marshal(t.Context(), llb.LinuxAmd64)
	require.NoError(t, err)
	_, err = c.Solve(t.Context(), def, client.SolveOpt{Exports: []client.ExportEntry{{
		Type: client.ExporterImage, Attrs: map[string]string{"name": ref, "push": "true"},
	}}}, nil)
	return err
}

func TestRegistriesAtAllowedAddresses(t *testing.T) {
	o := newOracle(t, quietRegistry())
	c := policedEngine(t, nil, "127.0.0.1/32")
	require.NoError(t, push(t, c, o.address+"/image"))
	for _, export := range []bool{true, false} {
		before := o.asked.Load()
		require.NoError(t, withCache(t, c, o.address, export))
		require.Greater(t, o.asked.Load(), before)
	}
	_, _, err := build(t, c, "FROM "+o.address+"/image\nCOPY b /b\n", map[string]string{"b": ""}, nil)
	require.NoError(t, err)
}

func TestTokensFromDeniedAddress(t *testing.T) {
	tokens := newOracle(t, secret)
	r := newOracle(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x",scope="repository:y:pull"`, tokens.address))
		w.WriteHeader(http.StatusUnauthorized)
	}))
	_, _, err := build(t, policedEngine(t, nil, r.address), "FROM "+r.address+"/base\nCOPY a /a\n", map[string]string{"a": ""}, nil)
	require.ErrorContains(t, err, loopbackDenied)
	require.Zero(t, tokens.asked.Load())
	require.Positive(t, r.asked.Load())
}

func TestBlobsThatRedirectToDenied(t *testing.T) {
	o := newOracle(t, secret)
	real := quietRegistry()
	r := newOracle(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
			redirect("http://"+o.address+"/x").ServeHTTP(w, req)
			return
		}
		real.ServeHTTP(w, req)
	}))
	img, err := random.Image(100, 1)
	require.NoError(t, err)
	ref, err := name.ParseReference(r.address + "/redirecting")
	require.NoError(t, err)
	require.NoError(t, remote.Write(ref, img))
	_, _, err = build(t, policedEngine(t, nil, r.address), "FROM "+ref.Name()+"\nCOPY a /a\n", map[string]string{"a": ""}, nil)
	require.ErrorContains(t, err, loopbackDenied)
	require.Zero(t, o.asked.Load())
}

// TestLayersWithURLs has a manifest that says where else a layer is.
func TestLayersWithURLs(t *testing.T) {
	layer, err := random.Layer(100, types.DockerForeignLayer)
	require.NoError(t, err)
	for _, allowed := range []bool{true, false} {
		o := newOracle(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			data, err := layer.Compressed()
			if err == nil {
				_, _ = io.Copy(w, data)
			}
		}))
		r := newOracle(t, quietRegistry())
		img, err := mutate.Append(empty.Image, mutate.Addendum{Layer: layer, MediaType: types.DockerForeignLayer, URLs: []string{"http://" + o.address + "/x"}})
		require.NoError(t, err)
		ref, err := name.ParseReference(r.address + "/foreign")
		require.NoError(t, err)
		require.NoError(t, remote.Write(ref, img))
		allow := []string{r.address}
		if allowed {
			allow = append(allow, o.address)
		}
		t.Run(fmt.Sprintf("allowed %t", allowed), func(t *testing.T) {
			_, _, err := build(t, policedEngine(t, nil, allow...), "FROM "+ref.Name()+"\nCOPY a /a\n", map[string]string{"a": ""}, nil)
			if allowed {
				require.NoError(t, err)
				require.Positive(t, o.asked.Load())
				return
			}
			require.ErrorContains(t, err, loopbackDenied)
			require.Zero(t, o.asked.Load())
		})
	}
}

// newRepository serves a git repository with one file.
func newRepository(t *testing.T) *oracle {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo.git")
	require.NoError(t, os.Mkdir(dir, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o644))
	for _, args := range [][]string{{"init", "-q", "-b", "main"}, {"add", "."}, {"commit", "-q", "-m", "x"}} {
		cmd := exec.Command("git", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "HOME="+dir, "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	return newOracle(t, &cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend", Stderr: new(bytes.Buffer),
		Env: []string{
			"GIT_PROJECT_ROOT=" + filepath.Dir(dir), "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1",
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
		},
	})
}

func TestGitAtDeniedAddress(t *testing.T) {
	repo := newRepository(t)
	c := policedEngine(t, nil)
	for url, rule := range map[string]string{
		"http://" + repo.address + "/repo.git":              loopbackDenied,
		"https://" + repo.address + "/repo.git":             loopbackDenied,
		"http://localhost:" + repo.port + "/repo.git":       "is the loopback of the node",
		"git://" + repo.address + "/repo.git":               loopbackDenied,
		"ssh://git@169.254.169.254/repo.git":                "169.254.0.0/16 is link-local",
		"git@169.254.169.254:repo.git":                      "169.254.0.0/16 is link-local",
		"http://2130706433:" + repo.port + "/repo.git#main": loopbackDenied,
	} {
		_, _, err := build(t, c, "FROM scratch\nADD "+url+" /src\n", nil, nil)
		require.ErrorContains(t, err, rule, url)
	}
	require.Zero(t, repo.asked.Load())
}

func TestGitAtAllowedAddress(t *testing.T) {
	repo := newRepository(t)
	c := policedEngine(t, nil, repo.address)
	for _, keep := range []string{"", "--keep-git-dir "} {
		out, _, err := build(t, c, "FROM scratch\nADD "+keep+"http://"+repo.address+"/repo.git /src\n", nil, nil)
		require.NoError(t, err)
		data, err := os.ReadFile(filepath.Join(out, "src", "file"))
		require.NoError(t, err)
		require.Equal(t, "content", string(data))
	}
}

func TestGitFollowsNoRedirectToDenied(t *testing.T) {
	repo := newRepository(t)
	front := newOracle(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+repo.address+r.URL.RequestURI(), http.StatusFound)
	}))
	_, _, err := build(t, policedEngine(t, nil, front.address), "FROM scratch\nADD http://"+front.address+"/repo.git /src\n", nil, nil)
	require.ErrorContains(t, err, loopbackDenied)
	require.Zero(t, repo.asked.Load())
	require.Positive(t, front.asked.Load())
}
