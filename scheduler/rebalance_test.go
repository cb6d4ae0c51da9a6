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

// TestRebalance makes clusters uneven and lets them even out: never more moves in
// an interval than allowed, whoever leads; never a node over its capacity or against
// a constraint; no replica twice in a row between two nodes; and an end, after which
// no move would be an improvement.
func TestRebalance(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		m := &machine{world: w, t: t}
		config := &pb.SchedulerConfig{
			Rebalance: true, RebalanceMoves: rapid.Int32Range(1, 6).Draw(t, "moves"),
			RebalanceIntervalSeconds: rapid.Int32Range(10, 600).Draw(t, "interval"), RebalanceThreshold: rapid.Int32Range(1, 40).Draw(t, "threshold"),
		}
		nodes := rapid.IntRange(2, 8).Draw(t, "nodes")
		add := func(i int) {
			w.node(fmt.Sprintf("n%d", i), rapid.Int64Range(2, 8).Draw(t, "cpu")*1000, rapid.Int64Range(2, 8).Draw(t, "memory")<<30, 1<<40,
				map[string]string{"zone": rapid.SampledFrom([]string{"eu", "us"}).Draw(t, "zone")}, pb.WorkloadType_CONTAINER)
		}
		early := rapid.IntRange(1, nodes).Draw(t, "early")
		for i := range early {
			add(i)
		}
		for i := range rapid.IntRange(1, 8).Draw(t, "workloads") {
			w.submit(anyService(t, fmt.Sprintf("w%d", i)), "v1")
			w.settle(nil)
		}
		w.rest(t)
		for i := early; i < nodes; i++ {
			add(i)
		}
		for i := range 8 {
			if id := fmt.Sprintf("w%d", i); rapid.IntRange(0, 3).Draw(t, "gone") == 0 {
				w.changeWorkload(id, func(rec *pb.Workload) { rec.Spec.DesiredState = pb.DesiredState_DESIRED_DELETED })
			}
		}
		w.rest(t)
		w.put(model.SchedulerKey, config)
		var moves []time.Time
		each := func(p *Plan) {
			for i := range p.Steps {
				m.checkPlacements(p.Steps[i].Txn)
				for _, op := range p.Steps[i].Txn.Success {
					if put := op.GetRequestPut(); put != nil && strings.HasPrefix(string(put.Key), model.AssignmentsPrefix) {
						moves = append(moves, w.now)
					}
				}
			}
			// Another leader knows as much.
			w.picture = w.rebuilt()
			w.unseen = nil
		}
		for range 1000 {
			plan := w.settle(each)
			within := 0
			for _, at := range moves {
				if w.now.Sub(at) < time.Duration(config.RebalanceIntervalSeconds)*time.Second {
					within++
				}
			}
			if within > int(config.RebalanceMoves) {
				t.Fatalf("%d moves within an interval; allowed are %d", within, config.RebalanceMoves)
			}
			before := w.revision
			w.agents()
			if w.revision != before {
				continue
			}
			if plan.Wake.IsZero() {
				w.checkEven(config)
				return
			}
			w.now = plan.Wake
		}
		t.Fatalf("after %d moves it goes on", len(moves))
	})
}

func anyService(t *rapid.T, id string) *pb.WorkloadSpec {
	spec := &pb.WorkloadSpec{
		Id: id, Replicas: proto.Int32(rapid.Int32Range(1, 6).Draw(t, "replicas")), Exclusive: rapid.IntRange(0, 5).Draw(t, "exclusive") == 0,
		Resources: &pb.Resources{Cpu: rapid.SampledFrom([]string{"", "100m", "400m", "900m"}).Draw(t, "cpu"), Memory: rapid.SampledFrom([]string{"", "200Mi", "1Gi"}).Draw(t, "memory")},
		Placement: &pb.Placement{Policy: pb.PlacementPolicy(rapid.SampledFrom([]int32{0, 0, 0, 1}).Draw(t, "policy"))},
		Update:    &pb.UpdateStrategy{MaxParallel: rapid.Int32Range(0, 3).Draw(t, "parallel")},
		Spec:      &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "v1"}},
	}
	if rapid.IntRange(0, 3).Draw(t, "constrained") == 0 {
		spec.Placement.NodeLabels = map[string]string{"zone": "eu"}
	}
	if rapid.IntRange(0, 5).Draw(t, "port") == 0 {
		spec.GetContainer().Ports = []*pb.Port{{HostPort: 80, ContainerPort: 80}}
	}
	return spec
}

// rest lets agents and the scheduler work until nothing happens any more.
func (w *world) rest(t *rapid.T) {
	for range 200 {
		plan := w.settle(nil)
		before := w.revision
		if w.agents(); w.revision != before {
			continue
		}
		if plan.Wake.IsZero() {
			return
		}
		w.now = plan.Wake
	}
	t.Fatal("no rest")
}

// checkEven holds that no single move of a replica that may be moved would make a
// node that is fuller by the threshold and the one that it goes to less full than
// that was, as long as nothing keeps the scheduler from moving at all.
func (w *world) checkEven(config *pb.SchedulerConfig) {
	t := w.t
	w.see()
	p := w.picture
	if len(p.waiting.list) > 0 {
		return
	}
	p.index.rebuild(p.nodes)
	for _, from := range p.index.slots {
		for _, r := range from.assigned {
			if !movable(r) {
				continue
			}
			shape := r.w.want.shape
			p.prepare(shape.filter)
			holds := func(n *node) (count int) {
				for _, other := range r.w.replicas {
					if other.assignment.node == n {
						count++
					}
				}
				return count
			}
			var without amounts
			for d, n := range shape.needs {
				without[d] = -n
			}
			was := from.fullness()
			for _, n := range p.index.slots {
				if n != from && n.open() && shape.filter.accepts(n) && fits(n, shape) && holds(n) < holds(from) &&
					was-n.fullness() >= int64(config.RebalanceThreshold)*fine/100 && from.share(&without, fine) < was && n.share(&shape.needs, fine) < was {
					t.Fatalf("%s/%d would be better on %s than on %s:\n%s", r.w.id, r.number, n.id, from.id, dump(p))
				}
			}
		}
	}
}
