package gitcmd

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/kiln-build/kiln/sandbox/egress"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// environment is what a builder gives git: nothing of the user's, and an attempt
// to go past the proxy.
func environment() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "GIT_TERMINAL_PROMPT=0", "GIT_SSH_COMMAND=ssh -F /dev/null -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
		"LC_ALL=C", "GIT_CONFIG_NOSYSTEM=1", "HOME=/dev/null", "GIT_CONFIG_GLOBAL=/dev/null",
		"no_proxy=*", "NO_PROXY=127.0.0.1,localhost", "HTTP_PROXY=http://127.0.0.1:1",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com",
	}
}

func git(t *testing.T, dir string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir, cmd.Env = dir, environment()
	out, err := cmd.CombinedOutput()
	require.NoError(t, ctx.Err(), "git %q does not end", args)
	return string(out), err
}

func mustGit(t *testing.T, dir string, args ...string) {
	t.Helper()
	out, err := git(t, dir, args...)
	require.NoError(t, err, "git %q: %s", args, out)
}

// repository makes a repository in a directory of its own.
func repository(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo.git")
	require.NoError(t, os.Mkdir(dir, 0o755))
	mustGit(t, dir, "init", "-q", "-b", "main")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o644))
	mustGit(t, dir, "add", "file")
	mustGit(t, dir, "commit", "-q", "-m", "x")
	return dir
}

// serve serves a repository by HTTP and counts requests.
func serve(t *testing.T, repo string) (address string, asked *atomic.Int32) {
	t.Helper()
	backend := &cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend", Stderr: new(bytes.Buffer),
		Env: []string{
			"GIT_PROJECT_ROOT=" + filepath.Dir(repo), "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1",
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
		},
	}
	return listen(t, backend)
}

func listen(t *testing.T, h http.Handler) (address string, asked *atomic.Int32) {
	t.Helper()
	asked = &atomic.Int32{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), asked
}

// install puts a git on the PATH that may reach the addresses in allow besides what
// every build may.
func install(t *testing.T, allow ...string) {
	t.Helper()
	exceptions, err := egress.ParseExceptions(allow)
	require.NoError(t, err)
	before := os.Getenv("PATH")
	in, err := Install(filepath.Join(t.TempDir(), "git"), &egress.Policy{Exceptions: exceptions})
	require.NoError(t, err)
	require.NotNil(t, in, "git is not on the PATH")
	t.Cleanup(func() {
		require.NoError(t, in.Close())
		require.Equal(t, before, os.Getenv("PATH"))
	})
}

func TestFetchByHTTP(t *testing.T) {
	repo := repository(t)
	address, asked := serve(t, repo)
	install(t, address)
	dir := t.TempDir()
	mustGit(t, dir, "clone", "-q", "http://"+address+"/repo.git", "out")
	data, err := os.ReadFile(filepath.Join(dir, "out", "file"))
	require.NoError(t, err)
	require.Equal(t, "content", string(data))
	require.Positive(t, asked.Load())
}

func TestDeniedAddresses(t *testing.T) {
	address, asked := serve(t, repository(t))
	_, port, err := net.SplitHostPort(address)
	require.NoError(t, err)
	tcp := accepts(t)
	install(t)
	for url, want := range map[string]string{
		"http://" + address + "/repo.git":                    "127.0.0.0/8 is the loopback of the node",
		"http://localhost:" + port + "/repo.git":             "is the loopback of the node",
		"http://2130706433:" + port + "/repo.git":            "127.0.0.0/8 is the loopback of the node",
		"http://[::ffff:127.0.0.1]:" + port + "/repo.git":    "is the loopback of the node",
		"http://169.254.169.254/latest/meta-data":            "169.254.0.0/16 is link-local",
		"https://" + address + "/repo.git":                   "403",
		"git://" + tcp.address + "/repo.git":                 "127.0.0.0/8 is the loopback of the node",
		"ssh://git@" + tcp.address + "/repo.git":             "127.0.0.0/8 is the loopback of the node",
		"ftp://" + tcp.address + "/repo.git":                 "this is a proxy",
		"git@169.254.169.254:repo.git":                       "169.254.0.0/16 is link-local",
		"ssh://git@x'`id>&2`'/repo.git":                      "host and user names are",
		"ssh://git@127.0.0.1:" + port + "/$(id)'; id; '.git": "127.0.0.0/8 is the loopback of the node",
	} {
		out, err := git(t, t.TempDir(), "ls-remote", url)
		require.Error(t, err, url)
		require.Contains(t, out, want, url)
		require.NotContains(t, out, "uid=", url)
	}
	require.Zero(t, asked.Load())
	require.Zero(t, tcp.count.Load())
}

// TestThereIsNoOtherWay has git ignore the proxy: its namespace has no network.
func TestThereIsNoOtherWay(t *testing.T) {
	address, asked := serve(t, repository(t))
	install(t, address)
	for _, url := range []string{"http://" + address + "/repo.git", "http://169.254.169.254/"} {
		out, err := git(t, t.TempDir(), "-c", "http.proxy=", "ls-remote", url)
		require.Error(t, err)
		require.Contains(t, out, "unable to access")
	}
	require.Zero(t, asked.Load())
	mustGit(t, t.TempDir(), "ls-remote", "http://"+address+"/repo.git")
}

func TestRedirectToDenied(t *testing.T) {
	secret, asked := serve(t, repository(t))
	front, _ := listen(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+secret+r.URL.RequestURI(), http.StatusFound)
	}))
	install(t, front)
	out, err := git(t, t.TempDir(), "ls-remote", "http://"+front+"/repo.git")
	require.Error(t, err)
	require.Contains(t, out, "is the loopback of the node")
	require.Zero(t, asked.Load())
}

// TestCredentialsStayOnTheirHost has a server that redirects to another one, and to
// itself.
func TestCredentialsStayOnTheirHost(t *testing.T) {
	const header = "Authorization: basic c2VjcmV0"
	var leaked atomic.Int32
	repo := repository(t)
	address, _ := serve(t, repo)
	backend, _ := url.Parse("http://" + address)
	target, asked := listen(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			leaked.Add(1)
		}
		httputil.NewSingleHostReverseProxy(backend).ServeHTTP(w, r)
	}))
	front, _ := listen(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if rest, ok := strings.CutPrefix(r.URL.RequestURI(), "/moved/"); ok {
			http.Redirect(w, r, "/"+rest, http.StatusFound)
			return
		}
		if r.Header.Get("Authorization") == "" {
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		if strings.HasPrefix(r.URL.Path, "/repo.git/") {
			httputil.NewSingleHostReverseProxy(backend).ServeHTTP(w, r)
			return
		}
		http.Redirect(w, r, "http://"+target+strings.TrimPrefix(r.URL.RequestURI(), "/away"), http.StatusFound)
	}))
	clone := func(path string) (string, error) {
		u := "http://" + front + path
		return git(t, t.TempDir(), "-c", "protocol.file.allow=user", "-c", "http."+u+".extraheader="+header, "clone", "-q", u, "out")
	}
	// What git does by itself.
	out, err := clone("/away/repo.git")
	require.NoError(t, err, out)
	require.Positive(t, leaked.Load(), "git sends the header to the other host: nothing is shown by this test")

	install(t, target, front, address)
	leaked.Store(0)
	before := asked.Load()
	out, err = clone("/away/repo.git")
	require.Error(t, err)
	require.Contains(t, out, "the credentials of this fetch are for "+front+" only")
	require.Equal(t, before, asked.Load())
	require.Zero(t, leaked.Load())
	for _, path := range []string{"/repo.git", "/moved/repo.git"} {
		out, err = clone(path)
		require.NoError(t, err, out)
	}
	// Without credentials git goes where it is led.
	out, err = git(t, t.TempDir(), "clone", "-q", "http://"+target+"/repo.git", "out")
	require.NoError(t, err, out)
}

func TestHostOfCredentials(t *testing.T) {
	header := func(url string) string { return "http." + url + ".extraheader=Authorization: basic x" }
	for want, args := range map[string][]string{
		"a.example:443":  {"-c", "protocol.file.allow=user", "-c", header("https://A.example/r.git"), "fetch", "x"},
		"a.example:8080": {"--work-tree", "/w", "--git-dir", "/g", "--bare", "-c", header("http://u@a.example:8080/r"), "ls-remote"},
		"":               {"-c", "protocol.file.allow=user", "fetch", "-c", header("https://a.example/r")},
	} {
		require.Equal(t, want, credentialsFor(args), args)
	}
	require.Empty(t, credentialsFor([]string{"-c", header("https://a.example/r"), "submodule", "update"}))
	require.Empty(t, credentialsFor([]string{"-c"}))
}

func TestSubmoduleAtDenied(t *testing.T) {
	secret, asked := serve(t, repository(t))
	outer := repository(t)
	require.NoError(t, os.WriteFile(filepath.Join(outer, ".gitmodules"), []byte("[submodule \"s\"]\n\tpath = s\n\turl = http://"+secret+"/repo.git\n"), 0o644))
	mustGit(t, outer, "add", ".gitmodules")
	mustGit(t, outer, "update-index", "--add", "--cacheinfo", "160000,"+strings.Repeat("1", 40)+",s")
	mustGit(t, outer, "commit", "-q", "-m", "y")
	address, _ := serve(t, outer)
	install(t, address)
	out, err := git(t, t.TempDir(), "clone", "-q", "--recurse-submodules", "http://"+address+"/repo.git", "out")
	require.Error(t, err)
	require.Contains(t, out, "is the loopback of the node")
	require.Zero(t, asked.Load())
}

// TestOtherProtocolsAtAllowed wants the servers of git:// and ssh to be reached.
func TestOtherProtocolsAtAllowed(t *testing.T) {
	tcp := accepts(t)
	install(t, tcp.address)
	for i, scheme := range []string{"git", "ssh"} {
		_, err := git(t, t.TempDir(), "ls-remote", scheme+"://"+tcp.address+"/repo.git")
		require.Error(t, err, "the server hangs up")
		require.EqualValues(t, i+1, tcp.count.Load())
	}
}

// TestNamesOfLoopback has a name that leads to loopback.
func TestNamesOfLoopback(t *testing.T) {
	address, asked := serve(t, repository(t))
	_, port, err := net.SplitHostPort(address)
	require.NoError(t, err)
	install(t)
	out, err := git(t, t.TempDir(), "ls-remote", "http://localhost:"+port+"/repo.git")
	require.Error(t, err)
	require.Contains(t, out, "localhost (")
	require.Zero(t, asked.Load())
}

func TestCloseEndsConnections(t *testing.T) {
	tcp := holds(t)
	exceptions, err := egress.ParseExceptions([]string{tcp.address})
	require.NoError(t, err)
	dir := filepath.Join(t.TempDir(), "git")
	in, err := Install(dir, &egress.Policy{Exceptions: exceptions, NodeAddresses: func() ([]netip.Addr, error) { return nil, nil }})
	require.NoError(t, err)
	done := make(chan error, 1)
	cmd := exec.Command("git", "ls-remote", "git://"+tcp.address+"/repo.git")
	cmd.Env = environment()
	go func() { done <- cmd.Run() }()
	require.Eventually(t, func() bool { return tcp.count.Load() == 1 }, 10*time.Second, time.Millisecond)
	require.NoError(t, in.Close())
	require.Error(t, <-done)
	require.NoDirExists(t, dir)
}

func TestDirectoryOfInstall(t *testing.T) {
	for _, dir := range []string{"relative", "/a:b", "/a'b", "/a b", "/a$b"} {
		_, err := Install(dir, &egress.Policy{})
		require.ErrorContains(t, err, "want an absolute path", dir)
	}
	t.Setenv("PATH", t.TempDir())
	in, err := Install(filepath.Join(t.TempDir(), "git"), &egress.Policy{})
	require.NoError(t, err)
	require.Nil(t, in)
	require.NoError(t, in.Close())
}

// counter is a TCP server that counts connections.
type counter struct {
	address string
	count   *atomic.Int32
}

// accepts hangs up at once.
func accepts(t *testing.T) counter { return tcpServer(t, func(c net.Conn) { c.Close() }) }

// holds never answers, until the other side hangs up.
func holds(t *testing.T) counter {
	return tcpServer(t, func(c net.Conn) {
		t.Cleanup(func() { c.Close() })
	})
}

func tcpServer(t *testing.T, serve func(net.Conn)) counter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c := counter{l.Addr().String(), &atomic.Int32{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serve(conn)
			c.count.Add(1)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return c
}
