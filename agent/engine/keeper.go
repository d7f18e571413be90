package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/disk"
	"github.com/moby/buildkit/worker"
	"github.com/sirupsen/logrus"

	"github.com/kiln-build/kiln/snapshot"
)

// collectedFile is a file of a domain's state whose time is that of the last collection.
const collectedFile = "collected"

// settleTime is how long a domain has to be without a new event before its cache is
// collected: builds often come one after another.
const settleTime = time.Second

// settleLimit bounds the collection of a process that is about to end.
const settleLimit = 10 * time.Second

// keeper keeps the cache of one domain within its bounds.
//
// It collects while no build of the domain runs. A build that begins meanwhile
// stops the collection and waits for that. While builds run it collects only what is
// over the bounds. It stands in for BuildKit's own collection, which runs beside
// builds, where the two race, and goes on when its engine has been closed.
type keeper struct {
	// policy has the rules in their order; the last one has the bounds.
	policy []client.PruneInfo
	worker worker.Worker
	keys   solver.CacheManager
	// deferred is told of builds and collections.
	deferred *snapshot.DeferredSync
	// root is on the disk that has to have room.
	root string
	// stamp is a file whose time is that of the last collection.
	stamp string
	// every is the least time between two collections.
	every time.Duration
	// after is called after a collection that builds gave rise to.
	after func()
	// wake says that a build has begun or ended.
	wake   chan struct{}
	cancel context.CancelFunc
	done   sync.WaitGroup

	// busy is when builds last kept run from collecting and the cache was looked at,
	// or zero. It is run's own.
	busy time.Time
	// pruning has room for the one who collects. It guards unreleased.
	pruning chan struct{}
	// unreleased says that keys of removed records are still there.
	unreleased bool

	// mu guards what follows.
	mu     sync.Mutex
	builds int
	// built is whether there has been a build.
	built bool
	// current is the collection that a build stops.
	current *collection
	last    time.Time
}

// collection is one that a build can stop.
type collection struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// errBuildRuns says that nothing is collected because a build runs.
var errBuildRuns = errors.New("a build runs")

// newKeeper starts keeping the cache whose state is in dir. The caller closes it.
// after is called when it has collected after builds; it must not block.
func newKeeper(dir string, policy []client.PruneInfo, every time.Duration, w worker.Worker, keys solver.CacheManager, deferred *snapshot.DeferredSync, after func()) *keeper {
	k := &keeper{
		policy: policy, worker: w, keys: keys, deferred: deferred, root: dir, stamp: filepath.Join(dir, collectedFile), every: cmp.Or(every, collectInterval),
		after: after, wake: make(chan struct{}, 1), pruning: make(chan struct{}, 1),
	}
	if st, err := os.Stat(k.stamp); err == nil {
		// The clock may jump, and the time of this process does not. A stamp of the future
		// says nothing: to believe it would be to let the disk fill until then.
		if age := time.Since(st.ModTime()); age >= 0 {
			k.last = time.Now().Add(-age)
		}
	}
	var ctx context.Context
	ctx, k.cancel = context.WithCancel(context.Background())
	k.done.Go(func() { k.run(ctx) })
	return k
}

// begin announces a build. When it returns nil nothing is being collected but what
// is over the bounds, and the caller calls end.
func (k *keeper) begin(ctx context.Context) error {
	k.mu.Lock()
	k.builds++
	k.built = true
	c := k.current
	k.mu.Unlock()
	k.notify()
	k.deferred.Begin()
	if c == nil {
		return nil
	}
	c.cancel()
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		k.end()
		return context.Cause(ctx)
	}
}

// end says that a build has ended.
func (k *keeper) end() {
	k.deferred.End()
	k.mu.Lock()
	k.builds--
	k.mu.Unlock()
	k.notify()
}

func (k *keeper) notify() {
	select {
	case k.wake <- struct{}{}:
	default: // one is waiting already
	}
}

// run collects a while after builds, and when the engine has been opened.
func (k *keeper) run(ctx context.Context) {
	wait := k.wait()
	next := time.Now().Add(wait)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.wake:
			at := time.Now().Add(k.wait())
			// Builds that follow each other closely do not put it off for ever.
			if next.IsZero() || at.Before(next) {
				next = at
				timer.Reset(time.Until(at))
			}
			continue
		case <-timer.C:
		}
		next = time.Time{}
		busy, err := k.collect(ctx)
		if err != nil && ctx.Err() == nil {
			logrus.WithError(err).Error("collect the cache of a tenant")
		}
		if k.hasBuilt() {
			k.after()
		}
		if busy {
			next = time.Now().Add(k.every)
			timer.Reset(k.every)
		}
	}
}

func (k *keeper) hasBuilt() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.built
}

// wait returns for how long there is no need to collect. A full disk does not wait: it
// fails everybody's builds.
func (k *keeper) wait() time.Duration {
	if full, err := isFull(k.root); err == nil && full {
		return settleTime
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return max(settleTime, k.every-time.Since(k.last))
}

// collect applies the policy, but while a build runs only when the cache is over its
// bounds. It returns whether one runs.
func (k *keeper) collect(ctx context.Context) (busy bool, err error) {
	if err := k.prune(ctx, false, k.policy...); !errors.Is(err, errBuildRuns) {
		k.busy = time.Time{}
		return false, err
	}
	// Most builds are over soon. Measuring the cache is work, and BuildKit races
	// with itself when a build commits a snapshot meanwhile.
	now := time.Now()
	if k.busy.IsZero() || now.Sub(k.busy) < k.every {
		if k.busy.IsZero() {
			k.busy = now
		}
		return true, nil
	}
	k.busy = now
	over, err := k.over(ctx)
	if err == nil && over {
		err = k.prune(ctx, true, k.policy...)
	}
	return true, err
}

// prune removes what the rules say. While a build runs it returns errBuildRuns,
// unless it must.
func (k *keeper) prune(ctx context.Context, must bool, rules ...client.PruneInfo) error {
	select {
	case k.pruning <- struct{}{}:
		defer func() { <-k.pruning }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for {
		alone, cancel := context.WithCancel(ctx)
		c := &collection{cancel: cancel, done: make(chan struct{})}
		k.mu.Lock()
		busy := k.builds > 0
		if !busy {
			k.current = c
		}
		k.mu.Unlock()
		if busy {
			cancel()
			if !must {
				return errBuildRuns
			}
			return k.apply(ctx, rules)
		}
		err := k.apply(alone, rules)
		stopped := err != nil && alone.Err() != nil && ctx.Err() == nil
		cancel()
		k.mu.Lock()
		k.current = nil
		k.mu.Unlock()
		close(c.done)
		if !stopped {
			return err
		}
	}
}

// apply has the worker remove what the rules say, and the step cache what was for
// it. The caller is in pruning.
func (k *keeper) apply(ctx context.Context, rules []client.PruneInfo) error {
	k.deferred.Begin()
	defer k.deferred.End()
	removed, counted := make(chan client.UsageInfo), make(chan struct{})
	go func() {
		defer close(counted)
		for range removed {
			k.unreleased = true
		}
	}()
	err := k.worker.Prune(ctx, removed, rules...)
	close(removed)
	<-counted
	if err != nil {
		return err
	}
	if k.unreleased {
		if err := k.keys.ReleaseUnreferenced(ctx); err != nil {
			return fmt.Errorf("release keys of removed steps: %w", err)
		}
		k.unreleased = false
	}
	return k.collected()
}

// collected notes the time, also for the next process.
func (k *keeper) collected() error {
	now := time.Now()
	k.mu.Lock()
	k.last = now
	k.mu.Unlock()
	f, err := os.OpenFile(k.stamp, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("note the time of a collection: %w", err)
	}
	if err := errors.Join(f.Close(), os.Chtimes(k.stamp, now, now)); err != nil {
		return fmt.Errorf("note the time of a collection: %w", err)
	}
	return nil
}

// over tells whether the cache is over the bounds.
func (k *keeper) over(ctx context.Context) (bool, error) {
	bounds := k.policy[len(k.policy)-1]
	total, shared, err := k.used(ctx)
	if err != nil {
		return false, err
	}
	used := total - shared
	if bounds.MaxUsedSpace > 0 && used > max(bounds.MaxUsedSpace, bounds.ReservedSpace) {
		return true, nil
	}
	return used > bounds.ReservedSpace && k.diskFull(), nil
}

// diskFull tells whether less is free on the disk than has to be.
func (k *keeper) diskFull() bool {
	bounds := k.policy[len(k.policy)-1]
	stat, err := disk.GetDiskStat(k.root)
	return err == nil && stat.Free < bounds.MinFreeSpace
}

// used returns what the cache occupies, in bytes, and how much of that is in images,
// too, that collecting the cache would not remove.
func (k *keeper) used(ctx context.Context) (total, shared int64, err error) {
	records, err := k.worker.DiskUsage(ctx, client.DiskUsageInfo{})
	if err != nil {
		return 0, 0, fmt.Errorf("measure the cache: %w", err)
	}
	for _, r := range records {
		total += r.Size
		if r.Shared {
			shared += r.Size
		}
	}
	return total, shared, nil
}

// close ends what runs. Nothing is collected any more when it returns. It may be
// called again.
func (k *keeper) close() {
	k.cancel()
	k.done.Wait()
}

// settle is close for a process that ends right after its build: it collects what the
// keeper would have collected after a while.
func (k *keeper) settle(ctx context.Context) error {
	k.close()
	k.mu.Lock()
	due := k.built && (time.Since(k.last) >= k.every)
	k.mu.Unlock()
	if !due && !(k.built && k.diskFull()) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	if err := k.prune(ctx, false, k.policy...); err != nil && ctx.Err() == nil && !errors.Is(err, errBuildRuns) {
		return fmt.Errorf("collect the cache: %w", err)
	}
	return nil
}
