package raftstore

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestMembershipFromOneToFiveToThree(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	for i := range 4 {
		c.join(nil)
		c.replicas[i+1].mustPropose(put(fmt.Sprintf("m%d", i), "v"))
	}
	servers, err := c.replicas[4].Servers()
	if err != nil || len(servers) != 5 {
		t.Fatalf("servers %v, %v", servers, err)
	}
	for _, s := range servers {
		if !s.Voter {
			t.Errorf("%s has no vote", s.ID)
		}
	}
	// Removing the leader hands leadership over first, and is asked for again.
	old := c.leader()
	if err := old.Remove(ctx, old.id()); !errors.Is(err, ErrNotLeader) {
		t.Errorf("a leader removes itself: %v", err)
	}
	eventually(t, "the old leader is removed", func() error { return c.leader().Remove(ctx, old.id()) })
	old.shut()
	leaving := c.followers()[0]
	if err := c.asLeader(func(l *replica) error { return l.Demote(ctx, leaving.id()) }); err != nil {
		t.Fatal(err)
	}
	leaving.mustPropose(put("from a non-voter", "v"))
	if err := c.asLeader(func(l *replica) error { return l.Remove(ctx, leaving.id()) }); err != nil {
		t.Fatal(err)
	}
	if err := c.asLeader(func(l *replica) error { return l.Remove(ctx, leaving.id()) }); err != nil {
		t.Errorf("removing who is gone: %v", err)
	}
	leaving.shut()
	c.leader().mustPropose(put("three", "v"))
	c.sameState()
	if servers, _ := c.leader().Servers(); len(servers) != 3 {
		t.Errorf("servers %v", servers)
	}
}

func TestRemoveIsRefusedWhereQuorumWouldBreak(t *testing.T) {
	// Who leads must not change in between.
	c := newCluster(t, 3, func(cfg *Config) { cfg.Timing.Heartbeat = time.Second })
	ctx := within(t, patience)
	followers := c.followers()
	leader := c.leader()
	followers[0].kill()
	eventually(t, "refused", func() error {
		if err := leader.keepsQuorum(leader.reigning(), leader.servers(), followers[1].id(), false); !errors.Is(err, ErrQuorum) {
			return fmt.Errorf("not refused: %w", err)
		}
		return nil
	})
	if err := leader.Remove(ctx, followers[1].id()); !errors.Is(err, ErrQuorum) {
		t.Errorf("removing one of two that are there: %v", err)
	}
	if err := leader.Demote(ctx, followers[1].id()); !errors.Is(err, ErrQuorum) {
		t.Errorf("demoting one of two that are there: %v", err)
	}
	if err := leader.Remove(ctx, followers[0].id()); err != nil {
		t.Errorf("removing who is away: %v", err)
	}
	leader.mustPropose(put("still", "here"))
}

func TestPromoteNeedsTheLog(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	leader := c.leader()
	if err := leader.AddNonvoter(ctx, "away.i1", "127.0.0.1:1"); err != nil {
		t.Fatal(err)
	}
	if err := leader.Promote(ctx, "away.i1"); !errors.Is(err, ErrNotCaughtUp) {
		t.Errorf("promoting who was never there: %v", err)
	}
	if err := leader.Promote(ctx, "unknown"); !errors.Is(err, ErrUnknownServer) {
		t.Errorf("promoting a stranger: %v", err)
	}
	if err := leader.Remove(ctx, leader.id()); !errors.Is(err, ErrQuorum) {
		t.Errorf("removing the last voter: %v", err)
	}
	if err := leader.TransferLeadership(ctx, "away.i1"); err == nil {
		t.Error("leadership was handed to a non-voter")
	}
	leader.mustPropose(put("k", "v"))
}

func TestOrderlyStopHandsOver(t *testing.T) {
	const heartbeat = 1500 * time.Millisecond
	c := newCluster(t, 3, func(cfg *Config) { cfg.Timing.Heartbeat = heartbeat })
	old := c.leader()
	epoch := old.Epoch()
	old.shut()
	// No time-out has to pass: the next one was told to stand.
	start := time.Now()
	if now := c.leader().Epoch(); now != epoch+1 {
		t.Errorf("epoch %d after %d", now, epoch)
	}
	if took := time.Since(start); took > heartbeat/2 {
		t.Errorf("the next leader took %v", took)
	}
	if _, err := old.Propose(within(t, patience), put("k", "v")); !errors.Is(err, ErrClosed) {
		t.Errorf("a proposal to a store that has ended: %v", err)
	}
	if _, err := old.Linearizable(within(t, patience)); !errors.Is(err, ErrClosed) {
		t.Errorf("a read from a store that has ended: %v", err)
	}
}
