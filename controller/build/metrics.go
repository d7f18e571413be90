package build

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// Metrics counts what the reconciler does.
type Metrics struct {
	total    *prometheus.CounterVec
	duration *prometheus.HistogramVec
	waiting  prometheus.Histogram
}

// NewMetrics registers the metrics; following tells how many builds are followed.
func NewMetrics(reg prometheus.Registerer, following func() int) *Metrics {
	m := &Metrics{
		total: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kiln_builds_ended_total", Help: "Builds that have ended, by reason and class of sandbox."}, []string{"reason", "sandbox"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "kiln_build_duration_seconds", Help: "Time from a build's start on its node to its end.",
			Buckets: prometheus.ExponentialBuckets(0.5, 2, 14)}, []string{"phase"}),
		waiting: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "kiln_build_wait_seconds", Help: "Time from a build's creation to its start on its node.",
			Buckets: prometheus.ExponentialBuckets(0.05, 2, 16)}),
	}
	reg.MustRegister(m.total, m.duration, m.waiting, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kiln_builds_followed", Help: "Builds that agents run and this controller follows."},
		func() float64 { return float64(following()) }))
	return m
}

func (m *Metrics) ended(b *v1alpha1.Build) {
	s := &b.Status
	reason := v1alpha1.ReasonSucceeded
	if s.Phase != v1alpha1.PhaseSucceeded && len(s.Conditions) > 0 {
		reason = s.Conditions[0].Reason
	}
	m.total.WithLabelValues(reason, s.Sandbox).Inc()
	if s.StartTime != nil {
		// Clocks differ, and jump: a histogram takes no negative time.
		m.waiting.Observe(max(0, s.StartTime.Sub(b.CreationTimestamp.Time).Seconds()))
		if s.CompletionTime != nil {
			m.duration.WithLabelValues(string(s.Phase)).Observe(max(0, s.CompletionTime.Sub(s.StartTime.Time).Seconds()))
		}
	}
}
