package build

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// TestClockThatWentBack has statuses with times of the future.
func TestClockThatWentBack(t *testing.T) {
	now := time.Now()
	future := metav1.NewTime(now.Add(365 * 24 * time.Hour))
	b := &v1alpha1.Build{ObjectMeta: metav1.ObjectMeta{CreationTimestamp: future}}
	b.Status.Phase, b.Status.StartTime, b.Status.UnreachableSince = v1alpha1.PhaseRunning, &future, &future
	x := &run{Reconciler: &Reconciler{Now: func() time.Time { return now }, Timing: Timing{NodeLoss: time.Minute}}, build: b}

	x.unreachable(future.Time, "test")
	require.WithinDuration(t, now, b.Status.UnreachableSince.Time, 0, "an agent that is silent is not waited for until then")
	now = now.Add(time.Minute - time.Second)
	x.unreachable(now, "test")
	require.Equal(t, v1alpha1.PhaseRunning, b.Status.Phase)
	require.LessOrEqual(t, x.requeue, time.Second)

	x.end(now, v1alpha1.PhaseFailed, metav1.ConditionFalse, v1alpha1.ReasonNodeLost, "test")
	require.Equal(t, "0s", b.Status.Duration)
	registry := prometheus.NewRegistry()
	b.CreationTimestamp = metav1.NewTime(future.Add(time.Hour))
	NewMetrics(registry, func() int { return 0 }).ended(b)
	families, err := registry.Gather()
	require.NoError(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			require.GreaterOrEqual(t, m.GetHistogram().GetSampleSum(), 0.0, f.GetName())
		}
	}
}
