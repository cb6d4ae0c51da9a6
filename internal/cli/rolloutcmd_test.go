package cli

import (
	"context"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (f *fakeCluster) ListRevisions(_ context.Context, r *pb.WorkloadRequest) (*pb.ListRevisionsResponse, error) {
	w, err := f.find(r.Id)
	if err != nil {
		return nil, err
	}
	spec := func(image string) *pb.WorkloadSpec {
		return &pb.WorkloadSpec{Id: r.Id, Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: image}}, Resources: &pb.Resources{Cpu: "500m"}}
	}
	return &pb.ListRevisionsResponse{Current: w.Revision, Revisions: []*pb.Revision{{Revision: "r2", Spec: spec("nginx:2")}, {Revision: "r1", Spec: spec("nginx:1")}}}, nil
}

func (f *fakeCluster) RollbackWorkload(_ context.Context, r *pb.RollbackWorkloadRequest) (*pb.Workload, error) {
	return f.find(r.Id)
}

func (f *fakeCluster) PromoteWorkload(_ context.Context, r *pb.WorkloadRequest) (*pb.Workload, error) {
	if r.Id == "done" {
		return nil, status.Errorf(codes.FailedPrecondition, "workload %q has no update that awaits promotion", r.Id)
	}
	return f.find(r.Id)
}

func TestRolloutCommands(t *testing.T) {
	x := newTrust(t)
	workload := func(id string, r *pb.Rollout) *pb.Workload {
		return &pb.Workload{
			Spec: &pb.WorkloadSpec{Id: id, Replicas: proto.Int32(4), Update: &pb.UpdateStrategy{Canary: 2}}, Revision: r.GetRevision(), Rollout: r,
			Status: &pb.WorkloadStatus{State: pb.State_RUNNING, Revision: r.GetRevision(), Desired: 4, Running: 4, Updated: 4},
		}
	}
	f := &fakeCluster{workloads: map[string]*pb.Workload{
		"web": workload("web", &pb.Rollout{
			State: pb.RolloutState_ROLLOUT_AWAITING_PROMOTION, Revision: "r2", Previous: "r1", Desired: 4, Canaries: 1,
			StartTime: before(0), ProgressTime: before(0),
		}),
		"done": workload("done", &pb.Rollout{
			State: pb.RolloutState_ROLLOUT_ROLLED_BACK, Revision: "r1", Previous: "r1", FailedRevision: "r2", Desired: 4, Updated: 4, Healthy: 4,
			StartTime: before(0), ProgressTime: before(0), EndTime: before(0), Reason: &pb.Reason{Code: pb.ReasonCode_EXITED, Message: "replica 0 given up on n1: exit code 1"},
		}),
		"old": workload("old", nil),
	}}
	f.changes = []*pb.WorkloadChange{{Workload: f.workloads["done"]}}
	u := newUser(t).knows(x, x.serve(f))
	times := regexp.MustCompile(`(\d{4}-\d\d-\d\d[ T])?\d\d:\d\d:\d\dZ?`)
	var b strings.Builder
	for _, line := range []string{
		"rollout status web", "rollout status done", "rollout status old", "rollout status done -o yaml", "rollout status done -o name", "rollout status none",
		"rollout status done --wait", "rollout history web", "rollout history web -o wide", "rollout history done -o name", "rollout history none",
		"rollout undo web", "rollout undo web --to r1", "rollout undo none", "rollout promote web", "rollout promote done", "rollout back web",
	} {
		r := u.types(strings.Fields(line)...)
		b.WriteString("$ persys " + line + "\n" + times.ReplaceAllString(r.out, "TIME"))
		if r.errors != "" {
			b.WriteString("! " + strings.ReplaceAll(strings.TrimSuffix(r.errors, "\n"), "\n", "\n! ") + "\n")
		}
		if r.code != 0 {
			b.WriteString("exit code " + string(rune('0'+r.code)) + "\n")
		}
		b.WriteString("\n")
	}
	golden(t, "rollout.txt", b.String())
	if r := lastRequest[*pb.RollbackWorkloadRequest](t, f); r.Id != "none" || r.Revision != "" {
		t.Errorf("%v", r)
	}
}

func TestProgressOfRollouts(t *testing.T) {
	// An update from a to b, applied at version 10, that is rolled out.
	base := &pb.Workload{
		Spec: &pb.WorkloadSpec{Id: "web", Replicas: proto.Int32(2), Update: &pb.UpdateStrategy{Canary: 1}}, Revision: "b", ResourceVersion: 10,
		Status:  &pb.WorkloadStatus{State: pb.State_RUNNING, Revision: "b", Desired: 2, Running: 2, Updated: 2},
		Rollout: &pb.Rollout{State: pb.RolloutState_ROLLOUT_COMPLETED, Revision: "b", Previous: "a", Desired: 2, Updated: 2, Healthy: 2},
	}
	takenBack := func(w *pb.Workload) {
		w.Revision, w.Status.Revision, w.ResourceVersion = "a", "a", 11
		w.Rollout = &pb.Rollout{State: pb.RolloutState_ROLLOUT_ROLLED_BACK, Revision: "a", Previous: "a", FailedRevision: "b", EndTime: before(0)}
	}
	for name, x := range map[string]struct {
		change                           func(*pb.Workload)
		goal                             goal
		done, failed, takenBack, through bool
	}{
		"rolled out":    {done: true},
		"none recorded": {change: func(w *pb.Workload) { w.Rollout = nil }, done: true},
		"all run, not healthy yet": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Rollout.Healthy = pb.RolloutState_ROLLOUT_PROGRESSING, 1
		}},
		"the first of all": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Rollout.Previous = pb.RolloutState_ROLLOUT_PROGRESSING, ""
		}, done: true},
		"the first of all, asked for itself": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Rollout.Previous = pb.RolloutState_ROLLOUT_PROGRESSING, ""
		}, goal: goal{rollout: true}},
		"the first of all, overtaken by this one": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Rollout.Previous = pb.RolloutState_ROLLOUT_PROGRESSING, ""
		}, goal: goal{replaces: true}},
		"the first of all, restarted": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Rollout.Previous = pb.RolloutState_ROLLOUT_PROGRESSING, ""
		}, goal: goal{replaced: map[int32]int64{0: 1}}},
		"canaries start": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Status.Updated = pb.RolloutState_ROLLOUT_AWAITING_PROMOTION, 0
		}},
		"canaries wait for a user": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Rollout.Canaries, w.Status.Updated = pb.RolloutState_ROLLOUT_AWAITING_PROMOTION, 1, 0
		}, done: true},
		"canaries go on by themselves": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Rollout.Canaries, w.Spec.Update.AutoPromote = pb.RolloutState_ROLLOUT_AWAITING_PROMOTION, 1, true
		}},
		"promoted": {change: func(w *pb.Workload) {
			w.Rollout.State, w.Rollout.Canaries, w.PromotedRevision = pb.RolloutState_ROLLOUT_AWAITING_PROMOTION, 1, "b"
		}},
		"failed": {change: func(w *pb.Workload) { w.Rollout.State = pb.RolloutState_ROLLOUT_FAILED }, done: true, failed: true},
		"failed before the restart": {change: func(w *pb.Workload) {
			w.Rollout.State, w.RestartGeneration = pb.RolloutState_ROLLOUT_FAILED, 1
		}, done: true},
		"being taken back": {change: func(w *pb.Workload) {
			takenBack(w)
			w.Rollout.EndTime = nil
		}, goal: goal{version: 10, revision: "b"}, takenBack: true},
		"taken back, and looks well": {change: takenBack, goal: goal{version: 10, revision: "b"}, takenBack: true, through: true},
		"taken back, and the way back failed": {change: func(w *pb.Workload) {
			takenBack(w)
			w.Rollout.State = pb.RolloutState_ROLLOUT_FAILED
		}, goal: goal{version: 10, revision: "b"}, takenBack: true, through: true},
		"scaled after it was taken back": {change: takenBack, goal: goal{version: 11, revision: "a"}, done: true},
		"applied again after it was taken back": {change: func(w *pb.Workload) {
			takenBack(w)
			w.Revision, w.ResourceVersion = "b", 12
		}, goal: goal{version: 12, revision: "b"}},
		"the rollout that was taken back": {change: takenBack, goal: goal{rollout: true}, takenBack: true, through: true},
	} {
		w := proto.CloneOf(base)
		if x.change != nil {
			x.change(w)
		}
		if p := progressOf(w, x.goal); p.done != x.done || p.failed != x.failed || p.takenBack != x.takenBack || p.through != x.through {
			t.Errorf("%s: got %+v", name, p)
		}
	}
}

func TestApplyMeetsARollback(t *testing.T) {
	x := newTrust(t)
	going := applied("web", func(w *pb.Workload) {
		w.Rollout = &pb.Rollout{State: pb.RolloutState_ROLLOUT_PROGRESSING, Revision: "r1", Previous: "r0", Desired: 1, Updated: 1}
	})
	back := func(end bool) *pb.WorkloadChange {
		return applied("web", func(w *pb.Workload) {
			w.Revision, w.ResourceVersion, w.Status.Revision, w.Status.State, w.Status.Running, w.Status.Updated = "r0", 11, "r0", pb.State_RUNNING, 1, 1
			w.Rollout = &pb.Rollout{
				State: pb.RolloutState_ROLLOUT_ROLLED_BACK, Revision: "r0", Previous: "r0", FailedRevision: "r1", Desired: 1, Updated: 1,
				Reason: &pb.Reason{Code: pb.ReasonCode_EXITED, Message: "exit code 1"},
			}
			if end {
				w.Rollout.EndTime = before(0)
			}
		})
	}
	for name, changes := range map[string][]*pb.WorkloadChange{
		"taken back": {going, back(false), back(true)},
		// The time is up before the way back is through.
		"being taken back": {going, back(false)},
	} {
		f := &fakeCluster{changes: changes}
		u := newUser(t).knows(x, x.serve(f))
		u.in = "id: web\nprocess: {command: sleep}\n"
		r := u.types("apply", "-f", "-", "--wait", "--timeout", "1500ms")
		if r.code != exitRollout || !strings.Contains(r.errors, "web: Pending, 0/1 running; 1 of 1 updated, 0 healthy\n") ||
			!strings.Contains(r.errors, "revision r1 was taken back: EXITED: exit code 1; see `persys rollout status web`") {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
