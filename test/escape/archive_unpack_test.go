package escape

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/snapshot"
	"github.com/kiln-build/kiln/test/escape/hostile"
)

// unpacker unpacks layers into a build store of its own, as the engine's worker does.
type unpacker struct {
	tally
	store   *snapshot.Store
	applier diff.Applier
}

func newUnpacker(t *testing.T, dir string) *unpacker {
	t.Helper()
	store, err := snapshot.Open(t.Context(), dir)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	return &unpacker{store: store, applier: apply.NewFileSystemApplier(store.DB.ContentStore())}
}

// unpack makes a snapshot of each layer until one is refused.
func (u *unpacker) unpack(ctx context.Context, i int, c hostile.Case) error {
	ctx = namespaces.WithNamespace(ctx, snapshot.Namespace)
	sn, parent := u.store.Snapshots(), ""
	for l, layer := range c.Layers {
		key := fmt.Sprintf("%d-%d", i, l)
		desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayer, Digest: digest.FromBytes(layer), Size: int64(len(layer))}
		if err := content.WriteBlob(ctx, u.store.DB.ContentStore(), key, strings.NewReader(string(layer)), desc); err != nil {
			return err
		}
		mounts, err := sn.Prepare(ctx, key, parent)
		if err != nil {
			return err
		}
		if _, err := u.applier.Apply(ctx, desc, mounts); err != nil {
			u.failed.Add(1)
			return sn.Remove(ctx, key)
		}
		parent = key + "-done"
		if err := sn.Commit(ctx, parent, key); err != nil {
			return err
		}
	}
	u.ok.Add(1)
	return nil
}

// tally counts.
type tally struct{ ok, failed atomic.Int64 }

func tell(t *testing.T, n *tally) {
	t.Helper()
	t.Logf("%d were unpacked, %d refused", n.ok.Load(), n.failed.Load())
	// Otherwise they are no archives at all.
	require.Greater(t, n.ok.Load(), n.failed.Load()/4)
	require.NotZero(t, n.failed.Load())
}
