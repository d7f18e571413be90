package engine

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/moby/buildkit/client"
	bksnapshot "github.com/moby/buildkit/snapshot"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

func TestBlobsAreADomainsOwnUntilItBringsThem(t *testing.T) {
	store, err := snapshot.Open(context.Background(), t.TempDir())
	require.NoError(t, err)
	defer store.Close()
	ctx := namespaces.WithNamespace(context.Background(), snapshot.Namespace)
	a := newDomainContent(store.DB.ContentStore(), Domain{Tenant: "a", Sandbox: sandbox.GVisor})
	b := newDomainContent(store.DB.ContentStore(), Domain{Tenant: "b", Sandbox: sandbox.GVisor})
	blob := []byte("a secret layer")
	desc := ocispecs.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	write := func(s content.Store, data []byte) error {
		return content.WriteBlob(ctx, s, "ref", strings.NewReader(string(data)), desc, content.WithLabels(map[string]string{"x": "y"}))
	}
	require.NoError(t, write(a, blob))
	sees := func(s content.Store) bool {
		_, err := s.Info(ctx, desc.Digest)
		_, rerr := content.ReadBlob(ctx, s, desc)
		walked := false
		require.NoError(t, s.Walk(ctx, func(info content.Info) error {
			walked = walked || info.Digest == desc.Digest
			return nil
		}))
		require.Equal(t, err == nil, rerr == nil)
		require.Equal(t, err == nil, walked)
		if err != nil {
			require.True(t, errdefs.IsNotFound(err), err)
		}
		return err == nil
	}
	require.True(t, sees(a))
	require.False(t, sees(b), "the digest alone gets a domain nothing")
	_, err = b.Update(ctx, content.Info{Digest: desc.Digest, Labels: map[string]string{b.label: had}}, "labels."+b.label)
	require.True(t, errdefs.IsNotFound(err), err)
	require.True(t, errdefs.IsNotFound(b.Delete(ctx, desc.Digest)))

	// Other bytes under the digest prove nothing.
	require.Error(t, write(b, []byte("made-up bytes!")))
	require.False(t, sees(b))
	w, err := b.Writer(ctx, content.WithRef("open"), content.WithDescriptor(desc))
	require.NoError(t, err)
	st, err := w.Status()
	require.NoError(t, err)
	require.Zero(t, st.Offset, "the store does not say that it has the blob")
	require.Equal(t, "open", st.Ref)
	require.Error(t, w.Commit(ctx, desc.Size, desc.Digest), "nothing was written")
	require.False(t, sees(b))

	require.NoError(t, b.Abort(ctx, "ref"), "what was made up")
	require.NoError(t, write(b, blob))
	require.True(t, sees(b))
	info, err := a.Info(ctx, desc.Digest)
	require.NoError(t, err)
	require.Equal(t, "y", info.Labels["x"])
	_, err = b.Update(ctx, content.Info{Digest: desc.Digest, Labels: map[string]string{"z": "z"}})
	require.NoError(t, err)
	require.True(t, sees(a), "what one domain says of a blob does not take it from another")
	require.NoError(t, write(a, blob), "again")
}

func TestIngestsOfDomainsDoNotMeet(t *testing.T) {
	store, err := snapshot.Open(context.Background(), t.TempDir())
	require.NoError(t, err)
	defer store.Close()
	ctx := namespaces.WithNamespace(context.Background(), snapshot.Namespace)
	a := newDomainContent(store.DB.ContentStore(), Domain{Tenant: "a", Sandbox: sandbox.GVisor})
	b := newDomainContent(store.DB.ContentStore(), Domain{Tenant: "b", Sandbox: sandbox.GVisor})
	wa, err := a.Writer(ctx, content.WithRef("layer-1"))
	require.NoError(t, err)
	defer wa.Close()
	_, err = wa.Write([]byte("half of"))
	require.NoError(t, err)
	wb, err := b.Writer(ctx, content.WithRef("layer-1"))
	require.NoError(t, err, "an open ingest of another domain holds nobody up")
	require.NoError(t, wb.Close())
	all, err := a.ListStatuses(ctx, "^layer")
	require.NoError(t, err)
	require.Len(t, all, 1)
	require.Equal(t, "layer-1", all[0].Ref)
	require.EqualValues(t, 7, all[0].Offset)
	require.NoError(t, b.Abort(ctx, "layer-1"))
	st, err := a.Status(ctx, "layer-1")
	require.NoError(t, err)
	require.Equal(t, "layer-1", st.Ref)
}

// TestAManifestDoesNotGetAnotherTenantsLayers has a tenant's own registry name the
// layers that another tenant pulled, without having them.
func TestAManifestDoesNotGetAnotherTenantsLayers(t *testing.T) {
	full := httptest.NewServer(registry.New())
	defer full.Close()
	// With two layers BuildKit races with itself when fetching one of them fails.
	img, err := random.Image(4096, 1)
	require.NoError(t, err)
	push := func(server string) string {
		ref, err := name.ParseReference(strings.TrimPrefix(server, "http://") + "/image:1")
		require.NoError(t, err)
		require.NoError(t, remote.Write(ref, img))
		return ref.Name()
	}
	theirs := push(full.URL)
	layers, err := img.Layers()
	require.NoError(t, err)
	hidden := map[string]bool{}
	for _, l := range layers {
		d, err := l.Digest()
		require.NoError(t, err)
		hidden[d.String()] = true
	}
	inner, pushed := registry.New(), false
	empty := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if i := strings.LastIndex(r.URL.Path, "/"); pushed && hidden[r.URL.Path[i+1:]] {
			http.NotFound(w, r)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	defer empty.Close()
	mine := push(empty.URL)
	pushed = true

	n := openTestNode(t)
	from := func(tenant, image string) error {
		e, release, err := n.Engine(context.Background(), Domain{Tenant: tenant, Sandbox: sandbox.Userns})
		require.NoError(t, err)
		defer release()
		c, err := e.Client(context.Background())
		require.NoError(t, err)
		defer c.Close()
		_, _, err = build(t, c, "FROM "+image+"\nCOPY busybox /busybox\n", nil, nil)
		return err
	}
	require.NoError(t, from("victim", theirs))
	config, err := img.ConfigFile()
	require.NoError(t, err)
	var diffIDs []digest.Digest
	for _, d := range config.RootFS.DiffIDs {
		diffIDs = append(diffIDs, digest.Digest(d.String()))
	}
	top := bksnapshot.LayerSnapshotID(identity.ChainID(diffIDs))
	ctx := namespaces.WithNamespace(context.Background(), snapshot.Namespace)
	_, err = n.store.Snapshots().Stat(ctx, top)
	require.NoError(t, err)
	attackers := n.snapshotsOf(Domain{Tenant: "attacker", Sandbox: sandbox.Userns})
	_, err = attackers.Stat(ctx, top)
	require.True(t, errdefs.IsNotFound(err), err)
	require.Error(t, from("attacker", mine))
	require.NoError(t, from("attacker", theirs), "who can pull it gets it")
	_, err = attackers.Stat(ctx, top)
	require.NoError(t, err, "and the node has it once")
	require.NoError(t, from("attacker", mine), "and has it from then on")
}

// TestDomainsUseTheSameImageAtOnce copies from one image in several domains, each of
// which looks at the image's layers.
func TestDomainsUseTheSameImageAtOnce(t *testing.T) {
	n := openTestNode(t)
	img, err := random.Image(4096, 2)
	require.NoError(t, err)
	server := httptest.NewServer(registry.New())
	defer server.Close()
	ref, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + "/image:1")
	require.NoError(t, err)
	require.NoError(t, remote.Write(ref, img))
	var builds errgroup.Group
	for _, d := range []Domain{
		{Tenant: "a", Sandbox: sandbox.Userns}, {Tenant: "a", Sandbox: sandbox.GVisor}, {Tenant: "b", Sandbox: sandbox.Userns}, {Tenant: "c", Sandbox: sandbox.GVisor},
	} {
		builds.Go(func() error {
			return withClient(n, d, func(c *client.Client) error {
				_, _, err := build(t, c, "FROM scratch\nCOPY --from="+ref.Name()+" / /copied\n", nil, nil)
				return err
			})
		})
	}
	require.NoError(t, builds.Wait())
}

// TestContentServiceShowsATenantItsOwn lists and reads over the service that stock
// clients have.
func TestContentServiceShowsATenantItsOwn(t *testing.T) {
	n := openTestNode(t)
	img, err := random.Image(4096, 1)
	require.NoError(t, err)
	server := httptest.NewServer(registry.New())
	defer server.Close()
	ref, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + "/image:1")
	require.NoError(t, err)
	require.NoError(t, remote.Write(ref, img))
	layer := layerDigest(t, img)
	list := func(tenant string, pull bool) (digests map[string]bool, read error) {
		e, release, err := n.Engine(context.Background(), Domain{Tenant: tenant, Sandbox: sandbox.Userns})
		require.NoError(t, err)
		defer release()
		if pull {
			c, err := e.Client(context.Background())
			require.NoError(t, err)
			defer c.Close()
			_, _, err = build(t, c, "FROM "+ref.Name()+"\nCOPY busybox /busybox\n", nil, nil)
			require.NoError(t, err)
		}
		conn, err := e.connection()
		require.NoError(t, err)
		store := proxy.NewContentStore(contentapi.NewContentClient(conn))
		ctx := namespaces.WithNamespace(context.Background(), snapshot.Namespace)
		digests = map[string]bool{}
		require.NoError(t, store.Walk(ctx, func(info content.Info) error {
			digests[info.Digest.String()] = true
			return nil
		}))
		r, err := store.ReaderAt(ctx, ocispecs.Descriptor{Digest: digest.Digest(layer)})
		if err == nil {
			_, err = io.Copy(io.Discard, io.NewSectionReader(r, 0, r.Size()))
			r.Close()
		}
		return digests, err
	}
	digests, err := list("victim", true)
	require.NoError(t, err)
	require.True(t, digests[layer])
	digests, err = list("attacker", false)
	require.Error(t, err)
	require.Empty(t, digests)
}

func layerDigest(t *testing.T, img v1.Image) string {
	t.Helper()
	layers, err := img.Layers()
	require.NoError(t, err)
	d, err := layers[0].Digest()
	require.NoError(t, err)
	return d.String()
}
