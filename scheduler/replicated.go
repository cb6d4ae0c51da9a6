package scheduler

import (
	"slices"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// candidate is a replica that serves and is to be replaced.
type candidate struct {
	r   *replica
	why string
	// A new revision or a restart: what failed before is forgotten.
	renewed bool
	// It comes back at the last revision that was rolled out in full.
	former bool
}

// replicated decides about a service or a job that is to run: N replicas,
// numbered from 0, and during updates some beyond them.
func (b *builder) replicated() {
	want := b.w.want
	b.tally.desired, b.tally.job = want.replicas, b.w.job()
	b.beginRollout()
	at, _ := b.w.search(want.replicas + want.update.beyond())
	// Surplus ones go first, the highest number first.
	for _, r := range slices.Backward(b.w.replicas[at:]) {
		if b.taken(r) {
			b.tally.busy = true
			continue
		}
		b.reconcile(r, wantGone)
		b.done()
	}
	if b.rollout.holds {
		b.considerHeld()
	} else {
		b.each(0, want.replicas, b.consider)
	}
	b.considerExtras()
	b.judgeRollout()
	b.replaceServing()
	b.rebalance()
}

// each goes through the numbers from one up to another; the replica is nil where
// nothing is stored of it.
func (b *builder) each(from, to int32, do func(number int32, r *replica)) {
	at, _ := b.w.search(from)
	kept := b.w.replicas[at:]
	for number := from; number < to; number++ {
		var r *replica
		if len(kept) > 0 && kept[0].number == number {
			r, kept = kept[0], kept[1:]
		}
		do(number, r)
		b.done()
	}
}

// takeAway takes away the assignment of a replica that is not wanted any more.
// The observed record goes last: when its agent says so, or when there is no
// agent any more that could.
func (b *builder) takeAway(r *replica) {
	b.release(r)
	b.say(note{kind: pb.EventType_WORKLOAD_UPDATED, verb: verbRemoved, number: r.number, node: r.assignment.node.id})
	if n := r.observed.node; n != nil && n.lost() && !b.exclusive(r) {
		b.dropObserved(r)
	}
	b.dropRetry(r)
}

// forget deletes what is stored of a replica that is assigned nowhere and that no
// agent will speak of.
func (b *builder) forget(r *replica) {
	if n := r.observed.node; n != nil {
		if b.exclusive(r) && !b.vacated(r, n) {
			return
		}
		b.dropObserved(r)
	}
	b.dropRetry(r)
}

// consider decides about one wanted replica; r is nil where nothing is stored
// of it.
func (b *builder) consider(number int32, r *replica) {
	switch {
	case r == nil:
		b.place(number, nil)
	case b.taken(r):
		b.tally.busy = true
		b.tally.disrupted++
	default:
		b.reconcile(r, b.desireOf(r))
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
		to, ok = b.preempt(number, r, avoid, nil)
	}
	if !ok {
		b.tally.pending++
		if t != nil && t.reason.GetCode() == pb.ReasonCode_PREEMPTED {
			b.tally.preempted = t.reason
		}
		b.waiting = true
		return
	}
	b.clearWait(r, t)
	b.assign(number, r, to, b.run.explain(&to))
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

// placeOnceEnded finds a place for exclusive work when nothing of it can be
// running any more.
func (b *builder) placeOnceEnded(r *replica) {
	if !b.vacated(r, r.observed.node) {
		b.tally.disrupted++
		b.tally.leaving = r.observed.node.id
		return
	}
	if t := b.retryOf(r); t != nil && t.next > b.d.nano {
		b.retryPending(t.reason, t.next)
		return
	}
	b.place(r.number, r)
}

// renewal is the replacement of a replica whose assignment says something else
// than what is wanted now.
func (b *builder) renewal(r *replica) candidate {
	c := candidate{r: r, why: "new revision", renewed: true}
	switch a := &r.assignment; {
	case a.desired != pb.DesiredState_DESIRED_RUNNING:
		c.why = "start"
	case a.revision == b.w.want.revision:
		c.why = "restart"
	}
	return c
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

// replaceServing replaces replicas that serve, as many at once as may be out of
// service.
func (b *builder) replaceServing() {
	for i, c := range b.candidates {
		if b.rollout.halted || b.spare() <= 0 {
			b.tally.outdated += len(b.candidates) - i
			break
		}
		switch {
		case c.former:
			b.asFormer(func() { b.replace(c) })
		case b.w.want.kind == pb.WorkloadKind_SERVICE && c.r.number >= b.w.want.replicas:
			b.replaceExtra(c)
		default:
			b.replace(c)
		}
		b.done()
	}
	b.awaitHealth()
}

// spare is how many of the replicas that serve may be taken out of service now,
// for an update or for a drain: the update strategy has one budget for both.
func (b *builder) spare() int {
	t, u := &b.tally, &b.w.want.update
	n := u.parallel - t.disrupted
	if least := b.leastServing(); least > 0 {
		n = min(n, t.serving-least)
	}
	if b.rollout.surging() {
		// One that is replaced has one that stands in for it.
		n = min(n, b.rollout.extras.serving-t.disrupted)
	}
	return n
}

// leastServing is how many have to serve whatever is decided; 0: max_parallel
// alone counts.
func (b *builder) leastServing() int { return b.leastOf(b.tally.desired) }

func (b *builder) leastOf(desired int32) int {
	u := &b.w.want.update
	return int(model.MinHealthy(u.minHealthy, u.surge, desired))
}

// replace gives a replica a new assignment: on its own node where that still
// will do, else elsewhere. Without a place, what runs goes on running and the
// answer is false.
func (b *builder) replace(c candidate) bool {
	r := c.r
	if b.full() {
		return false
	}
	to, ok := b.run.fitsInPlace(r, b.seed(r.number, r))
	if !ok && b.w.want.kind != pb.WorkloadKind_GLOBAL {
		var avoid []string
		if t := b.retryOf(r); t != nil && !c.renewed {
			avoid = t.failedNodes
		}
		to, ok = b.run.choose(r.number, b.seed(r.number, r), avoid, false)
		// What has to leave takes the room of others; what serves does without.
		if from := r.assignment.node; !ok && (from.lost() || from.drains()) && (!b.exclusive(r) || b.vacated(r, from)) {
			to, ok = b.preempt(r.number, r, avoid, nil)
		}
	}
	if !ok {
		b.waiting = true
		if r.assignment.node.lost() {
			b.tally.pending++
		} else {
			b.tally.stuck++
		}
		return false
	}
	if c.renewed {
		b.dropRetry(r)
	} else {
		b.clearWait(r, b.retryOf(r))
	}
	b.move(r, to, c.why, pb.EventType_RESCHEDULED)
	return true
}

// outOfService takes a replica out of the counts of those that serve.
func (b *builder) outOfService(r *replica) {
	b.tally.disrupted++
	if b.counts(r) {
		b.tally.serving--
	}
	if r.serves() {
		b.tally.running--
		if b.desireOf(r) == wantRun {
			b.tally.updated--
		}
	}
}

// move carries a replica to a spot that was found for it, or, for exclusive
// work that may still run elsewhere, takes the first half of the way.
func (b *builder) move(r *replica, to spot, why string, kind pb.EventType) {
	from := r.assignment.node
	b.outOfService(r)
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
	verb, explanation := verbMoved, b.run.explain(&to)+"; "+why
	if to.node == from {
		verb, explanation = verbReplaced, "where it was; "+why
		if len(to.victims) > 0 {
			explanation = "where it was, " + b.run.explain(&to) + "; " + why
		}
	}
	b.assign(r.number, r, to, explanation)
	b.say(note{kind: kind, verb: verb, why: why, number: r.number, node: to.node.id})
}
