package engine

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

// withClient runs fn with a client of a domain's engine.
func withClient(n *Node, d Domain, fn func(*client.Client) error) error {
	e, release, err := n.Engine(context.Background(), d)
	if err != nil {
		return err
	}
	defer release()
	c, err := e.Client(context.Background())
	if err != nil {
		return err
	}
	defer c.Close()
	return fn(c)
}

// TestCollectBoundsAllDomainsTogether fills the caches of three tenants, each within
// the bound alone.
func TestCollectBoundsAllDomainsTogether(t *testing.T) {
	t.Setenv("TMPDIR", os.TempDir())
	const piece, bound = 4 << 20, 6 << 20
	n, err := OpenNode(context.Background(), NodeConfig{Root: t.TempDir(), Space: Space{MaxUsed: bound}})
	require.NoError(t, err)
	defer func() { require.NoError(t, n.Close()) }()
	n.collector.stop() // only the call below
	used := func() (total int64) {
		domains, err := n.Domains()
		require.NoError(t, err)
		for _, d := range domains {
			require.NoError(t, withClient(n, d, func(c *client.Client) error {
				records, err := c.DiskUsage(context.Background())
				for _, r := range records {
					total += r.Size
				}
				return err
			}))
		}
		return total
	}
	for _, tenant := range []string{"a", "b", "c"} {
		data := make([]byte, piece/4)
		st := llb.Scratch()
		for _, name := range []string{"1", "2", "3", "4"} {
			data[0] = tenant[0]
			data[1] = name[0]
			st = st.File(llb.Mkfile("/"+name, 0o644, data))
		}
		def, err := st.Marshal(context.Background(), llb.LinuxAmd64)
		require.NoError(t, err)
		require.NoError(t, withClient(n, Domain{Tenant: tenant, Sandbox: sandbox.Userns}, func(c *client.Client) error {
			_, err := c.Solve(context.Background(), def, client.SolveOpt{}, nil)
			return err
		}))
	}
	require.Greater(t, used(), int64(bound))
	require.NoError(t, n.Collect(context.Background()))
	require.LessOrEqual(t, used(), int64(bound))
	require.NoError(t, n.Collect(context.Background()), "nothing to do")
	_, err = os.Stat(filepath.Join(n.cfg.Root, "domains", "a"))
	require.NoError(t, err)
}

// TestCollectKeepsWhatIsReserved has a disk that is too full for reasons that are not
// the cache's.
func TestCollectKeepsWhatIsReserved(t *testing.T) {
	t.Setenv("TMPDIR", os.TempDir())
	n, err := OpenNode(context.Background(), NodeConfig{Root: t.TempDir(), Space: Space{Reserved: 1 << 30, MinFree: 1 << 60}})
	require.NoError(t, err)
	defer func() { require.NoError(t, n.Close()) }()
	n.collector.stop()
	def, err := llb.Scratch().File(llb.Mkfile("/kept", 0o644, make([]byte, 1<<20))).Marshal(context.Background(), llb.LinuxAmd64)
	require.NoError(t, err)
	d := Domain{Tenant: "a", Sandbox: sandbox.Userns}
	records := func() (count int) {
		require.NoError(t, withClient(n, d, func(c *client.Client) error {
			all, err := c.DiskUsage(context.Background())
			count = len(all)
			return err
		}))
		return count
	}
	require.NoError(t, withClient(n, d, func(c *client.Client) error {
		_, err := c.Solve(context.Background(), def, client.SolveOpt{}, nil)
		return err
	}))
	before := records()
	require.NotZero(t, before)
	require.NoError(t, n.Collect(context.Background()))
	require.Equal(t, before, records())
}

// TestGarbageIsCollectedAlsoWhenStopped has many leases to look at, as containerd
// notices a cancelled context only then.
func TestGarbageIsCollectedAlsoWhenStopped(t *testing.T) {
	n := openTestNode(t)
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(context.Background(), snapshot.Namespace))
	manager := metadata.NewLeaseManager(n.store.DB)
	for range 50 {
		_, err := manager.Create(ctx, leases.WithRandomID())
		require.NoError(t, err)
	}
	cancel()
	_, err := collectGarbage(n.store.DB)(ctx)
	require.NoError(t, err)
}
