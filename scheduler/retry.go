package scheduler

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// Attempts after the first failure.
	maxAttempts  = 5
	firstBackoff = 5 * time.Second
	maxBackoff   = 2 * time.Minute
	// How long a replica waits that every node refused.
	refusedBackoff = 30 * time.Second
	// A replica that has been running for so long has recovered: what failed
	// before is forgotten.
	forgetAfter = 5 * time.Minute
	// Names of nodes to avoid that are kept.
	maxFailedNodes = 64
)

// backoff is the wait before the next attempt after so many.
func backoff(attempts int32) time.Duration {
	d := firstBackoff
	for range attempts {
		if d *= 2; d >= maxBackoff {
			return maxBackoff
		}
	}
	return d
}

// refused reports whether a node did not take the work, so that trying another
// costs no attempt.
func refused(code pb.ReasonCode) bool {
	return code == pb.ReasonCode_INSUFFICIENT_RESOURCES || code == pb.ReasonCode_RUNTIME_UNAVAILABLE
}

// final reports whether the work itself ended and must not run again: restart
// condition never. Everything else may go better later, or on another node.
func final(reason *pb.Reason) bool { return ended(reason) && !reason.Retryable }

// ended reports whether a replica failed by itself, so that nothing of it runs
// any more. One that could not be started may have left its predecessor running.
func ended(reason *pb.Reason) bool {
	return reason.GetCode() == pb.ReasonCode_EXITED || reason.GetCode() == pb.ReasonCode_OUT_OF_MEMORY
}

// givenUp says so.
func givenUp(attempts int32) string {
	if attempts == 0 {
		return "given up"
	}
	return "given up after " + counted(int(attempts), "attempt", "attempts")
}

// failed decides about a replica whose agent has given it up.
//
// The retry record has two states. With a time, a failure has been counted and
// the next attempt is due then, which is also what a user's retry makes of it;
// without one, an attempt is under way, and a failure that is reported now is a
// new one. Where there is no record, the failure is the first, and its time is
// when it was seen. now: it can't wait where it is.
func (b *builder) failed(r *replica, now bool) {
	known := b.retryOf(r)
	t := known
	if t == nil {
		t = &retry{}
	}
	reason := r.observed.reason
	if reason == nil {
		reason = &pb.Reason{Code: pb.ReasonCode_RUNTIME_ERROR, Message: "failed"}
	}
	here := r.assignment.node.id
	avoid := withNode(t.failedNodes, here)
	free := refused(reason.Code)
	if t.next > b.d.nano && !now {
		// What every node has refused is taken at once by one that was not asked.
		if b.waiting = b.waiting || free; free && b.elsewhere(r, t, avoid, reason) {
			return
		}
		b.retryPending(t.reason, t.next)
		return
	}
	if t.next == 0 {
		switch {
		case free:
			if b.elsewhere(r, t, avoid, reason) {
				return
			}
			if now {
				break
			}
			b.waiting = true
			b.wait(r, t.attempts, avoid, reason, b.d.nano+int64(refusedBackoff))
			return
		case final(reason), t.attempts >= maxAttempts:
			b.exhaust(r, t, avoid, reason)
			return
		}
		since := b.d.nano
		if known == nil && r.observed.transition != 0 {
			since = min(since, r.observed.transition)
		}
		if due := since + int64(backoff(t.attempts)); due > b.d.nano && !now {
			b.wait(r, t.attempts, avoid, reason, due)
			return
		}
	}
	if free {
		avoid = []string{here} // the others have had time
	}
	b.attempt(r, t, avoid, reason, free, now)
}

// elsewhere takes a replica that its node refused to one that has not refused
// it yet.
func (b *builder) elsewhere(r *replica, t *retry, avoid []string, reason *pb.Reason) bool {
	if b.w.want.kind == pb.WorkloadKind_GLOBAL || len(avoid) > maxFailedNodes || b.full() {
		return false
	}
	to, ok := b.run.choose(r.number, b.seed(r.number, r), avoid, true)
	if !ok {
		return false
	}
	b.putRetry(r, &pb.Retry{Attempts: t.attempts, FailedNodes: avoid, Reason: reason})
	b.move(r, to, "refused by "+r.assignment.node.id+": "+reason.Message, pb.EventType_RESCHEDULED)
	return true
}

// attempt starts the replica again, on another node where one fits. Where none
// does, it waits for one, and that costs nothing: where it is, unless it has to
// leave now.
func (b *builder) attempt(r *replica, t *retry, avoid []string, reason *pb.Reason, free, now bool) {
	if b.full() {
		return
	}
	var to spot
	var ok bool
	seed := b.seed(r.number, r)
	if b.w.want.kind != pb.WorkloadKind_GLOBAL {
		to, ok = b.run.choose(r.number, seed, avoid, true)
	}
	if !ok && b.unfit(r.assignment.node) == "" {
		to, ok = b.run.fitsInPlace(r, seed)
	}
	if !ok && b.w.want.kind != pb.WorkloadKind_GLOBAL {
		if to, ok = b.run.choose(r.number, seed, avoid, false); !ok {
			to, ok = b.preempt(r.number, r, avoid, nil)
		}
	}
	if !ok {
		b.waiting = true
		if now {
			b.evicted(r)
		} else {
			b.tally.pending++
		}
		return
	}
	attempts, why := t.attempts, "tried again after: "+said(reason)
	if !free {
		attempts++
		why = fmt.Sprintf("attempt %d of %d after: %s", attempts, maxAttempts, said(reason))
	}
	b.putRetry(r, &pb.Retry{Attempts: attempts, FailedNodes: avoid, Reason: reason})
	b.move(r, to, why, pb.EventType_RETRY_TRIGGERED)
}

// wait counts a failure and sets the time of the next attempt.
func (b *builder) wait(r *replica, attempts int32, avoid []string, reason *pb.Reason, due int64) {
	pending := retryReason(reason, due)
	b.putRetry(r, &pb.Retry{Attempts: attempts, FailedNodes: avoid, Reason: pending, NextRetryAt: pending.NextRetryAt})
	b.say(note{
		kind: pb.EventType_WORKLOAD_FAILED, verb: verbFailed, why: said(reason), number: r.number, node: r.assignment.node.id, reason: pending,
	})
	b.retryPending(pending, due)
}

// exhaust gives a replica up.
func (b *builder) exhaust(r *replica, t *retry, avoid []string, reason *pb.Reason) {
	last := &pb.Reason{Code: reason.Code, Message: reason.Message, LastTransition: b.d.nowStamp}
	b.putRetry(r, &pb.Retry{Attempts: t.attempts, FailedNodes: avoid, Reason: last, Exhausted: true})
	b.say(note{
		kind: pb.EventType_WORKLOAD_FAILED, verb: givenUp(t.attempts), why: said(reason),
		number: r.number, node: r.assignment.node.id, reason: last,
	})
	b.tally.fail(last)
}

// retryPending notes that a replica waits for its next attempt.
func (b *builder) retryPending(reason *pb.Reason, due int64) {
	b.at(due)
	b.tally.disrupted++
	b.tally.retrying++
	if b.tally.retryAt == 0 || due < b.tally.retryAt {
		b.tally.retryAt, b.tally.retryReason = due, retryReason(reason, due)
	}
}

// restarting notes that a replica has ended and that its node starts it again:
// nothing to decide, but the workload is not as desired, and this is why.
func (b *builder) restarting(r *replica) {
	b.tally.disrupted++
	b.tally.retrying++
	due := unixNano(r.observed.reason.GetNextRetryAt())
	if b.tally.retryReason == nil || due != 0 && due < b.tally.retryAt {
		b.tally.retryAt, b.tally.retryReason = due, proto.CloneOf(r.observed.reason)
	}
}

func retryReason(reason *pb.Reason, due int64) *pb.Reason {
	return &pb.Reason{
		Code: reason.GetCode(), Message: reason.GetMessage(), LastTransition: reason.GetLastTransition(),
		NextRetryAt: stampOf(due), Retryable: true,
	}
}

// recovered forgets the failures of a replica that has been running for long
// enough.
func (b *builder) recovered(r *replica) {
	if r.retry == nil {
		return
	}
	if t := b.retryOf(r); t != nil && t.next != 0 {
		b.clearWait(r, t) // it was about to be tried, and runs
		return
	}
	if due := r.observed.transition + int64(forgetAfter); due > b.d.nano {
		b.at(due)
		return
	}
	b.dropRetry(r)
}

func withNode(nodes []string, id string) []string {
	if slices.Contains(nodes, id) {
		return nodes
	}
	return append(slices.Clip(nodes), id)
}

// said is a reason as people read it.
func said(r *pb.Reason) string {
	if r.Message == "" {
		return r.Code.String()
	}
	return r.Message
}
