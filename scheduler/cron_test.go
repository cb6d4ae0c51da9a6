package scheduler

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// clockMachine drives jobs with schedules through changes of leaders, whose clocks
// differ, and time that passes with and without one.
type clockMachine struct {
	*machine
	// The runs that there have been: the schedule's own, by id, and when they came.
	seen map[string]time.Time
}

var scheduledJobs = map[string]pb.Schedule_Concurrency{
	"f": pb.Schedule_FORBID, "l": pb.Schedule_ALLOW, "r": pb.Schedule_REPLACE,
}

// maxSkew is how far a leader's clock is behind that of the one before it.
const maxSkew = 3 * time.Second

// TestScheduleProperties holds that each time that is due has at most one run,
// started then and not long after, that there are never two at once where that is
// forbidden, and that no more are kept than are wanted.
func TestScheduleProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &clockMachine{machine: &machine{world: newWorld(t), t: t}, seen: map[string]time.Time{}}
		m.opt = Options{MaxPlacements: 1000}
		for _, id := range nodeNames {
			m.node(id, 4000, 4<<30, 10<<30, map[string]string{"zone": "eu"}, pb.WorkloadType_CONTAINER)
		}
		for _, id := range sortedKeys(scheduledJobs) {
			m.change(id)
		}
		t.Repeat(map[string]func(*rapid.T){
			"":     func(t *rapid.T) { m.t, m.world.t = t, t; m.checkRuns() },
			"spec": func(*rapid.T) { m.change(rapid.SampledFrom(sortedKeys(scheduledJobs)).Draw(m.t, "job")) },
			"run":  func(*rapid.T) { m.userRun(rapid.SampledFrom(sortedKeys(scheduledJobs)).Draw(m.t, "job")) },
			"second": func(*rapid.T) {
				m.now = m.now.Add(time.Duration(rapid.IntRange(1, 90_000).Draw(m.t, "ms")) * time.Millisecond)
			},
			"hours":  func(*rapid.T) { m.now = m.now.Add(time.Duration(rapid.IntRange(0, 30).Draw(m.t, "h")) * time.Hour) },
			"leader": func(*rapid.T) { m.newLeader() },
			"finish": func(*rapid.T) { m.finish() },
			"decide": func(*rapid.T) { m.decide() },
			"again":  func(*rapid.T) { m.decide() },
			"commit": func(*rapid.T) { m.commit(rapid.IntRange(0, 5).Draw(m.t, "steps")) },
		})
		m.commit(len(m.proposed))
		m.rest()
	})
}

func (m *clockMachine) change(id string) {
	spec := &pb.WorkloadSpec{
		Id: id, Kind: pb.WorkloadKind_JOB, Replicas: proto.Int32(rapid.Int32Range(0, 2).Draw(m.t, "replicas")), Placement: &pb.Placement{},
		Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{}},
		Schedule: &pb.Schedule{
			Cron: rapid.SampledFrom([]string{"* * * * *", "*/5 * * * *", "30 2 * * *", "0 0 1 * *", "15,45 */2 * * 1-5"}).Draw(m.t, "cron"),
			// Summer time ends in the middle of what these tests see, or never.
			Timezone:             rapid.SampledFrom([]string{"UTC", "Australia/Lord_Howe", "America/Havana"}).Draw(m.t, "zone"),
			Concurrency:          scheduledJobs[id],
			StartDeadlineSeconds: proto.Int32(rapid.SampledFrom([]int32{1, 60, 3600}).Draw(m.t, "deadline")),
			KeepCompleted:        proto.Int32(rapid.Int32Range(0, 2).Draw(m.t, "completed")),
			KeepFailed:           proto.Int32(rapid.Int32Range(0, 2).Draw(m.t, "failed")),
			Suspend:              rapid.IntRange(0, 5).Draw(m.t, "suspend") == 0,
		},
	}
	m.submit(spec, "v1")
}

func (m *clockMachine) userRun(id string) {
	txn, _, err := model.RunWorkload(worldReader{m.world}, &pb.WorkloadRequest{Id: id}, model.Meta{Now: m.now, NewID: fmt.Sprint("u", m.revision)})
	if err == nil && !m.apply(txn) {
		m.t.Fatalf("not carried out: %v", txn)
	}
}

// newLeader takes over; what the one before it proposed has come through, or will
// not any more.
func (m *clockMachine) newLeader() {
	m.commit(rapid.IntRange(0, len(m.proposed)).Draw(m.t, "through"))
	m.proposed = nil
	m.picture, m.unseen = m.rebuilt(), nil
	m.now = m.now.Add(-time.Duration(rapid.Int64Range(0, int64(maxSkew)).Draw(m.t, "skew")))
}

// finish lets agents catch up, and a run end.
func (m *clockMachine) finish() {
	m.agents()
	for key := range m.scan(model.AssignmentsPrefix) {
		if rapid.Bool().Draw(m.t, "ends") {
			state, reason := pb.State_COMPLETED, (*pb.Reason)(nil)
			if rapid.IntRange(0, 3).Draw(m.t, "fails") == 0 {
				state, reason = pb.State_FAILED, &pb.Reason{Code: pb.ReasonCode_EXITED, Message: "exited with code 1"}
			}
			m.report(strings.TrimPrefix(key, model.AssignmentsPrefix), state, reason)
		}
	}
}

func (m *clockMachine) checkRuns() {
	goingOn := map[string]int{}
	for key, kv := range m.scan(model.WorkloadsPrefix) {
		id, sub, _ := model.SplitKey(model.WorkloadsPrefix, key)
		run := &pb.Workload{}
		if sub != "" || model.Parse(kv, run) != nil || run.Parent == "" {
			continue
		}
		st := &pb.WorkloadStatus{}
		m.load(model.WorkloadStatusKey(id), st)
		if model.GoesOn(st) {
			goingOn[run.Parent]++
		}
		if strings.Count(id, "-") > 1 || kv.Version > 1 {
			continue // A user's.
		}
		due, made := run.ScheduledTime.AsTime(), run.CreateTime.AsTime()
		if came, ok := m.seen[id]; ok && !came.Equal(made) {
			m.t.Fatalf("%s ran at %s and again at %s", id, came, made)
		}
		m.seen[id] = made
		if made.Before(due) || made.Sub(due) > time.Hour {
			m.t.Fatalf("%s, due at %s, was made at %s", id, due, made)
		}
		if run.Spec.Schedule != nil || run.Spec.Id != id {
			m.t.Fatalf("%s: %v", id, run.Spec)
		}
	}
	if goingOn["f"] > 1 {
		m.t.Fatalf("%d runs of f at once:\n%s", goingOn["f"], dump(m.picture))
	}
}

// rest lets all runs complete and holds what is left then.
func (m *clockMachine) rest() {
	for range 50 {
		m.settle(nil)
		m.checkRuns()
		before := m.revision
		m.agents()
		for key := range m.scan(model.AssignmentsPrefix) {
			r := &pb.Replica{}
			if name := strings.TrimPrefix(key, model.AssignmentsPrefix); !m.load(model.ReplicasPrefix+name, r) || r.State != pb.State_COMPLETED && r.State != pb.State_FAILED {
				m.report(name, pb.State_COMPLETED, nil)
			}
		}
		if m.revision == before {
			break
		}
	}
	for _, id := range sortedKeys(scheduledJobs) {
		w, st := &pb.Workload{}, &pb.WorkloadStatus{}
		m.load(model.WorkloadKey(id), w)
		m.load(model.WorkloadStatusKey(id), st)
		runs, err := model.Runs(worldReader{m.world}, id)
		if err != nil {
			m.t.Fatal(err)
		}
		if most := w.Spec.Schedule.GetKeepCompleted() + w.Spec.Schedule.GetKeepFailed(); len(runs) > int(most) || st.ActiveRuns != 0 {
			m.t.Fatalf("%d runs of %s are kept, %d at most; %v", len(runs), id, most, st)
		}
		if (st.NextRun == nil) != w.Spec.Schedule.Suspend {
			m.t.Fatalf("%s: %v, %v", id, w.Spec.Schedule, st)
		}
		if st.NextRun != nil && !st.NextRun.AsTime().After(m.now) {
			m.t.Fatalf("%s at %s: %v", id, m.now, st)
		}
	}
}
