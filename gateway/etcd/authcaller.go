package etcd

import (
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// caller is who calls, and what they may. It is shared and never changes.
type caller struct {
	// actor is how events name the caller.
	actor string
	// user is the etcd user; nil where none is needed.
	user *user
	// refused, where it is set, is the answer to all that needs a user.
	refused error
	// root may read and write all keys; else reads and writes say which.
	root          bool
	reads, writes grants
	// viewer changes nothing, whatever else is granted.
	viewer bool
	// limited is not shown what is for admins.
	limited bool
	// manages users, members, alarms and the like.
	manages bool
	// as is the state that all this is of.
	as *authState
}

// may refuses a transaction of which the caller may not do a part, in the branch not
// taken too. The compares that it returns hold as long as it would decide the same.
// v tells which keys are attached to leases; nil stands for what is known here.
func (c *caller) may(v *fsm.View, txn *pb.Txn) ([]*pb.Compare, error) {
	if c.root && !c.viewer {
		return c.as.guard, nil
	}
	check := permission{caller: c, view: v}
	if err := check.txn(txn); err != nil {
		return nil, err
	}
	if len(check.guards) == 0 {
		return c.as.guard, nil
	}
	return append(check.guards, c.as.guard...), nil
}

// mayAdminister refuses who may not change users, members, alarms and the like.
func (c *caller) mayAdminister() error {
	switch {
	case c.refused != nil:
		return c.refused
	case !c.manages:
		return rpctypes.ErrGRPCPermissionDenied
	}
	return nil
}

// shown is up to whose keys the caller is shown them.
func (c *caller) shown() owner {
	if c.limited {
		return system
	}
	return restricted
}

// mayRead refuses reading and watching [key, end), an end as in a range request.
func (c *caller) mayRead(key, end []byte) error { return c.allowed(c.reads, key, end) }

// mayWrite refuses changing keys in [key, end).
func (c *caller) mayWrite(key, end []byte) error {
	if c.viewer && c.refused == nil {
		return rpctypes.ErrGRPCPermissionDenied
	}
	return c.allowed(c.writes, key, end)
}

func (c *caller) allowed(granted grants, key, end []byte) error {
	switch {
	case c.refused != nil:
		return c.refused
	case c.root || granted.cover(key, end):
		return nil
	}
	return rpctypes.ErrGRPCPermissionDenied
}

// mayReadLease refuses knowing which keys are attached to a lease.
func (c *caller) mayReadLease(v *fsm.View, id int64) error {
	if c.root || c.refused != nil {
		return c.refused
	}
	for _, key := range v.LeaseKeys(id) {
		if err := c.mayRead(key, nil); err != nil {
			return err
		}
	}
	return nil
}

// mayWriteLease refuses changing when the keys that are attached to a lease go.
func (c *caller) mayWriteLease(v *fsm.View, id int64) error {
	switch {
	case c.refused != nil:
		return c.refused
	case c.viewer:
		return rpctypes.ErrGRPCPermissionDenied
	case c.root:
		return nil
	}
	for _, key := range v.LeaseKeys(id) {
		if err := c.mayWrite(key, nil); err != nil {
			return err
		}
	}
	return nil
}

// permission goes through a transaction.
type permission struct {
	*caller
	view   *fsm.View
	guards []*pb.Compare
}

func (p *permission) txn(t *pb.Txn) error {
	for _, c := range t.Compare {
		if err := p.mayRead(c.Key, c.RangeEnd); err != nil {
			return err
		}
	}
	for _, ops := range [][]*pb.RequestOp{t.Success, t.Failure} {
		for _, op := range ops {
			if err := p.op(op); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *permission) op(op *pb.RequestOp) error {
	switch op := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		return p.mayRead(op.RequestRange.GetKey(), op.RequestRange.GetRangeEnd())
	case *pb.RequestOp_RequestPut:
		return p.put(op.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		r := op.RequestDeleteRange
		if err := p.mayWrite(r.GetKey(), r.GetRangeEnd()); err != nil {
			return err
		}
		if r.GetPrevKv() {
			return p.mayRead(r.GetKey(), r.GetRangeEnd())
		}
		return nil
	case *pb.RequestOp_RequestTxn:
		return p.txn(op.RequestTxn)
	case *pb.RequestOp_LeaseRevoke:
		return p.lease(op.LeaseRevoke.GetId())
	case *pb.RequestOp_LeaseGrant:
		if p.viewer && p.refused == nil {
			return rpctypes.ErrGRPCPermissionDenied
		}
		return p.refused
	case *pb.RequestOp_Compact: // root's
		if p.refused != nil {
			return p.refused
		}
	}
	return rpctypes.ErrGRPCPermissionDenied
}

func (p *permission) put(r *pb.PutRequest) error {
	if err := p.mayWrite(r.GetKey(), nil); err != nil {
		return err
	}
	if r.GetLease() != 0 {
		if err := p.lease(r.GetLease()); err != nil {
			return err
		}
	}
	if r.GetPrevKv() {
		return p.mayRead(r.GetKey(), nil)
	}
	return nil
}

// lease refuses a lease that is attached to keys which the caller may not write, now
// or when the transaction is applied: whoever uses a lease can revoke it.
func (p *permission) lease(id int64) error {
	if p.view == nil {
		p.view = p.as.store.View()
	}
	if err := p.mayWriteLease(p.view, id); err != nil || p.root {
		return err
	}
	for _, gap := range p.writes.gaps() {
		p.guards = append(p.guards, &pb.Compare{
			Key: gap.from, RangeEnd: gap.rangeEnd(),
			Target: pb.Compare_LEASE, Result: pb.Compare_NOT_EQUAL,
			TargetUnion: &pb.Compare_Lease{Lease: id},
		})
	}
	return nil
}
