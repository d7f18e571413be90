package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"

	"github.com/kiln-build/kiln/agent/failure"
	"github.com/kiln-build/kiln/agent/queue"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// runner takes a build to its end. Everything that a build goes through is one,
// around the next: measured, traced, guarded, queued, limited, solver.
type runner interface {
	// Run returns how the build ended; it never returns nil. When ctx ends first, its
	// cause says how.
	Run(ctx context.Context, j *job) *agentv1.BuildResult
}

// guarded makes a panic the end of one build.
type guarded struct {
	next runner
	log  *slog.Logger
}

func (g *guarded) Run(ctx context.Context, j *job) (result *agentv1.BuildResult) {
	defer func() {
		if r := recover(); r != nil {
			g.log.Error("a build made the agent panic", "tenant", j.key.Tenant, "build", j.key.ID, "panic", r, "stack", string(debug.Stack()))
			result = failed(&agentv1.Failure{
				Reason:  agentv1.FailureReason_FAILURE_REASON_INTERNAL,
				Message: "The agent has a fault, which its log describes. Please report it.",
			})
		}
	}()
	return g.next.Run(ctx, j)
}

// queued waits until the build may run.
type queued struct {
	next runner
	log  *slog.Logger
	// closing ends the wait of builds when the agent ends.
	closing <-chan struct{}
}

func (q *queued) Run(ctx context.Context, j *job) *agentv1.BuildResult {
	select {
	case <-j.ticket.Admitted():
	case <-ctx.Done():
	case <-q.closing:
		j.cancel(&failure.Interrupted{Waiting: true})
	}
	if result := ended(ctx); result != nil {
		return result
	}
	if err := j.ticket.Err(); err != nil {
		reason := agentv1.FailureReason_FAILURE_REASON_INTERNAL
		if disk := new(queue.DiskError); errors.As(err, &disk) {
			reason = agentv1.FailureReason_FAILURE_REASON_DISK_FULL
		}
		return failed(&agentv1.Failure{Reason: reason, Message: failure.Text(err.Error())})
	}
	if err := j.writer.Load().Start(); err != nil {
		// The build can run all the same; whether its result can be stored is seen
		// then.
		q.log.Warn("cannot store that a build runs", "tenant", j.key.Tenant, "build", j.key.ID, "error", err)
	}
	return q.next.Run(ctx, j)
}

// limited ends a build that runs too long.
type limited struct{ next runner }

func (l *limited) Run(ctx context.Context, j *job) *agentv1.BuildResult {
	limit := j.spec.GetTimeout().AsDuration()
	if limit <= 0 {
		limit = DefaultTimeout
	}
	ctx, cancel := failure.WithLimit(ctx, limit, &failure.TimedOut{Limit: limit})
	defer cancel()
	return l.next.Run(ctx, j)
}

// internal is a failure of the node or of kiln.
func internal(format string, args ...any) *agentv1.BuildResult {
	return failed(&agentv1.Failure{
		Reason: agentv1.FailureReason_FAILURE_REASON_INTERNAL, Message: failure.Text(fmt.Sprintf(format, args...)),
	})
}
