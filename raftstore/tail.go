package raftstore

import (
	"sort"
	"sync"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// tailEvents is how many of the newest events are kept ready for watchers.
const tailEvents = 8192

// Of what was compacted so many events, of so many bytes together, stay for the
// watchers that were about to read them: a compaction to the present, in the same
// batch as changes, must not cut off those who keep up.
const (
	graceEvents = 1024
	graceBytes  = 32 << 20
)

// tail holds the newest events as the fsm described them when it applied them, for
// all watchers that keep up. Whoever is further behind asks the history, which
// describes each event anew.
type tail struct {
	mu sync.RWMutex
	// All events of revisions greater than since, up to revision. Only appended to:
	// readers share the array.
	events          []*pb.KeyEvent
	since, revision int64
	// Up to here it was compacted: only for those who have read in the tail before.
	compacted int64
}

// reset begins anew at a revision whose past is not known.
func (t *tail) reset(revision int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events, t.since, t.revision, t.compacted = nil, revision, revision, 0
}

// add appends the events of whole revisions.
func (t *tail) add(events []*pb.KeyEvent) {
	if len(events) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events = append(t.events, events...)
	t.revision = events[len(events)-1].Kv.ModRevision
	if len(t.events) < 2*tailEvents {
		return
	}
	// Whole revisions are dropped, and the array with them.
	t.since = t.events[len(t.events)-tailEvents].Kv.ModRevision
	kept := t.events[t.position(t.since):]
	t.events = append(make([]*pb.KeyEvent, 0, 2*tailEvents), kept...)
}

// forget leaves what was compacted to the history, which refuses it, except for
// those who are in the midst of it.
func (t *tail) forget(compacted int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.compacted = max(t.compacted, min(compacted, t.revision))
	first, bytes := t.position(t.compacted), 0
	for n := 0; first > 0 && n < graceEvents && bytes < graceBytes; n++ {
		first--
		e := t.events[first]
		bytes += len(e.Kv.GetKey()) + len(e.Kv.GetValue()) + len(e.PrevKv.GetValue())
	}
	if first == 0 {
		return
	}
	t.since = t.events[first-1].Kv.ModRevision
	// A new array: the old one keeps what is dropped.
	t.events = append([]*pb.KeyEvent(nil), t.events[t.position(t.since):]...)
}

// position is that of the first event after the revision. t.mu is held.
func (t *tail) position(revision int64) int {
	return sort.Search(len(t.events), func(i int) bool { return t.events[i].Kv.ModRevision > revision })
}

// after returns the events of whole revisions greater than the given one, up to and
// including upTo, at most max of them unless a single revision has more. It is not
// ok where the tail does not reach back so far, or what was compacted is asked for
// by one who has not followed the tail until then.
func (t *tail) after(revision int64, max int, follows bool) (events []*pb.KeyEvent, upTo int64, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if revision < t.since || !follows && revision < t.compacted {
		return nil, 0, false
	}
	first := t.position(revision)
	if len(t.events)-first <= max {
		return t.events[first:len(t.events):len(t.events)], t.revision, true
	}
	end := first + max
	for end < len(t.events) && t.events[end].Kv.ModRevision == t.events[end-1].Kv.ModRevision {
		end++
	}
	return t.events[first:end:end], t.events[end-1].Kv.ModRevision, true
}
