package fsm_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func equal[T proto.Message](t *rapid.T, what string, got, want T) {
	t.Helper()
	if !proto.Equal(got, want) {
		t.Fatalf("%s:\n got %v\nwant %v", what, got, want)
	}
}

func equalLists[T proto.Message](t *rapid.T, what string, got, want []T) {
	t.Helper()
	if !slices.EqualFunc(got, want, func(a, b T) bool { return proto.Equal(a, b) }) {
		t.Fatalf("%s:\n got %v\nwant %v", what, got, want)
	}
}

func codeOf(t *rapid.T, err error) pb.TxnError {
	if err == nil {
		return 0
	}
	var refused *fsm.Error
	if !errors.As(err, &refused) {
		t.Fatalf("not an *Error: %v", err)
	}
	return refused.Code
}

func restored(t *rapid.T, v *fsm.View) *fsm.Store {
	t.Helper()
	var stream bytes.Buffer
	if _, err := v.WriteTo(&stream); err != nil {
		t.Fatal(err)
	}
	s, err := fsm.Restore(&stream)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.View(); got.Hash() != v.Hash() || got.Index() != v.Index() || got.Bytes() != v.Bytes() || !got.Time().Equal(v.Time()) {
		t.Fatalf("restored %x at %d, was %x at %d", got.Hash(), got.Index(), v.Hash(), v.Index())
	}
	return s
}

// frozen is a view with what the model said when it was taken.
type frozen struct {
	view  *fsm.View
	rev   int64
	state map[string]*pb.KeyValue
	hash  uint64
}

func TestAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, m := fsm.New(), newModel()
		var index uint64
		var old []frozen
		t.Repeat(map[string]func(*rapid.T){
			"apply": func(t *rapid.T) {
				entry := &pb.Entry{FeatureLevel: fsm.FeatureLevel, TimeUnixNano: rapid.Int64Range(0, 1000).Draw(t, "time")}
				var want []*pb.TxnResult
				var events []*pb.KeyEvent
				for range rapid.IntRange(1, 4).Draw(t, "batch") {
					txn := genTxn(t, m.rev, 0)
					result, changed := m.apply(txn)
					entry.Txns, want, events = append(entry.Txns, txn), append(want, result), append(events, changed...)
				}
				index++
				got, gotEvents, err := s.Apply(index, entry)
				if err != nil {
					t.Fatal(err)
				}
				for i := range got {
					got[i].Message = "" // its wording is not compared
				}
				equalLists(t, "results", got, want)
				equalLists(t, "events", gotEvents, events)
			},
			"range": func(t *rapid.T) {
				r := genRange(t, m.rev)
				want, code := m.read(r)
				got, err := s.View().Range(r)
				if codeOf(t, err) != code {
					t.Fatalf("%v: got %v, want %v", r, err, code)
				}
				equal(t, r.String(), got, want)
				direct, refused := s.Range(r)
				if (refused != nil) != (code != 0) {
					t.Fatalf("%v: got %v, want %v", r, refused, code)
				}
				equal(t, r.String(), direct, want)
			},
			"watch": func(t *rapid.T) {
				var v interface {
					Events(int64, int) ([]*pb.KeyEvent, int64, error)
				} = s
				if someWhole.Draw(t, "view") {
					v = s.View()
				}
				after := around(t, m.rev, "after")
				all := m.eventsAfter(after)
				var got []*pb.KeyEvent
				for {
					events, upTo, err := v.Events(after, rapid.IntRange(0, 3).Draw(t, "max"))
					if after+1 < m.compacted {
						if codeOf(t, err) != pb.TxnError_TXN_ERROR_COMPACTED {
							t.Fatalf("events after %d, compacted %d: %v", after, m.compacted, err)
						}
						return
					}
					if err != nil || upTo < after {
						t.Fatalf("after %d up to %d: %v", after, upTo, err)
					}
					got, after = append(got, events...), upTo
					if n := len(events); n > 0 && events[n-1].Kv.ModRevision > upTo {
						t.Fatalf("an event of %d up to %d", events[n-1].Kv.ModRevision, upTo)
					}
					if upTo >= s.View().Revision() {
						break
					}
				}
				equalLists(t, "events", got, all)
			},
			"snapshot": func(t *rapid.T) { s = restored(t, s.View()) },
			"freeze": func(*rapid.T) {
				v := s.View()
				old = append(old, frozen{v, m.rev, m.states[m.rev], v.Hash()})
			},
			"": func(t *rapid.T) { checkState(t, s, m) },
		})
		for _, f := range old {
			if f.view.Hash() != f.hash || f.view.Revision() != f.rev {
				t.Fatalf("a view has changed")
			}
			equalLists(t, "old view", slices.Collect(f.view.Scan("")), selected(f.state, []byte{0}, []byte{0}))
			restored(t, f.view)
		}
	})
}

func checkState(t *rapid.T, s *fsm.Store, m *model) {
	v := s.View()
	if v.Revision() != m.rev || v.CompactRevision() != m.compacted {
		t.Fatalf("at %d compacted %d, want %d and %d", v.Revision(), v.CompactRevision(), m.rev, m.compacted)
	}
	live := selected(m.states[m.rev], []byte{0}, []byte{0})
	equalLists(t, "live", slices.Collect(v.Scan("")), live)
	if p := s.Position(); p != (fsm.Position{Revision: v.Revision(), CompactRevision: v.CompactRevision(), Index: v.Index()}) {
		t.Fatalf("position %v", p)
	}
	if v.Len() != len(live) {
		t.Fatalf("%d keys, want %d", v.Len(), len(live))
	}
	var leases int
	for l := range v.Leases() {
		leases++
		if m.leases[l.Id] != l.TtlSeconds {
			t.Fatalf("lease %v, want %d", l, m.leases[l.Id])
		}
		if again, ok := v.Lease(l.Id); !ok || !proto.Equal(again, l) {
			t.Fatalf("lease %v and %v", l, again)
		}
		var keys [][]byte
		for _, kv := range live {
			if kv.Lease == l.Id {
				keys = append(keys, kv.Key)
			}
		}
		if got := v.LeaseKeys(l.Id); !slices.EqualFunc(got, keys, bytes.Equal) {
			t.Fatalf("lease %d has %q, want %q", l.Id, got, keys)
		}
		for _, prefix := range []string{"", "a", "b", "ab", "z"} {
			want := slices.ContainsFunc(keys, func(key []byte) bool { return strings.HasPrefix(string(key), prefix) })
			if v.LeaseHolds(l.Id, prefix) != want {
				t.Fatalf("lease %d has %q: holds %q: %t", l.Id, keys, prefix, !want)
			}
		}
	}
	if leases != len(m.leases) {
		t.Fatalf("%d leases, want %d", leases, len(m.leases))
	}
}

// The same transactions, cut into other entries and with other restarts from
// snapshots in between, lead to the same bytes.
func TestBatchingAndRestartsDoNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		txns := make([]*pb.Txn, rapid.IntRange(1, 40).Draw(t, "txns"))
		for i := range txns {
			txns[i] = genTxn(t, int64(i), 0)
		}
		run := func(name string) (stream []byte, results []*pb.TxnResult, events []*pb.KeyEvent) {
			s := fsm.New()
			for at := 0; at < len(txns); {
				n := min(rapid.IntRange(1, 8).Draw(t, name), len(txns)-at)
				at += n
				got, changed, err := s.Apply(uint64(at), &pb.Entry{FeatureLevel: fsm.FeatureLevel, TimeUnixNano: int64(at), Txns: txns[at-n : at]})
				if err != nil {
					t.Fatal(err)
				}
				results, events = append(results, got...), append(events, changed...)
				switch rapid.IntRange(0, 4).Draw(t, name+" then") {
				case 0:
					s = restored(t, s.View())
				case 1:
					s.View()
				}
			}
			var out bytes.Buffer
			if _, err := s.View().WriteTo(&out); err != nil {
				t.Fatal(err)
			}
			return out.Bytes(), results, events
		}
		stream1, results1, events1 := run("one")
		stream2, results2, events2 := run("two")
		equalLists(t, "results", results1, results2)
		equalLists(t, "events", events1, events2)
		if !bytes.Equal(stream1, stream2) {
			t.Fatal("other batches led to another state")
		}
	})
}
