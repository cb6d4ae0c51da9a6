package fsm_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func put(key, value string) *pb.RequestOp {
	return putOp(&pb.PutRequest{Key: []byte(key), Value: []byte(value)})
}

func putOp(p *pb.PutRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: p}}
}

func del(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func rangeOp(r *pb.RangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
}

func nest(then, otherwise []*pb.RequestOp) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.Txn{Success: then, Failure: otherwise}}}
}

func grant(id, ttl int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: id, TtlSeconds: ttl}}}
}

func revoke(id int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_LeaseRevoke{LeaseRevoke: &pb.LeaseRevoke{Id: id}}}
}

func compact(rev int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: rev}}}
}

func checkpoint(index, hash uint64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_Checkpoint{Checkpoint: &pb.Checkpoint{Index: index, Hash: hash}}}
}

func ops(o ...*pb.RequestOp) []*pb.RequestOp { return o }

func txn(o ...*pb.RequestOp) *pb.Txn { return &pb.Txn{Success: o} }

// log applies transactions, each as an entry of its own.
type log struct {
	t interface {
		Helper()
		Fatal(...any)
	}
	*fsm.Store
	index uint64
}

func newLog(t interface {
	Helper()
	Fatal(...any)
}) *log {
	return &log{t: t, Store: fsm.New()}
}

func (l *log) apply(t *pb.Txn) *pb.TxnResult {
	l.t.Helper()
	l.index++
	results, _, err := l.Apply(l.index, &pb.Entry{FeatureLevel: fsm.FeatureLevel, TimeUnixNano: int64(l.index), Txns: []*pb.Txn{t}})
	if err != nil {
		l.t.Fatal(err)
	}
	return results[0]
}

// do applies a transaction that must be carried out.
func (l *log) do(o ...*pb.RequestOp) *pb.TxnResponse {
	l.t.Helper()
	r := l.apply(txn(o...))
	if r.Error != 0 {
		l.t.Fatal(r)
	}
	return r.Response
}

// The cases of etcd's own test of this rule (tests/common, TestTxnDuplicateKeys),
// and the corners that it leaves out.
func TestDuplicateKeys(t *testing.T) {
	a, inRange, outOfRange, fromKey := put("abc", "x"), del("a", "b"), del("abb", "abc"), del("a", "\x00")
	for name, c := range map[string]struct {
		ops []*pb.RequestOp
		ok  bool
	}{
		"put twice":                       {ops(a, a), false},
		"put and delete":                  {ops(a, del("abc", "")), false},
		"put and delete of its range":     {ops(a, inRange), false},
		"delete of its range and put":     {ops(inRange, a), false},
		"put and delete of another range": {ops(a, outOfRange), true},
		"two branches":                    {ops(nest(ops(a), ops(a))), true},
		"two branches, then put":          {ops(nest(ops(a), ops(a)), a), false},
		"nested put after put":            {ops(a, nest(ops(a), nil)), false},
		"two nested puts":                 {ops(nest(ops(a), nil), nest(nil, ops(a))), false},
		"nested delete of its range":      {ops(nest(ops(inRange), nil), a), false},
		"nested delete in the else":       {ops(nest(nil, ops(inRange)), a), false},
		"nested put, delete above":        {ops(nest(ops(a), nil), inRange), false},
		"nested put, later nested delete": {ops(nest(ops(a), nil), nest(ops(inRange), nil)), true},
		"nested delete, later nested put": {ops(nest(ops(inRange), nil), nest(ops(a), nil)), false},
		"put and delete in two branches":  {ops(nest(ops(a), ops(inRange))), true},
		"deletes only":                    {ops(del("abc", ""), inRange, del("abc", ""), inRange), true},
		"from key on":                     {ops(a, fromKey), true},
		"deep":                            {ops(nest(ops(nest(ops(nest(ops(a), nil)), nil)), nil), a), false},
		"touching intervals":              {ops(del("a", "b"), del("b", "c"), put("c", "")), true},
		"merged intervals":                {ops(del("c", "e"), del("a", "b"), del("b", "d"), put("bb", "")), false},
		"between intervals":               {ops(del("c", "e"), del("a", "b"), put("bb", "")), true},
		"empty interval":                  {ops(del("b", "a"), put("aa", "")), true},
	} {
		t.Run(name, func(t *testing.T) {
			var refused *fsm.Error
			err := fsm.ValidateTxn(txn(c.ops...))
			if errors.As(err, &refused) == c.ok || !c.ok && refused.Code != pb.TxnError_TXN_ERROR_DUPLICATE_KEY {
				t.Errorf("success: %v", err)
			}
			if err := fsm.ValidateTxn(&pb.Txn{Failure: c.ops}); (err == nil) != c.ok {
				t.Errorf("failure: %v", err)
			}
		})
	}
}

// A transaction that is refused as malformed: by ValidateTxn and by Apply.
func TestMalformed(t *testing.T) {
	deep := txn(put("k", ""))
	for range fsm.MaxDepth {
		deep = txn(&pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: deep}})
	}
	many := make([]*pb.RequestOp, fsm.MaxOps+1)
	for i := range many {
		many[i] = put(fmt.Sprint(i), "")
	}
	compare := func(c *pb.Compare) *pb.Txn { return &pb.Txn{Compare: []*pb.Compare{c}} }
	key := []byte("k")
	for want, c := range map[string]*pb.Txn{
		"no transaction":                     nil,
		"request_id has 33 bytes":            {RequestId: make([]byte, fsm.MaxRequestID+1)},
		"request_id is only for the outer":   txn(&pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.Txn{RequestId: key}}}),
		"nested more than 256 deep":          deep,
		"more than 262144 compares":          txn(many...),
		"more than 8388608 bytes":            txn(put("k", strings.Repeat("x", fsm.MaxTxnBytes))),
		"operation is empty":                 txn(&pb.RequestOp{}),
		"operation is empty or":              txn(nil),
		"put is empty":                       txn(&pb.RequestOp{Request: &pb.RequestOp_RequestPut{}}),
		"range is empty":                     txn(&pb.RequestOp{Request: &pb.RequestOp_RequestRange{}}),
		"delete_range is empty":              txn(&pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{}}),
		"nested transaction is empty":        txn(&pb.RequestOp{Request: &pb.RequestOp_RequestTxn{}}),
		"lease id is":                        txn(&pb.RequestOp{Request: &pb.RequestOp_LeaseGrant{}}),
		"lease ttl 0":                        txn(grant(1, 0)),
		"lease ttl 9000000001":               txn(grant(1, fsm.MaxLeaseTTL+1)),
		"lease id is 0":                      txn(&pb.RequestOp{Request: &pb.RequestOp_LeaseRevoke{}}),
		"compact is empty":                   txn(&pb.RequestOp{Request: &pb.RequestOp_Compact{}}),
		"checkpoint is empty":                txn(&pb.RequestOp{Request: &pb.RequestOp_Checkpoint{}}),
		"key is not provided":                txn(put("", "v")),
		"key is not":                         txn(del("", "b")),
		"key is":                             txn(rangeOp(&pb.RangeRequest{})),
		"more than 8388608 bytes of keys":    txn(del("k", strings.Repeat("k", fsm.MaxTxnBytes))),
		"value is provided":                  txn(putOp(&pb.PutRequest{Key: key, Value: key, IgnoreValue: true})),
		"lease is provided":                  txn(putOp(&pb.PutRequest{Key: key, Lease: 1, IgnoreLease: true})),
		"unknown sort_order 3":               txn(rangeOp(&pb.RangeRequest{Key: key, SortOrder: 3})),
		"unknown sort_target 5":              txn(rangeOp(&pb.RangeRequest{Key: key, SortTarget: 5})),
		"compare is empty":                   compare(nil),
		"key is not provi":                   compare(&pb.Compare{}),
		"compare: unknown result -1":         compare(&pb.Compare{Key: key, Result: -1}),
		"compare: unknown target 5":          compare(&pb.Compare{Key: key, Target: 5}),
		"duplicate key \"k\" given in trans": txn(put("k", ""), put("k", "")),
	} {
		t.Run(want, func(t *testing.T) {
			err := fsm.ValidateTxn(c)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Fatalf("got %v", err)
			}
			l := newLog(t)
			hash := l.View().Hash()
			if r := l.apply(c); r.Response != nil || r.Message != err.Error() {
				t.Errorf("applied with %v", r)
			}
			if v := l.View(); v.Revision() != 1 || v.Hash() == hash && v.Time().UnixNano() != 0 {
				t.Errorf("at revision %d", v.Revision())
			}
			// In the branch that is not taken as well.
			if len(c.GetSuccess()) > 0 && len(c.RequestId) == 0 {
				if err := fsm.ValidateTxn(&pb.Txn{Success: ops(put("z", "")), Failure: c.Success}); err == nil {
					t.Error("accepted in the other branch")
				}
			}
		})
	}
}

// A refusal that depends on the state comes before anything is written.
func TestRefusalChangesNothing(t *testing.T) {
	l := newLog(t)
	l.do(grant(1, 10), put("a", "1"))
	l.do(put("a", "2"))
	l.do(compact(3))
	key := []byte("a")
	for name, c := range map[string]struct {
		ops  []*pb.RequestOp
		code pb.TxnError
	}{
		"lease":                  {ops(putOp(&pb.PutRequest{Key: []byte("b"), Lease: 2})), pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND},
		"negative lease":         {ops(putOp(&pb.PutRequest{Key: []byte("b"), Lease: -1})), pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND},
		"lease revoked before":   {ops(revoke(1), putOp(&pb.PutRequest{Key: []byte("b"), Lease: 1})), pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND},
		"lease revoked twice":    {ops(revoke(1), revoke(1)), pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND},
		"lease exists":           {ops(grant(1, 5)), pb.TxnError_TXN_ERROR_LEASE_EXISTS},
		"lease granted twice":    {ops(grant(2, 5), grant(2, 5)), pb.TxnError_TXN_ERROR_LEASE_EXISTS},
		"no lease to revoke":     {ops(revoke(7)), pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND},
		"ignore_value":           {ops(putOp(&pb.PutRequest{Key: []byte("b"), IgnoreValue: true})), pb.TxnError_TXN_ERROR_KEY_NOT_FOUND},
		"ignore_lease":           {ops(putOp(&pb.PutRequest{Key: []byte("b"), IgnoreLease: true})), pb.TxnError_TXN_ERROR_KEY_NOT_FOUND},
		"compacted read":         {ops(rangeOp(&pb.RangeRequest{Key: key, Revision: 2})), pb.TxnError_TXN_ERROR_COMPACTED},
		"read of its own":        {ops(rangeOp(&pb.RangeRequest{Key: key, Revision: 4})), pb.TxnError_TXN_ERROR_FUTURE_REVISION},
		"compacted again":        {ops(compact(3)), pb.TxnError_TXN_ERROR_COMPACTED},
		"compacted ahead":        {ops(compact(4)), pb.TxnError_TXN_ERROR_FUTURE_REVISION},
		"nested":                 {ops(nest(ops(nest(ops(revoke(7)), nil)), nil)), pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND},
		"checkpoint of its own":  {ops(checkpoint(1<<40, 1)), pb.TxnError_TXN_ERROR_INVALID},
		"checkpoint, then grant": {ops(checkpoint(1, 0), grant(1, 1)), pb.TxnError_TXN_ERROR_LEASE_EXISTS},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.HasPrefix(name, "checkpoint, ") {
				c.ops[0] = checkpoint(1<<20, 0) // not known: no verdict
				l.index = 1 << 21
			}
			before := l.View()
			r := l.apply(&pb.Txn{RequestId: []byte("id"), Success: append(ops(put("z", "first"), del("a", "")), c.ops...)})
			if r.Error != c.code || r.Response != nil || r.Message == "" {
				t.Fatalf("got %v, want %v", r, c.code)
			}
			after := l.View()
			if after.Revision() != before.Revision() || after.Bytes() != before.Bytes() {
				t.Errorf("revision %d after %d", after.Revision(), before.Revision())
			}
			if kv, ok := after.Get("a"); !ok || string(kv.Value) != "2" || kv.Lease != 0 {
				t.Errorf("a is %v", kv)
			}
		})
	}
}

func TestRequestIDs(t *testing.T) {
	l := newLog(t)
	id := []byte("0123456789abcdef0123456789abcdef")
	first := proto.CloneOf(l.apply(&pb.Txn{RequestId: id, Success: ops(putOp(&pb.PutRequest{Key: []byte("a"), Value: []byte("1"), PrevKv: true}))}))
	l.do(put("a", "2"))
	again := l.apply(&pb.Txn{RequestId: id, Success: ops(put("a", "3"))})
	if !proto.Equal(first, again) || l.View().Revision() != 3 {
		t.Fatalf("answered %v, then %v at %d", first, again, l.View().Revision())
	}
	// An answer whose compares failed is one, too.
	failed := &pb.Txn{RequestId: []byte("f"), Compare: []*pb.Compare{{Key: []byte("new"), Target: pb.Compare_VERSION, Result: pb.Compare_GREATER}}}
	if r := l.apply(failed); r.Response.GetSucceeded() {
		t.Fatal(r)
	}
	l.do(put("new", ""))
	if r := l.apply(failed); r.Response.GetSucceeded() {
		t.Fatalf("carried out again: %v", r)
	}
	// A refusal is not remembered.
	refused := &pb.Txn{RequestId: []byte("x"), Success: ops(revoke(9))}
	if r := l.apply(refused); r.Error != pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND {
		t.Fatal(r)
	}
	l.do(grant(9, 1))
	if r := l.apply(refused); r.Error != 0 {
		t.Fatal(r)
	}
}

// Remembered ids are bounded in number, and which are remembered does not
// depend on restarts.
func TestRequestIDsAreBounded(t *testing.T) {
	l := newLog(t)
	request := func(i int) *pb.Txn {
		return &pb.Txn{RequestId: fmt.Appendf(nil, "request-%d", i), Success: ops(put("k", fmt.Sprint(i)))}
	}
	const extra = 1000
	e := &pb.Entry{FeatureLevel: 1}
	for i := range fsm.MaxRequests + extra {
		e.Txns = append(e.Txns, request(i))
	}
	if _, _, err := l.Apply(1, e); err != nil {
		t.Fatal(err)
	}
	l.index = 1
	rev := l.View().Revision()
	again := &log{t: t, Store: reopen(t, l.View()), index: 1}
	for _, l := range []*log{l, again} {
		if r := l.apply(request(extra)); r.Response.Revision != extra+2 || l.View().Revision() != rev {
			t.Errorf("the oldest that is remembered was carried out again: %v", r)
		}
		if r := l.apply(request(extra - 1)); r.Response.Revision != rev+1 {
			t.Errorf("an old one is still remembered: %v", r)
		}
	}
	if l.View().Hash() != again.View().Hash() {
		t.Error("the hash depends on a restart")
	}
}

// A remembered answer does not hold large reads, and all of them together are
// bounded.
func TestRememberedAnswersAreBounded(t *testing.T) {
	l := newLog(t)
	big := strings.Repeat("x", 600<<10)
	l.do(put("a", big), put("b", big))
	read := rangeOp(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("c")})
	all := &pb.Txn{RequestId: []byte("all"), Success: ops(read, putOp(&pb.PutRequest{Key: []byte("a"), Value: []byte(big), PrevKv: true}),
		nest(ops(&pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("b"), PrevKv: true}}}), nil))}
	first := l.apply(all).Response
	if len(first.Responses[0].GetResponseRange().Kvs) != 2 || first.Responses[1].GetResponsePut().PrevKv == nil ||
		len(first.Responses[2].GetResponseTxn().Responses[0].GetResponseDeleteRange().PrevKvs) != 1 {
		t.Fatal("the first answer is cut")
	}
	again := l.apply(all).Response
	if r := again.Responses[0].GetResponseRange(); again.Revision != first.Revision || r.Count != 2 || !r.More || len(r.Kvs) != 0 ||
		again.Responses[1].GetResponsePut().PrevKv != nil || again.Responses[2].GetResponseTxn().Responses[0].GetResponseDeleteRange().Deleted != 1 {
		t.Fatalf("the second answer is %v", again)
	}
	// 60 answers of 600 KiB are more than fits.
	one := func(i int) *pb.Txn {
		return &pb.Txn{RequestId: fmt.Appendf(nil, "one-%d", i), Success: ops(rangeOp(&pb.RangeRequest{Key: []byte("a")}), put("n", fmt.Sprint(i)))}
	}
	for i := range 60 {
		l.apply(one(i))
	}
	rev := l.View().Revision()
	if r := l.apply(one(59)); r.Response.Revision != rev {
		t.Errorf("the newest is forgotten")
	}
	if r := l.apply(one(0)); r.Response.Revision != rev+1 {
		t.Errorf("the oldest is still remembered")
	}
}

func TestCheckpoints(t *testing.T) {
	l := newLog(t)
	l.do(put("a", "1"))
	v := l.View()
	l.do(checkpoint(v.Index(), v.Hash()))
	same := reopen(t, v)
	if _, _, err := same.Apply(9, &pb.Entry{FeatureLevel: 1, Txns: []*pb.Txn{txn(checkpoint(v.Index(), v.Hash()))}}); err != nil {
		t.Fatalf("right after a restore: %v", err)
	}
	if _, _, err := same.Apply(10, &pb.Entry{FeatureLevel: 1, Txns: []*pb.Txn{txn(checkpoint(5, 1))}}); err != nil {
		t.Fatalf("of an index that was never applied here: %v", err)
	}
	wrong := &pb.Entry{FeatureLevel: 1, Txns: []*pb.Txn{txn(put("b", "")), txn(checkpoint(v.Index(), v.Hash()+1))}}
	if _, _, err := l.Apply(100, wrong); !errors.Is(err, fsm.ErrDiverged) {
		t.Fatalf("got %v", err)
	}
	if _, _, err := l.Apply(101, &pb.Entry{FeatureLevel: 1}); !errors.Is(err, fsm.ErrDiverged) {
		t.Fatalf("went on after it: %v", err)
	}
}

func TestFeatureLevels(t *testing.T) {
	for name, e := range map[string]*pb.Entry{"none": {}, "newer": {FeatureLevel: fsm.FeatureLevel + 1}, "nil": nil} {
		t.Run(name, func(t *testing.T) {
			s := fsm.New()
			if _, _, err := s.Apply(1, e); !errors.Is(err, fsm.ErrFeatureLevel) {
				t.Fatalf("got %v", err)
			}
			if _, _, err := s.Apply(2, &pb.Entry{FeatureLevel: 1}); !errors.Is(err, fsm.ErrFeatureLevel) {
				t.Fatalf("went on after it: %v", err)
			}
		})
	}
}

// Time is the leader's, and stands still when a leader's clock is behind.
func TestTime(t *testing.T) {
	s := fsm.New()
	for i, c := range []struct{ at, want int64 }{{5, 5}, {3, 5}, {9, 9}, {-1, 9}} {
		if _, _, err := s.Apply(uint64(i+1), &pb.Entry{FeatureLevel: 1, TimeUnixNano: c.at}); err != nil {
			t.Fatal(err)
		}
		if got := s.View().Time().UnixNano(); got != c.want {
			t.Errorf("after %d it is %d, want %d", c.at, got, c.want)
		}
	}
}

// What is deleted and put again in one transaction is seen as such by watchers,
// in that order; a compaction to that revision keeps it so.
func TestChangesOfOneKeyInOneRevision(t *testing.T) {
	l := newLog(t)
	l.do(grant(1, 10), putOp(&pb.PutRequest{Key: []byte("a"), Value: []byte("1"), Lease: 1}))
	r := l.do(revoke(1), putOp(&pb.PutRequest{Key: []byte("a"), IgnoreValue: true}))
	if r.Revision != 3 {
		t.Fatal(r)
	}
	l.do(compact(3))
	for _, v := range []*fsm.View{l.View(), reopen(t, l.View()).View()} {
		events, _, err := v.Events(2, 1)
		if err != nil || len(events) != 2 || events[0].Type != pb.KeyEvent_DELETE || events[1].Type != pb.KeyEvent_PUT {
			t.Fatal(events, err)
		}
		if kv := events[1].Kv; kv.CreateRevision != 3 || kv.Version != 1 || string(kv.Value) != "1" || kv.Lease != 0 {
			t.Fatal(kv)
		}
	}
}
