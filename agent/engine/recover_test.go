package engine

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/leases"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/client"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/kiln-build/kiln/snapshot"
)

// TestLeasesWithoutReferencesAreDeleted has leases as a killed process leaves them.
func TestLeasesWithoutReferencesAreDeleted(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), snapshot.Namespace)
	store, err := snapshot.Open(ctx, t.TempDir())
	require.NoError(t, err)
	defer store.Close()
	references, err := metadata.NewStore(filepath.Join(t.TempDir(), "refs.db"))
	require.NoError(t, err)
	defer references.Close()
	require.NoError(t, references.Update("whole", func(*bolt.Bucket) error { return nil }))

	all := ctdmetadata.NewLeaseManager(store.DB)
	own, other := domainLeases{all, "a/gvisor"}, domainLeases{all, "b/gvisor"}
	for id, m := range map[string]leases.Manager{
		"whole": own, "whole-view": own, "whole-variants": own, "theirs": other, "nobodys": all,
		"cut": own, "cut-view": own, "cut-variants": own,
	} {
		_, err := m.Create(ctx, leases.WithID(id))
		require.NoError(t, err)
	}
	for range 2 {
		require.NoError(t, own.deleteOrphans(ctx, references))
		list, err := all.List(ctx)
		require.NoError(t, err)
		var left []string
		for _, l := range list {
			left = append(left, l.ID)
		}
		require.ElementsMatch(t, []string{"whole", "whole-view", "whole-variants", "theirs", "nobodys"}, left)
	}
}

// TestReferencesOfAKilledProcess has a process killed while the result of a step is
// committed, before and after its snapshot was.
func TestReferencesOfAKilledProcess(t *testing.T) {
	for name, kill := range map[string]func(t *testing.T, ctx context.Context, store *snapshot.Store, held leases.Manager, result, written string){
		"before": func(t *testing.T, ctx context.Context, _ *snapshot.Store, held leases.Manager, result, _ string) {
			_, err := held.Create(ctx, leases.WithID(result))
			require.NoError(t, err)
		},
		"after": func(t *testing.T, ctx context.Context, store *snapshot.Store, held leases.Manager, result, written string) {
			l, err := held.Create(ctx, leases.WithID(result))
			require.NoError(t, err)
			require.NoError(t, held.AddResource(ctx, l, leases.Resource{ID: result, Type: "snapshots/" + snapshot.Snapshotter}))
			require.NoError(t, store.Snapshots().Commit(ctx, result, written))
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := namespaces.WithNamespace(t.Context(), snapshot.Namespace)
			store, err := snapshot.Open(ctx, t.TempDir())
			require.NoError(t, err)
			defer store.Close()
			dir := t.TempDir()
			held := domainLeases{ctdmetadata.NewLeaseManager(store.DB), "a/gvisor"}
			open := func() (cache.Manager, *metadata.Store) {
				md, err := metadata.NewStore(filepath.Join(dir, "refs.db"))
				require.NoError(t, err)
				m, err := cache.NewManager(cache.ManagerOpt{
					Snapshotter:    containerdsnapshot.NewSnapshotter(snapshot.Snapshotter, store.Snapshots(), snapshot.Namespace, nil),
					ContentStore:   store.DB.ContentStore(),
					LeaseManager:   leaseutil.WithNamespace(held, snapshot.Namespace),
					GarbageCollect: collectGarbage(store.DB),
					Applier:        apply.NewFileSystemApplier(store.DB.ContentStore()),
					Differ:         walking.NewWalkingDiff(store.DB.ContentStore()),
					MetadataStore:  md, Root: dir, MountPoolRoot: filepath.Join(dir, "mounts"),
				})
				require.NoError(t, err)
				require.NoError(t, held.deleteOrphans(ctx, md))
				return m, md
			}
			m, md := open()
			written, err := m.New(ctx, nil, nil, cache.CachePolicyRetain)
			require.NoError(t, err)
			result, err := written.Commit(ctx)
			require.NoError(t, err)
			require.NoError(t, result.Release(ctx))
			kill(t, ctx, store, held, result.ID(), written.ID())
			require.NoError(t, m.Close())
			require.NoError(t, md.Close())

			m, md = open()
			defer md.Close()
			defer m.Close()
			if name == "after" {
				again, err := m.Get(ctx, result.ID(), nil)
				require.NoError(t, err)
				next, err := m.New(ctx, again, nil)
				require.NoError(t, err, "it can be built upon")
				require.NoError(t, next.Release(ctx))
				require.NoError(t, again.Release(ctx))
			}
			for range 2 {
				require.NoError(t, m.Prune(ctx, make(chan client.UsageInfo, 10), client.PruneInfo{All: true}))
			}
			list, err := held.List(ctx)
			require.NoError(t, err)
			require.Empty(t, list)
		})
	}
}
