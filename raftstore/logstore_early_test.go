package raftstore

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// failingLog is a log store whose writes can be made to fail.
type failingLog struct {
	raft.LogStore
	mu      sync.Mutex
	failure error
}

func (f *failingLog) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failure = err
}

func (f *failingLog) StoreLogs(logs []*raft.Log) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failure != nil {
		return f.failure
	}
	return f.LogStore.StoreLogs(logs)
}

// The followers get an entry while the leader still writes it, but as long as the
// leader does not have it on disk it is not committed anywhere.
func TestEntryIsCommittedWhenTheLeaderHasItOnDisk(t *testing.T) {
	var mu sync.Mutex
	logs := map[string]*hangingLog{}
	c := newCluster(t, 3, func(cfg *Config) {
		cfg.Timing.DiskStall = time.Hour
		id := cfg.ID
		cfg.wrapLogs = func(l raft.LogStore) raft.LogStore {
			mu.Lock()
			defer mu.Unlock()
			logs[id] = &hangingLog{LogStore: l}
			return logs[id]
		}
	})
	leader := c.leader()
	leader.mustPropose(put("before", "1"))
	before := leader.raft.CommitIndex()
	logs[leader.id()].hang()
	defer logs[leader.id()].thaw()
	proposed := make(chan error, 1)
	go func() {
		_, err := leader.Propose(within(t, patience), put("early", "x"))
		proposed <- err
	}()
	for _, f := range c.followers() {
		eventually(t, "the follower has the entry", func() error {
			if f.raft.LastIndex() <= before {
				return errors.New("not yet")
			}
			return nil
		})
	}
	// A read is a whole round of messages later.
	if _, err := leader.Linearizable(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-proposed:
		t.Errorf("acknowledged before the leader had it on disk: %v", err)
	default:
	}
	for _, r := range append(c.followers(), leader) {
		if r.raft.CommitIndex() > before || r.get("early") != "" {
			t.Errorf("%s takes the entry for committed", r.id())
		}
	}
	logs[leader.id()].thaw()
	if err := <-proposed; err != nil {
		t.Fatal(err)
	}
	c.sameState()
}

func TestLogStoreWritesLater(t *testing.T) {
	disk := &failingLog{LogStore: raft.NewInmemStore()}
	s := newTestLogStore(disk)
	early := true
	s.early = func([]*raft.Log) bool { return early }
	var stalls []bool
	s.dog.changed = func(stalled bool) { stalls = append(stalls, stalled) }
	if err := s.StoreLogs([]*raft.Log{testLog(1, "first")}); err != nil {
		t.Fatal(err)
	}
	if err := s.awaitDurable(1); err != nil {
		t.Fatal(err)
	}

	disk.fail(errors.New("no space"))
	if err := s.StoreLogs([]*raft.Log{testLog(2, "second")}); err != nil {
		t.Fatal(err)
	}
	if err := s.awaitDurable(2); err == nil {
		t.Error("an entry that could not be written is on disk")
	}
	if err := s.StoreLogs([]*raft.Log{testLog(3, "third")}); err == nil {
		t.Error("an entry was taken after one that could not be written")
	}
	early = false
	if err := s.StoreLogs([]*raft.Log{testLog(3, "third")}); err == nil {
		t.Error("an entry was written after one that could not be")
	}
	if err := s.DeleteRange(2, 2); err == nil {
		t.Error("an entry was deleted before it was written")
	}
	var l raft.Log
	if last, err := s.LastIndex(); last != 2 || err != nil {
		t.Errorf("the log ends at %d, %v", last, err)
	}
	if err := s.GetLog(2, &l); err != nil || string(l.Data) != "second" {
		t.Errorf("entry 2 is %q, %v", l.Data, err)
	}

	// It is written as soon as that is possible.
	disk.fail(nil)
	eventually(t, "entry 2 is on disk", func() error { return s.awaitDurable(2) })
	if err := disk.GetLog(2, &l); err != nil {
		t.Error(err)
	}
	if err := s.StoreLogs([]*raft.Log{testLog(3, "third")}); err != nil {
		t.Error(err)
	}
	if err := s.DeleteRange(3, 3); err != nil {
		t.Error(err)
	}
	if last, err := s.LastIndex(); last != 2 || err != nil {
		t.Errorf("the log ends at %d, %v", last, err)
	}
	s.close()
	if len(stalls) != 2 || !stalls[0] || stalls[1] {
		t.Errorf("the watchdog saw %v", stalls)
	}
}

// Raft sends a snapshot to a follower where an entry is not found.
func TestEntriesStayUntilTheyAreWritten(t *testing.T) {
	disk := &failingLog{LogStore: raft.NewInmemStore(), failure: errors.New("no space")}
	s := newTestLogStore(disk)
	s.early = func([]*raft.Log) bool { return true }
	large := strings.Repeat("x", cacheBytes/2+1)
	if err := s.StoreLogs([]*raft.Log{testLog(1, large), testLog(2, large)}); err != nil {
		t.Fatal(err)
	}
	if err := s.GetLog(1, new(raft.Log)); err != nil {
		t.Errorf("an entry that is not written yet: %v", err)
	}
	disk.fail(nil)
	if err := s.awaitWritten(); err != nil {
		eventually(t, "written", s.awaitWritten)
	}
	s.close()
}
