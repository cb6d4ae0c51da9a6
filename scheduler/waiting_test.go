package scheduler

import (
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// TestRoomIsUsedAtOnce holds that after whatever happened, and one decision on it,
// nothing waits for a place while a node has one for it.
func TestRoomIsUsedAtOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		node := func() string { return fmt.Sprintf("n%d", rapid.IntRange(0, 3).Draw(t, "node")) }
		id := func() string { return fmt.Sprintf("w%d", rapid.IntRange(0, 5).Draw(t, "workload")) }
		t.Repeat(map[string]func(*rapid.T){
			"": func(*rapid.T) {
				w.settle(nil)
				w.checkNoneWaitsInVain()
			},
			"node": func(t *rapid.T) {
				if id := node(); w.kvs[model.NodeKey(id)] == nil {
					w.node(id, rapid.Int64Range(1, 3).Draw(t, "cpu")*1000, 4<<30, 4<<30, map[string]string{"zone": "eu"}, pb.WorkloadType_CONTAINER)
				}
			},
			"state": func(t *rapid.T) {
				id := node()
				switch rapid.SampledFrom([]string{"lose", "return", "cordon", "drain", "uncordon", "uncordon", "grow"}).Draw(t, "what") {
				case "lose":
					w.lose(id)
				case "return":
					w.comeBack(id)
				case "cordon":
					w.changeNode(id, func(n *pb.Node) { n.Unschedulable = true })
				case "drain":
					w.changeNode(id, func(n *pb.Node) {
						n.Unschedulable, n.Draining = true, true
						if n.State == pb.NodeState_READY {
							n.State = pb.NodeState_DRAINING
						}
					})
				case "uncordon":
					w.changeNode(id, func(n *pb.Node) {
						n.Unschedulable, n.Draining = false, false
						if n.State == pb.NodeState_DRAINING {
							n.State = pb.NodeState_READY
						}
					})
				case "grow":
					w.changeNode(id, func(n *pb.Node) { n.Capacity.CpuMillis += 700 })
				}
			},
			"submit": func(t *rapid.T) {
				id := id()
				if w.kvs[model.WorkloadKey(id)] == nil {
					w.submit(anyService(t, id), "v1")
				}
			},
			"job": func(t *rapid.T) {
				if w.kvs[model.WorkloadKey("job")] == nil {
					spec := anyService(t, "job")
					spec.Kind = pb.WorkloadKind_JOB
					w.submit(spec, "v1")
				}
			},
			"complete": func(*rapid.T) {
				w.agents()
				for key := range w.scan(model.AssignmentsPrefix + "job/") {
					w.report(key[len(model.AssignmentsPrefix):], pb.State_COMPLETED, nil)
				}
			},
			"scale": func(t *rapid.T) {
				w.changeWorkload(id(), func(rec *pb.Workload) { rec.Spec.Replicas = proto.Int32(rapid.Int32Range(0, 6).Draw(t, "replicas")) })
			},
			"delete": func(*rapid.T) {
				w.changeWorkload(id(), func(rec *pb.Workload) { rec.Spec.DesiredState = pb.DesiredState_DESIRED_DELETED })
			},
			"agents": func(*rapid.T) { w.agents() },
		})
	})
}

// checkNoneWaitsInVain looks at every replica that is to run and of which nothing is
// stored.
func (w *world) checkNoneWaitsInVain() {
	w.t.Helper()
	w.see()
	p := w.picture
	p.index.rebuild(p.nodes)
	for _, id := range sortedKeys(p.workloads) {
		wl := p.workloads[id]
		if wl.want == nil || wl.want.desired != pb.DesiredState_DESIRED_RUNNING {
			continue
		}
		missing := false
		for number := range wl.want.replicas {
			missing = missing || wl.find(number) == nil
		}
		p.prepare(wl.want.shape.filter)
		for _, n := range p.index.slots {
			if missing && n.open() && wl.want.shape.filter.accepts(n) && fits(n, wl.want.shape) {
				w.t.Fatalf("%s waits though %s has room:\n%s", id, n.id, dump(p))
			}
		}
	}
}
