package follow

import (
	"time"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Progress is what is known of a build from its events.
type Progress struct {
	// State as the agent told it last.
	State agentv1.BuildState
	// QueuePosition while it waits, from 1.
	QueuePosition int32
	// Started is when it left the queue; zero: not yet.
	Started time.Time
	// Steps in the order in which they started; the first MaxSteps.
	Steps []*agentv1.StepResult
	// StepCount is how many steps there are, also of those left out.
	StepCount int
	// Result once it has ended.
	Result *agentv1.BuildResult
	// ResultTime is when the agent recorded the result.
	ResultTime time.Time
	// Unreachable is since when the agent has not answered; zero: it answers.
	Unreachable time.Time
	// Unknown is set when the agent answers that it knows no such build.
	Unknown bool
}

// MaxSteps is how many steps a Progress holds.
const MaxSteps = 256

// tracker builds a Progress from events. It is not safe for concurrent use.
type tracker struct {
	progress Progress
	// index holds the place in Steps by digest, -1 for steps that are left out.
	index map[string]int
	// next is the offset of the first event not seen.
	next uint64
}

func newTracker() *tracker { return &tracker{index: map[string]int{}} }

// apply takes in an event and tells whether it changed what users wait to see.
func (t *tracker) apply(e *agentv1.Event) (urgent bool) {
	t.next = e.GetOffset() + 1
	p := &t.progress
	switch kind := e.GetKind().(type) {
	case *agentv1.Event_Status:
		urgent = p.State != kind.Status.GetState()
		p.State, p.QueuePosition = kind.Status.GetState(), kind.Status.GetQueuePosition()
		if p.State == agentv1.BuildState_BUILD_STATE_RUNNING && p.Started.IsZero() && e.GetTime().IsValid() {
			p.Started = e.GetTime().AsTime()
		}
	case *agentv1.Event_Step:
		urgent = t.step(kind.Step.GetStep())
	case *agentv1.Event_Result:
		p.Result, p.State = kind.Result, kind.Result.GetState()
		p.ResultTime = e.GetTime().AsTime()
		urgent = true
	}
	return urgent
}

// maxDigests bounds the memory that a build which starts steps without end can take.
const maxDigests = 1 << 14

func (t *tracker) step(s *agentv1.StepResult) (first bool) {
	p := &t.progress
	at, known := t.index[s.GetDigest()]
	switch {
	case known && at >= 0:
		p.Steps[at] = s
	case known:
	case len(t.index) >= maxDigests:
	case s.GetStartedAt() == nil:
		// It is announced but has not started.
	default:
		p.StepCount++
		at = -1
		if len(p.Steps) < MaxSteps {
			at = len(p.Steps)
			p.Steps = append(p.Steps, s)
		}
		t.index[s.GetDigest()] = at
		return p.StepCount == 1
	}
	return false
}

// snapshot returns a copy that later events do not change.
func (t *tracker) snapshot() Progress {
	p := t.progress
	p.Steps = append([]*agentv1.StepResult(nil), p.Steps...)
	return p
}
