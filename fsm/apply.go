package fsm

import (
	"fmt"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// execution carries out the transactions of one entry, one after the other.
// Each goes through: validate (no state needed), branches (which compares
// hold), check (could any operation of the branches taken fail), run (which
// cannot fail any more, so that nothing need ever be undone).
type execution struct {
	s       *Store
	index   uint64 // of the entry
	answers answers
	// What changed, up to position told of the history.
	events []*pb.KeyEvent
	told   uint64

	// Of the transaction under way.
	first uint64 // position in history of its first change
	begin int64  // revision before it
	path  []bool // branches that are still ahead
}

func (x *execution) apply(t *pb.Txn) (*pb.TxnResult, error) {
	s := x.s
	x.begin, x.first = s.revision, s.history.end
	if id := t.GetRequestId(); len(id) > 0 {
		if result, known, err := s.recall(id); known || err != nil {
			return result, err
		}
	}
	if refused := validate(t); refused != nil {
		return x.answers.refusal(refused), nil
	}
	s.path = s.branches(t, s.path[:0])
	x.path = s.path
	check := preflight{s: s, index: x.index, compacted: s.compacted, path: s.path}
	refused, err := check.txn(t)
	if err != nil {
		return nil, err
	}
	if refused != nil {
		return x.answers.refusal(refused), nil
	}
	result, response := x.answers.result()
	x.txn(t, response)
	if x.s.history.end > x.first || nested(t) {
		settle(response, s.revision)
	}
	if len(t.RequestId) > 0 {
		if err := s.remember(t.RequestId, result); err != nil {
			return nil, err
		}
	}
	return result, nil
}

// preflight finds out whether an operation of the branches taken would be
// refused. What it looks up is what the operation will meet: leases as earlier
// operations leave them, keys as they were before the transaction.
type preflight struct {
	s         *Store
	index     uint64
	compacted int64
	path      []bool
	// Leases granted (true) and revoked (false) by earlier operations.
	leases map[int64]bool
}

func (c *preflight) txn(t *pb.Txn) (*Error, error) {
	taken := c.path[0]
	c.path = c.path[1:]
	for _, op := range branch(t, taken) {
		refused, err := c.op(op)
		if refused != nil || err != nil {
			return refused, err
		}
	}
	return nil, nil
}

func (c *preflight) op(op *pb.RequestOp) (*Error, error) {
	switch r := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		return c.s.kept(r.RequestRange.Revision, c.compacted), nil
	case *pb.RequestOp_RequestPut:
		return c.put(r.RequestPut), nil
	case *pb.RequestOp_RequestTxn:
		return c.txn(r.RequestTxn)
	case *pb.RequestOp_LeaseGrant:
		if c.leaseExists(r.LeaseGrant.Id) {
			return refuse(pb.TxnError_TXN_ERROR_LEASE_EXISTS, "lease %d already exists", r.LeaseGrant.Id), nil
		}
		c.setLease(r.LeaseGrant.Id, true)
	case *pb.RequestOp_LeaseRevoke:
		if !c.leaseExists(r.LeaseRevoke.Id) {
			return leaseNotFound(r.LeaseRevoke.Id), nil
		}
		c.setLease(r.LeaseRevoke.Id, false)
	case *pb.RequestOp_Compact:
		return c.compact(r.Compact.Revision), nil
	case *pb.RequestOp_Checkpoint:
		return c.checkpoint(r.Checkpoint)
	}
	return nil, nil
}

func (c *preflight) put(p *pb.PutRequest) *Error {
	if p.IgnoreValue || p.IgnoreLease {
		if _, ok := c.s.current.Get(viewString(p.Key)); !ok {
			return refuse(pb.TxnError_TXN_ERROR_KEY_NOT_FOUND, "key %q does not exist, which ignore_value and ignore_lease need", p.Key)
		}
	}
	if p.Lease != 0 && !c.leaseExists(p.Lease) {
		return leaseNotFound(p.Lease)
	}
	return nil
}

func (c *preflight) leaseExists(id int64) bool {
	if granted, ok := c.leases[id]; ok {
		return granted
	}
	_, ok := c.s.leases.Get(id)
	return ok
}

func (c *preflight) setLease(id int64, exists bool) {
	if c.leases == nil {
		c.leases = make(map[int64]bool)
	}
	c.leases[id] = exists
}

func (c *preflight) compact(rev int64) *Error {
	switch {
	case rev <= c.compacted:
		return refuse(pb.TxnError_TXN_ERROR_COMPACTED, "revision %d is already compacted, up to %d", rev, c.compacted)
	case rev > c.s.revision:
		return refuse(pb.TxnError_TXN_ERROR_FUTURE_REVISION, "revision %d is in the future, the newest is %d", rev, c.s.revision)
	}
	c.compacted = rev
	return nil
}

// checkpoint compares the leader's hash with ours at the same index, if we
// still know it.
func (c *preflight) checkpoint(p *pb.Checkpoint) (*Error, error) {
	if p.Index >= c.index {
		return invalid("checkpoint of index %d in entry %d, which is not after it", p.Index, c.index), nil
	}
	own := c.s.hashes[p.Index%uint64(len(c.s.hashes))]
	if own.index == p.Index && own.index != 0 && own.hash != p.Hash {
		return nil, fmt.Errorf("fsm: entry %d: %w: at index %d the hash is %016x here and %016x there", c.index, ErrDiverged, p.Index, own.hash, p.Hash)
	}
	return nil, nil
}

func leaseNotFound(id int64) *Error {
	return refuse(pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND, "lease %d not found", id)
}

// txn carries out the branch taken.
func (x *execution) txn(t *pb.Txn, response *pb.TxnResponse) {
	response.Succeeded = x.path[0]
	x.path = x.path[1:]
	response.Revision = x.s.revision
	ops := branch(t, response.Succeeded)
	response.Responses = x.answers.responses(len(ops))
	for i, op := range ops {
		response.Responses[i] = x.op(op)
	}
}

// op carries out one operation. Those that etcd does not have answer with an
// empty response, so that responses are where their operations are.
func (x *execution) op(op *pb.RequestOp) *pb.ResponseOp {
	switch r := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		response, _ := x.s.read(r.RequestRange) // preflight has seen that it is not refused
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: response}}
	case *pb.RequestOp_RequestPut:
		return x.put(r.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		response := x.deleteRange(r.RequestDeleteRange)
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: response}}
	case *pb.RequestOp_RequestTxn:
		response := new(pb.TxnResponse)
		x.txn(r.RequestTxn, response)
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseTxn{ResponseTxn: response}}
	case *pb.RequestOp_LeaseGrant:
		x.s.leases.Set(r.LeaseGrant.Id, r.LeaseGrant.TtlSeconds)
		x.s.sum += leaseHash(r.LeaseGrant.Id, r.LeaseGrant.TtlSeconds)
	case *pb.RequestOp_LeaseRevoke:
		x.revoke(r.LeaseRevoke.Id)
	case *pb.RequestOp_Compact:
		x.tell(x.first) // before it can forget what an earlier transaction changed
		x.s.compact(r.Compact.Revision)
	}
	return new(pb.ResponseOp)
}

// tell adds the changes before a position to the events.
func (x *execution) tell(to uint64) {
	changed := x.s.between(x.told, to)
	x.told = to
	if x.events == nil {
		x.events = changed
	} else {
		x.events = append(x.events, changed...)
	}
}

func nested(t *pb.Txn) bool {
	for _, op := range t.Success {
		if op.GetRequestTxn() != nil {
			return true
		}
	}
	for _, op := range t.Failure {
		if op.GetRequestTxn() != nil {
			return true
		}
	}
	return false
}

// settle gives the transaction and all nested ones the revision at its end.
func settle(t *pb.TxnResponse, revision int64) {
	t.Revision = revision
	for _, op := range t.Responses {
		if nested := op.GetResponseTxn(); nested != nil {
			settle(nested, revision)
		}
	}
}
