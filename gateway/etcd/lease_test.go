package etcd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func grantWithID(ctx context.Context, c *clientv3.Client, id, ttl int64) (*etcdpb.LeaseGrantResponse, error) {
	answer, err := clientv3.RetryLeaseClient(c).LeaseGrant(ctx, &etcdpb.LeaseGrantRequest{ID: id, TTL: ttl})
	return answer, rpctypes.Error(err)
}

func TestLeaseGrant(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	for _, r := range c.replicas {
		client := c.client(r.endpoint)
		chosen := int64(r.etcd.config.Member)
		for _, test := range []struct {
			id, ttl, want int64
			err           error
		}{
			{ttl: 60, want: 60},
			{ttl: 1, want: 2},
			{ttl: 0, want: 2},
			{ttl: -7, want: 2},
			{ttl: 9_000_000_000, want: 9_000_000_000},
			{ttl: 9_000_000_001, err: rpctypes.ErrLeaseTTLTooLarge},
			{id: chosen, ttl: 60, want: 60},
			{id: chosen, ttl: 60, err: rpctypes.ErrLeaseExist},
			{id: -chosen, ttl: 60, want: 60},
		} {
			answer, err := grantWithID(ctx, client, test.id, test.ttl)
			if !errors.Is(err, test.err) {
				t.Errorf("%s: grant %d of %d s: %v, want %v", r.name, test.id, test.ttl, err, test.err)
			}
			if err != nil {
				continue
			}
			if answer.TTL != test.want || test.id != 0 && answer.ID != test.id || test.id == 0 && answer.ID <= 0 ||
				answer.Header.MemberId != r.etcd.config.Member || answer.Header.Revision == 0 {
				t.Errorf("%s: grant %d of %d s: %v", r.name, test.id, test.ttl, answer)
			}
		}
	}
}

func TestLeaseFloorIsConfigured(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.MinLeaseTTL = 4100 * time.Millisecond })
	answer, err := c.client().Grant(within(t, patience), 3)
	if err != nil || answer.TTL != 5 {
		t.Errorf("granted %v, %v", answer, err)
	}
}

func TestLeaseOfNobody(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	for _, r := range c.replicas {
		client := c.client(r.endpoint)
		for _, id := range []clientv3.LeaseID{0, 12345, -1} {
			if _, err := client.Revoke(ctx, id); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
				t.Errorf("revoke %d: %v", id, err)
			}
			if _, err := client.KeepAliveOnce(ctx, id); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
				t.Errorf("keep %d alive: %v", id, err)
			}
			left, err := client.TimeToLive(ctx, id, clientv3.WithAttachedKeys())
			if err != nil || left.TTL != -1 || left.GrantedTTL != 0 || left.ID != id || len(left.Keys) > 0 || left.Revision == 0 {
				t.Errorf("time of %d: %v, %v", id, left, err)
			}
		}
		if _, err := client.Put(ctx, "k", "v", clientv3.WithLease(12345)); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			t.Errorf("put: %v", err)
		}
		if all, err := client.Leases(ctx); err != nil || len(all.Leases) > 0 {
			t.Errorf("leases: %v, %v", all, err)
		}
	}
}

// All keys go in one revision, in key order, and so does what watchers are told.
func TestLeaseRevokeAndExpiry(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	client := c.client()
	for name, end := range map[string]func(clientv3.LeaseID){
		"revoke": func(id clientv3.LeaseID) {
			answer, err := client.Revoke(ctx, id)
			if err != nil || answer.Header.Revision == 0 {
				t.Errorf("revoke: %v, %v", answer, err)
			}
		},
		"expiry": func(clientv3.LeaseID) {},
	} {
		t.Run(name, func(t *testing.T) {
			granted, err := client.Grant(ctx, 2)
			if err != nil {
				t.Fatal(err)
			}
			changes := client.Watch(ctx, name, clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithCreatedNotify())
			<-changes
			keys := []string{name + "/a", name + "/b", name + "/c"}
			for _, key := range append(slices.Clone(keys), name+"/moved") {
				if _, err := client.Put(ctx, key, "v", clientv3.WithLease(granted.ID)); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := client.Put(ctx, name+"/moved", "v"); err != nil {
				t.Fatal(err)
			}
			end(granted.ID)
			var got []string
			var revisions []int64
			for len(got) < len(keys) {
				for _, e := range (<-changes).Events {
					got, revisions = append(got, string(e.Kv.Key)), append(revisions, e.Kv.ModRevision)
				}
			}
			if !slices.Equal(got, keys) || len(slices.Compact(revisions)) != 1 {
				t.Errorf("%q at %v", got, revisions)
			}
			rest, err := client.Get(ctx, name, clientv3.WithPrefix())
			if err != nil || len(rest.Kvs) != 1 || rest.Kvs[0].Lease != 0 {
				t.Errorf("left: %v, %v", rest, err)
			}
			if left, err := client.TimeToLive(ctx, granted.ID); err != nil || left.TTL != -1 {
				t.Errorf("time: %v, %v", left, err)
			}
		})
	}
}

func TestLeaseTimeToLiveAndLeases(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	leader := c.client(c.leader().endpoint)
	var ids []clientv3.LeaseID
	for ttl := int64(100); ttl < 500; ttl += 100 {
		granted, err := leader.Grant(ctx, ttl)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, granted.ID)
	}
	var put *clientv3.PutResponse
	for _, key := range []string{"b", "a", "c"} {
		var err error
		if put, err = leader.Put(ctx, key, "v", clientv3.WithLease(ids[1])); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range c.replicas {
		client := c.client(r.endpoint)
		all, err := client.Leases(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var got []clientv3.LeaseID
		for _, l := range all.Leases {
			got = append(got, l.ID)
		}
		if !slices.Equal(got, ids) {
			t.Errorf("%s: leases %v, want %v: in the order of their ends", r.name, got, ids)
		}
		left, err := client.TimeToLive(ctx, ids[1], clientv3.WithAttachedKeys())
		if err != nil {
			t.Fatal(err)
		}
		if left.GrantedTTL != 200 || left.TTL > 200 || left.TTL < 100 || left.ID != ids[1] || left.Revision < put.Header.Revision ||
			fmt.Sprintf("%s", left.Keys) != "[a b c]" {
			t.Errorf("%s: %+v with %s", r.name, left, left.Keys)
		}
		if left, err = client.TimeToLive(ctx, ids[1]); err != nil || len(left.Keys) > 0 {
			t.Errorf("%s: keys that were not asked for: %v, %v", r.name, left, err)
		}
	}
}

// A client at every replica keeps a lease alive while leaders are killed one after
// the other.
func TestLeaseIsKeptAliveThroughTheLossOfLeaders(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, 2*patience)
	client := c.client()
	granted, err := client.Grant(ctx, 5)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(ctx, "k", "v", clientv3.WithLease(granted.ID)); err != nil {
		t.Fatal(err)
	}
	alive, err := client.KeepAlive(ctx, granted.ID)
	if err != nil {
		t.Fatal(err)
	}
	kept := func() {
		t.Helper()
		if answer, ok := <-alive; !ok || answer.TTL != 5 {
			t.Fatalf("the lease was lost: %v", answer)
		}
	}
	for range 3 {
		kept()
		leader := c.leader()
		leader.kill()
		c.leader()
		kept()
		kept()
		leader.start(c, false)
	}
	if got, err := client.Get(ctx, "k"); err != nil || len(got.Kvs) != 1 {
		t.Errorf("the key: %v, %v", got, err)
	}
}

func TestLeasesSurviveARestartOfAll(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, 2*patience)
	client := c.client()
	for id, ttl := range map[int64]int64{1: 2, 2: 600} {
		if _, err := grantWithID(ctx, client, id, ttl); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Put(ctx, fmt.Sprint("k", id), "v", clientv3.WithLease(clientv3.LeaseID(id))); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range c.replicas {
		r.kill()
	}
	for _, r := range c.replicas {
		r.start(c, false)
	}
	c.leader()
	client = c.client()
	left, err := client.TimeToLive(ctx, 2, clientv3.WithAttachedKeys())
	if err != nil || left.TTL < 590 || left.TTL > 600 || len(left.Keys) != 1 {
		t.Errorf("time: %v, %v", left, err)
	}
	eventually(t, "the short lease ends", func() error {
		got, err := client.Get(ctx, "k", clientv3.WithPrefix())
		if err != nil || len(got.Kvs) != 1 || string(got.Kvs[0].Key) != "k2" {
			return fmt.Errorf("%v, %v", got, err)
		}
		return nil
	})
}

// Requests that come together are answered in their order, each with its own lease.
func TestLeaseKeepAliveOfManyOnOneStream(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	const many = 500
	leader := c.client(c.leader().endpoint)
	for id := int64(1); id <= many; id++ {
		if _, err := grantWithID(ctx, leader, id, 1000+id); err != nil {
			t.Fatal(err)
		}
	}
	follower := c.client(c.follower().endpoint)
	stream, err := etcdpb.NewLeaseClient(follower.ActiveConnection()).LeaseKeepAlive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		for id := int64(1); id <= many+1; id++ {
			if err := stream.Send(&etcdpb.LeaseKeepAliveRequest{ID: id}); err != nil {
				sent <- err
				return
			}
		}
		sent <- stream.CloseSend()
	}()
	for id := int64(1); id <= many+1; id++ {
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		want := 1000 + id
		if id > many {
			want = 0 // lost
		}
		if answer.ID != id || answer.TTL != want || answer.Header.Revision == 0 || answer.Header.MemberId == 0 {
			t.Fatalf("lease %d: %v", id, answer)
		}
	}
	if _, err := stream.Recv(); err == nil || err.Error() != "EOF" {
		t.Errorf("the end: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func TestLeaseWithoutALeader(t *testing.T) {
	t.Parallel() // it only waits
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	follower := c.follower()
	lease := etcdpb.NewLeaseClient(c.client(follower.endpoint).ActiveConnection())
	granted, err := lease.LeaseGrant(ctx, &etcdpb.LeaseGrantRequest{TTL: 60})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := lease.LeaseKeepAlive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range c.replicas {
		if r != follower {
			r.kill()
		}
	}
	// It may have been elected meanwhile, and then leads for a moment more.
	var g errgroup.Group
	g.Go(func() error {
		for {
			if err := stream.Send(&etcdpb.LeaseKeepAliveRequest{ID: granted.ID}); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if answer, err := stream.Recv(); status.Code(err) == codes.Unavailable {
				return nil
			} else if err != nil {
				return fmt.Errorf("keep-alive: %v, %v", answer, err)
			}
		}
	})
	g.Go(func() error {
		for {
			answer, err := lease.LeaseTimeToLive(ctx, &etcdpb.LeaseTimeToLiveRequest{ID: granted.ID})
			if status.Code(err) == codes.Unavailable {
				return nil
			} else if err != nil {
				return fmt.Errorf("time: %v, %v", answer, err)
			}
		}
	})
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// The leases of nodes are none of the clients'.
func TestLeaseOfANode(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	const id = 77
	node := &pb.Txn{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: id, TtlSeconds: 60}}},
		model.Put(model.NodeLeaseKey("n1"), &pb.NodeLease{LeaseId: id, TtlSeconds: 60}, id),
	}}
	if _, err := c.leader().store.Propose(ctx, node); err != nil {
		t.Fatal(err)
	}
	for _, r := range c.replicas {
		client := c.client(r.endpoint)
		if _, err := client.Revoke(ctx, id); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: revoke: %v", r.name, err)
		}
		put := clientv3.OpPut("mine", "v", clientv3.WithLease(id))
		if _, err := client.Do(ctx, put); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: put: %v", r.name, err)
		}
		if _, err := client.Txn(ctx).Then(clientv3.OpTxn(nil, nil, []clientv3.Op{put})).Commit(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: nested put: %v", r.name, err)
		}
		if _, err := client.KeepAliveOnce(ctx, id); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			t.Errorf("%s: keep alive: %v", r.name, err)
		}
		if all, err := client.Leases(ctx); err != nil || len(all.Leases) > 0 {
			t.Errorf("%s: leases: %v, %v", r.name, all, err)
		}
		left, err := client.TimeToLive(ctx, id, clientv3.WithAttachedKeys())
		if err != nil || left.GrantedTTL != 60 || len(left.Keys) != 1 {
			t.Errorf("%s: time: %v, %v", r.name, left, err)
		}
		if _, err := grantWithID(ctx, client, id, 60); !errors.Is(err, rpctypes.ErrLeaseExist) {
			t.Errorf("%s: grant: %v", r.name, err)
		}
	}
}

// A lease can hold very many keys. They go at once, and nothing else waits long.
func TestLeaseOfManyKeys(t *testing.T) {
	if testing.Short() {
		t.Skip("puts 100,000 keys")
	}
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	client := c.client()
	if _, err := grantWithID(ctx, client, 5, 600); err != nil {
		t.Fatal(err)
	}
	const keys, each = 100_000, 5_000
	for first := 0; first < keys; first += each {
		txn := &pb.Txn{}
		for i := first; i < first+each; i++ {
			txn.Success = append(txn.Success, putOp(&etcdpb.PutRequest{Key: fmt.Appendf(nil, "k%06d", i), Lease: 5}))
		}
		if _, err := c.leader().store.Propose(ctx, txn); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := client.TimeToLive(ctx, 5, clientv3.WithAttachedKeys()); err != nil || len(left.Keys) != keys {
		t.Fatalf("time: %v", err)
	}
	if _, err := client.KeepAliveOnce(ctx, 5); err != nil {
		t.Fatal(err)
	}
	before, err := client.Get(ctx, "k", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil || before.Count != keys {
		t.Fatalf("before: %v, %v", before, err)
	}
	revoked, err := client.Revoke(ctx, 5)
	if err != nil || revoked.Header.Revision != before.Header.Revision+1 {
		t.Fatalf("revoke: %v, %v", revoked, err)
	}
	if after, err := client.Get(ctx, "k", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || after.Count != 0 {
		t.Errorf("after: %v, %v", after, err)
	}
}

// BenchmarkLeaseKeepAlive is one keep-alive, of which many come at once on as many
// streams as there are callers.
func BenchmarkLeaseKeepAlive(b *testing.B) {
	c := newCluster(b, 3, nil)
	ctx := within(b, 10*time.Minute)
	const leases = 1000
	for id := int64(1); id <= leases; id++ {
		if _, err := grantWithID(ctx, c.client(c.leader().endpoint), id, 600); err != nil {
			b.Fatal(err)
		}
	}
	for name, r := range map[string]*replica{"leader": c.leader(), "follower": c.follower()} {
		for _, window := range []int{1, 100} {
			b.Run(fmt.Sprintf("%s/%d", name, window), func(b *testing.B) {
				keepAlive := etcdpb.NewLeaseClient(c.client(r.endpoint).ActiveConnection())
				b.RunParallel(func(p *testing.PB) {
					stream, err := keepAlive.LeaseKeepAlive(ctx)
					if err != nil {
						b.Error(err)
						return
					}
					under := 0
					for id := int64(0); p.Next(); id++ {
						if err := stream.Send(&etcdpb.LeaseKeepAliveRequest{ID: id%leases + 1}); err != nil {
							b.Error(err)
							return
						}
						if under++; under < window {
							continue
						}
						for ; under > 0; under-- {
							if answer, err := stream.Recv(); err != nil || answer.TTL != 600 {
								b.Error(answer, err)
								return
							}
						}
					}
				})
			})
		}
	}
}
