package agent

import (
	"sync"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Steps hands what steps used from the engines, where they run, to the builds that wait
// for them. Its methods may be called concurrently.
type Steps struct {
	mu        sync.Mutex
	following map[Domain]map[*stepUsages]struct{} // guarded by mu
	metrics   *Metrics                            // nil: nobody counts
}

// NewSteps returns an empty Steps. metrics may be nil.
func NewSteps(metrics *Metrics) *Steps {
	return &Steps{following: map[Domain]map[*stepUsages]struct{}{}, metrics: metrics}
}

// Report tells what a step used, before its end is told to the builds that wait for it.
// vertex is its digest; empty: a process that is no step of a build. It does not block.
func (s *Steps) Report(d Domain, vertex string, u *agentv1.StepUsage) {
	if s.metrics != nil {
		s.metrics.step(string(d.Sandbox), u)
	}
	if vertex == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for f := range s.following[d] {
		if len(f.steps) < maxUsages {
			f.steps[vertex] = u
		}
	}
}

// maxUsages bounds the memory that steps without end can take.
const maxUsages = 1 << 14

// stepUsages are those of the steps that have ended in a domain since follow.
type stepUsages struct {
	of     *Steps
	domain Domain
	steps  map[string]*agentv1.StepUsage // guarded by of.mu
}

// follow collects what steps of d use from now on. The caller calls end. A nil Steps never
// learns of any.
func (s *Steps) follow(d Domain) *stepUsages {
	if s == nil {
		s = NewSteps(nil)
	}
	f := &stepUsages{of: s, domain: d, steps: map[string]*agentv1.StepUsage{}}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.following[d] == nil {
		s.following[d] = map[*stepUsages]struct{}{}
	}
	s.following[d][f] = struct{}{}
	return f
}

// get returns what a step used; nil: nothing is known.
func (f *stepUsages) get(vertex string) *agentv1.StepUsage {
	f.of.mu.Lock()
	defer f.of.mu.Unlock()
	return f.steps[vertex]
}

func (f *stepUsages) end() {
	f.of.mu.Lock()
	defer f.of.mu.Unlock()
	delete(f.of.following[f.domain], f)
	if len(f.of.following[f.domain]) == 0 {
		delete(f.of.following, f.domain)
	}
}
