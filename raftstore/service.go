package raftstore

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Service is what other replicas call. Only they may: it trusts what they send.
func (s *Store) Service() pb.ConsensusServer { return service{s: s} }

type service struct {
	pb.UnimplementedConsensusServer
	s *Store
}

func notLeading() error {
	return status.Error(codes.FailedPrecondition, ErrNotLeader.Error())
}

// Propose queues the batch of another replica as one call.
func (v service) Propose(ctx context.Context, req *pb.ProposeRequest) (*pb.ProposeResponse, error) {
	s := v.s
	if !s.isStarted() || !s.leads() {
		return nil, notLeading()
	}
	if len(req.Txns) == 0 {
		return nil, status.Error(codes.InvalidArgument, "no transactions")
	}
	c := newCall(ctx, req.Txns...)
	c.here = true
	o, err := s.submit(ctx, c)
	var not *notProposed
	switch {
	case errors.As(err, &not):
		return nil, notLeading()
	case err != nil:
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &pb.ProposeResponse{Results: o.results, Index: o.index}, nil
}

// leader returns the leadership, or the error for a replica that has none.
func (v service) leader() (*leadership, error) {
	if l := v.s.reigning(); l != nil {
		return l, nil
	}
	return nil, notLeading()
}

// answerError turns the error of a question to the leader into a status.
func answerError(err error) error {
	switch {
	case errors.Is(err, ErrNotLeader):
		return notLeading()
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	default:
		return status.Error(codes.Unavailable, err.Error())
	}
}

// ReadIndex answers at once where this server and the caller are a majority, and
// joins the leader's own readers otherwise.
func (v service) ReadIndex(ctx context.Context, req *pb.ReadIndexRequest) (*pb.ReadIndexResponse, error) {
	l, err := v.leader()
	if err != nil {
		return nil, err
	}
	// This server led after the question came.
	index := v.s.raft.CommitIndex()
	if !v.s.confirmedBy(l, req) {
		if index, err = v.s.sharedReadIndex(ctx); err != nil {
			return nil, answerError(err)
		}
	}
	v.s.link.spread(v.s.caller(req.MemberId), index)
	return &pb.ReadIndexResponse{Index: index}, nil
}

// KeepAlive is part of pb.ConsensusServer.
func (v service) KeepAlive(ctx context.Context, req *pb.KeepAliveRequest) (*pb.KeepAliveResponse, error) {
	l, err := v.leader()
	if err != nil {
		return nil, err
	}
	ttls, err := v.s.keepAlive(ctx, l, req.Ids)
	if err != nil {
		return nil, answerError(err)
	}
	return &pb.KeepAliveResponse{TtlSeconds: ttls}, nil
}

// LeaseTimes is part of pb.ConsensusServer.
func (v service) LeaseTimes(ctx context.Context, req *pb.LeaseTimesRequest) (*pb.LeaseTimesResponse, error) {
	l, err := v.leader()
	if err != nil {
		return nil, err
	}
	left, err := v.s.leaseTimes(ctx, l, req.Ids)
	if err != nil {
		return nil, answerError(err)
	}
	resp := &pb.LeaseTimesResponse{RemainingMs: make([]int64, len(left))}
	for i, d := range left {
		resp.RemainingMs[i] = -1
		if d >= 0 {
			resp.RemainingMs[i] = d.Milliseconds()
		}
	}
	return resp, nil
}

// ReplicaStatus is part of pb.ConsensusServer; any replica answers.
func (v service) ReplicaStatus(context.Context, *pb.ReplicaStatusRequest) (*pb.ReplicaStatusResponse, error) {
	st := v.s.Status()
	return &pb.ReplicaStatusResponse{
		MemberId:     st.ID,
		LeaderId:     st.Leader,
		Term:         st.Term,
		AppliedIndex: st.Applied,
		LastIndex:    st.LastIndex,
		Revision:     st.Revision,
		Version:      v.s.cfg.Version,
		FeatureLevel: fsm.FeatureLevel,
	}, nil
}
