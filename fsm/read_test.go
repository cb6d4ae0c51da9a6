package fsm_test

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// A view answers a transaction that only reads as the log would.
func TestReadingTransactions(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := newLog(t)
		for range rapid.IntRange(0, 10).Draw(t, "before") {
			l.apply(genTxn(t, l.View().Revision(), 0))
		}
		v := l.View()
		read := readingOnly(genTxn(t, v.Revision(), 0))
		read.RequestId = nil
		got, err := v.Txn(read)
		want := l.apply(read)
		if want.Error != 0 {
			var refused *fsm.Error
			if !errors.As(err, &refused) || refused.Code != want.Error {
				t.Fatalf("%v: %v, want %v", read, err, want.Error)
			}
			return
		}
		if err != nil || !proto.Equal(got, want.Response) {
			t.Fatalf("%v: %v, %v; want %v", read, got, err, want.Response)
		}
	})
	if _, err := fsm.New().View().Txn(txn(put("a", ""))); err == nil {
		t.Error("a view took a put")
	}
	if _, err := fsm.New().View().Txn(txn(del("", ""))); err == nil {
		t.Error("a view took what is malformed")
	}
}

// readingOnly leaves out what changes something.
func readingOnly(t *pb.Txn) *pb.Txn {
	keep := func(ops []*pb.RequestOp) (kept []*pb.RequestOp) {
		for _, op := range ops {
			switch r := op.Request.(type) {
			case *pb.RequestOp_RequestRange:
				kept = append(kept, op)
			case *pb.RequestOp_RequestTxn:
				r.RequestTxn = readingOnly(r.RequestTxn)
				kept = append(kept, op)
			}
		}
		return kept
	}
	t.Success, t.Failure = keep(t.Success), keep(t.Failure)
	return t
}
