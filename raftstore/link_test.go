package raftstore

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// fakeTransport answers appends by a function.
type fakeTransport struct {
	transport
	mu     sync.Mutex
	append func(id raft.ServerID, args *raft.AppendEntriesRequest) (ok bool, err error)
	seen   []*raft.AppendEntriesRequest
	got    broadcast
}

func (f *fakeTransport) AppendEntries(id raft.ServerID, _ raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	f.mu.Lock()
	f.seen = append(f.seen, args)
	f.mu.Unlock()
	f.got.fire()
	ok, err := f.append(id, args)
	resp.Term, resp.Success = args.Term, ok
	return err
}

func (f *fakeTransport) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte { return []byte(a) }
func (f *fakeTransport) Close() error                                            { return nil }

func (f *fakeTransport) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.seen)
}

func (f *fakeTransport) last() *raft.AppendEntriesRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.seen[len(f.seen)-1]
}

var (
	self    = raft.Server{ID: "s1", Address: "a1", Suffrage: raft.Voter}
	second  = raft.Server{ID: "s2", Address: "a2", Suffrage: raft.Voter}
	third   = raft.Server{ID: "s3", Address: "a3", Suffrage: raft.Voter}
	witness = raft.Server{ID: "s4", Address: "a4", Suffrage: raft.Nonvoter}
	members = []raft.Server{self, second, third, witness}
)

func entries(last, term uint64) *raft.AppendEntriesRequest {
	return &raft.AppendEntriesRequest{Term: term, Entries: []*raft.Log{{Index: last, Term: term}}}
}

// An answer that was under way when the question came confirms nothing, and neither
// does a non-voter's.
func TestOnlyWhatWasSentAfterwardsConfirms(t *testing.T) {
	release := make(chan struct{})
	f := &fakeTransport{append: func(raft.ServerID, *raft.AppendEntriesRequest) (bool, error) {
		<-release
		return true, nil
	}}
	l := newLink(f, "s1", "a1")
	var old sync.WaitGroup
	for _, to := range []raft.Server{second, third} {
		old.Go(func() {
			if err := l.AppendEntries(to.ID, to.Address, entries(7, 3), &raft.AppendEntriesResponse{}); err != nil {
				t.Error(err)
			}
		})
	}
	await1(t, "sent", f.got.next, func() bool { return f.count() == 2 })
	since := time.Now()
	close(release)
	old.Wait()
	if n, voters := l.followedSince(members, 3, since); n != 1 || voters != 3 {
		t.Fatalf("%d of %d confirm by answers to older messages", n, voters)
	}
	if err := l.AppendEntries(witness.ID, witness.Address, entries(7, 3), &raft.AppendEntriesResponse{}); err != nil {
		t.Fatal(err)
	}
	if n, _ := l.followedSince(members, 3, since); n != 1 {
		t.Fatalf("a non-voter confirms")
	}
	l.beat(members, 3, since)
	await1(t, "a majority", l.followed.next, func() bool { n, _ := l.followedSince(members, 3, since); return n == 3 })
	if n, _ := l.followedSince(members, 4, since); n != 1 {
		t.Error("another term is confirmed")
	}
	if b := f.last(); b.Term != 3 || b.PrevLogEntry != 0 || b.LeaderCommitIndex != 0 || len(b.Entries) != 0 || string(b.ID) != "s1" {
		t.Errorf("heartbeat %+v", b)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// A heartbeat in flight is too old for who asks later: another one follows it.
func TestHeartbeatIsRepeatedForLateReaders(t *testing.T) {
	answers := make(chan struct{})
	f := &fakeTransport{append: func(raft.ServerID, *raft.AppendEntriesRequest) (bool, error) {
		<-answers
		return true, nil
	}}
	l := newLink(f, "s1", "a1")
	pair := []raft.Server{self, second}
	first := time.Now()
	l.beat(pair, 1, first)
	await1(t, "sent", f.got.next, func() bool { return f.count() == 1 })
	late := time.Now()
	l.beat(pair, 1, late)
	l.beat(pair, 1, late)
	if n := f.count(); n != 1 {
		t.Fatalf("%d heartbeats at once", n)
	}
	answers <- struct{}{}
	answers <- struct{}{}
	await1(t, "confirmed", l.followed.next, func() bool { n, _ := l.followedSince(pair, 1, late); return n == 2 })
	if err := l.Close(); err != nil || f.count() != 2 {
		t.Errorf("%d heartbeats, %v", f.count(), err)
	}
}

func TestFollowersAreToldOfACommitThatIsWaitedFor(t *testing.T) {
	f := &fakeTransport{append: func(id raft.ServerID, _ *raft.AppendEntriesRequest) (bool, error) {
		if id == third.ID {
			return false, errors.New("away")
		}
		return true, nil
	}}
	l := newLink(f, "s1", "a1")
	send := func(args *raft.AppendEntriesRequest) {
		t.Helper()
		if err := l.AppendEntries(second.ID, second.Address, args, &raft.AppendEntriesResponse{}); err != nil {
			t.Fatal(err)
		}
	}
	send(entries(5, 2))
	l.spread(members, 4)
	await1(t, "told", f.got.next, func() bool { return f.count() == 2 })
	if m := f.last(); m.PrevLogEntry != 5 || m.PrevLogTerm != 2 || m.LeaderCommitIndex != 4 || len(m.Entries) != 0 || m.Term != 2 {
		t.Errorf("message %+v", m)
	}
	await1(t, "noted", l.followed.next, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.peers["s2"].commit == 4 && !l.peers["s2"].telling
	})
	l.spread(members, 4)
	l.spread(members, 3)
	if f.count() != 2 {
		t.Error("told again of what is known")
	}
	// The entry is not there yet: told when it is, and never beyond what is there.
	l.spread(members, 9)
	await1(t, "told of 5", f.got.next, func() bool { return f.count() == 3 && f.last().LeaderCommitIndex == 5 })
	await1(t, "noted", l.followed.next, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.peers["s2"].commit == 5 && !l.peers["s2"].telling
	})
	send(entries(9, 2))
	await1(t, "told of 9", f.got.next, func() bool { return f.count() == 5 && f.last().LeaderCommitIndex == 9 })
	// Raft says it in time by itself: nothing to add.
	await1(t, "noted", l.followed.next, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.peers["s2"].commit == 9 && !l.peers["s2"].telling
	})
	natural := entries(12, 2)
	natural.LeaderCommitIndex = 11
	send(natural)
	l.spread(members, 11)
	if err := l.Close(); err != nil || f.count() != 6 {
		t.Errorf("%d messages, %v", f.count(), err)
	}
	l.begin(3)
	if index, followed := l.progress("s2", 3); index != 0 || !followed.IsZero() {
		t.Error("a new term remembers the old one's progress")
	}
}

func TestSilentLinkSendsNoAppends(t *testing.T) {
	f := &fakeTransport{append: func(raft.ServerID, *raft.AppendEntriesRequest) (bool, error) { return true, nil }}
	l := newLink(f, "s1", "a1")
	l.silent.Store(true)
	if err := l.AppendEntries("s2", "a2", entries(1, 1), &raft.AppendEntriesResponse{}); !errors.Is(err, errSilenced) {
		t.Errorf("append: %v", err)
	}
	l.beat(members, 1, time.Now())
	l.spread(members, 5)
	if err := l.Close(); err != nil || f.count() != 0 {
		t.Errorf("%d messages, %v", f.count(), err)
	}
	if _, err := l.AppendEntriesPipeline("s2", "a2"); !errors.Is(err, raft.ErrPipelineReplicationNotSupported) {
		t.Error("appends are pipelined")
	}
}

// Many readers share the confirmations.
func TestReadersShareRounds(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, r := range c.replicas {
		before := counterValue(t, r.metrics.readRounds)
		var wg sync.WaitGroup
		for range 500 {
			wg.Go(func() {
				if _, err := r.Linearizable(ctx); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if rounds := counterValue(t, r.metrics.readRounds) - before; rounds > 100 {
			t.Errorf("%s: %v rounds for 500 readers", r.name, rounds)
		}
	}
}
