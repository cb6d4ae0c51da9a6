package scheduler

import (
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Why something is pending changes with every node; a status whose only news
// is that is written at most this often. Explain is always exact.
const messageInterval = 10 * time.Second

// tally counts what a look at a workload found.
type tally struct {
	desired, assigned, running, updated, completed int32
	// Wait for: their agent; a place; a place to move to; an end to the lease of
	// their node; the next attempt; their turn to be replaced.
	scheduled, pending, stuck, unknown, retrying, outdated int
	failed                                                 int32
	// Out of service on account of what was decided about them.
	disrupted int
	// In service, as far as the update strategy asks.
	serving int
	// Assigned at the revision that is rolled out, and healthy at it.
	current, healthy int32

	cron cronTally

	failReason, retryReason *pb.Reason
	// Why a replica that has no place lost the one it had.
	preempted *pb.Reason
	retryAt   int64
	// A node that is lost, and one that has to confirm that an instance is gone.
	lost, leaving string
	// Some replicas are part of assumed steps: the counts are not to be relied on.
	busy bool
	// The workload is to be stopped, or to be deleted; it runs to completion.
	stop, leave, job bool
}

// fail notes a replica that is given up.
func (t *tally) fail(reason *pb.Reason) {
	t.failed++
	t.disrupted++
	if t.failReason == nil {
		t.failReason = reason
	}
}

// state is the state of the workload as a whole: the gravest of its replicas'.
func (t *tally) state() pb.State {
	switch {
	case t.leave:
		return pb.State_DELETING
	case t.stop && t.scheduled == 0:
		return pb.State_STOPPED
	case t.stop:
		return pb.State_UPDATING
	case t.failed > 0 || t.failReason != nil:
		return pb.State_FAILED
	case t.unknown > 0:
		return pb.State_UNKNOWN
	case t.pending > 0:
		return pb.State_PENDING
	case t.retrying > 0:
		return pb.State_RETRY_PENDING
	case t.outdated > 0 || t.stuck > 0 || t.leaving != "":
		return pb.State_UPDATING
	case t.scheduled > 0:
		return pb.State_SCHEDULED
	case t.job && t.completed == t.desired:
		return pb.State_COMPLETED
	default:
		return pb.State_RUNNING
	}
}

// reason is why the workload is not as desired; nil where it is, or is on its
// way.
func (b *builder) reason(state pb.State) *pb.Reason {
	t := &b.tally
	switch {
	case state == pb.State_FAILED:
		r := proto.CloneOf(t.failReason)
		if r == nil {
			r = &pb.Reason{Code: pb.ReasonCode_RUNTIME_ERROR}
		}
		if t.failed > 1 {
			r.Message += " (" + strconv.Itoa(int(t.failed)) + " replicas)"
		}
		return r
	case state == pb.State_UNKNOWN:
		return &pb.Reason{Code: pb.ReasonCode_NODE_LOST, Message: "node " + t.lost + " is lost; exclusive work moves when it can't be running there any more", Retryable: true}
	case state == pb.State_PENDING && t.preempted != nil:
		return &pb.Reason{Code: pb.ReasonCode_PREEMPTED, Message: t.preempted.Message + "; waits for " + b.d.why(&b.run), Retryable: true}
	case state == pb.State_PENDING || state == pb.State_UPDATING && t.stuck > 0:
		return &pb.Reason{Code: pb.ReasonCode_NO_PLACEMENT, Message: b.d.why(&b.run), Retryable: true}
	case state == pb.State_RETRY_PENDING:
		return t.retryReason
	case state == pb.State_UPDATING && t.leaving != "":
		return &pb.Reason{Code: pb.ReasonCode_NO_PLACEMENT, Message: "waits for node " + t.leaving + " to confirm that the old instance is gone", Retryable: true}
	}
	return nil
}

// why says why the replicas of a run fit nowhere. Workloads that wait for the
// same are told the same, as long as nothing was placed in between; what keeps
// a workload away on its own account is its own.
func (d *decider) why(r *run) string {
	r.prepare()
	if !r.indifferent() {
		return sentence(d.p.causes(r))
	}
	s := r.w.want.shape
	if s.why == "" || s.whyStamp != d.stamp || s.whyPlacements != d.placements {
		s.why, s.whyStamp, s.whyPlacements = sentence(d.p.causes(r)), d.stamp, d.placements
	}
	return s.why
}

// writeStatus stores the workload's status where it differs from what is
// stored.
func (b *builder) writeStatus() {
	w, t := b.w, &b.tally
	if t.busy || b.truncated || w.want == nil || b.step != nil && (b.step.leaves || b.step.rewrites) {
		return
	}
	if w.want.kind == pb.WorkloadKind_GLOBAL && t.desired == 0 && !t.stop && !t.leave {
		// It is as desired, and surely not what somebody wanted.
		t.pending++
		b.waiting = true
	}
	if t.leave && w.run() != nil && model.Finished(b.known()) {
		return // How it ended matters to the others of its job until it is gone.
	}
	state := t.state()
	reason := b.reason(state)
	if w.want.schedule != nil && !t.leave {
		state, reason = b.scheduledState()
	}
	next := &pb.WorkloadStatus{
		State: state, Reason: reason, Revision: w.want.revision,
		Desired: t.desired, Assigned: t.assigned, Running: t.running, Updated: t.updated, Failed: t.failed, Completed: t.completed,
	}
	if c := &t.cron; w.want.schedule != nil {
		next.ActiveRuns, next.LastRun, next.NextRun = c.active, stampAt(c.last), stampAt(c.next)
	}
	if !b.differs(b.known(), next) {
		return
	}
	b.begin()
	b.put([]byte(model.WorkloadStatusKey(w.id)), next)
	b.step.status = next
}

// differs reports whether next is worth writing, and gives its reason the time
// of its last transition.
func (b *builder) differs(old, next *pb.WorkloadStatus) bool {
	was, is := old.GetReason(), next.Reason
	if is != nil {
		is.LastTransition = b.d.nowStamp
		if was != nil && old.State == next.State && was.Code == is.Code {
			is.LastTransition = was.LastTransition
		}
	}
	if old == nil {
		return true
	}
	if proto.Equal(old, next) {
		return false
	}
	if onlyMessage(old, next) && sameCauses(was.Message, is.Message) {
		if due := unixNano(was.LastTransition) + int64(messageInterval); due > b.d.nano {
			b.at(due)
			return false
		}
		is.LastTransition = b.d.nowStamp
	}
	return true
}

// onlyMessage reports whether two statuses that are not equal differ in nothing
// but the message of a pending placement.
func onlyMessage(old, next *pb.WorkloadStatus) bool {
	code := old.GetReason().GetCode()
	if code != next.GetReason().GetCode() || code != pb.ReasonCode_NO_PLACEMENT && code != pb.ReasonCode_PREEMPTED {
		return false
	}
	like := proto.CloneOf(old)
	like.Reason.Message = next.Reason.Message
	return proto.Equal(like, next)
}

// sameCauses compares two messages without their numbers.
func sameCauses(a, b string) bool {
	i, j := 0, 0
	digit := func(c byte) bool { return c >= '0' && c <= '9' }
	for {
		for i < len(a) && digit(a[i]) {
			i++
		}
		for j < len(b) && digit(b[j]) {
			j++
		}
		if i == len(a) || j == len(b) {
			return i == len(a) && j == len(b)
		}
		if a[i] != b[j] {
			return false
		}
		i, j = i+1, j+1
	}
}
