// Package build carries Builds from their creation to their end.
//
// A Build goes through these states, each recorded in its status:
//
//	unassigned → assigned (node and build ID are in the status)
//	           → accepted (the agent has confirmed: Queued, Running)
//	           → ended (condition Succeeded is True or False)
//
// It promises that the node and the build's name on it are in the status before the
// agent is asked, so that whichever controller comes next asks the same agent for the same
// build; that a Build is started again only when its agent is known not to have it, or its
// node is lost and its policy says so; that it ends once; and that nothing runs on for a
// Build that was deleted. The status is written under the version that was read: a
// controller that acts on what is past fails to write and reads again.
package build

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/admission"
	"github.com/kiln-build/kiln/controller/follow"
	"github.com/kiln-build/kiln/controller/placement"
)

// Finalizer keeps a Build until its agent was told to end it.
const Finalizer = "kiln.build/agent"

// UploadedAnnotation is set by the upload subresource when the source has arrived, so that
// the agent is asked again at once.
const UploadedAnnotation = "kiln.build/uploaded"

// Agents connects to the agents of nodes.
type Agents interface {
	// Client returns the API of a node's agent; agents.ErrNoAgent is wrapped when there is none.
	Client(ctx context.Context, node string) (agentv1.BuildServiceClient, error)
}

// Timing says how long the reconciler waits for what.
type Timing struct {
	// MissingInput is how long after its creation a Build waits for what it names.
	MissingInput time.Duration
	// NodeLoss is how long an agent may be silent before its builds are lost.
	NodeLoss time.Duration
	// Retry is how long to wait before a node is looked for again.
	Retry time.Duration
	// Call bounds one call to an agent.
	Call time.Duration
}

// Reconciler carries Builds to their end. Its fields are set before it is used.
type Reconciler struct {
	// Client writes, and reads Builds from a cache.
	Client client.Client
	// Live reads Secrets, ConfigMaps, ServiceAccounts and Builds from the API server itself.
	Live client.Reader
	// Evaluator asks policy.
	Evaluator *admission.Evaluator
	// Chooser chooses nodes.
	Chooser *placement.Chooser
	// Agents of the cluster.
	Agents Agents
	// Follower follows builds that run.
	Follower *follow.Follower
	// Events tells users what happens.
	Events events.EventRecorder
	// Timing says how long to wait.
	Timing Timing
	// Metrics counts.
	Metrics *Metrics
	// Log takes what no status shows.
	Log *slog.Logger
	// Now tells the time.
	Now func() time.Time
}

// run is one reconciliation of one Build.
type run struct {
	*Reconciler
	ctx    context.Context
	key    types.NamespacedName
	before *v1alpha1.Build
	build  *v1alpha1.Build
	// live is set when build was just read from or written to the API server.
	live bool
	// requeue asks for another reconciliation after this time; 0: none.
	requeue time.Duration
}

// Reconcile brings one Build a step further.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (res ctrl.Result, err error) {
	b := &v1alpha1.Build{}
	if err := r.Client.Get(ctx, req.NamespacedName, b); err != nil {
		if apierrors.IsNotFound(err) {
			r.Follower.Forget(req.NamespacedName)
			return ctrl.Result{}, nil
		}
		return ctrl.Result{}, fmt.Errorf("read Build: %w", err)
	}
	x := &run{Reconciler: r, ctx: ctx, key: req.NamespacedName, before: b, build: b.DeepCopy()}
	err = x.step()
	if patchErr := x.save(); patchErr != nil {
		if apierrors.IsConflict(patchErr) {
			// The cache was behind; the change that it missed brings the Build here again.
			return ctrl.Result{RequeueAfter: 100 * time.Millisecond}, nil
		}
		if err == nil {
			err = patchErr
		}
	}
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: 100 * time.Millisecond}, nil
	}
	return ctrl.Result{RequeueAfter: x.requeue}, err
}

// step does what comes next for the Build.
func (x *run) step() error {
	b := x.build
	switch {
	case b.Ended():
		x.Follower.Forget(x.key)
		if err := x.releaseFinalizer(); err != nil {
			return err
		}
		return x.retain()
	case b.DeletionTimestamp != nil:
		return x.remove()
	}
	b.Status.ObservedGeneration = b.Generation
	if len(b.Status.Conditions) == 0 {
		x.goOn(v1alpha1.PhasePending, v1alpha1.ReasonPending, "A node is being chosen.")
	}
	cancelled := b.Spec.State == v1alpha1.StateCancelled
	switch {
	case b.Status.BuildID == "" && cancelled:
		x.cancelled("Cancelled before a node was chosen.")
		return nil
	case b.Status.BuildID == "":
		return x.assign()
	case cancelled:
		return x.cancel()
	case b.Status.Phase == v1alpha1.PhaseScheduled:
		return x.start(nil)
	}
	return x.observe()
}

// save writes the status when it differs, and counts and tells ends.
func (x *run) save() error {
	if equality.Semantic.DeepEqual(x.before.Status, x.build.Status) {
		return nil
	}
	patch := client.MergeFromWithOptions(x.before, client.MergeFromWithOptimisticLock{})
	// Patch overwrites what it is given, spec included, with the server's answer.
	out := x.build.DeepCopy()
	if err := x.Client.Status().Patch(x.ctx, out, patch); err != nil {
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("write status: %w", err)
	}
	ended := !x.before.Ended() && out.Ended()
	x.before, x.build, x.live = out.DeepCopy(), out, true
	if ended {
		x.ended()
	}
	return nil
}

// ended tells everybody that the Build has just ended.
func (x *run) ended() {
	c := x.condition()
	x.Metrics.ended(x.build)
	kind, action := corev1.EventTypeNormal, "Succeed"
	if x.build.Status.Phase == v1alpha1.PhaseFailed {
		kind, action = corev1.EventTypeWarning, "Fail"
	}
	x.Events.Eventf(x.build, nil, kind, c.Reason, action, "%s", truncate(c.Message, 900))
}

// ensureFinalizer makes sure that deletion waits for the agent to be told.
func (x *run) ensureFinalizer() error {
	if controllerutil.ContainsFinalizer(x.build, Finalizer) {
		return nil
	}
	return x.patchFinalizer(true)
}

func (x *run) releaseFinalizer() error {
	if !controllerutil.ContainsFinalizer(x.build, Finalizer) {
		return nil
	}
	return client.IgnoreNotFound(x.patchFinalizer(false))
}

// patchFinalizer writes the finalizer and takes in the server's version, keeping the status
// that is being made.
func (x *run) patchFinalizer(present bool) error {
	out := x.before.DeepCopy()
	if present {
		controllerutil.AddFinalizer(out, Finalizer)
	} else {
		controllerutil.RemoveFinalizer(out, Finalizer)
	}
	if err := x.Client.Patch(x.ctx, out, client.MergeFromWithOptions(x.before, client.MergeFromWithOptimisticLock{})); err != nil {
		if apierrors.IsNotFound(err) {
			return err
		}
		return fmt.Errorf("write finalizer: %w", err)
	}
	status := x.build.Status
	x.before, x.build, x.live = out, out.DeepCopy(), true
	x.build.Status = status
	return nil
}

// freshen reads the Build from the API server, unless what we have comes from there. It
// tells whether the Build is still as it was: assigned as we think, and not to be ended.
func (x *run) freshen() (bool, error) {
	if x.live {
		return true, nil
	}
	b := &v1alpha1.Build{}
	if err := x.Live.Get(x.ctx, x.key, b); err != nil {
		return false, client.IgnoreNotFound(err)
	}
	same := b.UID == x.build.UID && b.DeletionTimestamp == nil && !b.Ended() && b.Spec.State == x.build.Spec.State &&
		b.Status.Node == x.build.Status.Node && b.Status.BuildID == x.build.Status.BuildID && b.Status.Phase == x.build.Status.Phase
	if !same {
		x.requeue = 200 * time.Millisecond
	}
	return same, nil
}

// target is the Build on its agent.
func (x *run) target() follow.Target {
	return follow.Target{Node: x.build.Status.Node, BuildID: x.build.Status.BuildID, Tenant: x.build.Namespace}
}
