package fsm_test

import (
	"math"

	"pgregory.net/rapid"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Few keys, leases and request ids, so that everything meets everything.
var (
	someKey   = rapid.SampledFrom([]string{"a", "a\x00", "ab", "b", "c", "d\xff"})
	someEnd   = rapid.SampledFrom([]string{"", "", "", "\x00", "a\x00", "b", "c", "d", "\xff"})
	someLease = rapid.SampledFrom([]int64{1, 2, -1, math.MinInt64})
	someValue = rapid.SampledFrom([]string{"", "x", "y", "zz"})
	someID    = rapid.SampledFrom([]string{"", "", "", "r1", "r2", "r3"})
	someWhole = rapid.SampledFrom([]bool{true, false})
)

// around is a revision near those that there are.
func around(t *rapid.T, rev int64, label string) int64 {
	return rapid.Int64Range(0, rev+2).Draw(t, label)
}

func genTxn(t *rapid.T, rev int64, depth int) *pb.Txn {
	txn := &pb.Txn{Success: genOps(t, rev, depth)}
	for range rapid.IntRange(0, 2).Draw(t, "compares") {
		txn.Compare = append(txn.Compare, genCompare(t, rev))
	}
	if len(txn.Compare) > 0 {
		txn.Failure = genOps(t, rev, depth)
	}
	if depth == 0 {
		txn.RequestId = []byte(someID.Draw(t, "id"))
	}
	return txn
}

func genOps(t *rapid.T, rev int64, depth int) []*pb.RequestOp {
	ops := make([]*pb.RequestOp, rapid.IntRange(0, 3).Draw(t, "ops"))
	for i := range ops {
		ops[i] = genOp(t, rev, depth)
	}
	return ops
}

func genOp(t *rapid.T, rev int64, depth int) *pb.RequestOp {
	key, end := []byte(someKey.Draw(t, "key")), []byte(someEnd.Draw(t, "end"))
	switch kind := rapid.IntRange(0, 19).Draw(t, "kind"); {
	case kind < 8:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: genPut(t, key)}}
	case kind < 11:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{
			Key: key, RangeEnd: end, PrevKv: someWhole.Draw(t, "prev"),
		}}}
	case kind < 13:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: genRange(t, rev)}}
	case kind < 15 && depth < 2:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: genTxn(t, rev, depth+1)}}
	case kind < 17:
		return &pb.RequestOp{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{
			Id: someLease.Draw(t, "lease"), TtlSeconds: rapid.Int64Range(1, 9).Draw(t, "ttl"),
		}}}
	case kind < 18:
		return &pb.RequestOp{Request: &pb.RequestOp_LeaseRevoke{LeaseRevoke: &pb.LeaseRevoke{Id: someLease.Draw(t, "lease")}}}
	case kind < 19:
		return &pb.RequestOp{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: around(t, rev, "compact")}}}
	default:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: []byte("plain")}}}
	}
}

func genPut(t *rapid.T, key []byte) *pb.PutRequest {
	p := &pb.PutRequest{Key: key, PrevKv: someWhole.Draw(t, "prev")}
	switch rapid.IntRange(0, 9).Draw(t, "ignore") {
	case 0:
		p.IgnoreValue = true
	case 1:
		p.IgnoreLease = true
	case 2:
		p.IgnoreValue, p.IgnoreLease = true, true
	}
	if !p.IgnoreValue {
		p.Value = []byte(someValue.Draw(t, "value"))
	}
	if !p.IgnoreLease && rapid.IntRange(0, 2).Draw(t, "leased") == 0 {
		p.Lease = someLease.Draw(t, "lease")
	}
	return p
}

func genCompare(t *rapid.T, rev int64) *pb.Compare {
	c := &pb.Compare{
		Key:      []byte(someKey.Draw(t, "key")),
		RangeEnd: []byte(someEnd.Draw(t, "end")),
		Result:   pb.Compare_Result(rapid.IntRange(0, 3).Draw(t, "result")),
		Target:   pb.Compare_Target(rapid.IntRange(0, 4).Draw(t, "target")),
	}
	n := rapid.Int64Range(0, 3).Draw(t, "number")
	switch rapid.IntRange(0, 5).Draw(t, "union") {
	case 0:
		c.TargetUnion = &pb.Compare_Version{Version: n}
	case 1:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: around(t, rev, "create")}
	case 2:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: around(t, rev, "mod")}
	case 3:
		c.TargetUnion = &pb.Compare_Value{Value: []byte(someValue.Draw(t, "value"))}
	case 4:
		c.TargetUnion = &pb.Compare_Lease{Lease: n}
	}
	return c
}

func genRange(t *rapid.T, rev int64) *pb.RangeRequest {
	r := &pb.RangeRequest{
		Key:        []byte(someKey.Draw(t, "key")),
		RangeEnd:   []byte(rapid.SampledFrom([]string{"", "\x00", "\x00", "b", "d", "\xff"}).Draw(t, "end")),
		Limit:      rapid.Int64Range(0, 4).Draw(t, "limit"),
		SortOrder:  pb.RangeRequest_SortOrder(rapid.IntRange(0, 2).Draw(t, "order")),
		SortTarget: pb.RangeRequest_SortTarget(rapid.IntRange(0, 4).Draw(t, "target")),
		KeysOnly:   someWhole.Draw(t, "keys"),
		CountOnly:  rapid.IntRange(0, 5).Draw(t, "count") == 0,
	}
	if rapid.IntRange(0, 2).Draw(t, "old") > 0 {
		r.Revision = around(t, rev, "revision")
	}
	bound := func(label string) int64 {
		if rapid.IntRange(0, 3).Draw(t, label+"?") > 0 {
			return 0
		}
		return around(t, rev, label)
	}
	r.MinModRevision, r.MaxModRevision = bound("minmod"), bound("maxmod")
	r.MinCreateRevision, r.MaxCreateRevision = bound("mincreate"), bound("maxcreate")
	return r
}
