package fsm_test

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// probe looks at a state in every way, which must neither panic nor disagree
// with a copy that went through a snapshot.
func probe(t *testing.T, s *fsm.Store) {
	t.Helper()
	v := s.View()
	again := reopen(t, v).View()
	if v.Hash() != again.Hash() || v.Bytes() != again.Bytes() {
		t.Fatalf("restored %x (%d bytes) from %x (%d bytes)", again.Hash(), again.Bytes(), v.Hash(), v.Bytes())
	}
	for _, rev := range []int64{0, v.CompactRevision(), (v.CompactRevision() + v.Revision()) / 2} {
		r := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: rev}
		a, err := v.Range(r)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := again.Range(r); err != nil || !proto.Equal(a, b) {
			t.Fatalf("at %d: %v and %v (%v)", rev, a, b, err)
		}
	}
	a, _, err := v.Events(v.CompactRevision(), 0)
	if err != nil {
		t.Fatal(err)
	}
	b, _, err := again.Events(v.CompactRevision(), 0)
	if err != nil || len(a) != len(b) {
		t.Fatalf("%d and %d events (%v)", len(a), len(b), err)
	}
	for i := range a {
		if !proto.Equal(a[i], b[i]) {
			t.Fatalf("event %v and %v", a[i], b[i])
		}
	}
	for l := range v.Leases() {
		if len(v.LeaseKeys(l.Id)) != len(again.LeaseKeys(l.Id)) {
			t.Fatalf("lease %d", l.Id)
		}
	}
}

// A log entry of any content is answered, never a panic.
func FuzzApply(f *testing.F) {
	seed := func(t ...*pb.Txn) {
		data, err := proto.Marshal(&pb.Entry{FeatureLevel: 1, TimeUnixNano: 5, Txns: t})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	seed(txn(put("a", "b"), del("c", "d"), rangeOp(&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte{0}, Revision: 3, Limit: 1})))
	seed(txn(grant(1, 2), nest(ops(put("a", "b")), ops(del("a", "")))), txn(revoke(7), compact(4), checkpoint(1, 1)))
	seed(&pb.Txn{RequestId: []byte("id"), Compare: []*pb.Compare{{Key: []byte("a"), RangeEnd: []byte("c"), Target: pb.Compare_VALUE}}, Failure: ops(put("a", ""))},
		txn(putOp(&pb.PutRequest{Key: []byte("b"), IgnoreLease: true, IgnoreValue: true, PrevKv: true})))
	seed(txn(revoke(7), putOp(&pb.PutRequest{Key: []byte("c"), IgnoreLease: true})), txn(del("a", "\x00"), putOp(&pb.PutRequest{Key: []byte("c"), IgnoreValue: true})))
	f.Fuzz(func(t *testing.T, data []byte) {
		e := new(pb.Entry)
		if proto.Unmarshal(data, e) != nil {
			return
		}
		e.FeatureLevel = fsm.FeatureLevel
		l := sample(t)
		for range 2 { // twice: what it wrote the first time is there the second
			l.index++
			rev := l.View().Revision()
			results, events, err := l.Apply(l.index, e)
			if err != nil {
				return // a checkpoint that does not match
			}
			if len(results) != len(e.Txns) {
				t.Fatalf("%d results of %d transactions", len(results), len(e.Txns))
			}
			for i, r := range results {
				malformed := fsm.ValidateTxn(e.Txns[i]) != nil
				if (r.Response == nil) != (r.Error != 0) || malformed && r.Error == 0 && len(e.Txns[i].RequestId) == 0 {
					t.Fatalf("%v is answered with %v", e.Txns[i], r)
				}
			}
			for _, e := range events {
				if e.Kv.ModRevision != rev && e.Kv.ModRevision != rev+1 {
					t.Fatalf("event of %d after %d", e.Kv.ModRevision, rev)
				}
				rev = e.Kv.ModRevision
			}
			if rev != l.View().Revision() {
				t.Fatalf("events up to %d, revision %d", rev, l.View().Revision())
			}
			probe(t, l.Store)
		}
	})
}

// A stream of any content is refused or gives a sound store.
func FuzzRestore(f *testing.F) {
	f.Add(stream(f, fsm.New().View()))
	f.Add(stream(f, sample(f).View()))
	f.Add(sealed(f, sample(f).View()))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := fsm.Restore(bytes.NewReader(data)); err == nil {
			probe(t, s)
		}
	})
}
