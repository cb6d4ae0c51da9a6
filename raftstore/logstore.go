package raftstore

import (
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
type logStore struct {
	disk    raft.LogStore
	dog     *watchdog
	metrics *metrics
	log     *slog.Logger
	// Bytes appended since a snapshot was last asked for, and who is told of more
	// than the limit.
	appended      atomic.Int64
	snapshotBytes int64
	snapshot      chan struct{}

	mu     sync.RWMutex
	recent []*raft.Log // consecutive, the newest last
	bytes  int
}

func (s *logStore) IsMonotonic() bool {
	m, ok := s.disk.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

func (s *logStore) FirstIndex() (uint64, error) { return s.disk.FirstIndex() }
func (s *logStore) LastIndex() (uint64, error)  { return s.disk.LastIndex() }

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
	start := time.Now()
	if err := s.dog.guard(func() error { return s.disk.StoreLogs(logs) }); err != nil {
		return err
	}
	s.metrics.logWrite.Observe(time.Since(start).Seconds())
	size := 0
	for _, l := range logs {
		size += len(l.Data)
	}
	if s.appended.Add(int64(size)) > s.snapshotBytes {
		s.appended.Store(0)
		select {
		case s.snapshot <- struct{}{}:
		default:
		}
	}
	s.remember(logs, size)
	return nil
}

func (s *logStore) remember(logs []*raft.Log, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.recent); n > 0 && s.recent[n-1].Index+1 != logs[0].Index {
		s.recent, s.bytes = nil, 0
	}
	s.recent = append(s.recent, logs...)
	s.bytes += size
	drop := 0
	for s.bytes > cacheBytes && drop < len(s.recent)-1 {
		s.bytes -= len(s.recent[drop].Data)
		s.recent[drop] = nil
		drop++
	}
	s.recent = s.recent[drop:]
}

func (s *logStore) DeleteRange(first, last uint64) error {
	s.mu.Lock()
	s.recent, s.bytes = nil, 0
	s.mu.Unlock()
	return s.dog.guard(func() error { return s.disk.DeleteRange(first, last) })
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
