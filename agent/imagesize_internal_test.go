package agent

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"math"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// TestSizeOfImage reads what an exporter would have left, and what none would.
func TestSizeOfImage(t *testing.T) {
	store, err := local.NewStore(t.TempDir())
	require.NoError(t, err)
	write := func(mediaType string, raw []byte) ocispecs.Descriptor {
		desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		require.NoError(t, content.WriteBlob(t.Context(), store, desc.Digest.String(), bytes.NewReader(raw), desc))
		return desc
	}
	document := func(mediaType string, v any) ocispecs.Descriptor {
		raw, err := json.Marshal(v)
		require.NoError(t, err)
		return write(mediaType, raw)
	}
	manifest := func(config int64, layers ...int64) ocispecs.Descriptor {
		m := ocispecs.Manifest{Config: ocispecs.Descriptor{Digest: digest.FromString("config"), Size: config}}
		for _, size := range layers {
			m.Layers = append(m.Layers, ocispecs.Descriptor{Digest: digest.FromString("layer"), Size: size})
		}
		return document(ocispecs.MediaTypeImageManifest, m)
	}
	index := func(manifests ...ocispecs.Descriptor) ocispecs.Descriptor {
		return document(ocispecs.MediaTypeImageIndex, ocispecs.Index{Manifests: manifests})
	}
	attestation := manifest(1000, 1000)
	attestation.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	docker := manifest(3, 4)
	docker.MediaType = "application/vnd.docker.distribution.manifest.v2+json"
	// Data that a descriptor has in it is not what the store has.
	lying := manifest(5, 6)
	lying.Data = []byte(`{"config":{"size":1}}`)
	missing := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromString("missing"), Size: 7}

	for name, tt := range map[string]struct {
		image ocispecs.Descriptor
		size  int64
		fails string
	}{
		"manifest":                {image: manifest(1, 10, 100), size: 111},
		"no layer":                {image: manifest(1), size: 1},
		"docker's manifest":       {image: docker, size: 7},
		"embedded data":           {image: lying, size: 11},
		"index":                   {image: index(manifest(1, 10), manifest(2, 10)), size: 23},
		"attestations":            {image: index(manifest(1, 10), attestation), size: 11},
		"index of indexes":        {image: index(index(manifest(1, 10)), manifest(2, 20)), size: 33},
		"missing manifest":        {image: missing, fails: "not found"},
		"missing platform":        {image: index(manifest(1, 10), missing), fails: "not found"},
		"too many manifests":      {image: index(slices.Repeat([]ocispecs.Descriptor{manifest(1)}, maxManifests)...), fails: "more than 64 manifests"},
		"indexes without end":     {image: nested(index, maxManifests+1, manifest(1)), fails: "more than 64 manifests"},
		"negative size":           {image: manifest(1, 10, -1), fails: "cannot be"},
		"sizes over all bounds":   {image: index(manifest(1, math.MaxInt64-1), manifest(1)), fails: "cannot be"},
		"large manifest":          {image: write(ocispecs.MediaTypeImageManifest, make([]byte, maxManifest+1)), fails: "is the most"},
		"no manifest but text":    {image: write(ocispecs.MediaTypeImageManifest, []byte("hello")), fails: "decode manifest"},
		"another kind of content": {image: write("text/plain", []byte("hi")), fails: `"text/plain"`},
	} {
		t.Run(name, func(t *testing.T) {
			raw, err := json.Marshal(tt.image)
			require.NoError(t, err)
			size, err := sizeOf(t.Context(), store, base64.StdEncoding.EncodeToString(raw))
			if tt.fails != "" {
				require.ErrorContains(t, err, tt.fails)
				require.Zero(t, size)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.size, size)
		})
	}
	for _, encoded := range []string{"", "?", base64.StdEncoding.EncodeToString([]byte("{"))} {
		_, err := sizeOf(t.Context(), store, encoded)
		require.Error(t, err, encoded)
	}
}

// nested returns a manifest in as many indexes.
func nested(index func(...ocispecs.Descriptor) ocispecs.Descriptor, depth int, desc ocispecs.Descriptor) ocispecs.Descriptor {
	for range depth {
		desc = index(desc)
	}
	return desc
}
