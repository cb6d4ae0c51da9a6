package etcd

import (
	"context"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// maxAttempts bounds how often a transaction is looked at anew because what it was
// admitted on has changed. Each failure is another's success, so few are needed.
const maxAttempts = 8

// maxUnderWay bounds the transactions, in bytes together, that a replica has taken
// and not carried out, as while there is no leader.
const maxUnderWay = 256 << 20

// propose carries out a client's transaction: what the caller may not do is
// refused, what touches the system's keys goes through admission, and both hold
// at the moment when the transaction is applied, or it is looked at anew.
//
// The first look is at what is known here, without asking the cluster: where that
// is old a guard fails, and a refusal is only given on a linearizable view.
func (s *Server) propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error) {
	if err := fsm.ValidateTxn(txn); err != nil {
		return nil, statusOf(err)
	}
	size := int64(proto.Size(txn))
	defer s.underWay.Add(-size)
	if s.underWay.Add(size) > maxUnderWay {
		return nil, rpctypes.ErrGRPCRequestTooManyRequests
	}
	var v *fsm.View
	for range maxAttempts {
		answer, err := s.attempt(ctx, v, txn)
		if err == nil && answer != nil {
			return answer, nil
		}
		if err != nil && (v != nil || isOfStore(err)) {
			return nil, statusOf(err)
		}
		if v, err = s.store.Linearizable(ctx); err != nil {
			return nil, statusOf(err)
		}
	}
	return nil, status.Errorf(codes.Unavailable, "etcdserver: others changed the same %d times in a row; try again", maxAttempts)
}

// storeError marks what holds whoever calls: the answer of the store, and that it
// is full.
type storeError struct{ error }

func (e storeError) Unwrap() error { return e.error }

func isOfStore(err error) bool {
	_, ok := err.(storeError)
	return ok
}

// attempt is one look, at v or, where that is nil, at what is known here. There is
// no answer where a guard failed.
func (s *Server) attempt(ctx context.Context, v *fsm.View, txn *pb.Txn) (*pb.TxnResponse, error) {
	who, err := s.auth.caller(ctx, v)
	if err != nil {
		return nil, err
	}
	guards, err := who.may(v, txn)
	if err != nil {
		return nil, err
	}
	for _, ops := range [][]*pb.RequestOp{txn.Success, txn.Failure} {
		if err := s.mayAttach(v, ops); err != nil {
			return nil, err
		}
	}
	if err := s.mayGrow(ctx, txn); err != nil {
		return nil, storeError{err}
	}
	restore := func(a *pb.TxnResponse) *pb.TxnResponse { return a }
	outdated := func(error) bool { return false }
	if touchesSystem(txn) {
		if v == nil {
			if v, err = s.store.Linearizable(ctx); err != nil {
				return nil, storeError{err}
			}
		}
		admitted, err := s.admit(v, who, txn)
		if err != nil {
			return nil, err
		}
		txn, restore, outdated = admitted.txn, admitted.restore, admitted.outdated
		guards = append(guards, admitted.guards...)
	}
	guarded, unwrap := guard(txn, guards)
	answer, err := s.store.Propose(ctx, guarded)
	if err != nil && outdated(err) {
		return nil, nil
	}
	if err != nil {
		return nil, storeError{err}
	}
	if answer = unwrap(answer); answer != nil {
		answer = restore(answer)
	}
	return answer, nil
}

// guard makes a transaction depend on compares that are none of the client's. The
// function takes the client's answer out of that of the store; nil where a guard
// failed.
func guard(txn *pb.Txn, guards []*pb.Compare) (*pb.Txn, func(*pb.TxnResponse) *pb.TxnResponse) {
	switch {
	case len(guards) == 0:
		return txn, func(a *pb.TxnResponse) *pb.TxnResponse { return a }
	case len(txn.Compare) == 0 && len(txn.Failure) == 0:
		return &pb.Txn{Compare: guards, Success: txn.Success}, func(a *pb.TxnResponse) *pb.TxnResponse {
			if !a.Succeeded {
				return nil
			}
			return a
		}
	}
	outer := &pb.Txn{Compare: guards, Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: txn}}}}
	return outer, func(a *pb.TxnResponse) *pb.TxnResponse {
		if !a.Succeeded {
			return nil
		}
		inner := a.Responses[0].GetResponseTxn()
		inner.Revision = a.Revision
		return inner
	}
}
