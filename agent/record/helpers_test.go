package record

import (
	"context"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// appenderDir has the test binary append events instead of testing; see
// TestKilledProcess.
const appenderDir = "KILN_RECORD_TEST_APPEND"

func TestMain(m *testing.M) {
	if dir := os.Getenv(appenderDir); dir != "" {
		appendUntilKilled(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// clock is a time that tests move.
type clock struct{ at time.Time }

func newClock() *clock { return &clock{time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

func (c *clock) now() time.Time          { return c.at }
func (c *clock) advance(d time.Duration) { c.at = c.at.Add(d) }

func open(t *testing.T, dir string, opts Options) *Store {
	t.Helper()
	s, err := Open(dir, opts)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func build(tenant, id string) *agentv1.Build {
	return &agentv1.Build{Tenant: tenant, BuildId: id, Spec: &agentv1.BuildSpec{Labels: map[string]string{"id": id}}}
}

func create(t *testing.T, s *Store, tenant, id string) *Writer {
	t.Helper()
	w, err := s.Create(build(tenant, id))
	require.NoError(t, err)
	return w
}

func logEvent(text string) *agentv1.Event {
	return &agentv1.Event{Kind: &agentv1.Event_Log{Log: &agentv1.LogEvent{Step: "s", Data: []byte(text)}}}
}

func stepEvent(digest string, ended bool) *agentv1.Event {
	r := &agentv1.StepResult{Digest: digest, Name: "step " + digest, Cached: ended}
	return &agentv1.Event{Kind: &agentv1.Event_Step{Step: &agentv1.StepEvent{Step: r}}}
}

func succeeded() *agentv1.BuildResult {
	return &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_SUCCEEDED, ImageDigest: "sha256:1"}
}

// events reads what is there of a build from offset.
func events(t *testing.T, s *Store, tenant, id string, offset uint64) []*agentv1.Event {
	t.Helper()
	c, err := s.Watch(Key{tenant, id}, offset)
	require.NoError(t, err)
	defer c.Close()
	var all []*agentv1.Event
	for {
		ev, err := c.Next(context.Background(), false)
		if err == io.EOF {
			return all
		}
		require.NoError(t, err)
		all = append(all, ev)
	}
}

// checkWhole fails unless the events are numbered from 0 without gaps and the last
// one alone is the result, which it returns.
func checkWhole(t *testing.T, all []*agentv1.Event) *agentv1.BuildResult {
	t.Helper()
	require.NotEmpty(t, all)
	for i, ev := range all {
		require.EqualValues(t, i, ev.GetOffset())
		require.Equal(t, i == len(all)-1, ev.GetResult() != nil, "event %d is %v", i, ev)
	}
	return all[len(all)-1].GetResult()
}

func id(i int) string { return fmt.Sprintf("b%d", i) }
