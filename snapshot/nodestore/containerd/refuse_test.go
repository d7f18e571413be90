package containerd

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/snapshot/nodestore"
)

// provider serves other content than the store for some blobs.
type provider struct {
	content.Provider
	replace map[digest.Digest]func() (content.ReaderAt, error)
}

func (p provider) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if f, ok := p.replace[desc.Digest]; ok {
		return f()
	}
	return p.Provider.ReaderAt(ctx, desc)
}

type wrongBytes struct{ size int64 }

func (w wrongBytes) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), w.size-off)
	clear(p[:n])
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}
func (w wrongBytes) Size() int64 { return w.size }
func (wrongBytes) Close() error  { return nil }

func TestReceiveRefusals(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	good := b.busybox("good")
	_, err := n.Receive(t.Context(), nodestore.Image{Name: parsed(t, "good:1"), Target: good.target, Content: b.store})
	require.NoError(t, err)
	before := d.holdings()

	img := b.busybox("bad")
	serve := func(blob ocispecs.Descriptor, f func() (content.ReaderAt, error)) content.Provider {
		return provider{Provider: b.store, replace: map[digest.Digest]func() (content.ReaderAt, error){blob.Digest: f}}
	}
	missing := func() (content.ReaderAt, error) { return nil, errdefs.ErrNotFound }
	broken := func() (content.ReaderAt, error) { return nil, errors.New("disk error") }
	wrong := func(size int64) func() (content.ReaderAt, error) {
		return func() (content.ReaderAt, error) { return wrongBytes{size}, nil }
	}
	manifest := func(m ocispecs.Manifest) ocispecs.Descriptor {
		m.Versioned, m.MediaType = specs.Versioned{SchemaVersion: 2}, ocispecs.MediaTypeImageManifest
		return b.putJSON(m.MediaType, m)
	}
	swapped := slices.Clone(img.layers)
	slices.Reverse(swapped)
	shrunk := slices.Clone(img.layers)
	shrunk[1].Size--
	known := slices.Clone(good.layers)
	known[1].Size++
	traversal := slices.Clone(img.layers)
	traversal[1].Digest = "sha256:../../../../etc/passwd"
	negative := slices.Clone(img.layers)
	negative[1].Size = -1
	notImage := img.layers[0]
	notImage.MediaType = ocispecs.MediaTypeImageManifest
	huge := b.put(ocispecs.MediaTypeImageManifest, make([]byte, maxDocument+1))
	text := b.put(ocispecs.MediaTypeImageLayerGzip, []byte("no archive"))
	name := parsed(t, "bad:1")

	for attack, tc := range map[string]struct {
		image nodestore.Image
		names string
		is    func(error) bool
	}{
		"no name":                    {nodestore.Image{Target: img.target, Content: b.store}, "name", errdefs.IsInvalidArgument},
		"short name":                 {nodestore.Image{Name: shortName("bad:1"), Target: img.target, Content: b.store}, "bad:1", errdefs.IsInvalidArgument},
		"name with a line break":     {nodestore.Image{Name: shortName("bad\n:1"), Target: img.target, Content: b.store}, "bad", errdefs.IsInvalidArgument},
		"name of an image ID":        {nodestore.Image{Name: shortName(good.config.Digest.String()), Target: img.target, Content: b.store}, "", errdefs.IsInvalidArgument},
		"digest of another image":    {nodestore.Image{Name: parsed(t, "bad@"+good.target.Digest.String()), Target: img.target, Content: b.store}, img.target.Digest.String(), errdefs.IsInvalidArgument},
		"target without digest":      {nodestore.Image{Name: name, Target: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest}, Content: b.store}, "bad", errdefs.IsInvalidArgument},
		"target is a layer":          {nodestore.Image{Name: name, Target: img.layers[0], Content: b.store}, ocispecs.MediaTypeImageLayerGzip, errdefs.IsInvalidArgument},
		"layer called a manifest":    {nodestore.Image{Name: name, Target: notImage, Content: b.store}, notImage.Digest.String(), nil},
		"manifest of many megabytes": {nodestore.Image{Name: name, Target: huge, Content: b.store}, huge.Digest.String(), errdefs.IsInvalidArgument},
		"missing index":              {nodestore.Image{Name: name, Target: img.target, Content: serve(img.target, missing)}, img.target.Digest.String(), errdefs.IsNotFound},
		"missing manifest":           {nodestore.Image{Name: name, Target: img.target, Content: serve(img.manifest, missing)}, img.manifest.Digest.String(), errdefs.IsNotFound},
		"missing configuration":      {nodestore.Image{Name: name, Target: img.target, Content: serve(img.config, missing)}, img.config.Digest.String(), errdefs.IsNotFound},
		"missing layer":              {nodestore.Image{Name: name, Target: img.target, Content: serve(img.layers[1], missing)}, img.layers[1].Digest.String(), errdefs.IsNotFound},
		"unreadable layer":           {nodestore.Image{Name: name, Target: img.target, Content: serve(img.layers[1], broken)}, img.layers[1].Digest.String(), nil},
		"layer of other bytes":       {nodestore.Image{Name: name, Target: img.target, Content: serve(img.layers[1], wrong(img.layers[1].Size))}, img.layers[1].Digest.String(), nil},
		"layer of another size":      {nodestore.Image{Name: name, Target: img.target, Content: serve(img.layers[1], wrong(img.layers[1].Size+1))}, img.layers[1].Digest.String(), errdefs.IsInvalidArgument},
		"size that lies":             {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: shrunk}), Content: b.store}, img.layers[1].Digest.String(), errdefs.IsInvalidArgument},
		"size of a known blob lies":  {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: good.config, Layers: known}), Content: b.store}, good.layers[1].Digest.String(), errdefs.IsInvalidArgument},
		"negative size":              {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: negative}), Content: b.store}, "-1", errdefs.IsInvalidArgument},
		"digest that is a path":      {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: traversal}), Content: b.store}, "etc/passwd", errdefs.IsInvalidArgument},
		"layers in another order":    {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: swapped}), Content: b.store}, "unpack", nil},
		"too few layers":             {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: img.layers[:1]}), Content: b.store}, "unpack", nil},
		"layer that is no archive":   {nodestore.Image{Name: name, Target: manifest(ocispecs.Manifest{Config: img.config, Layers: []ocispecs.Descriptor{img.layers[0], text}}), Content: b.store}, "unpack", nil},
		"index of other platforms": {nodestore.Image{Name: name, Content: b.store, Target: b.putJSON(ocispecs.MediaTypeImageIndex, ocispecs.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageIndex,
			Manifests: []ocispecs.Descriptor{{MediaType: ocispecs.MediaTypeImageManifest, Digest: img.manifest.Digest, Size: img.manifest.Size, Platform: &ocispecs.Platform{OS: "plan9", Architecture: "mips"}}},
		})}, "", errdefs.IsNotFound},
	} {
		t.Run(attack, func(t *testing.T) {
			_, err := n.Receive(t.Context(), tc.image)
			require.Error(t, err)
			require.ErrorContains(t, err, tc.names)
			if tc.is != nil {
				require.True(t, tc.is(err), err)
			}
			require.Equal(t, strings.Join(before, "\n"), strings.Join(d.holdings(), "\n"))
			require.Nil(t, d.status("bad:1"))
		})
	}

	_, err = n.Receive(t.Context(), nodestore.Image{Name: name, Target: img.target, Content: b.store})
	require.NoError(t, err, "the next image is received")
	require.Equal(t, img.config.Digest.String(), d.status("bad:1").GetId())
}

// shortName is a name that did not come from ParseName.
type shortName string

func (s shortName) String() string { return string(s) }
func (s shortName) Name() string   { return string(s) }

func TestCancelledReceiveLeavesNothing(t *testing.T) {
	d, b := startDaemon(t, ""), newBuilder(t)
	n := d.node("test")
	before := d.holdings()
	img := b.busybox("app")
	for _, at := range []ocispecs.Descriptor{img.target, img.config, img.layers[0], img.layers[1]} {
		ctx, cancel := context.WithCancel(t.Context())
		from := provider{Provider: b.store, replace: map[digest.Digest]func() (content.ReaderAt, error){at.Digest: func() (content.ReaderAt, error) {
			cancel()
			return b.store.ReaderAt(context.Background(), at)
		}}}
		_, err := n.Receive(ctx, nodestore.Image{Name: parsed(t, "app"), Target: img.target, Content: from})
		require.ErrorContains(t, err, "cancel")
		d.requireHoldings(before)
		cancel()
	}
}
