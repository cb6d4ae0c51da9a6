package scheduler

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// TestDrain empties a node of random work: until the deadline jobs go on and what
// is to be on every node leaves after all else; past it nothing is left that has not
// completed.
func TestDrain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		for i := range rapid.IntRange(1, 4).Draw(t, "nodes") {
			w.node(fmt.Sprintf("n%d", i), 4000, 8<<30, 1<<40, map[string]string{"zone": "eu"}, pb.WorkloadType_CONTAINER)
		}
		kinds := map[string]pb.WorkloadKind{}
		for i := range rapid.IntRange(1, 6).Draw(t, "workloads") {
			spec := anyService(t, fmt.Sprintf("w%d", i))
			spec.Kind = rapid.SampledFrom([]pb.WorkloadKind{pb.WorkloadKind_SERVICE, pb.WorkloadKind_SERVICE, pb.WorkloadKind_JOB, pb.WorkloadKind_GLOBAL}).Draw(t, "kind")
			if spec.Kind == pb.WorkloadKind_GLOBAL {
				spec.Replicas, spec.Exclusive = nil, false
			}
			if spec.Kind == pb.WorkloadKind_JOB {
				spec.Replicas = proto.Int32(1)
			}
			kinds[spec.Id] = spec.Kind
			w.submit(spec, "v1")
		}
		w.rest(t)
		deadline := w.now.Add(time.Hour)
		w.changeNode("n0", func(n *pb.Node) {
			n.State, n.Unschedulable, n.Draining, n.DrainDeadline = pb.NodeState_DRAINING, true, true, timestamppb.New(deadline)
		})
		on := func() (others int) {
			for key, kv := range w.scan(model.AssignmentsPrefix) {
				a, r := &pb.Assignment{}, &pb.Replica{}
				if err := model.Parse(kv, a); err != nil {
					t.Fatal(err)
				}
				w.load(model.ReplicasPrefix+strings.TrimPrefix(key, model.AssignmentsPrefix), r)
				done := r.State == pb.State_COMPLETED && r.Generation == a.Generation
				if a.NodeId == "n0" && !done && kinds[a.WorkloadId] != pb.WorkloadKind_GLOBAL {
					others++
				}
			}
			return others
		}
		// After each plan: what has left n0.
		before, left := w.assignedTo("n0"), 0
		each := func(*Plan) {
			now := w.assignedTo("n0")
			for key := range before {
				id, _, _ := strings.Cut(key, "/")
				if now[key] || !w.now.Before(deadline) {
					continue
				}
				if kinds[id] == pb.WorkloadKind_JOB {
					t.Fatalf("%s had to leave before the deadline", key)
				}
				if kinds[id] == pb.WorkloadKind_GLOBAL && left > 0 {
					t.Fatalf("%s left while %d others were there", key, left)
				}
			}
			before, left = now, on()
		}
		left = on()
		for range 100 {
			plan := w.settle(each)
			if rapid.IntRange(0, 5).Draw(t, "completes") == 0 {
				for key := range w.assignedTo("n0") {
					if id, _, _ := strings.Cut(key, "/"); kinds[id] == pb.WorkloadKind_JOB {
						w.report(key, pb.State_COMPLETED, nil)
						left = on()
					}
				}
			}
			revision := w.revision
			w.agents()
			if w.revision != revision {
				continue
			}
			if plan.Wake.IsZero() {
				break
			}
			w.now = plan.Wake
		}
		if w.now.Before(deadline) {
			if n := on(); n > 0 {
				t.Fatalf("%d are left, and the deadline is not awaited", n)
			}
			return
		}
		if n := on(); n > 0 {
			t.Fatalf("%d are left after the deadline", n)
		}
		for key := range w.assignedTo("n0") {
			if id, _, _ := strings.Cut(key, "/"); kinds[id] == pb.WorkloadKind_GLOBAL {
				t.Fatalf("%s is left after the deadline", key)
			}
		}
	})
}

func (w *world) assignedTo(node string) map[string]bool {
	out := map[string]bool{}
	for key, kv := range w.scan(model.AssignmentsPrefix) {
		a := &pb.Assignment{}
		if err := model.Parse(kv, a); err != nil {
			w.t.Fatal(err)
		}
		if a.NodeId == node {
			out[strings.TrimPrefix(key, model.AssignmentsPrefix)] = true
		}
	}
	return out
}
