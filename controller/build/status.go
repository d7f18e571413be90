package build

import (
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

func (x *run) condition() *metav1.Condition {
	if c := meta.FindStatusCondition(x.build.Status.Conditions, v1alpha1.ConditionSucceeded); c != nil {
		return c
	}
	return &metav1.Condition{}
}

func (x *run) setCondition(status metav1.ConditionStatus, reason, message string) {
	meta.SetStatusCondition(&x.build.Status.Conditions, metav1.Condition{
		Type: v1alpha1.ConditionSucceeded, Status: status, Reason: reason, Message: truncate(message, 8192), ObservedGeneration: x.build.Generation,
	})
}

// goOn says what the Build waits for or does.
func (x *run) goOn(phase v1alpha1.Phase, reason, message string) {
	x.build.Status.Phase = phase
	x.setCondition(metav1.ConditionUnknown, reason, message)
}

func (x *run) succeeded(at time.Time) {
	message := "The build succeeded."
	if o := x.build.Status.Output; o != nil {
		message = fmt.Sprintf("The image %s has the digest %s.", o.Image, o.Digest)
	}
	x.end(at, v1alpha1.PhaseSucceeded, metav1.ConditionTrue, v1alpha1.ReasonSucceeded, message)
}

func (x *run) cancelled(message string) { x.cancelledAt(x.Now(), message) }

func (x *run) cancelledAt(at time.Time, message string) {
	x.end(at, v1alpha1.PhaseCancelled, metav1.ConditionFalse, v1alpha1.ReasonCancelled, message)
}

func (x *run) fail(d *v1alpha1.FailureDetails) { x.failAt(x.Now(), d) }

func (x *run) failAt(at time.Time, d *v1alpha1.FailureDetails) {
	x.build.Status.FailureDetails = d
	x.end(at, v1alpha1.PhaseFailed, metav1.ConditionFalse, d.Reason, d.Message)
}

func (x *run) end(at time.Time, phase v1alpha1.Phase, status metav1.ConditionStatus, reason, message string) {
	s := &x.build.Status
	s.Phase, s.QueuePosition, s.UnreachableSince = phase, 0, nil
	s.CompletionTime = &metav1.Time{Time: at}
	if s.StartTime != nil {
		s.Duration = max(0, at.Sub(s.StartTime.Time)).Round(100 * time.Millisecond).String()
	}
	x.setCondition(status, reason, message)
}

func (x *run) delete() error {
	uid := types.UID(x.build.UID)
	err := x.Client.Delete(x.ctx, x.build, client.Preconditions{UID: &uid}, client.PropagationPolicy(metav1.DeletePropagationBackground))
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete Build after its retention: %w", err)
	}
	return nil
}

// truncate returns at most most bytes of s, cut where a character ends.
func truncate(s string, most int) string {
	if len(s) <= most {
		return s
	}
	cut := most - len("…")
	for cut > 0 && s[cut]&0xc0 == 0x80 {
		cut--
	}
	return s[:cut] + "…"
}
