package buildopt

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/moby/buildkit/client"
	"github.com/stretchr/testify/require"
)

// contextDir makes a build context with a Dockerfile.
func contextDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\n"), 0o644))
	return dir
}

func env(stdin string) Env {
	return Env{Stdin: strings.NewReader(stdin), Stdout: Stdout{Writer: io.Discard}}
}

func TestNewRefuses(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "")
	dir := contextDir(t)
	empty := t.TempDir()
	tests := []struct {
		name  string
		flags Flags
		stdin string
		err   string
	}{
		{"no context", Flags{}, "", "build context is missing"},
		{"context that is not there", Flags{Context: "/no/such"}, "", "no such file"},
		{"context that is a file", Flags{Context: filepath.Join(dir, "Dockerfile")}, "", "not a directory"},
		{"no Dockerfile", Flags{Context: empty}, "", "cannot read the Dockerfile"},
		{"Dockerfile that is a directory", Flags{Context: dir, Dockerfile: dir}, "", "is a directory"},
		{"Dockerfile URL for a URL context", Flags{Context: "https://example.com/a.git", Dockerfile: "https://example.com/D"}, "", "--file"},
		{"stdin twice", Flags{Context: "-", Dockerfile: "-"}, "x", "both"},
		{"empty stdin", Flags{Context: "-"}, "", "stdin is empty"},
		{"empty Dockerfile on stdin", Flags{Context: dir, Dockerfile: "-"}, " \n", "is empty"},
		{"two Dockerfiles", Flags{Context: "-", Dockerfile: "D"}, "FROM scratch", "leave one out"},
		{"entitlement", Flags{Context: dir, Allow: []string{"network.host"}}, "", "--allow network.host: entitlements do not exist"},
		{"load", Flags{Context: dir, Load: true}, "", "docker load -i"},
		{"docker output without a file", Flags{Context: dir, Outputs: []string{"type=docker"}}, "", "docker load -i"},
		{"host network", Flags{Context: dir, Network: "host"}, "", "--network host"},
		{"other network", Flags{Context: dir, Network: "mine"}, "", "--network mine"},
		{"no-cache twice", Flags{Context: dir, NoCache: true, NoCacheFilter: []string{"a"}}, "", "--no-cache-filter"},
		{"push without a name", Flags{Context: dir, Push: true}, "", "add --tag"},
		{"unknown output", Flags{Context: dir, Outputs: []string{"type=floppy"}}, "", "type must be one of"},
		{"unknown output option", Flags{Context: dir, Outputs: []string{"type=oci,dst=x"}}, "", `no option "dst"`},
		{"local output without a directory", Flags{Context: dir, Outputs: []string{"type=local"}}, "", "needs dest=DIRECTORY"},
		{"local output into a file", Flags{Context: dir, Outputs: []string{filepath.Join(dir, "Dockerfile")}}, "", "not a directory"},
		{"archive onto a directory", Flags{Context: dir, Outputs: []string{"type=tar,dest=" + dir}}, "", "is a directory"},
		{"two outputs to stdout", Flags{Context: dir, Outputs: []string{"-", "type=oci"}}, "", "already writes to stdout"},
		{"image ID of a tree", Flags{Context: dir, Outputs: []string{"-"}, ImageIDFile: "x"}, "", "--iidfile"},
		{"docker output of two platforms", Flags{Context: dir, Outputs: []string{"type=docker,dest=x"}, Platforms: []string{"linux/amd64,linux/arm64"}}, "", "one platform"},
		{"docker output with attestations", Flags{Context: dir, Outputs: []string{"type=docker,dest=x"}, SBOM: "true"}, "", "attestations"},
		{"secret without a file", Flags{Context: dir, Secrets: []string{"id=a,src=/no/such"}}, "", "--secret"},
		{"secret without a variable", Flags{Context: dir, Secrets: []string{"id=a,env=KILN_TEST_UNSET"}}, "", "not set"},
		{"secret with an unknown key", Flags{Context: dir, Secrets: []string{"id=a,value=b"}}, "", "unknown key"},
		{"ssh key that is not there", Flags{Context: dir, SSH: []string{"default=/no/such"}}, "", "--ssh"},
		{"bad epoch", Flags{Context: dir, BuildArgs: []string{"SOURCE_DATE_EPOCH=today"}}, "", "seconds since 1970"},
		{"named context that is not there", Flags{Context: dir, Contexts: []string{"a=/no/such"}}, "", "--build-context a"},
		{"layout that is none", Flags{Context: dir, Contexts: []string{"a=oci-layout://" + empty}}, "", "not an OCI layout"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := New(tt.flags, env(tt.stdin))
			require.ErrorContains(t, err, tt.err)
		})
	}
}

func TestSecretErrorsDoNotShowValues(t *testing.T) {
	_, err := New(Flags{Context: contextDir(t), Secrets: []string{"id=a,value=hunter2"}}, env(""))
	require.Error(t, err)
	require.NotContains(t, err.Error(), "hunter2")
}

func TestNewDirectory(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	dir := contextDir(t)
	req, err := New(Flags{
		Context: dir, Tags: []string{"a", "b:1"}, BuildArgs: []string{"X=1"}, Labels: []string{"l=2"}, Target: "t", Network: "none",
		Platforms: []string{"linux/amd64"}, Hosts: []string{"h:10.0.0.1"}, ShmSize: "1m", NoCacheFilter: []string{"s1", "s2"}, Pull: true,
		Annotations: []string{"k=v"}, Contexts: []string{"other=" + dir, "img=docker-image://busybox", "context=" + dir},
	}, env(""))
	require.NoError(t, err)
	attrs := req.Solve.FrontendAttrs
	for k, v := range map[string]string{
		"filename": "Dockerfile", "build-arg:X": "1", "build-arg:SOURCE_DATE_EPOCH": "1700000000", "label:l": "2", "target": "t",
		"force-network-mode": "none", "platform": "linux/amd64", "add-hosts": "h=10.0.0.1", "shm-size": "1048576", "no-cache": "s1,s2",
		"image-resolve-mode": "pull", "attest:provenance": "mode=min,inline-only=true", "context:other": "local:other",
		"context:img": "docker-image://busybox", "context:context": "local:_context", "frontend.caps": capContexts,
	} {
		require.Equal(t, v, attrs[k], k)
	}
	require.Len(t, req.Solve.Exports, 1)
	require.Equal(t, client.ExporterImage, req.Solve.Exports[0].Type)
	require.Equal(t, "docker.io/library/a:latest,docker.io/library/b:1", req.Solve.Exports[0].Attrs["name"])
	require.Equal(t, "v", req.Solve.Exports[0].Attrs["annotation.k"])
	for _, m := range []string{"context", "dockerfile", "other", "_context"} {
		require.Contains(t, req.Solve.LocalMounts, m)
	}
}

func TestNewOutputs(t *testing.T) {
	dir := contextDir(t)
	req, err := New(Flags{Context: dir, Push: true, Tags: []string{"127.0.0.1:5000/a"}, Outputs: []string{"type=oci,dest=" + filepath.Join(t.TempDir(), "o.tar"), "type=cacheonly"}}, env(""))
	require.NoError(t, err)
	require.Len(t, req.Solve.Exports, 2)
	require.Equal(t, client.ExporterOCI, req.Solve.Exports[0].Type)
	require.Equal(t, "true", req.Solve.Exports[1].Attrs["push"])
	require.Equal(t, "false", req.Solve.Exports[1].Attrs["unpack"])

	req, err = New(Flags{Context: dir, Outputs: []string{"type=cacheonly"}}, env(""))
	require.NoError(t, err)
	require.Empty(t, req.Solve.Exports)
}

func TestNewStdin(t *testing.T) {
	req, err := New(Flags{Context: "-"}, env("FROM scratch\n"))
	require.NoError(t, err)
	require.Contains(t, req.Solve.LocalMounts, "context")
	f, err := req.Solve.LocalMounts["dockerfile"].Open("Dockerfile")
	require.NoError(t, err)
	data, err := io.ReadAll(f)
	require.NoError(t, err)
	require.Equal(t, "FROM scratch\n", string(data))
	require.NoError(t, req.Solve.LocalMounts["context"].Walk(context.Background(), "", func(p string, _ fs.DirEntry, err error) error {
		require.Empty(t, p)
		return err
	}))

	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "Dockerfile", Mode: 0o644, Size: 1}))
	_, err = w.Write([]byte("x"))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	req, err = New(Flags{Context: "-", Dockerfile: "sub/D"}, env(archive.String()))
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(req.Solve.FrontendAttrs["context"], "http://buildkit-session/"))
	require.Equal(t, "sub/D", req.Solve.FrontendAttrs["filename"])
}

func TestNewRemote(t *testing.T) {
	for _, url := range []string{"https://example.com/a.git#main:sub", "https://example.com/a.tar.gz", "git@example.com:a/b.git", "https://example.com/a.git?branch=x"} {
		req, err := New(Flags{Context: url}, env(""))
		require.NoError(t, err, url)
		require.Equal(t, url, req.Solve.FrontendAttrs["context"])
		require.Empty(t, req.Solve.LocalMounts)
		require.Equal(t, strings.Contains(url, "?"), req.Solve.FrontendAttrs["frontend.caps"] == capGitQuery)
	}
}

func TestProxiesOfTheDockerConfiguration(t *testing.T) {
	e := env("")
	e.Docker = configfile.New(filepath.Join(t.TempDir(), "config.json"))
	e.Docker.Proxies = map[string]configfile.ProxyConfig{"default": {HTTPProxy: "http://p:1", NoProxy: "x"}}
	req, err := New(Flags{Context: contextDir(t), BuildArgs: []string{"no_proxy=mine"}}, e)
	require.NoError(t, err)
	require.Equal(t, "http://p:1", req.Solve.FrontendAttrs["build-arg:HTTP_PROXY"])
	require.Equal(t, "mine", req.Solve.FrontendAttrs["build-arg:no_proxy"])
	require.NotContains(t, req.Solve.FrontendAttrs, "build-arg:NO_PROXY")
}

func TestLowercaseDockerfile(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "dockerfile"), []byte("FROM scratch\n"), 0o644))
	req, err := New(Flags{Context: dir}, env(""))
	require.NoError(t, err)
	require.Equal(t, "dockerfile", req.Solve.FrontendAttrs["filename"])
}
