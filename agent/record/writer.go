package record

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Writer writes what happens to one build until it has ended. Its methods may be
// called concurrently.
type Writer struct {
	store  *Store
	key    Key
	events *eventLog
	ready  atomic.Bool // the build is on disk
	// decided is closed when it is known whether ready becomes true.
	decided chan struct{}

	mu     sync.Mutex
	build  *agentv1.Build // guarded by mu
	stored bool           // guarded by mu; the result is in the index on disk
}

// Build returns the build as it is now. The caller may change it.
func (w *Writer) Build() *agentv1.Build {
	w.mu.Lock()
	b := proto.CloneOf(w.build)
	w.mu.Unlock()
	if w.ready.Load() && b.GetResult() == nil {
		b.Events = w.events.extent().events
	}
	return b
}

// Queued stores the build's new place in the queue, with a message that may be
// empty.
func (w *Writer) Queued(position int32, message string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.build.GetState() != agentv1.BuildState_BUILD_STATE_QUEUED {
		return nil
	}
	w.build.QueuePosition = position
	_, err := w.events.append(queuedEvent(position, message), structure, w.store.now(), false)
	return err
}

// Start stores that the build runs, and makes room for its output.
func (w *Writer) Start() error {
	limit, err := w.store.makeRoom(w)
	if err != nil {
		w.store.log.Warn("cannot make room for a build's output", "error", err)
	}
	w.events.mu.Lock()
	w.events.limit = limit
	w.events.mu.Unlock()
	now := w.store.now()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.build.State, w.build.QueuePosition, w.build.StartedAt = agentv1.BuildState_BUILD_STATE_RUNNING, 0, timestamppb.New(now)
	return w.retryFull(func() error {
		_, err := w.events.append(statusEvent(agentv1.BuildState_BUILD_STATE_RUNNING, ""), vital, now, false)
		return err
	})
}

// Append stores an event of a build that runs: a step, output, a warning or
// progress. It sets the event's offset and time. Beyond the log's limit output is
// dropped, which is no error.
func (w *Writer) Append(ev *agentv1.Event) error {
	var class weight
	switch ev.GetKind().(type) {
	case *agentv1.Event_Log, *agentv1.Event_Progress, *agentv1.Event_Warning:
		class = output
	case *agentv1.Event_Step:
		class = structure
	default:
		return fmt.Errorf("append event: %T is not of a build that runs", ev.GetKind())
	}
	_, err := w.events.append(ev, class, w.store.now(), false)
	return err
}

// Finish ends the build with a result. When it returns nil the result is on disk,
// and nothing can be written any more. After an error it may be called again; the
// first result that was written is the one that counts.
func (w *Writer) Finish(result *agentv1.BuildResult) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stored {
		return fmt.Errorf("finish build %s: it has ended", w.key.ID)
	}
	if w.build.GetResult() == nil {
		result = fitResult(result)
		now := w.store.now()
		ev := &agentv1.Event{Kind: &agentv1.Event_Result{Result: result}}
		err := w.retryFull(func() error {
			_, err := w.events.append(ev, vital, now, true)
			return err
		})
		if err != nil {
			return err
		}
		w.end(result, now)
	}
	err := w.retryFull(func() error { return w.store.ended(w) })
	w.stored = err == nil
	return err
}

// end makes the build one that has ended. The caller holds mu.
func (w *Writer) end(result *agentv1.BuildResult, now time.Time) {
	w.build.State, w.build.QueuePosition, w.build.Result = result.GetState(), 0, result
	w.build.EndedAt = timestamppb.New(now)
	w.build.Events = w.events.extent().events
}

// retryFull runs write, and once more with the reserve given up when the disk is
// full.
func (w *Writer) retryFull(write func() error) error {
	err := write()
	if isFull(err) && w.store.releaseReserve() {
		err = write()
	}
	return err
}

// fitResult returns result in a form that can be stored, whatever is in it: text
// that is no UTF-8 and lists that are too long do not take a build's end from it.
func fitResult(result *agentv1.BuildResult) *agentv1.BuildResult {
	const margin, long = 1 << 10, 4 << 10
	if storable(result, MaxEventBytes-margin) {
		return result
	}
	result = proto.CloneOf(result)
	result.Steps = nil
	if storable(result, MaxEventBytes-margin) {
		return result
	}
	f := result.GetFailure()
	return &agentv1.BuildResult{State: result.GetState(), ImageDigest: shorten(result.GetImageDigest(), long), Failure: &agentv1.Failure{
		Reason: f.GetReason(), ExitCode: f.GetExitCode(), Message: shorten(f.GetMessage(), long),
	}}
}

func storable(m proto.Message, most int) bool {
	_, err := proto.Marshal(m)
	return err == nil && proto.Size(m) <= most
}

func shorten(s string, most int) string {
	return strings.ToValidUTF8(s[:min(len(s), most)], "\uFFFD")
}

func statusEvent(state agentv1.BuildState, message string) *agentv1.Event {
	return &agentv1.Event{Kind: &agentv1.Event_Status{Status: &agentv1.StatusEvent{State: state, Message: message}}}
}

func queuedEvent(position int32, message string) *agentv1.Event {
	ev := statusEvent(agentv1.BuildState_BUILD_STATE_QUEUED, message)
	ev.GetStatus().QueuePosition = position
	return ev
}
