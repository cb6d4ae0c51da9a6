package fsm

import (
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// change is one event of the history.
type change struct {
	cur *version
	// The version that cur replaced; nil where the key did not exist.
	prev *version
}

// chronicle is what watchers see. A copy of it is a snapshot.
type chronicle struct {
	history   journal[change]
	revision  int64
	compacted int64
}

// after is the events of View.Events.
func (c *chronicle) after(rev int64, max int) (events []*pb.KeyEvent, upTo int64, err error) {
	if rev < c.compacted-1 {
		return nil, 0, refuse(pb.TxnError_TXN_ERROR_COMPACTED, "events after revision %d are compacted, the oldest revision is %d", rev, c.compacted)
	}
	if rev >= c.revision {
		return nil, rev, nil
	}
	from, to, upTo := c.history.search(func(h change) bool { return h.cur.mod > rev }), c.history.end, c.revision
	if max > 0 && to-from > uint64(max) {
		last := c.history.at(from + uint64(max) - 1).cur.mod
		if to = c.history.search(func(h change) bool { return h.cur.mod > last }); to < c.history.end {
			upTo = last
		}
	}
	return c.between(from, to), upTo, nil
}

// between describes the changes at positions from up to to. A version replaced
// at or before the compacted revision is not shown: other replicas may not have
// it any more.
func (c *chronicle) between(from, to uint64) []*pb.KeyEvent {
	if from == to {
		return nil
	}
	type event struct {
		event pb.KeyEvent
		kv    pb.KeyValue
	}
	block := make([]event, to-from)
	events := make([]*pb.KeyEvent, to-from)
	var f found
	for i := range block {
		h, e := c.history.at(from+uint64(i)), &block[i]
		e.event.Kv = &e.kv
		if h.cur.tombstone() {
			e.event.Type = pb.KeyEvent_DELETE
		}
		h.cur.fill(&e.kv, h.cur.tombstone())
		prev := h.prev
		if prev != nil && prev.mod == h.cur.mod {
			prev = f.before(c, h.cur)
		}
		if prev != nil && h.cur.mod > c.compacted {
			e.event.PrevKv = prev.proto()
		}
		events[i] = &e.event
	}
	return events
}

// found is what a transaction that changed a key twice found of its keys. As in
// etcd, that is what was before each of its changes.
type found struct {
	revision int64
	versions map[string]*version
}

func (f *found) before(c *chronicle, v *version) *version {
	if f.revision != v.mod {
		f.revision, f.versions = v.mod, make(map[string]*version)
		first := c.history.search(func(h change) bool { return h.cur.mod >= v.mod })
		for p := first; p < c.history.end && c.history.at(p).cur.mod == v.mod; p++ {
			h := c.history.at(p)
			if _, known := f.versions[h.cur.key()]; !known {
				f.versions[h.cur.key()] = h.prev
			}
		}
	}
	return f.versions[v.key()]
}
