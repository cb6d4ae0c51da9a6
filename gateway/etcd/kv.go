package etcd

import (
	"cmp"
	"context"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Range reads keys, at any revision that is kept.
func (s *Server) Range(ctx context.Context, r *etcdpb.RangeRequest) (*etcdpb.RangeResponse, error) {
	if err := checkRange(r); err != nil {
		return nil, err
	}
	v, who, err := s.readable(ctx, r.Serializable, func(_ *fsm.View, who *caller) error { return who.mayRead(r.Key, r.RangeEnd) })
	if err != nil {
		return nil, statusOf(err)
	}
	answer, err := rangeView(v, rangeRequest(r), who.shown())
	if err != nil {
		return nil, statusOf(err)
	}
	return rangeResponse(s.header(answer.Revision), answer), nil
}

// readable is a view that the caller may read, and the caller. A refusal is only given on a
// linearizable one.
func (s *Server) readable(ctx context.Context, serializable bool, may func(*fsm.View, *caller) error) (*fsm.View, *caller, error) {
	if serializable {
		v := s.store.View()
		if who, err := s.auth.caller(ctx, v); err == nil && may(v, who) == nil {
			return v, who, nil
		}
	}
	v, err := s.store.Linearizable(ctx)
	if err != nil {
		return nil, nil, err
	}
	who, err := s.auth.caller(ctx, v)
	if err != nil {
		return nil, nil, err
	}
	return v, who, may(v, who)
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
	if err == rpctypes.ErrGRPCKeyNotFound && r.Lease != 0 {
		// In a transaction etcd misses the key first, here the lease.
		if _, ok := s.store.View().Lease(r.Lease); !ok {
			err = rpctypes.ErrGRPCLeaseNotFound
		}
	}
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
	txn := txnRequest(r)
	answer, err := s.txn(ctx, r, txn)
	if err != nil {
		return nil, statusOf(err)
	}
	return txnResponse(s.header(answer.Revision), answer), nil
}

func (s *Server) txn(ctx context.Context, r *etcdpb.TxnRequest, txn *pb.Txn) (*pb.TxnResponse, error) {
	if reads := readsOf(txn); reads.only {
		return s.readTxn(ctx, txn, reads.serializable())
	}
	if err := s.checkSize(r); err != nil {
		return nil, cmp.Or(fsm.ValidateTxn(txn), err)
	}
	return s.propose(ctx, txn)
}

// reads says what a transaction reads.
type reads struct {
	// only: it does nothing else.
	only bool
	// Ranges at its top, and those of them that may be answered by any replica.
	ranges, local int
	nested        bool
}

func readsOf(txn *pb.Txn) reads {
	r := reads{only: true}
	for _, ops := range [][]*pb.RequestOp{txn.Success, txn.Failure} {
		for _, op := range ops {
			switch o := op.Request.(type) {
			case *pb.RequestOp_RequestRange:
				r.ranges++
				if o.RequestRange.Serializable {
					r.local++
				}
			case *pb.RequestOp_RequestTxn:
				r.nested = true
				r.only = r.only && readsOf(o.RequestTxn).only
			default:
				r.only = false
			}
		}
	}
	return r
}

// serializable is what etcd takes for it, except that a transaction that has only
// compares is answered by the cluster here.
func (r reads) serializable() bool { return r.ranges > 0 && r.local == r.ranges && !r.nested }

// readTxn answers a transaction that only reads, without the log.
func (s *Server) readTxn(ctx context.Context, txn *pb.Txn, serializable bool) (*pb.TxnResponse, error) {
	if err := fsm.ValidateTxn(txn); err != nil {
		return nil, err
	}
	v, who, err := s.readable(ctx, serializable, func(v *fsm.View, who *caller) error {
		_, err := who.may(v, txn) // what it may is as of v, and so is the answer
		return err
	})
	if err != nil {
		return nil, err
	}
	if touchesSystem(txn) {
		return readShown(v, txn, who.shown())
	}
	return v.Txn(txn)
}

// readShown is View.Txn on what is shown of the system's keys, up to those of an
// owner.
func readShown(v *fsm.View, txn *pb.Txn, shown owner) (*pb.TxnResponse, error) {
	answer := &pb.TxnResponse{Revision: v.Revision(), Succeeded: true}
	for _, c := range txn.Compare {
		ok, err := holds(v, c, shown)
		if err != nil {
			return nil, err
		}
		answer.Succeeded = answer.Succeeded && ok
	}
	ops := txn.Success
	if !answer.Succeeded {
		ops = txn.Failure
	}
	for _, op := range ops {
		var to pb.ResponseOp
		if inner := op.GetRequestTxn(); inner != nil {
			read, err := readShown(v, inner, shown)
			if err != nil {
				return nil, err
			}
			to.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: read}
		} else {
			r := op.GetRequestRange()
			if r.Revision < 0 && r.Revision < v.CompactRevision() {
				return nil, rpctypes.ErrGRPCCompacted
			}
			read, err := rangeView(v, r, shown)
			if err != nil {
				return nil, err
			}
			to.Response = &pb.ResponseOp_ResponseRange{ResponseRange: read}
		}
		answer.Responses = append(answer.Responses, &to)
	}
	return answer, nil
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
