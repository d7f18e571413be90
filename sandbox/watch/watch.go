package watch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

const (
	// interval is the time between two looks at a file system.
	interval = 50 * time.Millisecond
	// idle is the time after which files are counted whatever the file system says:
	// what others free hides what the step takes.
	idle = 5 * time.Second
	// share and idleShare bound the part of the time that counting takes, as divisors:
	// when the limit is near, and else.
	share, idleShare = 20, 100
	// near is the part of a limit, as a divisor, that a step may miss it by and still
	// has run into it: what did not fit is not there.
	near = 64
)

// Config says what to watch.
type Config struct {
	Limits sandbox.Limits
	// Step is whose writable trees count.
	Step *sandbox.Step
	// Elsewhere returns what the step has written to its root and is not in its upper
	// directory while it runs; nil: all is there.
	Elsewhere func() sandbox.Usage
	// Processes returns the processes of the step. What they have open counts also when
	// it has no name any more; nil: it does not.
	Processes func() ([]int, error)
}

// Watch watches one step. Stop must be called when the step has ended.
type Watch struct {
	cfg    Config
	cancel context.CancelCauseFunc
	timer  *time.Timer
	trees  []tree
	// root is the place of the step's root in trees, -1 when it has none.
	root    int
	stopped chan struct{}
	done    sync.WaitGroup

	// What follows belongs to the goroutine, and after Stop to its caller.

	// used is what the file systems had in use at the last count, had what the step
	// had then.
	used, had amount
	// earliest and latest bound the time of the next count.
	earliest, latest time.Time
}

// amount is bytes and inodes.
type amount struct{ bytes, inodes int64 }

func (a amount) add(b amount) amount { return amount{a.bytes + b.bytes, a.inodes + b.inodes} }
func (a amount) sub(b amount) amount { return amount{a.bytes - b.bytes, a.inodes - b.inodes} }

// Start watches a step whose process is about to start. The context that it returns is
// for what the step does: it ends with a *sandbox.ReachedError when the step has to
// end. Nothing is watched that is not limited.
func Start(ctx context.Context, cfg Config) (context.Context, *Watch, error) {
	w := &Watch{cfg: cfg, root: -1, stopped: make(chan struct{})}
	if err := w.findTrees(); err != nil {
		return nil, nil, fmt.Errorf("watch the step's disk: %w", err)
	}
	ctx, w.cancel = context.WithCancelCause(ctx)
	if t := cfg.Limits.Timeout; t > 0 {
		w.timer = time.AfterFunc(t, func() { w.cancel(&sandbox.ReachedError{Limit: sandbox.LimitTimeout}) })
	}
	if w.limited() && len(w.trees) > 0 {
		now := time.Now()
		w.used, w.latest = w.inUse(), now.Add(idle)
		w.done.Go(w.run)
	}
	return ctx, w, nil
}

// limited tells whether there is a limit of disk.
func (w *Watch) limited() bool { return w.cfg.Limits.DiskBytes > 0 || w.cfg.Limits.Inodes > 0 }

// findTrees lists what the step can write to.
func (w *Watch) findTrees() error {
	since := now()
	add := func(t sandbox.Tree) error {
		dir := t.Upper
		if dir == "" {
			dir = t.Dir
		}
		if dir == "" {
			return nil
		}
		fresh, err := empty(dir)
		if err != nil {
			return err
		}
		w.trees = append(w.trees, tree{dir: dir, fresh: fresh, since: since})
		return nil
	}
	if s := w.cfg.Step; !s.ReadonlyRoot && w.cfg.Elsewhere == nil {
		if err := add(s.Root); err != nil {
			return err
		}
		if len(w.trees) > 0 {
			w.root = 0
		}
	}
	if !w.limited() {
		return nil // only the root is counted, at the end
	}
	for _, m := range w.cfg.Step.Mounts {
		if !m.Readonly && !m.Socket {
			if err := add(m.Tree); err != nil {
				return err
			}
		}
	}
	return nil
}

// empty tells whether dir is an empty directory.
func empty(dir string) (bool, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}

// run looks at the file systems until Stop is called.
func (w *Watch) run() {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-w.stopped:
			return
		case now := <-ticker.C:
			if !w.due(now) {
				continue
			}
			if l := w.over(w.count()); l != "" {
				w.cancel(&sandbox.ReachedError{Limit: l})
				return
			}
		}
	}
}

// due tells whether it is time to count.
func (w *Watch) due(now time.Time) bool {
	if now.Before(w.earliest) {
		return false
	}
	return now.After(w.latest) || w.possible()
}

// possible tells whether the step can have reached a limit, if nobody has freed
// anything since the last count.
func (w *Watch) possible() bool {
	return w.over(w.had.add(w.inUse().sub(w.used))) != ""
}

// count counts what the step has, and plans the next time.
func (w *Watch) count() amount {
	used, began := w.inUse(), time.Now()
	had := amount{}
	if w.cfg.Elsewhere != nil {
		u := w.cfg.Elsewhere()
		had = amount{u.DiskBytes, u.Inodes}
	}
	for _, t := range w.trees {
		had = had.add(t.count(func(a amount) bool { return w.over(had.add(a)) != "" }))
	}
	if w.cfg.Processes != nil && w.over(had) == "" {
		had = had.add(w.nameless())
	}
	now := time.Now()
	took := now.Sub(began)
	w.used, w.had = used, had
	w.earliest, w.latest = now.Add(share*took), now.Add(max(idle, idleShare*took))
	return had
}

// over returns the limit that a is beyond, if any.
func (w *Watch) over(a amount) sandbox.Limit {
	switch l := w.cfg.Limits; {
	case l.DiskBytes > 0 && a.bytes > l.DiskBytes:
		return sandbox.LimitDisk
	case l.Inodes > 0 && a.inodes > l.Inodes:
		return sandbox.LimitInodes
	}
	return ""
}

// Stop ends the watch.
func (w *Watch) Stop() {
	if w.timer != nil {
		w.timer.Stop()
	}
	select {
	case <-w.stopped:
		return
	default:
	}
	close(w.stopped)
	w.done.Wait()
	w.cancel(nil)
}

// Account completes the result of a step whose processes are gone, after Stop. It
// counts what the step has left, and refuses too much. root is what the step has
// written to its root if that was elsewhere.
func (w *Watch) Account(res *sandbox.Result, root sandbox.Usage) {
	left := amount{root.DiskBytes, root.Inodes}
	switch res.EndedBy {
	case sandbox.LimitDisk, sandbox.LimitInodes:
		left = w.had // nobody needs it exactly
	default:
		left = left.add(w.left(left))
	}
	res.Usage.DiskBytes, res.Usage.Inodes = left.bytes, left.inodes
	if l := w.over(left); l != "" && res.EndedBy == "" {
		res.Reach(l)
		res.EndedBy = l
	}
	if l := w.cfg.Limits.DiskBytes; l > 0 && left.bytes > l-l/near {
		res.Reach(sandbox.LimitDisk)
	}
	if l := w.cfg.Limits.Inodes; l > 0 && left.inodes >= l-1-l/near { // the root is one
		res.Reach(sandbox.LimitInodes)
	}
}

// left counts what a step that has ended has left, beside what is elsewhere. Trees
// other than the root may have many files of others and are counted only if the step
// can be beyond a limit with them.
func (w *Watch) left(elsewhere amount) (sum amount) {
	others := w.trees
	if w.root >= 0 {
		sum, others = w.trees[0].count(nil), w.trees[1:]
	}
	if !w.limited() || len(others) == 0 {
		return sum
	}
	if !w.possible() && w.over(elsewhere.add(sum)) == "" {
		return sum
	}
	for _, t := range others {
		sum = sum.add(t.count(nil))
	}
	return sum
}
