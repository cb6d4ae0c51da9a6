package etcd

import (
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

// Few keys, so that everything meets everything; some below and some above the
// system's, which begin with "/", and an empty one, which is refused.
var (
	someKeys   = []string{"a", "a", "a", "a\x00", "ab", "b", "b", "c", "!", "0", "\xff", "\xff\xff", "\x00", ""}
	someEnds   = []string{"", "", "", "", "\x00", "\x00", "a\x00", "b", "c", "d", "\xff", "!", "0"}
	someValues = []string{"", "x", "y", "zz"}
	someLeases = []int64{1, 2, 7, -1}
)

// generator draws requests.
type generator struct {
	t *rapid.T
	// Revisions since the sequence began.
	revision int64
}

func newGenerator(t *rapid.T) *generator { return &generator{t: t} }

func (g *generator) request() proto.Message {
	switch kind := g.number("kind", 0, 23); {
	case kind < 6:
		return g.put()
	case kind < 8:
		return g.delete()
	case kind < 12:
		return g.rangeRequest()
	case kind < 18:
		return g.txn(0)
	case kind < 20:
		return &etcdpb.LeaseGrantRequest{ID: g.leaseID(), TTL: rapid.SampledFrom([]int64{1000, 9_000_000_000, 9_000_000_001}).Draw(g.t, "ttl")}
	case kind < 21:
		return &etcdpb.LeaseRevokeRequest{ID: g.leaseID()}
	case kind < 22:
		return &etcdpb.LeaseTimeToLiveRequest{ID: g.leaseID(), Keys: g.maybe("keys", 2)}
	case kind < 23 && g.maybe("leases", 4):
		return &etcdpb.LeaseLeasesRequest{}
	default:
		return &etcdpb.CompactionRequest{Revision: g.anyRevision("compact"), Physical: g.maybe("physical", 2)}
	}
}

func (g *generator) number(label string, from, to int) int {
	return rapid.IntRange(from, to).Draw(g.t, label)
}

// maybe is true once in so many times.
func (g *generator) maybe(label string, in int) bool { return g.number(label, 1, in) == in }

func (g *generator) bytes(label string, from []string) []byte {
	return []byte(rapid.SampledFrom(from).Draw(g.t, label))
}

func (g *generator) leaseID() int64 { return rapid.SampledFrom(someLeases).Draw(g.t, "lease") }

// anyRevision is mostly one of the sequence, or one a little after.
func (g *generator) anyRevision(label string) int64 {
	if g.maybe(label+" as it is", 5) {
		return int64(g.number(label, -2, 2))
	}
	return relative + rapid.Int64Range(0, g.revision+2).Draw(g.t, label)
}

func (g *generator) put() *etcdpb.PutRequest {
	p := &etcdpb.PutRequest{
		Key: g.bytes("key", someKeys), PrevKv: g.maybe("prev", 2),
		IgnoreValue: g.maybe("ignore value", 6), IgnoreLease: g.maybe("ignore lease", 6),
	}
	if !p.IgnoreValue || g.maybe("value anyway", 6) {
		p.Value = g.bytes("value", someValues)
	}
	if g.maybe("leased", 4) && (!p.IgnoreLease || g.maybe("lease anyway", 6)) {
		p.Lease = g.leaseID()
	}
	return p
}

func (g *generator) delete() *etcdpb.DeleteRangeRequest {
	return &etcdpb.DeleteRangeRequest{
		Key: g.bytes("key", someKeys), RangeEnd: g.bytes("end", someEnds), PrevKv: g.maybe("prev", 2),
	}
}

func (g *generator) rangeRequest() *etcdpb.RangeRequest {
	r := &etcdpb.RangeRequest{
		Key: g.bytes("key", someKeys), RangeEnd: g.bytes("end", someEnds),
		Limit:        int64(max(0, g.number("limit", -3, 4))),
		SortOrder:    etcdpb.RangeRequest_SortOrder(g.number("order", 0, 2)),
		SortTarget:   etcdpb.RangeRequest_SortTarget(g.number("target", 0, 4)),
		Serializable: g.maybe("serializable", 3), KeysOnly: g.maybe("keys", 3), CountOnly: g.maybe("count", 6),
	}
	if g.maybe("old", 2) {
		r.Revision = g.anyRevision("revision")
	}
	bound := func(label string) int64 {
		if g.maybe(label, 4) {
			return g.anyRevision(label)
		}
		return 0
	}
	r.MinModRevision, r.MaxModRevision = bound("min mod"), bound("max mod")
	r.MinCreateRevision, r.MaxCreateRevision = bound("min create"), bound("max create")
	return r
}

func (g *generator) txn(depth int) *etcdpb.TxnRequest {
	txn := &etcdpb.TxnRequest{}
	for range g.number("compares", 0, 2) {
		txn.Compare = append(txn.Compare, g.compare())
	}
	txn.Success, txn.Failure = g.ops(depth), g.ops(depth)
	return txn
}

func (g *generator) ops(depth int) []*etcdpb.RequestOp {
	ops := make([]*etcdpb.RequestOp, max(0, g.number("operations", -1, 3)))
	for i := range ops {
		ops[i] = g.op(depth)
	}
	return ops
}

func (g *generator) op(depth int) *etcdpb.RequestOp {
	switch kind := g.number("operation", 0, 29); {
	case kind == 0:
		return &etcdpb.RequestOp{}
	case kind < 12:
		return &etcdpb.RequestOp{Request: &etcdpb.RequestOp_RequestPut{RequestPut: g.put()}}
	case kind < 17:
		return &etcdpb.RequestOp{Request: &etcdpb.RequestOp_RequestDeleteRange{RequestDeleteRange: g.delete()}}
	case kind < 22 && depth < 3:
		return &etcdpb.RequestOp{Request: &etcdpb.RequestOp_RequestTxn{RequestTxn: g.txn(depth + 1)}}
	default:
		return &etcdpb.RequestOp{Request: &etcdpb.RequestOp_RequestRange{RequestRange: g.rangeRequest()}}
	}
}

// watch is of a range that the last change of the sequence is in.
func (g *generator) watch() *etcdpb.WatchCreateRequest {
	return &etcdpb.WatchCreateRequest{
		Key: g.bytes("key", []string{"a", "b", "\x00", "!"}), RangeEnd: g.bytes("end", []string{"\x00", "c", "\xff"}),
		StartRevision: relative + rapid.Int64Range(0, g.revision+1).Draw(g.t, "start"), PrevKv: g.maybe("prev", 2),
	}
}

func (g *generator) compare() *etcdpb.Compare {
	c := &etcdpb.Compare{
		Key: g.bytes("key", someKeys), RangeEnd: g.bytes("end", someEnds),
		Result: etcdpb.Compare_CompareResult(g.number("result", 0, 3)),
		Target: etcdpb.Compare_CompareTarget(g.number("target", 0, 4)),
	}
	union := int(c.Target)
	if g.maybe("another union", 6) {
		union = g.number("union", 0, 5)
	}
	switch union {
	case 0:
		c.TargetUnion = &etcdpb.Compare_Version{Version: int64(g.number("version", 0, 3))}
	case 1:
		c.TargetUnion = &etcdpb.Compare_CreateRevision{CreateRevision: g.anyRevision("create")}
	case 2:
		c.TargetUnion = &etcdpb.Compare_ModRevision{ModRevision: g.anyRevision("mod")}
	case 3:
		c.TargetUnion = &etcdpb.Compare_Value{Value: g.bytes("value", someValues)}
	case 4:
		c.TargetUnion = &etcdpb.Compare_Lease{Lease: g.leaseID()}
	}
	return c
}
