package cli

import (
	"sync"

	"github.com/moby/buildkit/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// usageFeed adds what steps used to the progress of a build. Its methods may be called
// concurrently.
type usageFeed struct {
	mu    sync.Mutex
	steps map[string]*agentv1.StepUsage // guarded by mu; steps whose end is not in the progress yet
}

// note keeps what a step used.
func (f *usageFeed) note(vertex string, u *agentv1.StepUsage) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.steps == nil {
		f.steps = map[string]*agentv1.StepUsage{}
	}
	f.steps[vertex] = u
}

// add tells in s what the steps used that end in it.
func (f *usageFeed) add(s *client.SolveStatus) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range s.Vertexes {
		if st := usageStatus(v, f.steps[v.Digest.String()]); st != nil {
			s.Statuses = append(s.Statuses, st)
			delete(f.steps, v.Digest.String())
		}
	}
}

// through passes news on, with what steps used, until in is closed.
func (f *usageFeed) through(in <-chan *client.SolveStatus) chan *client.SolveStatus {
	out := make(chan *client.SolveStatus)
	go func() {
		defer close(out)
		for s := range in {
			f.add(s)
			out <- s // the display drains it
		}
	}()
	return out
}

// usageStatus shows what a step used, when it has ended; nil: there is nothing to show. It
// comes before the end of the step in what is shown.
func usageStatus(v *client.Vertex, u *agentv1.StepUsage) *client.VertexStatus {
	text := usageText(u)
	if text == "" || v.Completed == nil || v.Cached {
		return nil
	}
	return &client.VertexStatus{ID: text, Vertex: v.Digest, Timestamp: *v.Completed, Started: v.Completed, Completed: v.Completed}
}
