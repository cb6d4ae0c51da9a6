package raftstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hashicorp/raft"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func leaseTxn(id, ttl int64, key string) *pb.Txn {
	return &pb.Txn{Success: []*pb.RequestOp{grantOp(id, ttl), putOp(key, "x", id)}}
}

func gone(t *testing.T, r *replica, id int64, key string) {
	t.Helper()
	eventually(t, "the lease ends", func() error {
		v := r.View()
		_, lease := v.Lease(id)
		_, kv := v.Get(key)
		if lease || kv {
			return errors.New("still there")
		}
		return nil
	})
}

func TestLeaseExpiresWithItsKeys(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	follower := c.followers()[0]
	follower.mustPropose(leaseTxn(1, 1, "short"))
	follower.mustPropose(leaseTxn(2, 3600, "long"))
	left, err := follower.LeaseTimes(ctx, 1, 2, 3)
	if err != nil || left[0] > time.Second || left[1] < 3590*time.Second || left[2] != -1 {
		t.Errorf("times %v, %v", left, err)
	}
	// Kept alive beyond its time, from every replica.
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); {
		for _, r := range c.replicas {
			if ttls, err := r.KeepAlive(ctx, 1); err != nil || ttls[0] != 1 {
				t.Fatalf("%s: keep-alive %v, %v", r.name, ttls, err)
			}
		}
		pause(ctx, 50*time.Millisecond)
	}
	if follower.get("short") == "" {
		t.Fatal("a lease that was kept alive has ended")
	}
	gone(t, follower, 1, "short")
	if follower.get("long") == "" {
		t.Error("the other lease has ended too")
	}
	if ttls, err := follower.KeepAlive(ctx, 1, 2); err != nil || ttls[0] != 0 || ttls[1] != 3600 {
		t.Errorf("keep-alive of an ended lease: %v, %v", ttls, err)
	}
	c.leader().mustPropose(revokeLease(2))
	if ttls, err := follower.KeepAlive(ctx, 2); err != nil || ttls[0] != 0 {
		t.Errorf("keep-alive of a revoked lease: %v, %v", ttls, err)
	}
	// The same id may be granted again.
	follower.mustPropose(leaseTxn(2, 1, "long"))
	gone(t, follower, 2, "long")
}

func TestNewLeaderGivesEveryLeaseItsWholeTime(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	old := c.leader()
	old.mustPropose(leaseTxn(1, 30, "k"))
	// As if most of its time were over.
	clock := old.leading.Load().clock
	clock.mu.Lock()
	clock.stopped -= 25 * time.Second
	clock.mu.Unlock()
	if left, _ := old.LeaseTimes(ctx, 1); left[0] > 6*time.Second {
		t.Fatalf("%v left", left)
	}
	old.kill()
	left, err := c.leader().LeaseTimes(ctx, 1)
	if err != nil || left[0] < 20*time.Second {
		t.Errorf("%v left, %v", left, err)
	}
}

// A leader that was stopped while another one was elected finds all leases run out
// when it wakes. It must not end them, nor say that it keeps one alive.
func TestDeposedLeaderDoesNothingToLeases(t *testing.T) {
	c := newCluster(t, 3, nil)
	old := c.leader()
	old.mustPropose(leaseTxn(1, 600, "k"))
	was := old.leading.Load()
	c.n.isolate(old.address)
	eventually(t, "another leader", func() error {
		if c.leader() == old {
			return ErrNoLeader
		}
		return nil
	})
	// In its own eyes it still leads, and the lease is over.
	if err := old.endLeases(within(t, patience), was, []int64{1}); err != nil {
		t.Fatal(err)
	}
	if ttls, err := old.keepAlive(within(t, patience), was, []int64{1}); err == nil {
		t.Errorf("kept alive by a deposed leader: %v", ttls)
	}
	if left, err := old.leaseTimes(within(t, patience), was, []int64{1}); err == nil {
		t.Errorf("told by a deposed leader: %v", left)
	}
	c.n.heal(old.address)
	c.leader().mustPropose(put("more", ""))
	c.sameState()
	if old.get("k") == "" {
		t.Error("a deposed leader has ended a lease")
	}
}

func TestExpireLeaseOfTheCaller(t *testing.T) {
	refused := make(chan struct{}, 1)
	c := newCluster(t, 1, func(cfg *Config) {
		cfg.ExpireLease = func(v *fsm.View, l *pb.LeaseRecord) *pb.Txn {
			txn := revokeLease(l.Id)
			txn.Success = append(txn.Success, putOp("lost", "yes", 0))
			// Decided upon a state that has changed meanwhile, the first time.
			select {
			case refused <- struct{}{}:
				txn.Compare = []*pb.Compare{{
					Target: pb.Compare_VERSION, Key: []byte("k"), TargetUnion: &pb.Compare_Version{Version: 99},
				}}
			default:
			}
			return txn
		}
	})
	r := c.replicas[0]
	r.mustPropose(leaseTxn(1, 1, "k"))
	gone(t, r, 1, "k")
	if r.get("lost") != "yes" || len(refused) != 1 {
		t.Error("the transaction of the caller was not carried out")
	}
}

// A leader that was stopped finds that the time of all leases is over, but nobody
// could keep them alive meanwhile.
func TestLeaderThatWasStoppedGivesTheTimeBack(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	r.mustPropose(leaseTxn(1, 60, "k"))
	clock := r.leading.Load().clock
	clock.mu.Lock()
	clock.seen = clock.seen.Add(-time.Hour)
	for _, l := range clock.leases {
		l.deadline, l.queued = l.deadline.Add(-time.Hour), l.queued.Add(-time.Hour)
	}
	clock.mu.Unlock()
	clock.changed.fire()
	left, err := r.LeaseTimes(within(t, patience), 1)
	if err != nil || left[0] < 50*time.Second || left[0] > time.Minute+time.Second {
		t.Errorf("%v left, %v", left, err)
	}
	r.mustPropose(put("more", ""))
	if r.get("k") == "" {
		t.Error("the lease was ended")
	}
}

// The end of a lease and a new one of the same id may be applied together.
func TestLeaseRevokedAndGrantedAtOnce(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	r := c.replicas[0]
	again := func(ttl int64) *pb.Txn {
		return &pb.Txn{Success: append(revokeLease(1).Success, grantOp(1, ttl), putOp("k", "x", 1))}
	}
	r.mustPropose(leaseTxn(1, 60, "k"))
	r.mustPropose(again(3600))
	if left, err := r.LeaseTimes(ctx, 1); err != nil || left[0] < 3590*time.Second {
		t.Errorf("%v left, %v", left, err)
	}
	// The first is about to end when the second comes.
	clock := r.leading.Load().clock
	clock.mu.Lock()
	clock.leases[1].ending = true
	clock.mu.Unlock()
	r.mustPropose(again(1))
	gone(t, r, 1, "k")
}

// Whether a lease lives whose end is under way turns out only with it.
func TestKeepAliveOfALeaseThatIsAboutToEnd(t *testing.T) {
	proposed := make(chan func(*pb.Txn))
	c := newCluster(t, 1, func(cfg *Config) {
		cfg.ExpireLease = func(_ *fsm.View, l *pb.LeaseRecord) *pb.Txn {
			answer := make(chan *pb.Txn, 1)
			proposed <- func(txn *pb.Txn) { answer <- txn }
			return <-answer
		}
	})
	ctx := within(t, patience)
	r := c.replicas[0]
	r.mustPropose(leaseTxn(1, 1, "k"))
	type answer struct {
		ttls []int64
		err  error
	}
	for _, end := range []struct {
		txn  *pb.Txn
		want int64
	}{
		{&pb.Txn{Compare: []*pb.Compare{{Target: pb.Compare_VERSION, Key: []byte("k"), TargetUnion: &pb.Compare_Version{Version: 9}}}}, 1},
		{revokeLease(1), 0},
	} {
		decide := <-proposed
		answers := make(chan answer, 1)
		go func() {
			ttls, err := r.KeepAlive(ctx, 1)
			answers <- answer{ttls, err}
		}()
		if left, err := r.LeaseTimes(ctx, 1); err != nil || left[0] != 0 {
			t.Errorf("%v left, %v", left, err)
		}
		select {
		case a := <-answers:
			t.Fatalf("answered before it was decided: %v", a)
		default:
		}
		decide(end.txn)
		if a := <-answers; a.err != nil || a.ttls[0] != end.want {
			t.Errorf("keep-alive: %v, want %d", a, end.want)
		}
	}
}

func TestManyLeasesEndAtOnce(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	follower := c.followers()[0]
	const many = 2000
	for first := int64(1); first <= many; first += 500 {
		txn := &pb.Txn{}
		for id := first; id < first+500; id++ {
			txn.Success = append(txn.Success, grantOp(id, 1), putOp(fmt.Sprint("k", id), "x", id))
		}
		follower.mustPropose(txn)
	}
	follower.mustPropose(leaseTxn(many+1, 1, "kept"))
	eventually(t, "all have ended but one", func() error {
		if ttls, err := follower.KeepAlive(ctx, many+1); err != nil || ttls[0] != 1 {
			t.Fatalf("keep-alive: %v, %v", ttls, err)
		}
		follower.mustPropose(put("goes", "on"))
		if n := follower.View().Len(); n != 3 { // with the epoch
			return fmt.Errorf("%d keys", n)
		}
		return nil
	})
	if follower.get("kept") == "" {
		t.Error("the lease that was kept alive has ended")
	}
}

// Keep-alives that come together travel together, and each gets its own answer.
func TestKeepAlivesThroughAFollower(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	follower := c.followers()[0]
	const callers = 200
	txn := &pb.Txn{}
	for id := int64(1); id <= callers; id++ {
		txn.Success = append(txn.Success, grantOp(id, 100+id))
	}
	follower.mustPropose(txn)
	g, ctx := errgroup.WithContext(ctx)
	for id := int64(1); id <= callers; id++ {
		g.Go(func() error {
			for range 5 {
				ttls, err := follower.KeepAlive(ctx, id, callers+id)
				if err != nil || !slices.Equal(ttls, []int64{100 + id, 0}) {
					return fmt.Errorf("lease %d: %v, %v", id, ttls, err)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	given, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := follower.KeepAlive(given, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that has gone: %v", err)
	}
}

func testClock() *leaseClock { return newLeaseClock(slog.New(slog.DiscardHandler)) }

func TestLeaseClock(t *testing.T) {
	at := func(s float64) time.Time { return time.Unix(0, int64(s*1e9)) }
	c := testClock()
	c.mu.Lock()
	c.set(1, 10, at(0))
	c.set(2, 5, at(0))
	c.set(3, 20, at(0))
	c.set(1, 99, at(3)) // is there already
	c.mu.Unlock()
	if ids, next := c.due(at(1), 9); ids != nil || !next.Equal(at(5)) {
		t.Fatalf("due %v, next %v", ids, next)
	}
	if k := c.keepAlive([]int64{2, 7}, at(4)); !slices.Equal(k.ttls, []int64{5, 0}) || !k.missing || k.ending {
		t.Fatalf("kept alive: %+v", k)
	}
	c.keepAlive([]int64{2}, at(3)) // an older one that comes late
	if ids, next := c.due(at(5), 9); ids != nil || !next.Equal(at(9)) {
		t.Fatalf("due %v, next %v", ids, next)
	}
	ids, _ := c.due(at(10), 1)
	if !slices.Equal(ids, []int64{2}) {
		t.Fatalf("the first one due is %v", ids)
	}
	ids, next := c.due(at(10), 9)
	if !slices.Equal(ids, []int64{1}) || !next.Equal(at(20)) {
		t.Fatalf("due %v, next %v", ids, next)
	}
	if k := c.keepAlive([]int64{1}, at(10)); k.ttls[0] != 0 || !k.ending || k.missing {
		t.Error("a lease that ends was kept alive")
	}
	c.retry(1, at(12))
	if k := c.keepAlive([]int64{1}, at(11)); k.ttls[0] != 10 {
		t.Error("a lease that stays was not kept alive")
	}
	if left, missing := c.remaining([]int64{1, 7}, at(11)); !slices.Equal(left, []time.Duration{10 * time.Second, -1}) || !missing {
		t.Errorf("%v left", left)
	}
}

func TestLeaseClockStandsWhileTheProcessIsStopped(t *testing.T) {
	at := func(s float64) time.Time { return time.Unix(0, int64(s*1e9)) }
	c := testClock()
	c.mu.Lock()
	c.seen = at(0)
	c.set(1, 10, at(0))
	c.set(2, 5, at(0))
	c.mu.Unlock()
	walk := func(from, to float64) {
		for s := from; s < to; s += 0.1 {
			if ids, _ := c.due(at(s), 9); ids != nil {
				t.Fatalf("due at %v: %v", s, ids)
			}
		}
	}
	walk(0.1, 4)
	// Stopped at 4, it wakes at 104.
	if left, _ := c.remaining([]int64{1, 2}, at(104)); left[0] < 6*time.Second || left[1] < time.Second || left[0] > 7*time.Second {
		t.Errorf("%v left", left)
	}
	if ids, next := c.due(at(104), 9); ids != nil || next.Before(at(105)) || next.After(at(105.5)) {
		t.Errorf("due %v, next %v", ids, next)
	}
	walk(104.1, 105)
	for s := 105.0; ; s += 0.1 {
		if ids, _ := c.due(at(s), 9); slices.Equal(ids, []int64{2}) {
			break
		} else if ids != nil || s > 105.5 {
			t.Fatalf("due at %v: %v", s, ids)
		}
	}
}

func TestKeepAliveWithoutLeader(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.Timing.NoLeader = 300 * time.Millisecond })
	followers := c.followers()
	c.leader().kill()
	followers[0].kill()
	_, err := followers[1].KeepAlive(context.Background(), 1)
	if !errors.Is(err, ErrNoLeader) {
		t.Errorf("keep-alive: %v", err)
	}
	if _, err := followers[1].Propose(context.Background(), put("a", "b")); !errors.Is(err, ErrNoLeader) && !errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("propose: %v", err)
	}
	if _, err := followers[1].Propose(context.Background(), put("a", "b")); !errors.Is(err, ErrNoLeader) {
		t.Errorf("propose: %v", err)
	}
	if _, err := followers[1].Linearizable(context.Background()); !errors.Is(err, ErrNoLeader) {
		t.Errorf("read: %v", err)
	}
}

// Whom leadership is handed to is elected at once, while the others have just
// followed the old leader: from then on that one must ask whether it leads.
func TestLeaderThatHandsOverAsksBeforeItAnswers(t *testing.T) {
	c := newCluster(t, 3, nil)
	old := c.leader()
	l, ctx := old.leading.Load(), within(t, patience)
	if err := old.TransferLeadership(ctx, ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another leader", func() error {
		if c.leader() == old {
			return ErrNoLeader
		}
		return nil
	})
	var last time.Time
	for _, r := range c.replicas {
		if _, followed := old.link.progress(raft.ServerID(r.id()), l.term); followed.After(last) {
			last = followed
		}
	}
	if err := old.leadsFor(ctx, l, last.Add(time.Millisecond)); err == nil {
		t.Error("it takes itself for the leader without asking")
	}
}
