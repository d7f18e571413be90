package build

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/agents"
	"github.com/kiln-build/kiln/controller/follow"
	"github.com/kiln-build/kiln/controller/translate"
)

// observe takes what the agent has told into the status.
func (x *run) observe() error {
	x.Follower.Follow(x.key, x.target())
	p, ok := x.Follower.Progress(x.key, x.target())
	if !ok {
		return errors.New("follow build: the controller is stopping")
	}
	x.take(&p)
	switch {
	case p.Result != nil:
		x.finish(&p)
	case p.Unknown:
		x.lost(fmt.Sprintf("The agent of node %s no longer knows the build.", x.build.Status.Node))
	case !p.Unreachable.IsZero():
		x.unreachable(p.Unreachable, "its event stream is broken")
	default:
		x.build.Status.UnreachableSince = nil
	}
	return nil
}

// take copies progress into the status.
func (x *run) take(p *follow.Progress) {
	s := &x.build.Status
	if len(p.Steps) > 0 {
		s.Steps = make([]v1alpha1.StepStatus, 0, len(p.Steps))
		for _, st := range p.Steps {
			s.Steps = append(s.Steps, translate.Step(st))
		}
		s.StepCount = int32(p.StepCount)
	}
	if !p.Started.IsZero() {
		s.StartTime = &metav1.Time{Time: p.Started}
	}
	s.QueuePosition = p.QueuePosition
	switch p.State {
	case agentv1.BuildState_BUILD_STATE_QUEUED:
		x.goOn(v1alpha1.PhaseQueued, v1alpha1.ReasonQueued, queuedMessage(s.Node, p.QueuePosition))
	case agentv1.BuildState_BUILD_STATE_RUNNING:
		s.QueuePosition = 0
		x.goOn(v1alpha1.PhaseRunning, v1alpha1.ReasonRunning, fmt.Sprintf("The build runs on node %s.", s.Node))
	}
}

func queuedMessage(node string, position int32) string {
	if position > 0 {
		return fmt.Sprintf("The build waits on node %s in place %d.", node, position)
	}
	return fmt.Sprintf("The build waits on node %s.", node)
}

// finish takes the result.
func (x *run) finish(p *follow.Progress) {
	r := p.Result
	if r.GetState() == agentv1.BuildState_BUILD_STATE_INTERRUPTED {
		x.lost(fmt.Sprintf("The agent of node %s ended in the middle of the build.", x.build.Status.Node))
		return
	}
	s := &x.build.Status
	if len(r.GetSteps()) > len(s.Steps) {
		s.Steps = nil
		for _, st := range r.Steps[:min(len(r.Steps), v1alpha1.MaxStatusSteps)] {
			s.Steps = append(s.Steps, translate.Step(st))
		}
	}
	s.StepCount = max(s.StepCount, int32(len(r.GetSteps())))
	s.Output = translate.Output(x.build.Spec.Output, r)
	if rev := r.GetSourceRevision(); rev != "" {
		s.Source = &v1alpha1.SourceStatus{Git: &v1alpha1.GitStatus{Revision: translate.Text(rev, 256)}}
	}
	at := p.ResultTime
	if at.Unix() <= 0 {
		at = x.Now()
	}
	switch r.GetState() {
	case agentv1.BuildState_BUILD_STATE_SUCCEEDED:
		x.succeeded(at)
	case agentv1.BuildState_BUILD_STATE_CANCELLED:
		x.cancelledAt(at, "The build was cancelled.")
	default:
		x.failAt(at, translate.Failure(r.GetFailure()))
	}
}

// unreachable decides what the silence of an agent means.
func (x *run) unreachable(since time.Time, why string) {
	s := &x.build.Status
	if now := x.Now().Round(0); s.UnreachableSince == nil || s.UnreachableSince.After(now) { // the clock went back
		if since = since.Round(0); since.After(now) {
			since = now
		}
		s.UnreachableSince = &metav1.Time{Time: since}
	}
	silent := x.Now().Sub(s.UnreachableSince.Time)
	if silent < x.Timing.NodeLoss {
		x.goOn(s.Phase, v1alpha1.ReasonNodeUnreachable, truncate(fmt.Sprintf("The agent of node %s does not answer since %s: %s.", s.Node, s.UnreachableSince.UTC().Format(time.RFC3339), why), 1024))
		x.requeue = min(time.Second, x.Timing.NodeLoss-silent)
		return
	}
	x.lost(fmt.Sprintf("The agent of node %s has not answered for %s.", s.Node, x.Timing.NodeLoss))
}

// lost ends the Build, or has it started once more.
func (x *run) lost(message string) {
	x.Follower.Forget(x.key)
	s := &x.build.Status
	if x.build.Spec.OnNodeLoss != v1alpha1.RetryOnNodeLoss || s.Retries > 0 {
		x.fail(&v1alpha1.FailureDetails{Reason: v1alpha1.ReasonNodeLost, Message: message})
		return
	}
	*s = v1alpha1.BuildStatus{ObservedGeneration: s.ObservedGeneration, Conditions: s.Conditions, Retries: s.Retries + 1}
	x.goOn(v1alpha1.PhasePending, v1alpha1.ReasonPending, message+" It is started again.")
	x.requeue = 100 * time.Millisecond
}

// cancel asks the agent to end the build, and waits for its word.
func (x *run) cancel() error {
	if x.build.Status.Phase != v1alpha1.PhaseScheduled {
		if err := x.observe(); err != nil || x.build.Ended() || x.build.Status.BuildID == "" {
			return err
		}
	}
	code, err := x.tellCancel("cancelled by the user")
	switch {
	case err != nil:
		return err
	case code == codes.NotFound:
		x.cancelled("Cancelled before the build was started.")
	case code == codes.OK:
		x.Follower.Follow(x.key, x.target())
		phase := x.build.Status.Phase
		if phase == v1alpha1.PhaseScheduled {
			phase = v1alpha1.PhaseQueued
		}
		x.goOn(phase, v1alpha1.ReasonCancelling, fmt.Sprintf("The agent of node %s was asked to end the build.", x.build.Status.Node))
		x.requeue = 5 * time.Second
	case x.build.Status.Phase == v1alpha1.PhaseScheduled:
		x.unreachable(x.Now(), "it does not take the cancellation")
	default:
		x.requeue = time.Second
	}
	return nil
}

// tellCancel calls CancelBuild. The code is UNAVAILABLE when the agent cannot be reached.
func (x *run) tellCancel(reason string) (codes.Code, error) {
	api, err := x.Agents.Client(x.ctx, x.build.Status.Node)
	if errors.Is(err, agents.ErrNoAgent) {
		return codes.Unavailable, nil
	}
	if err != nil {
		return codes.Unknown, err
	}
	ctx, cancel := context.WithTimeout(x.ctx, x.Timing.Call)
	defer cancel()
	_, err = api.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: x.build.Status.BuildID, Tenant: x.build.Namespace, Reason: reason})
	return status.Code(err), nil
}

// remove lets a deleted Build go once its agent was told, or cannot be: what runs on then
// is ended by the sweep when the agent is back.
func (x *run) remove() error {
	x.Follower.Forget(x.key)
	if x.build.Status.BuildID != "" {
		code, err := x.tellCancel("the Build was deleted")
		if err != nil {
			return err
		}
		gone := code == codes.OK || code == codes.NotFound || x.Now().Sub(x.build.DeletionTimestamp.Time) > x.Timing.NodeLoss
		if !gone {
			x.requeue = time.Second
			return nil
		}
	}
	return x.releaseFinalizer()
}

// retain deletes the Build when its retention says so.
func (x *run) retain() error {
	r, s := x.build.Spec.Retention, &x.build.Status
	if r == nil || s.CompletionTime == nil || x.build.DeletionTimestamp != nil {
		return nil
	}
	ttl := r.TTLAfterFailed
	if s.Phase == v1alpha1.PhaseSucceeded {
		ttl = r.TTLAfterSucceeded
	}
	if ttl == nil {
		return nil
	}
	if left := s.CompletionTime.Add(ttl.Duration).Sub(x.Now()); left > 0 {
		x.requeue = left
		return nil
	}
	return x.delete()
}
