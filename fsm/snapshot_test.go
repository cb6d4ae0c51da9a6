package fsm_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/iotest"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func stream(t testing.TB, v *fsm.View) []byte {
	t.Helper()
	var out bytes.Buffer
	n, err := v.WriteTo(&out)
	if err != nil || n != int64(out.Len()) {
		t.Fatalf("wrote %d of %d: %v", n, out.Len(), err)
	}
	return out.Bytes()
}

func sealed(t testing.TB, v *fsm.View) []byte {
	t.Helper()
	var out bytes.Buffer
	n, err := v.WriteSealed(&out)
	if err != nil || n != int64(out.Len()) {
		t.Fatalf("wrote %d of %d: %v", n, out.Len(), err)
	}
	return out.Bytes()
}

// A sealed snapshot passes for etcd's: 512 byte blocks, and their SHA-256.
func TestSealedSnapshot(t *testing.T) {
	l := newLog(t)
	for i := range 600 { // of all lengths modulo a block
		l.do(put("a", string(make([]byte, i))))
		v := l.View()
		data := sealed(t, v)
		blocks, digest := data[:len(data)-sha256.Size], data[len(data)-sha256.Size:]
		if len(blocks)%512 != 0 || sha256.Sum256(blocks) != [32]byte(digest) {
			t.Fatalf("%d bytes, seal %x", len(data), digest)
		}
		if s, err := fsm.Restore(bytes.NewReader(data)); err != nil || s.View().Hash() != v.Hash() {
			t.Fatalf("not restored: %v", err)
		}
	}
}

func reopen(t testing.TB, v *fsm.View) *fsm.Store {
	t.Helper()
	s, err := fsm.Restore(bytes.NewReader(stream(t, v)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sample has something of everything that a snapshot holds.
func sample(t testing.TB) *log {
	l := newLog(t)
	l.do(grant(7, 10), grant(9, 60))
	l.do(put("a", "1"), putOp(&pb.PutRequest{Key: []byte("b"), Value: []byte("2"), Lease: 7}))
	l.do(put("a", "3"))
	l.do(del("a", ""))
	l.do(compact(3))
	l.do(put("a", "4"))
	l.do(put("c", ""), del("b", ""))
	l.apply(&pb.Txn{RequestId: []byte("id"), Success: ops(putOp(&pb.PutRequest{Key: []byte("c"), Value: []byte("5"), PrevKv: true}))})
	return l
}

// Every flipped bit, every cut and anything appended is refused.
func TestDamagedSnapshots(t *testing.T) {
	v := sample(t).View()
	t.Run("plain", func(t *testing.T) { testDamage(t, stream(t, v)) })
	t.Run("sealed", func(t *testing.T) { testDamage(t, sealed(t, v)) })
}

func testDamage(t *testing.T, good []byte) {
	if _, err := fsm.Restore(iotest.OneByteReader(bytes.NewReader(good))); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, data []byte) {
		t.Helper()
		if s, err := fsm.Restore(bytes.NewReader(data)); s != nil || !errors.Is(err, fsm.ErrSnapshot) {
			t.Errorf("%s: restored: %v", what, err)
		}
	}
	for i := range good {
		for bit := range 8 {
			data := bytes.Clone(good)
			data[i] ^= 1 << bit
			refused(fmt.Sprintf("bit %d of byte %d", bit, i), data)
		}
		refused(fmt.Sprintf("cut at %d", i), good[:i])
	}
	refused("appended", append(bytes.Clone(good), 0))
	broken := errors.New("disk")
	if _, err := fsm.Restore(io.MultiReader(bytes.NewReader(good[:20]), iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Errorf("the reader's error is lost: %v", err)
	}
	if _, err := fsm.Restore(io.MultiReader(bytes.NewReader(good), iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Errorf("the reader's error at the end is lost: %v", err)
	}
}

type failingWriter struct{ left int }

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}

func TestSnapshotWriterFails(t *testing.T) {
	l := newLog(t)
	for i := range 20 {
		l.do(put(fmt.Sprint(i), string(make([]byte, 64<<10))))
	}
	for _, left := range []int{0, 300 << 10, 1 << 20} {
		if _, err := l.View().WriteTo(&failingWriter{left}); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("with room for %d: %v", left, err)
		}
	}
}

// records takes a stream apart, and assemble puts one together with the right
// lengths, count and checksum: what is wrong then is what the records say.
func records(t testing.TB, data []byte) []*pb.SnapshotRecord {
	t.Helper()
	var list []*pb.SnapshotRecord
	for r := bytes.NewReader(data); r.Len() > 0; {
		n, err := binary.ReadUvarint(r)
		if err != nil {
			t.Fatal(err)
		}
		body := make([]byte, n)
		if _, err := io.ReadFull(r, body); err != nil {
			t.Fatal(err)
		}
		record := new(pb.SnapshotRecord)
		if err := proto.Unmarshal(body, record); err != nil {
			t.Fatal(err)
		}
		list = append(list, record)
	}
	return list
}

func assemble(t testing.TB, list []*pb.SnapshotRecord) []byte {
	t.Helper()
	var out []byte
	for i, r := range list {
		if f := r.GetFooter(); f != nil {
			f.Records, f.Checksum = uint64(i), xxhash.Sum64(out)
		}
		body, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		out = append(binary.AppendUvarint(out, uint64(len(body))), body...)
	}
	return out
}

func TestSnapshotRecordsMakeSense(t *testing.T) {
	good := stream(t, sample(t).View())
	if !bytes.Equal(assemble(t, records(t, good)), good) {
		t.Fatal("the parts do not make the whole")
	}
	header := func(f func(*pb.SnapshotHeader)) func([]*pb.SnapshotRecord) []*pb.SnapshotRecord {
		return func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord { f(l[0].GetHeader()); return l }
	}
	first := func(l []*pb.SnapshotRecord, is func(*pb.SnapshotRecord) bool) int {
		for i, r := range l {
			if is(r) {
				return i
			}
		}
		t.Fatal("no such record")
		return 0
	}
	live := func(f func(*pb.KeyValue)) func([]*pb.SnapshotRecord) []*pb.SnapshotRecord {
		return func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			f(l[first(l, func(r *pb.SnapshotRecord) bool { return r.GetVersion() != nil })].GetVersion())
			return l
		}
	}
	for name, change := range map[string]func([]*pb.SnapshotRecord) []*pb.SnapshotRecord{
		"format":           header(func(h *pb.SnapshotHeader) { h.Format = 3 }),
		"feature level":    header(func(h *pb.SnapshotHeader) { h.FeatureLevel = fsm.FeatureLevel + 1 }),
		"no feature level": header(func(h *pb.SnapshotHeader) { h.FeatureLevel = 0 }),
		"revision":         header(func(h *pb.SnapshotHeader) { h.Revision = 0 }),
		"compacted":        header(func(h *pb.SnapshotHeader) { h.CompactRevision = h.Revision + 1 }),
		"another hash":     header(func(h *pb.SnapshotHeader) { h.TimeUnixNano++ }),
		"no key":           live(func(kv *pb.KeyValue) { kv.Key = nil }),
		"future":           live(func(kv *pb.KeyValue) { kv.ModRevision = 1000 }),
		"created later":    live(func(kv *pb.KeyValue) { kv.CreateRevision = kv.ModRevision + 1 }),
		"no version":       live(func(kv *pb.KeyValue) { kv.Version = 0 }),
		"live tombstone": live(func(kv *pb.KeyValue) {
			kv.CreateRevision, kv.Version, kv.Value, kv.Lease = 0, 0, nil, 0
		}),
		"full tombstone": live(func(kv *pb.KeyValue) { kv.CreateRevision = 0 }),
		"negative lease": live(func(kv *pb.KeyValue) { kv.Lease = -1 }),
		"nothing":        func([]*pb.SnapshotRecord) []*pb.SnapshotRecord { return nil },
		"no header":      func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord { return l[1:] },
		"two headers":    func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord { return append(l[:1:1], l...) },
		"no footer":      func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord { return l[:len(l)-1] },
		"empty record":   func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord { return append(l[:1:1], new(pb.SnapshotRecord)) },
		"out of order":   func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord { l[1], l[2] = l[2], l[1]; return l },
		"lease twice": func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			i := first(l, func(r *pb.SnapshotRecord) bool { return r.GetLease() != nil })
			return append(l[:i:i], append([]*pb.SnapshotRecord{l[i]}, l[i:]...)...)
		},
		"request twice": func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			i := first(l, func(r *pb.SnapshotRecord) bool { return r.GetRequest() != nil })
			return append(l[:i:i], append([]*pb.SnapshotRecord{l[i]}, l[i:]...)...)
		},
		"past before live": func(l []*pb.SnapshotRecord) []*pb.SnapshotRecord {
			i := first(l, func(r *pb.SnapshotRecord) bool { return r.GetPast() != nil })
			return append([]*pb.SnapshotRecord{l[0], l[i]}, l[1:]...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := fsm.Restore(bytes.NewReader(assemble(t, change(records(t, good))))); s != nil || !errors.Is(err, fsm.ErrSnapshot) {
				t.Errorf("restored: %v", err)
			}
		})
	}
}
