package engine

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"github.com/tonistiigi/fsutil"

	"github.com/kiln-build/kiln/sandbox"
)

// TestLayoutIsReadAnew has a layer of a client's layout of which an earlier build received a part.
func TestLayoutIsReadAnew(t *testing.T) {
	n := openTestNode(t)
	d := Domain{Tenant: "a", Sandbox: sandbox.Userns}
	c := serveProxy(t, n.pickTenant(d))
	img, err := random.Image(4096, 2)
	require.NoError(t, err)
	dir := t.TempDir()
	_, err = layout.Write(dir, empty.Index)
	require.NoError(t, err)
	require.NoError(t, layout.Path(dir).AppendImage(img))
	theirs, err := local.NewStore(dir)
	require.NoError(t, err)
	manifest, err := img.Manifest()
	require.NoError(t, err)
	ctx := contentutil.RegisterContentPayloadTypes(context.Background())
	for _, l := range manifest.Layers {
		desc := ocispecs.Descriptor{MediaType: string(l.MediaType), Digest: digest.Digest(l.Digest.String()), Size: l.Size}
		w, err := newImageStore(n.store, d).content.Writer(ctx, content.WithRef(remotes.MakeRefKey(ctx, desc)))
		require.NoError(t, err)
		_, err = w.Write(make([]byte, 100))
		require.NoError(t, err)
		require.NoError(t, w.Close())
	}

	files := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(files, "Dockerfile"), []byte("FROM base\nCOPY Dockerfile /f\n"), 0o600))
	fs, err := fsutil.NewFS(files)
	require.NoError(t, err)
	id, err := img.Digest()
	require.NoError(t, err)
	status := make(chan *client.SolveStatus)
	go func() {
		for range status {
		}
	}()
	_, err = c.Solve(context.Background(), nil, client.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{"context:base": "oci-layout://theirs@" + id.String()},
		LocalMounts: map[string]fsutil.FS{"context": fs, "dockerfile": fs},
		OCIStores:   map[string]content.Store{"theirs": theirs},
	}, status)
	require.NoError(t, err)
}
