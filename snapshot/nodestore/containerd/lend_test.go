package containerd

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	ctdreference "github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/moby/buildkit/util/pull"
	"github.com/moby/buildkit/util/resolver"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/require"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kiln-build/kiln/snapshot/nodestore"
)

func plainClient() (*http.Client, func()) {
	base := &http.Transport{}
	return &http.Client{Transport: base}, base.CloseIdleConnections
}

func named(t *testing.T, s string) reference.Named {
	t.Helper()
	ref, err := reference.ParseNormalizedNamed(s)
	require.NoError(t, err)
	return ref
}

// pull has the kubelet's runtime pull an image.
func (d *daemon) pull(ref string) {
	d.t.Helper()
	_, err := d.images.PullImage(d.t.Context(), &runtimev1.PullImageRequest{Image: &runtimev1.ImageSpec{Image: ref}})
	require.NoError(d.t, err)
}

// removeImages has the kubelet delete an image, and containerd collect it.
func (d *daemon) removeImages(ref string) {
	d.t.Helper()
	_, err := d.images.RemoveImage(d.t.Context(), &runtimev1.RemoveImageRequest{Image: &runtimev1.ImageSpec{Image: ref}})
	require.NoError(d.t, err)
	d.collect()
}

// collect runs containerd's garbage collection.
func (d *daemon) collect() {
	d.t.Helper()
	lease, err := d.client.LeasesService().Create(d.t.Context(), leases.WithRandomID())
	require.NoError(d.t, err)
	require.NoError(d.t, d.client.LeasesService().Delete(d.t.Context(), lease, leases.SynchronousDelete))
}

func TestPulledImageIsLent(t *testing.T) {
	d, r, b := startDaemon(t, ""), startRegistry(t), newBuilder(t)
	img := b.busybox("hello")
	repo := r.addr + "/team/base"
	b.push(repo+":1", img)
	d.pull(repo + ":1")
	before := d.holdings()
	n := d.node("test")

	has, err := n.Probe(t.Context(), img.layers[0].Digest, img.layers[1].Digest, digest.FromString("elsewhere"))
	require.NoError(t, err)
	require.Equal(t, map[digest.Digest]int64{img.layers[0].Digest: img.layers[0].Size, img.layers[1].Digest: img.layers[1].Size}, has)

	for _, name := range []string{repo, repo + "@" + img.manifest.Digest.String()} {
		hold, err := n.Lend(t.Context(), named(t, name))
		require.NoError(t, err)
		for _, desc := range append(slices.Clone(img.layers), img.config, img.manifest) {
			want, err := content.ReadBlob(t.Context(), b.store, desc)
			require.NoError(t, err)
			got, err := content.ReadBlob(t.Context(), hold, desc)
			require.NoError(t, err)
			require.True(t, bytes.Equal(want, got), desc.Digest)
			info, err := hold.Info(t.Context(), desc.Digest)
			require.NoError(t, err)
			require.Equal(t, desc.Size, info.Size)
		}
		dirs, err := hold.Layers(t.Context(), identity.ChainID(img.diffIDs))
		require.NoError(t, err)
		require.Len(t, dirs, 2)
		require.FileExists(t, filepath.Join(dirs[0], "bin/hello"), "topmost first")
		require.FileExists(t, filepath.Join(dirs[1], "bin/busybox"))
		bottom, err := hold.Layers(t.Context(), img.diffIDs[0])
		require.NoError(t, err)
		require.Equal(t, dirs[1:], bottom)
		require.NotEqual(t, before, d.holdings())
		require.NoError(t, hold.Release(t.Context()))
		require.NoError(t, hold.Release(t.Context()))
		_, err = hold.Info(t.Context(), img.config.Digest)
		require.True(t, errdefs.IsFailedPrecondition(err), err)
		require.Equal(t, before, d.holdings())
	}
}

func TestHoldOutlivesTheImage(t *testing.T) {
	d, r, b := startDaemon(t, ""), startRegistry(t), newBuilder(t)
	img := b.busybox("hello")
	repo := r.addr + "/base"
	b.push(repo+":1", img)
	empty := d.holdings()
	d.pull(repo + ":1")
	n := d.node("test")
	hold, err := n.Lend(t.Context(), named(t, repo))
	require.NoError(t, err)
	d.removeImages(repo + ":1")

	for _, desc := range img.layers {
		data, err := content.ReadBlob(t.Context(), hold, desc)
		require.NoError(t, err)
		require.Equal(t, desc.Digest, digest.FromBytes(data))
	}
	dirs, err := hold.Layers(t.Context(), identity.ChainID(img.diffIDs))
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(dirs[0], "noise"))
	_, err = n.Lend(t.Context(), named(t, repo))
	require.True(t, errdefs.IsNotFound(err), err)

	require.NoError(t, hold.Release(t.Context()))
	d.collect()
	require.Equal(t, empty, d.holdings())
	require.NoDirExists(t, dirs[0])
}

func TestUnpackedLayersAreLentWhenBlobsAreDiscarded(t *testing.T) {
	d, r, b := startDaemon(t, "discard_unpacked_layers = true\n  use_local_image_pull = true"), startRegistry(t), newBuilder(t)
	img := b.busybox("hello")
	repo := r.addr + "/base"
	b.push(repo+":1", img)
	d.pull(repo + ":1")
	d.collect()
	n := d.node("test")
	info, err := n.Info(t.Context())
	require.NoError(t, err)
	require.True(t, info.DiscardsBlobs)

	has, err := n.Probe(t.Context(), img.layers[0].Digest, img.config.Digest)
	require.NoError(t, err)
	require.Equal(t, map[digest.Digest]int64{img.config.Digest: img.config.Size}, has)
	size, err := n.Bytes(t.Context(), named(t, repo+":1"))
	require.NoError(t, err)
	require.Equal(t, img.config.Size, size, "what cannot be lent is fetched")
	hold, err := n.Lend(t.Context(), named(t, repo))
	require.NoError(t, err)
	defer hold.Release(context.Background())
	_, err = hold.ReaderAt(t.Context(), img.layers[0])
	require.True(t, errdefs.IsNotFound(err), err)
	require.ErrorContains(t, err, img.layers[0].Digest.String())
	dirs, err := hold.Layers(t.Context(), identity.ChainID(img.diffIDs))
	require.NoError(t, err)
	got, err := os.ReadFile(filepath.Join(dirs[1], "bin/busybox"))
	require.NoError(t, err)
	want, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
}

func TestHoldsOfAKilledProcessAreRemoved(t *testing.T) {
	d, r, b := startDaemon(t, ""), startRegistry(t), newBuilder(t)
	img := b.busybox("hello")
	b.push(r.addr+"/base:1", img)
	d.pull(r.addr + "/base:1")
	before := d.holdings()
	killed, err := New(t.Context(), Config{Socket: d.socket, Owner: "one"})
	require.NoError(t, err)
	hold, err := killed.Lend(t.Context(), named(t, r.addr+"/base"))
	require.NoError(t, err)
	_, err = hold.Layers(t.Context(), identity.ChainID(img.diffIDs))
	require.NoError(t, err)
	held := d.holdings()
	require.NotEqual(t, before, held)
	require.NoError(t, killed.Close())

	d.node("two")
	require.Equal(t, held, d.holdings(), "another owner's holds stay")
	d.node("one")
	require.Equal(t, before, d.holdings())
}

// TestPullTakesBlobsFromTheNode pulls with BuildKit's puller, as a build does, and
// counts at the registry.
func TestPullTakesBlobsFromTheNode(t *testing.T) {
	d, r, b := startDaemon(t, ""), startRegistry(t), newBuilder(t)
	img := b.busybox("hello")
	ref := r.addr + "/team/base:1"
	b.push(ref, img)
	d.pull(ref)
	before := d.holdings()
	r.forget()

	var loans []nodestore.Loan
	hosts := nodestore.Lending(resolver.NewRegistryConfig(nil), d.node("test"), func(l nodestore.Loan) { loans = append(loans, l) })
	store, err := local.NewStore(t.TempDir())
	require.NoError(t, err)
	src, err := ctdreference.Parse(ref)
	require.NoError(t, err)
	sessions, err := session.NewManager()
	require.NoError(t, err)
	from := resolver.NewPool().GetResolver(hosts, ref, resolver.ScopeType{}, sessions, nil)
	puller := pull.Puller{ContentStore: labelled{store}, Resolver: from, Src: src, Platform: platforms.DefaultSpec()}
	started := time.Now()
	pulled, err := puller.PullManifests(t.Context(), func(g session.Group) remotes.Resolver { return from.WithSession(g) })
	require.NoError(t, err)
	require.Len(t, pulled.Descriptors, 2)
	for _, desc := range pulled.Descriptors {
		require.NoError(t, contentutil.Copy(t.Context(), store, pulled.Provider(nil), desc, ref, func([]byte) {}))
	}
	t.Logf("pulled in %s", time.Since(started))

	for _, desc := range append(slices.Clone(img.layers), img.config, img.manifest) {
		data, err := content.ReadBlob(t.Context(), store, desc)
		require.NoError(t, err)
		require.Equal(t, desc.Digest, digest.FromBytes(data))
	}
	requests, sent := r.records()
	require.Zero(t, sent, "bytes of blobs")
	for _, req := range requests {
		require.False(t, strings.HasPrefix(req, "GET ") && strings.Contains(req, "/blobs/"), req)
	}
	require.Contains(t, requests, "GET /v2/team/base/manifests/"+img.manifest.Digest.String())
	require.Len(t, loans, 3)
	for _, l := range loans {
		require.NoError(t, l.Err)
	}
	require.Equal(t, before, d.holdings())
}

// labelled takes the labels that a puller sets, which a store without a database
// does not.
type labelled struct{ content.Store }

func (labelled) Update(_ context.Context, info content.Info, _ ...string) (content.Info, error) {
	return info, nil
}

func TestLendRefusals(t *testing.T) {
	d, r, b := startDaemon(t, ""), startRegistry(t), newBuilder(t)
	img, private := b.busybox("hello"), b.busybox("private")
	repo := r.addr + "/team/base"
	b.push(repo+":1", img)
	b.push(r.addr+"/other/private:1", private)
	d.pull(repo + ":1")
	d.pull(r.addr + "/other/private:1")
	before := d.holdings()
	n := d.node("test")

	for name, is := range map[string]func(error) bool{
		repo + ":1":           errdefs.IsInvalidArgument,
		repo + "x":            errdefs.IsNotFound,
		r.addr + "/team":      errdefs.IsNotFound,
		r.addr + "/team/bas.": nil,
		strings.Replace(repo, "127.0.0.1", "127a0.0.1", 1):                      errdefs.IsNotFound,
		r.addr + "/team/b.se":                                                   errdefs.IsNotFound,
		"other.example/team/base":                                               errdefs.IsNotFound,
		repo + "@" + private.manifest.Digest.String():                           errdefs.IsNotFound,
		repo + "@" + img.layers[0].Digest.String():                              errdefs.IsNotFound,
		r.addr + "/other/private@" + img.manifest.Digest.String():               errdefs.IsNotFound,
		"docker.io/library/base@" + digest.FromString("unknown image").String(): errdefs.IsNotFound,
	} {
		ref, err := reference.ParseNormalizedNamed(name)
		if is == nil {
			require.Error(t, err, name)
			continue
		}
		require.NoError(t, err, name)
		_, err = n.Lend(t.Context(), ref)
		require.Error(t, err, name)
		require.True(t, is(err), "%s: %v", name, err)
	}

	hold, err := n.Lend(t.Context(), named(t, repo))
	require.NoError(t, err)
	_, err = hold.ReaderAt(t.Context(), private.layers[1])
	require.True(t, errdefs.IsNotFound(err), err)
	_, err = hold.Info(t.Context(), private.config.Digest)
	require.True(t, errdefs.IsNotFound(err), err)
	for _, chain := range []digest.Digest{identity.ChainID(private.diffIDs), "", "../../etc", digest.FromString("x")} {
		_, err = hold.Layers(t.Context(), chain)
		require.True(t, errdefs.IsNotFound(err), err)
	}
	require.NoError(t, hold.Release(t.Context()))
	require.Equal(t, before, d.holdings())

	_, err = n.Probe(t.Context(), "sha256:../../x")
	require.True(t, errdefs.IsInvalidArgument(err), err)
}
