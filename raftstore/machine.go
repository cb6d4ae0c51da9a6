package raftstore

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// machine is the fsm as raft drives it. Apply, Snapshot and Restore are called by
// one goroutine of raft's; everything else from anywhere.
//
// A log entry that cannot be applied halts it: from then on it applies nothing,
// writes no snapshot, answers every wait with the reason, and halted is closed, on
// which Run ends. It must not go on, since it would differ from the others.
type machine struct {
	log     *slog.Logger
	metrics *metrics
	// Takes back the calls of a batch that was not applied, with the reason.
	lost func(b *batch, err error)
	// Is told that entries are committed before they are applied.
	committed func(index uint64)

	state   atomic.Pointer[fsm.Store]
	applied atomic.Uint64
	// The newest events, and who is woken when something was applied.
	tail    tail
	changed broadcast
	// How much of the fsm's memory of request ids was used since the start, in
	// parts of 1/fsm.MaxRequests of it.
	remembered atomic.Uint64
	// The clock of the leases, where this replica leads.
	clock atomic.Pointer[leaseClock]

	halted chan struct{}

	mu      sync.Mutex
	cause   error // why it halted
	pending map[tag]*batch
	orphans []*batch
	waiters []waiter
	// Entries up to here were never seen here, only their effect: a snapshot came
	// in their place.
	restored uint64
}

// batch is one log entry that this replica has proposed.
type batch struct {
	tag   tag
	calls []*call
	index uint64 // where raft has put it; 0 as long as it is not known
	// Set when it was applied.
	results []*pb.TxnResult
	applied bool
}

// deliver hands each call its part of the results.
func (b *batch) deliver() {
	rest := b.results
	for _, c := range b.calls {
		c.done <- outcome{results: rest[:len(c.txns):len(c.txns)], index: b.index}
		rest = rest[len(c.txns):]
	}
}

type waiter struct {
	index uint64
	done  chan struct{}
}

func newMachine(log *slog.Logger, m *metrics) *machine {
	mc := &machine{log: log, metrics: m, halted: make(chan struct{}), pending: map[tag]*batch{}, committed: func(uint64) {}}
	mc.state.Store(fsm.New())
	mc.tail.reset(mc.view().Revision())
	return mc
}

// Apply is part of raft.FSM; raft calls ApplyBatch.
func (m *machine) Apply(l *raft.Log) any { return m.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch is part of raft.BatchingFSM. Results go to the callers by way of the
// batch's tag, not by raft's futures, which lose them with the leadership.
func (m *machine) ApplyBatch(logs []*raft.Log) []any {
	answers := make([]any, len(logs))
	if m.haltCause() != nil {
		return answers
	}
	m.committed(logs[len(logs)-1].Index)
	start := time.Now()
	txns := 0
	var beside effects
	results := make([][]*pb.TxnResult, len(logs))
	for i, l := range logs {
		if l.Type != raft.LogCommand {
			continue
		}
		var e pb.Entry
		if err := proto.Unmarshal(l.Data, &e); err != nil {
			m.halt(fmt.Errorf("raftstore: log entry %d cannot be decoded: %w", l.Index, err))
			break
		}
		res, events, err := m.state.Load().Apply(l.Index, &e)
		if err != nil {
			m.halt(fmt.Errorf("raftstore: log entry %d cannot be applied: %w", l.Index, err))
			break
		}
		results[i] = res
		m.tail.add(events)
		txns += len(e.Txns)
		for i, t := range e.Txns {
			if len(t.RequestId) > 0 {
				m.remembered.Add(memoryOf(res[i]))
			}
		}
		beside.note(e.Txns, res)
	}
	if beside.compacted {
		m.tail.forget(m.view().CompactRevision())
	}
	if clock := m.clock.Load(); clock != nil && len(beside.leases) > 0 {
		clock.update(m.view(), beside.leases, time.Now())
	}
	m.publish(logs, results)
	m.metrics.apply.Observe(time.Since(start).Seconds())
	m.metrics.applied.Add(float64(txns))
	return answers
}

// memoryOf is the part of the fsm's memory of request ids that an answer takes,
// which is bounded by number and by bytes.
func memoryOf(answer *pb.TxnResult) uint64 {
	return 1 + uint64(proto.Size(answer))/(fsm.MaxRequestBytes/fsm.MaxRequests)
}

// publish makes known that the entries were applied: to the batches they came
// from, to who waits for their index, and to watchers.
func (m *machine) publish(logs []*raft.Log, results [][]*pb.TxnResult) {
	m.mu.Lock()
	if m.cause != nil {
		m.mu.Unlock()
		return
	}
	for i, l := range logs {
		if b := m.pending[tagOf(l)]; b != nil {
			b.results, b.applied, b.index = results[i], true, l.Index
			delete(m.pending, b.tag)
		}
	}
	last := logs[len(logs)-1].Index
	m.applied.Store(last)
	settled := m.settleOrphans(last)
	m.wake(last)
	m.mu.Unlock()

	for _, b := range settled {
		m.settled(b)
	}
	m.changed.fire()
}

// settleOrphans takes out the orphans whose place in the log has been applied.
// m.mu is held.
func (m *machine) settleOrphans(applied uint64) (settled []*batch) {
	kept := m.orphans[:0]
	for _, b := range m.orphans {
		if b.index <= applied {
			settled = append(settled, b)
		} else {
			kept = append(kept, b)
		}
	}
	clear(m.orphans[len(kept):])
	m.orphans = kept
	return settled
}

func (m *machine) settled(b *batch) {
	if b.applied {
		b.deliver()
		return
	}
	m.mu.Lock()
	delete(m.pending, b.tag)
	m.mu.Unlock()
	m.lost(b, &notProposed{raft.ErrLeadershipLost})
}

// wake releases who waits for an index up to applied. m.mu is held.
func (m *machine) wake(applied uint64) {
	kept := m.waiters[:0]
	for _, w := range m.waiters {
		if w.index <= applied {
			close(w.done)
		} else {
			kept = append(kept, w)
		}
	}
	clear(m.waiters[len(kept):])
	m.waiters = kept
}

// expect announces a batch before it is given to raft.
func (m *machine) expect(b *batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pending[b.tag] = b
}

// settle is called with raft's answer about a batch: the index that it was given,
// 0 for none, and what became of it.
func (m *machine) settle(b *batch, index uint64, err error) {
	m.mu.Lock()
	applied := b.applied
	cause := m.cause
	if cause == nil && index > 0 && index <= m.restored {
		cause = ErrOutcomeUnknown
	}
	if !applied && cause == nil && err != nil && index > 0 {
		// Leadership was lost while it was in flight. What is applied at its index
		// will tell.
		b.index = index
		if index > m.applied.Load() {
			m.orphans = append(m.orphans, b)
			m.mu.Unlock()
			return
		}
	}
	delete(m.pending, b.tag)
	m.mu.Unlock()
	switch {
	case applied:
		b.deliver()
	case cause != nil:
		m.lost(b, cause)
	case err == nil:
		m.lost(b, fmt.Errorf("raftstore: raft answered for log entry %d before it was applied", index))
	default:
		m.lost(b, &notProposed{err})
	}
}

// abandon gives up what is still unsettled, at the end.
func (m *machine) abandon() {
	m.mu.Lock()
	orphans := m.orphans
	m.orphans = nil
	for _, b := range orphans {
		delete(m.pending, b.tag)
	}
	m.mu.Unlock()
	for _, b := range orphans {
		m.lost(b, ErrOutcomeUnknown)
	}
}

// wait returns when the entry at index has been applied here.
func (m *machine) wait(ctx context.Context, index uint64) error {
	if m.applied.Load() >= index {
		return nil
	}
	w := waiter{index: index, done: make(chan struct{})}
	m.mu.Lock()
	if m.applied.Load() >= index {
		m.mu.Unlock()
		return nil
	}
	m.waiters = append(m.waiters, w)
	m.mu.Unlock()
	select {
	case <-w.done:
		return nil
	case <-m.halted:
		return m.haltCause()
	case <-ctx.Done():
		m.mu.Lock()
		defer m.mu.Unlock()
		for i, o := range m.waiters {
			if o.done == w.done {
				m.waiters = append(m.waiters[:i], m.waiters[i+1:]...)
				break
			}
		}
		return ctx.Err()
	}
}

func (m *machine) view() *fsm.View { return m.state.Load().View() }

func (m *machine) halt(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cause == nil {
		m.cause = err
		close(m.halted)
		m.log.Error("replica halts: it can no longer follow the log", "error", err)
	}
}

func (m *machine) haltCause() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cause
}

// A snapshot on disk is this, then the stream of the fsm. The applied index is
// kept since it may be beyond the last entry that the fsm has seen: a change of
// membership is an entry too, and who waits for its index must not wait for ever.
// The file store has a checksum of its own over all of it.
const snapshotMagic = "persysR1"

type snapshotHeader [len(snapshotMagic) + 8]byte

// Snapshot is part of raft.FSM.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	if err := m.haltCause(); err != nil {
		return nil, err
	}
	return &snapshot{view: m.view(), applied: m.applied.Load(), metrics: m.metrics}, nil
}

type snapshot struct {
	view    *fsm.View
	applied uint64
	metrics *metrics
}

// Persist is part of raft.FSMSnapshot; raft closes or cancels the sink.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	start := time.Now()
	var h snapshotHeader
	copy(h[:], snapshotMagic)
	binary.BigEndian.PutUint64(h[len(snapshotMagic):], s.applied)
	if _, err := sink.Write(h[:]); err != nil {
		return fmt.Errorf("raftstore: write snapshot: %w", err)
	}
	if _, err := s.view.WriteTo(sink); err != nil {
		return fmt.Errorf("raftstore: write snapshot: %w", err)
	}
	s.metrics.snapshot.Observe(time.Since(start).Seconds())
	return nil
}

// Release is part of raft.FSMSnapshot.
func (s *snapshot) Release() {}

// Restore is part of raft.FSM. The state is replaced only when all of the new one
// was read and verified.
func (m *machine) Restore(from io.ReadCloser) error {
	r := bufio.NewReaderSize(from, 1<<20)
	var h snapshotHeader
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return fmt.Errorf("raftstore: read snapshot: %w", err)
	}
	if string(h[:len(snapshotMagic)]) != snapshotMagic {
		return errors.New("raftstore: not a snapshot of this version")
	}
	state, err := fsm.Restore(r)
	if err != nil {
		return fmt.Errorf("raftstore: read snapshot: %w", err)
	}
	applied := binary.BigEndian.Uint64(h[len(snapshotMagic):])

	m.mu.Lock()
	m.state.Store(state)
	m.applied.Store(applied)
	m.restored = applied
	// Entries were skipped: what they were is not known.
	skipped := m.settleOrphans(applied)
	for _, b := range skipped {
		delete(m.pending, b.tag)
	}
	m.wake(applied)
	m.mu.Unlock()

	m.tail.reset(state.View().Revision())
	m.remembered.Add(repeatWindow)
	for _, b := range skipped {
		m.lost(b, ErrOutcomeUnknown)
	}
	m.changed.fire()
	m.log.Info("state restored from a snapshot", "index", applied, "revision", state.View().Revision())
	return nil
}
