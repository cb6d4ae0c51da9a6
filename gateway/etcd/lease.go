package etcd

import (
	"cmp"
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The leases of nodes are in the same keyspace, and are none of the clients'. They
// are told of when they are asked for by their id, which the keys of nodes show.
// Else they are as if they were not there: who lists leases, to revoke what is not
// needed any more, does not meet them, nobody can attach a key to one or revoke it,
// and nobody but its agent can keep a node alive.

// maxKeepAlives bounds the requests of a stream that are answered together.
const maxKeepAlives = 1024

// LeaseGrant makes a lease, with the id that the client chose or another one.
func (s *Server) LeaseGrant(ctx context.Context, r *etcdpb.LeaseGrantRequest) (*etcdpb.LeaseGrantResponse, error) {
	if r.TTL > fsm.MaxLeaseTTL {
		return nil, rpctypes.ErrGRPCLeaseTTLTooLarge
	}
	ttl := max(r.TTL, int64(math.Ceil(s.config.MinLeaseTTL.Seconds())))
	for {
		id := r.ID
		if id == 0 {
			id = rand.Int64N(math.MaxInt64) + 1
		}
		answer, err := s.propose(ctx, &pb.Txn{Success: []*pb.RequestOp{
			{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: id, TtlSeconds: ttl}}},
		}})
		if r.ID == 0 && errors.Is(err, rpctypes.ErrGRPCLeaseExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return &etcdpb.LeaseGrantResponse{Header: s.header(answer.Revision), ID: id, TTL: ttl}, nil
	}
}

// LeaseRevoke ends a lease and deletes its keys, all in one revision.
func (s *Server) LeaseRevoke(ctx context.Context, r *etcdpb.LeaseRevokeRequest) (*etcdpb.LeaseRevokeResponse, error) {
	if r.ID == 0 {
		return nil, rpctypes.ErrGRPCLeaseNotFound
	}
	answer, err := s.propose(ctx, &pb.Txn{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_LeaseRevoke{LeaseRevoke: &pb.LeaseRevoke{Id: r.ID}}},
	}})
	if err != nil {
		return nil, err
	}
	return &etcdpb.LeaseRevokeResponse{Header: s.header(answer.Revision)}, nil
}

// LeaseKeepAlive answers in order. What has arrived while the leader was asked is
// asked for together. As in etcd the stream outlives a change of leader, and ends
// where none is found for long.
func (s *Server) LeaseKeepAlive(stream etcdpb.Lease_LeaseKeepAliveServer) error {
	ctx := s.auth.pin(stream.Context())
	asked := make(chan int64, maxKeepAlives)
	var ended error
	go func() { // ends with the stream
		defer close(asked)
		for {
			r, err := stream.Recv()
			if err != nil {
				ended = err
				return
			}
			select {
			case asked <- r.ID:
			case <-ctx.Done():
				ended = ctx.Err()
				return
			}
		}
	}()
	for id := range asked {
		ids := []int64{id}
		for len(asked) > 0 && len(ids) < maxKeepAlives {
			ids = append(ids, <-asked)
		}
		// That of before: a client that learns of a lease's end at a revision must not
		// have learnt of its being kept alive at a later one.
		header := s.header(s.store.View().Revision())
		ttls, err := s.keepAlive(ctx, ids)
		if err != nil {
			return statusOf(err)
		}
		for i, id := range ids {
			if err := stream.Send(&etcdpb.LeaseKeepAliveResponse{Header: header, ID: id, TTL: ttls[i]}); err != nil {
				return err
			}
		}
	}
	if ended == io.EOF {
		return nil
	}
	return ended
}

// keepAlive returns for each lease the seconds granted, 0 where there is none.
func (s *Server) keepAlive(ctx context.Context, ids []int64) ([]int64, error) {
	v := s.store.View()
	if s.mayKeepAlive(ctx, v, ids) != nil {
		var err error
		if v, err = s.store.Linearizable(ctx); err != nil {
			return nil, err
		}
		if err := s.mayKeepAlive(ctx, v, ids); err != nil {
			return nil, err
		}
	}
	theirs := ids
	for i, id := range ids {
		if leaseOfSystem(v, id) {
			// Few do this: the others need no copy.
			theirs = append([]int64(nil), ids...)
			for j := i; j < len(ids); j++ {
				if leaseOfSystem(v, ids[j]) {
					theirs[j] = 0
				}
			}
			break
		}
	}
	return s.store.KeepAlive(ctx, theirs...)
}

func (s *Server) mayKeepAlive(ctx context.Context, v *fsm.View, ids []int64) error {
	who, err := s.auth.caller(ctx, v)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := who.mayWriteLease(v, id); err != nil {
			return err
		}
	}
	return nil
}

// LeaseTimeToLive tells how long a lease lasts if it is not kept alive; -1 where
// there is none.
func (s *Server) LeaseTimeToLive(ctx context.Context, r *etcdpb.LeaseTimeToLiveRequest) (*etcdpb.LeaseTimeToLiveResponse, error) {
	v, _, err := s.readable(ctx, false, func(v *fsm.View, who *caller) error {
		if !r.Keys {
			return who.refused
		}
		return who.mayReadLease(v, r.ID)
	})
	if err != nil {
		return nil, statusOf(err)
	}
	left, err := s.store.LeaseTimes(ctx, r.ID)
	if err != nil {
		return nil, statusOf(err)
	}
	answer := &etcdpb.LeaseTimeToLiveResponse{Header: s.header(v.Revision()), ID: r.ID, TTL: -1}
	lease, ok := v.Lease(r.ID)
	if !ok || left[0] < 0 {
		return answer, nil
	}
	// A new leader may give it more than was granted.
	answer.TTL = min(int64(left[0]/time.Second), lease.TtlSeconds)
	answer.GrantedTTL = lease.TtlSeconds
	if r.Keys {
		answer.Keys = v.LeaseKeys(r.ID)
	}
	return answer, nil
}

// LeaseLeases lists the clients' leases, those that end first before the others.
func (s *Server) LeaseLeases(ctx context.Context, r *etcdpb.LeaseLeasesRequest) (*etcdpb.LeaseLeasesResponse, error) {
	var ids []int64
	v, _, err := s.readable(ctx, false, func(v *fsm.View, who *caller) error {
		if who.refused != nil {
			return who.refused
		}
		ids = ids[:0]
		for l := range v.Leases() {
			if leaseOfSystem(v, l.Id) {
				continue
			}
			if err := who.mayReadLease(v, l.Id); err != nil {
				return err
			}
			ids = append(ids, l.Id)
		}
		return nil
	})
	if err != nil {
		return nil, statusOf(err)
	}
	answer := &etcdpb.LeaseLeasesResponse{Header: s.header(v.Revision())}
	for _, id := range s.byEnd(ctx, ids) {
		answer.Leases = append(answer.Leases, &etcdpb.LeaseStatus{ID: id})
	}
	return answer, nil
}

// byEnd orders leases by when they end, if that can be told.
func (s *Server) byEnd(ctx context.Context, ids []int64) []int64 {
	if len(ids) < 2 {
		return ids
	}
	left, err := s.store.LeaseTimes(ctx, ids...)
	if err != nil {
		return ids
	}
	order := make([]int, len(ids))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(left[a], left[b]) })
	sorted := make([]int64, len(ids))
	for i, at := range order {
		sorted[i] = ids[at]
	}
	return sorted
}

// mayAttach refuses putting keys on leases that are none of the clients'. v is nil
// for what is known here. That a lease is a node's is so from its first moment to its last.
func (s *Server) mayAttach(v *fsm.View, ops []*pb.RequestOp) error {
	for _, op := range ops {
		switch r := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			id := r.RequestPut.Lease
			if id == 0 {
				continue
			}
			known := v
			if known == nil {
				known = s.store.View()
			}
			if _, ok := known.Lease(id); !ok && v == nil {
				return rpctypes.ErrGRPCLeaseNotFound // as far as is known here
			}
			if leaseOfSystem(known, id) {
				return status.Errorf(codes.PermissionDenied, "lease %x is that of a node: keys of clients cannot be attached to it", id)
			}
		case *pb.RequestOp_RequestTxn:
			if err := s.mayAttach(v, r.RequestTxn.Success); err != nil {
				return err
			}
			if err := s.mayAttach(v, r.RequestTxn.Failure); err != nil {
				return err
			}
		}
	}
	return nil
}
