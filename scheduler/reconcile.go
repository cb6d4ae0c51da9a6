package scheduler

import pb "github.com/persys-dev/persys/proto/persys/v1"

// What is to become of one replica is looked up: what is wanted of it, what is
// seen of it, and how its node is, give the action. docs/reconciliation.md is
// printed from this table and from the comments here, and a test drives a cluster
// into each of its cells.

// desire is what is wanted of a replica, beside what its assignment says.
type desire uint8

const (
	// It is to run, as it is assigned or, without an assignment, anywhere.
	wantRun desire = iota
	// It is to run, and is assigned at another revision or before the last restart.
	wantNew
	// As wantNew, and the update does not go on: it has failed, or waits for promotion.
	wantHeld
	// It is to run, and its assignment says that it is stopped.
	wantStart
	// It is to be stopped, and its assignment says that it runs.
	wantStop
	// It is to be stopped, as its assignment says.
	wantStopped
	// There is to be no such replica: the workload is deleted or has fewer.
	wantGone
	desires
)

// sight is what is seen of a replica.
type sight uint8

const (
	// Not assigned, and nothing of it may be running.
	absent sight = iota
	// Not assigned, and waits for the time of its next attempt.
	pausing
	// Not assigned, and an instance may still be running where it was.
	ending
	// Attempts are used up at this revision.
	exhausted
	// Assigned; its agent has not said yet that it runs.
	starting
	// Runs.
	running
	// Has ended, and its agent is about to start it again.
	restarting
	// Its agent has given it up.
	failed
	// Its agent has stopped it.
	stopped
	// Has run to its end with success.
	completed
	sights
)

// condition is how the node is that a replica, or the last instance of it, is on.
type condition uint8

const (
	// It is on none.
	nowhere condition = iota
	// Ready, and matches.
	fit
	// Cordoned, or a suspect: its lease is over and it is not declared lost. It keeps
	// what it has and gets nothing new.
	closed
	// To be emptied, in good order.
	draining
	// To be emptied, and the deadline is over.
	overdue
	// Answers, but the workload may not be there any more.
	unmatched
	// Does not answer.
	lost
	// Was removed, or does not answer and was to be emptied.
	gone
	conditions
)

// action is what is done about a replica.
type action uint8

const (
	// It can't be so.
	never action = iota
	// Assign it to the best node; where none has room it is pending, which costs no
	// attempt.
	placeIt
	// Wait for the time of the next attempt.
	pause
	// Place it when its agent has said that the instance is gone, or its node has been
	// lost for a lease and a margin. Work that is not exclusive is placed at once.
	placeOnceEnded
	// It has failed for good, until a retry or a change.
	giveUp
	// As giveUp; its place is given back.
	vacate
	// Its agent will speak.
	await
	// All is well; failures of old are forgotten after a while.
	keep
	// The agent is at it.
	localRestart
	// Count the failure; attempt it again after a pause, elsewhere if possible, until
	// attempts are used up. A refusal for lack of room costs none.
	retryIt
	// As retryIt, without the pause; where no other node has room it is taken away and
	// pending.
	retryNow
	// Nothing is left to do.
	rest
	// As on a node that is closed: it may run to its end until the deadline.
	finish
	// Assign it elsewhere when the update strategy has one to spare.
	moveInTurn
	// Assign it elsewhere now; it stays where nothing else has room.
	move
	// Assign it elsewhere now; where nothing else has room it is taken away and pending.
	evict
	// Assign it elsewhere now; what is exclusive when it must have ended.
	moveLost
	// Assign it anew when the update strategy has one to spare; on its node if that
	// will do.
	replaceInTurn
	// It serves as it is.
	leave
	// Assign it anew now, on its node if that will do.
	replace
	// Tell its agent to stop it; its room stays reserved. What of a job has failed has
	// nothing to stop, and the room that it left may be taken.
	tellToStop
	// Its agent will stop it.
	awaitStop
	// It is as it should be.
	keepStopped
	// Take its assignment away.
	remove
	// Its agent will say when it is gone.
	awaitGone
	// Delete what is recorded of it; of exclusive work when it must have ended.
	forget
	// It stays assigned and counts for nothing until its node is back.
	park
	// Take its assignment away when nothing else is left on its node but completed work
	// and others of this kind. It counts for nothing.
	leaveLast
	actions
)

type row [conditions]action

// table is for kind service; exceptions has what is otherwise for other kinds.
var table = [desires][sights]row{
	wantRun: {
		absent:     {nowhere: placeIt},
		pausing:    {nowhere: pause},
		ending:     {fit: placeOnceEnded, closed: placeOnceEnded, draining: placeOnceEnded, overdue: placeOnceEnded, unmatched: placeOnceEnded, lost: placeOnceEnded, gone: placeOnceEnded},
		exhausted:  {nowhere: giveUp, fit: giveUp, closed: giveUp, draining: vacate, overdue: vacate, unmatched: giveUp, lost: giveUp, gone: vacate},
		starting:   {fit: await, closed: await, draining: move, overdue: evict, unmatched: move, lost: moveLost, gone: moveLost},
		running:    {fit: keep, closed: keep, draining: moveInTurn, overdue: evict, unmatched: moveInTurn, lost: moveLost, gone: moveLost},
		restarting: {fit: localRestart, closed: localRestart, draining: move, overdue: evict, unmatched: move, lost: moveLost, gone: moveLost},
		failed:     {fit: retryIt, closed: retryIt, draining: retryIt, overdue: retryNow, unmatched: retryIt, lost: moveLost, gone: moveLost},
		stopped:    {fit: await, closed: await, draining: move, overdue: evict, unmatched: move, lost: moveLost, gone: moveLost},
		completed:  {fit: rest, closed: rest, draining: rest, overdue: rest, unmatched: rest, lost: rest, gone: rest},
	},
	wantNew: {
		starting:   {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		running:    {fit: replaceInTurn, closed: replaceInTurn, draining: replaceInTurn, overdue: evict, unmatched: replaceInTurn, lost: moveLost, gone: moveLost},
		restarting: {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		failed:     {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		stopped:    {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		completed:  {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
	},
	wantHeld: {
		starting:   {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		running:    {fit: leave, closed: leave, draining: moveInTurn, overdue: evict, unmatched: moveInTurn, lost: moveLost, gone: moveLost},
		restarting: {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		failed:     {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		stopped:    {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		completed:  {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
	},
	wantStart: {
		starting:   {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		running:    {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		restarting: {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		failed:     {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		stopped:    {fit: replace, closed: replace, draining: replace, overdue: evict, unmatched: replace, lost: moveLost, gone: moveLost},
		completed:  {fit: rest, closed: rest, draining: rest, overdue: rest, unmatched: rest, lost: rest, gone: rest},
	},
	wantStop: {
		starting:   {fit: tellToStop, closed: tellToStop, draining: remove, overdue: remove, lost: tellToStop, gone: remove},
		running:    {fit: tellToStop, closed: tellToStop, draining: remove, overdue: remove, lost: tellToStop, gone: remove},
		restarting: {fit: tellToStop, closed: tellToStop, draining: remove, overdue: remove, lost: tellToStop, gone: remove},
		failed:     {fit: tellToStop, closed: tellToStop, draining: remove, overdue: remove, lost: tellToStop, gone: remove},
		stopped:    {fit: tellToStop, closed: tellToStop, draining: remove, overdue: remove, lost: tellToStop, gone: remove},
		completed:  {fit: rest, closed: rest, draining: remove, overdue: remove, lost: rest, gone: remove},
	},
	wantStopped: {
		starting:   {fit: awaitStop, closed: awaitStop, draining: remove, overdue: remove, lost: keepStopped, gone: remove},
		running:    {fit: awaitStop, closed: awaitStop, draining: remove, overdue: remove, lost: keepStopped, gone: remove},
		restarting: {fit: awaitStop, closed: awaitStop, draining: remove, overdue: remove, lost: keepStopped, gone: remove},
		failed:     {fit: keepStopped, closed: keepStopped, draining: remove, overdue: remove, lost: keepStopped, gone: remove},
		stopped:    {fit: keepStopped, closed: keepStopped, draining: remove, overdue: remove, lost: keepStopped, gone: remove},
		completed:  {fit: rest, closed: rest, draining: remove, overdue: remove, lost: rest, gone: remove},
	},
	wantGone: {
		absent:     {nowhere: forget},
		ending:     {fit: awaitGone, closed: awaitGone, draining: awaitGone, overdue: awaitGone, lost: forget, gone: forget},
		starting:   {fit: remove, closed: remove, draining: remove, overdue: remove, lost: remove, gone: remove},
		running:    {fit: remove, closed: remove, draining: remove, overdue: remove, lost: remove, gone: remove},
		restarting: {fit: remove, closed: remove, draining: remove, overdue: remove, lost: remove, gone: remove},
		failed:     {fit: remove, closed: remove, draining: remove, overdue: remove, lost: remove, gone: remove},
		stopped:    {fit: remove, closed: remove, draining: remove, overdue: remove, lost: remove, gone: remove},
		completed:  {fit: remove, closed: remove, draining: remove, overdue: remove, lost: remove, gone: remove},
	},
}

// exception is what is otherwise for a kind where a replica is assigned, for what is
// wanted up to one desire and for a range of sights.
type exception struct {
	want     desire
	from, to sight
	row      row
}

var exceptions = [...]exception{
	pb.WorkloadKind_SERVICE: {},
	pb.WorkloadKind_GLOBAL:  {wantStart, exhausted, completed, row{draining: leaveLast, overdue: remove, unmatched: remove, lost: park, gone: remove}},
	pb.WorkloadKind_JOB:     {wantRun, starting, restarting, row{draining: finish}},
}

// situation is a place in the table.
type situation struct {
	kind pb.WorkloadKind
	want desire
	seen sight
	node condition
}

func (s situation) action() action {
	if e := &exceptions[s.kind]; s.want <= e.want && s.seen >= e.from && s.seen <= e.to && e.row[s.node] != never {
		return e.row[s.node]
	}
	return table[s.want][s.seen][s.node]
}

// situationOf finds the place of a replica of which something is stored.
func (b *builder) situationOf(r *replica, want desire) situation {
	s := situation{want: want}
	if b.w.want != nil {
		s.kind = b.w.want.kind
	}
	if r.assignment.mod != 0 {
		s.seen, s.node = b.seen(r, want), b.conditionOf(r.assignment.node, want)
		return s
	}
	t := b.retryOf(r)
	switch {
	case want == wantRun && t != nil && t.exhausted:
		s.seen = exhausted
	case r.observed.mod != 0 && (want == wantGone || b.exclusive(r)):
		s.seen, s.node = ending, b.conditionOf(r.observed.node, want)
	case want == wantRun && t != nil && t.next > b.d.nano:
		s.seen = pausing
	}
	return s
}

// desireOf is what is wanted of a replica of a workload that is to run.
func (b *builder) desireOf(r *replica) desire {
	switch {
	case r.assignment.mod == 0:
		return wantRun
	case b.renewed(r) && b.rollout.holds:
		return wantHeld
	case b.renewed(r):
		return wantNew
	case r.assignment.desired != pb.DesiredState_DESIRED_RUNNING:
		return wantStart
	default:
		return wantRun
	}
}

func (b *builder) seen(r *replica, want desire) sight {
	state := r.reported()
	if t := b.retryOf(r); want == wantRun && state != pb.State_COMPLETED && t != nil && t.exhausted {
		return exhausted
	}
	switch state {
	case pb.State_RUNNING:
		return running
	case pb.State_RETRY_PENDING:
		return restarting
	case pb.State_FAILED:
		return failed
	case pb.State_STOPPED:
		return stopped
	case pb.State_COMPLETED:
		return completed
	default:
		return starting
	}
}

func (b *builder) conditionOf(n *node, want desire) condition {
	switch {
	case n.mod == 0 || n.lost() && n.drains():
		return gone
	case n.lost():
		return lost
	case n.drains() && n.drainDeadline != 0 && n.drainDeadline <= b.d.nano:
		return overdue
	case n.drains():
		return draining
	case want <= wantStart && b.unfit(n) != "":
		return unmatched
	case !n.open():
		return closed
	default:
		return fit
	}
}

// reconcile does with a replica what the table says.
func (b *builder) reconcile(r *replica, want desire) {
	s := b.situationOf(r, want)
	do := s.action()
	n := r.assignment.node
	if s.node == draining && n != nil && n.drainDeadline != 0 {
		b.at(n.drainDeadline)
	}
	if do == finish {
		do = table[s.want][s.seen][closed]
	}
	b.count(r, s, do)
	switch do {
	case placeIt:
		b.place(r.number, r)
	case pause:
		t := b.retryOf(r)
		b.retryPending(t.reason, t.next)
	case placeOnceEnded:
		b.placeOnceEnded(r)
	case giveUp, vacate:
		b.tally.fail(b.retryOf(r).reason)
		if do == vacate {
			b.release(r)
		}
	case await:
		b.tally.scheduled++
		b.tally.disrupted++
	case keep:
		b.recovered(r)
	case localRestart:
		b.restarting(r)
	case retryIt, retryNow:
		b.failed(r, do == retryNow)
	case rest:
		b.tally.completed++
		if want <= wantStart {
			b.dropRetry(r)
		}
	case moveInTurn:
		b.candidates = append(b.candidates, candidate{r: r, why: b.unfit(n), former: b.rollout.atFormer})
	case move:
		b.replace(candidate{r: r, why: b.unfit(n)})
	case evict:
		b.evict(r, want)
	case moveLost:
		b.lost(r, want != wantRun)
	case replaceInTurn:
		b.candidates = append(b.candidates, b.renewal(r))
	case leave:
		b.tally.outdated++
	case replace:
		b.replace(b.renewal(r))
	case tellToStop:
		if r.over() {
			b.dropRetry(r)
			break
		}
		b.restate(r, pb.DesiredState_DESIRED_STOPPED)
		b.dropRetry(r)
		b.say(note{kind: pb.EventType_WORKLOAD_UPDATED, verb: verbStopped, number: r.number, node: n.id})
		b.tally.scheduled++
	case awaitStop:
		b.dropRetry(r)
		b.tally.scheduled++
	case keepStopped:
		b.dropRetry(r)
	case remove:
		b.takeAway(r)
	case forget:
		b.forget(r)
	case leaveLast:
		if alone(n) {
			b.takeAway(r)
		}
	case awaitGone, park, finish, never:
	}
}

// count adds what the replica is to the tally; what is done about it may change
// that again.
func (b *builder) count(r *replica, s situation, do action) {
	if r.assignment.mod == 0 || do == remove || do == park || do == leaveLast {
		return
	}
	b.tally.assigned++
	if s.want <= wantStart && r.serves() {
		b.tally.running++
		if s.want == wantRun {
			b.tally.updated++
		}
		if b.counts(r) {
			b.tally.serving++
		}
	}
	switch {
	case s.want != wantRun:
	case s.seen == completed:
		// It has done what it was for.
		b.tally.serving++
		b.countHealthy(r)
	case s.seen == exhausted || !r.assignment.node.lost():
		b.countUpdated(r)
	}
	if s.want <= wantStart && s.kind == pb.WorkloadKind_GLOBAL {
		b.tally.desired++
	}
}
