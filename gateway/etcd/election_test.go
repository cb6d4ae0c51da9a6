package etcd

import (
	"context"
	"fmt"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/proto/etcd/v3electionpb"
)

func electionService(client *clientv3.Client) v3electionpb.ElectionClient {
	return v3electionpb.NewElectionClient(client.ActiveConnection())
}

// observed takes the next proclamation that an observer sees.
func observed(t testing.TB, ctx context.Context, seen <-chan *clientv3.GetResponse) string {
	t.Helper()
	select {
	case answer, ok := <-seen:
		if !ok || len(answer.Kvs) != 1 {
			t.Fatalf("observed %v", answer)
		}
		return string(answer.Kvs[0].Value)
	case <-ctx.Done():
		t.Fatal("nothing was observed")
	}
	return ""
}

// Two candidates at all replicas; the leader of the cluster is killed while one
// leads the election and the other waits.
func TestElection(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, 2*patience)
	client := c.client()
	one := concurrency.NewElection(newSession(t, client), "vote")
	other := concurrency.NewElection(newSession(t, c.client()), "vote")
	if _, err := one.Leader(ctx); err != concurrency.ErrElectionNoLeader {
		t.Errorf("before anybody campaigns: %v", err)
	}
	observer := concurrency.NewElection(newSession(t, c.client()), "vote")
	seen := observer.Observe(ctx)
	if err := one.Campaign(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	if got := observed(t, ctx, seen); got != "one" {
		t.Errorf("observed %q", got)
	}
	won := make(chan error, 1)
	go func() { won <- other.Campaign(ctx, "other") }()
	awaitWaiters(t, ctx, client, "vote", 2)

	killed := c.leader()
	killed.kill()
	c.leader()
	if err := insist(ctx, func() error { return one.Proclaim(ctx, "one, still") }); err != nil {
		t.Fatal(err)
	}
	if got := observed(t, ctx, seen); got != "one, still" {
		t.Errorf("observed %q", got)
	}
	select {
	case err := <-won:
		t.Fatalf("two lead: %v", err)
	default:
	}
	if leader, err := other.Leader(ctx); err != nil || string(leader.Kvs[0].Value) != "one, still" {
		t.Errorf("leader: %v, %v", leader, err)
	}
	killed.start(c, false)
	if err := one.Resign(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-won; err != nil {
		t.Fatal(err)
	}
	if got := observed(t, ctx, seen); got != "other" {
		t.Errorf("observed %q", got)
	}
	if err := one.Proclaim(ctx, "late"); err != concurrency.ErrElectionNotLeader {
		t.Errorf("proclaimed by who resigned: %v", err)
	}
	if err := other.Resign(ctx); err != nil {
		t.Error(err)
	}
}

func TestElectionService(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	leader, follower := c.client(c.leader().endpoint), c.client(c.follower().endpoint)
	name := []byte("vote")
	if _, err := electionService(leader).Leader(ctx, &v3electionpb.LeaderRequest{Name: name}); status.Convert(err).Message() != "election: no leader" {
		t.Errorf("before anybody campaigns: %v", err)
	}
	stream, err := electionService(follower).Observe(ctx, &v3electionpb.LeaderRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	see := func(want string) {
		t.Helper()
		got, err := stream.Recv()
		if err != nil || string(got.Kv.Value) != want || got.Header.Revision < got.Kv.ModRevision || got.Header.MemberId == 0 {
			t.Fatalf("observed %v, %v, want %q", got, err, want)
		}
	}
	session := newSession(t, leader)
	won, err := electionService(follower).Campaign(ctx, &v3electionpb.CampaignRequest{Name: name, Lease: int64(session.Lease()), Value: []byte("one")})
	if err != nil {
		t.Fatal(err)
	}
	if key := fmt.Sprintf("vote/%x", session.Lease()); string(won.Leader.Key) != key || string(won.Leader.Name) != "vote" ||
		won.Leader.Rev != won.Header.Revision || won.Leader.Lease != int64(session.Lease()) {
		t.Errorf("won: %v", won)
	}
	see("one")
	// Campaigning again with the lease proclaims.
	again, err := electionService(leader).Campaign(ctx, &v3electionpb.CampaignRequest{Name: name, Lease: int64(session.Lease()), Value: []byte("two")})
	if err != nil || again.Leader.Rev != won.Leader.Rev {
		t.Errorf("again: %v, %v", again, err)
	}
	see("two")
	for _, value := range []string{"three", "four"} {
		if _, err := electionService(leader).Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: won.Leader, Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
		see(value)
	}
	answer, err := electionService(follower).Leader(ctx, &v3electionpb.LeaderRequest{Name: name})
	if err != nil || string(answer.Kv.Value) != "four" || answer.Kv.Lease != int64(session.Lease()) {
		t.Errorf("leader: %v, %v", answer, err)
	}

	// A client that campaigns by itself waits for the service's leader.
	own := concurrency.NewElection(newSession(t, leader), "vote")
	elected := make(chan error, 1)
	go func() { elected <- own.Campaign(ctx, "own") }()
	awaitWaiters(t, ctx, leader, "vote", 2)
	// One that gives up leaves the queue.
	given, giveUp := context.WithCancel(ctx)
	gone := make(chan error, 1)
	go func() {
		_, err := electionService(follower).Campaign(given, &v3electionpb.CampaignRequest{Name: name})
		gone <- err
	}()
	awaitWaiters(t, ctx, leader, "vote", 3)
	giveUp()
	if err := <-gone; status.Code(err) != codes.Canceled {
		t.Errorf("given up: %v", err)
	}
	awaitWaiters(t, ctx, leader, "vote", 2)
	// One whose lease ends has not won.
	ending := newSession(t, leader)
	go func() {
		_, err := electionService(follower).Campaign(ctx, &v3electionpb.CampaignRequest{Name: name, Lease: int64(ending.Lease())})
		gone <- err
	}()
	awaitWaiters(t, ctx, leader, "vote", 3)
	if _, err := leader.Revoke(ctx, ending.Lease()); err != nil {
		t.Fatal(err)
	}

	if _, err := electionService(follower).Resign(ctx, &v3electionpb.ResignRequest{Leader: won.Leader}); err != nil {
		t.Fatal(err)
	}
	if err := <-elected; err != nil {
		t.Fatal(err)
	}
	see("own")
	if _, err := electionService(leader).Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: won.Leader, Value: []byte("late")}); status.Convert(err).Message() != "election: not leader" {
		t.Errorf("proclaimed by who resigned: %v", err)
	}
	if _, err := electionService(leader).Resign(ctx, &v3electionpb.ResignRequest{Leader: won.Leader}); err != nil {
		t.Errorf("resigned again: %v", err)
	}
	if err := own.Resign(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-gone; status.Convert(err).Message() != "election: session is expired" {
		t.Errorf("won with a lease that has ended: %v", err)
	}
	for _, err := range []error{
		errOf(electionService(leader).Proclaim(ctx, &v3electionpb.ProclaimRequest{})),
		errOf(electionService(leader).Resign(ctx, &v3electionpb.ResignRequest{})),
	} {
		if status.Convert(err).Message() != `"leader" field must be provided` {
			t.Errorf("without a leader: %v", err)
		}
	}
}
