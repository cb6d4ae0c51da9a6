package fsm_test

import (
	"bytes"
	"encoding/binary"
	"flag"
	"io"
	"os"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

var update = flag.Bool("update", false, "rewrite the golden log and snapshot")

// The state after the golden log. Replicas of two versions compare hashes, so
// neither the hash nor what an entry of this feature level does may ever
// change; and a snapshot of an older version must be readable for ever.
const (
	goldenLog      = "testdata/level1.log"
	goldenSnapshot = "testdata/level1.snapshot"
	goldenHash     = 0xf211088b28c51c68
)

func goldenEntries() []*pb.Entry {
	id := func(id string, t *pb.Txn) *pb.Txn { t.RequestId = []byte(id); return t }
	lists := [][]*pb.Txn{
		{txn(grant(7, 10), grant(9, 60)), txn(put("/a", "1"), putOp(&pb.PutRequest{Key: []byte("/b"), Value: []byte("2"), Lease: 7}))},
		{id("first", txn(put("/a", "3"), put("/c", "x"))), id("first", txn(put("/a", "again"))), txn(revoke(8))},
		{txn(del("/a", "/b")), txn(put("/a", "4"))},
		{{
			Compare: []*pb.Compare{{Key: []byte("/a"), Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 1}}},
			Success: ops(nest(ops(putOp(&pb.PutRequest{Key: []byte("/c"), IgnoreValue: true, PrevKv: true})), nil), rangeOp(&pb.RangeRequest{Key: []byte("/"), RangeEnd: []byte("0")})),
			Failure: ops(del("/", "0")),
		}},
		{txn(compact(4)), txn(revoke(7), put("/d", "5")), id("last", txn(putOp(&pb.PutRequest{Key: []byte("/d"), Value: []byte("6"), Lease: 9})))},
	}
	entries := make([]*pb.Entry, len(lists))
	for i, txns := range lists {
		entries[i] = &pb.Entry{FeatureLevel: 1, TimeUnixNano: int64(1000 + i), Txns: txns}
	}
	return entries
}

func TestGolden(t *testing.T) {
	if *update {
		var encoded []byte
		s := fsm.New()
		for i, e := range goldenEntries() {
			body, err := proto.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			encoded = append(binary.AppendUvarint(encoded, uint64(len(body))), body...)
			if _, _, err := s.Apply(uint64(i+1), e); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(goldenLog, encoded, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(goldenSnapshot, stream(t, s.View()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(goldenLog)
	if err != nil {
		t.Fatal(err)
	}
	applied, index := fsm.New(), uint64(0)
	for r := bytes.NewReader(data); r.Len() > 0; {
		n, err := binary.ReadUvarint(r)
		if err != nil {
			t.Fatal(err)
		}
		body, e := make([]byte, n), new(pb.Entry)
		if _, err := io.ReadFull(r, body); err != nil {
			t.Fatal(err)
		}
		if err := proto.Unmarshal(body, e); err != nil {
			t.Fatal(err)
		}
		index++
		if _, _, err := applied.Apply(index, e); err != nil {
			t.Fatal(err)
		}
	}
	data, err = os.ReadFile(goldenSnapshot)
	if err != nil {
		t.Fatal(err)
	}
	read, err := fsm.Restore(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]*fsm.Store{"log": applied, "snapshot": read} {
		if got := s.View().Hash(); got != goldenHash {
			t.Errorf("the %s leads to hash %#x, not %#x", name, got, uint64(goldenHash))
		}
	}
	probe(t, applied)
}
