package model

import (
	"fmt"
	"slices"
	"strings"
	"time"
	_ "time/tzdata" // for machines that have no time zones of their own

	"github.com/robfig/cron/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Defaults and limits of a schedule.
const (
	// maxScheduledID leaves room for what names a run.
	maxScheduledID = 52
	// runsPerMinute that users may start of one job: the digit that tells them apart.
	runsPerMinute = 9

	defaultTimezone      = "UTC"
	defaultStartDeadline = 3600
	maxStartDeadline     = 7 * 24 * 3600
	defaultKeptRuns      = 3
	maxKeptRuns          = 100

	cronAllowed = "five fields (minute, hour, day of month, month, day of week), or @hourly, @daily, @weekly, @monthly, @yearly"
)

// Timetable is when a schedule's runs are due.
type Timetable struct {
	fields *cron.SpecSchedule
	zone   *time.Location
}

// ParseTimetable reads the expression and the time zone of a schedule. Zones are
// read from the machine, or the program where that has none: they are constants.
func ParseTimetable(s *pb.Schedule) (*Timetable, error) {
	fields, err := parseCron(s.GetCron())
	if err != nil {
		return nil, err
	}
	zone, err := loadZone(s.GetTimezone())
	if err != nil {
		return nil, err
	}
	return &Timetable{fields, zone}, nil
}

func parseCron(text string) (*cron.SpecSchedule, error) {
	// The library would read a time zone here, and intervals.
	if strings.ContainsAny(text, "=") || strings.HasPrefix(text, "@every") {
		return nil, fmt.Errorf("%q is not a schedule", clip(text))
	}
	parsed, err := cron.ParseStandard(text)
	if err != nil {
		return nil, fmt.Errorf("%q is not a schedule: %w", clip(text), err)
	}
	fields, ok := parsed.(*cron.SpecSchedule)
	if !ok {
		return nil, fmt.Errorf("%q is not a schedule", clip(text))
	}
	return fields, nil
}

func loadZone(name string) (*time.Location, error) {
	if name == "" {
		name = defaultTimezone
	}
	zone, err := time.LoadLocation(name)
	if err != nil || name == "Local" {
		return nil, fmt.Errorf("%q is not a time zone", clip(name))
	}
	return zone, nil
}

// Next is the first time after t that the schedule names, zero where there is
// none within nine years. It is a whole minute at which clocks of the zone show
// what the fields say: a time that the change to summer time leaves out is left
// out, and one that comes twice comes twice. The library's own way forward loses
// whole days around such changes.
func (s *Timetable) Next(t time.Time) time.Time {
	t = t.In(s.zone).Truncate(time.Minute).Add(time.Minute)
	for end := t.AddDate(9, 0, 0); t.Before(end); {
		skip := s.mismatch(t)
		if skip == 0 {
			return t.UTC()
		}
		next := t.Add(skip)
		// What the clock shows grows with time only until the zone changes it.
		if _, change := t.ZoneBounds(); !change.IsZero() && change.Before(next) {
			// Tables of zones end in the middle of a minute.
			next = change.Add(time.Minute - 1).Truncate(time.Minute)
		}
		t = next
	}
	return time.Time{}
}

// mismatch is how long the clock shows nothing that the fields allow, at least; 0
// where it does.
func (s *Timetable) mismatch(t time.Time) time.Duration {
	const star = 1 << 63
	has := func(set uint64, n int) bool { return set&(1<<uint(n)) != 0 }
	f := s.fields
	dom, dow := has(f.Dom, t.Day()), has(f.Dow, int(t.Weekday()))
	day := dom && dow
	if f.Dom&star == 0 && f.Dow&star == 0 {
		day = dom || dow
	}
	intoHour := time.Duration(t.Minute()) * time.Minute
	switch {
	case !has(f.Month, int(t.Month())) || !day:
		return 24*time.Hour - time.Duration(t.Hour())*time.Hour - intoHour
	case !has(f.Hour, t.Hour()):
		return time.Hour - intoHour
	case !has(f.Minute, t.Minute()):
		return time.Minute
	}
	return 0
}

// Due is the last time from first to now that the schedule names, but not further
// back than its start deadline; zero where there is none.
func (s *Timetable) Due(first, now time.Time, deadline time.Duration) time.Time {
	if oldest := now.Add(-deadline); first.Before(oldest) {
		first = oldest
	}
	var last time.Time
	for t := s.Next(first.Add(-time.Nanosecond)); !t.IsZero() && !t.After(now); t = s.Next(t) {
		last = t
	}
	return last
}

// Names reports whether the schedule names t.
func (s *Timetable) Names(t time.Time) bool { return s.Next(t.Add(-time.Nanosecond)).Equal(t) }

func checkSchedule(errs *FieldErrors, spec *pb.WorkloadSpec) {
	s := spec.Schedule
	if s == nil {
		return
	}
	if spec.Kind != pb.WorkloadKind_JOB {
		errs.add("schedule", "only with kind job; allowed: kind job, or leave it out")
	}
	if len(spec.Id) > maxScheduledID {
		errs.add("id", "has %d characters; allowed: %d with a schedule, whose runs have longer ids", len(spec.Id), maxScheduledID)
	}
	fields, cronErr := parseCron(s.Cron)
	zone, zoneErr := loadZone(s.Timezone)
	switch {
	case s.Cron == "":
		errs.add("schedule.cron", "missing; allowed: %s", cronAllowed)
	case cronErr != nil:
		errs.add("schedule.cron", "%v; allowed: %s", cronErr, cronAllowed)
	case zoneErr == nil && (&Timetable{fields, zone}).Next(time.Unix(0, 0)).IsZero():
		errs.add("schedule.cron", "%q names a day that never comes; allowed: %s", clip(s.Cron), cronAllowed)
	}
	if zoneErr != nil {
		errs.add("schedule.timezone", `%v; allowed: an IANA name such as "UTC" or "Europe/Berlin"`, zoneErr)
	}
	if s.StartDeadlineSeconds != nil {
		checkRange(errs, "schedule.start_deadline_seconds", *s.StartDeadlineSeconds, 1, maxStartDeadline)
	}
	if s.KeepCompleted != nil {
		checkRange(errs, "schedule.keep_completed", *s.KeepCompleted, 0, maxKeptRuns)
	}
	if s.KeepFailed != nil {
		checkRange(errs, "schedule.keep_failed", *s.KeepFailed, 0, maxKeptRuns)
	}
}

func normalizeSchedule(s *pb.Schedule) {
	if s == nil {
		return
	}
	if s.Timezone == "" {
		s.Timezone = defaultTimezone
	}
	if s.StartDeadlineSeconds == nil {
		s.StartDeadlineSeconds = proto.Int32(defaultStartDeadline)
	}
	if s.KeepCompleted == nil {
		s.KeepCompleted = proto.Int32(defaultKeptRuns)
	}
	if s.KeepFailed == nil {
		s.KeepFailed = proto.Int32(defaultKeptRuns)
	}
}

// RunID names the run of a job that is due at t.
func RunID(parent string, t time.Time) string {
	return fmt.Sprintf("%s-%d", parent, t.Unix()/60)
}

// Run is a run of a job with a schedule as it is stored: a workload of its own,
// with what the job says now.
func Run(parent *pb.Workload, id, uid string, due, now time.Time) *pb.Workload {
	spec := proto.CloneOf(parent.Spec)
	spec.Id, spec.Schedule = id, nil
	return &pb.Workload{
		Spec: spec, Revision: parent.Revision, Uid: uid, CreateTime: timestamppb.New(now), UpdateTime: timestamppb.New(now),
		Parent: parent.Spec.Id, ScheduledTime: timestamppb.New(due),
	}
}

// PutRun stores a run that is not there yet.
func PutRun(run *pb.Workload) *pb.Txn {
	id := run.Spec.Id
	return &pb.Txn{
		Compare: []*pb.Compare{Missing(WorkloadKey(id))},
		Success: []*pb.RequestOp{
			Put(WorkloadKey(id), run, 0),
			Put(RevisionKey(id, run.Revision), &pb.Revision{Spec: run.Spec, Revision: run.Revision, CreateTime: run.CreateTime, Uid: run.Uid}, 0),
		},
	}
}

// Finished reports whether a run with this status is over: it has completed, or
// all of it that has not is given up.
func Finished(s *pb.WorkloadStatus) bool {
	return s.GetState() == pb.State_COMPLETED || s.GetState() == pb.State_FAILED && s.Failed+s.Completed >= s.Desired
}

// GoesOn reports whether something of a run with this status may be running, or
// will be.
func GoesOn(s *pb.WorkloadStatus) bool { return !Finished(s) && s.GetState() != pb.State_STOPPED }

// RunWorkload starts a run of a job with a schedule now.
func RunWorkload(v Reader, req *pb.WorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	parent, err := changeable(v, req.Id)
	switch {
	case err != nil:
		return nil, nil, err
	case parent.Spec.Schedule == nil:
		return nil, nil, refuse(codes.FailedPrecondition, "workload %q has no schedule; persys restart runs a job again", req.Id)
	case parent.Spec.DesiredState == pb.DesiredState_DESIRED_STOPPED:
		return nil, nil, refuse(codes.FailedPrecondition, "workload %q is stopped; start it first", req.Id)
	}
	others, err := runsThatGoOn(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	concurrency := parent.Spec.Schedule.Concurrency
	if concurrency == pb.Schedule_FORBID && len(others) > 0 {
		return nil, nil, refuse(codes.FailedPrecondition, "run %q goes on, and the schedule of %q forbids another one beside it", others[0].Spec.Id, req.Id)
	}
	id, err := freeRunID(v, req.Id, m.Now)
	if err != nil {
		return nil, nil, err
	}
	statusKey := WorkloadStatusKey(req.Id)
	statusMod, _, err := Load(v, statusKey, &pb.WorkloadStatus{})
	if err != nil {
		return nil, nil, err
	}
	run := Run(parent, id, m.NewID, m.Now.Truncate(time.Second), m.Now)
	txn := PutRun(run)
	// The plan starts runs, too. It writes the job's status with each: none has been
	// started since. And it compares the job's record, which is written here as it is:
	// it starts none before it has seen this one.
	key, read := WorkloadKey(req.Id), parent.ResourceVersion
	parent.ResourceVersion = 0
	txn.Compare = append(txn.Compare, Unchanged(key, read), Unchanged(statusKey, statusMod))
	txn.Success = append(txn.Success, Put(key, parent, 0),
		m.event(&pb.Event{Type: pb.EventType_RUN_STARTED, WorkloadId: req.Id, Message: "run " + id + " asked for"}))
	if concurrency == pb.Schedule_REPLACE {
		replaceRuns(txn, others, id, m)
	}
	return txn, run, nil
}

// replaceRuns deletes those that go on, for the sake of a new one.
func replaceRuns(txn *pb.Txn, others []*pb.Workload, id string, m Meta) {
	for i, other := range others {
		if deleting(other) {
			continue
		}
		other.Spec.DesiredState = pb.DesiredState_DESIRED_DELETED
		// Events of one transaction need ids of their own.
		each := m
		each.NewID = fmt.Sprintf("%s-%d", m.NewID, i)
		deletion := changeWorkload(other, each, pb.EventType_WORKLOAD_DELETED, "run "+other.Spec.Id+" is deleted: "+id+" replaces it")
		txn.Compare = append(txn.Compare, deletion.Compare...)
		txn.Success = append(txn.Success, deletion.Success...)
	}
}

func freeRunID(v Reader, parent string, now time.Time) (string, error) {
	for n := range runsPerMinute {
		id := fmt.Sprintf("%s-%d", RunID(parent, now), n+1)
		if _, taken := v.Get(WorkloadKey(id)); !taken {
			return id, nil
		}
	}
	return "", refuse(codes.ResourceExhausted, "%d runs of %q were started in this minute already; try again in the next", runsPerMinute, parent)
}

// Runs are the runs of a job that there are, the oldest first.
func Runs(v Reader, parent string) ([]*pb.Workload, error) {
	var runs []*pb.Workload
	for kv := range v.Scan(WorkloadKey(parent) + "-") {
		if _, sub, _ := SplitKey(WorkloadsPrefix, string(kv.Key)); sub != "" {
			continue
		}
		w := &pb.Workload{}
		if err := Parse(kv, w); err != nil {
			return nil, err
		}
		if w.Parent == parent {
			w.ResourceVersion = kv.ModRevision
			runs = append(runs, w)
		}
	}
	slices.SortStableFunc(runs, func(a, b *pb.Workload) int { return a.ScheduledTime.AsTime().Compare(b.ScheduledTime.AsTime()) })
	return runs, nil
}

func runsThatGoOn(v Reader, parent string) ([]*pb.Workload, error) {
	runs, err := Runs(v, parent)
	if err != nil {
		return nil, err
	}
	var going []*pb.Workload
	for _, run := range runs {
		s := &pb.WorkloadStatus{}
		if _, _, err := Load(v, WorkloadStatusKey(run.Spec.Id), s); err != nil {
			return nil, err
		}
		if GoesOn(s) {
			going = append(going, run)
		}
	}
	return going, nil
}
