package etcd

import (
	"bytes"
	"slices"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// owner is whose keys an area of the keyspace holds.
type owner int

const (
	users owner = iota
	// system keys are shown as documents and written through admission.
	system
	// restricted are system keys for admins, as in the REST API.
	restricted
	// hidden keys are the system's secrets: to clients they are not there.
	hidden
)

// area is the keys in [from, to). Where to is one zero byte there is no end.
type area struct {
	from, to []byte
	owner    owner
}

// authPrefix is where etcd's users and roles are.
const authPrefix = model.SystemPrefix + "auth/"

// areas are the parts of the keyspace that are not the users', in key order.
var areas = layOut()

func layOut() []area {
	var all []area
	for _, p := range model.SystemPrefixes {
		whole := area{[]byte(p), model.PrefixEnd(p), system}
		if p == model.TokensPrefix || p == model.CertificatesPrefix {
			whole.owner = restricted
		}
		if p != model.SystemPrefix {
			all = append(all, whole)
			continue
		}
		secret := area{[]byte(authPrefix), model.PrefixEnd(authPrefix), hidden}
		all = append(all, area{whole.from, secret.from, system}, secret, area{secret.to, whole.to, system})
	}
	slices.SortFunc(all, func(a, b area) int { return bytes.Compare(a.from, b.from) })
	return all
}

// areaAfter is the index of the first area that does not end before a key.
func areaAfter(key []byte) int {
	low, high := 0, len(areas)
	for low < high {
		if middle := (low + high) / 2; bytes.Compare(areas[middle].to, key) <= 0 {
			low = middle + 1
		} else {
			high = middle
		}
	}
	return low
}

// ownerOf is whose key it is.
func ownerOf(key []byte) owner {
	if len(key) == 0 || key[0] != '/' {
		return users
	}
	if i := areaAfter(key); i < len(areas) && bytes.Compare(areas[i].from, key) <= 0 {
		return areas[i].owner
	}
	return users
}

// touches reports whether a key or, with an end, a range has to do with keys that
// are not the users'.
func touches(key, end []byte) bool {
	if len(end) == 0 {
		return ownerOf(key) != users
	}
	i, open := areaAfter(key), endless(end)
	return i < len(areas) && (open || bytes.Compare(key, end) < 0 && bytes.Compare(areas[i].from, end) < 0)
}

// cut takes a range that touches the system apart by owner.
func cut(key, end []byte) []area {
	if len(end) == 0 {
		return []area{{key, append(bytes.Clone(key), 0), ownerOf(key)}}
	}
	var parts []area
	at, open := key, endless(end)
	for _, a := range areas {
		if bytes.Compare(a.to, at) <= 0 {
			continue
		}
		if !open && bytes.Compare(end, a.from) <= 0 {
			break
		}
		if bytes.Compare(at, a.from) < 0 {
			parts = append(parts, area{at, a.from, users})
			at = a.from
		}
		to := a.to
		if !open && bytes.Compare(end, to) < 0 {
			to = end
		}
		parts = append(parts, area{at, to, a.owner})
		at = to
	}
	if open || bytes.Compare(at, end) < 0 {
		parts = append(parts, area{at, end, users})
	}
	return parts
}

// covers reports whether a range from key on concerns the owner's keys, for callers
// to whom keys up to those of an owner are shown. One that does not begin with "/",
// such as the whole keyspace, is about the users' alone: so tools that list, copy or
// clear everything act on what is theirs.
func covers(key []byte, o, shown owner) bool {
	return o == users || o <= shown && len(key) > 0 && key[0] == '/'
}

// visible is the parts of a range that are shown, those that touch in one.
func visible(key, end []byte, shown owner) []area {
	var all []area
	for _, part := range cut(key, end) {
		last := len(all) - 1
		switch {
		case !covers(key, part.owner, shown):
		case last >= 0 && bytes.Equal(all[last].to, part.from):
			all[last] = area{all[last].from, part.to, system}
		default:
			all = append(all, part)
		}
	}
	return all
}

// touchesSystem reports whether any part of the transaction may concern the
// system's keys.
func touchesSystem(txn *pb.Txn) bool {
	for _, c := range txn.Compare {
		if touches(c.Key, c.RangeEnd) {
			return true
		}
	}
	return anyOp(txn.Success, opTouches) || anyOp(txn.Failure, opTouches)
}

func opTouches(op *pb.RequestOp) bool {
	switch r := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		return touches(r.RequestRange.Key, r.RequestRange.RangeEnd)
	case *pb.RequestOp_RequestTxn:
		return touchesSystem(r.RequestTxn)
	}
	return opWrites(op)
}

// opWrites reports whether an operation may change what is the system's.
func opWrites(op *pb.RequestOp) bool {
	switch r := op.Request.(type) {
	case *pb.RequestOp_RequestPut:
		return touches(r.RequestPut.Key, nil)
	case *pb.RequestOp_RequestDeleteRange:
		return touches(r.RequestDeleteRange.Key, r.RequestDeleteRange.RangeEnd)
	case *pb.RequestOp_RequestTxn:
		return anyOp(r.RequestTxn.Success, opWrites) || anyOp(r.RequestTxn.Failure, opWrites)
	case *pb.RequestOp_LeaseRevoke:
		// It may be a node's.
		return true
	}
	return false
}

func anyOp(ops []*pb.RequestOp, is func(*pb.RequestOp) bool) bool {
	for _, op := range ops {
		if is(op) {
			return true
		}
	}
	return false
}

// leaseOfSystem reports whether the system's keys hang on a lease: it is that of a
// node, and no client's.
func leaseOfSystem(v *fsm.View, id int64) bool {
	if !v.LeaseHolds(id, "/") {
		return false
	}
	return slices.ContainsFunc(model.SystemPrefixes, func(prefix string) bool { return v.LeaseHolds(id, prefix) })
}
