package raftstore

import (
	"context"
	"testing"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// A follower's question confirms the leader where the two are a majority and the
// follower was in the leader's term; nothing else spares the leader its own round.
func TestFollowersQuestionConfirmsTheLeader(t *testing.T) {
	c := newCluster(t, 3, nil)
	leader, follower := c.leader(), c.followers()[0]
	ask := func(member string, term uint64) (shared bool) {
		t.Helper()
		before := counterValue(t, leader.metrics.readRounds)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		r, err := leader.Service().ReadIndex(ctx, &pb.ReadIndexRequest{MemberId: member, Term: term})
		if err != nil || r.Index == 0 {
			t.Fatalf("%v, %v", r, err)
		}
		return counterValue(t, leader.metrics.readRounds) > before
	}
	term := leader.Term()
	for _, q := range []struct {
		name, member string
		term         uint64
		shared       bool
	}{
		{"a voter in the same term", follower.id(), term, false},
		{"a voter in an older term", follower.id(), term - 1, true},
		{"a voter in a newer term", follower.id(), term + 1, true},
		{"nobody known", "s9.i1", term, true},
		{"the leader itself", leader.id(), term, true},
		{"an older version", "", 0, true},
	} {
		if shared := ask(q.member, q.term); shared != q.shared {
			t.Errorf("%s: the leader asked others: %v", q.name, shared)
		}
	}
	learner := c.join(nil)
	if !ask(learner.id(), term) {
		t.Error("a non-voter confirms")
	}
}

// Five voters need a third.
func TestFollowersQuestionIsNotEnoughForFive(t *testing.T) {
	c := newCluster(t, 5, nil)
	leader, follower := c.leader(), c.followers()[0]
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	before := counterValue(t, leader.metrics.readRounds)
	if _, err := leader.Service().ReadIndex(ctx, &pb.ReadIndexRequest{MemberId: follower.id(), Term: leader.Term()}); err != nil {
		t.Fatal(err)
	}
	if counterValue(t, leader.metrics.readRounds) == before {
		t.Error("two of five confirm")
	}
}
