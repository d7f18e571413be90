package containerd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/json"
	"os"
	"sort"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// builder makes images in a content store, as a build does.
type builder struct {
	t     *testing.T
	ctx   context.Context
	store content.Store
}

func newBuilder(t *testing.T) *builder {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	require.NoError(t, err)
	return &builder{t: t, ctx: context.Background(), store: store}
}

// put stores data and describes it.
func (b *builder) put(mediaType string, data []byte) ocispecs.Descriptor {
	b.t.Helper()
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	require.NoError(b.t, content.WriteBlob(b.ctx, b.store, desc.Digest.String(), bytes.NewReader(data), desc))
	return desc
}

func (b *builder) putJSON(mediaType string, v any) ocispecs.Descriptor {
	b.t.Helper()
	data, err := json.Marshal(v)
	require.NoError(b.t, err)
	return b.put(mediaType, data)
}

// file is an entry of a layer.
type file struct {
	name string
	mode int64
	data []byte
}

// layer returns a compressed layer, and the digest of what is in it.
func (b *builder) layer(files ...file) (ocispecs.Descriptor, digest.Digest) {
	b.t.Helper()
	var plain, packed bytes.Buffer
	tw := tar.NewWriter(&plain)
	for _, f := range files {
		require.NoError(b.t, tw.WriteHeader(&tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), Typeflag: tar.TypeReg}))
		_, err := tw.Write(f.data)
		require.NoError(b.t, err)
	}
	require.NoError(b.t, tw.Close())
	gz, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	require.NoError(b.t, err)
	_, err = gz.Write(plain.Bytes())
	require.NoError(b.t, err)
	require.NoError(b.t, gz.Close())
	return b.put(ocispecs.MediaTypeImageLayerGzip, packed.Bytes()), digest.FromBytes(plain.Bytes())
}

// image is an image of busybox and a second layer with random content.
type image struct {
	target, manifest, config ocispecs.Descriptor
	layers                   []ocispecs.Descriptor
	diffIDs                  []digest.Digest
}

// busybox builds an image that runs command, as an index of this platform and one
// that the node does not have.
func (b *builder) busybox(command ...string) image {
	b.t.Helper()
	program, err := os.ReadFile("/bin/busybox")
	require.NoError(b.t, err, "Debian's busybox-static is missing; run `make deps`")
	noise := make([]byte, 3<<20)
	rand.Read(noise)
	var img image
	for _, files := range [][]file{
		{{"bin/busybox", 0o755, program}},
		{{"noise", 0o644, noise}, {"bin/hello", 0o755, []byte("#!/bin/busybox sh\necho hello from the node\n")}},
	} {
		desc, diffID := b.layer(files...)
		img.layers, img.diffIDs = append(img.layers, desc), append(img.diffIDs, diffID)
	}
	platform := platforms.DefaultSpec()
	platform.Variant, platform.OSVersion = "", ""
	img.config = b.putJSON(ocispecs.MediaTypeImageConfig, ocispecs.Image{
		Platform: platform,
		Config:   ocispecs.ImageConfig{Cmd: command, Env: []string{"PATH=/bin"}},
		RootFS:   ocispecs.RootFS{Type: "layers", DiffIDs: img.diffIDs},
	})
	img.manifest = b.putJSON(ocispecs.MediaTypeImageManifest, ocispecs.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageManifest, Config: img.config, Layers: img.layers,
	})
	here, there := img.manifest, img.manifest
	here.Platform = &platform
	there.Platform = &ocispecs.Platform{OS: "plan9", Architecture: "mips"}
	there.Digest = digest.FromString("a manifest that is elsewhere")
	img.target = b.putJSON(ocispecs.MediaTypeImageIndex, ocispecs.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageIndex, Manifests: []ocispecs.Descriptor{there, here},
	})
	return img
}

// small builds an image of one file.
func (b *builder) small(text string) ocispecs.Descriptor {
	b.t.Helper()
	layer, diffID := b.layer(file{"text", 0o644, []byte(text)})
	platform := platforms.DefaultSpec()
	config := b.putJSON(ocispecs.MediaTypeImageConfig, ocispecs.Image{Platform: platform, RootFS: ocispecs.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}}})
	return b.putJSON(ocispecs.MediaTypeImageManifest, ocispecs.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageManifest, Config: config, Layers: []ocispecs.Descriptor{layer},
	})
}

// blobs lists everything of the image that a node gets.
func (i image) blobs() []ocispecs.Descriptor {
	return append([]ocispecs.Descriptor{i.target, i.manifest, i.config}, i.layers...)
}

// push pushes the image's one platform to a plain registry.
func (b *builder) push(ref string, i image) {
	b.t.Helper()
	ctx := context.Background()
	client, done := plainClient()
	defer done()
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost), docker.WithClient(client))})
	pusher, err := resolver.Pusher(ctx, ref)
	require.NoError(b.t, err)
	require.NoError(b.t, remotes.PushContent(ctx, pusher, i.manifest, b.store, nil, platforms.All, nil))
}

func walkContent(t *testing.T, ctx context.Context, store content.Store) []string {
	t.Helper()
	var all []string
	require.NoError(t, store.Walk(ctx, func(i content.Info) error {
		all = append(all, "blob "+i.Digest.String())
		return nil
	}))
	ingests, err := store.ListStatuses(ctx)
	require.NoError(t, err)
	for _, i := range ingests {
		all = append(all, "ingest "+i.Ref)
	}
	sort.Strings(all)
	return all
}

func walkSnapshots(t *testing.T, ctx context.Context, sn snapshots.Snapshotter) []string {
	t.Helper()
	var all []string
	require.NoError(t, sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		all = append(all, "snapshot "+i.Name)
		return nil
	}))
	sort.Strings(all)
	return all
}
