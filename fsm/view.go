package fsm

import (
	"iter"
	"strings"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// View is the state at one moment. It never changes, and may be used from any
// number of goroutines. The messages that it returns share the memory of the
// store and must not be modified.
type View struct {
	s state
}

// Revision is the newest revision.
func (v *View) Revision() int64 { return v.s.revision }

// CompactRevision is the oldest revision that can be read; -1 before the first
// compaction, as in etcd.
func (v *View) CompactRevision() int64 { return v.s.compacted }

// Index is that of the last log entry applied; 0 for none.
func (v *View) Index() uint64 { return v.s.index }

// Time is the leader's, and never goes backwards.
func (v *View) Time() time.Time { return v.s.time() }

// Hash identifies the state, whatever batches and snapshots led to it. It does
// not cover the index.
func (v *View) Hash() uint64 { return v.s.hash() }

// Len is the number of live keys.
func (v *View) Len() int { return v.s.current.Len() }

// Bytes is the size of the keys and values of all versions that are kept.
func (v *View) Bytes() int64 { return v.s.bytes }

// Get is the newest version of a key.
func (v *View) Get(key string) (*pb.KeyValue, bool) {
	if found, ok := v.s.current.Get(key); ok {
		return found.proto(), true
	}
	return nil, false
}

// Range answers as etcd does. The error is an *Error: INVALID, COMPACTED or
// FUTURE_REVISION.
func (v *View) Range(r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if refused := validateRange(r); refused != nil {
		return nil, refused
	}
	resp, refused := v.s.read(r)
	if refused != nil {
		return nil, refused
	}
	return resp, nil
}

// Txn answers a transaction that only reads, as Apply would. What would change
// something is refused as INVALID.
func (v *View) Txn(t *pb.Txn) (*pb.TxnResponse, error) {
	if refused := validate(t); refused != nil {
		return nil, refused
	}
	resp, refused := v.s.readTxn(t)
	if refused != nil {
		return nil, refused
	}
	return resp, nil
}

// Scan is the newest versions of the keys that begin with prefix, in key order.
func (v *View) Scan(prefix string) iter.Seq[*pb.KeyValue] {
	return func(yield func(*pb.KeyValue) bool) {
		v.s.scan(prefixBounds(prefix), v.s.revision, func(found *version) bool { return yield(found.proto()) })
	}
}

// Events is what changed after a revision: whole revisions, in order, until
// there are at least max events (0: no bound); each carries the version before
// its revision. All up to revision upTo is then known: ask for what is after it next.
//
// The error is an *Error with the code COMPACTED: changes right after that
// revision may be forgotten.
func (v *View) Events(after int64, max int) (events []*pb.KeyEvent, upTo int64, err error) {
	return v.s.after(after, max)
}

// Leases is all leases by id.
func (v *View) Leases() iter.Seq[*pb.LeaseRecord] {
	return func(yield func(*pb.LeaseRecord) bool) {
		v.s.leases.Scan(func(id, ttl int64) bool { return yield(&pb.LeaseRecord{Id: id, TtlSeconds: ttl}) })
	}
}

// Lease is the lease of that id.
func (v *View) Lease(id int64) (*pb.LeaseRecord, bool) {
	ttl, ok := v.s.leases.Get(id)
	if !ok {
		return nil, false
	}
	return &pb.LeaseRecord{Id: id, TtlSeconds: ttl}, true
}

// LeaseHolds reports whether a key that begins with prefix is attached to a lease.
func (v *View) LeaseHolds(id int64, prefix string) bool {
	found := false
	v.s.attached.Ascend(attachment{id, prefix}, func(a attachment) bool {
		found = a.lease == id && strings.HasPrefix(a.key, prefix)
		return false
	})
	return found
}

// LeaseKeys is the keys attached to a lease, in order.
func (v *View) LeaseKeys(id int64) [][]byte {
	var keys [][]byte
	v.s.attached.Ascend(attachment{lease: id}, func(a attachment) bool {
		if a.lease != id {
			return false
		}
		keys = append(keys, []byte(a.key))
		return true
	})
	return keys
}
