package raftstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Config is what a Store needs to know. Dir, ID, Address, Stream, Dial and EpochKey
// must be set.
type Config struct {
	// Dir holds the log, the vote and the snapshots; it is created.
	Dir string
	// ID is the raft server id, "<name>.<incarnation>". A directory that lost its
	// content must come back under another id: raft would take its empty log for
	// the old one, and with it lose what was acknowledged.
	ID string
	// Address is the advertised host:port of the gRPC port. Others reach this
	// replica there, for raft and for Consensus.
	Address string
	// Stream makes and accepts raft connections. The store closes it.
	Stream raft.StreamLayer
	// Dial returns a connection, cached by the callee, to the Consensus service at
	// another replica's address.
	Dial func(ctx context.Context, address string) (pb.ConsensusClient, error)
	// ExpireLease returns what to propose when a lease has run out. It must revoke
	// the lease. Default: just that. The compare of the epoch is added to it.
	ExpireLease func(v *fsm.View, l *pb.LeaseRecord) *pb.Txn
	// EpochKey holds pb.LeaderEpoch.
	EpochKey string
	// Version is told to other replicas by ReplicaStatus.
	Version string
	// Log chooses the log store, for the life of the directory. Default LogWAL.
	Log LogKind

	Timing    Timing
	Retention Retention

	Logger     *slog.Logger
	Registerer prometheus.Registerer

	// Tests put their own transport and stores in.
	transport func() (transport, error)
	wrapLogs  func(raft.LogStore) raft.LogStore
}

// LogKind names an implementation of the log on disk.
type LogKind string

const (
	// LogWAL keeps the log in append-only segments, one sync an append. It is the
	// default: measured side by side it carries 1.4 to 2 times the writes of
	// LogBolt, and it passes the same tests of torn writes and flipped bits.
	LogWAL LogKind = "wal"
	// LogBolt keeps the log in the bbolt file that also holds term and vote, two
	// syncs an append.
	LogBolt LogKind = "boltdb"
)

// Timing holds the time-outs. A zero field takes the value for a local network.
type Timing struct {
	// Heartbeat: a follower that hears nothing for this long, up to twice of it,
	// asks for votes. Default 300 ms.
	Heartbeat time.Duration
	// Election: a candidate that gets no majority tries again after this, up to
	// twice of it. Default: Heartbeat.
	Election time.Duration
	// LeaderLease: a leader that does not reach a majority for this long steps
	// down. Default 3/4 of Heartbeat.
	LeaderLease time.Duration
	// Commit: followers of a quiet leader hear of the newest commit again after
	// this, up to twice of it. Default 50 ms.
	Commit time.Duration
	// DiskStall: a leader whose write to its disk takes longer falls silent, so
	// that another one is elected. Default 2 s.
	DiskStall time.Duration
	// NoLeader: a call that finds no leader for this long gives up. Default 10 s.
	NoLeader time.Duration
	// Peer bounds a message to another replica and its answer. Default 5 s.
	Peer time.Duration
}

// Retention says how much of the past is kept. Zero fields take defaults.
type Retention struct {
	// Superseded versions and the history for watches are kept for the newest
	// Revisions (default 10,000) and for what is younger than Age (default 5 min),
	// whichever is more, but never for more than MaxRevisions (default 500,000).
	Revisions    int64
	Age          time.Duration
	MaxRevisions int64
	// Check: how often the leader looks whether there is something to forget.
	// Default 5 s.
	Check time.Duration
	// CheckpointEntries: the state hash is compared between the replicas each so
	// many log entries. Default 10,000.
	CheckpointEntries uint64
	// A snapshot is written after SnapshotEntries log entries (default 16,384) or
	// SnapshotBytes of them (default 128 MiB).
	SnapshotEntries uint64
	SnapshotBytes   int64
	// TrailingEntries stay in the log behind a snapshot, so that a follower that
	// was away for a moment needs no snapshot. Default 8,192.
	TrailingEntries uint64
}

func (c Config) withDefaults() (Config, error) {
	var missing []error
	need := func(ok bool, name string) {
		if !ok {
			missing = append(missing, fmt.Errorf("raftstore: Config.%s is not set", name))
		}
	}
	need(c.Dir != "", "Dir")
	need(c.ID != "", "ID")
	need(c.Address != "", "Address")
	need(c.Stream != nil || c.transport != nil, "Stream")
	need(c.Dial != nil, "Dial")
	need(c.EpochKey != "", "EpochKey")
	if err := errors.Join(missing...); err != nil {
		return c, err
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.ExpireLease == nil {
		c.ExpireLease = func(_ *fsm.View, l *pb.LeaseRecord) *pb.Txn { return revokeLease(l.Id) }
	}
	if c.Log == "" {
		c.Log = LogWAL
	}
	if c.Log != LogBolt && c.Log != LogWAL {
		return c, fmt.Errorf("raftstore: Config.Log is %q, allowed are %q and %q", c.Log, LogBolt, LogWAL)
	}
	t := &c.Timing
	setDefault(&t.Heartbeat, 300*time.Millisecond)
	setDefault(&t.Election, t.Heartbeat)
	setDefault(&t.LeaderLease, t.Heartbeat*3/4)
	setDefault(&t.Commit, 50*time.Millisecond)
	setDefault(&t.DiskStall, 2*time.Second)
	setDefault(&t.NoLeader, 10*time.Second)
	setDefault(&t.Peer, 5*time.Second)
	r := &c.Retention
	setDefault(&r.Revisions, 10_000)
	setDefault(&r.Age, 5*time.Minute)
	setDefault(&r.MaxRevisions, 500_000)
	setDefault(&r.Check, 5*time.Second)
	setDefault(&r.CheckpointEntries, 10_000)
	setDefault(&r.SnapshotEntries, 16_384)
	setDefault(&r.SnapshotBytes, 128<<20)
	setDefault(&r.TrailingEntries, 8_192)
	return c, nil
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c Config) raft() *raft.Config {
	return &raft.Config{
		ProtocolVersion:  raft.ProtocolVersionMax,
		LocalID:          raft.ServerID(c.ID),
		HeartbeatTimeout: c.Timing.Heartbeat,
		ElectionTimeout:  c.Timing.Election,
		CommitTimeout:    c.Timing.Commit,
		// An entry is a batch already, of up to maxEntryBytes, so this is enough, and
		// bounds a message to a follower that lags to 16 MiB.
		MaxAppendEntries:   64,
		BatchApplyCh:       true,
		ShutdownOnRemove:   false,
		TrailingLogs:       c.Retention.TrailingEntries,
		SnapshotInterval:   15 * time.Second,
		SnapshotThreshold:  c.Retention.SnapshotEntries,
		LeaderLeaseTimeout: c.Timing.LeaderLease,
		Logger:             newLogger(c.Logger),
		PreVoteDisabled:    false,
		NoLegacyTelemetry:  true,
	}
}
