package agent

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kiln-build/kiln/agent/queue"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Metrics counts what an agent does. It is for one agent.
type Metrics struct {
	builds   *prometheus.CounterVec
	duration *prometheus.HistogramVec
	wait     prometheus.Histogram
	steps    *prometheus.CounterVec
	cpu      *prometheus.HistogramVec
	memory   *prometheus.HistogramVec
	written  *prometheus.HistogramVec
	limits   *prometheus.CounterVec
	queue    atomic.Pointer[queue.Queue]
}

// NewMetrics registers the metrics of an agent. It panics when they are registered
// already, as prometheus.MustRegister does.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	seconds := []float64{0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600}
	byClass := func(name, help string, buckets []float64) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, []string{"sandbox"})
	}
	mebibytes := prometheus.ExponentialBuckets(1<<20, 4, 9) // to 64 GiB
	m := &Metrics{
		cpu:     byClass("kiln_agent_step_cpu_seconds", "CPU time of steps that ran, by class of sandbox.", seconds),
		memory:  byClass("kiln_agent_step_peak_memory_bytes", "Most memory at a time of steps that ran, by class of sandbox.", mebibytes),
		written: byClass("kiln_agent_step_written_bytes", "What steps that ran left on disk, by class of sandbox.", mebibytes),
		limits: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kiln_agent_step_limits_reached_total", Help: "Limits that steps ran into, by class of sandbox.",
		}, []string{"sandbox", "limit"}),
		builds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kiln_agent_builds_total", Help: "Builds that ended, by how, why and in which class of sandbox.",
		}, []string{"state", "reason", "sandbox"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kiln_agent_build_duration_seconds", Help: "Time from a build's start to its end, without its wait.", Buckets: seconds,
		}, []string{"state", "sandbox"}),
		wait: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kiln_agent_queue_wait_seconds", Help: "Time that builds waited before they started.", Buckets: seconds,
		}),
		steps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kiln_agent_steps_total", Help: "Steps of builds that ended: cached, run or failed.",
		}, []string{"outcome"}),
	}
	stat := func(name, help string, of func(queue.Stats) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			if q := m.queue.Load(); q != nil {
				return of(q.Stats())
			}
			return 0
		})
	}
	reg.MustRegister(m.builds, m.duration, m.wait, m.steps, m.cpu, m.memory, m.written, m.limits,
		stat("kiln_agent_builds_running", "Builds that run.", func(s queue.Stats) float64 { return float64(s.Running) }),
		stat("kiln_agent_builds_queued", "Builds that wait.", func(s queue.Stats) float64 { return float64(s.Queued) }),
		stat("kiln_agent_reserved_cpus", "CPUs that builds reserve.", func(s queue.Stats) float64 { return float64(s.Used.CPUMillis) / 1000 }),
		stat("kiln_agent_reserved_memory_bytes", "Memory that builds reserve.", func(s queue.Stats) float64 { return float64(s.Used.MemoryBytes) }),
		stat("kiln_agent_reserved_disk_bytes", "Disk that builds reserve.", func(s queue.Stats) float64 { return float64(s.Used.DiskBytes) }),
	)
	return m
}

// watch has the gauges show a queue.
func (m *Metrics) watch(q *queue.Queue) { m.queue.Store(q) }

// step counts what a step used.
func (m *Metrics) step(class string, u *agentv1.StepUsage) {
	m.cpu.WithLabelValues(class).Observe(u.GetCpu().AsDuration().Seconds())
	if n := u.GetPeakMemoryBytes(); n > 0 {
		m.memory.WithLabelValues(class).Observe(float64(n))
	}
	m.written.WithLabelValues(class).Observe(float64(u.GetDiskBytes()))
	for _, l := range u.GetLimitsReached() {
		m.limits.WithLabelValues(class, l).Inc()
	}
}

// measured counts builds.
type measured struct {
	next    runner
	metrics *Metrics
	now     func() time.Time
}

func (r *measured) Run(ctx context.Context, j *job) *agentv1.BuildResult {
	result := r.next.Run(ctx, j)
	m, class, state := r.metrics, className(j.spec.GetSandbox()), result.GetState().String()
	m.builds.WithLabelValues(state, result.GetFailure().GetReason().String(), class).Inc()
	b := j.writer.Load().Build()
	if b.GetStartedAt() != nil {
		// A clock that went back makes no time negative: the sum of a histogram only grows.
		m.wait.Observe(max(0, b.GetStartedAt().AsTime().Sub(b.GetCreatedAt().AsTime()).Seconds()))
		m.duration.WithLabelValues(state, class).Observe(max(0, r.now().Sub(b.GetStartedAt().AsTime()).Seconds()))
	}
	for _, s := range result.GetSteps() {
		m.steps.WithLabelValues(outcome(s)).Inc()
	}
	return result
}

func outcome(s *agentv1.StepResult) string {
	switch {
	case s.GetError() != "":
		return "failed"
	case s.GetCached():
		return "cached"
	}
	return "run"
}
