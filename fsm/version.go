package fsm

import (
	"math/bits"
	"strings"
	"unsafe"

	"github.com/cespare/xxhash/v2"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// version is one version of a key, or the tombstone of its delete. It is
// immutable once Apply has returned, and shared by the store and all its views.
//
// The struct is 64 bytes, exactly a size class of the allocator; key and value
// share one allocation. With a million keys each field counts, which is why
// this is not a pb.KeyValue (120 bytes and two allocations).
type version struct {
	data   []byte // the key, then the value
	create int64  // 0 for a tombstone
	mod    int64
	ver    int64 // 0 for a tombstone
	lease  int64
	keyLen uint32
	sub    uint32 // place among the changes of revision mod
}

func newVersion(key string, value []byte) *version {
	data := make([]byte, len(key)+len(value))
	copy(data, key)
	copy(data[len(key):], value)
	return &version{data: data, keyLen: uint32(len(key))}
}

// key shares the memory of the version.
func (v *version) key() string { return viewString(v.data[:v.keyLen]) }

// value shares the memory of the version.
func (v *version) value() []byte { return v.data[v.keyLen:] }

func (v *version) tombstone() bool { return v.create == 0 }

// before orders versions by key, then by when they were written.
func (v *version) before(o *version) bool {
	if c := strings.Compare(v.key(), o.key()); c != 0 {
		return c < 0
	}
	if v.mod != o.mod {
		return v.mod < o.mod
	}
	return v.sub < o.sub
}

// fill describes the version in kv, sharing its bytes.
func (v *version) fill(kv *pb.KeyValue, keysOnly bool) {
	kv.Key = v.data[:v.keyLen:v.keyLen]
	kv.CreateRevision = v.create
	kv.ModRevision = v.mod
	kv.Version = v.ver
	kv.Lease = v.lease
	if !keysOnly {
		kv.Value = v.value()
	}
}

func (v *version) proto() *pb.KeyValue {
	kv := new(pb.KeyValue)
	v.fill(kv, false)
	return kv
}

// Kinds of elements in the state hash.
const (
	hashVersion uint64 = iota + 1
	hashLease
	hashRequest
	hashScalars
	hashKV // of HashKV alone
)

func (v *version) hash() uint64 {
	h := fold(hashVersion, xxhash.Sum64(v.data))
	h = fold(h, uint64(v.keyLen)<<32|uint64(v.sub))
	h = fold(h, uint64(v.create))
	h = fold(h, uint64(v.mod))
	h = fold(h, uint64(v.ver))
	h = fold(h, uint64(v.lease))
	return finish(h)
}

func leaseHash(id, ttl int64) uint64 {
	return finish(fold(fold(hashLease, uint64(id)), uint64(ttl)))
}

// fold takes one more word into a hash.
func fold(h, x uint64) uint64 {
	return bits.RotateLeft64(h^x*0x9e3779b97f4a7c15, 29) * 0xbf58476d1ce4e5b9
}

// finish spreads each bit over the whole word, since the hashes of elements
// are added up.
func finish(h uint64) uint64 {
	h ^= h >> 30
	h *= 0xbf58476d1ce4e5b9
	h ^= h >> 27
	h *= 0x94d049bb133111eb
	return h ^ h>>31
}

// viewString is b as a string that shares its memory: only for bytes that never
// change, or for looking something up.
func viewString(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
