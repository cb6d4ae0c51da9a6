package scheduler

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// placements is what is assigned, by the key without its prefix.
func (w *world) placements() map[string]*pb.Assignment {
	all := map[string]*pb.Assignment{}
	for key := range w.scan(model.AssignmentsPrefix) {
		a := &pb.Assignment{}
		w.load(key, a)
		all[strings.TrimPrefix(key, model.AssignmentsPrefix)] = a
	}
	return all
}

func (w *world) priority(id string) int32 {
	rec := &pb.Workload{}
	w.load(model.WorkloadKey(id), rec)
	if rec.Spec.GetPriority() == 0 && rec.Spec != nil && rec.Spec.Priority == nil {
		return defaultPriority
	}
	return rec.Spec.GetPriority()
}

// checkVictims holds of a step that was carried out that it took the room of
// others only where that is allowed, where it put something itself, and no more of
// it than it had to.
func (w *world) checkVictims(step Step, before map[string]*pb.Assignment) {
	w.t.Helper()
	after := w.placements()
	newcomer, cfg := &pb.Workload{}, &pb.SchedulerConfig{}
	w.load(model.WorkloadKey(step.Workload), newcomer)
	w.load(model.SchedulerKey, cfg)
	for _, key := range sortedKeys(before) {
		a := before[key]
		if after[key] != nil || a.WorkloadId == step.Workload {
			continue
		}
		victim := &pb.Workload{}
		w.load(model.WorkloadKey(a.WorkloadId), victim)
		switch {
		case w.priority(a.WorkloadId) > w.priority(step.Workload)-10:
			w.t.Fatalf("%s of priority %d had to make room for %s of %d", key, w.priority(a.WorkloadId), step.Workload, w.priority(step.Workload))
		case victim.Spec.Preemption.GetProtected() || newcomer.Spec.Preemption.GetNeverPreempts() || cfg.NoPreemption:
			w.t.Fatalf("%s had to make room for %s: %v, %v, %v", key, step.Workload, victim.Spec.Preemption, newcomer.Spec.Preemption, cfg)
		}
		came := false
		for _, name := range sortedKeys(after) {
			b := after[name]
			came = came || b.WorkloadId == step.Workload && b.NodeId == a.NodeId && (before[name] == nil || before[name].Generation != b.Generation)
		}
		if !came {
			w.t.Fatalf("%s had to go from %s, and nothing of %s came", key, a.NodeId, step.Workload)
		}
	}
}

// TestPreemptionOracle compares with all that could be done on small clusters: a
// replica finds a place if taking away some of what may be taken away on some node
// makes room, and no set of victims does with less than those that are taken.
func TestPreemptionOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		for i := range rapid.IntRange(1, 4).Draw(t, "nodes") {
			w.node(fmt.Sprintf("n%d", i), rapid.Int64Range(1, 8).Draw(t, "cpu")*500, rapid.Int64Range(1, 4).Draw(t, "memory")<<30, 1<<40,
				map[string]string{"zone": rapid.SampledFrom([]string{"eu", "us"}).Draw(t, "zone")}, pb.WorkloadType_CONTAINER)
		}
		spec := func(id string, priorities ...int32) *pb.WorkloadSpec {
			s := &pb.WorkloadSpec{
				Id: id, Replicas: proto.Int32(rapid.Int32Range(1, 4).Draw(t, "replicas")), Placement: &pb.Placement{},
				Priority: proto.Int32(rapid.SampledFrom(priorities).Draw(t, "priority")),
				Resources: &pb.Resources{
					Cpu: rapid.SampledFrom([]string{"", "500m", "1", "2"}).Draw(t, "cpu"), Memory: rapid.SampledFrom([]string{"", "512Mi", "2Gi"}).Draw(t, "memory"),
				},
			}
			container := &pb.ContainerSpec{}
			if rapid.IntRange(0, 3).Draw(t, "port") == 0 {
				container.Ports = []*pb.Port{{HostPort: 80, HostIp: rapid.SampledFrom([]string{"", "127.0.0.1", "127.0.0.2"}).Draw(t, "ip")}}
			}
			if rapid.IntRange(0, 2).Draw(t, "constrained") == 0 {
				s.Placement.NodeLabels = map[string]string{"zone": "eu"}
			}
			s.Spec = &pb.WorkloadSpec_Container{Container: container}
			return s
		}
		for i := range rapid.IntRange(0, 5).Draw(t, "others") {
			s := spec(fmt.Sprintf("other%d", i), 0, 30, 41, 50)
			// They do not disturb each other while they come.
			s.Preemption = &pb.Preemption{NeverPreempts: true, Protected: rapid.IntRange(0, 4).Draw(t, "protected") == 0}
			w.submit(s, "v1")
		}
		w.settle(nil)
		s := spec("new", 50, 60)
		s.Replicas = proto.Int32(1)
		before := w.placements()
		least, possible := w.leastVictims(s, before)
		w.submit(s, "v1")
		w.see()
		plan := Decide(w.picture, w.now, w.opt)
		for i := range plan.Steps {
			w.apply(plan.Steps[i].Txn)
			w.check()
			if plan.Steps[i].Workload == "new" {
				w.checkVictims(plan.Steps[i], before)
			}
		}
		after := w.placements()
		if placed := after["new/000000"] != nil; placed != possible {
			t.Fatalf("placed: %v; possible: %v", placed, possible)
		}
		gone := 0
		for _, key := range sortedKeys(before) {
			if after[key] == nil {
				gone++
			}
		}
		if possible && (gone > 0) != (least > 0) {
			t.Fatalf("%d victims, %d would do", gone, least)
		}
		// Nothing of what had to go could have stayed.
		if a := after["new/000000"]; gone > 0 {
			for _, key := range sortedKeys(before) {
				if after[key] == nil && w.roomFor(s, a.NodeId, after, before[key]) {
					t.Fatalf("%s need not have gone", key)
				}
			}
		}
		w.settle(nil) // It comes to an end.
	})
}

// roomFor reports whether a replica of spec fits on a node beside what is assigned
// there, without its own, and one more.
func (w *world) roomFor(spec *pb.WorkloadSpec, id string, all map[string]*pb.Assignment, more *pb.Assignment) bool {
	n := &pb.Node{}
	w.load(model.NodeKey(id), n)
	c, err := model.ParseResources(spec.Resources)
	if err != nil {
		w.t.Fatal(err)
	}
	left := amounts{n.Capacity.CpuMillis - c.CpuMillis, n.Capacity.MemoryBytes - c.MemoryBytes, n.Capacity.DiskBytes - c.DiskBytes}
	wanted := usedPorts(spec.GetContainer().Ports)
	there := []*pb.Assignment{more}
	for _, key := range sortedKeys(all) {
		if all[key].NodeId == id && all[key].WorkloadId != spec.Id {
			there = append(there, all[key])
		}
	}
	for _, a := range there {
		if a == nil {
			continue
		}
		for d, used := range (amounts{a.CpuMillis, a.MemoryBytes, a.DiskBytes}) {
			left[d] -= used
		}
		for _, u := range usedPorts(a.Ports) {
			for _, v := range wanted {
				if u.conflicts(v) {
					return false
				}
			}
		}
	}
	needs := amounts{c.CpuMillis, c.MemoryBytes, c.DiskBytes}
	for d := range left {
		if needs[d] > 0 && left[d] < 0 {
			return false
		}
	}
	return spec.Placement.NodeLabels["zone"] == "" || n.Labels["zone"] == "eu"
}

// leastVictims tries all sets of what may make room for a replica of spec.
func (w *world) leastVictims(spec *pb.WorkloadSpec, before map[string]*pb.Assignment) (least int, possible bool) {
	for key := range w.scan(model.NodesPrefix) {
		id, sub, _ := model.SplitKey(model.NodesPrefix, key)
		if sub != "" {
			continue
		}
		var may []string
		for _, name := range sortedKeys(before) {
			rec := &pb.Workload{}
			w.load(model.WorkloadKey(before[name].WorkloadId), rec)
			if before[name].NodeId == id && rec.Spec.GetPriority() <= spec.GetPriority()-10 && !rec.Spec.Preemption.GetProtected() {
				may = append(may, name)
			}
		}
		for set := range 1 << len(may) {
			left, gone := map[string]*pb.Assignment{}, 0
			for name, a := range before {
				left[name] = a
			}
			for i, name := range may {
				if set&(1<<i) != 0 {
					delete(left, name)
					gone++
				}
			}
			if w.roomFor(spec, id, left, nil) && (!possible || gone < least) {
				least, possible = gone, true
			}
		}
	}
	return least, possible
}
