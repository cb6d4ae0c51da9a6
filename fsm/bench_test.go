package fsm_test

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"sync"
	"testing"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	million   = 1_000_000
	valueSize = 256
)

func benchKey(i int) []byte { return fmt.Appendf(nil, "/bench/key/%08d", i) }

// scattered is a permutation of the first million numbers.
func scattered(i int) int { return i * 611_953 % million }

// filled is a store with a million keys, compacted, from a snapshot, so that no
// benchmark changes it for another.
var filledSnapshot = sync.OnceValue(func() []byte {
	s := fsm.New()
	value := bytes.Repeat([]byte("v"), valueSize)
	for at := 0; at < million; at += 1000 {
		e := &pb.Entry{FeatureLevel: 1}
		for i := at; i < at+1000; i++ {
			e.Txns = append(e.Txns, txn(putOp(&pb.PutRequest{Key: benchKey(scattered(i)), Value: value})))
		}
		if _, _, err := s.Apply(uint64(at), e); err != nil {
			panic(err)
		}
	}
	if _, _, err := s.Apply(million, &pb.Entry{FeatureLevel: 1, Txns: []*pb.Txn{txn(compact(s.View().Revision()))}}); err != nil {
		panic(err)
	}
	var out bytes.Buffer
	if _, err := s.View().WriteTo(&out); err != nil {
		panic(err)
	}
	return out.Bytes()
})

func filled(b *testing.B) *fsm.Store {
	b.Helper()
	s, err := fsm.Restore(bytes.NewReader(filledSnapshot()))
	if err != nil {
		b.Fatal(err)
	}
	runtime.GC()
	return s
}

// BenchmarkPut overwrites random ones of a million keys, in entries of so many
// transactions; "viewed" takes a view after each entry, as watchers do. History
// is compacted as it would be, every 10,000 revisions.
func BenchmarkPut(b *testing.B) {
	for _, c := range []struct {
		batch  int
		id     bool
		viewed bool
	}{{1, false, false}, {64, false, false}, {64, true, false}, {64, false, true}, {1, false, true}} {
		b.Run(fmt.Sprintf("batch=%d,id=%t,viewed=%t", c.batch, c.id, c.viewed), func(b *testing.B) {
			s := filled(b)
			value := bytes.Repeat([]byte("w"), valueSize)
			entry := &pb.Entry{FeatureLevel: 1, Txns: make([]*pb.Txn, c.batch)}
			puts := make([]*pb.PutRequest, c.batch)
			for i := range puts {
				puts[i] = &pb.PutRequest{Value: value}
				entry.Txns[i] = txn(putOp(puts[i]))
			}
			keys := make([][]byte, 1<<16)
			for i := range keys {
				keys[i] = benchKey(scattered(i))
			}
			b.ReportAllocs()
			b.ResetTimer()
			const history = 10_000
			index, revision, compacted := uint64(million), int64(million+1), int64(million+1)
			for n := 0; n < b.N; n += c.batch {
				for i := range puts {
					puts[i].Key = keys[(n+i)%len(keys)]
					if c.id {
						entry.Txns[i].RequestId = fmt.Appendf(entry.Txns[i].RequestId[:0], "%016d", n+i)
					}
				}
				apply(b, s, &index, entry)
				if c.viewed {
					s.View()
				}
				if revision += int64(c.batch); revision-compacted > 2*history {
					compacted = revision - history
					apply(b, s, &index, &pb.Entry{FeatureLevel: 1, Txns: []*pb.Txn{txn(compact(compacted))}})
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "puts/s")
		})
	}
}

func apply(b *testing.B, s *fsm.Store, index *uint64, e *pb.Entry) {
	*index++
	results, _, err := s.Apply(*index, e)
	if err != nil || results[0].Error != 0 {
		b.Fatal(results, err)
	}
}

// BenchmarkNewKeys puts keys that do not exist yet into a growing store.
func BenchmarkNewKeys(b *testing.B) {
	s := fsm.New()
	value := bytes.Repeat([]byte("v"), valueSize)
	entry := &pb.Entry{FeatureLevel: 1, Txns: make([]*pb.Txn, 64)}
	b.ReportAllocs()
	for n := 0; n < b.N; n += len(entry.Txns) {
		for i := range entry.Txns {
			entry.Txns[i] = txn(putOp(&pb.PutRequest{Key: benchKey(scattered((n + i) % million)), Value: value}))
		}
		if _, _, err := s.Apply(uint64(n+1), entry); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "puts/s")
}

func BenchmarkRange(b *testing.B) {
	s := filled(b)
	for _, n := range []int64{1, 100, 10_000} {
		r := &pb.RangeRequest{Key: benchKey(500_000), RangeEnd: benchKey(500_000 + int(n))}
		if n == 1 {
			r.RangeEnd = nil
		}
		b.Run(fmt.Sprintf("keys=%d", n), func(b *testing.B) {
			v := s.View()
			b.ReportAllocs()
			b.SetBytes(n * (valueSize + int64(len(benchKey(0)))))
			for b.Loop() {
				if resp, err := v.Range(r); err != nil || resp.Count != n {
					b.Fatal(resp.GetCount(), err)
				}
			}
		})
	}
	b.Run("page=100,of=1000000", func(b *testing.B) {
		v := s.View()
		b.ReportAllocs()
		for b.Loop() {
			if resp, err := v.Range(&pb.RangeRequest{Key: benchKey(100), RangeEnd: []byte{0}, Limit: 100}); err != nil || resp.Count != million-100 {
				b.Fatal(resp.GetCount(), err)
			}
		}
	})
}

func BenchmarkSnapshotWrite(b *testing.B) {
	v := filled(b).View()
	b.SetBytes(int64(len(filledSnapshot())))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.WriteTo(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSnapshotRestore(b *testing.B) {
	data := filledSnapshot()
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := fsm.Restore(bytes.NewReader(data)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMemory reports what a million keys take in the heap, live.
func BenchmarkMemory(b *testing.B) {
	data := filledSnapshot()
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		s, err := fsm.Restore(bytes.NewReader(data))
		if err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/million, "B/key")
		runtime.KeepAlive(s)
	}
}
