package fsm

import (
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// next is the place of the transaction's next change. Its first one begins a
// new revision.
func (x *execution) next() (rev int64, sub uint32) {
	x.s.revision = x.begin + 1
	return x.s.revision, uint32(x.s.history.end - x.first)
}

func (x *execution) put(p *pb.PutRequest) *pb.ResponseOp {
	s := x.s
	key, value, lease := viewString(p.Key), p.Value, p.Lease
	if p.IgnoreValue || p.IgnoreLease {
		// As the key was when the transaction began: preflight has seen that it
		// existed, and only a delete that etcd does not hold against a put, or the
		// end of a lease, can have come in between.
		before := s.at(key, x.begin)
		if p.IgnoreValue {
			value = before.value()
		}
		if p.IgnoreLease {
			lease = before.lease
			if _, ok := s.leases.Get(lease); !ok {
				lease = 0 // revoked earlier in this transaction
			}
		}
	}

	v := newVersion(key, value)
	v.lease, v.create, v.ver = lease, x.begin+1, 1
	prev, replaced := s.current.Set(v.key(), v)
	if replaced {
		v.create, v.ver = prev.create, prev.ver+1
		s.past.add(prev)
		if prev.lease != 0 && prev.lease != lease {
			s.attached.Delete(attachment{prev.lease, key})
		}
	}
	if lease != 0 {
		// Also where it is attached already: the old key's memory goes.
		s.attached.Set(attachment{lease, v.key()})
	}
	v.mod, v.sub = x.next()
	s.sum += v.hash()
	s.bytes += int64(len(v.data))
	s.history.append(change{v, prev})

	response, put := x.answers.put()
	if p.PrevKv && prev != nil {
		put.PrevKv = prev.proto()
	}
	return response
}

func (x *execution) deleteRange(d *pb.DeleteRangeRequest) *pb.DeleteRangeResponse {
	s := x.s
	s.matches = s.matches[:0]
	s.scan(boundsOf(d.Key, d.RangeEnd), s.revision, func(v *version) bool {
		s.matches = append(s.matches, v)
		return true
	})
	response := &pb.DeleteRangeResponse{Deleted: int64(len(s.matches))}
	for _, v := range s.matches {
		if d.PrevKv {
			response.PrevKvs = append(response.PrevKvs, v.proto())
		}
		x.delete(v)
	}
	clear(s.matches)
	return response
}

// delete puts a tombstone in the place of a live version.
func (x *execution) delete(v *version) {
	s := x.s
	s.current.Delete(v.key())
	if v.lease != 0 {
		s.attached.Delete(attachment{v.lease, v.key()})
	}
	// With a key of its own, so that it does not keep the value alive.
	grave := newVersion(v.key(), nil)
	grave.mod, grave.sub = x.next()
	s.past.add(v)
	s.past.add(grave)
	s.sum += grave.hash()
	s.bytes += int64(len(grave.data))
	s.history.append(change{grave, v})
}

// revoke ends a lease and deletes its keys, in key order.
func (x *execution) revoke(id int64) {
	s := x.s
	s.matches = s.matches[:0]
	s.attached.Ascend(attachment{lease: id}, func(a attachment) bool {
		if a.lease != id {
			return false
		}
		v, _ := s.current.Get(a.key)
		s.matches = append(s.matches, v)
		return true
	})
	for _, v := range s.matches {
		x.delete(v)
	}
	clear(s.matches)
	ttl, _ := s.leases.Delete(id)
	s.sum -= leaseHash(id, ttl)
}

// compact forgets the versions that a later one replaced at or before rev, and
// the tombstones before rev. What changed at rev itself stays, so that a watch
// can begin there. The history leads to what must go: the cost depends on
// what is forgotten, not on what is kept.
func (s *Store) compact(rev int64) {
	keep := s.history.end
	seen := make(map[string]struct{})
	for p := s.history.start; p < s.history.end; p++ {
		c := s.history.at(p)
		if c.cur.mod >= rev && keep == s.history.end {
			keep = p
		}
		if c.cur.mod > rev {
			break
		}
		key := c.cur.key()
		if _, done := seen[key]; !done && (c.prev != nil || c.cur.tombstone()) {
			seen[key] = struct{}{}
			s.forget(key, rev)
		}
	}
	s.history.forget(keep)
	s.compacted = rev
}

// forget compacts one key.
func (s *Store) forget(key string, rev int64) {
	replaced := s.revision + 1 // never
	if v, ok := s.current.Get(key); ok {
		replaced = v.mod
	}
	s.past.forget(key, replaced, rev, func(v *version) {
		s.sum -= v.hash()
		s.bytes -= int64(len(v.data))
	})
}
