package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

type metrics struct {
	apply    *prometheus.HistogramVec
	failures *prometheus.CounterVec
	restarts prometheus.Counter
	healthy  *prometheus.GaugeVec
	sessions prometheus.Counter
	attached prometheus.Gauge
	refused  prometheus.Counter
	fenced   prometheus.Counter
	drifts   *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, o *outbox) *metrics {
	m := &metrics{
		apply: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "persys_agent_apply_duration_seconds", Help: "How long it took to start, stop or remove a replica.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2.5, 10),
		}, []string{"runtime", "verb"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "persys_agent_failures_total", Help: "Starts that failed and runs that ended badly, by reason.",
		}, []string{"reason"}),
		restarts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "persys_agent_restarts_total", Help: "Local restarts of work that ended.",
		}),
		healthy: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "persys_agent_runtime_healthy", Help: "1 while the runtime answers.",
		}, []string{"runtime"}),
		sessions: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "persys_agent_sessions_total", Help: "Sessions with servers that were welcomed.",
		}),
		attached: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "persys_agent_attached", Help: "1 while attached to a server.",
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "persys_agent_refused_total", Help: "Desired sets and assignments refused for being older than what is held.",
		}),
		fenced: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "persys_agent_fenced_total", Help: "Exclusive replicas stopped because the node's lease was about to end.",
		}),
		drifts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "persys_agent_drift_total", Help: "What was found to be otherwise than wanted, by nobody's order, by kind.",
		}, []string{"kind"}),
	}
	if reg != nil {
		reg.MustRegister(m.apply, m.failures, m.restarts, m.healthy, m.sessions, m.attached, m.refused, m.fenced, m.drifts, states{o})
		for _, kind := range []pb.DriftKind{pb.DriftKind_ORPHAN_ON_AGENT, pb.DriftKind_STATE_MISMATCH, pb.DriftKind_REVISION_MISMATCH, pb.DriftKind_MISSING_ON_AGENT} {
			m.drifts.WithLabelValues(kind.String()) // shown as 0
		}
	}
	return m
}

func (m *metrics) took(runtime pb.WorkloadType, v verb, since time.Duration) {
	m.apply.WithLabelValues(runtime.String(), string(v)).Observe(since.Seconds())
}

// states counts replicas by state when it is asked.
type states struct{ outbox *outbox }

var stateCount = prometheus.NewDesc("persys_agent_workloads", "Replicas on this node by state.", []string{"state"}, nil)

func (s states) Describe(c chan<- *prometheus.Desc) { c <- stateCount }

func (s states) Collect(c chan<- prometheus.Metric) {
	count := map[pb.State]int{}
	for _, r := range s.outbox.all() {
		count[r.GetState()]++
	}
	for state, n := range count {
		c <- prometheus.MustNewConstMetric(stateCount, prometheus.GaugeValue, float64(n), state.String())
	}
}
