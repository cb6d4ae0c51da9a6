package etcd

import (
	"context"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Range reads keys, at any revision that is kept.
func (s *Server) Range(ctx context.Context, r *etcdpb.RangeRequest) (*etcdpb.RangeResponse, error) {
	if err := checkRange(r); err != nil {
		return nil, err
	}
	v, err := s.readable(ctx, r.Serializable, func(who *caller) error { return who.mayRead(r.Key, r.RangeEnd) })
	if err != nil {
		return nil, statusOf(err)
	}
	answer, err := rangeView(v, rangeRequest(r))
	if err != nil {
		return nil, statusOf(err)
	}
	return rangeResponse(s.header(answer.Revision), answer), nil
}

// readable is a view that the caller may read. A refusal is only given on a
// linearizable view.
func (s *Server) readable(ctx context.Context, serializable bool, may func(*caller) error) (*fsm.View, error) {
	if serializable {
		v := s.store.View()
		if who, err := s.auth.caller(ctx, v); err == nil && may(who) == nil {
			return v, nil
		}
	}
	v, err := s.store.Linearizable(ctx)
	if err != nil {
		return nil, err
	}
	who, err := s.auth.caller(ctx, v)
	if err != nil {
		return nil, err
	}
	return v, may(who)
}

// Put writes one key.
func (s *Server) Put(ctx context.Context, r *etcdpb.PutRequest) (*etcdpb.PutResponse, error) {
	if err := checkPut(r); err != nil {
		return nil, err
	}
	if err := s.checkSize(r); err != nil {
		return nil, err
	}
	answer, err := s.propose(ctx, &pb.Txn{Success: []*pb.RequestOp{putOp(r)}})
	if err != nil {
		return nil, err
	}
	return putResponse(s.header(answer.Revision), answer.Responses[0].GetResponsePut()), nil
}

// DeleteRange deletes keys.
func (s *Server) DeleteRange(ctx context.Context, r *etcdpb.DeleteRangeRequest) (*etcdpb.DeleteRangeResponse, error) {
	if err := checkDelete(r); err != nil {
		return nil, err
	}
	if err := s.checkSize(r); err != nil {
		return nil, err
	}
	answer, err := s.propose(ctx, &pb.Txn{Success: []*pb.RequestOp{deleteOp(r)}})
	if err != nil {
		return nil, err
	}
	return deleteResponse(s.header(answer.Revision), answer.Responses[0].GetResponseDeleteRange()), nil
}

// Txn carries out one of two lists of operations, as its compares decide.
func (s *Server) Txn(ctx context.Context, r *etcdpb.TxnRequest) (*etcdpb.TxnResponse, error) {
	if err := checkTxn(r, s.config.MaxTxnOps); err != nil {
		return nil, err
	}
	if err := s.checkSize(r); err != nil {
		return nil, err
	}
	answer, err := s.propose(ctx, txnRequest(r))
	if err != nil {
		return nil, err
	}
	return txnResponse(s.header(answer.Revision), answer), nil
}

// Compact forgets what a later version has replaced at or before a revision. It is
// forgotten when this returns, whether physical is asked for or not.
func (s *Server) Compact(ctx context.Context, r *etcdpb.CompactionRequest) (*etcdpb.CompactionResponse, error) {
	answer, err := s.propose(ctx, &pb.Txn{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: r.Revision}}},
	}})
	if err != nil {
		return nil, err
	}
	return &etcdpb.CompactionResponse{Header: s.header(answer.Revision)}, nil
}
