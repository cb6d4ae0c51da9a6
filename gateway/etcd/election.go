package etcd

import (
	"cmp"
	"context"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/proto/etcd/v3electionpb"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What etcd's Election service answers, in these words and without a code.
var (
	errNoLeaderKey = status.Error(codes.Unknown, `"leader" field must be provided`)
	errNotElected  = status.Error(codes.Unknown, "election: not leader")
	errNoneElected = status.Error(codes.Unknown, "election: no leader")
)

// errCandidacyEnded has no counterpart in etcd, which takes a candidate for elected
// whose lease has ended while it waited.
var errCandidacyEnded = status.Error(codes.Unknown, "election: session is expired")

// elections serves etcd's Election service.
type elections struct {
	v3electionpb.UnimplementedElectionServer
	server *Server
}

// Campaign waits until the lease has won. A call that is given up leaves the queue.
func (e elections) Campaign(ctx context.Context, r *v3electionpb.CampaignRequest) (*v3electionpb.CampaignResponse, error) {
	ctx = e.server.auth.pin(ctx)
	c, err := e.server.contest(r.Name)
	if err != nil {
		return nil, err
	}
	p, err := c.enter(ctx, r.Lease, r.Value)
	if err != nil {
		return nil, err
	}
	won, err := c.win(ctx, p)
	switch {
	case err != nil:
		c.withdraw(ctx, p)
		return nil, err
	case won == nil:
		return nil, errCandidacyEnded
	}
	// As in etcd the header is that of the entry into the election.
	return &v3electionpb.CampaignResponse{Header: p.header, Leader: &v3electionpb.LeaderKey{
		Name: r.Name, Key: p.key, Rev: p.created, Lease: p.lease,
	}}, nil
}

// Proclaim changes the value of the leader's key.
func (e elections) Proclaim(ctx context.Context, r *v3electionpb.ProclaimRequest) (*v3electionpb.ProclaimResponse, error) {
	if r.Leader == nil {
		return nil, errNoLeaderKey
	}
	lease, err := e.server.session(ctx, r.Leader.Lease)
	if err != nil {
		return nil, err
	}
	answer, err := e.server.Txn(ctx, &etcdpb.TxnRequest{
		Compare: []*etcdpb.Compare{createdAt(r.Leader.Key, r.Leader.Rev)},
		Success: []*etcdpb.RequestOp{putValue(r.Leader.Key, r.Value, lease)},
	})
	switch {
	case err != nil:
		return nil, err
	case !answer.Succeeded:
		return nil, errNotElected
	}
	return &v3electionpb.ProclaimResponse{Header: answer.Header}, nil
}

// Leader reads the leader's key.
func (e elections) Leader(ctx context.Context, r *v3electionpb.LeaderRequest) (*v3electionpb.LeaderResponse, error) {
	c, err := e.server.contest(r.Name)
	if err != nil {
		return nil, err
	}
	answer, err := c.Range(ctx, c.winner())
	switch {
	case err != nil:
		return nil, err
	case len(answer.Kvs) == 0:
		return nil, errNoneElected
	}
	return &v3electionpb.LeaderResponse{Header: answer.Header, Kv: answer.Kvs[0]}, nil
}

// Resign deletes the leader's key.
func (e elections) Resign(ctx context.Context, r *v3electionpb.ResignRequest) (*v3electionpb.ResignResponse, error) {
	if r.Leader == nil {
		return nil, errNoLeaderKey
	}
	answer, err := e.server.leave(ctx, r.Leader.Key, createdAt(r.Leader.Key, r.Leader.Rev))
	if err != nil {
		return nil, err
	}
	return &v3electionpb.ResignResponse{Header: answer.Header}, nil
}

// Observe follows the leader's key as long as it is there, then that of the next.
func (e elections) Observe(r *v3electionpb.LeaderRequest, stream grpc.ServerStreamingServer[v3electionpb.LeaderResponse]) error {
	ctx := e.server.auth.pin(stream.Context())
	c, err := e.server.contest(r.Name)
	if err != nil {
		return err
	}
	for {
		answer, err := c.Range(ctx, c.winner())
		if err != nil {
			return err
		}
		now := &v3electionpb.LeaderResponse{Header: answer.Header}
		if len(answer.Kvs) > 0 {
			now.Kv = answer.Kvs[0]
		} else if now, err = c.firstAfter(ctx, answer.Header.Revision); err != nil {
			return err
		}
		if now == nil {
			continue
		}
		if err := stream.Send(now); err != nil {
			return err
		}
		if err := c.follow(ctx, now, stream); err != nil {
			return err
		}
	}
}

// firstAfter waits for the first key that anybody writes after a revision. There is
// none where changes may have been missed.
func (c contest) firstAfter(ctx context.Context, after int64) (*v3electionpb.LeaderResponse, error) {
	var first *v3electionpb.LeaderResponse
	err := c.await(ctx, c.prefix, c.end, after, func(e *pb.KeyEvent) bool {
		first = c.proclaimed(e)
		return first != nil
	})
	return first, err
}

// follow sends what is written to the leader's key until it is deleted, or changes
// may have been missed.
func (c contest) follow(ctx context.Context, now *v3electionpb.LeaderResponse, stream grpc.ServerStreamingServer[v3electionpb.LeaderResponse]) error {
	var failed error
	err := c.await(ctx, now.Kv.Key, nil, now.Header.Revision, func(e *pb.KeyEvent) bool {
		if next := c.proclaimed(e); next != nil {
			failed = stream.Send(next)
		}
		return failed != nil || e.Type == pb.KeyEvent_DELETE
	})
	return cmp.Or(failed, err)
}

// proclaimed is what an event says to observers, if anything.
func (c contest) proclaimed(e *pb.KeyEvent) *v3electionpb.LeaderResponse {
	if e.Type == pb.KeyEvent_DELETE {
		return nil
	}
	return &v3electionpb.LeaderResponse{Header: c.header(e.Kv.ModRevision), Kv: keyValue(e.Kv)}
}
