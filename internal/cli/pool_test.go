package cli

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (x *trust) client(addresses ...string) *client {
	x.t.Helper()
	c := newClient(addresses, credentials.NewTLS(x.issue(pb.Role_ROLE_ADMIN, "admin", time.Hour).ClientTLS(nil, "h2")))
	x.t.Cleanup(c.pool.close)
	return c
}

// A command succeeds while one server answers, soon, whatever the others do.
func TestFailover(t *testing.T) {
	x := newTrust(t)
	noLeader := &fakeCluster{fail: status.Error(codes.Unavailable, "no leader")}
	for name, bad := range map[string]string{
		"dead": deadAddress(t), "frozen": frozenAddress(t), "without a leader": x.serve(noLeader), "of another cluster": newTrust(t).serve(&fakeCluster{}),
	} {
		t.Run(name, func(t *testing.T) {
			good := &fakeCluster{}
			c := x.client(bad, bad, x.serve(good))
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			begin := time.Now()
			for range 2 {
				if _, err := c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{}); err != nil {
					t.Fatal(err)
				}
			}
			if took := time.Since(begin); took > 3*time.Second {
				t.Errorf("took %s", took)
			}
			if n := good.called(pb.Cluster_GetClusterSummary_FullMethodName); n != 2 {
				t.Errorf("the good server was called %d times", n)
			}
		})
	}
	// The second call of a pool goes to the server that answered the first.
	if n := noLeader.called(pb.Cluster_GetClusterSummary_FullMethodName); n != 2 {
		t.Errorf("the server without a leader was called %d times by two entries of one pool", n)
	}
}

func TestServerDiesBetweenCalls(t *testing.T) {
	x := newTrust(t)
	first, second := &fakeCluster{}, &fakeCluster{}
	address, stop := x.serveUntil(first)
	c := x.client(address, x.serve(second))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{}); err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{}); err != nil {
		t.Fatal(err)
	}
	if n := second.called(pb.Cluster_GetClusterSummary_FullMethodName); n != 1 {
		t.Errorf("the second server was called %d times", n)
	}
}

// An election is waited for; a refusal is not repeated.
func TestUnavailableIsRepeatedAndRefusalIsNot(t *testing.T) {
	x := newTrust(t)
	electing := &fakeCluster{fail: status.Error(codes.Unavailable, "no leader"), failures: 3}
	c := x.client(x.serve(electing))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{}); err != nil {
		t.Fatal(err)
	}
	refusing := &fakeCluster{fail: status.Error(codes.PermissionDenied, "admin/x may not")}
	c = x.client(x.serve(refusing), x.serve(&fakeCluster{}))
	if _, err := c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{}); codeOf(err) != codes.PermissionDenied {
		t.Errorf("got %v", err)
	}
	if n := refusing.called(pb.Cluster_GetClusterSummary_FullMethodName); n != 1 {
		t.Errorf("called %d times", n)
	}
}

func TestNobodyAnswers(t *testing.T) {
	x := newTrust(t)
	a, b := deadAddress(t), deadAddress(t)
	c := x.client(a, b)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	begin := time.Now()
	_, err := c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{})
	if time.Since(begin) > 5*time.Second {
		t.Errorf("took %s", time.Since(begin))
	}
	if exitCode(err) != exitUnavailable {
		t.Errorf("exit code %d of %v", exitCode(err), err)
	}
	want := "no server answers: " + a + ": connection refused; " + b + ": connection refused"
	if message(err) != want {
		t.Errorf("got  %s\nwant %s", message(err), want)
	}
	// With somebody who may yet answer, the deadline is waited for.
	c = x.client(frozenAddress(t))
	ctx, cancel = context.WithTimeout(context.Background(), 700*time.Millisecond)
	defer cancel()
	_, err = c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{})
	if exitCode(err) != exitUnavailable || !strings.Contains(message(err), ": no answer; /readyz?verbose of a server says") {
		t.Errorf("got %d, %v", exitCode(err), err)
	}
	// A certificate that nobody accepts is named.
	c = newTrust(t).client(x.serve(&fakeCluster{}))
	_, err = c.cluster.GetClusterSummary(context.Background(), &pb.ClusterSummaryRequest{})
	if !strings.Contains(message(err), "certificate") {
		t.Errorf("got %s", message(err))
	}
}

func TestFollowGoesOnElsewhere(t *testing.T) {
	x := newTrust(t)
	events := func(ids ...string) []*pb.Event {
		var all []*pb.Event
		for _, id := range ids {
			all = append(all, &pb.Event{Id: id})
		}
		return all
	}
	first := &fakeCluster{events: events("1", "2"), breaks: true}
	second := &fakeCluster{events: events("1", "2", "3")}
	c := x.client(x.serve(first), x.serve(second))
	var got []string
	open := func(ctx context.Context) (grpc.ServerStreamingClient[pb.Event], error) {
		return c.cluster.WatchEvents(ctx, &pb.WatchEventsRequest{})
	}
	err := follow(context.Background(), c.pool, open, func(e *pb.Event) (bool, error) {
		got = append(got, e.Id)
		return false, nil
	})
	if err != nil || strings.Join(got, " ") != "1 2 1 2 3" {
		t.Errorf("got %v, %v", got, err)
	}
	stop := errors.New("enough")
	if err := follow(context.Background(), c.pool, open, func(*pb.Event) (bool, error) { return false, stop }); err != stop {
		t.Errorf("got %v", err)
	}
}

func TestErrorsNameTheirThingOnce(t *testing.T) {
	for said, want := range map[string]string{
		"not found":                  `workload "web": not found`,
		`there is no workload "web"`: `there is no workload "web"`,
		"a web of lies":              `workload "web": a web of lies`,
	} {
		err := about("workload", "web", status.Error(codes.NotFound, said))
		if message(err) != want || exitCode(err) != exitNotFound {
			t.Errorf("got %q, %d", message(err), exitCode(err))
		}
	}
}
