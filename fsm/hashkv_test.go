package fsm_test

import (
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// HashKV depends on the revision that is asked for alone: not on batches, restarts,
// what came later, or what is compacted.
func TestHashKVIsOfTheKeysAlone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		txns := make([]*pb.Txn, rapid.IntRange(1, 40).Draw(t, "txns"))
		for i := range txns {
			txns[i] = genTxn(t, int64(i), 0)
		}
		seen := map[int64]uint64{}
		look := func(v *fsm.View) {
			for rev := max(1, v.CompactRevision()); rev <= v.Revision(); rev++ {
				hash, of, err := v.HashKV(rev)
				if err != nil || of != rev {
					t.Fatalf("at %d: %d, %v", rev, of, err)
				}
				if known, ok := seen[rev]; ok && known != hash {
					t.Fatalf("at %d, compacted at %d: %x, and %x before", rev, v.CompactRevision(), hash, known)
				}
				seen[rev] = hash
			}
		}
		for _, name := range []string{"one", "two"} {
			s := fsm.New()
			for from := 0; from < len(txns); {
				n := min(rapid.IntRange(1, 8).Draw(t, name), len(txns)-from)
				from += n
				// The time is another one each time: it is no part of the keys.
				e := &pb.Entry{FeatureLevel: fsm.FeatureLevel, TimeUnixNano: int64(from * len(name) * len(seen)), Txns: txns[from-n : from]}
				if _, _, err := s.Apply(uint64(from), e); err != nil {
					t.Fatal(err)
				}
				if rapid.IntRange(0, 4).Draw(t, name+" then") == 0 {
					s = restored(t, s.View())
				}
				look(s.View())
			}
		}
	})
}

// Each part of a version tells.
func TestHashKVSeesAll(t *testing.T) {
	hash := func(l *log, rev int64) uint64 {
		t.Helper()
		h, _, err := l.View().HashKV(rev)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	seen := map[uint64]string{}
	for name, change := range map[string][]*pb.RequestOp{
		"value":    {put("a", "2")},
		"key":      {put("b", "1")},
		"lease":    {putOp(&pb.PutRequest{Key: []byte("a"), Value: []byte("1"), Lease: 7})},
		"deleted":  {del("a", "")},
		"again":    {put("a", "1")},
		"boundary": {put("a1", "")},
		"none":     nil,
	} {
		l := newLog(t)
		l.do(grant(7, 10))
		l.do(put("a", "1"))
		if change != nil {
			l.do(change...)
		}
		h := hash(l, 0)
		if other, ok := seen[h]; ok {
			t.Errorf("%s and %s have the same hash", name, other)
		}
		seen[h] = name
	}

	l := newLog(t)
	l.do(put("a", "1"))
	l.do(put("a", "2"))
	before, newest := hash(l, 2), hash(l, 0)
	if before == newest || newest != hash(l, 3) {
		t.Errorf("%x at 2, %x at the newest, %x at 3", before, newest, hash(l, 3))
	}
	l.do(put("a", "3"))
	if hash(l, 3) != newest || hash(l, 2) != before {
		t.Error("a later put changed the hash of the past")
	}
	l.do(compact(3))
	for rev, code := range map[int64]pb.TxnError{2: pb.TxnError_TXN_ERROR_COMPACTED, 5: pb.TxnError_TXN_ERROR_FUTURE_REVISION} {
		var refused *fsm.Error
		if _, _, err := l.View().HashKV(rev); !errors.As(err, &refused) || refused.Code != code {
			t.Errorf("at %d: %v", rev, err)
		}
	}
}
