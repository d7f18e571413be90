package strategy

import (
	"bytes"
	"crypto/subtle"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

func TestOutputsAtOnce(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	spec := &agentv1.BuildSpec{
		Source:   inlineSource(map[string]string{"f": strings.Repeat("content ", 1000)}),
		Strategy: inlineDockerfile("FROM scratch\nCOPY f /\n"), SourceDateEpoch: 1700000000,
		Attestations: map[string]string{"provenance": "mode=max"},
		Outputs: []*agentv1.Output{
			{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: reg.host + "/a:1"}}},
			{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: reg.host + "/b:2"}}},
			{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{
				Image: reg.host + "/z:1", Compression: "zstd", Annotations: map[string]string{"org.example.key": "value, with = all"},
			}}},
			{To: &agentv1.Output_Node{Node: &agentv1.NodeOutput{Image: "example.com/node:1"}}},
		},
	}
	out := mustRun(t, c, Inputs{Spec: spec})
	first, err := remote.Head(reg.reference(reg.host + "/a:1"))
	require.NoError(t, err)
	second, err := remote.Head(reg.reference(reg.host + "/b:2"))
	require.NoError(t, err)
	require.Equal(t, first.Digest, second.Digest)
	require.Equal(t, first.Digest.String(), out.response["containerimage.digest"])

	zstd := reg.pull(reg.host + "/z:1")
	manifest, err := zstd.image.Manifest()
	require.NoError(t, err)
	require.Equal(t, types.OCILayerZStd, manifest.Layers[0].MediaType)
	require.Equal(t, "value, with = all", manifest.Annotations["org.example.key"])
	plain := reg.pull(reg.host + "/a:1")
	require.Equal(t, int64(1700000000), plain.headers["f"].ModTime.Unix())
	require.Equal(t, int64(1700000000), plain.config.Created.Unix())

	index, err := remote.Index(reg.reference(reg.host + "/a:1"))
	require.NoError(t, err)
	list, err := index.IndexManifest()
	require.NoError(t, err)
	require.Len(t, list.Manifests, 2, "the image and what attests it")
}

// TestProvenanceNamesTheRepository looks for the repository and commit, and for
// nothing secret.
func TestProvenanceNamesTheRepository(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	repo := newRepository(t)
	commit := repo.commit(map[string]string{"app/Dockerfile": "FROM scratch\nCOPY . /\n"})
	src := gitSource(repo.serve("robot", "hunter2"), "main")
	src.ContextDir, src.GetGit().Credential = "app", "forge"
	image := reg.host + "/attested:1"
	mustRun(t, c, Inputs{
		Spec: &agentv1.BuildSpec{
			Source: src, Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}},
			Attestations: map[string]string{"provenance": "mode=max"}, Outputs: pushTo(image),
		},
		Credentials: gitCredentials("robot", "hunter2"),
	})
	doc := provenance(t, reg, image)
	require.Contains(t, doc, commit)
	require.NotContains(t, doc, "hunter2")
	require.NotContains(t, doc, string(basicAuth(gitCredentials("robot", "hunter2").Git["forge"])))
	var parsed struct {
		Predicate struct {
			BuildDefinition struct {
				ExternalParameters struct {
					ConfigSource struct {
						URI    string
						Path   string
						Digest map[string]string
					}
				}
			}
		}
	}
	require.NoError(t, json.Unmarshal([]byte(doc), &parsed))
	source := parsed.Predicate.BuildDefinition.ExternalParameters.ConfigSource
	require.Contains(t, source.URI, src.GetGit().Url+"#main")
	require.Equal(t, "Dockerfile", source.Path)
}

// provenance returns the statement that is attached to an image.
func provenance(t *testing.T, reg *testRegistry, image string) string {
	t.Helper()
	index, err := remote.Index(reg.reference(image))
	require.NoError(t, err)
	list, err := index.IndexManifest()
	require.NoError(t, err)
	for _, m := range list.Manifests {
		if m.Annotations["vnd.docker.reference.type"] != "attestation-manifest" {
			continue
		}
		im, err := index.Image(m.Digest)
		require.NoError(t, err)
		layers, err := im.Layers()
		require.NoError(t, err)
		rc, err := layers[0].Uncompressed()
		require.NoError(t, err)
		defer rc.Close()
		var buf bytes.Buffer
		_, err = buf.ReadFrom(rc)
		require.NoError(t, err)
		return buf.String()
	}
	t.Fatal("nothing is attested")
	return ""
}

func TestCacheGoesThroughARegistry(t *testing.T) {
	reg := newRegistry(t)
	busybox := reg.pushBusybox(nil)
	cache := reg.host + "/cache:1"
	for name, spec := range map[string]*agentv1.BuildSpec{
		"dockerfile": {Strategy: inlineDockerfile("FROM " + busybox + "\nRUN echo once > /f\n")},
		"steps":      stepsSpec(nil, workspaceImage, shell("once", busybox, "echo once > f")),
	} {
		t.Run(name, func(t *testing.T) {
			spec.CacheTo = []*agentv1.CacheRef{{Type: "registry", Attributes: map[string]string{"ref": cache, "mode": "max"}}}
			mustRun(t, connect(t, sandbox.Userns), Inputs{Spec: spec})
			spec.CacheTo, spec.CacheFrom = nil, []*agentv1.CacheRef{{Type: "registry", Attributes: map[string]string{"ref": cache}}}
			spec.Outputs = pushTo(reg.host + "/cached:1")
			out := mustRun(t, connect(t, sandbox.Userns), Inputs{Spec: spec})
			require.Regexp(t, `echo once > /?f cached=true`, out.names)
			require.Equal(t, "once\n", reg.pull(reg.host + "/cached:1").files["f"])
		})
	}
}

func TestRegistryCredentials(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", home)
	c, open := connect(t, sandbox.Userns), newRegistry(t)
	base := open.push("base:1", entries{"f": "private"}, nil)
	target, err := url.Parse("http://" + open.host)
	require.NoError(t, err)
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.Out.Host = r.In.Host }}
	guarded := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != "robot" || subtle.ConstantTimeCompare([]byte(p), []byte("hunter2")) != 1 {
			w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	defer guarded.Close()
	host := strings.TrimPrefix(guarded.URL, "http://")
	spec := &agentv1.BuildSpec{
		Strategy: inlineDockerfile("FROM " + strings.Replace(base, open.host, host, 1) + "\nLABEL a=b\n"),
		Outputs:  pushTo(host + "/pushed:1"),
	}
	for name, x := range map[string]struct {
		credential *agentv1.RegistryCredential
		ok         bool
	}{
		"none": {nil, false}, "wrong": {&agentv1.RegistryCredential{Username: "robot", Password: "no"}, false},
		"right": {&agentv1.RegistryCredential{Username: "robot", Password: "hunter2"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			creds := &agentv1.Credentials{Registries: map[string]*agentv1.RegistryCredential{}}
			if x.credential != nil {
				creds.Registries[host] = x.credential
			}
			out := run(t, c, Inputs{Spec: spec, Credentials: creds})
			require.Equal(t, x.ok, out.err == nil, out.err)
		})
	}
	require.Equal(t, "private", open.pull(open.host + "/pushed:1").files["f"])
	left, err := os.ReadDir(home)
	require.NoError(t, err)
	require.Empty(t, left, "nothing is written for a credential")
}
