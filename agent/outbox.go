package agent

import (
	"maps"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// outbox holds what the servers are to know and have not acknowledged. The
// reconcile loop writes to it, the session reads. One report is under way at a
// time; what changes meanwhile goes into the next.
type outbox struct {
	mu       sync.Mutex
	replicas map[Key]*pb.Replica
	// dirty replicas were not sent since they changed.
	dirty map[Key]bool
	// removed are generations of replicas that are gone, until acknowledged.
	removed map[Key]int64
	// drifts that no server has acknowledged.
	drifts []*pb.Drift
	// revision of the desired set that the replicas are compared with.
	revision int64
	// whole: every runtime has answered, so what is not among the replicas is not
	// there. A report that claims to be full must be whole.
	whole bool
	// due: a full report is owed.
	due bool
	seq uint64
	// sent is the report under way.
	sent    *pb.StatusReport
	changed chan struct{}
}

func newOutbox() *outbox {
	return &outbox{
		replicas: map[Key]*pb.Replica{}, dirty: map[Key]bool{}, removed: map[Key]int64{},
		changed: make(chan struct{}, 1),
	}
}

// put says what a replica is like now; it reports whether that is news. r is not
// changed afterwards.
func (o *outbox) put(key Key, r *pb.Replica) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if proto.Equal(o.replicas[key], r) {
		return false
	}
	o.replicas[key] = r
	o.dirty[key] = true
	o.signal()
	return true
}

// gone says that a replica is not on this node any more, at a generation and
// before. Generation 0: nobody was ever told of it.
func (o *outbox) gone(key Key, generation int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.replicas, key)
	delete(o.dirty, key)
	if generation > 0 {
		o.removed[key] = max(generation, o.removed[key])
		o.signal()
	}
}

// drift says what was found; where too much waits to be said it is dropped.
func (o *outbox) drift(d *pb.Drift) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.drifts) < maxDrifts {
		o.drifts = append(o.drifts, d)
		o.signal()
	}
}

func (o *outbox) get(key Key) *pb.Replica {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.replicas[key]
}

func (o *outbox) keys() []Key {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Collect(maps.Keys(o.replicas))
}

// all is everything that is known, in order.
func (o *outbox) all() []*pb.Replica {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.inOrder()
}

func (o *outbox) inOrder() []*pb.Replica {
	var all []*pb.Replica
	for _, key := range slices.SortedFunc(maps.Keys(o.replicas), Key.compare) {
		all = append(all, o.replicas[key])
	}
	return all
}

// stand says what the replicas are compared with, whether they are all there
// are, and whether the servers need to hear of all of them.
func (o *outbox) stand(revision int64, whole, due bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.revision, o.whole, o.due = revision, whole, o.due || due
	if o.due && o.whole {
		o.signal()
	}
}

// full begins a session: everything, whatever was sent before. Where not every
// runtime has answered, the report does not claim to be full; one that does is
// still owed.
func (o *outbox) full() *pb.StatusReport {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.everything()
}

func (o *outbox) everything() *pb.StatusReport {
	clear(o.dirty)
	o.seq++
	o.sent = &pb.StatusReport{Seq: o.seq, Full: o.whole, DesiredRevision: o.revision, Replicas: o.inOrder(), Removed: o.goneInOrder(), Drifts: slices.Clone(o.drifts)}
	o.due = !o.whole
	return o.sent
}

// next is a report of what changed; nil while one is under way or nothing did.
func (o *outbox) next() *pb.StatusReport {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.sent != nil:
		return nil
	case o.due && o.whole:
		return o.everything()
	case len(o.dirty) == 0 && len(o.removed) == 0 && len(o.drifts) == 0:
		return nil
	}
	o.seq++
	o.sent = &pb.StatusReport{Seq: o.seq, Removed: o.goneInOrder(), Drifts: slices.Clone(o.drifts)}
	for _, key := range slices.SortedFunc(maps.Keys(o.dirty), Key.compare) {
		o.sent.Replicas = append(o.sent.Replicas, o.replicas[key])
	}
	clear(o.dirty)
	return o.sent
}

// again is the report under way, to be sent once more; nil if there is none.
func (o *outbox) again() *pb.StatusReport {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sent
}

// acknowledged ends the report with that number.
func (o *outbox) acknowledged(seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sent == nil || o.sent.GetSeq() != seq {
		return
	}
	for _, r := range o.sent.GetRemoved() {
		if key := (Key{r.GetWorkloadId(), r.GetReplica()}); o.removed[key] == r.GetGeneration() {
			delete(o.removed, key)
		}
	}
	o.drifts = slices.Delete(o.drifts, 0, len(o.sent.GetDrifts()))
	o.sent = nil
	if len(o.dirty) > 0 || len(o.removed) > 0 || len(o.drifts) > 0 || o.due && o.whole {
		o.signal()
	}
}

func (o *outbox) goneInOrder() []*pb.Replica {
	var gone []*pb.Replica
	for _, key := range slices.SortedFunc(maps.Keys(o.removed), Key.compare) {
		gone = append(gone, &pb.Replica{WorkloadId: key.Workload, Replica: key.Replica, Generation: o.removed[key], State: pb.State_DELETED})
	}
	return gone
}

func (o *outbox) signal() {
	select {
	case o.changed <- struct{}{}:
	default:
	}
}
