package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

func newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}

// metrics of the leader's duties.
type metrics struct {
	planSteps     prometheus.Counter
	planConflicts prometheus.Counter
	planDuration  prometheus.Histogram
}

func newMetrics(registry *prometheus.Registry) *metrics {
	m := &metrics{
		planSteps:     prometheus.NewCounter(prometheus.CounterOpts{Name: "persys_scheduler_plan_steps_total", Help: "Transactions that the scheduler decided on."}),
		planConflicts: prometheus.NewCounter(prometheus.CounterOpts{Name: "persys_scheduler_plan_conflicts_total", Help: "Transactions of plans that were refused because something had changed."}),
		planDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "persys_scheduler_decide_duration_seconds", Help: "Time to decide a plan that has steps.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
		}),
	}
	registry.MustRegister(m.planSteps, m.planConflicts, m.planDuration)
	return m
}

func (m *metrics) decided(steps int, took time.Duration) {
	m.planSteps.Add(float64(steps))
	m.planDuration.Observe(took.Seconds())
}
