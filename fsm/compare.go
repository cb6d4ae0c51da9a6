package fsm

import (
	"bytes"
	"cmp"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// branches appends, for the transaction and then for each nested one of the
// branch taken, in order, whether its compares hold. As in etcd all compares
// see the state before the transaction, those of nested transactions too.
func (s *state) branches(t *pb.Txn, path []bool) []bool {
	taken := s.holds(t.Compare)
	path = append(path, taken)
	for _, op := range branch(t, taken) {
		if nested := op.GetRequestTxn(); nested != nil {
			path = s.branches(nested, path)
		}
	}
	return path
}

func branch(t *pb.Txn, succeeded bool) []*pb.RequestOp {
	if succeeded {
		return t.Success
	}
	return t.Failure
}

func (s *state) holds(compares []*pb.Compare) bool {
	for _, c := range compares {
		if !s.compare(c) {
			return false
		}
	}
	return true
}

// compare holds when it does for all live keys of the interval. Where there is
// none, it is made with a version whose numbers are all 0, except that no value
// is not the empty value: that comparison is false.
func (s *state) compare(c *pb.Compare) bool {
	if len(c.RangeEnd) == 0 {
		if v, ok := s.current.Get(viewString(c.Key)); ok {
			return compareVersion(c, v)
		}
		return compareMissing(c)
	}
	if c.Target == pb.Compare_LEASE && c.Result == pb.Compare_NOT_EQUAL && c.GetLease() != 0 {
		return !s.attachedIn(c.GetLease(), boundsOf(c.Key, c.RangeEnd))
	}
	found, ok := false, true
	s.scan(boundsOf(c.Key, c.RangeEnd), s.revision, func(v *version) bool {
		found = true
		ok = compareVersion(c, v)
		return ok
	})
	if found {
		return ok
	}
	return compareMissing(c)
}

// attachedIn reports whether a key of the interval is attached to the lease, without
// looking at those that are not.
func (s *state) attachedIn(lease int64, b bounds) bool {
	found := false
	s.attached.Ascend(attachment{lease, b.from}, func(a attachment) bool {
		found = a.lease == lease && !b.beyond(a.key)
		return false
	})
	return found
}

func compareMissing(c *pb.Compare) bool {
	return c.Target != pb.Compare_VALUE && compareVersion(c, &version{})
}

// compareVersion takes a target_union of another kind than the target for 0, as
// etcd does.
func compareVersion(c *pb.Compare, v *version) bool {
	var order int
	switch c.Target {
	case pb.Compare_VERSION:
		order = cmp.Compare(v.ver, c.GetVersion())
	case pb.Compare_CREATE:
		order = cmp.Compare(v.create, c.GetCreateRevision())
	case pb.Compare_MOD:
		order = cmp.Compare(v.mod, c.GetModRevision())
	case pb.Compare_LEASE:
		order = cmp.Compare(v.lease, c.GetLease())
	case pb.Compare_VALUE:
		order = bytes.Compare(v.value(), c.GetValue())
	}
	switch c.Result {
	case pb.Compare_EQUAL:
		return order == 0
	case pb.Compare_GREATER:
		return order > 0
	case pb.Compare_LESS:
		return order < 0
	default:
		return order != 0
	}
}
