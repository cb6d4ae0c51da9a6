package raftstore

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// hangingLog is a log store whose writes can be made to hang.
type hangingLog struct {
	raft.LogStore
	mu   sync.Mutex
	gate chan struct{} // non-nil while writes hang
}

func (h *hangingLog) hang() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gate = make(chan struct{})
}

func (h *hangingLog) thaw() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gate != nil {
		close(h.gate)
		h.gate = nil
	}
}

func (h *hangingLog) StoreLogs(logs []*raft.Log) error {
	h.mu.Lock()
	gate := h.gate
	h.mu.Unlock()
	if gate != nil {
		<-gate
	}
	return h.LogStore.StoreLogs(logs)
}

func (h *hangingLog) IsMonotonic() bool { return false }

func TestLeaderWithHangingDiskIsReplaced(t *testing.T) {
	var mu sync.Mutex
	logs := map[string]*hangingLog{}
	c := newCluster(t, 3, func(cfg *Config) {
		cfg.Timing.DiskStall = 300 * time.Millisecond
		id := cfg.ID
		cfg.wrapLogs = func(l raft.LogStore) raft.LogStore {
			mu.Lock()
			defer mu.Unlock()
			logs[id] = &hangingLog{LogStore: l}
			return logs[id]
		}
	})
	old := c.leader()
	old.mustPropose(put("before", "1"))
	logs[old.id()].hang()
	defer logs[old.id()].thaw()
	start := time.Now()
	stuck := make(chan error, 1)
	go func() {
		_, err := old.Propose(within(t, patience), put("stuck", "x"))
		stuck <- err
	}()
	eventually(t, "another leader", func() error {
		if old.IsLeader() || c.leader() == old {
			return errors.New("the old one leads")
		}
		return nil
	})
	c.leader().mustPropose(put("after", "2"))
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("writes resumed after %v", took)
	}
	if !old.Status().DiskStalled {
		t.Error("the status does not show the stall")
	}
	// The disk comes back: the replica follows, and the caller that waited there
	// learns what became of its proposal.
	logs[old.id()].thaw()
	if err := <-stuck; err != nil {
		t.Errorf("the proposal that was stuck: %v", err)
	}
	c.sameState()
	if old.get("after") != "2" || old.get("stuck") != "x" {
		t.Error("the old leader did not catch up")
	}
	if old.Status().DiskStalled {
		t.Error("the status still shows the stall")
	}
}

// A follower whose disk hangs for a while is not wedged (MaxRPCsInFlight = 1).
func TestFollowerWithHangingDiskCatchesUp(t *testing.T) {
	var mu sync.Mutex
	logs := map[string]*hangingLog{}
	c := newCluster(t, 3, func(cfg *Config) {
		cfg.Timing.DiskStall = 200 * time.Millisecond
		cfg.Timing.Peer = 500 * time.Millisecond
		id := cfg.ID
		cfg.wrapLogs = func(l raft.LogStore) raft.LogStore {
			mu.Lock()
			defer mu.Unlock()
			logs[id] = &hangingLog{LogStore: l}
			return logs[id]
		}
	})
	leader, follower := c.leader(), c.followers()[0]
	logs[follower.id()].hang()
	for range 30 {
		leader.mustPropose(put("k", "v"))
	}
	eventually(t, "the stall is seen", func() error {
		if !follower.Status().DiskStalled {
			return errors.New("not yet")
		}
		return nil
	})
	if c.leader() != leader {
		t.Error("a stalled follower cost the leader its leadership")
	}
	logs[follower.id()].thaw()
	c.sameState()
}

func TestWatchdog(t *testing.T) {
	var states []bool
	w := &watchdog{limit: time.Hour, changed: func(s bool) { states = append(states, s) }}
	if err := w.guard(func() error { return context.Canceled }); !errors.Is(err, context.Canceled) {
		t.Errorf("the error of the write became %v", err)
	}
	w.add(-1) // a write ends while its timer fires
	w.add(1)
	if len(states) != 0 || w.isStalled() {
		t.Errorf("a write that ended in time: %v", states)
	}
	w.add(1)
	w.add(1)
	w.add(-1)
	if !w.isStalled() {
		t.Error("one of two writes that hang ended, and all is well")
	}
	w.add(-1)
	if len(states) != 2 || !states[0] || states[1] {
		t.Errorf("states %v", states)
	}
}

func testLog(index uint64, data string) *raft.Log {
	l := &raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: []byte(data)}
	l.Extensions = tag{1, index}.seal(l.Data)
	return l
}

func newTestLogStore(disk raft.LogStore) *logStore {
	return &logStore{
		disk: disk, metrics: newMetrics(), log: slog.New(slog.DiscardHandler), snapshot: make(chan struct{}, 1), snapshotBytes: 1 << 40,
		dog: &watchdog{limit: time.Hour, changed: func(bool) {}},
	}
}

func TestLogStoreKeepsTheNewestInMemory(t *testing.T) {
	disk := raft.NewInmemStore()
	s := newTestLogStore(disk)
	big := strings.Repeat("x", cacheBytes/4)
	for i := uint64(1); i <= 10; i++ {
		if err := s.StoreLog(testLog(i, big)); err != nil {
			t.Fatal(err)
		}
	}
	if s.bytes > cacheBytes || len(s.recent) != 4 || s.recent[0].Index != 7 {
		t.Errorf("%d entries, %d bytes in memory", len(s.recent), s.bytes)
	}
	var l raft.Log
	for i := uint64(1); i <= 10; i++ {
		if err := s.GetLog(i, &l); err != nil || l.Index != i {
			t.Errorf("entry %d: %d, %v", i, l.Index, err)
		}
	}
	// A follower's log is cut and goes on otherwise.
	if err := s.DeleteRange(9, 10); err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLogs([]*raft.Log{testLog(9, "other")}); err != nil {
		t.Fatal(err)
	}
	if err := s.GetLog(9, &l); err != nil || string(l.Data) != "other" {
		t.Errorf("entry 9 is %q, %v", l.Data, err)
	}
	if err := s.GetLog(10, &l); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("entry 10: %v", err)
	}
	// A snapshot came in place of entries: the next one does not follow.
	if err := s.StoreLogs([]*raft.Log{testLog(50, "later")}); err != nil {
		t.Fatal(err)
	}
	if err := s.GetLog(50, &l); err != nil || string(l.Data) != "later" {
		t.Errorf("entry 50 is %q, %v", l.Data, err)
	}
	s.snapshotBytes = 10
	if err := s.StoreLog(testLog(51, "enough for a snapshot")); err != nil {
		t.Fatal(err)
	}
	if len(s.snapshot) != 1 {
		t.Error("no snapshot was asked for")
	}
}

func TestLogStoreFindsFlippedBits(t *testing.T) {
	disk := raft.NewInmemStore()
	s := newTestLogStore(disk)
	if err := s.StoreLogs([]*raft.Log{testLog(1, "first"), testLog(2, "second")}); err != nil {
		t.Fatal(err)
	}
	s.recent, s.bytes = nil, 0
	var l raft.Log
	if err := s.GetLog(2, &l); err != nil {
		t.Fatal(err)
	}
	l.Data[0] ^= 4 // the in-memory store shares it
	if err := s.GetLog(2, &l); err == nil || !strings.Contains(err.Error(), "entry 2 is damaged") {
		t.Errorf("a flipped bit: %v", err)
	}
	if err := disk.StoreLog(&raft.Log{Index: 3, Type: raft.LogCommand}); err != nil {
		t.Fatal(err)
	}
	if err := s.GetLog(3, &l); err == nil {
		t.Error("an entry without checksum is read")
	}
}

func TestOpenRefuses(t *testing.T) {
	base := func() Config {
		return Config{
			Dir: t.TempDir(), ID: "a.1", Address: "127.0.0.1:1", EpochKey: testEpochKey,
			Dial:      newNetwork().dial(""),
			transport: func() (transport, error) { return nil, errors.New("unused") },
		}
	}
	if _, err := Open(Config{}); err == nil || !strings.Contains(err.Error(), "Config.Dir is not set") {
		t.Errorf("no configuration: %v", err)
	}
	cfg := base()
	cfg.Log = "floppy"
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "floppy") {
		t.Errorf("an unknown log store: %v", err)
	}
	cfg = base()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if has, err := s.HasState(); has || err != nil {
		t.Errorf("a new directory has state: %v, %v", has, err)
	}
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a directory that is in use: %v", err)
	}
	if err := s.Bootstrap(); err != nil {
		t.Fatal(err)
	}
	if err := s.Bootstrap(); err == nil || !strings.Contains(err.Error(), "already holds") {
		t.Errorf("a second bootstrap: %v", err)
	}
	if has, err := s.HasState(); !has || err != nil {
		t.Errorf("no state after bootstrap: %v, %v", has, err)
	}
	if st := s.Status(); st.State != "Shutdown" || st.Term != 0 {
		t.Errorf("status before Run: %+v", st)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Propose(context.Background(), put("k", "v")); !errors.Is(err, ErrClosed) {
		t.Errorf("a proposal to a closed store: %v", err)
	}
	cfg.Log = LogBolt
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "was written with log store") {
		t.Errorf("a directory of the other kind: %v", err)
	}
}

// A snapshot that cannot be read any more is noticed; where an older one and the
// log do not make up for it, the replica says so and does not start.
func TestDamagedSnapshot(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.Retention.TrailingEntries = 1 })
	r := c.replicas[0]
	for i := range 2 {
		for range 20 {
			r.mustPropose(put("k", "v"))
		}
		if err := r.raft.Snapshot().Error(); err != nil {
			t.Fatal(i, err)
		}
	}
	r.shut()
	states, err := filepath.Glob(filepath.Join(r.dir, "snapshots", "*", "state.bin"))
	if err != nil || len(states) != 2 {
		t.Fatal(states, err)
	}
	newest := states[1]
	data, err := os.ReadFile(newest)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(newest, data, 0o600); err != nil {
		t.Fatal(err)
	}
	r.open()
	err = r.Run(context.Background(), r.lead)
	if err == nil || !strings.Contains(err.Error(), "is damaged (log not found)") {
		t.Errorf("Run: %v", err)
	}
	// Both are damaged.
	r.n.heal(r.address)
	for _, path := range states {
		if err := os.WriteFile(path, bytes.Repeat([]byte{7}, 100), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	if err := r.Run(context.Background(), r.lead); err == nil {
		t.Error("a replica without a readable snapshot runs")
	}
}

func TestSnapshotBySize(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.Retention.SnapshotBytes = 10_000 })
	r := c.replicas[0]
	for range 30 {
		r.mustPropose(put("k", strings.Repeat("v", 1000)))
	}
	eventually(t, "a snapshot", func() error {
		if list, err := r.disk.snaps.List(); err != nil || len(list) == 0 {
			return errors.Join(errors.New("none"), err)
		}
		return nil
	})
}
