package engine

import (
	"context"
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/snapshot"
)

// TestTooManyLayersAreNotPrepared stacks layers until there are too many below the next.
func TestTooManyLayersAreNotPrepared(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), snapshot.Namespace)
	store, err := snapshot.Open(ctx, t.TempDir())
	require.NoError(t, err)
	defer store.Close()
	s := boundedSnapshots{store.Snapshots(), 3}
	parent := ""
	for i := range 4 {
		active, name := fmt.Sprint("active-", i), fmt.Sprint("layer-", i)
		_, err := s.Prepare(ctx, active, parent)
		require.NoError(t, err, "%d layers below it", i)
		require.NoError(t, s.Commit(ctx, name, active))
		parent = name
	}
	_, err = s.Prepare(ctx, "one-more", parent)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "has 4 layers, and the kernel mounts 3 at most: squash it")
	var left int
	require.NoError(t, s.Walk(ctx, func(context.Context, snapshots.Info) error { left++; return nil }))
	require.Equal(t, 4, left, "what was refused is not kept")
	_, err = s.Prepare(ctx, "beside", "layer-0")
	require.NoError(t, err)
}
