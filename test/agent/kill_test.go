package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	kills = 100
	// group is how many kills in a row have the same first step.
	group = 10
	// life is the longest that an agent lives with its builds.
	life = 600 * time.Millisecond
)

// secondStep marks that the first step of a build is done.
const secondStep = "echo second"

func firstStep(group int) string { return sh(fmt.Sprintf("echo group %d > /one", group)) }

// TestKilledAtAnyMoment kills an agent again and again while builds of all kinds
// start, run and end. What it acknowledged, and what it told, holds for the next.
func TestKilledAtAnyMoment(t *testing.T) {
	n := newNode(t, 3)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	var all, last []*acknowledged
	done := map[int]bool{} // groups whose first step has ended
	states := map[agentv1.BuildState]int{}
	for kill := range kills {
		a := n.start(t)
		for _, b := range last {
			states[checkEnded(t, ctx, a, b)]++
		}
		last = a.buildUntilKilled(t, ctx, kill)
		for _, b := range last {
			done[kill/group] = done[kill/group] || firstStepEnded(b.seen)
		}
		all = append(all, last...)
	}
	a := n.start(t)
	for _, b := range last {
		states[checkEnded(t, ctx, a, b)]++
	}
	require.NotEmpty(t, all)
	for _, b := range all { // they still are as they were
		got, err := a.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: b.request.GetBuildId()})
		require.NoError(t, err)
		require.NotNil(t, got.GetBuild().GetEndedAt(), "%v", got)
	}
	t.Logf("%d builds: %v", len(all), states)
	require.NotEmpty(t, done)
	for g := range done {
		if done[g] {
			checkCached(t, ctx, a, g)
		}
	}
	t.Logf("%d finished steps are cached", len(done))
	a.end(t, syscall.SIGTERM)
	n.checkNothingLeft(t)
}

// buildUntilKilled starts builds and kills the agent at some moment. It returns those
// that were acknowledged.
func (a *agent) buildUntilKilled(t *testing.T, ctx context.Context, kill int) []*acknowledged {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g := kill / group
	var mu sync.Mutex
	var out []*acknowledged
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			file := base + firstStep(g) + sh(fmt.Sprintf("%s %d-%d; sleep 0.2", secondStep, kill, i))
			if i%2 == 1 {
				file = fmt.Sprintf("FROM scratch\nCOPY busybox /%d-%d\n", kill, i)
			}
			archive := agenttest.BusyboxTar(t, map[string]string{"Dockerfile": file})
			for j := 0; ctx.Err() == nil; j++ {
				b, err := a.acknowledge(ctx, fmt.Sprintf("k%d-%d-%d", kill, i, j), archive)
				if err != nil {
					return // it was killed
				}
				mu.Lock()
				out = append(out, b)
				mu.Unlock()
				if a.follow(ctx, b) != nil {
					return
				}
			}
		})
	}
	time.Sleep(time.Duration(rand.Int64N(int64(life))))
	a.end(t, syscall.SIGKILL)
	cancel()
	wg.Wait()
	return out
}

// firstStepEnded tells whether the step after the first one had begun.
func firstStepEnded(events []*agentv1.Event) bool {
	for _, e := range events {
		if s := e.GetStep().GetStep(); s.GetStartedAt() != nil && strings.Contains(s.GetName(), secondStep) {
			return true
		}
	}
	return false
}

// checkEnded has a new agent tell of a build that another one had: all that was told
// before, without gaps, and one result. Starting it again starts nothing.
func checkEnded(t *testing.T, ctx context.Context, a *agent, b *acknowledged) agentv1.BuildState {
	t.Helper()
	id := b.request.GetBuildId()
	events := agenttest.Watch(t, ctx, a, id, 0)
	result := agenttest.CheckEvents(t, events, 0)
	require.Contains(t, []agentv1.BuildState{
		agentv1.BuildState_BUILD_STATE_SUCCEEDED, agentv1.BuildState_BUILD_STATE_INTERRUPTED,
	}, result.GetState(), "%s: %v", id, result)
	require.GreaterOrEqual(t, len(events), len(b.seen), id)
	for i, e := range b.seen {
		require.True(t, proto.Equal(e, events[i]), "%s: event %d was told as %v, and now is %v", id, i, e, events[i])
	}
	again, err := a.StartBuild(ctx, b.request)
	require.NoError(t, err)
	require.Equal(t, result.GetState(), again.GetBuild().GetState())
	require.NotNil(t, again.GetBuild().GetEndedAt())
	require.Len(t, agenttest.Watch(t, ctx, a, id, 0), len(events), "it was not started again")
	return result.GetState()
}

// checkCached builds the first step of a group, which has ended before.
func checkCached(t *testing.T, ctx context.Context, a *agent, g int) {
	t.Helper()
	b, err := a.acknowledge(ctx, fmt.Sprintf("cached-%d", g), agenttest.BusyboxTar(t, map[string]string{"Dockerfile": base + firstStep(g)}))
	require.NoError(t, err)
	result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, a, b.request.GetBuildId(), 0), 0)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
	found := false
	for _, s := range result.GetSteps() {
		if strings.Contains(s.GetName(), "RUN") {
			found = true
			require.True(t, s.GetCached(), "%v", s)
		}
	}
	require.True(t, found, "%v", result)
}
