package agent

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/record"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

type endsAtOnce struct{}

func (endsAtOnce) Run(context.Context, *job) *agentv1.BuildResult {
	return &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_SUCCEEDED}
}

// TestTimesAreNotNegative has the clock go back between the moments of a build.
func TestTimesAreNotNegative(t *testing.T) {
	now := time.Now()
	clock := func() time.Time {
		now = now.Add(-time.Hour)
		return now
	}
	records, err := record.Open(t.TempDir(), record.Options{Now: clock})
	require.NoError(t, err)
	defer func() { require.NoError(t, records.Close()) }()
	w, err := records.Create(&agentv1.Build{Tenant: "a", BuildId: "one"})
	require.NoError(t, err)
	require.NoError(t, w.Start())
	j := &job{key: record.Key{Tenant: "a", ID: "one"}, spec: &agentv1.BuildSpec{}}
	j.writer.Store(w)
	registry := prometheus.NewRegistry()
	(&measured{next: endsAtOnce{}, metrics: NewMetrics(registry), now: clock}).Run(t.Context(), j)
	families, err := registry.Gather()
	require.NoError(t, err)
	samples := uint64(0)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			samples += m.GetHistogram().GetSampleCount()
			require.GreaterOrEqual(t, m.GetHistogram().GetSampleSum(), 0.0, f.GetName())
		}
	}
	require.EqualValues(t, 2, samples)
}
