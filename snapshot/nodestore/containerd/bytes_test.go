package containerd

import (
	"testing"

	ctdimages "github.com/containerd/containerd/v2/core/images"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/snapshot/nodestore"
)

func TestBytesOfImages(t *testing.T) {
	d, r, b := startDaemon(t, ""), startRegistry(t), newBuilder(t)
	img, other := b.busybox("hello"), b.busybox("other")
	repo := r.addr + "/team/base"
	b.push(repo+":1", img)
	b.push(repo+":latest", other)
	b.push(repo+":unused", img)
	b.push(r.addr+"/team/copy:1", img)
	d.pull(repo + ":1")
	d.pull(repo + ":latest")
	n := d.node("test")
	// An index, as Receive leaves it: the node has one of its platforms.
	received := named(t, "registry.example/received:1")
	_, err := n.Receive(t.Context(), nodestore.Image{Name: received, Target: img.target, Content: b.store})
	require.NoError(t, err)
	before := d.holdings()
	r.forget()

	bytesOf := func(i image) int64 { return i.config.Size + i.layers[0].Size + i.layers[1].Size }
	for name, want := range map[string]int64{
		repo + ":1":      bytesOf(img),
		repo + ":latest": bytesOf(other),
		repo:             bytesOf(other),
		repo + "@" + img.manifest.Digest.String():         bytesOf(img),
		received.String():                                 bytesOf(img),
		received.Name() + "@" + string(img.target.Digest): bytesOf(img),
		// The same bytes under names that the node does not know: they would be fetched.
		repo + ":unused":        0,
		repo + ":2":             0,
		r.addr + "/team/copy:1": 0,
		r.addr + "/team/copy@" + img.manifest.Digest.String(): 0,
		repo + "@" + digest.FromString("other").String():      0,
		repo + "@" + img.layers[0].Digest.String():            0,
		"docker.io/library/busybox:1":                         0,
	} {
		ref, err := nodestore.ParseName(name)
		require.NoError(t, err)
		size, err := n.Bytes(t.Context(), ref)
		require.NoError(t, err, name)
		require.Equal(t, want, size, name)
	}
	size, err := n.Bytes(t.Context(), named(t, repo))
	require.NoError(t, err)
	require.Equal(t, bytesOf(other), size, "a name alone is latest")
	requests, _ := r.records()
	require.Empty(t, requests, "no registry is asked")
	require.Equal(t, before, d.holdings())

	// Of an image for other platforms there is nothing to lend.
	elsewhere := b.putJSON(ocispecs.MediaTypeImageIndex, ocispecs.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageIndex,
		Manifests: []ocispecs.Descriptor{{
			MediaType: ocispecs.MediaTypeImageManifest, Digest: img.manifest.Digest, Size: img.manifest.Size,
			Platform: &ocispecs.Platform{OS: "plan9", Architecture: "mips"},
		}},
	})
	_, err = d.client.ImageService().Create(t.Context(), ctdimages.Image{Name: "registry.example/elsewhere:1", Target: elsewhere})
	require.NoError(t, err)
	size, err = n.Bytes(t.Context(), named(t, "registry.example/elsewhere:1"))
	require.NoError(t, err)
	require.Zero(t, size)

	d.removeImages(repo + ":1")
	size, err = n.Bytes(t.Context(), named(t, repo+":1"))
	require.NoError(t, err)
	require.Zero(t, size)
	d.stop()
	_, err = n.Bytes(t.Context(), named(t, repo+":latest"))
	require.ErrorContains(t, err, "does not answer")
}
