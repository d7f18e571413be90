package nodestore

import (
	"net/url"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}

func TestParseName(t *testing.T) {
	d := digest.FromString("x").String()
	for name, want := range map[string]string{
		"busybox":                  "docker.io/library/busybox:latest",
		"busybox:1":                "docker.io/library/busybox:1",
		"team/app:v2":              "docker.io/team/app:v2",
		"registry.example:5000/a":  "registry.example:5000/a:latest",
		"a@" + d:                   "docker.io/library/a@" + d,
		"a:1@" + d:                 "docker.io/library/a@" + d,
		"127.0.0.1:5000/a/b/c:x.y": "127.0.0.1:5000/a/b/c:x.y",
	} {
		got, err := ParseName(name)
		require.NoError(t, err, name)
		require.Equal(t, want, got.String())
	}
	for _, name := range []string{
		"", " ", "A", "a b", "a\nb", "a\x00", "../a", "a/../b", "/a", "a//b", "a:", "a@", "a@sha256:0", "a:" + strings.Repeat("t", 129),
		strings.Repeat("a", 300), "https://registry.example/a", "a,labels.x==y", "a\"", strings.Repeat("0", 64), "é",
	} {
		_, err := ParseName(name)
		require.Error(t, err, "%q", name)
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", name, err)
	}
}
