package failure

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Cancelled is the cause of a context whose build a user has cancelled.
type Cancelled struct {
	// Reason is what the user said; may be empty.
	Reason string
}

func (e *Cancelled) Error() string {
	if e.Reason == "" {
		return "The build was cancelled."
	}
	return "The build was cancelled: " + e.Reason
}

// TimedOut is the cause of a context whose build ran too long.
type TimedOut struct {
	// Limit is how long it might run.
	Limit time.Duration
}

func (e *TimedOut) Error() string {
	return fmt.Sprintf("The build did not end within its timeout of %s.", e.Limit)
}

// WithLimit returns a context that is cancelled with a cause after the limit, or by the
// function. It has no deadline: that would go along with calls to the engine, whose end
// of a call might be the first to see it pass, and say no more than that.
func WithLimit(ctx context.Context, limit time.Duration, cause error) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(limit, func() { cancel(cause) })
	return ctx, func() {
		timer.Stop()
		cancel(nil)
	}
}

// Interrupted is the cause of a context whose agent ends.
type Interrupted struct {
	// Waiting says that the build had not started.
	Waiting bool
}

func (e *Interrupted) Error() string {
	if e.Waiting {
		return "The agent ended while the build waited in the queue: it never started. Start it again under a new ID."
	}
	return "The agent ended before the build did. Steps that had ended are in the cache: start the build again under a new ID."
}

// ByCause returns how a build ended whose context was done, and false when the
// context's cause is none of this package's.
func ByCause(ctx context.Context) (agentv1.BuildState, *agentv1.Failure, bool) {
	var cancelled *Cancelled
	var timedOut *TimedOut
	var interrupted *Interrupted
	cause := context.Cause(ctx)
	switch {
	case errors.As(cause, &cancelled):
		return agentv1.BuildState_BUILD_STATE_CANCELLED, &agentv1.Failure{
			Reason: agentv1.FailureReason_FAILURE_REASON_CANCELLED, Message: Text(cancelled.Error()),
		}, true
	case errors.As(cause, &timedOut):
		return agentv1.BuildState_BUILD_STATE_FAILED, &agentv1.Failure{
			Reason: agentv1.FailureReason_FAILURE_REASON_TIMEOUT, Message: timedOut.Error(),
		}, true
	case errors.As(cause, &interrupted):
		return agentv1.BuildState_BUILD_STATE_INTERRUPTED, &agentv1.Failure{
			Reason: agentv1.FailureReason_FAILURE_REASON_INTERRUPTED, Message: interrupted.Error(),
		}, true
	}
	return 0, nil, false
}
