package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// schedule is what of a job with a schedule decides.
type schedule struct {
	*pb.Schedule
	times *model.Timetable
	// What its runs are made from.
	job *pb.Workload
}

func scheduleOf(rec *pb.Workload) (*schedule, error) {
	s := rec.GetSpec().GetSchedule()
	if s == nil {
		return nil, nil
	}
	times, err := model.ParseTimetable(s)
	if err != nil {
		return nil, fmt.Errorf("schedule: %w", err)
	}
	return &schedule{s, times, rec}, nil
}

// on reports whether runs fall due.
func (s *schedule) on() bool {
	return !s.Suspend && s.job.Spec.DesiredState == pb.DesiredState_DESIRED_RUNNING
}

func (s *schedule) deadline() time.Duration {
	return time.Duration(s.GetStartDeadlineSeconds()) * time.Second
}

// putRun keeps the list of its parent's runs when a record comes, changes or goes.
func (p *Picture) putRun(w *workload, before *pb.Workload) {
	now := w.run()
	if before != nil && before.Parent != now.GetParent() {
		runs := slices.DeleteFunc(p.runs[before.Parent], func(r *workload) bool { return r == w })
		if p.runs[before.Parent] = runs; len(runs) == 0 {
			delete(p.runs, before.Parent)
		}
	}
	if now != nil && now.Parent != before.GetParent() {
		p.runs[now.Parent] = append(p.runs[now.Parent], w)
	}
	p.touchParent(before)
	p.touchParent(now)
}

// touchParent wakes the job that a run belongs to.
func (p *Picture) touchParent(run *pb.Workload) {
	if parent := p.workloads[run.GetParent()]; run != nil && parent != nil && parent.mod != 0 {
		p.touch(parent)
	}
}

// run is the stored record of a run of a job with a schedule, nil for all else.
func (w *workload) run() *pb.Workload {
	if w.want == nil {
		return nil
	}
	return w.want.run
}

// compareRuns is the order of runs: when they were due.
func compareRuns(a, b *workload) int {
	return cmp.Or(a.run().ScheduledTime.AsTime().Compare(b.run().ScheduledTime.AsTime()), cmp.Compare(a.id, b.id))
}

// goesOn reports whether a run may be running, or will be; one that is deleted
// before its end may until it is gone.
func (w *workload) goesOn() bool { return model.GoesOn(w.status) }

func (w *workload) deleted() bool {
	return w.want != nil && w.want.desired == pb.DesiredState_DESIRED_DELETED
}

// runsOf are the runs of a job that there are, the oldest first.
func (b *builder) runsOf() []*workload {
	return slices.SortedFunc(slices.Values(b.d.p.runs[b.w.id]), compareRuns)
}

// scheduled decides about a job with a schedule. It has no replicas itself: when
// a run is due, a workload is made of it, and the rest is that workload's own
// affair. What is due is derived from next_run of its status, which is written in
// the transaction that starts the run: no leader starts one twice, and what was
// due while there was none is found by the next one.
func (b *builder) scheduled() {
	for _, r := range slices.Backward(b.w.replicas) { // It had no schedule before.
		if b.taken(r) {
			b.tally.busy = true
			continue
		}
		b.reconcile(r, wantGone)
		b.done()
	}
	if b.tally.busy {
		return
	}
	runs := b.runsOf()
	b.prune(runs)
	c := &b.tally.cron
	if last := b.known().GetLastRun(); last != nil {
		c.last = last.AsTime()
	}
	for _, run := range runs {
		if run.goesOn() {
			c.active++
		} else if !run.deleted() {
			c.failed = nil
			if run.status.GetState() == pb.State_FAILED {
				c.failed = run
			}
		}
	}
	if s := b.w.want.schedule; s.on() {
		if due, ok := b.due(s); ok {
			b.startRun(s, due, runs)
		}
		// This leader's clock may be behind that of the one before it.
		from := b.d.now
		if c.last.After(from) {
			from = c.last
		}
		if c.next = s.times.Next(from); !c.next.IsZero() {
			b.at(c.next.UnixNano())
		}
	}
}

// cronTally is what a look at a job with a schedule found.
type cronTally struct {
	last, next time.Time
	active     int32
	// The newest run that is over, where it failed.
	failed *workload
}

// known is the status as it is stored, or will be.
func (b *builder) known() *pb.WorkloadStatus {
	if b.w.assumed != nil {
		return b.w.assumed
	}
	return b.w.status
}

// due is the time of the run that is to be started now, if there is one. Of
// several that were missed it is the last, and only within the start deadline.
// A next_run that the schedule does not name was another schedule's: the present
// one takes effect from now.
func (b *builder) due(s *schedule) (time.Time, bool) {
	next := b.known().GetNextRun()
	if next == nil || next.AsTime().After(b.d.now) || !s.times.Names(next.AsTime()) {
		return time.Time{}, false
	}
	due := s.times.Due(next.AsTime(), b.d.now, s.deadline())
	if due.IsZero() {
		b.announce(pb.EventType_WORKLOAD_UPDATED, "the run that was due at "+clock(unixNano(next))+" is left out: it could not be started in time")
	}
	return due, !due.IsZero()
}

// startRun makes the run that was due, as far as the others let it.
func (b *builder) startRun(s *schedule, due time.Time, runs []*workload) {
	id := model.RunID(b.w.id, due)
	if w := b.d.p.workloads[id]; w != nil && w.mod != 0 {
		if w.run().GetParent() != b.w.id {
			b.announce(pb.EventType_WORKLOAD_UPDATED, "the run that was due at "+clock(due.UnixNano())+" is left out: there is another workload "+id)
		}
		return
	}
	for _, other := range runs {
		switch {
		case !other.goesOn() || s.Concurrency == pb.Schedule_ALLOW:
		case s.Concurrency == pb.Schedule_FORBID:
			b.announce(pb.EventType_WORKLOAD_UPDATED, "the run that was due at "+clock(due.UnixNano())+" is left out: run "+other.id+" goes on")
			return
		case !other.deleted() && !b.settled(other):
			b.tally.busy = true
			return
		}
	}
	for _, other := range runs {
		if s.Concurrency == pb.Schedule_REPLACE && other.goesOn() && !other.deleted() {
			b.deleteRun(other, "run "+other.id+" is deleted: "+id+" replaces it")
		}
	}
	b.begin()
	txn := model.PutRun(model.Run(s.job, id, fmt.Sprintf("%s-%d", b.w.want.uid, due.Unix()/60), due, b.d.now))
	b.step.Txn.Compare = append(b.step.Txn.Compare, txn.Compare...)
	b.step.Txn.Success = append(b.step.Txn.Success, txn.Success...)
	b.step.runs = true
	b.announce(pb.EventType_RUN_STARTED, "run "+id+" is started, due at "+clock(due.UnixNano()))
	b.tally.cron.active++
	b.tally.cron.last = due
}

// prune deletes the oldest of the runs that are over and more than are kept.
func (b *builder) prune(runs []*workload) {
	s := b.w.want.schedule
	completed, failed := s.GetKeepCompleted(), s.GetKeepFailed()
	for _, run := range slices.Backward(runs) {
		keep := &completed
		switch {
		case run.deleted() || !model.Finished(run.status):
			continue
		case run.status.State == pb.State_FAILED:
			keep = &failed
		}
		if *keep--; *keep < 0 && b.settled(run) {
			b.deleteRun(run, "")
		}
	}
}

// deleteRuns asks for the deletion of all runs of a job that is to be deleted,
// and reports whether they are gone.
func (b *builder) deleteRuns() bool {
	runs := b.runsOf()
	for _, run := range runs {
		if !run.deleted() && b.settled(run) {
			b.deleteRun(run, "")
		}
	}
	return len(runs) == 0
}

// settled reports whether a run's record may be written: nothing else of this
// plan, or of one that is being committed, relies on it.
func (b *builder) settled(run *workload) bool {
	busy := b.d.p.dirty.has(run) || run.assumed != nil || run.leaving || run.rewriting ||
		slices.ContainsFunc(run.replicas, func(r *replica) bool { return r.next != nil })
	b.again = b.again || busy
	return !busy
}

// deleteRun asks for the deletion of a run as users do: it writes the run's own
// record, which the step compares.
func (b *builder) deleteRun(run *workload, why string) {
	b.begin()
	next := proto.CloneOf(run.run())
	next.Spec.DesiredState, next.UpdateTime = pb.DesiredState_DESIRED_DELETED, b.d.nowStamp
	key := []byte(model.WorkloadKey(run.id))
	b.compare(key, run.mod)
	b.put(key, next)
	b.step.runs = true
	if why != "" {
		b.announce(pb.EventType_WORKLOAD_DELETED, why)
	}
}

// announce is an event about the workload as a whole.
func (b *builder) announce(kind pb.EventType, text string) {
	b.say(note{kind: kind, number: -1, text: text})
}

// scheduledState is the state of a job with a schedule.
func (b *builder) scheduledState() (pb.State, *pb.Reason) {
	c := &b.tally.cron
	switch {
	case c.active > 0:
		return pb.State_RUNNING, nil
	case !b.w.want.schedule.on():
		return pb.State_STOPPED, nil
	case c.failed != nil:
		reason := c.failed.status.GetReason()
		return pb.State_SCHEDULED, &pb.Reason{Code: reason.GetCode(), Message: "run " + c.failed.id + " failed: " + said(reason), Retryable: true}
	default:
		return pb.State_SCHEDULED, nil
	}
}

// explainSchedule says when a job with a schedule runs, and what it has done.
func (p *Picture) explainSchedule(w *workload) []string {
	var lines []string
	s, st := w.want.schedule, w.status
	switch {
	case s.job.Spec.DesiredState == pb.DesiredState_DESIRED_STOPPED:
		lines = append(lines, "stopped: no run is started")
	case s.Suspend:
		lines = append(lines, "suspended: no run is started by the schedule")
	case st.GetNextRun() == nil:
		lines = append(lines, "the schedule begins now")
	default:
		lines = append(lines, fmt.Sprintf("the next run is at %s (%s, %s)", clock(unixNano(st.NextRun)), s.Cron, cmp.Or(s.Timezone, "UTC")))
	}
	for _, run := range slices.SortedFunc(slices.Values(p.runs[w.id]), compareRuns) {
		state := run.status.GetState()
		if state == pb.State_STATE_UNSPECIFIED {
			state = pb.State_PENDING
		}
		line := fmt.Sprintf("run %s is %s", run.id, strings.ToLower(strings.ReplaceAll(state.String(), "_", " ")))
		if reason := run.status.GetReason(); reason != nil {
			line += ": " + said(reason)
		}
		lines = append(lines, line)
	}
	return lines
}
