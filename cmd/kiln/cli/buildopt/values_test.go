package buildopt

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParsePairs(t *testing.T) {
	t.Setenv("KILN_TEST_SET", "from-env")
	tests := []struct {
		name    string
		in      []string
		fromEnv bool
		want    map[string]string
		err     string
	}{
		{"none", nil, true, map[string]string{}, ""},
		{"value with equals signs", []string{"a=b=c"}, true, map[string]string{"a": "b=c"}, ""},
		{"the last one counts", []string{"a=1", "a=2"}, true, map[string]string{"a": "2"}, ""},
		{"from the environment", []string{"KILN_TEST_SET"}, true, map[string]string{"KILN_TEST_SET": "from-env"}, ""},
		{"not in the environment", []string{"KILN_TEST_UNSET"}, true, map[string]string{}, ""},
		{"label without a value", []string{"a"}, false, map[string]string{"a": ""}, ""},
		{"empty key", []string{"=b"}, true, nil, "the key is empty"},
		{"empty", []string{""}, true, nil, "the key is empty"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParsePairs(tt.in, tt.fromEnv)
			check(t, tt.want, got, tt.err, err)
		})
	}
}

// check compares a parser's result with what a table wants of it.
func check[T any](t *testing.T, want, got T, wantErr string, err error) {
	t.Helper()
	if wantErr != "" {
		require.ErrorContains(t, err, wantErr)
		return
	}
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestParseHosts(t *testing.T) {
	tests := []struct{ name, in, want, err string }{
		{"colon", "db:10.0.0.1", "db=10.0.0.1", ""},
		{"equals sign", "db=10.0.0.1", "db=10.0.0.1", ""},
		{"IPv6", "db:::1", "db=::1", ""},
		{"IPv6 in brackets", "db=[::1]", "db=::1", ""},
		{"two addresses", "db=10.0.0.1,10.0.0.2", "db=10.0.0.1,db=10.0.0.2", ""},
		{"no address", "db:", "", "want HOST:IP"},
		{"no host", ":10.0.0.1", "", "want HOST:IP"},
		{"a name for an address", "db:other", "", "not an IP address"},
		{"the node", "db:host-gateway", "", "never does"},
		{"line break", "a\nb:10.0.0.1", "", "want HOST:IP"},
		{"comma", "a,b:10.0.0.1", "", "want HOST:IP"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseHosts([]string{tt.in})
			check(t, tt.want, got, tt.err, err)
		})
	}
}

func TestParseUlimits(t *testing.T) {
	got, err := ParseUlimits([]string{"nofile=1024:2048", "core=0"})
	check(t, "nofile=1024:2048,core=0:0", got, "", err)
	for _, bad := range []string{"", "nofile", "nofile=", "nofile=5:2", "nonsense=1"} {
		_, err := ParseUlimits([]string{bad})
		require.ErrorContains(t, err, "invalid ulimit", bad)
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"": 0, "64m": 64 << 20, "1g": 1 << 30, "512": 512} {
		got, err := ParseSize(in)
		check(t, want, got, "", err)
	}
	for _, bad := range []string{"x", "-1", "1q"} {
		_, err := ParseSize(bad)
		require.ErrorContains(t, err, "invalid size", bad)
	}
}

func TestParsePlatforms(t *testing.T) {
	got, err := ParsePlatforms([]string{"linux/amd64,linux/arm64/v8", "linux/arm/v7"})
	check(t, []string{"linux/amd64", "linux/arm64", "linux/arm/v7"}, got, "", err)
	got, err = ParsePlatforms([]string{"local"})
	require.NoError(t, err)
	require.Len(t, got, 1)
	_, err = ParsePlatforms([]string{"linux/amd64/x/y"})
	require.ErrorContains(t, err, "invalid platform")
}

func TestParseTags(t *testing.T) {
	got, err := ParseTags([]string{"app", "127.0.0.1:5000/a/b:v1"})
	check(t, []string{"docker.io/library/app:latest", "127.0.0.1:5000/a/b:v1"}, got, "", err)
	for _, bad := range []string{"", "App", "a:b:c", "a@sha256:" + strings.Repeat("0", 64)} {
		_, err := ParseTags([]string{bad})
		require.ErrorContains(t, err, "invalid tag", bad)
	}
}

func TestParseContexts(t *testing.T) {
	got, err := ParseContexts([]string{"base=docker-image://alpine", "docker.io/library/go:latest=target:x", "go:1=."})
	check(t, map[string]string{"base": "docker-image://alpine", "go": "target:x", "go:1": "."}, got, "", err)
	for _, bad := range []string{"", "base", "base=", "=x", "BASE=x"} {
		_, err := ParseContexts([]string{bad})
		require.ErrorContains(t, err, "invalid build context", bad)
	}
}

func TestParseAttests(t *testing.T) {
	s := func(v string) *string { return &v }
	got, err := ParseAttests([]string{"type=sbom,generator=a/b", Shorthand("provenance", "mode=max"), Shorthand("sbom", "false")})
	check(t, map[string]*string{"provenance": s("type=provenance,mode=max"), "sbom": nil}, got, "", err)
	got, err = ParseAttests([]string{Shorthand("sbom", "true")})
	check(t, map[string]*string{"sbom": s("type=sbom")}, got, "", err)
	for _, bad := range []string{"", "type=other", "generator=x", "type=sbom,disabled=maybe", "type=sbom,x"} {
		_, err := ParseAttests([]string{bad})
		require.ErrorContains(t, err, "invalid", bad)
	}
}

func TestParseAnnotations(t *testing.T) {
	got, err := ParseAnnotations([]string{"a=b", "index:k=v=w", "manifest[linux/arm64],index-descriptor:x=y"})
	check(t, map[string]string{
		"annotation.a": "b", "annotation-index.k": "v=w",
		"annotation-manifest[linux/arm64].x": "y", "annotation-index-descriptor.x": "y",
	}, got, "", err)
	for _, bad := range []string{"", "a", "=b", "other:k=v", "index:=v", "manifest[linux:k=v"} {
		_, err := ParseAnnotations([]string{bad})
		require.ErrorContains(t, err, "invalid annotation", bad)
	}
}

func TestParseCache(t *testing.T) {
	from, err := ParseCacheFrom([]string{"user/app:cache", "type=local,src=/nowhere", "type=registry,ref=a/b"})
	require.NoError(t, err)
	require.Equal(t, "registry", from[0].Type)
	require.Equal(t, "docker.io/user/app:cache", from[0].Attrs["ref"])
	require.Equal(t, "/nowhere", from[1].Attrs["src"])
	to, err := ParseCacheTo([]string{"type=inline", "type=local,dest=d,mode=max"})
	require.NoError(t, err)
	require.Equal(t, "min", to[0].Attrs["mode"])
	require.Equal(t, "max", to[1].Attrs["mode"])
	for bad, want := range map[string]string{
		"type=gha": "type must be one of", "type=local": "needs src=", "type=inline": "imported with", "ref=x": "type must be", "UP": "ref:",
	} {
		_, err := ParseCacheFrom([]string{bad})
		require.ErrorContains(t, err, want, bad)
	}
	_, err = ParseCacheTo([]string{"type=inline,mode=most"})
	require.ErrorContains(t, err, "min or max")
}

func TestParseOCILayout(t *testing.T) {
	zero := "sha256:" + strings.Repeat("0", 64)
	tests := []struct{ in, dir, tag, digest, err string }{
		{"oci-layout:///a/b", "/a/b", "latest", "", ""},
		{"oci-layout://rel:v1", "rel", "v1", "", ""},
		{"oci-layout:///a/b@" + zero, "/a/b", "", zero, ""},
		{"oci-layout:///a:t@" + zero, "/a", "t", zero, ""},
		{"oci-layout:///a:b/c", "/a:b/c", "latest", "", ""},
		{"oci-layout:///a@sha256:12", "", "", "", "digest"},
		{"oci-layout://", "", "", "", "no directory"},
	}
	for _, tt := range tests {
		dir, tag, dgst, err := parseOCILayout(tt.in)
		if tt.err != "" {
			require.ErrorContains(t, err, tt.err, tt.in)
			continue
		}
		require.NoError(t, err, tt.in)
		require.Equal(t, []string{tt.dir, tt.tag, tt.digest}, []string{dir, tag, dgst.String()}, tt.in)
	}
}
