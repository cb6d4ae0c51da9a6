package fsm

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Formats of the stream. In both each record is preceded by its length in bytes
// as a varint; one header; live versions in key order; past versions by key and
// age; leases by id; remembered requests, oldest first; one footer. A sealed one
// goes on with zeros up to the next multiple of sealBlock and ends with the SHA-256
// of all before it, as etcd's snapshots do, so that etcd's tools take the file for
// a whole one.
const (
	formatPlain  = 1
	formatSealed = 2

	sealBlock = 512
)

// maxRecord bounds what a reader allocates for a record. The largest are a
// version of MaxTxnBytes and an answer of MaxAnswer bytes.
const maxRecord = MaxTxnBytes + 1<<20

// WriteTo writes the snapshot stream, which Restore reads. It holds one record
// in memory at a time.
func (v *View) WriteTo(w io.Writer) (int64, error) { return v.write(w, formatPlain) }

// WriteSealed is WriteTo with etcd's seal at the end; Restore reads and verifies
// that too.
func (v *View) WriteSealed(w io.Writer) (int64, error) {
	digest := sha256.New()
	written, err := v.write(io.MultiWriter(w, digest), formatSealed)
	if err != nil {
		return written, err
	}
	padding := make([]byte, padding(written), sealBlock+sha256.Size)
	_, _ = digest.Write(padding) // never fails
	n, err := w.Write(digest.Sum(padding))
	if err != nil {
		err = fmt.Errorf("fsm: write snapshot: %w", err)
	}
	return written + int64(n), err
}

// padding is how many bytes are missing to a multiple of sealBlock.
func padding(written int64) int64 { return (sealBlock - written%sealBlock) % sealBlock }

func (v *View) write(w io.Writer, format uint32) (int64, error) {
	out := recordWriter{w: bufio.NewWriterSize(w, 256<<10), sum: xxhash.New()}
	out.header(&v.s, format)
	out.versions(&v.s)
	out.rest(&v.s)
	out.footer(v.Hash())
	if out.err == nil {
		out.err = out.w.Flush()
	}
	if out.err != nil {
		return out.written, fmt.Errorf("fsm: write snapshot: %w", out.err)
	}
	return out.written, nil
}

type recordWriter struct {
	w       *bufio.Writer
	sum     *xxhash.Digest
	records uint64
	written int64
	buf     []byte
	err     error // the first; nothing is written after it
}

// lengthRoom is kept free before a record for its length.
const lengthRoom = binary.MaxVarintLen64

func (w *recordWriter) write(r *pb.SnapshotRecord) bool {
	if w.err != nil {
		return false
	}
	if w.buf == nil {
		w.buf = make([]byte, lengthRoom, 4096)
	}
	if w.buf, w.err = (proto.MarshalOptions{}).MarshalAppend(w.buf[:lengthRoom], r); w.err != nil {
		return false
	}
	var length [lengthRoom]byte
	n := binary.PutUvarint(length[:], uint64(len(w.buf)-lengthRoom))
	framed := w.buf[lengthRoom-n:]
	copy(framed, length[:n])
	w.records++
	_, _ = w.sum.Write(framed) // never fails
	n, w.err = w.w.Write(framed)
	w.written += int64(n)
	return w.err == nil
}

func (w *recordWriter) header(s *state, format uint32) {
	w.write(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Header{Header: &pb.SnapshotHeader{
		Format:          format,
		Revision:        s.revision,
		CompactRevision: s.compacted,
		TimeUnixNano:    s.now,
		Index:           s.index,
		FeatureLevel:    FeatureLevel,
	}}})
}

func (w *recordWriter) versions(s *state) {
	kv := new(pb.KeyValue)
	live := &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Version{Version: kv}}
	s.current.Scan(func(_ string, v *version) bool {
		v.fill(kv, false)
		live.Sub = v.sub
		return w.write(live)
	})
	past := &pb.SnapshotRecord{Record: &pb.SnapshotRecord_Past{Past: kv}}
	s.past.scan(func(v *version) bool {
		v.fill(kv, false)
		past.Sub = v.sub
		return w.write(past)
	})
}

func (w *recordWriter) rest(s *state) {
	s.leases.Scan(func(id, ttl int64) bool {
		return w.write(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Lease{Lease: &pb.LeaseRecord{Id: id, TtlSeconds: ttl}}})
	})
	for p := s.requests.start; p < s.requests.end && w.err == nil; p++ {
		r := s.requests.at(p)
		result := new(pb.TxnResult)
		if w.err = proto.Unmarshal([]byte(r.answer()), result); w.err != nil {
			return
		}
		w.write(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Request{Request: &pb.RequestRecord{Id: []byte(r.id()), Result: result}}})
	}
}

func (w *recordWriter) footer(hash uint64) {
	w.write(&pb.SnapshotRecord{Record: &pb.SnapshotRecord_Footer{Footer: &pb.SnapshotFooter{
		Records:  w.records,
		Hash:     hash,
		Checksum: w.sum.Sum64(),
	}}})
}
