package engine

import (
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/moby/buildkit/cache/metadata"
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
