package scheduler

import (
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// replica is one numbered place of a workload: what is assigned, what is
// observed, and what is known of failed attempts.
type replica struct {
	w      *workload
	number int32

	assignment assignment
	observed   observed
	retry      *retry
	// What an assumed step makes of it; while it is set the replica is left
	// alone.
	next *assumption

	// Positions in the lists of the nodes that it is on.
	assignedAt, observedAt int32
}

// assignment is a stored assignment; mod is 0 where there is none.
type assignment struct {
	mod         int64
	node        *node
	generation  int64
	revision    string
	uid         string
	restart     int64
	needs       amounts
	ports       []*pb.Port
	runtime     pb.WorkloadType
	desired     pb.DesiredState
	exclusive   bool
	explanation string
	equipment   *equipment
	created     int64
	// It was made to even the load.
	rebalanced bool
	// It counts against its node's capacity: all do but those whose run is over.
	reserves bool
}

// observed is the stored report of an agent; mod is 0 where there is none.
type observed struct {
	mod        int64
	node       *node
	generation int64
	state      pb.State
	transition int64
	// Only where it is not running.
	reason *pb.Reason
}

type retry struct {
	mod         int64
	attempts    int32
	next        int64
	exhausted   bool
	failedNodes []string
	revision    string
	reason      *pb.Reason
}

// assumption is what an assumed step does to a replica, until the keyspace
// says the same or the step is rolled back.
type assumption struct {
	// Of the assignment to come; node is nil where there will be none.
	node       *node
	generation int64
	// What it reserves beyond the assignment that is there.
	needs     amounts
	ports     []portUse
	equipment *equipment
	reserves  bool
	// The assignment that is there is deleted.
	gone bool
}

// find answers with the replica of this number, or nil.
func (w *workload) find(number int32) *replica {
	if i, ok := w.search(number); ok {
		return w.replicas[i]
	}
	return nil
}

func (w *workload) search(number int32) (int, bool) {
	// Most workloads have no gaps.
	if int(number) < len(w.replicas) && w.replicas[number].number == number {
		return int(number), true
	}
	if n := len(w.replicas); n > 0 && w.replicas[n-1].number < number {
		return n, false
	}
	return slices.BinarySearchFunc(w.replicas, number, func(r *replica, n int32) int { return int(r.number) - int(n) })
}

func (w *workload) replica(number int32) *replica {
	i, ok := w.search(number)
	if !ok {
		w.replicas = slices.Insert(w.replicas, i, &replica{w: w, number: number})
	}
	return w.replicas[i]
}

// forgetReplica drops a replica that nothing is stored of any more, when thin
// is called next: a large workload that goes would be moved together for each.
func (p *Picture) forgetReplica(r *replica) {
	if r.empty() && !r.w.thins {
		r.w.thins = true
		p.thinning = append(p.thinning, r.w)
	}
}

func (r *replica) empty() bool {
	return r.assignment.mod == 0 && r.observed.mod == 0 && r.retry == nil && r.next == nil
}

func (p *Picture) thin() {
	for _, w := range p.thinning {
		w.thins = false
		w.replicas = slices.DeleteFunc(w.replicas, (*replica).empty)
		p.forgetWorkload(w)
	}
	clear(p.thinning)
	p.thinning = p.thinning[:0]
}

func (p *Picture) putAssignment(id string, number int32, mod int64, rec *pb.Assignment) {
	w := p.workloadNamed(id)
	r := w.replica(number)
	p.unreserve(r)
	old := r.assignment.node
	if p.Moved != nil {
		if old != nil {
			p.Moved(old.id, id, number, r.assignment.generation)
		}
		if rec != nil {
			p.Moved(rec.NodeId, id, number, 0)
		}
	}
	r.assignment = assignment{}
	if rec != nil {
		r.assignment = assignment{
			mod: mod, node: p.nodeNamed(rec.NodeId), generation: rec.Generation,
			revision: p.intern(rec.Revision), uid: p.intern(rec.WorkloadUid), restart: rec.RestartGeneration,
			needs: amounts{rec.CpuMillis, rec.MemoryBytes, rec.DiskBytes}, ports: rec.Ports, runtime: rec.Type,
			desired: rec.DesiredState, exclusive: rec.Exclusive, explanation: p.intern(rec.Explanation), equipment: equipmentOf(rec.Devices, rec.Storage),
			created: unixNano(rec.CreateTime), rebalanced: wasRebalanced(rec),
		}
	}
	if n := r.assignment.node; n != old {
		if old != nil {
			last := old.assigned[len(old.assigned)-1]
			old.assigned[r.assignedAt], last.assignedAt = last, r.assignedAt
			old.assigned = old.assigned[:len(old.assigned)-1]
			p.forgetNode(old)
		}
		if n != nil {
			r.assignedAt = int32(len(n.assigned))
			n.assigned = append(n.assigned, r)
			n.version++
			p.newVictims(w)
		}
	}
	p.reserve(r, false)
	p.left(old)
	p.touch(w)
	p.forgetReplica(r)
}

func (p *Picture) putObserved(id string, number int32, mod int64, rec *pb.Replica) {
	w := p.workloadNamed(id)
	r := w.replica(number)
	// An assumed step may build on the room that its assignment has: it keeps it
	// though it has ended meanwhile.
	held := p.unreserve(r) && r.next != nil
	old := r.observed.node
	r.observed = observed{}
	if rec != nil {
		r.observed = observed{
			mod: mod, node: p.nodeNamed(rec.NodeId), generation: rec.Generation,
			state: rec.State, transition: unixNano(rec.LastTransition),
		}
		if rec.State != pb.State_RUNNING {
			r.observed.reason = rec.Reason
		}
	}
	if n := r.observed.node; n != old {
		if old != nil {
			last := old.observed[len(old.observed)-1]
			old.observed[r.observedAt], last.observedAt = last, r.observedAt
			old.observed = old.observed[:len(old.observed)-1]
			p.forgetNode(old)
		}
		if n != nil {
			r.observedAt = int32(len(n.observed))
			n.observed = append(n.observed, r)
		}
	}
	p.reserve(r, held)
	p.left(old)
	p.left(r.observed.node)
	p.touch(w)
	p.forgetReplica(r)
}

func (p *Picture) putRetry(id string, number int32, mod int64, rec *pb.Retry) {
	w := p.workloadNamed(id)
	r := w.replica(number)
	r.retry = nil
	if rec != nil {
		r.retry = &retry{
			mod: mod, attempts: rec.Attempts, next: unixNano(rec.NextRetryAt), exhausted: rec.Exhausted,
			failedNodes: rec.FailedNodes, revision: rec.Revision, reason: rec.Reason,
		}
	}
	p.touch(w)
	p.forgetReplica(r)
}

// reported is what the agent says of the present assignment, SCHEDULED while
// it has not spoken.
func (r *replica) reported() pb.State {
	if r.observed.mod != 0 && r.observed.generation == r.assignment.generation && r.observed.node == r.assignment.node {
		return r.observed.state
	}
	return pb.State_SCHEDULED
}

// over reports whether the replica has ended and is not run again on account of
// its assignment: with success, or, of a job, with a failure. The next attempt,
// if there is one, is a new assignment.
func (r *replica) over() bool {
	switch r.reported() {
	case pb.State_COMPLETED:
		return true
	case pb.State_FAILED:
		return r.w.job() && ended(r.observed.reason)
	default:
		return false
	}
}

// reserve counts the assignment against its node, unless its run is over and it
// is not held, and ends the assumption that it was there.
func (p *Picture) reserve(r *replica, held bool) {
	a := &r.assignment
	if r.next != nil && r.next.reserves && a.generation >= r.next.generation {
		p.dropAssumed(r)
	}
	if a.mod == 0 || r.over() && !held {
		return
	}
	a.reserves = true
	a.node.version++
	a.node.take(a.needs, usedPorts(a.ports))
	a.node.equip(a.equipment)
	p.countPresence(r.w, a.node, presence{1, r.settled()}, true)
	p.index.update(a.node)
}

// unreserve reports whether the assignment was counted.
func (p *Picture) unreserve(r *replica) bool {
	a := &r.assignment
	if !a.reserves {
		return false
	}
	a.reserves = false
	a.node.version++
	a.node.give(a.needs, usedPorts(a.ports))
	a.node.unequip(a.equipment)
	p.countPresence(r.w, a.node, presence{-1, -r.settled()}, true)
	p.madeRoom(a.node)
	return true
}

func (p *Picture) dropAssumed(r *replica) {
	if !r.next.reserves {
		return
	}
	r.next.reserves = false
	r.next.node.give(r.next.needs, r.next.ports)
	r.next.node.unequip(r.next.equipment)
	p.countPresence(r.w, r.next.node, presence{all: -1}, true)
	p.madeRoom(r.next.node)
	p.forgetNode(r.next.node)
}

// madeRoom notes that something fits on n that did not.
func (p *Picture) madeRoom(n *node) {
	p.index.update(n)
	p.growth++
	if !n.freed {
		n.freed = true
		p.freed = append(p.freed, n)
	}
}

func unixNano(t *timestamppb.Timestamp) int64 {
	if t == nil {
		return 0
	}
	return t.AsTime().UnixNano()
}
