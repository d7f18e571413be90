package escape

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"
	"github.com/stretchr/testify/require"
)

// What reaches addresses that builds may not is in the tests of sandbox/egress and
// its gitcmd too; these go through the engine.
var _ = register(
	entry{
		ID: "git/url-options", Severity: escapesToNode, Once: noStep,
		Threat: "A git URL is an option, a command of a transport (`ext::`), or a repository of the node's own file system.",
		Test:   gitURLOptions, Off: gitExtTransport, Without: "the list of git's protocols",
	},
	entry{
		ID: "git/ref-options", Severity: escapesToNode, Once: noStep,
		Threat: "A git ref is an option that names a program to run.",
		Test:   gitRefOptions, Off: gitRefOptionPlain, Without: "the check of refs",
	},
	entry{
		ID: "git/subdirectory", Severity: readsNode, Once: noStep,
		Threat: "The directory in a repository that is fetched leads out of it, by its name or by symlinks that the repository holds.",
		Test:   gitSubdirectory,
	},
	entry{
		ID: "git/submodule-files", Severity: readsNode, Once: noStep,
		Threat: "A submodule's URL is a repository of the node's file system, or a service on its loopback.",
		Test:   gitSubmoduleFiles, Off: gitSubmoduleFilesPlain, Without: "git's refusal of file URLs in submodules",
	},
	entry{
		ID: "git/node-config", Severity: escapesToNode, Once: noStep,
		Threat: "A repository's attributes name filters (as LFS does), and its checkout runs hooks, that the agent's own git configuration has.",
		Test:   gitNodeConfig, Off: gitNodeConfigPlain, Without: "the empty git configuration of builds",
	},
	entry{
		ID: "git/dot-git", Severity: escapesToNode, Once: noStep,
		Threat: "Tree objects made by hand hold .git, .GIT, .. and names with slashes, so that the checkout writes hooks or files outside.",
		Test:   gitDotGit,
	},
	entry{
		ID: "git/alternates", Severity: readsNode, Once: noStep,
		Threat: "A repository says that its objects are elsewhere: on the node's loopback, at the metadata service, or in the node's file system.",
		Test:   gitAlternates, Off: gitAlternatesPlain, Without: "git's refusal of alternates that a server names",
	},
	entry{
		ID: "git/credentials-redirect", Severity: readsNode, Once: noStep,
		Threat: "A git server that gets a build's token redirects to another host, for git to repeat the token there.",
		Test:   gitCredentialsRedirect, Off: gitCredentialsRedirectPlain, Without: "the proxy that connects to the token's host only",
	},
)

// repository is a git repository on the node.
type repository struct {
	t   *testing.T
	dir string
}

func newRepository(t *testing.T, files map[string]string) *repository {
	t.Helper()
	r := &repository{t, filepath.Join(t.TempDir(), "repo.git")}
	require.NoError(t, os.MkdirAll(r.dir, 0o755))
	r.git(nil, "init", "-q", "-b", "main")
	for name, content := range files {
		path := filepath.Join(r.dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			require.NoError(t, os.Symlink(target, path))
			continue
		}
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	}
	r.git(nil, "add", "-A")
	r.git(nil, "commit", "-q", "--allow-empty", "-m", "x")
	return r
}

// git runs the real git in the repository.
func (r *repository) git(stdin []byte, args ...string) string {
	r.t.Helper()
	cmd := plainGit(r.t, r.dir, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	require.NoError(r.t, err, "git %q: %s", args, out)
	return strings.TrimSpace(string(out))
}

// plainGit is a git that no policy holds for.
func plainGit(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/usr/bin/git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "HOME=/dev/null", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
	return cmd
}

// backend serves the repository as /repo.git.
func (r *repository) backend() http.Handler {
	return &cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend", Stderr: new(bytes.Buffer),
		Env: []string{
			"GIT_PROJECT_ROOT=" + filepath.Dir(r.dir), "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1",
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
		},
	}
}

// serve serves the repository where builds may fetch, and returns its URL.
func (r *repository) serve(e *env) string {
	r.t.Helper()
	return e.oracle(r.t, allowedLoopback+":0", r.backend()).URL + "/repo.git"
}

// source is a git source of which nothing has been checked by a client.
func source(remote, fragment string) llb.State {
	return llb.NewState(llb.NewSource("git://"+remote+fragment, map[string]string{"git.fullurl": remote}, llb.Constraints{}).Output())
}

func (e *env) buildState(t *testing.T, st llb.State) result {
	t.Helper()
	def, err := st.Marshal(t.Context(), llb.LinuxAmd64)
	require.NoError(t, err)
	return e.Build(t, build{LLB: def})
}

func gitURLOptions(t *testing.T, e *env) {
	marker := filepath.Join(t.TempDir(), "marker")
	private := newRepository(t, map[string]string{"canary": e.Canary})
	for _, remote := range []string{
		"ext::sh -c touch% " + marker, "--upload-pack=touch " + marker, "-oProxyCommand=touch " + marker, "--config=core.sshCommand=touch " + marker,
		"ssh://-oProxyCommand=touch${IFS}" + marker + "/x", "ssh://a@-oProxyCommand=touch${IFS}" + marker + "/x", "-oProxyCommand=touch:x",
		"ssh://a@b;touch${IFS}" + marker + "/x.git", "git@`touch " + marker + "`:x", "file://" + private.dir, private.dir, "fd::3/x", "a::b", "git://-h/x",
		"https://example.com/\n--upload-pack=touch " + marker, "http://" + allowedLoopback + "/%0a--x", "", "\x00",
	} {
		for _, fragment := range []string{"", "#main"} {
			r := e.buildState(t, source(remote, fragment))
			require.Error(t, r.Err, remote)
			e.CheckNode(t, r)
		}
		r := e.Build(t, build{Dockerfile: "FROM scratch\nADD " + strings.ReplaceAll(remote, "\n", " ") + " /\n"})
		require.Error(t, r.Err, remote)
		e.CheckNode(t, r)
	}
	require.NoFileExists(t, marker)
}

func gitExtTransport(t *testing.T, _ *env) bool {
	marker := filepath.Join(t.TempDir(), "marker")
	_ = plainGit(t, t.TempDir(), "-c", "protocol.ext.allow=always", "ls-remote", "ext::sh -c touch% "+marker).Run()
	return exists(marker)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func gitRefOptions(t *testing.T, e *env) {
	marker := filepath.Join(t.TempDir(), "marker")
	url := newRepository(t, map[string]string{"file": "x"}).serve(e)
	r := e.buildState(t, source(url, "#main"))
	require.NoError(t, r.Err)
	require.Equal(t, "x", r.Read(t, "file"))
	for _, ref := range []string{
		"--upload-pack=touch " + marker, "-u touch", "--exec=touch " + marker, "--output=" + marker, "main --upload-pack=touch", "main\n--x", "refs/../../x", "main..x", "main:../x", "\x00", "^main", "@{-1}", strings.Repeat("x", 100_000),
	} {
		r := e.buildState(t, source(url, "#"+ref))
		require.Error(t, r.Err, "%.100q", ref)
		e.CheckNode(t, r)
	}
	require.NoFileExists(t, marker)
}

func gitRefOptionPlain(t *testing.T, _ *env) bool {
	marker := filepath.Join(t.TempDir(), "marker")
	r := newRepository(t, nil)
	_ = plainGit(t, r.dir, "fetch", r.dir, "--upload-pack=touch "+marker+";").Run()
	return exists(marker)
}

func gitSubdirectory(t *testing.T, e *env) {
	private := filepath.Dir(e.CanaryFile)
	url := newRepository(t, map[string]string{
		"ok/file": "x", "abs": "-> " + private, "rel": "-> " + strings.Repeat("../", 20) + private[1:], "proc": "-> /proc/self/root" + private, "deep/abs": "-> " + private, "file": "-> " + e.CanaryFile,
	}).serve(e)
	for _, sub := range []string{"", "ok", "abs", "rel", "proc", "deep/abs", "file", "abs/canary", strings.Repeat("../", 20) + private, private, ".git", "ok/../../..", "ok/\x00"} {
		r := e.buildState(t, source(url, "#main:"+sub))
		e.CheckNode(t, r)
		if strings.HasPrefix(sub, "ok") || sub == "" {
			continue
		}
		// The tree as the context of a build that copies through what it holds.
		r = e.Build(t, build{Dockerfile: fmt.Sprintf("FROM scratch\nADD %s#main /src\nCOPY --from=0 /src/%s /\n", url, strings.ReplaceAll(sub, "\x00", ""))})
		e.CheckNode(t, r)
	}
}

// withSubmodule returns a repository with a submodule at url.
func withSubmodule(t *testing.T, url, commit string) *repository {
	t.Helper()
	r := newRepository(t, map[string]string{".gitmodules": "[submodule \"s\"]\n\tpath = s\n\turl = " + url + "\n"})
	r.git(nil, "update-index", "--add", "--cacheinfo", "160000,"+commit+",s")
	r.git(nil, "commit", "-q", "-m", "y")
	return r
}

func gitSubmoduleFiles(t *testing.T, e *env) {
	private := newRepository(t, map[string]string{"canary": e.Canary})
	loopback := e.oracle(t, "127.0.0.1:0", private.backend())
	metadata := e.oracle(t, metadataAddress+":80", nil)
	for _, url := range []string{
		"file://" + private.dir, private.dir, "../../../../../../../.." + private.dir, "ext::sh -c cat% " + e.CanaryFile,
		loopback.URL + "/repo.git", "http://" + metadataAddress + "/repo.git", "--upload-pack=x", "-x",
	} {
		outer := withSubmodule(t, url, private.git(nil, "rev-parse", "HEAD"))
		r := e.buildState(t, source(outer.serve(e), "#main"))
		e.CheckNode(t, r)
		require.Error(t, r.Err, url)
	}
	require.Empty(t, loopback.Requests())
	require.Empty(t, metadata.Requests())
}

func gitSubmoduleFilesPlain(t *testing.T, e *env) bool {
	private := newRepository(t, map[string]string{"canary": e.Canary})
	outer := withSubmodule(t, "file://"+private.dir, private.git(nil, "rev-parse", "HEAD"))
	dir := t.TempDir()
	_ = plainGit(t, dir, "-c", "protocol.file.allow=always", "clone", "-q", "--recurse-submodules", outer.serve(e), "out").Run()
	data, _ := os.ReadFile(filepath.Join(dir, "out/s/canary"))
	return string(data) == e.Canary
}

// evilHome makes a home directory whose git runs things, and a repository that makes
// use of it.
func evilHome(t *testing.T) (home, marker string, r *repository) {
	t.Helper()
	home = t.TempDir()
	marker = filepath.Join(t.TempDir(), "marker")
	hooks := filepath.Join(home, "hooks")
	require.NoError(t, os.Mkdir(hooks, 0o755))
	for _, h := range []string{"post-checkout", "reference-transaction", "post-index-change"} {
		require.NoError(t, os.WriteFile(filepath.Join(hooks, h), []byte("#!/bin/sh\ntouch "+marker+"\n"), 0o755))
	}
	filter := "\tsmudge = touch " + marker + "; cat\n\tprocess = \n\trequired = true\n"
	require.NoError(t, os.WriteFile(filepath.Join(home, ".gitconfig"), []byte("[core]\n\thooksPath = "+hooks+"\n[filter \"evil\"]\n"+filter+"[filter \"lfs\"]\n"+filter), 0o644))
	return home, marker, newRepository(t, map[string]string{".gitattributes": "a filter=evil\nb filter=lfs\n", "a": "a", "b": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"})
}

func gitNodeConfig(t *testing.T, e *env) {
	home, marker, repo := evilHome(t)
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", home)
	t.Setenv("GIT_CONFIG_GLOBAL", filepath.Join(home, ".gitconfig"))
	r := e.buildState(t, source(repo.serve(e), "#main"))
	require.NoError(t, r.Err)
	require.Equal(t, "a", r.Read(t, "a"))
	require.Contains(t, r.Read(t, "b"), "git-lfs.github.com", "a pointer stays what it is")
	require.NoFileExists(t, marker)
}

func gitNodeConfigPlain(t *testing.T, e *env) bool {
	home, marker, repo := evilHome(t)
	cmd := plainGit(t, t.TempDir(), "clone", "-q", repo.serve(e), "out")
	cmd.Env = append(cmd.Env, "HOME="+home)
	_ = cmd.Run()
	return exists(marker)
}

func gitDotGit(t *testing.T, e *env) {
	marker := filepath.Join(t.TempDir(), "marker")
	repo := newRepository(t, map[string]string{"file": "x"})
	hook := repo.git([]byte("#!/bin/sh\ntouch "+marker+"\n"), "hash-object", "-w", "--stdin")
	tree := func(mode, name, object string) string {
		raw, err := hex.DecodeString(object)
		require.NoError(t, err)
		return repo.git(append([]byte(mode+" "+name+"\x00"), raw...), "hash-object", "-t", "tree", "-w", "--literally", "--stdin")
	}
	hooks := tree("40000", "hooks", tree("100755", "post-checkout", hook))
	for i, top := range []string{
		tree("40000", ".git", hooks), tree("40000", ".GIT", hooks), tree("40000", "git~1", hooks), tree("40000", "..", tree("100755", "marker", hook)),
		tree("40000", ".", hooks), tree("100755", "../../../../../../.."+marker, hook), tree("100755", marker, hook), tree("100755", "a/../../b", hook), tree("100755", "", hook),
	} {
		branch := fmt.Sprint("evil", i)
		commit := repo.git(nil, "commit-tree", "-m", "x", top)
		repo.git(nil, "update-ref", "refs/heads/"+branch, commit)
		r := e.buildState(t, source(repo.serve(e), "#"+branch))
		e.CheckNode(t, r)
		require.NoFileExists(t, marker, top)
	}
}

// redirecting serves a repository to whoever has credentials, and redirects from
// /away to another server that has it too, and asks for nothing.
func redirecting(t *testing.T, e *env) (url, header string, away *oracle) {
	t.Helper()
	repo := newRepository(t, map[string]string{"file": "x"})
	away = e.outsideOracle(t, repo.backend())
	front := e.oracle(t, allowedLoopback+":0", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, away.URL+strings.TrimPrefix(r.URL.RequestURI(), "/away"), http.StatusFound)
	}))
	url = front.URL + "/away/repo.git"
	return url, "http." + url + ".extraheader=Authorization: basic " + e.Canary, away
}

// leaked tells whether a server got credentials.
func (o *oracle) leaked() bool {
	for _, r := range o.Requests() {
		if r.Header.Get("Authorization") != "" {
			return true
		}
	}
	return false
}

func gitCredentialsRedirect(t *testing.T, e *env) {
	url, _, away := redirecting(t, e)
	for _, secret := range []string{"GIT_AUTH_TOKEN", "GIT_AUTH_HEADER"} {
		def, err := source(url, "#main").Marshal(t.Context(), llb.LinuxAmd64)
		require.NoError(t, err)
		r := e.Build(t, build{LLB: def, Secrets: map[string]string{secret: "basic " + e.Canary}})
		require.False(t, away.leaked(), "the token went to another host")
		e.CheckNode(t, r)
		def, err = llb.Git(url, "main", llb.AuthTokenSecret("GIT_AUTH_TOKEN"), llb.AuthHeaderSecret("GIT_AUTH_HEADER")).Marshal(t.Context(), llb.LinuxAmd64)
		require.NoError(t, err)
		r = e.Build(t, build{LLB: def, Secrets: map[string]string{secret: "basic " + e.Canary}})
		require.Error(t, r.Err)
		require.False(t, away.leaked(), "the token went to another host")
		e.CheckNode(t, r)
	}
}

func gitCredentialsRedirectPlain(t *testing.T, e *env) bool {
	url, header, away := redirecting(t, e)
	_ = plainGit(t, t.TempDir(), "-c", header, "clone", "-q", url, "out").Run()
	return away.leaked()
}
