package progress

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// fixture collects events; its time is set by tests.
type fixture struct {
	*Translator
	at     time.Time
	events []*agentv1.Event
}

func newFixture() *fixture {
	f := &fixture{at: time.Unix(1000, 0)}
	f.Translator = New(func(ev *agentv1.Event) { f.events = append(f.events, ev) }, func() time.Time { return f.at })
	return f
}

// take returns the events since the last call.
func (f *fixture) take(t *testing.T) []*agentv1.Event {
	t.Helper()
	for _, ev := range f.events {
		_, err := proto.Marshal(ev)
		require.NoError(t, err)
	}
	out := f.events
	f.events = nil
	return out
}

var (
	d1, d2 = digest.FromString("1"), digest.FromString("2")
	began  = time.Unix(10, 0)
	over   = time.Unix(20, 0)
)

func TestSteps(t *testing.T) {
	f := newFixture()
	f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{{Digest: d1, Name: "one"}, {Digest: d2, Name: "two"}}})
	require.Empty(t, f.take(t), "nothing has started")
	f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{{Digest: d2, Name: "two", Inputs: []digest.Digest{d1}, Started: &began, ProgressGroup: &pb.ProgressGroup{Id: "g"}}}})
	evs := f.take(t)
	require.Len(t, evs, 1)
	require.Equal(t, d2.String(), evs[0].GetStep().GetStep().GetDigest())
	require.Equal(t, []string{d1.String()}, evs[0].GetStep().GetInputs())
	require.Equal(t, "g", evs[0].GetStep().GetGroup())
	require.Nil(t, evs[0].GetStep().GetStep().GetEndedAt())
	f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{{Digest: d2, Name: "two", Started: &began}}})
	require.Empty(t, f.take(t), "it has not changed")
	f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{
		{Digest: d2, Name: "two", Started: &began, Completed: &over, Error: "broken"},
		{Digest: d1, Name: "one", Started: &over, Completed: &over, Cached: true},
	}})
	require.Len(t, f.take(t), 2)
	results := f.Results()
	require.Len(t, results, 2)
	require.Equal(t, "two", results[0].GetName(), "in the order of their start")
	require.True(t, results[1].GetCached())
	failed, ok := f.Failed()
	require.True(t, ok)
	require.Equal(t, "two", failed.Name)
	_, ok = f.Step("sha256:other")
	require.False(t, ok)
}

func TestTheStepThatFailedIsNotOneThatWasStopped(t *testing.T) {
	f := newFixture()
	f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{
		{Digest: d1, Name: "stopped", Started: &began, Completed: &over, Error: "context canceled"},
		{Digest: d2, Name: "broken", Started: &began, Completed: &over, Error: "exit code: 1"},
	}})
	failed, ok := f.Failed()
	require.True(t, ok)
	require.Equal(t, "broken", failed.Name)
}

func TestOutput(t *testing.T) {
	f := newFixture()
	f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{{Digest: d1, Name: "one", Started: &began}}})
	f.take(t)
	long := strings.Repeat("0123456789", maxLog/5)
	f.Add(&client.SolveStatus{Logs: []*client.VertexLog{
		{Vertex: d1, Stream: 1, Data: []byte("a")}, {Vertex: d1, Stream: 1, Data: []byte("b\xff")},
		{Vertex: d1, Stream: 2, Data: []byte("c")}, {Vertex: d2, Stream: 2, Data: []byte("d")},
		{Vertex: d1, Stream: 1, Data: []byte(long)}, {Vertex: d1, Stream: 1},
	}})
	var got []string
	for _, ev := range f.take(t) {
		require.LessOrEqual(t, len(ev.GetLog().GetData()), maxLog)
		got = append(got, string(ev.GetLog().GetData()))
	}
	require.Equal(t, []string{"ab\xff", "c", "d"}, got[:3])
	require.Equal(t, long, strings.Join(got[3:], ""))
	step, _ := f.Step(d1.String())
	require.Equal(t, long[len(long)-maxTail:], step.LogTail)
	f.Add(&client.SolveStatus{Logs: []*client.VertexLog{{Vertex: d1, Data: []byte("the end \xff")}}})
	step, _ = f.Step(d1.String())
	require.Len(t, step.LogTail, maxTail)
	require.True(t, strings.HasSuffix(step.LogTail, "the end ?"))
}

func TestProgressIsHeldBack(t *testing.T) {
	f := newFixture()
	add := func(current int64, done bool) {
		s := &client.VertexStatus{ID: "layer", Vertex: d1, Current: current, Total: 100, Started: &began}
		if done {
			s.Completed = &over
		}
		f.Add(&client.SolveStatus{Statuses: []*client.VertexStatus{s}})
	}
	told := func() []int64 {
		var out []int64
		for _, ev := range f.take(t) {
			out = append(out, ev.GetProgress().GetCurrent())
		}
		return out
	}
	for i := range int64(10) {
		add(i, false)
	}
	require.Equal(t, []int64{0}, told())
	f.Flush(false)
	require.Empty(t, told())
	f.at = f.at.Add(time.Second)
	f.Flush(false)
	require.Equal(t, []int64{9}, told())
	add(50, false)
	f.Flush(true)
	require.Equal(t, []int64{50}, told())
	add(60, false)
	add(100, true)
	require.Equal(t, []int64{100}, told(), "the end comes at once")
	require.Empty(t, f.parts)
}

func TestForeignTextIsBounded(t *testing.T) {
	f := newFixture()
	bad := strings.Repeat("x\xff", 100<<10)
	f.Add(&client.SolveStatus{
		Vertexes: []*client.Vertex{{Digest: digest.Digest(bad), Name: bad, Error: bad, Started: &began, Inputs: make([]digest.Digest, 10000), ProgressGroup: &pb.ProgressGroup{Name: bad}}},
		Statuses: []*client.VertexStatus{{ID: bad, Name: bad, Vertex: digest.Digest(bad)}},
		Warnings: []*client.VertexWarning{{
			Short: []byte(bad), Detail: make([][]byte, 10000), URL: bad,
			SourceInfo: &pb.SourceInfo{Filename: bad}, Range: []*pb.Range{{Start: &pb.Position{Line: 7}, End: &pb.Position{Line: 9}}, nil},
		}},
	})
	for _, ev := range f.take(t) {
		require.Less(t, proto.Size(ev), 16<<10)
	}
	for range 20000 {
		d := digest.FromBytes([]byte{byte(len(f.order)), byte(len(f.order) >> 8)})
		f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{{Digest: d, Name: strings.Repeat("n", 1000), Started: &began}}})
	}
	size := 0
	for _, r := range f.Results() {
		require.True(t, utf8.ValidString(r.GetName()))
		size += proto.Size(r)
	}
	require.LessOrEqual(t, size, maxResult)
}

// TestUsageIsToldAtTheEnd has a step whose usage is known, one of the cache and one that
// runs.
func TestUsageIsToldAtTheEnd(t *testing.T) {
	f := newFixture()
	used := &agentv1.StepUsage{PeakMemoryBytes: 1}
	f.TellUsage(func(string) *agentv1.StepUsage { return used })
	f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{{Digest: d1, Name: "one", Started: &began}}})
	f.Add(&client.SolveStatus{Vertexes: []*client.Vertex{
		{Digest: d1, Name: "one", Started: &began, Completed: &over},
		{Digest: d2, Name: "two", Started: &began, Completed: &over, Cached: true},
	}})
	evs := f.take(t)
	require.Len(t, evs, 3)
	require.Nil(t, evs[0].GetStep().GetStep().GetUsage())
	require.True(t, proto.Equal(used, evs[1].GetStep().GetStep().GetUsage()))
	require.Nil(t, evs[2].GetStep().GetStep().GetUsage())
	require.True(t, proto.Equal(used, f.Results()[0].GetUsage()))
}
