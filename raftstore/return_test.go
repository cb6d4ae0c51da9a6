package raftstore

import (
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// The longer a follower was away, the longer raft waits before it sends the next
// entries. One that is back must not wait for that: it can't answer a read before.
func TestReturningFollowerIsServedAtOnce(t *testing.T) {
	c := newCluster(t, 3, nil)
	away := c.followers()[0]
	c.n.isolate(away.address)
	c.leader().mustPropose(put("k", "v"))
	pause(t.Context(), 4*time.Second) // raft's waits have grown to seconds by then
	c.n.heal(away.address)
	healed := time.Now()
	eventually(t, "the follower has it", func() error {
		if away.get("k") != "v" {
			return errors.New("missing")
		}
		return nil
	})
	if took := time.Since(healed); took > time.Second {
		t.Errorf("the entry came %s after the follower was back", took)
	}
}

// A failed append is answered when the peer follows again, or when it has no
// meaning any more.
func TestFailedAppendWaitsForThePeer(t *testing.T) {
	down := errors.New("down")
	up := make(chan struct{})
	f := &fakeTransport{append: func(_ raft.ServerID, args *raft.AppendEntriesRequest) (bool, error) {
		select {
		case <-up:
			return true, nil
		default:
			return false, down
		}
	}}
	l := newLink(f, "s1", "a1")
	leads := make(chan bool, 1)
	leads <- true
	l.leads = func(raft.ServerID, uint64) bool {
		is := <-leads
		leads <- is
		return is
	}
	send := func() <-chan error {
		failed := make(chan error, 1)
		go func() { failed <- l.AppendEntries("s2", "a2", entries(7, 3), &raft.AppendEntriesResponse{}) }()
		return failed
	}
	beat := func() error {
		return l.AppendEntries("s2", "a2", &raft.AppendEntriesRequest{Term: 3}, &raft.AppendEntriesResponse{})
	}
	failed := send()
	await1(t, "sent", f.got.next, func() bool { return f.count() == 1 })
	if err := beat(); !errors.Is(err, down) {
		t.Errorf("heartbeat: %v", err)
	}
	select {
	case err := <-failed:
		t.Fatalf("answered while the peer is away: %v", err)
	default:
	}
	close(up)
	if err := beat(); err != nil {
		t.Error(err)
	}
	if err := <-failed; !errors.Is(err, down) {
		t.Errorf("append: %v", err)
	}

	up = make(chan struct{})
	failed = send()
	<-leads
	leads <- false
	if err := <-failed; !errors.Is(err, down) {
		t.Errorf("append of one that leads no more: %v", err)
	}
}
