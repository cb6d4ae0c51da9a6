package raftstore

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// cacheBytes of the newest log entries are kept in memory, for followers and for
// applying.
const cacheBytes = 16 << 20

// logStore is the log as raft sees it: what is on disk, with the newest entries in
// memory, a checksum over what is read back and a watchdog over what is written.
// raft.LogCache is not used since it counts entries, and ours are batches.
//
// Raft sends an entry to the followers when the leader has stored it. Where early
// allows it, StoreLogs returns while the entry is still being written, so that the
// disks of leader and followers work at the same time and not one after the other.
// Raft then counts the leader among those that have the entry; so that it is not
// committed before it is on this disk too, link holds back each follower's answer
// until it is (awaitDurable).
type logStore struct {
	disk    raft.LogStore
	dog     *watchdog
	metrics *metrics
	log     *slog.Logger
	// Reports whether entries may be written while the followers get them: an
	// answer of a follower is needed to commit them. Nil: never.
	early func(logs []*raft.Log) bool
	// Bytes appended since a snapshot was last asked for, and who is told of more
	// than the limit.
	appended      atomic.Int64
	snapshotBytes int64
	snapshot      chan struct{}

	mu     sync.RWMutex
	recent []*raft.Log // consecutive, the newest last
	bytes  int
	// The newest of recent, which are not on disk yet; being written are those
	// before. failure is why that does not succeed at the moment.
	pending []*raft.Log
	writing bool
	failure error
	closed  bool
	// Up to here the log is on disk.
	durable uint64
	written broadcast // fires when one of these has changed
	writer  sync.WaitGroup
}

// rewritePause is waited before a write that failed is tried again.
const rewritePause = 50 * time.Millisecond

var errLogClosed = errors.New("raftstore: the log is closed")

// open learns how far the log on disk reaches.
func (s *logStore) open() error {
	last, err := s.disk.LastIndex()
	if err != nil {
		return fmt.Errorf("raftstore: read the end of the log: %w", err)
	}
	s.durable = last
	return nil
}

// close gives up what is not on disk, of which nothing was acknowledged, and waits
// for the write under way.
func (s *logStore) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.written.fire()
	s.writer.Wait()
}

func (s *logStore) IsMonotonic() bool {
	m, ok := s.disk.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

func (s *logStore) FirstIndex() (uint64, error) { return s.disk.FirstIndex() }

func (s *logStore) LastIndex() (uint64, error) {
	last, err := s.disk.LastIndex()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if n := len(s.recent); n > 0 {
		last = max(last, s.recent[n-1].Index)
	}
	return last, err
}

func (s *logStore) GetLog(index uint64, out *raft.Log) error {
	s.mu.RLock()
	if n := uint64(len(s.recent)); n > 0 && index >= s.recent[0].Index && index-s.recent[0].Index < n {
		*out = *s.recent[index-s.recent[0].Index]
		s.mu.RUnlock()
		return nil
	}
	s.mu.RUnlock()
	if err := s.disk.GetLog(index, out); err != nil {
		return err
	}
	if err := verifyEntry(out); err != nil {
		// Raft panics with it when it needs the entry itself.
		s.log.Error("the log on disk is damaged", "error", err)
		return err
	}
	return nil
}

func (s *logStore) StoreLog(log *raft.Log) error { return s.StoreLogs([]*raft.Log{log}) }

func (s *logStore) StoreLogs(logs []*raft.Log) error {
	if s.early != nil && s.early(logs) {
		return s.storeLater(logs)
	}
	if err := s.awaitWritten(); err != nil {
		return err
	}
	if err := s.dog.guard(func() error { return s.store(logs) }); err != nil {
		return err
	}
	s.mu.Lock()
	s.durable = logs[len(logs)-1].Index
	s.remember(logs)
	s.mu.Unlock()
	return nil
}

// store writes to the disk.
func (s *logStore) store(logs []*raft.Log) error {
	start := time.Now()
	if err := s.disk.StoreLogs(logs); err != nil {
		return err
	}
	s.metrics.logWrite.Observe(time.Since(start).Seconds())
	if s.appended.Add(int64(dataBytes(logs))) > s.snapshotBytes {
		s.appended.Store(0)
		select {
		case s.snapshot <- struct{}{}:
		default:
		}
	}
	return nil
}

func dataBytes(logs []*raft.Log) (size int) {
	for _, l := range logs {
		size += len(l.Data)
	}
	return size
}

// storeLater has the writer store the entries. It fails where those before cannot
// be written, upon which raft gives leadership up.
func (s *logStore) storeLater(logs []*raft.Log) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.failure != nil:
		return s.failure
	case s.closed:
		return errLogClosed
	}
	s.pending = append(s.pending, logs...)
	s.remember(logs)
	if !s.writing {
		s.writing = true
		s.writer.Go(s.write)
	}
	return nil
}

// write stores what is pending until there is nothing left.
func (s *logStore) write() {
	for {
		s.mu.Lock()
		logs := s.pending
		s.pending = nil
		if len(logs) == 0 || s.closed {
			s.writing = false
			s.mu.Unlock()
			s.written.fire()
			return
		}
		s.mu.Unlock()
		s.writeOut(logs)
		s.written.fire()
	}
}

// writeOut tries until it succeeds or the log is closed: raft takes the entries for
// stored. A disk that fails counts as one that hangs.
func (s *logStore) writeOut(logs []*raft.Log) {
	err := s.dog.guard(func() error { return s.store(logs) })
	if err != nil {
		s.dog.add(1)
		defer s.dog.add(-1)
	}
	for ; err != nil; err = s.store(logs) {
		s.log.Warn("the log was not written", "error", err)
		s.mu.Lock()
		s.failure = fmt.Errorf("raftstore: write the log: %w", err)
		closed := s.closed
		s.mu.Unlock()
		s.written.fire()
		if closed {
			return
		}
		time.Sleep(rewritePause)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.durable, s.failure = logs[len(logs)-1].Index, nil
}

// awaitWritten returns when nothing is pending, or why that is so for longer.
func (s *logStore) awaitWritten() error {
	return s.await(func() bool { return !s.writing })
}

// awaitDurable returns when the log is on disk up to the index, or why that is not
// so for longer.
func (s *logStore) awaitDurable(index uint64) error {
	return s.await(func() bool { return s.durable >= index })
}

// await waits for a condition, which is looked at with s.mu held.
func (s *logStore) await(cond func() bool) error {
	for {
		written := s.written.next()
		s.mu.RLock()
		ok, failure, closed := cond(), s.failure, s.closed
		s.mu.RUnlock()
		switch {
		case closed:
			return errLogClosed
		case ok:
			return nil
		case failure != nil:
			return failure
		}
		<-written
	}
}

// remember keeps entries in memory, those that are not on disk in any case. s.mu is
// held.
func (s *logStore) remember(logs []*raft.Log) {
	if n := len(s.recent); n > 0 && s.recent[n-1].Index+1 != logs[0].Index {
		s.recent, s.bytes = nil, 0
	}
	s.recent = append(s.recent, logs...)
	s.bytes += dataBytes(logs)
	drop := 0
	for s.bytes > cacheBytes && drop < len(s.recent)-1 && s.recent[drop].Index <= s.durable {
		s.bytes -= len(s.recent[drop].Data)
		s.recent[drop] = nil
		drop++
	}
	s.recent = s.recent[drop:]
}

func (s *logStore) DeleteRange(first, last uint64) error {
	s.mu.Lock()
	unwritten := last > s.durable
	s.mu.Unlock()
	if unwritten {
		if err := s.awaitWritten(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	if !s.writing {
		s.recent, s.bytes = nil, 0
	}
	s.mu.Unlock()
	if err := s.dog.guard(func() error { return s.disk.DeleteRange(first, last) }); err != nil {
		return err
	}
	s.mu.Lock()
	if last >= s.durable {
		s.durable = first - 1
	}
	s.mu.Unlock()
	return nil
}

// stableStore puts term and vote under the same watchdog.
type stableStore struct {
	raft.StableStore
	dog *watchdog
}

func (s stableStore) Set(key, value []byte) error {
	return s.dog.guard(func() error { return s.StableStore.Set(key, value) })
}

func (s stableStore) SetUint64(key []byte, value uint64) error {
	return s.dog.guard(func() error { return s.StableStore.SetUint64(key, value) })
}
