package etcd

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// edges are keys on both sides of where the system's areas begin and end.
var edges = []string{
	"\x00", "-", "/", "/a", "/assignments", "/assignments0", "/mine", "/nodes", "/nodes0", "/system", "/system0", "/workloads", "/workloads0", "/zz", "0", "a", "zz",
	"/assignments/", "/nodes/", "/system/", "/system/auth", "/system/auth/", "/system/auth0", "/workloads/", "/workloads/web", "/workloads/web/",
	"/workloads/web/status", "/nodes/n1", "/nodes/n1/lease", "/system/auth/users/a", "/system/auth/users/b", "/system/cluster", "/system/epoch",
	"/tokens/t1", "/events/1-a", "/events/2-b",
}

// keyspace is a random history.
func keyspace(t *rapid.T) *fsm.View { return randomStore(t).View() }

func randomStore(t *rapid.T) *fsm.Store {
	store := fsm.New()
	for i := range rapid.IntRange(0, 12).Draw(t, "transactions") {
		txn := &pb.Txn{}
		for _, key := range rapid.SliceOfNDistinct(rapid.SampledFrom(edges), 1, 5, rapid.ID).Draw(t, "keys") {
			if rapid.IntRange(0, 4).Draw(t, "what") == 0 {
				txn.Success = append(txn.Success, model.Delete(key))
				continue
			}
			txn.Success = append(txn.Success, model.Put(key, &pb.ClusterInfo{Id: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "value")}, 0))
		}
		results, _, err := store.Apply(uint64(i+1), &pb.Entry{FeatureLevel: fsm.FeatureLevel, Txns: []*pb.Txn{txn}})
		if err != nil || results[0].Error != pb.TxnError_TXN_ERROR_NONE {
			t.Fatalf("%v, %v", results, err)
		}
	}
	return store
}

// anybody is a caller, to whom all keys or some are shown.
func anybody(t *rapid.T) *caller { return &caller{limited: rapid.Bool().Draw(t, "limited")} }

// interval is a key with a range end or none.
func interval(t *rapid.T) (key, end []byte) {
	key = []byte(rapid.SampledFrom(edges).Draw(t, "key"))
	switch rapid.IntRange(0, 3).Draw(t, "end") {
	case 0:
	case 1:
		end = []byte{0}
	case 2:
		end = model.PrefixEnd(string(key))
	default:
		end = []byte(rapid.SampledFrom(edges).Draw(t, "range end"))
	}
	return key, end
}

// shownIn is what a client sees in an interval, key by key: the definition.
func shownIn(t *rapid.T, v *fsm.View, who *caller, key, end []byte, revision int64) []*pb.KeyValue {
	all, err := v.Range(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: revision})
	if err != nil {
		t.Fatal(err)
	}
	var shown []*pb.KeyValue
	for _, kv := range all.Kvs {
		is := bytes.Equal(kv.Key, key)
		if len(end) > 0 {
			is = bytes.Compare(kv.Key, key) >= 0 && (string(end) == "\x00" || bytes.Compare(kv.Key, end) < 0)
		}
		secret := strings.HasPrefix(string(kv.Key), "/system/auth/") || who.limited && strings.HasPrefix(string(kv.Key), "/tokens/")
		if is && !secret && (key[0] == '/' || !model.IsSystemKey(string(kv.Key))) {
			shown = append(shown, show(kv))
		}
	}
	return shown
}

// naive answers a read out of that.
func naive(t *rapid.T, v *fsm.View, who *caller, r *pb.RangeRequest) *pb.RangeResponse {
	kvs := shownIn(t, v, who, r.Key, r.RangeEnd, r.Revision)
	out := &pb.RangeResponse{Revision: v.Revision(), Count: int64(len(kvs))}
	if r.CountOnly {
		return out
	}
	all := len(kvs)
	kvs = slices.DeleteFunc(kvs, func(kv *pb.KeyValue) bool {
		return r.MinModRevision != 0 && kv.ModRevision < r.MinModRevision || r.MaxModRevision != 0 && kv.ModRevision > r.MaxModRevision ||
			r.MinCreateRevision != 0 && kv.CreateRevision < r.MinCreateRevision || r.MaxCreateRevision != 0 && kv.CreateRevision > r.MaxCreateRevision
	})
	filtered := r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0
	if r.SortTarget != pb.RangeRequest_KEY && r.SortOrder == pb.RangeRequest_NONE && !filtered && r.Limit > 0 && int64(all) > r.Limit {
		kvs = kvs[:r.Limit+1]
	}
	by := map[pb.RangeRequest_SortTarget]func(a, b *pb.KeyValue) int{
		pb.RangeRequest_KEY:     func(a, b *pb.KeyValue) int { return bytes.Compare(a.Key, b.Key) },
		pb.RangeRequest_VERSION: func(a, b *pb.KeyValue) int { return cmp.Compare(a.Version, b.Version) },
		pb.RangeRequest_CREATE:  func(a, b *pb.KeyValue) int { return cmp.Compare(a.CreateRevision, b.CreateRevision) },
		pb.RangeRequest_MOD:     func(a, b *pb.KeyValue) int { return cmp.Compare(a.ModRevision, b.ModRevision) },
		pb.RangeRequest_VALUE:   func(a, b *pb.KeyValue) int { return bytes.Compare(a.Value, b.Value) },
	}[r.SortTarget]
	slices.SortStableFunc(kvs, func(a, b *pb.KeyValue) int {
		if r.SortOrder == pb.RangeRequest_DESCEND {
			return by(b, a)
		}
		return by(a, b)
	})
	if r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs, out.More = kvs[:r.Limit], true
	}
	for _, kv := range kvs {
		kv = proto.CloneOf(kv)
		if r.KeysOnly {
			kv.Value = nil
		}
		out.Kvs = append(out.Kvs, kv)
	}
	return out
}

func TestReadsAreThoseOfTheShownKeyspace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v, who := keyspace(t), anybody(t)
		revision := func(name string) int64 { return rapid.SampledFrom([]int64{0, 0, 0, 2, 3, 5}).Draw(t, name) }
		for range 10 {
			r := &pb.RangeRequest{
				Limit:      rapid.Int64Range(0, 6).Draw(t, "limit"),
				SortOrder:  pb.RangeRequest_SortOrder(rapid.IntRange(0, 2).Draw(t, "order")),
				SortTarget: pb.RangeRequest_SortTarget(rapid.IntRange(0, 4).Draw(t, "target")),
				KeysOnly:   rapid.Bool().Draw(t, "keys only"), CountOnly: rapid.IntRange(0, 5).Draw(t, "count only") == 0,
				Revision:       min(v.Revision(), revision("revision")),
				MinModRevision: revision("min mod"), MaxModRevision: revision("max mod"), MinCreateRevision: revision("min create"), MaxCreateRevision: revision("max create"),
			}
			r.Key, r.RangeEnd = interval(t)
			asked := proto.CloneOf(r)
			want := naive(t, v, who, r)
			got, err := rangeView(v, r, who.shown())
			if err != nil || !proto.Equal(got, want) || !proto.Equal(r, asked) {
				t.Fatalf("%v:\ngot  %v, %v\nwant %v", asked, got, err, want)
			}
			got, err = inTxn(v, who, r)
			if err != nil || !proto.Equal(got, want) {
				t.Fatalf("in a transaction: %v:\ngot  %v, %v\nwant %v", asked, got, err, want)
			}
			for _, key := range edges {
				_, ok := v.Get(key)
				in := shownIn(t, v, who, r.Key, r.RangeEnd, 0)
				shown := slices.ContainsFunc(in, func(kv *pb.KeyValue) bool { return string(kv.Key) == key })
				if ok && inside(key, r) && covers(r.Key, ownerOf([]byte(key)), who.shown()) != shown {
					t.Fatalf("%v: whether %q is seen", asked, key)
				}
			}
		}
	})
}

// Deletes take away what is shown, and where that is the system's they are refused.
func TestDeletesAreThoseOfTheShownKeyspace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		store := randomStore(t)
		v := store.View()
		d := &pb.DeleteRangeRequest{PrevKv: rapid.Bool().Draw(t, "prev_kv")}
		d.Key, d.RangeEnd = interval(t)
		if !touches(d.Key, d.RangeEnd) {
			return
		}
		in := shownIn(t, v, &caller{}, d.Key, d.RangeEnd, 0)
		admitted, err := (&Server{}).admit(v, &caller{}, &pb.Txn{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: d}}}})
		if err != nil {
			secret := len(d.RangeEnd) > 0 && d.Key[0] == '/' && slices.ContainsFunc(cut(d.Key, d.RangeEnd), func(a area) bool { return a.owner == hidden })
			if len(d.RangeEnd) > 0 && !secret && !slices.ContainsFunc(in, func(kv *pb.KeyValue) bool { return ownerOf(kv.Key) != users }) {
				t.Fatalf("%v: %v", d, err)
			}
			return
		}
		// Parts go when what they belong to is gone.
		in = slices.DeleteFunc(in, func(kv *pb.KeyValue) bool { return ownerOf(kv.Key) != users && kindOf(string(kv.Key)).part })
		guarded, unwrap := guard(admitted.txn, admitted.guards)
		results, _, err := store.Apply(100, &pb.Entry{FeatureLevel: fsm.FeatureLevel, Txns: []*pb.Txn{guarded}})
		if err != nil || results[0].Error != pb.TxnError_TXN_ERROR_NONE {
			t.Fatalf("%v: %v, %v", d, results, err)
		}
		answer := admitted.restore(unwrap(results[0].Response)).Responses[0].GetResponseDeleteRange()
		want := &pb.DeleteRangeResponse{Deleted: int64(len(in))}
		if d.PrevKv {
			want.PrevKvs = in
		}
		if !proto.Equal(answer, want) {
			t.Fatalf("%v: %v, want %v", d, answer, want)
		}
		for _, kv := range shownIn(t, store.View(), &caller{}, []byte{0}, []byte{0}, 0) {
			if inside(string(kv.Key), &pb.RangeRequest{Key: d.Key, RangeEnd: d.RangeEnd}) {
				t.Fatalf("%v: %q is still there", d, kv.Key)
			}
		}
		if d.Key[0] != '/' && store.View().Len() != v.Len()-len(in) {
			t.Fatalf("%v: %d keys of %d are left", d, store.View().Len(), v.Len())
		}
	})
}

func inside(key string, r *pb.RangeRequest) bool {
	return takes(key, &pb.DeleteRangeRequest{Key: r.Key, RangeEnd: r.RangeEnd})
}

// inTxn reads by way of admission.
func inTxn(v *fsm.View, who *caller, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	txn := &pb.Txn{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: r}}}}
	admitted, err := (&Server{}).admit(v, who, txn)
	if err != nil {
		return nil, err
	}
	answer, err := v.Txn(admitted.txn)
	if err != nil {
		return nil, err
	}
	return admitted.restore(answer).Responses[0].GetResponseRange(), nil
}

func TestComparesAreThoseOfTheShownKeyspace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v, who := keyspace(t), anybody(t)
		for range 10 {
			c := &pb.Compare{
				Result: pb.Compare_Result(rapid.IntRange(0, 3).Draw(t, "result")),
				Target: pb.Compare_Target(rapid.IntRange(0, 4).Draw(t, "target")),
			}
			number := rapid.Int64Range(0, 6).Draw(t, "number")
			c.Key, c.RangeEnd = interval(t)
			in := shownIn(t, v, who, c.Key, c.RangeEnd, 0)
			switch c.Target {
			case pb.Compare_VERSION:
				c.TargetUnion = &pb.Compare_Version{Version: number}
			case pb.Compare_CREATE:
				c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: number}
			case pb.Compare_MOD:
				c.TargetUnion = &pb.Compare_ModRevision{ModRevision: number}
			case pb.Compare_LEASE:
				c.TargetUnion = &pb.Compare_Lease{Lease: number}
			case pb.Compare_VALUE:
				value := []byte("x")
				if len(in) > 0 {
					value = rapid.SampledFrom(in).Draw(t, "value of").Value
				}
				c.TargetUnion = &pb.Compare_Value{Value: value}
			}
			want := len(in) > 0 || compareMissing(c)
			for _, kv := range in {
				want = want && compareVersion(c, kv)
			}
			if got, err := holds(v, c, who.shown()); err != nil || got != want {
				t.Fatalf("%v on the view: %v, %v", c, got, err)
			}
			otherwise := &pb.RangeRequest{Key: []byte("a")}
			admitted, err := (&Server{}).admit(v, who, &pb.Txn{
				Compare: []*pb.Compare{c}, Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: otherwise}}},
			})
			if err != nil {
				t.Fatal(err)
			}
			guarded, unwrap := guard(admitted.txn, admitted.guards)
			answer, err := v.Txn(guarded)
			if err != nil {
				t.Fatal(err)
			}
			inner := unwrap(answer) // nil where a guard fails
			if inner == nil || inner.Succeeded != want {
				t.Fatalf("%v: %v, want %v; it became %v", c, inner, want, guarded)
			}
		}
	})
}

// What cannot touch the system costs some comparing of strings and nothing else.
func BenchmarkTouchesSystem(b *testing.B) {
	for name, key := range map[string]string{"plain": "some/key", "registry": "/registry/pods/default/web"} {
		txn := &pb.Txn{
			Compare: []*pb.Compare{model.Unchanged(key, 7)},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key)}}}},
			Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key), RangeEnd: model.PrefixEnd(key)}}}},
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if touchesSystem(txn) {
					b.Fatal("it does not")
				}
			}
		})
	}
}
