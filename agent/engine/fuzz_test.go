package engine

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/stretchr/testify/require"
)

// FuzzFrontendKey wants no reference to run but those with a digest that is listed.
func FuzzFrontendKey(f *testing.F) {
	listed := "front.example/end@sha256:" + strings.Repeat("a", 64)
	for _, s := range []string{listed, "front.example/end:x@sha256:" + strings.Repeat("a", 64), "front.example/end", "docker/dockerfile:1", "x@sha256:", "../x", strings.ToUpper(listed)} {
		f.Add(s)
	}
	p, err := newFrontendPolicy([]string{listed})
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, ref string) {
		key, ok := frontendKey(ref)
		if !ok {
			return
		}
		require.Contains(t, ref, key[strings.LastIndex(key, "@"):])
		if key == p.allowed[0] {
			require.True(t, strings.HasSuffix(ref, "@sha256:"+strings.Repeat("a", 64)), ref)
		}
	})
}

// FuzzMounts reads options of mounts.
func FuzzMounts(f *testing.F) {
	f.Add("overlay", "lowerdir=/a:/b\nupperdir=/u\nworkdir=/w")
	f.Add("tmpfs", "size=64m\nro")
	f.Add("bind", "rbind\nro")
	f.Add("tmpfs", "size=-1")
	f.Fuzz(func(t *testing.T, kind, options string) {
		tree, _, err := parseMounts([]mount.Mount{{Type: kind, Source: "/s", Options: strings.Split(options, "\n")}})
		if err == nil && tree.Tmpfs != nil {
			require.GreaterOrEqual(t, tree.Tmpfs.Size, int64(0))
		}
	})
}
