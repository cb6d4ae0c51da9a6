package raftstore

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/persys-dev/persys/fsm"
)

// Store is one replica. Open makes it, Run brings it to life; what is called
// before Run has started waits for it.
type Store struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	disk    *disk
	logs    *logStore
	dog     *watchdog
	machine *machine
	session uint64 // first half of this store's tags and request ids
	seq     atomic.Uint64

	queue        *queue
	entrySlots   chan struct{}
	forwardSlots chan struct{}
	flights      chan flight
	reads        reads
	keepAlives   keepAlives
	membership   sync.Mutex // one change of membership at a time

	// Set by Run, before started is closed.
	raft    *raft.Raft
	link    *link
	started chan struct{}
	// Closed when Run ends or the store is closed unrun; calls fail from then on.
	ended   chan struct{}
	endOnce sync.Once
	work    work

	leading       atomic.Pointer[leadership]
	offeredIn     atomic.Uint64 // term in which leadership was last offered to another
	leaderChanged broadcast
	stallChanged  chan struct{}
}

// Open opens the directory. It starts nothing: before Run there is no raft, and
// View is the empty state.
func Open(cfg Config) (*Store, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	var seed [8]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return nil, fmt.Errorf("raftstore: %w", err)
	}
	m := newMetrics()
	s := &Store{
		cfg:          cfg,
		log:          cfg.Logger,
		metrics:      m,
		machine:      newMachine(cfg.Logger, m),
		session:      binary.BigEndian.Uint64(seed[:]),
		queue:        newQueue(),
		entrySlots:   make(chan struct{}, entriesInFlight),
		forwardSlots: make(chan struct{}, forwardsInFlight),
		flights:      make(chan flight, entriesInFlight),
		started:      make(chan struct{}),
		ended:        make(chan struct{}),
		stallChanged: make(chan struct{}, 1),
	}
	s.machine.lost = s.lost
	s.dog = &watchdog{limit: cfg.Timing.DiskStall, changed: s.stalled}
	if s.disk, err = openDisk(cfg.Dir, cfg.Log, newLogger(cfg.Logger), cfg.Logger); err != nil {
		return nil, err
	}
	logs := s.disk.logs
	if cfg.wrapLogs != nil {
		logs = cfg.wrapLogs(logs)
	}
	s.logs = &logStore{
		disk: logs, dog: s.dog, metrics: m, log: cfg.Logger, early: s.neededByFollowers,
		snapshotBytes: cfg.Retention.SnapshotBytes, snapshot: make(chan struct{}, 1),
	}
	if err := s.register(); err != nil {
		return nil, errors.Join(err, s.disk.close())
	}
	return s, nil
}

// Close releases a store that was opened and never run; Run closes its own.
func (s *Store) Close() error {
	s.end()
	s.unregister()
	return s.disk.close()
}

// work counts the goroutines that were started for a call or a batch, and lasts
// until the last of them.
type work struct {
	mu     sync.Mutex
	closed bool
	group  sync.WaitGroup
}

// spawn reports whether it has started the goroutine: not once the store stops.
func (s *Store) spawn(f func()) bool {
	s.work.mu.Lock()
	defer s.work.mu.Unlock()
	if s.work.closed {
		return false
	}
	s.work.group.Go(f)
	return true
}

func (w *work) wait() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.group.Wait()
}

// end makes every call fail from now on.
func (s *Store) end() {
	s.endOnce.Do(func() { close(s.ended) })
	s.queue.close(s.closedError())
}

// closedError is why a store that has ended did.
func (s *Store) closedError() error {
	if err := s.machine.haltCause(); err != nil {
		return errors.Join(ErrClosed, err)
	}
	return ErrClosed
}

// HasState reports whether the directory holds the state of a member: a term, log
// entries or a snapshot.
func (s *Store) HasState() (bool, error) {
	has, err := raft.HasExistingState(s.disk.logs, s.disk.stable, s.disk.snaps)
	if err != nil {
		return false, fmt.Errorf("raftstore: %w", err)
	}
	return has, nil
}

// Bootstrap makes this replica the only voter of a new cluster. It is called once
// in the life of a cluster, before Run, and fails where there is state.
func (s *Store) Bootstrap() error {
	err := raft.BootstrapCluster(s.cfg.raft(), s.disk.logs, s.disk.stable, s.disk.snaps, nil, raft.Configuration{
		Servers: []raft.Server{{
			Suffrage: raft.Voter,
			ID:       raft.ServerID(s.cfg.ID),
			Address:  raft.ServerAddress(s.cfg.Address),
		}},
	})
	switch {
	case errors.Is(err, raft.ErrCantBootstrap):
		return fmt.Errorf("raftstore: %s already holds the state of a member", s.cfg.Dir)
	case err != nil:
		return fmt.Errorf("raftstore: bootstrap: %w", err)
	}
	return nil
}

// View is the state as applied here: a snapshot that never changes. It may lag
// behind what was acknowledged elsewhere; see Linearizable.
func (s *Store) View() *fsm.View { return s.machine.view() }

// isStarted reports whether Run has made s.raft.
func (s *Store) isStarted() bool {
	select {
	case <-s.started:
		return true
	default:
		return false
	}
}

// Leader is the replica that leads, as far as is known here.
func (s *Store) Leader() (id, address string, ok bool) {
	if !s.isStarted() {
		return "", "", false
	}
	addr, server := s.raft.LeaderWithID()
	return string(server), string(addr), server != ""
}

// reigning returns the leadership, nil where there is none. Raft may have lost it
// a moment before followLeadership learns of it.
func (s *Store) reigning() *leadership {
	if l := s.leading.Load(); l != nil && s.leads() && s.raft.CurrentTerm() == l.term {
		return l
	}
	return nil
}

// IsLeader reports whether this replica leads and has finished taking over.
func (s *Store) IsLeader() bool { return s.reigning() != nil }

// Epoch is the epoch in which this replica leads; 0 when it does not.
func (s *Store) Epoch() int64 {
	if l := s.reigning(); l != nil {
		return l.epoch
	}
	return 0
}

// LeaderChanged is closed when Leader or IsLeader may answer otherwise than now.
func (s *Store) LeaderChanged() <-chan struct{} { return s.leaderChanged.next() }

// Status is a replica's view of itself.
type Status struct {
	ID            string
	Leader        string // id; empty when none is known
	LeaderAddress string
	State         string // Follower, Candidate, Leader, Shutdown
	Term          uint64
	Epoch         int64 // 0 when this replica does not lead
	Applied       uint64
	Commit        uint64
	LastIndex     uint64
	Revision      int64
	// When the leader was last heard; zero on the leader.
	LastContact time.Time
	// A write to the log has been in flight for longer than Timing.DiskStall.
	DiskStalled bool
	// Why the replica has halted; nil as long as it follows the log.
	Halted error
}

// Term is raft's, as known here; 0 before Run. It never blocks and costs nothing.
func (s *Store) Term() uint64 {
	if !s.isStarted() {
		return 0
	}
	return s.raft.CurrentTerm()
}

// Status never blocks.
func (s *Store) Status() Status {
	st := Status{
		ID:          s.cfg.ID,
		Applied:     s.machine.applied.Load(),
		Revision:    s.View().Revision(),
		Epoch:       s.Epoch(),
		DiskStalled: s.dog.isStalled(),
		Halted:      s.machine.haltCause(),
	}
	if !s.isStarted() {
		st.State = raft.Shutdown.String()
		return st
	}
	st.Leader, st.LeaderAddress, _ = s.Leader()
	st.State = s.raft.State().String()
	st.Term = s.raft.CurrentTerm()
	st.Commit = s.raft.CommitIndex()
	st.LastIndex = s.raft.LastIndex()
	if s.raft.State() != raft.Leader {
		st.LastContact = s.raft.LastContact()
	}
	return st
}
