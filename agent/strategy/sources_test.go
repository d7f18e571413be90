package strategy

import (
	"bytes"
	"compress/gzip"
	"net/http"
	"net/http/httptest"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

func TestHTTPSource(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	var archive bytes.Buffer
	w := gzip.NewWriter(&archive)
	_, err := w.Write(tarOf(t, entries{"Dockerfile": "FROM scratch\nCOPY a /\n", "a": "from http"}))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	served := archive.Bytes()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/a.tgz":
			_, _ = w.Write(served)
		case "/broken.tgz":
			_, _ = w.Write(served[:20])
		case "/truncated.tgz":
			_, _ = w.Write(served[:len(served)-30])
		case "/text":
			_, _ = w.Write([]byte("FROM scratch\n"))
		default:
			http.NotFound(w, r)
		}
	}))
	defer s.Close()
	build := func(url, dgst string) outcome {
		return run(t, c, Inputs{Spec: &agentv1.BuildSpec{
			Source:   &agentv1.Source{From: &agentv1.Source_Http{Http: &agentv1.HTTPSource{Url: url, Digest: dgst}}},
			Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}},
			Outputs:  pushTo(reg.host + "/http:1"),
		}})
	}
	for name, dgst := range map[string]string{"unchecked": "", "checked": digest.FromBytes(served).String()} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, build(s.URL+"/a.tgz", dgst).err)
			require.Equal(t, entries{"a": "from http"}, reg.pull(reg.host+"/http:1").files)
		})
	}
	for name, x := range map[string]struct{ path, digest, want string }{
		"another digest": {"/a.tgz", digest.FromString("x").String(), "digest mismatch"},
		"missing":        {"/nope", "", "404"},
		"broken":         {"/broken.tgz", "", "cannot be unpacked"},
		"truncated":      {"/truncated.tgz", "", "unexpected EOF"},
		"no archive":     {"/text", "", "it is not an archive"},
	} {
		t.Run(name, func(t *testing.T) {
			out := build(s.URL+x.path, x.digest)
			var fault *SourceError
			require.ErrorAs(t, out.cause, &fault)
			require.ErrorContains(t, out.cause, x.want)
			require.Equal(t, "spec.source.http", fault.Field)
			require.Error(t, out.err)
		})
	}
}

func TestContentOfImagesOverASource(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	lib := reg.push("lib:1", entries{
		"opt/lib/one": "1", "opt/lib/sub/two": "2", "opt/file": "f", "links/": "", "links/lib": "-> ../opt/lib", "links/out": "-> ../../../../../../etc",
	}, nil)
	src := inlineSource(map[string]string{"ctx/file": "source", "ctx/keep": "kept", "ctx/dir/mine": "mine"})
	copyAll := &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{Inline: "FROM scratch\nCOPY . /\n"}}
	paths := func(list ...string) *agentv1.ImageSource {
		im := &agentv1.ImageSource{Image: lib}
		for i := 0; i < len(list); i += 2 {
			im.Paths = append(im.Paths, &agentv1.ImagePath{SourcePath: list[i], DestinationDir: list[i+1]})
		}
		return im
	}
	for name, x := range map[string]struct {
		images []*agentv1.ImageSource
		dir    string
		want   entries
	}{
		"directory with its name": {[]*agentv1.ImageSource{paths("/opt/lib", "ctx/dir")}, "ctx", entries{"file": "source", "keep": "kept", "dir/mine": "mine", "dir/lib/one": "1", "dir/lib/sub/two": "2"}},
		"slash at the end":        {[]*agentv1.ImageSource{paths("/opt/lib/", "new/dir")}, "new", entries{"dir/lib/one": "1", "dir/lib/sub/two": "2"}},
		"content alone":           {[]*agentv1.ImageSource{paths("/opt/lib/.", "ctx/dir")}, "ctx/dir", entries{"mine": "mine", "one": "1", "sub/two": "2"}},
		"content into a new dir":  {[]*agentv1.ImageSource{paths("/opt/lib/.", "new")}, "new", entries{"one": "1", "sub/two": "2"}},
		"file over a file":        {[]*agentv1.ImageSource{paths("/opt/file", "ctx")}, "ctx", entries{"file": "f", "keep": "kept", "dir/mine": "mine"}},
		"twice, the last counts":  {[]*agentv1.ImageSource{paths("/opt/file", "new"), paths("/opt/lib/one", "new")}, "new", entries{"file": "f", "one": "1"}},
		"to the root":             {[]*agentv1.ImageSource{paths("/opt/lib/sub/.", "")}, "", entries{"ctx/file": "source", "ctx/keep": "kept", "ctx/dir/mine": "mine", "two": "2"}},
		"through a link":          {[]*agentv1.ImageSource{paths("/links/lib/.", "new")}, "new", entries{"one": "1", "sub/two": "2"}},
		"all of the image":        {[]*agentv1.ImageSource{paths("/opt/.", "new"), paths("/", "all")}, "all/opt/lib", entries{"one": "1", "sub/two": "2"}},
	} {
		t.Run(name, func(t *testing.T) {
			src.Images, src.ContextDir = x.images, x.dir
			mustRun(t, c, Inputs{Spec: &agentv1.BuildSpec{Source: src, Strategy: copyAll, Outputs: pushTo(reg.host + "/composed:1")}})
			require.Equal(t, x.want, reg.pull(reg.host+"/composed:1").files)
		})
	}
	for name, im := range map[string]*agentv1.ImageSource{
		"missing path":         paths("/nope", "x"),
		"link out of an image": paths("/links/out/passwd", "x"),
		"missing image":        {Image: reg.host + "/none:1", Paths: []*agentv1.ImagePath{{SourcePath: "/x"}}},
	} {
		t.Run(name, func(t *testing.T) {
			src.Images, src.ContextDir = []*agentv1.ImageSource{im}, ""
			out := run(t, c, Inputs{Spec: &agentv1.BuildSpec{Source: src, Strategy: copyAll}})
			require.Error(t, out.err)
			var fault *SourceError
			require.ErrorAs(t, out.cause, &fault)
			require.Equal(t, "spec.source.images[0]", fault.Field)
		})
	}
	t.Run("over a repository", func(t *testing.T) {
		repo := newRepository(t)
		repo.commit(map[string]string{"app/Dockerfile": "FROM scratch\nCOPY . /\n"})
		s := gitSource(repo.serve("", ""), "")
		s.Images, s.ContextDir = []*agentv1.ImageSource{paths("/opt/file", "app/from-image")}, "app"
		mustRun(t, c, Inputs{Spec: &agentv1.BuildSpec{
			Source: s, Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}}, Outputs: pushTo(reg.host + "/composed:2"),
		}})
		require.Equal(t, entries{"Dockerfile": "FROM scratch\nCOPY . /\n", "from-image/file": "f"}, reg.pull(reg.host+"/composed:2").files)
	})
}

func TestNamedContexts(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	lib := reg.push("lib:1", entries{"file": "from the image"}, func(c *v1.Config) { c.Labels = map[string]string{"of": "lib"} })
	repo := newRepository(t)
	repo.commit(map[string]string{"sub/file2": "from git"})
	mustRun(t, c, Inputs{Spec: &agentv1.BuildSpec{
		Source:   &agentv1.Source{NamedContexts: map[string]string{"lib": "docker-image://" + lib, "code": repo.serve("", "") + "#main:sub"}},
		Strategy: inlineDockerfile("FROM lib\nCOPY --from=code file2 /\n"), Outputs: pushTo(reg.host + "/named:1"),
	}})
	got := reg.pull(reg.host + "/named:1")
	require.Equal(t, entries{"file": "from the image", "file2": "from git"}, got.files)
	require.Equal(t, "lib", got.config.Config.Labels["of"])
}
