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
		case r.next != nil:
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

// leave decides about a workload that is to be deleted: first the assignments
// go, then the agents report that the replicas are gone, then the records go.
func (b *builder) leave() {
	b.tally.leave = true
	for _, r := range slices.Backward(b.w.replicas) {
		if r.next != nil {
			b.tally.busy = true
			continue
		}
		b.reconcile(r, wantGone)
		b.done()
	}
	if len(b.w.replicas) > 0 {
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
