package strategy

import (
	"bytes"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// repository is a git repository on disk.
type repository struct {
	t   *testing.T
	dir string
}

func newRepository(t *testing.T) *repository {
	t.Helper()
	r := &repository{t, filepath.Join(t.TempDir(), "repo.git")}
	require.NoError(t, os.MkdirAll(r.dir, 0o755))
	r.git("init", "-q", "-b", "main")
	return r
}

func (r *repository) git(args ...string) string {
	r.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = r.dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "HOME="+r.dir,
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
	out, err := cmd.CombinedOutput()
	require.NoError(r.t, err, "git %q: %s", args, out)
	return strings.TrimSpace(string(out))
}

// commit writes files and returns the commit. A content with "-> " before it is
// the target of a symbolic link.
func (r *repository) commit(files map[string]string) string {
	r.t.Helper()
	for name, content := range files {
		path := filepath.Join(r.dir, name)
		require.NoError(r.t, os.MkdirAll(filepath.Dir(path), 0o755))
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			require.NoError(r.t, os.Symlink(target, path))
		} else {
			require.NoError(r.t, os.WriteFile(path, []byte(content), 0o644))
		}
	}
	r.git("add", "-A")
	r.git("commit", "-q", "-m", "x")
	return r.git("rev-parse", "HEAD")
}

// serve serves the repository over HTTP to whoever knows the user and password, or
// to everyone when they are empty.
func (r *repository) serve(user, password string) string {
	r.t.Helper()
	backend := &cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend",
		Env: []string{
			"GIT_PROJECT_ROOT=" + filepath.Dir(r.dir), "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1",
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
		},
		Stderr: new(bytes.Buffer),
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if u, p, _ := req.BasicAuth(); user != "" && (u != user || p != password) {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		backend.ServeHTTP(w, req)
	}))
	r.t.Cleanup(s.Close)
	return s.URL + "/" + filepath.Base(r.dir)
}

func gitSource(url, revision string) *agentv1.Source {
	return &agentv1.Source{From: &agentv1.Source_Git{Git: &agentv1.GitSource{Url: url, Revision: revision}}}
}

func TestGitSource(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	repo := newRepository(t)
	first := repo.commit(map[string]string{"Dockerfile": "FROM scratch\nCOPY . /\n", "version": "1"})
	repo.git("tag", "v1")
	repo.git("tag", "-a", "-m", "x", "annotated")
	repo.git("checkout", "-q", "-b", "feature/next")
	second := repo.commit(map[string]string{
		"version": "2", "sub/dir/Dockerfile": "FROM scratch\nCOPY . /\n", "sub/dir/version": "sub",
		"link": "-> sub", "escape": "-> /etc", "with space/Dockerfile": "FROM scratch\nCOPY . /\n",
	})
	repo.git("checkout", "-q", "main")
	url := repo.serve("", "")
	build := func(t *testing.T, s *agentv1.Source) (outcome, entries) {
		spec := &agentv1.BuildSpec{Source: s, Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}}}
		image := reg.host + "/git:" + strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))
		spec.Outputs = pushTo(image)
		out := run(t, c, Inputs{Spec: spec})
		if out.err != nil {
			return out, nil
		}
		return out, reg.pull(image).files
	}
	for name, x := range map[string]struct{ revision, commit, version string }{
		"default": {"", first, "1"}, "branch": {"feature/next", second, "2"}, "tag": {"v1", first, "1"},
		"full ref": {"refs/heads/feature/next", second, "2"}, "annotated tag": {"annotated", first, "1"}, "commit": {second, second, "2"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			out, files := build(t, gitSource(url, x.revision))
			require.NoError(t, out.err)
			require.Equal(t, x.version, files["version"])
			require.NotContains(t, files, ".git/HEAD")
			require.Equal(t, x.commit, out.response[RevisionKey])
		})
	}
	for name, dir := range map[string]string{"plain": "sub/dir", "space": "with space", "link": "link/dir"} {
		t.Run("dir_"+name, func(t *testing.T) {
			s := gitSource(url, "feature/next")
			s.ContextDir = dir
			out, files := build(t, s)
			if name == "link" {
				require.Error(t, out.err, "git's own directories are not links")
				return
			}
			require.NoError(t, out.err)
			require.NotContains(t, files, "sub/dir/version")
			require.Contains(t, files, "Dockerfile")
		})
	}
	for name, s := range map[string]*agentv1.Source{
		"no_such_revision": gitSource(url, "nope"), "no_such_commit": gitSource(url, strings.Repeat("0123", 10)), "no_such_repository": gitSource(url+"x", ""),
		"no_such_dir": {From: gitSource(url, "").From, ContextDir: "nope"}, "escaping_dir": {From: gitSource(url, "feature/next").From, ContextDir: "escape"},
	} {
		t.Run(name, func(t *testing.T) {
			out, _ := build(t, s)
			require.Error(t, out.err)
			var fault *SourceError
			require.ErrorAs(t, out.cause, &fault)
		})
	}
}

func TestPrivateGitSource(t *testing.T) {
	c := connect(t, sandbox.Userns)
	repo := newRepository(t)
	commit := repo.commit(map[string]string{"Dockerfile": "FROM scratch\nCOPY . /\n"})
	url := repo.serve("robot", "s3cret token")
	spec := &agentv1.BuildSpec{Source: gitSource(url, ""), Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}}}
	t.Run("without credentials", func(t *testing.T) {
		out := run(t, c, Inputs{Spec: spec})
		var fault *SourceError
		require.ErrorAs(t, out.cause, &fault)
		require.Equal(t, "spec.source.git", fault.Field)
	})
	spec.Source.GetGit().Credential = "forge"
	t.Run("with the wrong password", func(t *testing.T) {
		out := run(t, c, Inputs{Spec: spec, Credentials: gitCredentials("robot", "wrong")})
		require.Error(t, out.err)
		require.NotContains(t, out.err.Error()+out.log+out.names, "wrong")
	})
	t.Run("with credentials", func(t *testing.T) {
		out := mustRun(t, c, Inputs{Spec: spec, Credentials: gitCredentials("robot", "s3cret token")})
		require.Equal(t, commit, out.response[RevisionKey])
		require.NotContains(t, out.names+out.log, "s3cret")
	})
	t.Run("out of a step's reach", func(t *testing.T) {
		spec.Strategy = inlineDockerfile(`FROM scratch
RUN --mount=type=secret,id=GIT_AUTH_HEADER,required --mount=type=secret,id=GIT_AUTH_TOKEN,required ["/x"]
`)
		out := run(t, c, Inputs{Spec: spec, Credentials: gitCredentials("robot", "s3cret token")})
		require.ErrorContains(t, out.err, "secret")
	})
}

func gitCredentials(user, password string) *agentv1.Credentials {
	return &agentv1.Credentials{Git: map[string]*agentv1.GitCredential{"forge": {Username: user, Password: password}}}
}
