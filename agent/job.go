package agent

import (
	"context"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/kiln-build/kiln/agent/failure"
	"github.com/kiln-build/kiln/agent/queue"
	"github.com/kiln-build/kiln/agent/record"
	"github.com/kiln-build/kiln/agent/upload"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// job is a build that has not ended, with what it holds.
type job struct {
	key     record.Key
	spec    *agentv1.BuildSpec // with the tenant's defaults
	creds   *agentv1.Credentials
	archive *upload.Hold // nil without an uploaded source
	ticket  *queue.Ticket
	writer  atomic.Pointer[record.Writer] // nil until the build is on disk
	session Session                       // nil until the build has an engine

	ctx    context.Context
	cancel context.CancelCauseFunc
	// caller is the span of the StartBuild call.
	caller trace.SpanContext
}

func newJob(a *Agent, ctx context.Context, key record.Key, spec *agentv1.BuildSpec, creds *agentv1.Credentials) *job {
	j := &job{key: key, spec: spec, creds: creds, caller: trace.SpanContextFromContext(ctx)}
	j.ctx, j.cancel = context.WithCancelCause(a.base)
	return j
}

// moved stores a new place in the queue.
func (j *job) moved(position int, message string) {
	if w := j.writer.Load(); w != nil {
		// Without it a watcher sees an old place: the build goes on.
		_ = w.Queued(int32(position), message)
	}
}

// abandon gives back what a job holds that never became a build.
func (j *job) abandon() {
	if j.ticket != nil {
		j.ticket.Release()
	}
	if j.archive != nil {
		j.archive.Return()
	}
	j.cancel(nil)
}

const (
	// firstRetry and lastRetry bound how long to wait before a result that could not
	// be stored is stored again.
	firstRetry = 100 * time.Millisecond
	lastRetry  = 10 * time.Second
	// learnTime bounds what is done for later builds when a build has ended.
	learnTime = time.Minute
)

// run takes a build from the queue to its end.
func (a *Agent) run(j *job) {
	defer j.cancel(nil)
	result := a.runner.Run(j.ctx, j)
	j.creds = nil
	j.ticket.Release()
	if j.archive != nil {
		j.archive.Done()
	}
	if !a.store(j, result) {
		a.cfg.Logger.Error("the result of a build is not stored; it will end as interrupted", "tenant", j.key.Tenant, "build", j.key.ID)
	}
	a.mu.Lock()
	delete(a.jobs, j.key)
	a.mu.Unlock()
	if j.session == nil {
		return
	}
	if result.GetState() == agentv1.BuildState_BUILD_STATE_SUCCEEDED && j.spec.GetCacheScope() != "" {
		a.learn(j)
	}
	if err := j.session.Close(); err != nil {
		a.cfg.Logger.Error("cannot close a session with the engine", "tenant", j.key.Tenant, "error", err)
	}
}

// store stores a result, and tries again until the agent is to end at once.
func (a *Agent) store(j *job, result *agentv1.BuildResult) bool {
	w := j.writer.Load()
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := w.Finish(result)
		if err == nil {
			return true
		}
		a.cfg.Logger.Error("cannot store the result of a build", "tenant", j.key.Tenant, "build", j.key.ID, "error", err)
		select {
		case <-time.After(wait):
		case <-a.base.Done():
			return w.Finish(result) == nil
		}
	}
}

// learn remembers what a build that ended well used of the cache.
func (a *Agent) learn(j *job) {
	ctx, cancel := context.WithTimeout(a.base, learnTime)
	defer cancel()
	known := record.Scope{LastBuilt: a.cfg.Now()}
	began := j.writer.Load().Build().GetStartedAt().AsTime()
	usage, err := j.session.DiskUsage(ctx)
	for _, u := range usage {
		if !u.CreatedAt.Before(began) || u.LastUsedAt != nil && !u.LastUsedAt.Before(began) {
			known.CacheBytes += u.Size
		}
	}
	if err == nil {
		err = a.records.SetScope(j.key.Tenant, j.spec.GetCacheScope(), known)
	}
	if err != nil && ctx.Err() == nil {
		a.cfg.Logger.Warn("cannot remember what a build used of the cache", "tenant", j.key.Tenant, "error", err)
	}
}

// failed is the result of a build that ended with a failure.
func failed(f *agentv1.Failure) *agentv1.BuildResult {
	return &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_FAILED, Failure: f}
}

// ended is the result of a build whose context ended, or nil when that did not.
func ended(ctx context.Context) *agentv1.BuildResult {
	state, f, ok := failure.ByCause(ctx)
	if !ok {
		return nil
	}
	return &agentv1.BuildResult{State: state, Failure: f}
}
