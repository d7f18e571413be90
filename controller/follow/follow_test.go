package follow

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/types"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tape is an agent with one build, whose events a test adds.
type tape struct {
	agentv1.BuildServiceClient
	mu      sync.Mutex
	events  []*agentv1.Event
	broken  error
	changed chan struct{}
	watches int
}

func newTape() *tape { return &tape{changed: make(chan struct{})} }

func (a *tape) Client(context.Context, string) (agentv1.BuildServiceClient, error) { return a, nil }

func (a *tape) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *tape) add(e *agentv1.Event) {
	a.change(func() {
		e.Offset, e.Time = uint64(len(a.events)), timestamppb.New(time.Unix(100, 0))
		a.events = append(a.events, e)
	})
}

func (a *tape) GetBuild(context.Context, *agentv1.GetBuildRequest, ...grpc.CallOption) (*agentv1.GetBuildResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &agentv1.GetBuildResponse{}, a.broken
}

func (a *tape) WatchBuild(ctx context.Context, r *agentv1.WatchBuildRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[agentv1.WatchBuildResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.watches++
	return &tapeStream{ctx: ctx, tape: a, next: r.Offset}, nil
}

type tapeStream struct {
	grpc.ClientStream
	ctx  context.Context
	tape *tape
	next uint64
}

func (s *tapeStream) Recv() (*agentv1.WatchBuildResponse, error) {
	for {
		s.tape.mu.Lock()
		err, changed := s.tape.broken, s.tape.changed
		var e *agentv1.Event
		if s.next < uint64(len(s.tape.events)) {
			e = s.tape.events[s.next]
		}
		s.tape.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if e != nil {
			s.next++
			return &agentv1.WatchBuildResponse{Event: e}, nil
		}
		select {
		case <-s.ctx.Done():
			return nil, status.FromContextError(s.ctx.Err()).Err()
		case <-changed:
		}
	}
}

var (
	key    = types.NamespacedName{Namespace: "team-a", Name: "app"}
	target = Target{Node: "n1", BuildID: "u1", Tenant: "team-a"}
)

func state(s agentv1.BuildState) *agentv1.Event {
	return &agentv1.Event{Kind: &agentv1.Event_Status{Status: &agentv1.StatusEvent{State: s}}}
}

func step(digest string) *agentv1.Event {
	return &agentv1.Event{Kind: &agentv1.Event_Step{Step: &agentv1.StepEvent{Step: &agentv1.StepResult{Digest: digest, Name: digest, StartedAt: timestamppb.Now()}}}}
}

func result() *agentv1.Event {
	return &agentv1.Event{Kind: &agentv1.Event_Result{Result: &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_SUCCEEDED}}}
}

// follower starts one whose notes are counted; the returned functions give the count and end it.
func follower(a *tape) (f *Follower, notes func() int, stop func()) {
	var mu sync.Mutex
	n := 0
	f = &Follower{Clients: a, Interval: time.Second, RetryDelay: time.Second, Notify: func(types.NamespacedName) {
		mu.Lock()
		defer mu.Unlock()
		n++
	}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = f.Start(ctx)
	}()
	return f, func() int { mu.Lock(); defer mu.Unlock(); return n }, func() { cancel(); <-done }
}

func TestBuildIsFollowedToItsResult(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTape()
		f, _, stop := follower(a)
		defer stop()
		f.Follow(key, target)
		f.Follow(key, target)
		a.add(state(agentv1.BuildState_BUILD_STATE_RUNNING))
		a.add(step("a"))
		a.add(step("a"))
		a.add(step("b"))
		synctest.Wait()
		p, ok := f.Progress(key, target)
		require.True(t, ok)
		require.Equal(t, int64(100), p.Started.Unix())
		require.Len(t, p.Steps, 2)
		require.Nil(t, p.Result)
		a.add(result())
		synctest.Wait()
		p, _ = f.Progress(key, target)
		require.NotNil(t, p.Result)
		require.Equal(t, 1, a.watches)
		f.Forget(key)
		_, ok = f.Progress(key, target)
		require.False(t, ok)
	})
}

func TestBrokenStreamIsTakenUpWhereItBroke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTape()
		f, _, stop := follower(a)
		defer stop()
		a.add(state(agentv1.BuildState_BUILD_STATE_RUNNING))
		a.add(step("a"))
		f.Follow(key, target)
		synctest.Wait()
		a.change(func() { a.broken = status.Error(codes.Unavailable, "gone") })
		time.Sleep(10 * time.Second)
		p, _ := f.Progress(key, target)
		require.WithinDuration(t, time.Now().Add(-10*time.Second), p.Unreachable, time.Second)
		a.change(func() { a.broken = nil })
		time.Sleep(2 * time.Second)
		p, _ = f.Progress(key, target)
		require.True(t, p.Unreachable.IsZero(), "it answers, though nothing happens")
		a.add(step("b"))
		synctest.Wait()
		p, _ = f.Progress(key, target)
		require.Len(t, p.Steps, 2, "no event was seen twice")
	})
}

func TestBuildThatTheAgentDoesNotKnow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTape()
		a.broken = status.Error(codes.NotFound, "no")
		f, _, stop := follower(a)
		defer stop()
		f.Follow(key, target)
		time.Sleep(time.Minute)
		p, _ := f.Progress(key, target)
		require.True(t, p.Unknown)
		require.Equal(t, 1, a.watches, "it is not asked again")
	})
}

func TestNotesAreFewWhenNothingImportantHappens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTape()
		f, notes, stop := follower(a)
		defer stop()
		f.Follow(key, target)
		a.add(state(agentv1.BuildState_BUILD_STATE_RUNNING))
		synctest.Wait()
		require.Equal(t, 1, notes(), "at once")
		for i := range 1000 {
			a.add(&agentv1.Event{Kind: &agentv1.Event_Log{Log: &agentv1.LogEvent{Data: fmt.Append(nil, i)}}})
			time.Sleep(10 * time.Millisecond)
		}
		require.LessOrEqual(t, notes(), 12)
	})
}

func TestStepsWithoutEndAreBounded(t *testing.T) {
	tr := newTracker()
	for i := range maxDigests + 1000 {
		tr.apply(step(fmt.Sprint(i)))
	}
	require.Len(t, tr.progress.Steps, MaxSteps)
	require.Len(t, tr.index, maxDigests)
	require.Equal(t, maxDigests, tr.progress.StepCount)
}

func TestEventsWithNothingInThemAreHarmless(t *testing.T) {
	tr := newTracker()
	for _, e := range []*agentv1.Event{nil, {}, {Kind: &agentv1.Event_Status{}}, {Kind: &agentv1.Event_Step{}}, {Kind: &agentv1.Event_Result{}}, {Offset: 1 << 63}} {
		require.NotPanics(t, func() { tr.apply(e) })
	}
}
