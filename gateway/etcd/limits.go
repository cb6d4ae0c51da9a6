package etcd

import (
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// requestOverhead is what etcd adds to a request in its log, and counts: the
// request's id, and tags and lengths.
const requestOverhead = 18

// What etcd refuses before it looks at its state, in etcd's order.

func (s *Server) checkSize(m proto.Message) error {
	if proto.Size(m)+requestOverhead > s.config.MaxRequestBytes {
		return rpctypes.ErrGRPCRequestTooLarge
	}
	return nil
}

func checkRange(r *etcdpb.RangeRequest) error {
	if len(r.Key) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	if r.SortOrder < etcdpb.RangeRequest_NONE || r.SortOrder > etcdpb.RangeRequest_DESCEND ||
		r.SortTarget < etcdpb.RangeRequest_KEY || r.SortTarget > etcdpb.RangeRequest_VALUE {
		return rpctypes.ErrGRPCInvalidSortOption
	}
	return nil
}

func checkPut(r *etcdpb.PutRequest) error {
	switch {
	case len(r.Key) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case r.IgnoreValue && len(r.Value) > 0:
		return rpctypes.ErrGRPCValueProvided
	case r.IgnoreLease && r.Lease != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

func checkDelete(r *etcdpb.DeleteRangeRequest) error {
	if len(r.Key) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	return nil
}

// checkTxn takes the number of operations that each list may have. As in etcd, a
// nested transaction may have as many as the longest list around it leaves over.
func checkTxn(r *etcdpb.TxnRequest, most int) error {
	longest := max(len(r.Compare), len(r.Success), len(r.Failure))
	if longest > most {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range r.Compare {
		if len(c.Key) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	for _, op := range r.Success {
		if err := checkOp(op, most-longest); err != nil {
			return err
		}
	}
	for _, op := range r.Failure {
		if err := checkOp(op, most-longest); err != nil {
			return err
		}
	}
	return nil
}

func checkOp(op *etcdpb.RequestOp, most int) error {
	switch r := op.Request.(type) {
	case *etcdpb.RequestOp_RequestRange:
		return checkRange(r.RequestRange)
	case *etcdpb.RequestOp_RequestPut:
		return checkPut(r.RequestPut)
	case *etcdpb.RequestOp_RequestDeleteRange:
		return checkDelete(r.RequestDeleteRange)
	case *etcdpb.RequestOp_RequestTxn:
		return checkTxn(r.RequestTxn, most)
	}
	return rpctypes.ErrGRPCKeyNotFound
}
