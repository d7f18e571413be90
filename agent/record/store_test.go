package record

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func TestLifeOfABuild(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	w := create(t, s, "a", "one")
	require.NoError(t, w.Queued(3, ""))
	b, err := s.Get(Key{"a", "one"})
	require.NoError(t, err)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_QUEUED, b.GetState())
	require.EqualValues(t, 3, b.GetQueuePosition())
	require.EqualValues(t, 2, b.GetEvents())

	require.NoError(t, w.Start())
	require.NoError(t, w.Queued(9, "a report that comes late"))
	require.NoError(t, w.Append(logEvent("hello")))
	require.Error(t, w.Append(&agentv1.Event{Kind: &agentv1.Event_Result{Result: succeeded()}}))
	require.NoError(t, w.Finish(succeeded()))
	require.Error(t, w.Finish(succeeded()))
	require.Error(t, w.Append(logEvent("late")))

	check := func(s *Store) {
		all := events(t, s, "a", "one", 0)
		require.Len(t, all, 5)
		require.Equal(t, "sha256:1", checkWhole(t, all).GetImageDigest())
		b, err := s.Get(Key{"a", "one"})
		require.NoError(t, err)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, b.GetState())
		require.EqualValues(t, 5, b.GetEvents())
		require.NotNil(t, b.GetStartedAt())
		require.NotNil(t, b.GetEndedAt())
		require.Equal(t, "one", b.GetSpec().GetLabels()["id"])
	}
	check(s)
	require.NoError(t, s.Close())
	check(open(t, dir, Options{}))
}

func TestFilesAreRootsOwn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "builds")
	s := open(t, dir, Options{})
	create(t, s, "a", "one")
	err := filepath.Walk(dir, func(name string, fi os.FileInfo, err error) error {
		require.NoError(t, err)
		require.Zero(t, fi.Mode().Perm()&0o077, name)
		return nil
	})
	require.NoError(t, err)
}

func TestCreateKeepsOneOfEach(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	made, there := 0, 0
	for range 16 {
		wg.Go(func() {
			_, err := s.Create(build("a", "one"))
			var exists *ExistsError
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				made++
			case errors.As(err, &exists):
				there++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.Equal(t, 1, made)
	require.Equal(t, 15, there)
	_, err := s.Create(build("b", "one"))
	require.NoError(t, err, "another tenant's build of that name")
}

func TestKeysThatAreNoLabelsAreRefused(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	for _, k := range []Key{{"a", ""}, {"", "x"}, {"a", "../x"}, {"a", "X"}, {"a", "x."}, {"a", "-x"}, {"a/b", "x"}, {"a", "x\x00"}, {"a", strings.Repeat("x", 64)}} {
		_, err := s.Create(build(k.Tenant, k.ID))
		require.Error(t, err, "%v", k)
		_, err = s.Get(k)
		require.ErrorIs(t, err, ErrNotFound)
		_, err = s.Watch(k, 0)
		require.ErrorIs(t, err, ErrNotFound)
	}
}

func TestWatchersFollow(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	w := create(t, s, "a", "one")
	require.NoError(t, w.Start())
	const n, watchers = 2000, 8
	var wg sync.WaitGroup
	for i := range watchers {
		offset := uint64(i * 280) // some are beyond what there is
		c, err := s.Watch(Key{"a", "one"}, offset)
		require.NoError(t, err)
		wg.Go(func() {
			defer c.Close()
			for want := offset; ; want++ {
				ev, err := c.Next(context.Background(), true)
				if err == io.EOF {
					if want != n+3 {
						t.Errorf("watcher from %d ended at %d", offset, want)
					}
					return
				}
				if err != nil || ev.GetOffset() != want {
					t.Errorf("event %d: got %v, %v", want, ev, err)
					return
				}
				if i == 0 && want%500 == 0 {
					time.Sleep(time.Millisecond) // a slow one keeps nobody
				}
			}
		})
	}
	for range n {
		require.NoError(t, w.Append(logEvent("some output\n")))
	}
	require.NoError(t, w.Finish(succeeded()))
	wg.Wait()
}

func TestWatchFrom(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	w := create(t, s, "a", "ended")
	require.NoError(t, w.Start())
	for range 3 * markEvery {
		require.NoError(t, w.Append(logEvent("x")))
	}
	require.NoError(t, w.Finish(succeeded()))
	last := uint64(3*markEvery + 2)
	for _, offset := range []uint64{0, 1, markEvery - 1, markEvery, markEvery + 1, 2*markEvery + 7, last} {
		all := events(t, s, "a", "ended", offset)
		require.Equal(t, offset, all[0].GetOffset())
		require.Len(t, all, int(last-offset+1))
	}
	var beyond *RangeError
	for _, offset := range []uint64{last + 1, 1 << 63, ^uint64(0)} {
		_, err := s.Watch(Key{"a", "ended"}, offset)
		require.ErrorAs(t, err, &beyond)
	}

	// A build that goes on may still get there. It does not.
	w = create(t, s, "a", "runs")
	c, err := s.Watch(Key{"a", "runs"}, 100)
	require.NoError(t, err)
	defer c.Close()
	_, err = c.Next(context.Background(), false)
	require.ErrorIs(t, err, io.EOF)
	require.NoError(t, w.Finish(succeeded()))
	_, err = c.Next(context.Background(), true)
	require.ErrorAs(t, err, &beyond)
}

func TestWatchEndsWithContextAndStore(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	create(t, s, "a", "one")
	c, err := s.Watch(Key{"a", "one"}, 1)
	require.NoError(t, err)
	defer c.Close()
	gone := errors.New("client has gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(gone)
	_, err = c.Next(ctx, true)
	require.ErrorIs(t, err, gone)

	got := make(chan error)
	go func() {
		_, err := c.Next(context.Background(), true)
		got <- err
	}()
	time.Sleep(10 * time.Millisecond)
	require.NoError(t, s.Close())
	require.ErrorIs(t, <-got, ErrClosed)
	_, err = s.Create(build("a", "two"))
	require.ErrorIs(t, err, ErrClosed)
	_, _, err = s.List(Query{PageSize: 1, PageBytes: 1})
	require.ErrorIs(t, err, ErrClosed)
}

func TestListPages(t *testing.T) {
	clk := newClock()
	s := open(t, t.TempDir(), Options{Now: clk.now})
	for i := range 10 {
		tenant := []string{"a", "b"}[i%2]
		w := create(t, s, tenant, id(i))
		if i < 6 {
			require.NoError(t, w.Finish(succeeded()))
		}
		clk.advance(time.Second)
	}
	ended := []agentv1.BuildState{agentv1.BuildState_BUILD_STATE_SUCCEEDED}
	tests := []struct {
		name string
		q    Query
		want string
	}{
		{"all", Query{PageSize: 100}, "b9 b8 b7 b6 b5 b4 b3 b2 b1 b0"},
		{"pages", Query{PageSize: 3}, "b9 b8 b7 | b6 b5 b4 | b3 b2 b1 | b0"},
		{"a page that is just full", Query{PageSize: 5}, "b9 b8 b7 b6 b5 | b4 b3 b2 b1 b0"},
		{"a tenant", Query{PageSize: 3, Tenant: "b"}, "b9 b7 b5 | b3 b1"},
		{"a tenant that is the start of none", Query{PageSize: 3, Tenant: "bb"}, ""},
		{"a state", Query{PageSize: 4, States: ended}, "b5 b4 b3 b2 | b1 b0"},
		{"labels", Query{PageSize: 4, Labels: map[string]string{"id": "b4"}}, "b4"},
		{"bytes", Query{PageSize: 4, PageBytes: 1, Tenant: "a"}, "b8 | b6 | b4 | b2 | b0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.q.PageBytes == 0 {
				tt.q.PageBytes = 1 << 20
			}
			var pages []string
			for {
				page, next, err := s.List(tt.q)
				require.NoError(t, err)
				var ids []string
				for _, b := range page {
					ids = append(ids, b.GetBuildId())
				}
				pages = append(pages, strings.Join(ids, " "))
				if next == "" {
					break
				}
				tt.q.PageToken = next
			}
			require.Equal(t, tt.want, strings.Join(pages, " | "))
		})
	}
	for _, token := range []string{"!", "AAAA", strings.Repeat("A", 400)} {
		_, _, err := s.List(Query{PageSize: 1, PageBytes: 1, PageToken: token})
		require.ErrorIs(t, err, ErrPageToken)
	}
}

func TestResultAlwaysFits(t *testing.T) {
	for name, result := range map[string]*agentv1.BuildResult{
		"many steps": {State: agentv1.BuildState_BUILD_STATE_FAILED, Steps: manySteps(40000)},
		"long text": {State: agentv1.BuildState_BUILD_STATE_FAILED, Failure: &agentv1.Failure{
			Reason: agentv1.FailureReason_FAILURE_REASON_PUSH, Message: strings.Repeat("é", MaxEventBytes),
		}},
		"no UTF-8": {State: agentv1.BuildState_BUILD_STATE_FAILED, Failure: &agentv1.Failure{
			Reason: agentv1.FailureReason_FAILURE_REASON_PUSH, Message: "bad \xff", Step: "\xff",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir(), Options{})
			w := create(t, s, "a", "one")
			require.NoError(t, w.Finish(result))
			got := checkWhole(t, events(t, s, "a", "one", 0))
			require.Equal(t, agentv1.BuildState_BUILD_STATE_FAILED, got.GetState())
			require.Equal(t, result.GetFailure().GetReason(), got.GetFailure().GetReason())
			b, err := s.Get(Key{"a", "one"})
			require.NoError(t, err)
			require.True(t, proto.Equal(got, b.GetResult()))
		})
	}
}

func manySteps(n int) []*agentv1.StepResult {
	steps := make([]*agentv1.StepResult, n)
	for i := range steps {
		steps[i] = &agentv1.StepResult{Name: strings.Repeat("x", 100)}
	}
	return steps
}

func TestScopes(t *testing.T) {
	clk := newClock()
	dir := t.TempDir()
	s := open(t, dir, Options{Now: clk.now})
	_, ok := s.Scope("a", "x")
	require.False(t, ok)
	require.NoError(t, s.SetScope("a", "x", Scope{clk.now(), 42}))
	require.NoError(t, s.Close())
	s = open(t, dir, Options{Now: clk.now})
	got, ok := s.Scope("a", "x")
	require.True(t, ok)
	require.True(t, got.LastBuilt.Equal(clk.now()))
	require.EqualValues(t, 42, got.CacheBytes)
	_, ok = s.Scope("b", "x")
	require.False(t, ok)
	clk.advance(DefaultLimits.Age + time.Second)
	require.NoError(t, s.Sweep())
	_, ok = s.Scope("a", "x")
	require.False(t, ok)
}

// TestListWhileBuildsEnd lists while the index grows under it.
func TestListWhileBuildsEnd(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 200 {
			b := build("a", id(i))
			b.Spec.Labels["x"] = strings.Repeat("x", 50<<10)
			w, err := s.Create(b)
			if err != nil {
				t.Error(err)
				return
			}
			if err := w.Finish(succeeded()); err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		_, _, err := s.List(Query{PageSize: 1000, PageBytes: 1 << 30})
		require.NoError(t, err)
		select {
		case <-done:
			return
		default:
		}
	}
}
