package build

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/admission"
	"github.com/kiln-build/kiln/controller/agents"
	"github.com/kiln-build/kiln/controller/inputs"
	"github.com/kiln-build/kiln/controller/placement"
	"github.com/kiln-build/kiln/controller/translate"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// order is what an agent is asked to build.
type order struct {
	spec        *agentv1.BuildSpec
	credentials *agentv1.Credentials
	class       string
}

// BuildID is the name that a Build has on an agent after a number of retries.
func BuildID(b *v1alpha1.Build, retries int32) string {
	if retries == 0 {
		return string(b.UID)
	}
	return fmt.Sprintf("%s-%d", b.UID, retries)
}

// assign chooses a node, records it, and starts the build there.
func (x *run) assign() error {
	o, err := x.order()
	if o == nil || err != nil {
		return err
	}
	b := x.build
	node, settled, err := x.Chooser.Choose(x.ctx, placement.Question{
		ID: BuildID(b, b.Status.Retries), Tenant: b.Namespace, Spec: probeSpec(o.spec), NodeSelector: b.Spec.NodeSelector, Tolerations: b.Spec.Tolerations,
	})
	var none *placement.Unplaceable
	switch {
	case errors.As(err, &none):
		x.unplaceable(none)
		return nil
	case err != nil:
		return fmt.Errorf("choose node: %w", err)
	}
	defer settled()
	if err := x.ensureFinalizer(); err != nil {
		return err
	}
	b = x.build
	now := metav1.NewTime(x.Now())
	b.Status.Node, b.Status.BuildID, b.Status.Sandbox, b.Status.ScheduledTime = node, BuildID(b, b.Status.Retries), o.class, &now
	x.goOn(v1alpha1.PhaseScheduled, v1alpha1.ReasonScheduled, fmt.Sprintf("Node %s was chosen.", node))
	if err := x.save(); err != nil {
		return err
	}
	x.Events.Eventf(x.build, nil, corev1.EventTypeNormal, v1alpha1.ReasonScheduled, "Schedule", "Node %s was chosen for the build.", node)
	return x.start(o)
}

// probeSpec is a spec as an agent is asked whether it could run it: an upload arrives only
// once the node is chosen.
func probeSpec(s *agentv1.BuildSpec) *agentv1.BuildSpec {
	if s.GetSource().GetUpload() == nil {
		return s
	}
	return &agentv1.BuildSpec{
		Source:   &agentv1.Source{Images: s.Source.Images, NamedContexts: s.Source.NamedContexts, ContextDir: s.Source.ContextDir},
		Strategy: s.Strategy, Secrets: s.Secrets, Sandbox: s.Sandbox, Network: s.Network, Resources: s.Resources, Timeout: s.Timeout,
		Outputs: s.Outputs, CacheFrom: s.CacheFrom, CacheTo: s.CacheTo, Platforms: s.Platforms, Labels: s.Labels, CacheScope: s.CacheScope,
		Attestations: s.Attestations, NoCache: s.NoCache, Pull: s.Pull, SourceDateEpoch: s.SourceDateEpoch,
	}
}

func (x *run) unplaceable(none *placement.Unplaceable) {
	switch st := none.Refused; {
	case st == nil:
		x.goOn(v1alpha1.PhasePending, v1alpha1.ReasonNoNode, truncate(none.Error(), 2048))
		x.requeue = x.Timing.Retry
	case st.Code() == codes.PermissionDenied:
		x.fail(&v1alpha1.FailureDetails{Reason: v1alpha1.ReasonDenied, Message: st.Message()})
	default:
		x.fail(&v1alpha1.FailureDetails{Reason: v1alpha1.ReasonInvalidInput, Message: st.Message()})
	}
}

// order reads what the Build names and asks policy. Without an order and an error the Build
// waits or has ended.
func (x *run) order() (*order, error) {
	o, err := x.makeOrder()
	var missing *inputs.Missing
	var invalid *inputs.Invalid
	var refused admission.Refusals
	switch {
	case err == nil:
		return o, nil
	case errors.As(err, &missing):
		left := x.Timing.MissingInput - x.Now().Sub(x.build.CreationTimestamp.Time)
		if left <= 0 {
			x.fail(&v1alpha1.FailureDetails{Reason: v1alpha1.ReasonMissingInput, Message: missing.Error()})
			return nil, nil
		}
		// With a node it stays there: the agent may have the build from an earlier attempt.
		x.goOn(x.build.Status.Phase, v1alpha1.ReasonWaitingForInput, fmt.Sprintf("%s; the build fails unless it is made within %s of the build's creation.", missing.Error(), x.Timing.MissingInput))
		x.requeue = min(left, time.Second)
		return nil, nil
	case errors.As(err, &invalid):
		x.fail(&v1alpha1.FailureDetails{Reason: v1alpha1.ReasonInvalidInput, Message: invalid.Error()})
		return nil, nil
	case errors.As(err, &refused):
		x.fail(&v1alpha1.FailureDetails{Reason: v1alpha1.ReasonDenied, Message: refused.Error()})
		return nil, nil
	}
	return nil, err
}

func (x *run) makeOrder() (*order, error) {
	b := x.build
	if err := translate.Validate(b); err != nil {
		return nil, err
	}
	var req policy.Request
	req, err := x.Evaluator.Evaluate(x.ctx, b)
	if err != nil {
		return nil, err
	}
	in, err := inputs.Resolve(x.ctx, x.Live, b)
	if err != nil {
		return nil, err
	}
	spec, err := translate.Spec(b, in, req)
	if err != nil {
		return nil, err
	}
	return &order{spec: spec, credentials: in.Credentials, class: req.Class}, nil
}

// start asks the agent of the assigned node to build. Without an order, it is another
// controller's or an earlier attempt that is repeated.
func (x *run) start(o *order) error {
	if o == nil {
		var err error
		if o, err = x.order(); o == nil || err != nil {
			return err
		}
	}
	if same, err := x.freshen(); !same || err != nil {
		return err
	}
	api, err := x.Agents.Client(x.ctx, x.build.Status.Node)
	if err != nil {
		if errors.Is(err, agents.ErrNoAgent) {
			x.unreachable(x.Now(), err.Error())
			return nil
		}
		return err
	}
	ctx, cancel := context.WithTimeout(x.ctx, x.Timing.Call)
	defer cancel()
	res, err := api.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: x.build.Status.BuildID, Tenant: x.build.Namespace, Spec: o.spec, Credentials: o.credentials})
	if err == nil {
		x.accepted(res.GetBuild())
		return nil
	}
	return x.startRefused(status.Convert(err))
}

// accepted records that the agent has the build, and follows it.
func (x *run) accepted(b *agentv1.Build) {
	x.build.Status.UnreachableSince = nil
	x.Follower.Follow(x.key, x.target())
	x.build.Status.QueuePosition = b.GetQueuePosition()
	if b.GetState() == agentv1.BuildState_BUILD_STATE_QUEUED {
		x.goOn(v1alpha1.PhaseQueued, v1alpha1.ReasonQueued, queuedMessage(x.build.Status.Node, b.GetQueuePosition()))
		return
	}
	x.build.Status.StartTime = translate.Time(b.GetStartedAt())
	x.goOn(v1alpha1.PhaseRunning, v1alpha1.ReasonRunning, fmt.Sprintf("The build runs on node %s.", x.build.Status.Node))
}

// startRefused decides what a refusal of StartBuild means.
func (x *run) startRefused(st *status.Status) error {
	switch st.Code() {
	case codes.AlreadyExists:
		// Ours from before, with inputs that have changed since: its ID is the Build's own.
		x.Follower.Follow(x.key, x.target())
		x.goOn(v1alpha1.PhaseQueued, v1alpha1.ReasonQueued, queuedMessage(x.build.Status.Node, 0))
	case codes.InvalidArgument:
		x.fail(&v1alpha1.FailureDetails{Reason: v1alpha1.ReasonInvalidInput, Message: st.Message()})
	case codes.PermissionDenied:
		x.fail(&v1alpha1.FailureDetails{Reason: v1alpha1.ReasonDenied, Message: st.Message()})
	case codes.FailedPrecondition:
		if s := x.build.Spec.Source; s != nil && s.Upload != nil && reasonOf(st) == noUpload {
			x.goOn(v1alpha1.PhaseScheduled, v1alpha1.ReasonAwaitingUpload, fmt.Sprintf("Node %s waits for the source %s; send it to the upload subresource of this build.", x.build.Status.Node, s.Upload.Digest))
			x.build.Status.UnreachableSince = nil
			x.requeue = 5 * time.Second
			return nil
		}
		x.unassign(st.Message())
	case codes.ResourceExhausted:
		x.unassign(st.Message())
	default:
		// Whether the agent has the build is unknown: only it can be asked again.
		x.unreachable(x.Now(), st.Code().String()+": "+st.Message())
	}
	return nil
}

// noUpload is the agent's reason when an upload is not there.
const noUpload = "NO_UPLOAD"

// reasonOf returns the reason in a status's details; empty when there is none.
func reasonOf(st *status.Status) string {
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// unassign gives up the node, which has refused the build and so does not have it.
func (x *run) unassign(why string) {
	s := &x.build.Status
	node := s.Node
	s.Node, s.BuildID, s.Sandbox, s.ScheduledTime, s.UnreachableSince = "", "", "", nil, nil
	x.goOn(v1alpha1.PhasePending, v1alpha1.ReasonNoNode, truncate(fmt.Sprintf("%s: %s", node, why), 2048))
	x.requeue = x.Timing.Retry
}
