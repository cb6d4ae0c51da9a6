package etcd

import (
	"bytes"
	"cmp"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// holds reports whether all compares do, on the keyspace as clients see it.
func (a *admission) holds(compares []*pb.Compare) (bool, error) {
	for _, c := range compares {
		if ok, err := holds(a.v, c, a.shown); !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}

func holds(v *fsm.View, c *pb.Compare, shown owner) (bool, error) {
	if len(c.RangeEnd) == 0 && ownerOf(c.Key) == users {
		if kv, ok := v.Get(string(c.Key)); ok {
			return compareVersion(c, kv), nil
		}
		return compareMissing(c), nil
	}
	found, err := rangeView(v, &pb.RangeRequest{Key: c.Key, RangeEnd: c.RangeEnd, KeysOnly: c.Target != pb.Compare_VALUE}, shown)
	if err != nil {
		return false, err
	}
	if len(found.Kvs) == 0 {
		return compareMissing(c), nil
	}
	for _, kv := range found.Kvs {
		if !compareVersion(c, kv) {
			return false, nil
		}
	}
	return true, nil
}

// compareMissing is what a compare is where there is no key: one with zeros, except
// that no value is not the empty value.
func compareMissing(c *pb.Compare) bool {
	return c.Target != pb.Compare_VALUE && compareVersion(c, &pb.KeyValue{})
}

func compareVersion(c *pb.Compare, kv *pb.KeyValue) bool {
	var order int
	switch c.Target {
	case pb.Compare_VERSION:
		order = cmp.Compare(kv.Version, c.GetVersion())
	case pb.Compare_CREATE:
		order = cmp.Compare(kv.CreateRevision, c.GetCreateRevision())
	case pb.Compare_MOD:
		order = cmp.Compare(kv.ModRevision, c.GetModRevision())
	case pb.Compare_LEASE:
		order = cmp.Compare(kv.Lease, c.GetLease())
	case pb.Compare_VALUE:
		order = bytes.Compare(kv.Value, c.GetValue())
	}
	switch c.Result {
	case pb.Compare_EQUAL:
		return order == 0
	case pb.Compare_GREATER:
		return order > 0
	case pb.Compare_LESS:
		return order < 0
	}
	return order != 0
}

// compare rewrites one of the client's. What the store cannot say, because it is
// about documents or leaves keys out, is found out on the view, and guarded.
func (a *admission) compare(c *pb.Compare) ([]*pb.Compare, error) {
	if !touches(c.Key, c.RangeEnd) {
		return []*pb.Compare{c}, nil
	}
	parts := cut(c.Key, c.RangeEnd)
	if c.Target != pb.Compare_VALUE {
		parts = visible(c.Key, c.RangeEnd, a.shown)
	}
	if len(parts) == 1 && c.Target != pb.Compare_VALUE {
		return []*pb.Compare{narrowed(c, parts[0])}, nil
	}
	var out []*pb.Compare
	some := false
	for _, part := range parts {
		if !covers(c.Key, part.owner, a.shown) {
			continue
		}
		found, err := a.v.Range(&pb.RangeRequest{Key: part.from, RangeEnd: part.to, Limit: 1, KeysOnly: true})
		if err != nil {
			return nil, err
		}
		if len(found.Kvs) == 0 {
			a.guard(existence(part, pb.Compare_EQUAL))
			continue
		}
		some = true
		a.guard(existence(part, pb.Compare_GREATER))
		if c.Target == pb.Compare_VALUE && part.owner != users {
			ok, err := a.compareDocuments(c, part)
			if err != nil {
				return nil, err
			}
			out = append(out, constant(c, ok)...)
			continue
		}
		out = append(out, narrowed(c, part))
	}
	if !some {
		return constant(c, compareMissing(c)), nil
	}
	return out, nil
}

// compareDocuments compares what the system keeps in a part, and guards the result.
func (a *admission) compareDocuments(c *pb.Compare, part area) (bool, error) {
	found, err := a.v.Range(&pb.RangeRequest{Key: part.from, RangeEnd: part.to})
	if err != nil {
		return false, err
	}
	for _, kv := range found.Kvs {
		if !compareVersion(c, show(kv)) {
			// As long as this one stays, whatever the others do.
			a.guard(model.Unchanged(string(kv.Key), kv.ModRevision))
			return false, nil
		}
	}
	a.guard(&pb.Compare{
		Target: pb.Compare_MOD, Result: pb.Compare_LESS, Key: part.from, RangeEnd: part.to,
		TargetUnion: &pb.Compare_ModRevision{ModRevision: a.v.Revision() + 1},
	})
	return true, nil
}

// existence holds while there is no key in a part (EQUAL) or while there is one
// (GREATER).
func existence(part area, result pb.Compare_Result) *pb.Compare {
	return &pb.Compare{Target: pb.Compare_VERSION, Result: result, Key: part.from, RangeEnd: part.to, TargetUnion: &pb.Compare_Version{}}
}

// narrowed is a compare of a part of its range.
func narrowed(c *pb.Compare, part area) *pb.Compare {
	return &pb.Compare{Result: c.Result, Target: c.Target, TargetUnion: c.TargetUnion, Key: part.from, RangeEnd: part.to}
}

// constant is compares that always hold, or never.
func constant(c *pb.Compare, holds bool) []*pb.Compare {
	if holds {
		return nil
	}
	return []*pb.Compare{{Target: pb.Compare_VERSION, Result: pb.Compare_LESS, Key: c.Key, TargetUnion: &pb.Compare_Version{}}}
}
