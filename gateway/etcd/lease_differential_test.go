package etcd

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/proto/etcd/v3electionpb"
	"github.com/persys-dev/persys/proto/etcd/v3lockpb"
)

// What leases, locks and elections answer is what etcd answers, revisions included.
func TestLeasesAsEtcd(t *testing.T) {
	theirs := dial(t, startEtcd(t))
	ours := dial(t, newCluster(t, 1, nil).replicas[0].endpoint)
	ctx := within(t, patience)
	// Both begin at one revision.
	offset := revisionOf(t, ctx, ours) - revisionOf(t, ctx, theirs)
	for _, step := range leaseSteps() {
		want, wantErr := step.do(ctx, theirs)
		got, gotErr := step.do(ctx, ours)
		if w, g := said(want, wantErr, 0), said(got, gotErr, offset); w != g {
			t.Errorf("%s: etcd: %s; here: %s", step.name, w, g)
		}
	}
}

func revisionOf(t *testing.T, ctx context.Context, conn *grpc.ClientConn) int64 {
	t.Helper()
	answer, err := etcdpb.NewKVClient(conn).Range(ctx, &etcdpb.RangeRequest{Key: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	return answer.Header.Revision
}

type headed interface{ GetHeader() *etcdpb.ResponseHeader }

// said is an answer without what differs between clusters.
func said(answer headed, err error, offset int64) string {
	if err != nil {
		// As etcd's services of locks and elections are its own clients, they answer
		// without a code what they were answered with one.
		return "error " + strings.TrimSpace(status.Convert(err).Message())
	}
	revision := answer.GetHeader().GetRevision() - offset
	if _, ok := answer.(*v3electionpb.CampaignResponse); ok {
		revision = 0 // a candidate who comes again reads there, then writes; here it is one step
	}
	return fmt.Sprint(revision, " ", strings.Join(fieldsOf(answer), " "))
}

func fieldsOf(answer headed) []string {
	switch a := answer.(type) {
	case *etcdpb.LeaseGrantResponse:
		return []string{fmt.Sprint(a.ID, a.TTL, a.Error)}
	case *etcdpb.LeaseTimeToLiveResponse:
		slices.SortFunc(a.Keys, bytes.Compare) // etcd's are in any order
		return []string{fmt.Sprint(a.ID, a.GrantedTTL, a.TTL > 0, a.TTL), fmt.Sprintf("%s", a.Keys)}
	case *etcdpb.LeaseKeepAliveResponse:
		return []string{fmt.Sprint(a.ID, a.TTL)}
	case *etcdpb.LeaseLeasesResponse:
		var ids []string
		for _, l := range a.Leases {
			ids = append(ids, fmt.Sprint(l.ID))
		}
		return ids
	case *v3lockpb.LockResponse:
		return []string{string(a.Key)}
	case *v3electionpb.CampaignResponse:
		return []string{string(a.Leader.Name), string(a.Leader.Key), fmt.Sprint(a.Leader.Lease)}
	case *v3electionpb.LeaderResponse:
		return []string{string(a.Kv.Key), string(a.Kv.Value), fmt.Sprint(a.Kv.Lease, a.Kv.Version)}
	}
	return nil
}

type leaseStep struct {
	name string
	do   func(context.Context, *grpc.ClientConn) (headed, error)
}

func leaseSteps() []leaseStep {
	var steps []leaseStep
	add := func(name string, do func(context.Context, *grpc.ClientConn) (headed, error)) {
		steps = append(steps, leaseStep{name, do})
	}
	grant := func(id, ttl int64) {
		add(fmt.Sprintf("grant %d of %d s", id, ttl), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(etcdpb.NewLeaseClient(c).LeaseGrant(ctx, &etcdpb.LeaseGrantRequest{ID: id, TTL: ttl}))
		})
	}
	revoke := func(id int64) {
		add(fmt.Sprint("revoke ", id), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(etcdpb.NewLeaseClient(c).LeaseRevoke(ctx, &etcdpb.LeaseRevokeRequest{ID: id}))
		})
	}
	time := func(id int64) {
		add(fmt.Sprint("time of ", id), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(etcdpb.NewLeaseClient(c).LeaseTimeToLive(ctx, &etcdpb.LeaseTimeToLiveRequest{ID: id, Keys: true}))
		})
	}
	keep := func(id int64) {
		add(fmt.Sprint("keep alive ", id), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			stream, err := etcdpb.NewLeaseClient(c).LeaseKeepAlive(ctx)
			if err != nil {
				return nil, err
			}
			if err := stream.Send(&etcdpb.LeaseKeepAliveRequest{ID: id}); err != nil {
				return nil, err
			}
			return answered(stream.Recv())
		})
	}
	put := func(key string, lease int64, change func(*etcdpb.PutRequest)) {
		add(fmt.Sprint("put ", key, " with ", lease), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			r := &etcdpb.PutRequest{Key: []byte(key), Value: []byte("v"), Lease: lease}
			change(r)
			return answered(etcdpb.NewKVClient(c).Put(ctx, r))
		})
	}
	plain := func(*etcdpb.PutRequest) {}
	get := func(key string) {
		add("get "+key, func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			r, err := etcdpb.NewKVClient(c).Range(ctx, &etcdpb.RangeRequest{Key: []byte(key)})
			if err != nil || len(r.Kvs) == 0 {
				return r, err
			}
			return &v3electionpb.LeaderResponse{Header: r.Header, Kv: r.Kvs[0]}, nil
		})
	}
	lock := func(name string, lease int64) {
		add(fmt.Sprint("lock ", name, " with ", lease), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(v3lockpb.NewLockClient(c).Lock(ctx, &v3lockpb.LockRequest{Name: []byte(name), Lease: lease}))
		})
	}
	unlock := func(key string) {
		add("unlock "+key, func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(v3lockpb.NewLockClient(c).Unlock(ctx, &v3lockpb.UnlockRequest{Key: []byte(key)}))
		})
	}
	campaign := func(name string, lease int64, value string) {
		add(fmt.Sprint("campaign ", name, " with ", lease), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(v3electionpb.NewElectionClient(c).Campaign(ctx, &v3electionpb.CampaignRequest{Name: []byte(name), Lease: lease, Value: []byte(value)}))
		})
	}
	leader := func(name string) {
		add("leader "+name, func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(v3electionpb.NewElectionClient(c).Leader(ctx, &v3electionpb.LeaderRequest{Name: []byte(name)}))
		})
	}
	proclaim := func(key *v3electionpb.LeaderKey) {
		add(fmt.Sprint("proclaim ", key), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(v3electionpb.NewElectionClient(c).Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: key, Value: []byte("new")}))
		})
	}
	resign := func(key *v3electionpb.LeaderKey) {
		add(fmt.Sprint("resign ", key), func(ctx context.Context, c *grpc.ClientConn) (headed, error) {
			return answered(v3electionpb.NewElectionClient(c).Resign(ctx, &v3electionpb.ResignRequest{Leader: key}))
		})
	}

	for _, id := range []int64{7, -7} {
		grant(id, 100)
		grant(id, 100)
		keep(id)
		time(id)
	}
	grant(8, 0)
	grant(9, -5)
	grant(10, 1)
	grant(11, 9_000_000_000)
	grant(12, 9_000_000_001)
	for _, id := range []int64{0, 99, -99} {
		revoke(id)
		time(id)
		keep(id)
		put("k", id, plain)
	}
	put("b", 7, plain)
	put("a", 7, plain)
	put("c", 7, plain)
	put("c", 11, plain)
	put("b", 0, func(r *etcdpb.PutRequest) { r.IgnoreLease = true })
	put("b", 7, func(r *etcdpb.PutRequest) { r.IgnoreLease = true })
	time(7)
	time(11)
	put("a", 0, plain)
	time(7)
	get("b")
	revoke(7)
	revoke(7)
	get("b")
	get("a")
	get("c")
	time(7)
	grant(7, 50)
	time(7)
	lock("lock", 7)
	lock("lock", 99)
	get("lock/7")
	unlock("lock/7")
	unlock("lock/7")
	unlock("")
	lock("/mine", 7)
	unlock("/mine/7")
	leader("vote")
	campaign("vote", 99, "x")
	campaign("vote", 7, "x")
	campaign("vote", 7, "y")
	leader("vote")
	proclaim(nil)
	proclaim(&v3electionpb.LeaderKey{Name: []byte("vote"), Key: []byte("vote/7"), Rev: 1, Lease: 7})
	resign(nil)
	resign(&v3electionpb.LeaderKey{Name: []byte("vote"), Key: []byte("vote/7"), Rev: 1, Lease: 7})
	leader("vote")
	revoke(7)
	leader("vote")
	return steps
}

// answered keeps a nil answer from becoming one that is not nil.
func answered[T headed](answer T, err error) (headed, error) {
	if err != nil {
		return nil, err
	}
	return answer, nil
}
