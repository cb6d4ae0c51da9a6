package raftstore

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

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
	l := old.leading.Load()
	l.clock.shift(-25 * time.Second)
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
// when it wakes. It must not end them.
func TestDeposedLeaderDoesNotRevoke(t *testing.T) {
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

func TestLeaseClock(t *testing.T) {
	at := func(s float64) time.Time { return time.Unix(0, int64(s*1e9)) }
	c := newLeaseClock()
	c.mu.Lock()
	c.set(1, 10, at(0))
	c.set(2, 5, at(0))
	c.set(3, 20, at(0))
	c.set(1, 99, at(3)) // is there already
	c.mu.Unlock()
	if ids, next := c.due(at(1)); ids != nil || !next.Equal(at(5)) {
		t.Fatalf("due %v, next %v", ids, next)
	}
	if ttl := c.keepAlive(2, at(4)); ttl != 5 {
		t.Fatalf("ttl %d", ttl)
	}
	if ids, next := c.due(at(5)); ids != nil || !next.Equal(at(9)) {
		t.Fatalf("due %v, next %v", ids, next)
	}
	ids, next := c.due(at(10))
	slices.Sort(ids)
	if !slices.Equal(ids, []int64{1, 2}) || !next.Equal(at(20)) {
		t.Fatalf("due %v, next %v", ids, next)
	}
	if ttl := c.keepAlive(1, at(10)); ttl != 0 {
		t.Error("a lease that ends was kept alive")
	}
	c.retry(1, at(12))
	if ttl := c.keepAlive(1, at(11)); ttl != 10 {
		t.Error("a lease that stays was not kept alive")
	}
	c.shift(100 * time.Second)
	if left, ok := c.remaining(1, at(11)); !ok || left != 110*time.Second {
		t.Errorf("%v left", left)
	}
	if ids, next := c.due(at(20)); ids != nil || !next.Equal(at(120)) {
		t.Errorf("due %v, next %v after a shift", ids, next)
	}
	c.drop(1)
	c.drop(3)
	if ids, next := c.due(at(500)); ids != nil || !next.IsZero() {
		t.Errorf("due %v, next %v when all are gone", ids, next)
	}
	if _, ok := c.remaining(1, at(0)); ok {
		t.Error("a dropped lease has time left")
	}
}

// The clock pulls leases forward only when they come up, so an id that is revoked
// and granted again has an old entry in the queue.
func TestLeaseClockGrantedAgain(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	c := newLeaseClock()
	grant := func(id, ttl, s int64) { c.mu.Lock(); c.set(id, ttl, at(s)); c.mu.Unlock() }
	grant(1, 5, 0)
	c.drop(1)
	grant(1, 50, 1)
	if ids, next := c.due(at(10)); ids != nil || !next.Equal(at(51)) {
		t.Errorf("due %v, next %v", ids, next)
	}
	if ids, _ := c.due(at(51)); len(ids) != 1 {
		t.Errorf("due %v", ids)
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
