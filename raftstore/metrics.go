package raftstore

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are written where things happen; gauges that can be read from the store
// are added by register.
type metrics struct {
	proposals, retries, forwarded, applied prometheus.Counter
	batchTxns, batchBytes                  prometheus.Histogram
	apply, logWrite, snapshot              prometheus.Histogram
	leaderChanges, expired                 prometheus.Counter
	readRounds, reads                      prometheus.Counter
	stalls                                 prometheus.Gauge

	registered []prometheus.Collector
}

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "persys_raft_" + name, Help: help})
	}
	histogram := func(name, help string, start, factor float64, count int) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "persys_raft_" + name, Help: help, Buckets: prometheus.ExponentialBuckets(start, factor, count),
		})
	}
	return &metrics{
		proposals:     counter("proposals_total", "Transactions proposed through this replica."),
		retries:       counter("proposal_retries_total", "Proposals that were queued again after a change of leadership or a lost answer."),
		forwarded:     counter("forwarded_total", "Transactions sent to the leader."),
		applied:       counter("applied_total", "Transactions applied."),
		batchTxns:     histogram("batch_transactions", "Transactions in a log entry made here.", 1, 2, 11),
		batchBytes:    histogram("batch_bytes", "Size of a log entry made here.", 128, 4, 9),
		apply:         histogram("apply_duration_seconds", "Applying a group of committed log entries.", 10e-6, 2.5, 14),
		logWrite:      histogram("log_write_duration_seconds", "Appending to the log on disk, including the sync.", 50e-6, 2, 18),
		snapshot:      histogram("snapshot_duration_seconds", "Writing a snapshot to disk.", 1e-3, 4, 10),
		leaderChanges: counter("leader_changes_total", "Changes of the known leader, to none included."),
		expired:       counter("leases_expired_total", "Leases ended by this replica as the leader."),
		readRounds:    counter("read_rounds_total", "Confirmations of leadership or read indexes fetched, each for all readers that waited."),
		reads:         counter("linearizable_reads_total", "Linearizable reads served."),
		stalls: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "persys_raft_disk_stalled", Help: "1 while a write to the log has been in flight for too long.",
		}),
	}
}

// register adds everything to the registerer of the configuration.
func (s *Store) register() error {
	if s.cfg.Registerer == nil {
		return nil
	}
	m := s.metrics
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "persys_raft_" + name, Help: help}, value)
	}
	running := func(value func() uint64) func() float64 {
		return func() float64 {
			if !s.isStarted() {
				return 0
			}
			return float64(value())
		}
	}
	for _, c := range []prometheus.Collector{
		m.proposals, m.retries, m.forwarded, m.applied, m.batchTxns, m.batchBytes, m.apply, m.logWrite,
		m.snapshot, m.leaderChanges, m.expired, m.readRounds, m.reads, m.stalls,
		gauge("applied_index", "Index of the last log entry applied.", func() float64 { return float64(s.machine.applied.Load()) }),
		gauge("commit_index", "Index of the last log entry known to be committed.", running(func() uint64 { return s.raft.CommitIndex() })),
		gauge("last_index", "Index of the last log entry on disk.", running(func() uint64 { return s.raft.LastIndex() })),
		gauge("term", "Current term.", running(func() uint64 { return s.raft.CurrentTerm() })),
		gauge("leader", "1 where this replica leads.", func() float64 { return b2f(s.IsLeader()) }),
		gauge("leases", "Leases whose clock runs here.", func() float64 {
			if l := s.reigning(); l != nil {
				return float64(l.clock.len())
			}
			return 0
		}),
		peerLag{s},
	} {
		if err := s.cfg.Registerer.Register(c); err != nil {
			s.unregister()
			return fmt.Errorf("raftstore: %w", err)
		}
		m.registered = append(m.registered, c)
	}
	return nil
}

func (s *Store) unregister() {
	for _, c := range s.metrics.registered {
		s.cfg.Registerer.Unregister(c)
	}
	s.metrics.registered = nil
}

// peerLag shows on the leader how many log entries each server lacks. This is what
// to alert on: a server whose disk is stuck still answers heartbeats.
type peerLag struct{ s *Store }

var peerLagDesc = prometheus.NewDesc("persys_raft_peer_lag_entries",
	"Log entries that the peer is not known to hold; on the leader only.", []string{"peer"}, nil)

func (p peerLag) Describe(to chan<- *prometheus.Desc) { to <- peerLagDesc }

func (p peerLag) Collect(to chan<- prometheus.Metric) {
	l := p.s.reigning()
	if l == nil {
		return
	}
	last := p.s.raft.LastIndex()
	for _, server := range p.s.servers() {
		if string(server.ID) == p.s.cfg.ID {
			continue
		}
		index, _ := p.s.link.progress(server.ID, l.term)
		to <- prometheus.MustNewConstMetric(peerLagDesc, prometheus.GaugeValue, float64(last-min(index, last)), string(server.ID))
	}
}
