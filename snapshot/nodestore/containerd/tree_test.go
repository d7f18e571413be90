package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// blobs is a provider in memory.
type blobs map[digest.Digest][]byte

func (b blobs) ReaderAt(_ context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	data, ok := b[desc.Digest]
	if !ok {
		return nil, errdefs.ErrNotFound
	}
	return bytesAt{bytes.NewReader(data)}, nil
}

type bytesAt struct{ *bytes.Reader }

func (bytesAt) Close() error { return nil }

func (b blobs) put(mediaType string, data []byte) ocispecs.Descriptor {
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	b[desc.Digest] = data
	return desc
}

func (b blobs) putJSON(t testing.TB, mediaType string, v any) ocispecs.Descriptor {
	t.Helper()
	data, err := json.Marshal(v)
	require.NoError(t, err)
	return b.put(mediaType, data)
}

func TestTreeIsBounded(t *testing.T) {
	b := blobs{}
	many := ocispecs.Index{Versioned: specs.Versioned{SchemaVersion: 2}}
	for i := range maxDescriptors + 1 {
		many.Manifests = append(many.Manifests, ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromString(fmt.Sprint(i))})
	}
	err := newTree().add(t.Context(), b, b.putJSON(t, ocispecs.MediaTypeImageIndex, many))
	require.True(t, errdefs.IsInvalidArgument(err), err)

	huge := b.put(ocispecs.MediaTypeImageManifest, make([]byte, maxDocument+1))
	err = newTree().add(t.Context(), b, huge)
	require.True(t, errdefs.IsInvalidArgument(err), err)
	require.ErrorContains(t, err, huge.Digest.String())
}

// TestEmbeddedDataIsNotBelieved has a descriptor with bytes of its own beside the
// digest of others.
func TestEmbeddedDataIsNotBelieved(t *testing.T) {
	b := blobs{}
	real := b.putJSON(t, ocispecs.MediaTypeImageManifest, ocispecs.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, Config: b.put(ocispecs.MediaTypeImageConfig, []byte("{}"))})
	secret := digest.FromString("another tenant's layer")
	fake, err := json.Marshal(ocispecs.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, Layers: []ocispecs.Descriptor{{MediaType: ocispecs.MediaTypeImageLayer, Digest: secret}}})
	require.NoError(t, err)
	real.Data, real.Size = fake, int64(len(fake))
	tr := newTree()
	require.NoError(t, tr.add(t.Context(), b, real))
	require.NotContains(t, tr.blobs, secret)
}

// FuzzTree reads foreign documents as whatever their media type says.
func FuzzTree(f *testing.F) {
	for _, doc := range []string{
		`{}`, `[]`, `null`, ``, `{"schemaVersion":2,"manifests":[{"digest":"sha256:x","size":-1}]}`,
		`{"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + digest.FromString("{}").String() + `"},"layers":[null]}`,
		`{"rootfs":{"type":"layers","diff_ids":["sha256:x",""]}}`,
		`{"rootfs":{"type":"layers","diff_ids":["` + digest.FromString("a").String() + `","` + digest.FromString("b").String() + `"]}}`,
	} {
		f.Add([]byte(doc))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		for _, mediaType := range []string{ocispecs.MediaTypeImageIndex, ocispecs.MediaTypeImageManifest, ocispecs.MediaTypeImageConfig} {
			b := blobs{}
			tr := newTree()
			if tr.add(t.Context(), b, b.put(mediaType, doc)) != nil {
				continue
			}
			for blob := range tr.blobs {
				require.NoError(t, blob.Validate())
			}
			chains, err := tr.chains(t.Context(), b)
			if err != nil {
				continue
			}
			for chain := range chains {
				require.NoError(t, chain.Validate())
			}
		}
	})
}
