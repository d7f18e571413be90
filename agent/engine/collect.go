package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/disk"
	"github.com/sirupsen/logrus"
)

// Each engine keeps its own domain within the bounds; see keeper. What this file adds
// is the bound of all domains together, also of those that no longer build.

// collectInterval is the least time between two collections of one domain, or of all,
// unless the configuration says another.
const collectInterval = time.Minute

// collector runs Collect in the background, at most once at a time.
type collector struct {
	// mu guards what follows.
	mu      sync.Mutex
	running bool
	last    time.Time
	cancel  context.CancelFunc
	stopped bool
	done    sync.WaitGroup
}

// start begins a collection unless one runs or has just run.
func (c *collector) start(n *Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped || c.running || time.Since(c.last) < cmp.Or(n.cfg.CollectInterval, collectInterval) {
		return
	}
	var ctx context.Context
	ctx, c.cancel = context.WithCancel(context.Background())
	c.running = true
	c.done.Go(func() {
		if err := n.Collect(ctx); err != nil && ctx.Err() == nil {
			logrus.WithError(err).Error("collect caches of all tenants")
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.cancel()
		c.running, c.last = false, time.Now()
	})
}

// stop ends what runs and lets nothing start any more.
func (c *collector) stop() {
	c.mu.Lock()
	c.stopped = true
	if c.cancel != nil {
		c.cancel()
	}
	c.mu.Unlock()
	c.done.Wait()
}

// usage is what one domain occupies.
type usage struct {
	domain Domain
	bytes  int64
}

// Collect removes what is least recently used until all domains together are
// within the bounds, if they are not. Every domain gives in proportion to what it
// has.
func (n *Node) Collect(ctx context.Context) error {
	policy := gcPolicy(n.cfg.Root, n.cfg.Space)
	bounds := policy[len(policy)-1]
	domains, err := n.Domains()
	if err != nil {
		return err
	}
	var all []usage
	var total int64
	for _, d := range domains {
		u := usage{domain: d}
		err := n.with(ctx, d, func(k *keeper) (err error) {
			u.bytes, _, err = k.used(ctx)
			return err
		})
		if err != nil {
			return fmt.Errorf("tenant %s: %w", d.Tenant, err)
		}
		all, total = append(all, u), total+u.bytes
	}
	excess := int64(0)
	if bounds.MaxUsedSpace > 0 {
		excess = max(excess, total-bounds.MaxUsedSpace)
	}
	if stat, err := disk.GetDiskStat(n.cfg.Root); err == nil && bounds.MinFreeSpace > 0 {
		// What is reserved stays, whoever fills the disk.
		excess = max(excess, min(bounds.MinFreeSpace-stat.Available, total-bounds.ReservedSpace))
	}
	if excess <= 0 || total == 0 {
		return nil
	}
	slices.SortFunc(all, func(x, y usage) int { return cmp.Compare(y.bytes, x.bytes) })
	var errs []error
	for _, u := range all {
		keep := u.bytes - int64(float64(u.bytes)/float64(total)*float64(min(excess, total)))
		// BuildKit takes 0 for no bound.
		keep = max(keep, 1)
		err := n.with(ctx, u.domain, func(k *keeper) error {
			return k.prune(ctx, true, client.PruneInfo{All: true, MaxUsedSpace: keep})
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("collect cache of tenant %s: %w", u.domain.Tenant, err))
		}
	}
	return errors.Join(errs...)
}

// with runs fn with the keeper of a domain, whose engine stays open meanwhile.
func (n *Node) with(ctx context.Context, d Domain, fn func(*keeper) error) error {
	e, release, err := n.Engine(ctx, d)
	if err != nil {
		return err
	}
	defer release()
	return fn(e.keeper)
}
