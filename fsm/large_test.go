package fsm_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The model test keeps to a handful of keys, that is, to trees of one node. This
// one has trees of several levels, with views of them held while they change.
func TestManyKeys(t *testing.T) {
	const keys = 3000
	name := func(i int) string { return fmt.Sprintf("k%05d", i) }
	rapid.Check(t, func(t *rapid.T) {
		l, m := newLog(t), newModel()
		var old []frozen
		write := func(step int, o ...*pb.RequestOp) {
			l.do(o...)
			m.apply(txn(o...))
			if step%2 == 0 {
				v := l.View()
				old = append(old, frozen{v, m.rev, m.states[m.rev], v.Hash()})
			}
		}
		for step := range rapid.IntRange(3, 10).Draw(t, "steps") {
			from, stride := rapid.IntRange(0, keys).Draw(t, "from"), rapid.IntRange(1, 7).Draw(t, "stride")
			if rapid.IntRange(0, 2).Draw(t, "delete") == 0 {
				write(step, del(name(from), name(from+200*stride)))
				continue
			}
			var puts []*pb.RequestOp
			for i := from; i < keys && len(puts) < 1000; i += stride {
				puts = append(puts, put(name(i), fmt.Sprint(step)))
			}
			write(step, puts...)
			if rapid.IntRange(0, 4).Draw(t, "compact") == 0 && m.rev > m.compacted {
				write(1, compact(rapid.Int64Range(m.compacted+1, m.rev).Draw(t, "at")))
			}
		}
		for range 8 {
			r := &pb.RangeRequest{
				Key:        []byte(name(rapid.IntRange(0, keys).Draw(t, "key"))),
				RangeEnd:   []byte(rapid.SampledFrom([]string{"\x00", "k01000", "k02000"}).Draw(t, "end")),
				Limit:      rapid.SampledFrom([]int64{0, 1, 10, 500, 5000}).Draw(t, "limit"),
				SortOrder:  pb.RangeRequest_SortOrder(rapid.IntRange(0, 2).Draw(t, "order")),
				SortTarget: pb.RangeRequest_SortTarget(rapid.IntRange(0, 4).Draw(t, "target")),
				CountOnly:  someWhole.Draw(t, "count"),
				Revision:   rapid.Int64Range(0, m.rev).Draw(t, "revision"),
			}
			if rapid.IntRange(0, 3).Draw(t, "filtered") == 0 {
				r.MinModRevision = rapid.Int64Range(1, m.rev).Draw(t, "min")
			}
			want, code := m.read(r)
			got, err := l.View().Range(r)
			if codeOf(t, err) != code || !proto.Equal(got, want) {
				t.Fatalf("%v: got %d of %d (%v), want %d of %d (%v)", r, len(got.GetKvs()), got.GetCount(), err, len(want.GetKvs()), want.GetCount(), code)
			}
		}
		again := restored(t, l.View()).View()
		for _, f := range append(old, frozen{again, m.rev, m.states[m.rev], l.View().Hash()}) {
			if f.view.Hash() != f.hash || f.view.Revision() != f.rev {
				t.Fatal("a view has changed")
			}
			left := len(f.state)
			for kv := range f.view.Scan("k") {
				want := f.state[string(kv.Key)]
				if left--; want == nil || kv.ModRevision != want.ModRevision || kv.Version != want.Version || !bytes.Equal(kv.Value, want.Value) {
					t.Fatalf("an old view has %v, not %v", kv, want)
				}
			}
			if left != 0 {
				t.Fatalf("an old view lacks %d keys", left)
			}
		}
	})
}

func TestScanPrefix(t *testing.T) {
	l := newLog(t)
	for _, key := range []string{"a", "a/", "a/1", "a/2", "a0", "\xff", "\xff\xff", "\xff\xff1"} {
		l.do(put(key, ""))
	}
	for prefix, want := range map[string][]string{
		"":         {"a", "a/", "a/1", "a/2", "a0", "\xff", "\xff\xff", "\xff\xff1"},
		"a/":       {"a/", "a/1", "a/2"},
		"a":        {"a", "a/", "a/1", "a/2", "a0"},
		"\xff\xff": {"\xff\xff", "\xff\xff1"},
		"b":        nil,
	} {
		var got []string
		for kv := range l.View().Scan(prefix) {
			got = append(got, string(kv.Key))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: got %q", prefix, got)
		}
	}
	for range l.View().Scan("a") {
		break // a caller that has enough
	}
	for range l.View().Leases() {
		break
	}
	if kv, ok := l.View().Get("a/1"); !ok || string(kv.Key) != "a/1" {
		t.Error(kv)
	}
	if _, ok := l.View().Get("a/" + "3"); ok {
		t.Error("a key that is not there")
	}
}
