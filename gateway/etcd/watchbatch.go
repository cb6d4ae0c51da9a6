package etcd

import (
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// overhead is at most what a version of a key takes in a message, beside key and
// value.
const overhead = 64

// change is an event on its way to watchers. It becomes etcd's message when the
// first one needs it, and is then shared by all.
type change struct {
	event *pb.KeyEvent
	// Without and with the version before it.
	plain, full *mvccpb.Event
	// Of plain and full, in bytes.
	size, fullSize int
}

func (c *change) revision() int64 { return c.event.Kv.ModRevision }

// changesOf appends the events to a slice that may be reused.
func changesOf(to []change, events []*pb.KeyEvent) []change {
	for _, e := range events {
		to = append(to, change{event: e})
	}
	return to
}

// of is the event as a watcher sees it, and its size.
func (c *change) of(prev bool) (*mvccpb.Event, int) {
	if c.plain == nil {
		kv := keyValue(show(c.event.Kv))
		c.plain = &mvccpb.Event{Type: mvccpb.Event_EventType(c.event.Type), Kv: kv}
		c.size = len(kv.Key) + len(kv.Value) + overhead
	}
	if !prev || c.event.PrevKv == nil {
		return c.plain, c.size
	}
	if c.full == nil {
		before := keyValue(show(c.event.PrevKv))
		c.full = &mvccpb.Event{Type: c.plain.Type, Kv: c.plain.Kv, PrevKv: before}
		c.fullSize = c.size + len(before.GetKey()) + len(before.GetValue()) + overhead
	}
	return c.full, c.fullSize
}

// bundle is what a watcher gets at once: events of one or several whole revisions.
type bundle struct {
	events []*mvccpb.Event
	size   int // bytes
}

// revision is that of the last event.
func (b *bundle) revision() int64 { return b.events[len(b.events)-1].Kv.ModRevision }

// match finds which spans of the index the changes concern, and leaves them there.
// With a limit it stops at the end of the revision at which they have so many bytes
// in all. It returns how many changes it has looked at.
func match(x *spanIndex, changes []change, limit int) (touched []*span, looked int) {
	bytes := 0
	for i := range changes {
		c := &changes[i]
		if limit > 0 && bytes >= limit && c.revision() != changes[i-1].revision() {
			return touched, i
		}
		key, counted := c.event.Kv.Key, false
		x.at(key, func(s *span) {
			if !covers(s.key, ownerOf(key), restricted) {
				return
			}
			if len(s.hits) == 0 {
				touched = append(touched, s)
			}
			s.hits = append(s.hits, c)
			if !counted {
				counted = true
				bytes += len(key) + len(c.event.Kv.Value) + len(c.event.PrevKv.GetValue()) + overhead
			}
		})
	}
	return touched, len(changes)
}

// handOut gives each watcher of the span what match has found. Those who want the
// same share it. The watcher may be removed from the span meanwhile, by deliver.
func (s *span) handOut(deliver func(*watcher, bundle)) {
	var shared [2]bundle // without and with the versions before
	for i := len(s.watchers) - 1; i >= 0; i-- {
		w := s.watchers[i]
		var b bundle
		if w.from > s.hits[0].revision() || w.noPut || w.noDelete || w.shown < restricted {
			b = bundleOf(s.hits, w.prev, w.wants)
		} else {
			which := &shared[0]
			if w.prev {
				which = &shared[1]
			}
			if which.events == nil {
				*which = bundleOf(s.hits, w.prev, func(*change) bool { return true })
			}
			b = *which
		}
		if len(b.events) > 0 {
			deliver(w, b)
		}
	}
	s.hits = nil
}

func bundleOf(hits []*change, prev bool, wants func(*change) bool) (b bundle) {
	for _, c := range hits {
		if wants(c) {
			event, size := c.of(prev)
			b.events = append(b.events, event)
			b.size += size
		}
	}
	return b
}

// headers makes one header for many answers at the same revision.
type headers struct{ last *etcdpb.ResponseHeader }

func (h *headers) at(s *Server, revision int64) *etcdpb.ResponseHeader {
	if h.last == nil || h.last.Revision != revision {
		h.last = s.header(revision)
	}
	return h.last
}

// split cuts a bundle where it is longer than the limit: between revisions or, in
// fragments, between any events. No part is empty.
func (b bundle) split(limit int, fragment bool) (parts []bundle) {
	from, size := 0, 0
	for i := 0; i < len(b.events); {
		next, unit := i, 0
		for next == i || !fragment && next < len(b.events) && b.events[next].Kv.ModRevision == b.events[i].Kv.ModRevision {
			unit += sizeOf(b.events[next])
			next++
		}
		if i > from && size+unit > limit {
			parts = append(parts, bundle{b.events[from:i], size})
			from, size = i, 0
		}
		i, size = next, size+unit
	}
	return append(parts, bundle{b.events[from:], size})
}

// sizeOf is at least what an event takes in a message.
func sizeOf(e *mvccpb.Event) int {
	size := len(e.Kv.Key) + len(e.Kv.Value) + overhead
	if e.PrevKv != nil {
		size += len(e.PrevKv.Key) + len(e.PrevKv.Value) + overhead
	}
	return size
}
