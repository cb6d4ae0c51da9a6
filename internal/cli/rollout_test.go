package cli

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestProgressOf(t *testing.T) {
	// Runs in full, at revision b and version 10.
	base := &pb.Workload{
		Spec: &pb.WorkloadSpec{Id: "web", Replicas: proto.Int32(2)}, Revision: "b", ResourceVersion: 10,
		Status:   &pb.WorkloadStatus{State: pb.State_RUNNING, Revision: "b", Desired: 2, Running: 2, Updated: 2},
		Replicas: []*pb.Replica{{Replica: 0, Generation: 5}, {Replica: 1, Generation: 6}},
	}
	for name, x := range map[string]struct {
		change       func(*pb.Workload)
		goal         goal
		done, failed bool
	}{
		"runs":                 {done: true},
		"older than asked for": {goal: goal{version: 11}},
		"status of the revision before": {change: func(w *pb.Workload) {
			w.Status.Revision = "a"
			w.Status.State = pb.State_FAILED
		}},
		"one missing":         {change: func(w *pb.Workload) { w.Status.Running = 1 }},
		"one not updated":     {change: func(w *pb.Workload) { w.Status.Updated = 1 }},
		"updating":            {change: func(w *pb.Workload) { w.Status.State = pb.State_UPDATING }},
		"status before scale": {change: func(w *pb.Workload) { w.Spec.Replicas = proto.Int32(3) }},
		"failed":              {change: func(w *pb.Workload) { w.Status.State = pb.State_FAILED }, failed: true},
		"no status":           {change: func(w *pb.Workload) { w.Status = nil }},
		"stopped": {change: func(w *pb.Workload) {
			w.Spec.DesiredState = pb.DesiredState_DESIRED_STOPPED
			w.Status.State = pb.State_STOPPED
		}, done: true},
		"still running":     {change: func(w *pb.Workload) { w.Spec.DesiredState = pb.DesiredState_DESIRED_STOPPED }},
		"deleted by others": {change: func(w *pb.Workload) { w.Spec.DesiredState = pb.DesiredState_DESIRED_DELETED }, failed: true},
		"being deleted":     {change: func(w *pb.Workload) { w.Spec.DesiredState = pb.DesiredState_DESIRED_DELETED }, goal: goal{deleted: true}},
		"job done": {change: func(w *pb.Workload) {
			w.Spec.Kind = pb.WorkloadKind_JOB
			w.Status.State = pb.State_COMPLETED
		}, done: true},
		"job under way": {change: func(w *pb.Workload) { w.Spec.Kind = pb.WorkloadKind_JOB }},
		"global on no node": {change: func(w *pb.Workload) {
			w.Spec.Kind, w.Spec.Replicas = pb.WorkloadKind_GLOBAL, nil
			w.Status.Desired, w.Status.Running, w.Status.Updated = 0, 0, 0
		}, done: true},
		"restarted":          {goal: goal{replaced: map[int32]int64{0: 4, 1: 5}}, done: true},
		"one not restarted":  {goal: goal{replaced: map[int32]int64{0: 4, 1: 6}}},
		"one gone meanwhile": {goal: goal{replaced: map[int32]int64{0: 4, 7: 9}}, done: true},
	} {
		w := proto.CloneOf(base)
		if x.change != nil {
			x.change(w)
		}
		if p := progressOf(w, x.goal); p.done != x.done || p.failed != x.failed {
			t.Errorf("%s: got %+v", name, p)
		}
	}
}

func applied(id string, change func(*pb.Workload)) *pb.WorkloadChange {
	w := &pb.Workload{
		Spec: &pb.WorkloadSpec{Id: id}, Revision: "r1", ResourceVersion: 10,
		Status: &pb.WorkloadStatus{State: pb.State_PENDING, Revision: "r1", Desired: 1},
	}
	change(w)
	return &pb.WorkloadChange{Workload: w}
}

func TestApplyWaits(t *testing.T) {
	pending := applied("web", func(w *pb.Workload) {
		w.Status.Reason = &pb.Reason{Code: pb.ReasonCode_NO_PLACEMENT, Message: "cpu (2 nodes)"}
	})
	runs := applied("web", func(w *pb.Workload) {
		w.Status.State, w.Status.Running, w.Status.Updated = pb.State_RUNNING, 1, 1
	})
	fails := applied("web", func(w *pb.Workload) {
		w.Status.State, w.Status.Reason = pb.State_FAILED, &pb.Reason{Code: pb.ReasonCode_IMAGE_NOT_FOUND, Message: "web:9"}
	})
	for name, x := range map[string]struct {
		changes []*pb.WorkloadChange
		code    int
		says    string
	}{
		"runs":                           {[]*pb.WorkloadChange{pending, runs}, exitOK, "web: Running, 1/1 running"},
		"fails":                          {[]*pb.WorkloadChange{pending, fails}, exitRollout, "workload \"web\" failed: Failed, 0/1 running: IMAGE_NOT_FOUND: web:9"},
		"recovers from an old failure":   {[]*pb.WorkloadChange{fails, pending, runs}, exitOK, ""},
		"ends and comes back, and again": {[]*pb.WorkloadChange{runs, pending, runs, pending}, exitUnavailable, "is not as wanted yet"},
		"deleted by others":              {[]*pb.WorkloadChange{pending, {Workload: pending.Workload, Deleted: true}}, exitNotFound, "was deleted meanwhile"},
		"stays pending":                  {[]*pb.WorkloadChange{pending}, exitUnavailable, "timed out: workload \"web\" is not as wanted yet (Pending, 0/1 running: NO_PLACEMENT: cpu (2 nodes)); see `persys why web`"},
	} {
		t.Run(name, func(t *testing.T) {
			trust := newTrust(t)
			f := &fakeCluster{changes: x.changes}
			u := newUser(t).knows(trust, trust.serve(f))
			u.in = "id: web\nprocess: {command: sleep}\n"
			timeout := "20s"
			if x.code == exitUnavailable {
				timeout = "1500ms"
			}
			r := u.types("apply", "-f", "-", "--wait", "--timeout", timeout)
			if r.code != x.code || !strings.Contains(r.errors, x.says) {
				t.Errorf("%+v", r)
			}
			if r.out != "workload/web created\n" {
				t.Errorf("out: %q", r.out)
			}
		})
	}
}

func TestDeleteWaits(t *testing.T) {
	x := newTrust(t)
	going := applied("web", func(w *pb.Workload) { w.Status.State = pb.State_DELETING })
	f := &fakeCluster{workloads: map[string]*pb.Workload{"web": going.Workload}, changes: []*pb.WorkloadChange{going, {Workload: going.Workload, Deleted: true}}}
	u := newUser(t).knows(x, x.serve(f))
	if r := u.types("delete", "web", "--wait"); r.code != exitOK || r.out != "workload/web is to be deleted\n" || !strings.Contains(r.errors, "web: Deleting") {
		t.Errorf("%+v", r)
	}
	if r := u.types("rm", "web", "other"); r.code != exitNotFound || r.errors != "persys: workload \"web\": not found\n  workload \"other\": not found\n" {
		t.Errorf("%+v", r)
	}
}
