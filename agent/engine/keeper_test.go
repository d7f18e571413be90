package engine

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/worker"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

// slowWorker is a worker whose collections take a while, if they are not stopped.
type slowWorker struct {
	worker.Worker
	takes                      atomic.Int64 // nanoseconds
	begun, done, running, used atomic.Int64
}

func (w *slowWorker) Prune(ctx context.Context, _ chan client.UsageInfo, _ ...client.PruneInfo) error {
	w.begun.Add(1)
	w.running.Add(1)
	defer w.running.Add(-1)
	select {
	case <-time.After(time.Duration(w.takes.Load())):
		w.done.Add(1)
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (w *slowWorker) DiskUsage(context.Context, client.DiskUsageInfo) ([]*client.UsageInfo, error) {
	return []*client.UsageInfo{{Size: w.used.Load()}, {Size: 1 << 40, Shared: true}}, nil
}

// deferredSync is of a directory that has no databases.
func deferredSync(t *testing.T) *snapshot.DeferredSync {
	s, _, err := snapshot.OpenDeferredSync(snapshot.DeferredSyncConfig{Root: t.TempDir()})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// keepSlowly keeps the cache of a slowWorker, of which no more than 100 bytes may be used.
func keepSlowly(t *testing.T) (*keeper, *slowWorker) {
	w := &slowWorker{}
	w.takes.Store(int64(time.Minute))
	keys := solver.NewCacheManager(context.Background(), "test", solver.NewInMemoryCacheStorage(), solver.NewInMemoryResultStorage())
	return newKeeper(t.TempDir(), []client.PruneInfo{{}, {All: true, MaxUsedSpace: 100}}, 0, w, keys, deferredSync(t), func() {}), w
}

// TestBuildsAndCollectionsTakeTurns has builds begin before, during and after
// collections.
func TestBuildsAndCollectionsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, w := keepSlowly(t)
		defer k.close()
		time.Sleep(settleTime + time.Millisecond)
		require.EqualValues(t, 1, w.running.Load(), "the engine was opened")

		require.NoError(t, k.begin(context.Background()))
		require.Zero(t, w.running.Load(), "stopped for the build, which has waited for that")
		time.Sleep(5 * collectInterval)
		require.EqualValues(t, 1, w.begun.Load(), "nothing while it runs")

		require.NoError(t, k.begin(context.Background()))
		k.end()
		time.Sleep(5 * settleTime)
		require.EqualValues(t, 1, w.begun.Load(), "the other one still runs")
		k.end()
		time.Sleep(settleTime + time.Millisecond)
		require.EqualValues(t, 1, w.running.Load())
		time.Sleep(2 * time.Minute)
		require.EqualValues(t, 1, w.done.Load())

		w.takes.Store(int64(time.Millisecond))
		for range 30 {
			require.NoError(t, k.begin(context.Background()))
			k.end()
			time.Sleep(settleTime * 9 / 10)
		}
		require.EqualValues(t, 2, w.done.Load(), "not put off by short builds, nor done for each")
	})
}

// TestBoundsHoldWhileBuildsRun has one that does not end.
func TestBoundsHoldWhileBuildsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, w := keepSlowly(t)
		defer k.close()
		require.NoError(t, k.begin(context.Background()))
		w.used.Store(100)
		time.Sleep(3 * collectInterval)
		require.Zero(t, w.begun.Load())
		w.used.Store(101)
		time.Sleep(collectInterval)
		require.EqualValues(t, 1, w.running.Load())
		require.NoError(t, k.begin(context.Background()), "does not wait")
		require.EqualValues(t, 1, w.running.Load())
		k.end()
		k.end()
	})
}

// TestNothingIsCollectedAfterClose closes before and during a collection.
func TestNothingIsCollectedAfterClose(t *testing.T) {
	for _, open := range []time.Duration{0, settleTime + time.Second} {
		synctest.Test(t, func(t *testing.T) {
			k, w := keepSlowly(t)
			require.NoError(t, k.begin(context.Background()))
			k.end()
			time.Sleep(open)
			began := w.begun.Load()
			k.close()
			require.Zero(t, w.running.Load())
			time.Sleep(time.Hour)
			require.Equal(t, began, w.begun.Load())
		})
	}
}

// TestCollectionsAreAMinuteApartAlsoOfTwoProcesses opens an engine's state again.
func TestCollectionsAreAMinuteApartAlsoOfTwoProcesses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, w := keepSlowly(t)
		require.NoError(t, k.begin(context.Background()))
		k.end()
		require.NoError(t, k.settle(context.Background()), "its time is limited")
		require.EqualValues(t, 1, w.begun.Load())
		require.NoError(t, k.collected())
		k.close()
		again := newKeeper(k.root, k.policy, 0, w, k.keys, k.deferred, func() {})
		defer again.close()
		require.NoError(t, again.settle(context.Background()))
		require.NoError(t, again.begin(context.Background()))
		again.end()
		time.Sleep(collectInterval / 2)
		require.NoError(t, again.settle(context.Background()))
		require.EqualValues(t, 1, w.begun.Load())
	})
}

// TestClockThatWentBackStopsNoCollection opens the state of a process that lived in
// the future.
func TestClockThatWentBackStopsNoCollection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, w := keepSlowly(t)
		k.close()
		w.takes.Store(0)
		require.NoError(t, k.collected())
		future := time.Now().Add(365 * 24 * time.Hour)
		require.NoError(t, os.Chtimes(k.stamp, future, future))
		begun := w.begun.Load()
		again := newKeeper(k.root, k.policy, 0, w, k.keys, k.deferred, func() {})
		defer again.close()
		time.Sleep(2 * settleTime)
		require.Equal(t, begun+1, w.begun.Load())
	})
}

// fill builds something of the given number of bytes.
func fill(t *testing.T, c *client.Client, size int, mark byte) {
	t.Helper()
	st := llb.Scratch()
	for _, name := range []string{"/1", "/2", "/3", "/4"} {
		data := make([]byte, size/4)
		data[0], data[1] = mark, name[1]
		st = st.File(llb.Mkfile(name, 0o644, data))
	}
	def, err := st.Marshal(context.Background(), llb.LinuxAmd64)
	require.NoError(t, err)
	_, err = c.Solve(context.Background(), def, client.SolveOpt{}, nil)
	require.NoError(t, err)
}

func usedSpace(t *testing.T, c *client.Client) (total int64) {
	t.Helper()
	records, err := c.DiskUsage(context.Background())
	require.NoError(t, err)
	for _, r := range records {
		total += r.Size
	}
	return total
}

// TestAnEngineIsWithinItsBoundAfterABuild waits for its keeper.
func TestAnEngineIsWithinItsBoundAfterABuild(t *testing.T) {
	t.Setenv("TMPDIR", os.TempDir())
	const bound = 3 << 20
	n, err := OpenNode(context.Background(), NodeConfig{Root: t.TempDir(), Space: Space{MaxUsed: bound}})
	require.NoError(t, err)
	defer func() { require.NoError(t, n.Close()) }()
	n.collector.stop() // only the domain's own
	require.NoError(t, withClient(n, Domain{Tenant: "a", Sandbox: sandbox.Userns}, func(c *client.Client) error {
		workers, err := c.ListWorkers(context.Background())
		require.NoError(t, err)
		rules := workers[0].GCPolicy
		require.NotEmpty(t, rules)
		require.EqualValues(t, bound, rules[len(rules)-1].MaxUsedSpace, "clients are told")

		fill(t, c, 8<<20, 'a')
		require.Eventually(t, func() bool { return usedSpace(t, c) <= bound }, 30*time.Second, 100*time.Millisecond)
		return nil
	}))
}

// TestAProcessThatEndsRightAfterItsBuildKeepsTheBound is what kiln build does.
func TestAProcessThatEndsRightAfterItsBuildKeepsTheBound(t *testing.T) {
	t.Setenv("TMPDIR", os.TempDir())
	const bound = 3 << 20
	cfg := Config{NodeConfig: NodeConfig{Root: filepath.Join(t.TempDir(), "private"), Space: Space{MaxUsed: bound}}, Sandbox: sandbox.Userns}
	with := func(fn func(*client.Client)) {
		e, err := New(context.Background(), cfg)
		require.NoError(t, err)
		c, err := e.Client(context.Background())
		require.NoError(t, err)
		fn(c)
		require.NoError(t, c.Close())
		require.NoError(t, e.Close())
	}
	with(func(c *client.Client) { fill(t, c, 8<<20, 'a') })
	with(func(c *client.Client) {
		require.LessOrEqual(t, usedSpace(t, c), int64(bound))
	})
}
