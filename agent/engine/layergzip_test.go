package engine

import (
	"bytes"
	"io"
	"net/http/httptest"
	"os"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/klauspost/compress/gzip"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// TestLayersAreCompressedByOurGzip compares a pushed layer with what the compressor
// makes of its content. Another gzip makes other bytes of it.
func TestLayersAreCompressedByOurGzip(t *testing.T) {
	server := httptest.NewServer(quietRegistry())
	defer server.Close()
	text, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err, "install Debian's busybox-static")
	def, err := llb.Scratch().File(llb.Mkfile("/a", 0o644, text)).Marshal(t.Context(), llb.LinuxAmd64)
	require.NoError(t, err)
	for attr, level := range map[string]int{"": gzip.DefaultCompression, "1": 1, "9": 9} {
		// A layer that is compressed already is pushed as it is.
		c := newTestEngine(t, sandbox.Userns)
		image := server.Listener.Addr().String() + "/image:level" + attr
		attrs := map[string]string{"name": image, "push": "true"}
		if attr != "" {
			attrs["compression-level"] = attr
		}
		_, err = c.Solve(t.Context(), def, client.SolveOpt{Exports: []client.ExportEntry{{Type: client.ExporterImage, Attrs: attrs}}}, nil)
		require.NoError(t, err)

		ref, err := name.ParseReference(image)
		require.NoError(t, err)
		img, err := remote.Image(ref, remote.WithContext(t.Context()))
		require.NoError(t, err)
		layers, err := img.Layers()
		require.NoError(t, err)
		require.Len(t, layers, 1)
		r, err := layers[0].Uncompressed()
		require.NoError(t, err)
		content, err := io.ReadAll(r)
		require.NoError(t, err)
		r, err = layers[0].Compressed()
		require.NoError(t, err)
		got, err := io.ReadAll(r)
		require.NoError(t, err)

		var want bytes.Buffer
		w, err := gzip.NewWriterLevel(&want, level)
		require.NoError(t, err)
		_, err = w.Write(content)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		require.True(t, bytes.Equal(want.Bytes(), got), "level %q: the layer has %d bytes, want %d", attr, len(got), want.Len())
	}
}
