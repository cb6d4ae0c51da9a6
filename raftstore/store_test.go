package raftstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestReplicatesAndForwards(t *testing.T) {
	c := newCluster(t, 3, nil)
	for i, r := range c.replicas {
		key := fmt.Sprintf("k%d", i)
		resp := r.mustPropose(put(key, "v"))
		if !resp.Succeeded || resp.Revision < 2 {
			t.Errorf("%s: answer %v", r.name, resp)
		}
		if got := r.get(key); got != "v" {
			t.Errorf("%s does not read its own write: %q", r.name, got)
		}
	}
	c.sameState()
	for _, r := range c.replicas {
		_, err := r.Propose(within(t, patience), &pb.Txn{Success: []*pb.RequestOp{putOp("k", "v", 77)}})
		var refused *fsm.Error
		if !errors.As(err, &refused) || refused.Code != pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND {
			t.Errorf("%s: a put with an unknown lease: %v", r.name, err)
		}
	}
}

func TestManyCallersOnEveryReplica(t *testing.T) {
	c := newCluster(t, 3, nil)
	const callers, each = 48, 20
	ctx := within(t, patience)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			r := c.replicas[i%3]
			for j := range each {
				key := fmt.Sprintf("c%02d/%02d", i, j)
				if _, err := r.Propose(ctx, put(key, key)); err != nil {
					t.Errorf("%s: %v", key, err)
					return
				}
				if r.get(key) != key {
					t.Errorf("%s: not there after its acknowledgement", key)
				}
			}
		})
	}
	wg.Wait()
	c.sameState()
	resp, err := c.replicas[0].View().Range(&pb.RangeRequest{Key: []byte("c"), RangeEnd: []byte("d"), CountOnly: true})
	if err != nil || resp.Count != callers*each {
		t.Errorf("%d keys, %v", resp.GetCount(), err)
	}
}

func TestLeaderKilledAndRestarted(t *testing.T) {
	c := newCluster(t, 3, nil)
	old := c.leader()
	old.mustPropose(put("before", "1"))
	epoch := old.Epoch()
	old.kill()

	next := c.followers()[0]
	next.mustPropose(put("after", "2"))
	if now := c.leader().Epoch(); now <= epoch {
		t.Errorf("epoch %d after %d", now, epoch)
	}
	old.restart()
	eventually(t, "the old leader catches up", func() error {
		if old.get("after") != "2" || old.get("before") != "1" {
			return errors.New("keys are missing")
		}
		return nil
	})
	c.sameState()
}

func TestRestartOfAllFromDisk(t *testing.T) {
	for _, kind := range []LogKind{LogBolt, LogWAL} {
		t.Run(string(kind), func(t *testing.T) {
			c := newCluster(t, 3, func(cfg *Config) { cfg.Log = kind })
			for i := range 50 {
				c.replicas[i%3].mustPropose(put(fmt.Sprintf("k%02d", i), "v"))
			}
			if err := c.replicas[1].raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
			c.replicas[0].mustPropose(put("last", "v"))
			for _, r := range c.replicas {
				r.shut()
			}
			for _, r := range c.replicas {
				r.restart()
			}
			v, err := c.replicas[2].Linearizable(within(t, patience))
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := v.Get("last"); !ok {
				t.Error("the last write is lost")
			}
			c.sameState()
			for _, r := range c.replicas {
				if err := r.Bootstrap(); err == nil {
					t.Error("bootstrap of a directory with state succeeds")
				}
			}
		})
	}
}

func TestSnapshotForLaggingFollower(t *testing.T) {
	// Who leads must not change in between.
	c := newCluster(t, 3, func(cfg *Config) { cfg.Retention.TrailingEntries, cfg.Timing.Heartbeat = 1, time.Second })
	lagging := c.followers()[0]
	w := lagging.Watch(WatchRange{Key: []byte("k"), End: []byte("l"), After: lagging.View().Revision()})
	lagging.kill()
	leader := c.leader()
	for i := range 100 {
		leader.mustPropose(put(fmt.Sprintf("k%02d", i%10), fmt.Sprint(i)))
	}
	leader.mustPropose(&pb.Txn{Success: []*pb.RequestOp{{
		Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: leader.View().Revision() - 5}},
	}}})
	// A change of membership is the last entry: the snapshot's index is one that the
	// fsm has not seen.
	if err := leader.AddNonvoter(within(t, patience), "later.i1", "127.0.0.1:1"); err != nil {
		t.Fatal(err)
	}
	if err := leader.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	lagging.restart()
	v, err := lagging.Linearizable(within(t, patience))
	if err != nil {
		t.Fatal(err)
	}
	if kv, _ := v.Get("k09"); string(kv.GetValue()) != "99" {
		t.Errorf("k09 = %q", kv.GetValue())
	}
	c.sameState()
	w.s = lagging.Store
	_, _, err = w.Next(within(t, patience))
	var refused *fsm.Error
	if !errors.As(err, &refused) || refused.Code != pb.TxnError_TXN_ERROR_COMPACTED {
		t.Errorf("a watcher from before the snapshot gets %v", err)
	}
	lagging.mustPropose(put("k", "v"))
}

// Reads on every replica while writes go on and leaders come and go: a read never
// shows less than was acknowledged before it began.
func TestNoStaleReads(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.Timing.NoLeader = 2 * time.Second })
	ctx, cancel := context.WithCancel(within(t, patience))
	defer cancel()
	var acked sync.Map // replica name → highest counter acknowledged; one writer each
	floor := func() (n int64) {
		acked.Range(func(_, v any) bool { n += v.(int64); return true })
		return n
	}
	sum := func(v *fsm.View) (n int64) {
		for kv := range v.Scan("count/") {
			n += kv.Version
		}
		return n
	}
	var wg sync.WaitGroup
	for _, r := range c.replicas {
		wg.Go(func() {
			n := int64(0)
			for ctx.Err() == nil {
				if _, err := r.Propose(ctx, put("count/"+r.name, "x")); err == nil {
					n++
					acked.Store(r.name, n)
				}
			}
		})
	}
	reads := make([]int, len(c.replicas))
	for i, r := range c.replicas {
		wg.Go(func() {
			for ctx.Err() == nil {
				least := floor()
				v, err := r.Linearizable(ctx)
				if err != nil {
					continue
				}
				reads[i]++
				if got := sum(v); got < least {
					t.Errorf("%s: stale read: %d after %d were acknowledged", r.name, got, least)
					return
				}
			}
		})
	}
	for range 3 {
		leader := c.leader()
		before := floor()
		c.n.isolate(leader.address)
		eventually(t, "writes resume", func() error {
			if floor() < before+50 {
				return fmt.Errorf("%d of %d", floor(), before+50)
			}
			return nil
		})
		c.n.heal(leader.address)
		eventually(t, "the old leader follows", func() error {
			if id, _, _ := leader.Leader(); id == "" || id == leader.id() && !leader.IsLeader() {
				return ErrNoLeader
			}
			return nil
		})
	}
	cancel()
	wg.Wait()
	for i, n := range reads {
		if n < 20 {
			t.Errorf("replica %d served only %d reads", i+1, n)
		}
	}
	c.sameState()
}

func TestWatchAcrossLeaderChangeIsGapless(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx, cancel := context.WithCancel(within(t, patience))
	defer cancel()
	start := c.leader().View().Revision()
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			key := "w/" + fmt.Sprint(i%7)
			if i%3 == 0 {
				key = "other"
			}
			if _, err := c.replicas[i%3].Propose(ctx, put(key, fmt.Sprint(i))); err != nil {
				t.Errorf("write %d: %v", i, err)
				return
			}
		}
	})
	var seen [3][]string
	var last int64
	var mu sync.Mutex
	for i, r := range c.replicas {
		wg.Go(func() {
			w := r.Watch(WatchRange{Key: []byte("w/"), End: []byte("w0"), After: start})
			for {
				events, rev, err := w.Next(ctx)
				if err != nil {
					t.Errorf("watch: %v", err)
					return
				}
				for _, e := range events {
					if e.Kv.ModRevision > rev {
						t.Errorf("event of revision %d in an answer up to %d", e.Kv.ModRevision, rev)
					}
					seen[i] = append(seen[i], fmt.Sprintf("%d:%s=%s", e.Kv.ModRevision, e.Kv.Key, e.Kv.Value))
				}
				mu.Lock()
				end := last
				mu.Unlock()
				if end > 0 && w.Revision() >= end {
					return
				}
			}
		})
	}
	for range 2 {
		from := c.leader()
		if err := from.TransferLeadership(ctx, ""); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another leader", func() error {
			if c.leader() == from {
				return errors.New("still the same")
			}
			return nil
		})
	}
	eventually(t, "more changes", func() error {
		if rev := c.leader().View().Revision(); rev < start+200 {
			return fmt.Errorf("revision %d", rev)
		}
		return nil
	})
	close(stop)
	mu.Lock()
	last = c.leader().mustPropose(put("w/end", "")).Revision
	mu.Unlock()
	c.leader().mustPropose(put("w/end", "")) // wakes those who have seen up to last already
	wg.Wait()
	for i := range seen {
		if strings.Join(trim(seen[i], last), " ") != strings.Join(trim(seen[0], last), " ") {
			t.Errorf("replica %d saw other events than replica 1", i+1)
		}
	}
	if len(seen[0]) < 10 {
		t.Errorf("only %d events", len(seen[0]))
	}
}

// trim drops events after a revision.
func trim(events []string, last int64) []string {
	for i, e := range events {
		var rev int64
		fmt.Sscanf(e, "%d:", &rev)
		if rev > last {
			return events[:i]
		}
	}
	return events
}

// The answer is lost after the commit; the repetition must not apply again.
func TestLostAnswerIsNotAppliedTwice(t *testing.T) {
	c := newCluster(t, 3, nil)
	follower := c.followers()[0]
	lost := 0
	c.n.mu.Lock()
	c.n.lose = func(from, _ string) bool {
		lost++
		return lost <= 3
	}
	c.n.mu.Unlock()
	resp := follower.mustPropose(put("once", "x"))
	if kv, _ := follower.View().Get("once"); kv.GetVersion() != 1 {
		t.Errorf("applied %d times, with %d answers lost", kv.GetVersion(), lost)
	}
	if lost != 4 {
		t.Errorf("%d answers, 4 expected", lost)
	}
	if kv, _ := follower.View().Get("once"); kv.GetModRevision() != resp.Revision {
		t.Errorf("answer has revision %d, the key %d", resp.Revision, kv.GetModRevision())
	}
}

// Leaders are cut off under load from callers on all replicas. What they proposed
// and had in flight is found in the log again or proposed anew: nobody gets an
// error, and every counter shows each increment once.
func TestNothingTwiceAcrossLeaderChanges(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.Timing.NoLeader = patience })
	ctx, cancel := context.WithCancel(within(t, patience))
	defer cancel()
	const callers = 12
	var done [callers]int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := c.replicas[i%3].Propose(ctx, put(fmt.Sprintf("n/%02d", i), "")); err != nil {
					t.Errorf("caller %d: %v", i, err)
					return
				}
				done[i]++
			}
		})
	}
	for range 3 {
		leader := c.leader()
		c.n.isolate(leader.address)
		eventually(t, "another leader", func() error {
			if c.leader() == leader {
				return ErrNoLeader
			}
			return nil
		})
		c.n.heal(leader.address)
		if err := c.leader().TransferLeadership(ctx, ""); err != nil {
			t.Logf("transfer: %v", err)
		}
	}
	close(stop)
	wg.Wait()
	c.sameState()
	for i, n := range done {
		kv, _ := c.replicas[0].View().Get(fmt.Sprintf("n/%02d", i))
		if kv.GetVersion() != n {
			t.Errorf("caller %d: %d acknowledged, %d applied", i, n, kv.GetVersion())
		}
	}
}

func TestProposeAsLeaderIsFenced(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	old := c.leader()
	epoch := old.Epoch()
	conditional := func(key string) *pb.Txn {
		return &pb.Txn{
			Compare: []*pb.Compare{{Target: pb.Compare_VERSION, Key: []byte(key), TargetUnion: &pb.Compare_Version{Version: 0}}},
			Success: []*pb.RequestOp{putOp(key, "new", 0)},
			Failure: []*pb.RequestOp{putOp(key, "again", 0)},
		}
	}
	for _, want := range []bool{true, false} {
		r, err := old.ProposeAsLeader(ctx, epoch, conditional("a"))
		if err != nil || r.Succeeded != want || len(r.Responses) != 1 {
			t.Errorf("conditional put: %v, %v; want succeeded %v", r, err, want)
		}
	}
	if _, err := old.ProposeAsLeader(ctx, epoch, put("b", "1")); err != nil {
		t.Error(err)
	}
	if _, err := old.ProposeAsLeader(ctx, epoch-1, put("b", "2")); !errors.Is(err, ErrNotLeader) {
		t.Errorf("another epoch: %v", err)
	}
	if _, err := c.followers()[0].ProposeAsLeader(ctx, epoch, put("b", "3")); !errors.Is(err, ErrNotLeader) {
		t.Errorf("a follower: %v", err)
	}

	// Raft makes it leader again without its knowing: what it proposes for the old
	// epoch reaches the log and is refused there.
	was := old.leading.Load()
	if err := old.TransferLeadership(ctx, ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "leads again", func() error {
		if old.IsLeader() {
			return nil
		}
		return errors.Join(errors.New("not yet"), c.leader().TransferLeadership(ctx, old.id()))
	})
	now := old.leading.Load()
	old.leading.Store(&leadership{ctx: now.ctx, term: now.term, epoch: was.epoch, guard: was.guard, clock: now.clock})
	for _, txn := range []*pb.Txn{put("late", "x"), conditional("late")} {
		if _, err := old.ProposeAsLeader(ctx, epoch, txn); !errors.Is(err, ErrNotLeader) {
			t.Errorf("a deposed epoch: %v", err)
		}
	}
	old.leading.Store(now)
	if got := old.get("late"); got != "" {
		t.Errorf("a deposed leader wrote %q", got)
	}
}

func TestIdleClusterWritesNothing(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.Retention.Check = 20 * time.Millisecond })
	leader := c.leader()
	leader.mustPropose(&pb.Txn{Success: []*pb.RequestOp{grantOp(5, 3600), putOp("n", "", 5)}})
	c.sameState()
	before := leader.raft.LastIndex()
	ctx := within(t, patience)
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		for _, r := range c.replicas {
			if ttls, err := r.KeepAlive(ctx, 5, 6); err != nil || ttls[0] != 3600 || ttls[1] != 0 {
				t.Fatalf("%s: keep-alive: %v, %v", r.name, ttls, err)
			}
			if _, err := r.Linearizable(ctx); err != nil {
				t.Fatal(err)
			}
		}
		pause(ctx, 20*time.Millisecond)
	}
	if after := leader.raft.LastIndex(); after != before || c.leader() != leader {
		t.Errorf("an idle cluster wrote %d log entries", after-before)
	}
}

// An answer that is too long to be remembered is not given without what was read.
func TestRepeatedTransactionWithALongAnswer(t *testing.T) {
	c := newCluster(t, 1, nil)
	leader := c.leader()
	leader.mustPropose(put("long", strings.Repeat("x", fsm.MaxAnswer+1)))
	read := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("long")}}}
	txn := &pb.Txn{RequestId: []byte("id"), Success: []*pb.RequestOp{read, putOp("k", "v", 0)}}
	if r := leader.mustPropose(txn).Responses[0].GetResponseRange(); len(r.Kvs) != 1 {
		t.Errorf("at first: %d keys", len(r.Kvs))
	}
	if r, err := leader.Propose(within(t, patience), txn); !errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("once more: %v, %v", r, err)
	}
	if v, _ := leader.View().Get("k"); v.GetVersion() != 1 {
		t.Errorf("carried out %d times", v.GetVersion())
	}
}
