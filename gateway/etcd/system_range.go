package etcd

import (
	"bytes"
	"cmp"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// rangeView answers a read with the system's keys shown as documents, up to those of
// an owner.
func rangeView(v *fsm.View, r *pb.RangeRequest, shown owner) (*pb.RangeResponse, error) {
	if !touches(r.Key, r.RangeEnd) {
		return v.Range(r)
	}
	if err := fsm.ValidateRange(r); err != nil {
		return nil, err
	}
	read := newReading(r, shown)
	answers := make([]*pb.RangeResponse, len(read.parts))
	for i, part := range read.parts {
		var err error
		if answers[i], err = v.Range(part); err != nil {
			return nil, err
		}
	}
	return read.answer(answers), nil
}

// reading is a read that touches the system, and the reads of the stored keys out
// of which it is answered.
type reading struct {
	asked *pb.RangeRequest
	// In key order; never none, for even what shows nothing may be refused for its
	// revision.
	parts []*pb.RangeRequest
	// nothing of what is asked for is shown.
	nothing bool
}

func newReading(r *pb.RangeRequest, shown owner) *reading {
	read := &reading{asked: r}
	spans := visible(r.Key, r.RangeEnd, shown)
	if len(spans) == 0 {
		read.nothing = true
		read.parts = []*pb.RangeRequest{{Key: r.Key, Revision: r.Revision, CountOnly: true}}
		return read
	}
	for _, s := range spans {
		part := proto.CloneOf(r)
		if len(r.RangeEnd) > 0 {
			part.Key, part.RangeEnd = s.from, s.to
		}
		documents := r.SortTarget == pb.RangeRequest_VALUE && covers(r.Key, system, shown)
		if n := read.before(); read.sorts() && (n > 0 || documents) {
			part.SortTarget, part.SortOrder, part.Limit = pb.RangeRequest_KEY, pb.RangeRequest_NONE, n
		}
		part.KeysOnly = r.KeysOnly && r.SortTarget != pb.RangeRequest_VALUE
		read.parts = append(read.parts, part)
	}
	return read
}

// sorts reports whether the answers to the parts must be sorted. Each has its own
// first keys, so that the first of all are among them, except where the store can't
// know the order, which is that of documents.
func (r *reading) sorts() bool { return r.asked.SortTarget != pb.RangeRequest_KEY }

// before is how many keys are sorted, 0 for all. As in etcd, where a target is
// given but no order and no filter, the first ones by key are sorted, one more than
// the limit.
func (r *reading) before() int64 {
	a := r.asked
	if a.Limit <= 0 || a.SortOrder != pb.RangeRequest_NONE ||
		a.MinModRevision != 0 || a.MaxModRevision != 0 || a.MinCreateRevision != 0 || a.MaxCreateRevision != 0 {
		return 0
	}
	return a.Limit + 1
}

// answer puts the answers to the parts together.
func (r *reading) answer(parts []*pb.RangeResponse) *pb.RangeResponse {
	out := &pb.RangeResponse{Revision: parts[0].Revision}
	if r.nothing {
		return out
	}
	if r.asked.SortOrder == pb.RangeRequest_DESCEND && !r.sorts() {
		slices.Reverse(parts)
	}
	for _, part := range parts {
		out.Count += part.Count
		out.More = out.More || part.More
		out.Kvs = append(out.Kvs, part.Kvs...)
	}
	if !r.asked.KeysOnly || r.asked.SortTarget == pb.RangeRequest_VALUE {
		for i, kv := range out.Kvs {
			out.Kvs[i] = show(kv)
		}
	}
	if r.sorts() {
		if n := r.before(); n > 0 {
			out.Kvs = out.Kvs[:min(int64(len(out.Kvs)), n)]
		}
		r.sort(out.Kvs)
	}
	if n := r.asked.Limit; n > 0 && int64(len(out.Kvs)) > n {
		out.Kvs, out.More = out.Kvs[:n], true
	}
	if r.asked.KeysOnly && r.asked.SortTarget == pb.RangeRequest_VALUE {
		for i, kv := range out.Kvs {
			out.Kvs[i] = &pb.KeyValue{Key: kv.Key, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Version: kv.Version, Lease: kv.Lease}
		}
	}
	return out
}

// sort leaves equals in the order of their keys.
func (r *reading) sort(kvs []*pb.KeyValue) {
	var order func(a, b *pb.KeyValue) int
	switch r.asked.SortTarget {
	case pb.RangeRequest_VERSION:
		order = func(a, b *pb.KeyValue) int { return cmp.Compare(a.Version, b.Version) }
	case pb.RangeRequest_CREATE:
		order = func(a, b *pb.KeyValue) int { return cmp.Compare(a.CreateRevision, b.CreateRevision) }
	case pb.RangeRequest_MOD:
		order = func(a, b *pb.KeyValue) int { return cmp.Compare(a.ModRevision, b.ModRevision) }
	default:
		order = func(a, b *pb.KeyValue) int { return bytes.Compare(a.Value, b.Value) }
	}
	if r.asked.SortOrder == pb.RangeRequest_DESCEND {
		ascend := order
		order = func(a, b *pb.KeyValue) int { return ascend(b, a) }
	}
	slices.SortStableFunc(kvs, order)
}
