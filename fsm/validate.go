package fsm

import (
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Limits of a transaction. Every replica must refuse the same ones, so a change
// of any of these needs a new feature level.
const (
	// MaxRequestID is the length of a request id in bytes.
	MaxRequestID = 32
	// MaxOps is the number of compares and operations of a transaction, those of
	// nested transactions and of branches that are not taken included.
	MaxOps = 1 << 18
	// MaxDepth is how deep transactions may be nested.
	MaxDepth = 256
	// MaxTxnBytes is the sum of all keys, range ends and values in bytes.
	MaxTxnBytes = 8 << 20
	// MaxLeaseTTL in seconds, as in etcd.
	MaxLeaseTTL = 9_000_000_000
)

// ValidateTxn reports what Apply would refuse as malformed, whatever the state:
// an *Error with the code INVALID or DUPLICATE_KEY. It is for use before a
// transaction is proposed.
func ValidateTxn(t *pb.Txn) error {
	if refused := validate(t); refused != nil {
		return refused
	}
	return nil
}

// ValidateRange reports what Range would refuse as malformed.
func ValidateRange(r *pb.RangeRequest) error {
	if refused := validateRange(r); refused != nil {
		return refused
	}
	return nil
}

func validate(t *pb.Txn) *Error {
	if t == nil {
		return invalid("no transaction")
	}
	if len(t.RequestId) > MaxRequestID {
		return invalid("request_id has %d bytes, at most %d are allowed", len(t.RequestId), MaxRequestID)
	}
	var size txnSize
	if refused := size.txn(t, 1); refused != nil {
		return refused
	}
	// After the sizes, which bound what this takes.
	if refused := overlaps(t.Success); refused != nil {
		return refused
	}
	return overlaps(t.Failure)
}

func overlaps(ops []*pb.RequestOp) *Error {
	if len(ops) == 0 || len(ops) == 1 && ops[0].GetRequestTxn() == nil {
		return nil // the usual transaction allocates nothing here
	}
	_, refused := footprintOf(ops)
	return refused
}

// txnSize adds up what a transaction holds, and checks each part of it.
type txnSize struct {
	ops, bytes int
}

func (n *txnSize) add(ops, bytes int) *Error {
	n.ops += ops
	n.bytes += bytes
	switch {
	case n.ops > MaxOps:
		return invalid("more than %d compares and operations in one transaction", MaxOps)
	case n.bytes > MaxTxnBytes:
		return invalid("more than %d bytes of keys and values in one transaction", MaxTxnBytes)
	}
	return nil
}

func (n *txnSize) txn(t *pb.Txn, depth int) *Error {
	if depth > MaxDepth {
		return invalid("transactions are nested more than %d deep", MaxDepth)
	}
	if refused := n.add(len(t.Compare)+len(t.Success)+len(t.Failure), 0); refused != nil {
		return refused
	}
	for _, c := range t.Compare {
		if refused := n.compare(c); refused != nil {
			return refused
		}
	}
	for _, op := range t.Success {
		if refused := n.op(op, depth); refused != nil {
			return refused
		}
	}
	for _, op := range t.Failure {
		if refused := n.op(op, depth); refused != nil {
			return refused
		}
	}
	return nil
}

func (n *txnSize) compare(c *pb.Compare) *Error {
	if c == nil {
		return invalid("compare is empty")
	}
	if refused := validateKey(c.Key); refused != nil {
		return refused
	}
	if c.Result < pb.Compare_EQUAL || c.Result > pb.Compare_NOT_EQUAL {
		return invalid("compare: unknown result %d", c.Result)
	}
	if c.Target < pb.Compare_VERSION || c.Target > pb.Compare_LEASE {
		return invalid("compare: unknown target %d", c.Target)
	}
	return n.add(0, len(c.Key)+len(c.RangeEnd)+len(c.GetValue()))
}

func (n *txnSize) op(op *pb.RequestOp, depth int) *Error {
	switch r := op.GetRequest().(type) {
	case *pb.RequestOp_RequestRange:
		if refused := validateRange(r.RequestRange); refused != nil {
			return refused
		}
		return n.add(0, len(r.RequestRange.Key)+len(r.RequestRange.RangeEnd))
	case *pb.RequestOp_RequestPut:
		return n.put(r.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		d := r.RequestDeleteRange
		if d == nil {
			return invalid("delete_range is empty")
		}
		if refused := validateKey(d.Key); refused != nil {
			return refused
		}
		return n.add(0, len(d.Key)+len(d.RangeEnd))
	case *pb.RequestOp_RequestTxn:
		switch t := r.RequestTxn; {
		case t == nil:
			return invalid("nested transaction is empty")
		case len(t.RequestId) > 0:
			return invalid("request_id is only for the outermost transaction")
		default:
			return n.txn(t, depth+1)
		}
	case *pb.RequestOp_LeaseGrant:
		if r.LeaseGrant.GetId() == 0 {
			return invalid("lease id is 0")
		}
		if ttl := r.LeaseGrant.GetTtlSeconds(); ttl <= 0 || ttl > MaxLeaseTTL {
			return invalid("lease ttl %d is not within 1 and %d seconds", ttl, int64(MaxLeaseTTL))
		}
		return nil
	case *pb.RequestOp_LeaseRevoke:
		if r.LeaseRevoke.GetId() == 0 {
			return invalid("lease id is 0")
		}
		return nil
	case *pb.RequestOp_Compact:
		if r.Compact == nil {
			return invalid("compact is empty")
		}
		return nil
	case *pb.RequestOp_Checkpoint:
		if r.Checkpoint == nil {
			return invalid("checkpoint is empty")
		}
		return nil
	default:
		return invalid("operation is empty or unknown")
	}
}

func (n *txnSize) put(p *pb.PutRequest) *Error {
	if p == nil {
		return invalid("put is empty")
	}
	if refused := validateKey(p.Key); refused != nil {
		return refused
	}
	switch {
	case p.IgnoreValue && len(p.Value) > 0:
		return invalid("value is provided together with ignore_value")
	case p.IgnoreLease && p.Lease != 0:
		return invalid("lease is provided together with ignore_lease")
	}
	return n.add(0, len(p.Key)+len(p.Value))
}

func validateRange(r *pb.RangeRequest) *Error {
	if r == nil {
		return invalid("range is empty")
	}
	if refused := validateKey(r.Key); refused != nil {
		return refused
	}
	if r.SortOrder < pb.RangeRequest_NONE || r.SortOrder > pb.RangeRequest_DESCEND {
		return invalid("range: unknown sort_order %d", r.SortOrder)
	}
	if r.SortTarget < pb.RangeRequest_KEY || r.SortTarget > pb.RangeRequest_VALUE {
		return invalid("range: unknown sort_target %d", r.SortTarget)
	}
	return nil
}

func validateKey(key []byte) *Error {
	if len(key) == 0 {
		return invalid("key is not provided")
	}
	return nil
}
