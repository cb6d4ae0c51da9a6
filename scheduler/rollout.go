package scheduler

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// strategy is a workload's update strategy with the defaults filled in.
type strategy struct {
	parallel      int
	surge, canary int32
	minHealthy    string
	// How long a replica has run when it is healthy, and how much later than its
	// assignment that may be; how long an update may go on without progress. The
	// latter two: 0 for ever. In nanoseconds.
	healthyAfter, healthyBy, progressBy int64
	autoPromote, autoRollback           bool
}

func strategyOf(u *pb.UpdateStrategy) strategy {
	after, by := model.HealthySeconds(u)
	nanos := func(seconds int32) int64 { return int64(seconds) * int64(time.Second) }
	return strategy{
		parallel: max(1, int(u.GetMaxParallel())), surge: max(0, u.GetMaxSurge()), canary: max(0, u.GetCanary()), minHealthy: u.GetMinHealthy(),
		healthyAfter: nanos(after), healthyBy: nanos(by), progressBy: nanos(model.ProgressSeconds(u)),
		autoPromote: u.GetAutoPromote(), autoRollback: u.GetAutoRollback(),
	}
}

// beyond is how many numbers beyond those wanted an update may use.
func (u *strategy) beyond() int32 { return max(u.surge, u.canary) }

// rollout is how the present revision is brought to the replicas: what is
// recorded, and what a look at them finds. A decision acts on what is recorded;
// then it judges, and what it records then is for the next one.
type rollout struct {
	// As it is recorded, or to be; nil where there is none, as for jobs.
	rec *pb.Rollout
	// rec is news.
	begun bool
	// Replicas of another revision are being replaced: a new one serves when it is
	// healthy, not merely when it runs.
	paced bool
	// Replicas that serve at another revision are left as they are, and those that
	// are down come back at the last revision that was rolled out in full.
	holds bool
	// What they want then; nil where it is not known. atFormer: it is looked at now.
	former   *want
	atFormer bool
	// The state that was judged is another one than that of rec.
	changed bool
	// No further replica is to be replaced.
	halted bool
	// Surge replicas and canaries.
	extras tally
	surge  bool

	failure *pb.Reason
	// When a replica last became healthy; when those that run will be.
	progress, firstDue, lastDue int64
	// To be recorded.
	next *pb.Rollout
}

// goesOn reports whether the rollout has not come to an end.
func goesOn(r *pb.Rollout) bool {
	switch r.GetState() {
	case pb.RolloutState_ROLLOUT_PROGRESSING, pb.RolloutState_ROLLOUT_AWAITING_PROMOTION:
		return true
	case pb.RolloutState_ROLLOUT_ROLLED_BACK:
		return r.EndTime == nil
	}
	return false
}

// surging reports whether surge replicas have their place, so that no more are
// replaced than stand in.
func (o *rollout) surging() bool { return o.surge && o.extras.pending == 0 && o.extras.unknown == 0 }

// rolloutNow is the record as it is or is assumed to be.
func (w *workload) rolloutNow() *pb.Rollout {
	if w.assumedRollout != nil {
		return w.assumedRollout
	}
	return w.rollout
}

// holdsBack reports whether replicas may be placed at another revision than the
// present one.
func (w *workload) holdsBack() bool {
	s := w.rolloutNow().GetState()
	return s == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION || s == pb.RolloutState_ROLLOUT_FAILED
}

// beginRollout finds the rollout of the present revision, or begins one.
func (b *builder) beginRollout() {
	w, want, o := b.w, b.w.want, &b.rollout
	if want.kind == pb.WorkloadKind_JOB {
		return
	}
	old := w.rolloutNow()
	o.rec = old
	switch {
	case old == nil || old.Revision != want.revision || old.RestartGeneration != want.restart:
		o.begun = true
		o.rec = &pb.Rollout{
			State: pb.RolloutState_ROLLOUT_PROGRESSING, Revision: want.revision, RestartGeneration: want.restart,
			Previous: old.GetPrevious(), StartTime: b.d.nowStamp, ProgressTime: b.d.nowStamp,
		}
		if old.GetState() == pb.RolloutState_ROLLOUT_COMPLETED {
			o.rec.Previous = old.Revision
		}
		if b.needsCanaries(old) {
			o.rec.State = pb.RolloutState_ROLLOUT_AWAITING_PROMOTION
		}
	case old.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION && (want.promoted == want.revision || want.update.canary == 0):
		o.begun = true
		o.rec = proto.CloneOf(old)
		o.rec.State = pb.RolloutState_ROLLOUT_PROGRESSING
		o.rec.ProgressTime = b.d.nowStamp
	}
	o.paced = goesOn(o.rec) && slices.ContainsFunc(w.replicas, func(r *replica) bool { return r.assignment.mod != 0 && b.renewed(r) })
	state := o.rec.State
	o.holds = state == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION || state == pb.RolloutState_ROLLOUT_FAILED
}

// needsCanaries reports whether a rollout that begins waits for canaries: there
// is work of another revision that they are to protect.
func (b *builder) needsCanaries(old *pb.Rollout) bool {
	w, want := b.w, b.w.want
	if want.update.canary == 0 || want.promoted == want.revision || b.rollout.rec.Previous == want.revision {
		return false
	}
	return slices.ContainsFunc(w.replicas, func(r *replica) bool { return r.assignment.mod != 0 && r.assignment.revision != want.revision })
}

// considerHeld decides about the wanted replicas while those of other revisions
// are not to be touched: what is not at the present revision is kept at, or
// brought back to, the one that was rolled out in full before it, as far as
// that is known.
func (b *builder) considerHeld() {
	want := b.w.want
	present := func(r *replica) bool {
		return r != nil && r.assignment.mod != 0 && r.assignment.revision == want.revision
	}
	o := &b.rollout
	if o.former = b.d.p.wantAt(b.w, o.rec.Previous); o.former == nil {
		b.each(0, want.replicas, b.consider)
		return
	}
	b.asFormer(func() {
		b.each(0, want.replicas, func(number int32, r *replica) {
			if !present(r) {
				b.consider(number, r)
				b.tally.outdated++
			}
		})
	})
	b.each(0, want.replicas, func(number int32, r *replica) {
		if present(r) {
			b.consider(number, r)
		}
	})
}

// asFormer does something about replicas as if the workload were at the last
// revision that was rolled out in full.
func (b *builder) asFormer(do func()) {
	o, want, updated, current := &b.rollout, b.w.want, b.tally.updated, b.tally.current
	b.w.want, b.run, o.atFormer = o.former, run{d: b.d, w: b.w}, true
	do()
	b.w.want, b.run, o.atFormer = want, run{d: b.d, w: b.w}, false
	b.tally.updated, b.tally.current = updated, current
}

// wantAt is what the workload would want if it were taken back to a revision; nil
// where that is not kept. Its shape is to be dropped after use.
func (p *Picture) wantAt(w *workload, revision string) *want {
	rec := w.restoredTo(revision)
	if rec == nil {
		return nil
	}
	out := p.wantOf(rec)
	if out.invalid != "" {
		p.dropWant(out)
		return nil
	}
	return out
}

// restoredTo is the workload's record as it would be at a revision that is kept.
func (w *workload) restoredTo(revision string) *pb.Workload {
	at := slices.IndexFunc(w.revisions, func(r storedRevision) bool { return r.name == revision })
	if at < 0 {
		return nil
	}
	old, rec := &pb.Revision{}, &pb.Workload{}
	if proto.Unmarshal(w.revisions[at].value, old) != nil || old.Spec == nil || proto.Unmarshal(w.record, rec) != nil || rec.Spec == nil {
		return nil
	}
	old.Revision = revision
	return model.Restored(rec, old)
}

// considerExtras decides about the replicas beyond those that are wanted.
func (b *builder) considerExtras() {
	o, u, wanted := &b.rollout, &b.w.want.update, b.w.want.replicas
	if o.rec == nil || u.beyond() == 0 {
		return
	}
	awaiting := o.rec.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION
	var make, keep int32
	switch {
	case awaiting:
		make, keep = u.canary, u.canary
	case goesOn(o.rec):
		keep = u.beyond()
	}
	if !awaiting && b.surgeHelps() {
		make = u.surge
	}
	holds, main := o.holds, b.tally
	o.holds, b.tally = false, tally{}
	b.each(wanted, wanted+u.beyond(), func(number int32, r *replica) {
		assigned := r != nil && r.next == nil && r.assignment.mod != 0
		switch {
		case assigned && !awaiting && number < wanted+max(make, keep) && b.renewed(r) && r.serves() && b.unfit(r.assignment.node) == "":
			// It serves, at whatever revision, until the update is over.
			b.tally.assigned++
			b.tally.serving++
		case number < wanted+make, number < wanted+keep && (r != nil && r.next != nil || assigned && !b.renewed(r)):
			b.consider(number, r)
		case r != nil:
			b.dismiss(r, main.serving)
		}
	})
	o.extras, b.tally = b.tally, main
	o.holds, o.surge = holds, make > 0 && !awaiting
	b.tally.busy = b.tally.busy || o.extras.busy
	b.tally.serving += o.extras.serving
}

// surgeHelps reports whether there are replicas that surge replicas could stand
// in for: of an update, or of nodes that they have to leave where too few serve to
// let one go.
func (b *builder) surgeHelps() bool {
	o := &b.rollout
	least := b.leastServing()
	for _, c := range b.candidates {
		if c.renewed && goesOn(o.rec) || !c.renewed && least > 0 && b.tally.serving <= least && o.rec.State != pb.RolloutState_ROLLOUT_FAILED {
			return true
		}
	}
	return false
}

// replaceExtra replaces one of them, which serves, within the budget of all.
func (b *builder) replaceExtra(c candidate) {
	main := b.tally
	b.replace(c)
	moved := b.tally.disrupted > main.disrupted
	b.tally = main
	if moved {
		b.tally.disrupted++
		b.tally.serving--
	}
}

// dismiss takes away a replica that has served its time, unless it is still
// needed for as many to serve as have to.
func (b *builder) dismiss(r *replica, others int) {
	if least := b.leastOf(b.w.want.replicas); r.next == nil && r.serves() && least > 0 && others+b.tally.serving < least {
		b.tally.assigned++
		b.tally.serving++
		return
	}
	if b.taken(r) {
		b.tally.busy = true
		return
	}
	b.reconcile(r, wantGone)
}

// healthy reports whether a replica that serves has done so for long enough; due
// is when it will have.
func (b *builder) healthy(r *replica) (ok bool, due int64) {
	due = r.observed.transition + b.w.want.update.healthyAfter
	return due <= b.d.nano, due
}

// counts reports whether a replica is one of those that serve, as the update
// strategy has it.
func (b *builder) counts(r *replica) bool {
	if !r.serves() || b.rollout.atFormer || !b.rollout.paced || b.renewed(r) {
		return r.serves()
	}
	ok, _ := b.healthy(r)
	return ok
}

// rolls reports whether it matters how replicas at the present revision do, and
// those that are looked at are at it.
func (b *builder) rolls() bool {
	o := &b.rollout
	return o.rec != nil && !o.atFormer && (goesOn(o.rec) || o.rec.State == pb.RolloutState_ROLLOUT_FAILED)
}

// countHealthy takes in a replica at the present revision that has ended well.
func (b *builder) countHealthy(r *replica) {
	if b.rolls() {
		b.tally.current++
		b.tally.healthy++
		b.rollout.progress = max(b.rollout.progress, r.observed.transition)
	}
}

// countUpdated takes in how a replica does that is assigned at the revision that
// is rolled out.
func (b *builder) countUpdated(r *replica) {
	o, u := &b.rollout, &b.w.want.update
	if !b.rolls() {
		return
	}
	b.tally.current++
	if t := b.retryOf(r); t != nil && t.exhausted {
		o.fail(t.reason, "replica %d %s on %s: %s", r.number, givenUp(t.attempts), r.assignment.node.id, said(t.reason))
		return
	}
	if r.serves() {
		ok, due := b.healthy(r)
		if ok {
			b.tally.healthy++
			o.progress = max(o.progress, due)
			return
		}
		if o.paced {
			b.tally.disrupted++
		}
		if o.firstDue == 0 || due < o.firstDue {
			o.firstDue = due
		}
		o.lastDue = max(o.lastDue, due)
	}
	if !goesOn(o.rec) || u.healthyBy == 0 {
		return
	}
	switch deadline := r.assignment.created + u.healthyBy; {
	case deadline <= unixNano(o.rec.ProgressTime):
		// There was progress since, so it was healthy in time and is down for
		// another reason.
	case deadline > b.d.nano:
		b.at(deadline)
	default:
		reason := r.observed.reason
		if reason.GetMessage() == "" {
			reason = &pb.Reason{Code: pb.ReasonCode_UNHEALTHY, Message: "it is " + strings.ToLower(r.reported().String())}
			if r.serves() {
				reason.Message = fmt.Sprintf("it does not run for %s without a restart", time.Duration(u.healthyAfter))
			}
		}
		o.fail(reason, "replica %d was not healthy on %s within %s: %s", r.number, r.assignment.node.id, time.Duration(u.healthyBy), said(reason))
	}
}

// fail notes why the rollout has failed; the first reason counts.
func (o *rollout) fail(reason *pb.Reason, format string, args ...any) {
	if o.failure == nil {
		o.failure = &pb.Reason{Code: reason.GetCode(), Message: fmt.Sprintf(format, args...)}
	}
}

// awaitHealth has the decision made again when replicas that run are healthy: as
// soon as one is where others wait for that, else when all are.
func (b *builder) awaitHealth() {
	o := &b.rollout
	due := o.lastDue
	if b.tally.outdated > 0 && o.paced {
		due = o.firstDue
	}
	if due != 0 && (goesOn(o.rec) || o.rec.GetState() == pb.RolloutState_ROLLOUT_FAILED) {
		b.at(due)
	}
}

// judgeRollout finds out what is to be recorded: whether the rollout is through,
// or has failed, or goes on.
func (b *builder) judgeRollout() {
	o, t := &b.rollout, &b.tally
	if o.rec == nil {
		return
	}
	state := b.judge()
	o.changed = state != o.rec.State
	o.halted = o.changed || o.failure != nil && goesOn(o.rec)
	if o.rec.State == pb.RolloutState_ROLLOUT_FAILED && !o.changed && t.outdated > 0 && t.failReason == nil {
		t.failReason = o.rec.Reason
	}
	awaiting := o.rec.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION
	if !o.begun && !o.changed && !o.paced && !awaiting {
		return
	}
	next, was := o.rec, o.rec.State
	if !o.begun {
		next = proto.CloneOf(next)
	}
	next.State = state
	if awaiting {
		next.Canaries = o.extras.healthy
	}
	if o.progress > unixNano(next.ProgressTime) {
		next.ProgressTime = stampOf(o.progress)
	}
	switch {
	case state == pb.RolloutState_ROLLOUT_FAILED && o.changed:
		next.EndTime, next.Reason = b.d.nowStamp, o.failure
		next.Reason.LastTransition = b.d.nowStamp
	case state == pb.RolloutState_ROLLOUT_COMPLETED:
		next.EndTime, next.Reason = b.d.nowStamp, nil
		if was == pb.RolloutState_ROLLOUT_ROLLED_BACK {
			next.State, next.Reason = was, o.rec.Reason
		}
	case awaiting && o.changed:
		next.ProgressTime = b.d.nowStamp
	}
	o.next = next
}

// judge is the state that the rollout has come to.
func (b *builder) judge() pb.RolloutState {
	o, t, u := &b.rollout, &b.tally, &b.w.want.update
	state := o.rec.State
	awaiting := state == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION
	canaries := awaiting && o.extras.healthy == u.canary
	failed := state == pb.RolloutState_ROLLOUT_FAILED
	switch {
	case !goesOn(o.rec) && !failed || t.busy || b.truncated:
		return state
	case t.healthy == t.desired && !(awaiting && t.desired == 0):
		return pb.RolloutState_ROLLOUT_COMPLETED
	case failed:
		return state
	case o.failure != nil:
		return pb.RolloutState_ROLLOUT_FAILED
	case canaries && u.autoPromote:
		return pb.RolloutState_ROLLOUT_PROGRESSING
	case canaries || u.progressBy == 0:
		return state
	}
	// A change by a user gives it time anew.
	due := max(unixNano(o.rec.ProgressTime), o.progress, b.w.want.changed) + u.progressBy
	if due > b.d.nano {
		b.at(due)
		return state
	}
	o.failure = &pb.Reason{Code: pb.ReasonCode_PROGRESS_DEADLINE, Message: fmt.Sprintf(
		"no further replica became healthy within %s: %d of %d are at the new revision, %d healthy", time.Duration(u.progressBy), t.current, t.desired, t.healthy)}
	return pb.RolloutState_ROLLOUT_FAILED
}

// recordRollout writes what was judged, and takes a failed update back where it is
// to be taken back. While a record is on its way, or steps that count, the next
// decision is soon enough.
func (b *builder) recordRollout() {
	w, o := b.w, &b.rollout
	if o.next == nil || b.tally.busy || b.truncated || w.assumedRollout != nil {
		return
	}
	next := o.next
	next.Desired, next.Updated, next.Healthy = b.tally.desired, b.tally.current, b.tally.healthy
	if proto.Equal(next, w.rollout) {
		return
	}
	b.begin()
	switch {
	case !o.changed:
		if full := b.w.want.update.canary; next.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION && next.Canaries == full && w.rollout.GetCanaries() != full {
			b.tell("%s healthy at revision %s: persys rollout promote %s goes on", counted(int(full), "canary is", "canaries are"), next.Revision, w.id)
		}
	case next.State == pb.RolloutState_ROLLOUT_FAILED && b.takeBack(next):
	case next.State == pb.RolloutState_ROLLOUT_FAILED:
		b.tell("rollout of revision %s failed: %s", next.Revision, said(next.Reason))
	case next.State == pb.RolloutState_ROLLOUT_PROGRESSING:
		b.tell("%s healthy at revision %s: the update goes on", counted(int(next.Canaries), "canary is", "canaries are"), next.Revision)
	case next.Previous != "":
		b.tell("revision %s is rolled out", next.Revision)
	}
	key := []byte(model.RolloutKey(w.id))
	b.compare(key, w.rolloutMod)
	b.put(key, next)
	b.step.rollout = next
}

// takeBack makes the workload what it was at the last revision that was rolled out
// in full, and reports whether it is so. What is such a revision itself is not
// taken back: a way back that fails ends there.
func (b *builder) takeBack(next *pb.Rollout) bool {
	w := b.w
	if !w.want.update.autoRollback || next.Previous == "" || next.Previous == next.Revision {
		return false
	}
	rec := w.restoredTo(next.Previous)
	if rec == nil {
		return false
	}
	at := slices.IndexFunc(w.revisions, func(r storedRevision) bool { return r.name == next.Previous })
	b.compare([]byte(model.RevisionKey(w.id, next.Previous)), w.revisions[at].mod)
	rec.UpdateTime = b.d.nowStamp
	b.put([]byte(model.WorkloadKey(w.id)), rec)
	b.step.rewrites = true
	b.tell("revision %s is taken back to %s: %s", next.Revision, next.Previous, said(next.Reason))
	next.State = pb.RolloutState_ROLLOUT_ROLLED_BACK
	next.FailedRevision, next.Revision = next.Revision, next.Previous
	next.ProgressTime, next.EndTime = b.d.nowStamp, nil
	next.Updated, next.Healthy, next.Canaries = 0, 0, 0
	return true
}

// tell is an event about the workload's rollout.
func (b *builder) tell(format string, args ...any) {
	b.say(note{kind: pb.EventType_ROLLOUT_CHANGED, number: -1, text: fmt.Sprintf(format, args...)})
}

// explainRollout is what there is to say of an update that does not go on by
// itself.
func explainRollout(w *workload) []string {
	r := w.rollout
	switch r.GetState() {
	case pb.RolloutState_ROLLOUT_AWAITING_PROMOTION:
		return []string{fmt.Sprintf("revision %s waits for promotion, %d of %d canaries are healthy; persys rollout promote %s goes on", r.Revision, r.Canaries, w.want.update.canary, w.id)}
	case pb.RolloutState_ROLLOUT_FAILED:
		line := "the rollout of revision " + r.Revision + " failed: " + said(r.Reason)
		if left := int(r.Desired - r.Updated); left > 0 {
			line += "; " + strconv.Itoa(left) + " of " + counted(int(r.Desired), "replica", "replicas") + " left at the revision before"
		}
		return []string{line}
	}
	return nil
}
