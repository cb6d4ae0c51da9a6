package raftstore

import (
	"context"
	"io"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// WatchRange says what is watched: keys as in pb.RangeRequest, and changes of
// revisions greater than After.
type WatchRange struct {
	Key, End []byte
	After    int64
}

// maxWatchEvents bounds what one Next looks at, so that a watcher that is far
// behind neither takes much memory nor starves others.
const maxWatchEvents = 1024

// Watcher pulls changes out of the history. It holds nothing but its place: no
// goroutine, no buffer, nothing to close. It is for one goroutine.
type Watcher struct {
	s     *Store
	r     WatchRange
	after int64
	// It has read in the tail, and may go on there.
	follows bool
}

// Watch returns a watcher of this replica's history.
func (s *Store) Watch(r WatchRange) *Watcher { return &Watcher{s: s, r: r, after: r.After} }

// Next waits for changes and returns them in order: all of the range in one or
// several whole revisions, up to and including revision. It fails with a *fsm.Error
// of code COMPACTED where the history does not reach back to the watcher's place,
// which also happens when the replica took a snapshot in place of the log.
func (w *Watcher) Next(ctx context.Context) (events []*pb.KeyEvent, revision int64, err error) {
	for {
		changed := w.s.machine.changed.next()
		all, upTo, err := w.pull()
		if err != nil {
			return nil, 0, err
		}
		if upTo > w.after {
			w.after = upTo
			if events = w.filter(all); len(events) > 0 {
				return events, upTo, nil
			}
			if err := ctx.Err(); err != nil {
				return nil, 0, err
			}
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		case <-w.s.ended:
			return nil, 0, w.s.closedError()
		}
	}
}

// pull returns what comes next, of all keys; up to w.after when there is nothing.
func (w *Watcher) pull() (events []*pb.KeyEvent, upTo int64, err error) {
	events, upTo, ok := w.s.machine.tail.after(w.after, maxWatchEvents, w.follows)
	w.follows = ok
	if ok {
		return events, max(upTo, w.after), nil
	}
	return w.s.machine.state.Load().Events(w.after, maxWatchEvents)
}

// Revision is up to where the watcher has seen everything: what Next returned last,
// or later where nothing of the range has changed since.
func (w *Watcher) Revision() int64 { return w.after }

// filter keeps the events of the range. The slice may be shared with others.
func (w *Watcher) filter(all []*pb.KeyEvent) []*pb.KeyEvent {
	n := 0
	for _, e := range all {
		if w.r.holds(e.Kv.GetKey()) {
			n++
		}
	}
	switch n {
	case 0:
		return nil
	case len(all):
		return all
	}
	kept := make([]*pb.KeyEvent, 0, n)
	for _, e := range all {
		if w.r.holds(e.Kv.GetKey()) {
			kept = append(kept, e)
		}
	}
	return kept
}

func (r *WatchRange) holds(key []byte) bool {
	switch {
	case len(r.End) == 0:
		return string(key) == string(r.Key)
	case string(key) < string(r.Key):
		return false
	case len(r.End) == 1 && r.End[0] == 0:
		return true
	default:
		return string(key) < string(r.End)
	}
}

// WriteSnapshot writes the state as applied here, in the fsm's format, while
// changes go on.
func (s *Store) WriteSnapshot(w io.Writer) error {
	_, err := s.View().WriteTo(w)
	return err
}
