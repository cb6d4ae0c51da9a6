package raftstore

import (
	"testing"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// revision makes n events of one revision.
func revision(rev int64, n int) []*pb.KeyEvent {
	events := make([]*pb.KeyEvent, n)
	for i := range events {
		events[i] = &pb.KeyEvent{Kv: &pb.KeyValue{ModRevision: rev}}
	}
	return events
}

func TestTailGivesWholeRevisions(t *testing.T) {
	var l tail
	l.reset(10)
	if events, upTo, ok := l.after(10, 5, false); !ok || len(events) != 0 || upTo != 10 {
		t.Errorf("empty: %d events up to %d, %v", len(events), upTo, ok)
	}
	if _, _, ok := l.after(9, 5, false); ok {
		t.Error("it answers for what it never saw")
	}
	l.add(nil)
	l.add(revision(11, 3))
	l.add(append(revision(12, 4), revision(13, 1)...))
	for _, c := range []struct {
		after int64
		max   int
		n     int
		upTo  int64
	}{
		{10, 100, 8, 13}, {10, 1, 3, 11}, {10, 3, 3, 11}, {10, 4, 7, 12}, {11, 1, 4, 12},
		{12, 1, 1, 13}, {13, 1, 0, 13}, {20, 1, 0, 13},
	} {
		events, upTo, ok := l.after(c.after, c.max, false)
		if !ok || len(events) != c.n || upTo != c.upTo {
			t.Errorf("after %d, at most %d: %d events up to %d, %v; want %d up to %d", c.after, c.max, len(events), upTo, ok, c.n, c.upTo)
		}
	}
}

func TestTailIsBounded(t *testing.T) {
	var l tail
	l.reset(1)
	held, _, _ := l.after(1, 10, false)
	next := int64(1)
	for rev := int64(2); rev < 3*tailEvents; rev++ {
		l.add(revision(rev, 1+int(rev%3)))
		if rev%100 != 0 {
			continue
		}
		// A watcher that keeps up misses nothing.
		for {
			events, upTo, ok := l.after(next, 64, false)
			if !ok {
				t.Fatalf("a watcher at %d of %d was left behind", next, rev)
			}
			if upTo == next {
				break
			}
			for _, e := range events {
				if r := e.Kv.ModRevision; r != next && r != next+1 {
					t.Fatalf("revision %d after %d", r, next)
				}
				next = e.Kv.ModRevision
			}
		}
		if len(l.events) > 2*tailEvents || rev > tailEvents && len(l.events) < tailEvents-3 {
			t.Fatalf("%d events are kept", len(l.events))
		}
	}
	if l.events[0].Kv.ModRevision != l.since+1 || len(held) != 0 {
		t.Errorf("since %d, first %d", l.since, l.events[0].Kv.ModRevision)
	}
	if _, _, ok := l.after(5, 10, false); ok {
		t.Error("it answers for what it has dropped")
	}
}

func TestTailKeepsWhatIsCompactedForThoseWhoFollow(t *testing.T) {
	var l tail
	l.reset(1)
	const last = 3 * graceEvents
	for rev := int64(2); rev <= last; rev++ {
		l.add(revision(rev, 1))
	}
	l.forget(last)
	if _, _, ok := l.after(last-1, 10, false); ok {
		t.Error("a newcomer gets what was compacted")
	}
	if events, _, ok := l.after(last-graceEvents, 2*graceEvents, true); !ok || len(events) != graceEvents {
		t.Errorf("a follower gets %d events, %v", len(events), ok)
	}
	if _, _, ok := l.after(last-graceEvents-1, 10, true); ok || len(l.events) != graceEvents {
		t.Errorf("%d compacted events are kept", len(l.events))
	}
	l.add(revision(last+1, 2))
	if events, upTo, ok := l.after(last, 10, false); !ok || len(events) != 2 || upTo != last+1 {
		t.Errorf("after it %d events up to %d, %v", len(events), upTo, ok)
	}
	big := revision(last+2, 1)
	big[0].Kv.Value = make([]byte, graceBytes)
	l.add(big)
	l.forget(last + 2)
	if len(l.events) != 1 {
		t.Errorf("%d events are kept beside a large one", len(l.events))
	}
}
