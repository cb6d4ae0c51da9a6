package scheduler

import (
	"slices"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Revisions that are kept beside those in use, so that users can go back.
const keptRevisions = 10

// stop decides about a workload that is to be stopped: replicas keep their
// places, so that they can start again whatever has come in the meantime, but
// for those on nodes that are to be emptied.
func (b *builder) stop() {
	global := b.w.want.kind == pb.WorkloadKind_GLOBAL
	if !global {
		b.tally.desired = b.w.want.replicas
	}
	b.tally.stop = true
	for _, r := range slices.Backward(b.w.replicas) {
		switch a := &r.assignment; {
		case b.taken(r):
			b.tally.busy = true
		case a.mod == 0 || !global && r.number >= b.w.want.replicas:
			b.reconcile(r, wantGone)
		case a.desired == pb.DesiredState_DESIRED_STOPPED:
			b.reconcile(r, wantStopped)
		default:
			b.reconcile(r, wantStop)
		}
		b.done()
	}
	if global {
		b.tally.desired = b.tally.assigned
	}
}

// alone reports whether nothing is on n any more but what has completed and
// replicas of kind global, which leave a node last.
func alone(n *node) bool {
	others := func(r *replica) bool { return r.w.want == nil || r.w.want.kind != pb.WorkloadKind_GLOBAL }
	for _, r := range n.assigned {
		if others(r) && r.reported() != pb.State_COMPLETED {
			return false
		}
	}
	// What was told to leave and is not gone.
	for _, r := range n.observed {
		if others(r) && r.assignment.node != n {
			return false
		}
	}
	return true
}

// left wakes what leaves a node last, when something else may have left it.
func (p *Picture) left(n *node) {
	if n == nil || !n.drains() {
		return
	}
	for _, r := range n.assigned {
		if p.globals.has(r.w) {
			p.touch(r.w)
		}
	}
}

// evict moves a replica away from a node whose drain is overdue. Where nothing has
// room for it it is pending, for the machine may be switched off any moment.
func (b *builder) evict(r *replica, want desire) {
	c := candidate{r: r, why: b.unfit(r.assignment.node)}
	if want != wantRun {
		c = b.renewal(r)
	}
	if !b.replace(c) && !b.truncated {
		b.tally.stuck--
		b.evicted(r)
	}
}

// evicted takes a replica away for which there is no other place.
func (b *builder) evicted(r *replica) {
	b.outOfService(r)
	b.tally.pending++
	b.tally.assigned--
	b.release(r)
	b.say(note{
		kind: pb.EventType_RESCHEDULED, verb: verbRemoved, why: "its drain is overdue, and no other node has room",
		number: r.number, node: r.assignment.node.id,
	})
}

// leave decides about a workload that is to be deleted: first the assignments
// go, then the agents report that the replicas are gone, then the records go. A
// job's runs go before it.
func (b *builder) leave() {
	b.tally.leave = true
	for _, r := range slices.Backward(b.w.replicas) {
		if b.taken(r) {
			b.tally.busy = true
			continue
		}
		b.reconcile(r, wantGone)
		b.done()
	}
	if !b.deleteRuns() || len(b.w.replicas) > 0 {
		return
	}
	b.begin()
	id := b.w.id
	// Nothing may have come in the meantime.
	for _, prefix := range []string{model.AssignmentsPrefix + id + "/", model.ReplicasPrefix + id + "/"} {
		b.step.Txn.Compare = append(b.step.Txn.Compare, &pb.Compare{
			Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL, Key: []byte(prefix), RangeEnd: model.PrefixEnd(prefix),
			TargetUnion: &pb.Compare_CreateRevision{},
		})
	}
	b.do(model.Delete(model.WorkloadKey(id)))
	b.do(model.DeletePrefix(model.WorkloadKey(id) + "/"))
	b.do(model.DeletePrefix(model.RevisionsPrefix + id + "/"))
	b.do(model.DeletePrefix(model.RetriesPrefix + id + "/"))
	b.step.leaves = true
	b.say(note{kind: pb.EventType_WORKLOAD_DELETED, number: -1, text: "deleted"})
}

// pruneRevisions deletes the oldest revisions that nothing runs and that are
// more than history keeps.
func (b *builder) pruneRevisions() {
	excess := len(b.w.revisions) - keptRevisions
	if excess <= 0 || b.w.want == nil || b.tally.leave || b.step != nil && b.step.rewrites {
		return
	}
	for _, rev := range b.w.revisions[:excess] {
		used := rev.name == b.w.want.revision || rev.name == b.w.rollout.GetPrevious() || slices.ContainsFunc(b.w.replicas, func(r *replica) bool {
			return r.assignment.revision == rev.name || r.next != nil
		})
		if !used {
			b.begin()
			b.do(model.Delete(model.RevisionKey(b.w.id, rev.name)))
		}
	}
}
