package fsm

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// ErrSnapshot is what Restore fails with when the stream is not a whole and
// sound snapshot.
var ErrSnapshot = errors.New("fsm: bad snapshot")

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrSnapshot, fmt.Errorf(format, args...))
}

// Restore builds a store from a snapshot stream, to its end. It returns one
// only after the checksum, the state hash and all that must hold between the
// records have been verified.
func Restore(r io.Reader) (*Store, error) {
	in := recordReader{r: bufio.NewReaderSize(r, 256<<10), sum: xxhash.New()}
	var b builder
	for b.stage != stageFooter {
		checksum := in.sum.Sum64()
		record, err := in.next()
		if err != nil {
			return nil, err
		}
		if err := b.record(record, checksum); err != nil {
			return nil, bad("record %d: %w", b.records, err)
		}
		if in.digest == nil && record.GetHeader().GetFormat() == formatSealed {
			in.digest = sha256.New()
			_, _ = in.digest.Write(in.buf) // never fails
		}
	}
	if in.digest != nil {
		if err := in.seal(); err != nil {
			return nil, err
		}
	}
	if _, err := in.r.ReadByte(); err != io.EOF {
		if err == nil {
			err = errors.New("more data after the end")
		}
		return nil, bad("%w", err)
	}
	return b.store, nil
}

type recordReader struct {
	r      *bufio.Reader
	sum    *xxhash.Digest
	digest hash.Hash // of a sealed stream, once its header is known
	read   int64
	buf    []byte
	record pb.SnapshotRecord
}

// seal reads what follows the footer of a sealed stream.
func (in *recordReader) seal() error {
	tail := make([]byte, padding(in.read)+sha256.Size)
	if _, err := io.ReadFull(in.r, tail); err != nil {
		return bad("read the seal: %w", noEOF(err))
	}
	zeros := tail[:len(tail)-sha256.Size]
	_, _ = in.digest.Write(zeros) // never fails
	if !bytes.Equal(in.digest.Sum(nil), tail[len(zeros):]) {
		return bad("the seal is not the SHA-256 of what is before it")
	}
	return nil
}

// next is valid until the next call.
func (in *recordReader) next() (*pb.SnapshotRecord, error) {
	n, err := binary.ReadUvarint(in.r)
	if err != nil {
		return nil, bad("read the length of a record: %w", noEOF(err))
	}
	if n > maxRecord {
		return nil, bad("a record of %d bytes, at most %d are possible", n, maxRecord)
	}
	in.buf = slices.Grow(binary.AppendUvarint(in.buf[:0], n), int(n))
	head := len(in.buf)
	in.buf = in.buf[:head+int(n)]
	if _, err := io.ReadFull(in.r, in.buf[head:]); err != nil {
		return nil, bad("read a record of %d bytes: %w", n, noEOF(err))
	}
	in.read += int64(len(in.buf))
	_, _ = in.sum.Write(in.buf) // never fails
	if in.digest != nil {
		_, _ = in.digest.Write(in.buf) // never fails
	}
	// Nearly all records are versions: their message is used again.
	record := &in.record
	switch r := record.Record.(type) {
	case *pb.SnapshotRecord_Version:
		proto.Reset(r.Version)
	case *pb.SnapshotRecord_Past:
		proto.Reset(r.Past)
	default:
		record.Record = nil
	}
	record.Sub = 0
	record.ProtoReflect().SetUnknown(nil)
	if err := (proto.UnmarshalOptions{Merge: true}).Unmarshal(in.buf[head:], record); err != nil {
		return nil, bad("decode a record: %w", err)
	}
	return record, nil
}

// noEOF: the stream must not end before its footer.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Stages of a stream, in the order of its records.
const (
	stageStart = iota
	stageHeader
	stageVersions
	stagePast
	stageLeases
	stageRequests
	stageFooter
)

// builder makes a store from records and refuses those that cannot be.
type builder struct {
	store   *Store
	stage   int
	records uint64
	last    *version // previous one of the stage
	lease   int64    // previous one
}

func (b *builder) enter(stage int) error {
	if stage < b.stage || b.stage == stageStart && stage != stageHeader || stage == stageHeader && b.stage == stageHeader {
		return fmt.Errorf("of kind %d after one of kind %d", stage, b.stage)
	}
	if stage != b.stage {
		b.stage, b.last = stage, nil
	}
	return nil
}

func (b *builder) record(record *pb.SnapshotRecord, checksum uint64) error {
	var err error
	switch r := record.Record.(type) {
	case *pb.SnapshotRecord_Header:
		if err = b.enter(stageHeader); err == nil {
			err = b.header(r.Header)
		}
	case *pb.SnapshotRecord_Version:
		if err = b.enter(stageVersions); err == nil {
			err = b.version(r.Version, record.Sub)
		}
	case *pb.SnapshotRecord_Past:
		if err = b.enter(stagePast); err == nil {
			err = b.past(r.Past, record.Sub)
		}
	case *pb.SnapshotRecord_Lease:
		if err = b.enter(stageLeases); err == nil {
			err = b.addLease(r.Lease)
		}
	case *pb.SnapshotRecord_Request:
		if err = b.enter(stageRequests); err == nil {
			err = b.request(r.Request)
		}
	case *pb.SnapshotRecord_Footer:
		if err = b.enter(stageFooter); err == nil {
			err = b.footer(r.Footer, checksum)
		}
	default:
		err = errors.New("of an unknown kind")
	}
	b.records++
	return err
}

func (b *builder) header(h *pb.SnapshotHeader) error {
	switch {
	case h.GetFormat() != formatPlain && h.GetFormat() != formatSealed:
		return fmt.Errorf("format %d, this version knows %d and %d", h.GetFormat(), formatPlain, formatSealed)
	case h.FeatureLevel == 0 || h.FeatureLevel > FeatureLevel:
		return fmt.Errorf("%w %d, this version knows up to %d", ErrFeatureLevel, h.FeatureLevel, FeatureLevel)
	case h.Revision < 1 || h.Revision > 1<<62 || h.CompactRevision < -1 || h.CompactRevision > h.Revision:
		return fmt.Errorf("revision %d compacted at %d", h.Revision, h.CompactRevision)
	}
	b.store = New()
	b.store.revision, b.store.compacted = h.Revision, h.CompactRevision
	b.store.now, b.store.index = h.TimeUnixNano, h.Index
	return nil
}

// versionOf copies kv, which passes what holds for every version.
func (b *builder) versionOf(kv *pb.KeyValue, sub uint32) (*version, error) {
	switch {
	case kv == nil || len(kv.Key) == 0 || len(kv.Key) > MaxTxnBytes:
		return nil, fmt.Errorf("a key of %d bytes", len(kv.GetKey()))
	case kv.ModRevision < 1 || kv.ModRevision > b.store.revision || kv.CreateRevision < 0 || kv.CreateRevision > kv.ModRevision:
		return nil, fmt.Errorf("key %q created at %d and modified at %d, of %d", kv.Key, kv.CreateRevision, kv.ModRevision, b.store.revision)
	case kv.CreateRevision == 0 && (kv.Version != 0 || kv.Lease != 0 || len(kv.Value) != 0):
		return nil, fmt.Errorf("key %q has a tombstone with content", kv.Key)
	case kv.CreateRevision != 0 && kv.Version < 1:
		return nil, fmt.Errorf("key %q has version %d", kv.Key, kv.Version)
	}
	v := newVersion(viewString(kv.Key), kv.Value)
	v.create, v.mod, v.ver, v.lease, v.sub = kv.CreateRevision, kv.ModRevision, kv.Version, kv.Lease, sub
	if b.last != nil && !b.last.before(v) {
		return nil, fmt.Errorf("key %q is out of order", kv.Key)
	}
	b.store.sum += v.hash()
	b.store.bytes += int64(len(v.data))
	return v, nil
}

func (b *builder) version(kv *pb.KeyValue, sub uint32) error {
	v, err := b.versionOf(kv, sub)
	if err != nil {
		return err
	}
	if v.tombstone() || b.last != nil && b.last.key() == v.key() {
		return fmt.Errorf("key %q is live twice or deleted", v.key())
	}
	b.last = v
	b.store.current.Load(v.key(), v)
	if v.lease != 0 {
		b.store.attached.Set(attachment{v.lease, v.key()})
	}
	return nil
}

func (b *builder) past(kv *pb.KeyValue, sub uint32) error {
	v, err := b.versionOf(kv, sub)
	if err != nil {
		return err
	}
	b.last = v
	b.store.past.add(v)
	return nil
}

func (b *builder) addLease(l *pb.LeaseRecord) error {
	first := b.store.leases.Len() == 0
	if l.GetId() == 0 || !first && l.Id <= b.lease || l.TtlSeconds <= 0 || l.TtlSeconds > MaxLeaseTTL {
		return fmt.Errorf("lease %d of %d seconds after lease %d", l.GetId(), l.GetTtlSeconds(), b.lease)
	}
	b.lease = l.Id
	b.store.leases.Load(l.Id, l.TtlSeconds)
	b.store.sum += leaseHash(l.Id, l.TtlSeconds)
	return nil
}

func (b *builder) request(r *pb.RequestRecord) error {
	if _, known := b.store.requestAt[string(r.GetId())]; known || len(r.GetId()) == 0 || len(r.Id) > MaxRequestID || r.Result == nil {
		return fmt.Errorf("request id %x twice, of a wrong length or without an answer", r.GetId())
	}
	kept, err := newRequest(r.Id, r.Result)
	if err != nil {
		return err
	}
	b.store.keepRequest(kept)
	return nil
}

func (b *builder) footer(f *pb.SnapshotFooter, checksum uint64) error {
	switch {
	case f.GetRecords() != b.records:
		return fmt.Errorf("footer of %d records after %d", f.GetRecords(), b.records)
	case f.Checksum != checksum:
		return fmt.Errorf("checksum %016x, the footer says %016x", checksum, f.Checksum)
	case f.Hash != b.store.hash():
		return fmt.Errorf("state hash %016x, the footer says %016x", b.store.hash(), f.Hash)
	}
	if err := b.attachments(); err != nil {
		return err
	}
	if err := b.history(); err != nil {
		return err
	}
	s := b.store
	s.hashes[s.index%uint64(len(s.hashes))] = indexHash{s.index, s.hash()}
	return nil
}

// attachments makes sure that each lease with keys exists.
func (b *builder) attachments() error {
	var err error
	var seen int64
	b.store.attached.Scan(func(a attachment) bool {
		if a.lease == seen {
			return true
		}
		seen = a.lease
		if _, ok := b.store.leases.Get(a.lease); !ok {
			err = fmt.Errorf("key %q is attached to lease %d, which does not exist", a.key, a.lease)
		}
		return err == nil
	})
	return err
}
