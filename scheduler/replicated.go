package scheduler

import (
	"slices"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// candidate is a replica that serves and is to be replaced.
type candidate struct {
	r   *replica
	why string
	// A new revision or a restart: what failed before is forgotten.
	renewed bool
}

// replicated decides about a service or a job that is to run: N replicas,
// numbered from 0.
func (b *builder) replicated() {
	want := b.w.want
	b.tally.desired, b.tally.job = want.replicas, b.w.job()
	at, _ := b.w.search(want.replicas)
	// Surplus ones go first, the highest number first.
	for _, r := range slices.Backward(b.w.replicas[at:]) {
		b.surplus(r)
		b.done()
	}
	kept := b.w.replicas[:at]
	for number := range want.replicas {
		var r *replica
		if len(kept) > 0 && kept[0].number == number {
			r, kept = kept[0], kept[1:]
		}
		b.consider(number, r)
		b.done()
	}
	b.replaceServing()
}

// surplus removes a replica that is not wanted any more.
func (b *builder) surplus(r *replica) {
	if r.next != nil {
		b.tally.busy = true
		return
	}
	b.vanish(r)
}

// vanish takes away what is stored of a replica that is not wanted any more.
// The observed record goes last: when its agent says so, or when there is no
// agent any more that could.
func (b *builder) vanish(r *replica) {
	n := r.observed.node
	assigned := r.assignment.mod != 0
	if assigned {
		b.release(r)
		b.say(note{kind: pb.EventType_WORKLOAD_UPDATED, verb: verbRemoved, number: r.number, node: r.assignment.node.id})
	}
	if n != nil && n.lost() && (!b.exclusive(r) || !assigned && b.vacated(r, n)) {
		b.dropObserved(r)
		n = nil
	}
	if assigned || n == nil {
		b.dropRetry(r)
	}
}

// consider decides about one wanted replica; r is nil where nothing is stored
// of it.
func (b *builder) consider(number int32, r *replica) {
	switch {
	case r == nil:
		b.place(number, nil)
	case r.next != nil:
		b.tally.busy = true
		b.tally.disrupted++
	case r.assignment.mod == 0:
		b.considerUnassigned(r)
	default:
		b.considerAssigned(r)
	}
}

// place finds a first place for a replica that is assigned nowhere.
func (b *builder) place(number int32, r *replica) {
	if b.full() {
		return
	}
	var avoid []string
	t := b.retryOf(r)
	if t != nil {
		avoid = t.failedNodes
	}
	to, ok := b.run.choose(number, b.seed(number, r), avoid, false)
	if !ok {
		b.tally.pending++
		b.waiting = true
		return
	}
	b.clearWait(r, t)
	b.assign(number, r, to, b.run.reason)
	b.tally.assigned++
	b.tally.scheduled++
	b.tally.disrupted++
	b.say(note{kind: pb.EventType_WORKLOAD_SCHEDULED, verb: verbPlaced, number: number, node: to.node.id})
}

// retryOf is what is known of failed attempts at the present revision.
func (b *builder) retryOf(r *replica) *retry {
	if r == nil || r.retry == nil || r.retry.revision != b.w.want.revision {
		return nil
	}
	return r.retry
}

// clearWait notes that a replica which waited for a time is given a place:
// attempts that failed are still remembered.
func (b *builder) clearWait(r *replica, t *retry) {
	switch {
	case r == nil || r.retry == nil:
	case t == nil || t.attempts == 0:
		b.dropRetry(r)
	case t.next != 0:
		b.putRetry(r, &pb.Retry{Attempts: t.attempts, FailedNodes: t.failedNodes, Reason: t.reason})
	}
}

// seed differs from attempt to attempt, so that a chosen port that turned out
// to be in use is not chosen again.
func (b *builder) seed(number int32, r *replica) uint64 {
	attempts := int32(0)
	if t := b.retryOf(r); t != nil {
		attempts = t.attempts
	}
	return mix(b.w.hash ^ uint64(number)<<8 ^ uint64(attempts))
}

func (b *builder) considerUnassigned(r *replica) {
	t := b.retryOf(r)
	if t != nil && t.exhausted {
		b.tally.fail(t.reason)
		return
	}
	if b.exclusive(r) && r.observed.mod != 0 && !b.vacated(r, r.observed.node) {
		b.tally.disrupted++
		b.tally.leaving = r.observed.node.id
		return
	}
	if t != nil && t.next > b.d.nano {
		b.retryPending(t.reason, t.next)
		return
	}
	b.place(r.number, r)
}

// considerAssigned goes through what may be amiss with a replica that has a
// place, the gravest first.
func (b *builder) considerAssigned(r *replica) {
	want, a := b.w.want, &r.assignment
	b.tally.assigned++
	renewed, lost, serving := b.renewed(r), a.node.lost(), r.serves()
	state := r.reported()
	if serving {
		b.tally.running++
	}
	t := b.retryOf(r)
	switch {
	case !renewed && state == pb.State_COMPLETED:
		b.tally.completed++
		b.dropRetry(r)
		return
	case !renewed && t != nil && t.exhausted:
		b.tally.fail(t.reason)
		if a.node.drains() || a.node.mod == 0 {
			b.release(r)
		}
		return
	case lost:
		b.lost(r, renewed)
		return
	case renewed || a.desired != pb.DesiredState_DESIRED_RUNNING:
		c := candidate{r: r, why: "new revision", renewed: true}
		switch {
		case a.desired != pb.DesiredState_DESIRED_RUNNING:
			c.why = "start"
		case a.revision == want.revision:
			c.why = "restart"
		}
		if !serving || a.desired != pb.DesiredState_DESIRED_RUNNING {
			b.replace(c)
			return
		}
		b.candidates = append(b.candidates, c)
		return
	}
	if serving {
		b.tally.updated++
	}
	if why := b.unfit(a.node); why != "" && state != pb.State_FAILED {
		b.evict(r, why, serving)
		return
	}
	switch {
	case state == pb.State_FAILED:
		b.failed(r)
	case serving:
		b.recovered(r)
	case state == pb.State_RETRY_PENDING:
		b.restarting(r)
	default:
		b.tally.scheduled++
		b.tally.disrupted++
	}
}

// renewed reports whether the replica is assigned at another revision than the
// present one, or since before the last restart.
func (b *builder) renewed(r *replica) bool {
	want, a := b.w.want, &r.assignment
	return a.revision != want.revision || a.restart != want.restart || a.uid != want.uid
}

// serves reports whether the replica runs on a node that answers.
func (r *replica) serves() bool { return r.reported() == pb.State_RUNNING && !r.assignment.node.lost() }

// unfit says why work has to leave a node that answers; empty: it may stay.
func (b *builder) unfit(n *node) string {
	if n.drains() {
		return "node " + n.id + " is drained"
	}
	b.d.p.prepare(b.w.want.shape.filter)
	if !b.w.want.shape.filter.allows(n) {
		return "node " + n.id + " does not match any more"
	}
	return ""
}

// evict moves a replica away from a node that answers: at once where it serves
// nobody or the time for the drain is up, else in its turn.
func (b *builder) evict(r *replica, why string, serving bool) {
	c := candidate{r: r, why: why}
	deadline := r.assignment.node.drainDeadline
	if serving && (deadline == 0 || deadline > b.d.nano) {
		if deadline != 0 {
			b.at(deadline)
		}
		b.candidates = append(b.candidates, c)
		return
	}
	b.replace(c)
}

// lost moves a replica away from a node that does not answer. Without a place
// for it the assignment stays: the node may come back.
func (b *builder) lost(r *replica, renewed bool) {
	n := r.assignment.node
	if b.exclusive(r) && !b.vacated(r, n) {
		b.tally.lost = n.id
		b.tally.unknown++
		b.tally.disrupted++
		return
	}
	why := "node " + n.id + " is lost"
	if n.mod == 0 {
		why = "node " + n.id + " was removed"
	}
	b.replace(candidate{r: r, why: why, renewed: renewed})
}

// vacated reports whether exclusive work may be taken to have ended on n, which
// is lost or does not have the replica's assignment any more; where only time
// is missing, it asks to be woken. Of a node that was removed nobody knows since
// when it is lost: the time begins to run when this is first seen, and the
// replica's retry record remembers it.
func (b *builder) vacated(r *replica, n *node) bool {
	ok, due := b.d.safe(n)
	if n.mod == 0 {
		t := b.retryOf(r)
		if t != nil && t.next != 0 && t.reason.GetCode() == pb.ReasonCode_NODE_LOST {
			ok, due = t.next <= b.d.nano, t.next
		} else if b.w.want != nil {
			due = b.d.nano + int64(b.d.opt.Lease+b.d.opt.Margin)
			rec := &pb.Retry{NextRetryAt: stampOf(due), Reason: &pb.Reason{
				Code: pb.ReasonCode_NODE_LOST, Message: "node " + n.id + " was removed; it may still be running there",
				LastTransition: b.d.nowStamp, NextRetryAt: stampOf(due), Retryable: true,
			}}
			if t != nil {
				rec.Attempts, rec.FailedNodes = t.attempts, t.failedNodes
			}
			b.putRetry(r, rec)
		}
	}
	if !ok && due > b.d.nano {
		b.at(due)
	}
	return ok
}

// replaceServing replaces replicas that serve, as many at once as the update
// strategy allows to be out of service.
func (b *builder) replaceServing() {
	parallel := b.w.want.parallel
	for i, c := range b.candidates {
		if b.tally.disrupted >= parallel {
			b.tally.outdated += len(b.candidates) - i
			return
		}
		b.replace(c)
		b.done()
	}
}

// replace gives a replica a new assignment: on its own node where that still
// will do, else elsewhere. Without a place, what runs goes on running.
func (b *builder) replace(c candidate) {
	r := c.r
	if b.full() {
		return
	}
	to, ok := b.run.fitsInPlace(r, b.seed(r.number, r))
	if !ok && b.w.want.kind != pb.WorkloadKind_GLOBAL {
		var avoid []string
		if t := b.retryOf(r); t != nil && !c.renewed {
			avoid = t.failedNodes
		}
		to, ok = b.run.choose(r.number, b.seed(r.number, r), avoid, false)
	}
	if !ok {
		b.waiting = true
		if r.assignment.node.lost() {
			b.tally.pending++
		} else {
			b.tally.stuck++
		}
		return
	}
	if c.renewed {
		b.dropRetry(r)
	} else {
		b.clearWait(r, b.retryOf(r))
	}
	b.move(r, to, c.why, pb.EventType_RESCHEDULED)
}

// move carries a replica to a spot that was found for it, or, for exclusive
// work that may still run elsewhere, takes the first half of the way.
func (b *builder) move(r *replica, to spot, why string, kind pb.EventType) {
	from := r.assignment.node
	b.tally.disrupted++
	if r.serves() {
		b.tally.running--
		if !b.renewed(r) {
			b.tally.updated--
		}
	}
	b.begin()
	b.relyOn(from)
	if to.node != from && b.exclusive(r) && !b.vacated(r, from) {
		b.release(r)
		b.tally.assigned--
		b.tally.leaving = from.id
		b.say(note{kind: kind, verb: verbLeaving, why: why, number: r.number, node: from.id})
		return
	}
	b.tally.scheduled++
	verb, explanation := verbMoved, b.run.reason+"; "+why
	if to.node == from {
		verb, explanation = verbReplaced, "where it was; "+why
	}
	b.assign(r.number, r, to, explanation)
	b.say(note{kind: kind, verb: verb, why: why, number: r.number, node: to.node.id})
}
