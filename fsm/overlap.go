package fsm

import (
	"slices"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// footprint is what a list of operations may write.
type footprint struct {
	puts []string // sorted, no duplicates
	// Disjoint, sorted by from.
	deletes []bounds
}

// footprintOf refuses, by etcd's rules (server/etcdserver/api/v3rpc/key.go,
// checkIntervals), a list that puts a key twice or puts a key that it also
// deletes. Two puts in the two branches of one nested transaction are fine, as
// only one is carried out. As in etcd, a nested transaction is held against the
// deletes of its own level and of the nested ones before it, not of those after
// it; and a delete of everything from a key on is held against nothing.
func footprintOf(ops []*pb.RequestOp) (footprint, *Error) {
	var f footprint
	for _, op := range ops {
		if d := op.GetRequestDeleteRange(); d != nil {
			f.delete(deleteBounds(d))
		}
	}
	for _, op := range ops {
		t := op.GetRequestTxn()
		if t == nil {
			continue
		}
		then, refused := footprintOf(t.Success)
		if refused != nil {
			return f, refused
		}
		otherwise, refused := footprintOf(t.Failure)
		if refused != nil {
			return f, refused
		}
		either := union(then.puts, otherwise.puts)
		if refused := f.put(either); refused != nil {
			return f, refused
		}
		for _, b := range then.deletes {
			f.delete(b)
		}
		for _, b := range otherwise.deletes {
			f.delete(b)
		}
	}
	var puts []string
	for _, op := range ops {
		if p := op.GetRequestPut(); p != nil {
			puts = append(puts, viewString(p.Key))
		}
	}
	slices.Sort(puts)
	for i := 1; i < len(puts); i++ {
		if puts[i] == puts[i-1] {
			return f, duplicateKey(puts[i])
		}
	}
	return f, f.put(puts)
}

// put adds keys, sorted and without duplicates, none of which may be in the
// footprint yet.
func (f *footprint) put(keys []string) *Error {
	if len(keys) == 0 {
		return nil
	}
	for _, k := range keys {
		if _, twice := slices.BinarySearch(f.puts, k); twice || f.deletesKey(k) {
			return duplicateKey(k)
		}
	}
	f.puts = union(f.puts, keys)
	return nil
}

func (f *footprint) deletesKey(key string) bool {
	// The last interval that begins at or before the key.
	i, found := slices.BinarySearchFunc(f.deletes, key, func(b bounds, k string) int { return strings.Compare(b.from, k) })
	if found {
		return true
	}
	return i > 0 && key < f.deletes[i-1].to
}

// delete adds an interval, merging it with those that it touches.
func (f *footprint) delete(b bounds) {
	if b.to <= b.from {
		return
	}
	first, _ := slices.BinarySearchFunc(f.deletes, b.from, func(o bounds, from string) int { return strings.Compare(o.to, from) })
	last := first
	for last < len(f.deletes) && f.deletes[last].from <= b.to {
		b.from = min(b.from, f.deletes[last].from)
		b.to = max(b.to, f.deletes[last].to)
		last++
	}
	f.deletes = slices.Replace(f.deletes, first, last, b)
}

// deleteBounds is the interval of a delete; empty where it has no upper bound.
func deleteBounds(d *pb.DeleteRangeRequest) bounds {
	b := boundsOf(d.Key, d.RangeEnd)
	switch {
	case b.single:
		b.to = b.from + "\x00"
	case b.open:
		b.to = b.from
	}
	return b
}

// union merges two sorted lists without duplicates into a third.
func union(a, b []string) []string {
	switch {
	case len(a) == 0:
		return b
	case len(b) == 0:
		return a
	}
	u := make([]string, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		switch c := strings.Compare(a[0], b[0]); {
		case c < 0:
			u, a = append(u, a[0]), a[1:]
		case c > 0:
			u, b = append(u, b[0]), b[1:]
		default:
			u, a, b = append(u, a[0]), a[1:], b[1:]
		}
	}
	return append(append(u, a...), b...)
}

func duplicateKey(key string) *Error {
	return refuse(pb.TxnError_TXN_ERROR_DUPLICATE_KEY, "duplicate key %q given in transaction", key)
}
