// Package follow follows builds on their agents: one event stream for each build that
// runs, from which it keeps what a status shows.
//
// It promises that a stream ends with its build, when it is forgotten, or with the
// follower, and that nothing of it is left then; that a stream that breaks is taken up again
// where it broke; and that it speaks up about a build at once when its state changes and
// at most once in an interval otherwise. It never writes to the API server.
package follow

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Clients connects to the agent of a node.
type Clients interface {
	// Client returns the API of a node's agent, or an error when there is none at present.
	Client(ctx context.Context, node string) (agentv1.BuildServiceClient, error)
}

// Target is a build on an agent.
type Target struct {
	// Node of the agent.
	Node string
	// BuildID on it.
	BuildID string
	// Tenant of the build.
	Tenant string
}

// Follower follows builds. Its methods may be called concurrently.
type Follower struct {
	// Clients of the agents.
	Clients Clients
	// Notify is called, from many goroutines, when there is something new about a build. It
	// must not block.
	Notify func(types.NamespacedName)
	// Interval is how often Notify is called at most when nothing important happens.
	Interval time.Duration
	// RetryDelay is how long to wait before a broken stream is taken up again.
	RetryDelay time.Duration

	// mu guards builds, group's beginning and closed.
	mu     sync.Mutex
	builds map[types.NamespacedName]*followed
	group  sync.WaitGroup
	closed bool
}

// followed is a build that is followed.
type followed struct {
	target Target
	cancel context.CancelFunc

	// mu guards the rest.
	mu      sync.Mutex
	tracker *tracker
	timer   *time.Timer
}

// Start ends everything that is followed when ctx ends. It makes a Follower a runnable of a
// manager.
func (f *Follower) Start(ctx context.Context) error {
	<-ctx.Done()
	f.mu.Lock()
	f.closed = true
	for _, b := range f.builds {
		b.stop()
	}
	f.builds = nil
	f.mu.Unlock()
	f.group.Wait()
	return nil
}

// Follow follows a build until it has ended or is forgotten. Calling it again for the same
// target does nothing; another target takes the place of the first.
func (f *Follower) Follow(key types.NamespacedName, target Target) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b, ok := f.builds[key]; ok {
		if b.target == target {
			return
		}
		b.stop()
		delete(f.builds, key)
	}
	if f.closed {
		return
	}
	if f.builds == nil {
		f.builds = map[types.NamespacedName]*followed{}
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &followed{target: target, cancel: cancel, tracker: newTracker()}
	f.builds[key] = b
	f.group.Go(func() {
		defer cancel()
		f.run(ctx, key, b)
	})
}

// Forget ends the stream of a build.
func (f *Follower) Forget(key types.NamespacedName) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b, ok := f.builds[key]; ok {
		b.stop()
		delete(f.builds, key)
	}
}

// Progress returns what is known of a build; false when it is not followed on target.
func (f *Follower) Progress(key types.NamespacedName, target Target) (Progress, bool) {
	f.mu.Lock()
	b, ok := f.builds[key]
	f.mu.Unlock()
	if !ok || b.target != target {
		return Progress{}, false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.tracker.snapshot(), true
}

// Count returns how many builds are followed.
func (f *Follower) Count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.builds)
}

func (b *followed) stop() {
	b.cancel()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
}

// run streams until the result is there or ctx ends.
func (f *Follower) run(ctx context.Context, key types.NamespacedName, b *followed) {
	for {
		err := f.stream(ctx, key, b)
		if ctx.Err() != nil {
			return
		}
		b.mu.Lock()
		done := b.tracker.progress.Result != nil
		if !done {
			switch {
			case status.Code(err) == codes.NotFound || status.Code(err) == codes.OutOfRange:
				done, b.tracker.progress.Unknown = true, true
			case b.tracker.progress.Unreachable.IsZero():
				b.tracker.progress.Unreachable = time.Now()
			}
		}
		b.mu.Unlock()
		f.notify(ctx, key, b, true)
		if done {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(f.RetryDelay):
		}
	}
}

// stream receives events until the stream ends.
func (f *Follower) stream(ctx context.Context, key types.NamespacedName, b *followed) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	api, err := f.Clients.Client(ctx, b.target.Node)
	if err != nil {
		return err
	}
	if err := f.reached(ctx, key, b, api); err != nil {
		return err
	}
	b.mu.Lock()
	offset := b.tracker.next
	b.mu.Unlock()
	events, err := api.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: b.target.BuildID, Tenant: b.target.Tenant, Offset: offset})
	if err != nil {
		return err
	}
	for {
		msg, err := events.Recv()
		if errors.Is(err, io.EOF) {
			return status.Error(codes.Unavailable, "the agent ended the stream")
		}
		if err != nil {
			return err
		}
		b.mu.Lock()
		urgent := b.tracker.apply(msg.GetEvent())
		ended := b.tracker.progress.Result != nil
		b.mu.Unlock()
		f.notify(ctx, key, b, urgent)
		if ended {
			return nil
		}
	}
}

// reached asks for the build itself where the stream broke before: a stream says
// nothing until something happens.
func (f *Follower) reached(ctx context.Context, key types.NamespacedName, b *followed, api agentv1.BuildServiceClient) error {
	b.mu.Lock()
	back := !b.tracker.progress.Unreachable.IsZero()
	b.mu.Unlock()
	if !back {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := api.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: b.target.BuildID, Tenant: b.target.Tenant}); err != nil {
		return err
	}
	b.mu.Lock()
	b.tracker.progress.Unreachable = time.Time{}
	b.mu.Unlock()
	f.notify(ctx, key, b, true)
	return nil
}

// notify calls Notify now, or within Interval when it is not urgent.
func (f *Follower) notify(ctx context.Context, key types.NamespacedName, b *followed, urgent bool) {
	if ctx.Err() != nil {
		return
	}
	if urgent {
		f.Notify(key)
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.timer != nil {
		return
	}
	b.timer = time.AfterFunc(f.Interval, func() {
		b.mu.Lock()
		b.timer = nil
		b.mu.Unlock()
		f.Notify(key)
	})
}
