package fsm

import (
	"bytes"
	"encoding/binary"
	"io"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// FuzzBuilder feeds records of any content to the builder, with a footer that
// fits them, since hardly any other input gets past checksum and hash. What it
// accepts must be a sound store.
func FuzzBuilder(f *testing.F) {
	s := New()
	for i, op := range []*pb.RequestOp{
		{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: 5, TtlSeconds: 1}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("a"), Lease: 5}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("b"), Value: []byte("x")}}},
		{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("a")}}},
		{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("b")}}},
		{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: 3}}},
	} {
		t := &pb.Txn{Success: []*pb.RequestOp{op}, RequestId: []byte{byte(i)}}
		if _, _, err := s.Apply(uint64(i+1), &pb.Entry{FeatureLevel: 1, Txns: []*pb.Txn{t}}); err != nil {
			f.Fatal(err)
		}
		var out bytes.Buffer
		if _, err := s.View().WriteTo(&out); err != nil {
			f.Fatal(err)
		}
		f.Add(out.Bytes())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var b builder
		for r := bytes.NewReader(data); b.stage != stageFooter; {
			record := footerFor(&b)
			if n, err := binary.ReadUvarint(r); err == nil && n <= uint64(r.Len()) {
				body := make([]byte, n)
				if _, err := io.ReadFull(r, body); err != nil {
					t.Fatal(err)
				}
				next := new(pb.SnapshotRecord)
				if proto.Unmarshal(body, next) != nil {
					return
				}
				if next.GetFooter() == nil {
					record = next
				}
			}
			if b.record(record, 0) != nil {
				return
			}
		}
		v := b.store.View()
		var out bytes.Buffer
		if _, err := v.WriteTo(&out); err != nil {
			t.Fatal(err)
		}
		again, err := Restore(&out)
		if err != nil || again.View().Hash() != v.Hash() {
			t.Fatalf("a store that is accepted once, but not twice: %v", err)
		}
		deletion := &pb.Txn{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}}}}}
		compaction := &pb.Txn{Success: []*pb.RequestOp{{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: v.Revision()}}}}}
		if _, _, err := b.store.Apply(v.Index()+1, &pb.Entry{FeatureLevel: 1, Txns: []*pb.Txn{deletion, compaction}}); err != nil {
			t.Fatal(err)
		}
	})
}

func footerFor(b *builder) *pb.SnapshotRecord {
	f := &pb.SnapshotFooter{Records: b.records}
	if b.store != nil {
		f.Hash = b.store.hash()
	}
	return &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Footer{Footer: f}}
}

func TestJournal(t *testing.T) {
	var j journal[int]
	var snapshots []journal[int]
	for i := range 10 * chunkLen {
		j.append(i)
		if i%100 == 99 {
			snapshots = append(snapshots, j)
			j.forget(j.start + 60)
		}
	}
	for _, j := range append(snapshots, j) {
		for p := j.start; p < j.end; p++ {
			if j.at(p) != int(p) {
				t.Fatalf("at %d is %d", p, j.at(p))
			}
			if got := j.search(func(v int) bool { return v >= int(p) }); got != p {
				t.Fatalf("found %d at %d", p, got)
			}
		}
		if j.len() != int(j.end-j.start) || uint64(len(j.chunks)) > (j.end-j.start)/chunkLen+2 {
			t.Fatalf("%d elements in %d chunks", j.len(), len(j.chunks))
		}
	}
}
