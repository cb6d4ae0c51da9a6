package scheduler

import (
	"fmt"
	"strconv"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// TestOracle holds that exactly as many replicas are placed as fit: on a small
// cluster that is the sum of what each node can take, counted the slow way.
func TestOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		for i := range rapid.IntRange(0, 8).Draw(t, "nodes") {
			id := fmt.Sprintf("n%d", i)
			labels := map[string]string{}
			if rapid.Bool().Draw(t, "labelled") {
				labels["zone"] = rapid.SampledFrom([]string{"eu", "us"}).Draw(t, "zone")
				labels["gen"] = strconv.Itoa(rapid.IntRange(0, 9).Draw(t, "gen"))
			}
			w.node(id, rapid.Int64Range(0, 40).Draw(t, "cpu")*100, rapid.Int64Range(0, 4).Draw(t, "memory")<<30, rapid.Int64Range(0, 4).Draw(t, "disk")<<30,
				labels, rapid.SampledFrom([]pb.WorkloadType{pb.WorkloadType_CONTAINER, pb.WorkloadType_PROCESS}).Draw(t, "runtime"))
			w.changeNode(id, func(n *pb.Node) {
				for i := range rapid.IntRange(0, 3).Draw(t, "gpus") {
					n.Devices = append(n.Devices, &pb.Device{Name: "gpu", Ids: []string{fmt.Sprint(i)}})
				}
				n.StoragePools = []*pb.StoragePool{{Name: "data", CapacityBytes: rapid.Int64Range(1, 4).Draw(t, "data") << 30}}
				if rapid.IntRange(0, 4).Draw(t, "tainted") == 0 {
					n.Taints = []*pb.Taint{{Key: "bad", Effect: pb.TaintEffect(rapid.IntRange(0, 2).Draw(t, "effect"))}}
				}
				if rapid.IntRange(0, 4).Draw(t, "pooled") == 0 {
					n.Pool = "gpu"
				}
			})
			switch rapid.IntRange(0, 6).Draw(t, "state") {
			case 0:
				w.lose(id)
			case 1:
				w.changeNode(id, func(n *pb.Node) { n.Unschedulable = true })
			case 2:
				w.remove(model.NodeLeaseKey(id))
			}
		}
		// What is there already, of which no two are alike.
		for i := range rapid.IntRange(0, 4).Draw(t, "others") {
			w.submit(anySpec(t, fmt.Sprintf("other%d", i)), "v1")
		}
		w.settle(nil)
		spec := anySpec(t, "web")
		room := 0
		for key, kv := range w.scan(model.NodesPrefix) {
			if _, sub, _ := model.SplitKey(model.NodesPrefix, key); sub == "" {
				n := &pb.Node{}
				if err := model.Parse(kv, n); err != nil {
					t.Fatal(err)
				}
				room += roomOn(w, n, spec)
			}
		}
		w.submit(spec, "v1")
		w.settle(nil)
		st := &pb.WorkloadStatus{}
		w.load(model.WorkloadStatusKey("web"), st)
		if want := min(room, int(spec.GetReplicas())); int(st.Assigned) != want {
			t.Fatalf("%d assigned, there is room for %d of %d: %v", st.Assigned, room, spec.GetReplicas(), st)
		}
		if pending := st.State == pb.State_PENDING; pending != (room < int(spec.GetReplicas())) {
			t.Fatalf("room for %d of %d: %v", room, spec.GetReplicas(), st)
		}
	})
}

func anySpec(t *rapid.T, id string) *pb.WorkloadSpec {
	spec := &pb.WorkloadSpec{
		Id: id, Replicas: proto.Int32(rapid.Int32Range(0, 12).Draw(t, "replicas")),
		Resources: &pb.Resources{
			Cpu:    rapid.SampledFrom([]string{"100m", "300m", "1", "2"}).Draw(t, "cpu"),
			Memory: rapid.SampledFrom([]string{"", "256Mi", "1Gi"}).Draw(t, "memory"),
			Disk:   rapid.SampledFrom([]string{"", "100Mi", "1Gi"}).Draw(t, "disk"),
		},
		Placement: &pb.Placement{Policy: pb.PlacementPolicy(rapid.IntRange(0, 1).Draw(t, "policy"))},
	}
	container := &pb.ContainerSpec{}
	switch rapid.IntRange(0, 3).Draw(t, "ports") {
	case 1:
		container.Ports = []*pb.Port{{HostPort: 80}}
	case 2:
		container.Ports = []*pb.Port{{}, {}}
	}
	spec.Spec = &pb.WorkloadSpec_Container{Container: container}
	for range rapid.IntRange(0, 2).Draw(t, "constraints") {
		spec.Placement.Constraints = append(spec.Placement.Constraints, rapid.SampledFrom([]*pb.Constraint{
			{Label: "zone", Values: []string{"eu", "asia"}},
			{Label: "zone", Operator: pb.Constraint_NOT_IN, Values: []string{"eu"}},
			{Label: "zone", Operator: pb.Constraint_EXISTS},
			{Label: "zone", Operator: pb.Constraint_NOT_EXISTS},
			{Label: "gen", Operator: pb.Constraint_GREATER, Values: []string{"4"}},
			{Label: "gen", Operator: pb.Constraint_LESS, Values: []string{"7"}},
		}).Draw(t, "constraint"))
	}
	if rapid.IntRange(0, 2).Draw(t, "geared") == 0 {
		spec.Resources.Devices = []*pb.DeviceRequest{{Name: "gpu", Count: rapid.Int32Range(1, 2).Draw(t, "count")}}
		spec.Resources.Storage = []*pb.StorageRequest{{Size: "1Gi"}}
	}
	spec.Placement.MaxPerNode = rapid.SampledFrom([]int32{0, 0, 1, 3}).Draw(t, "most")
	if rapid.IntRange(0, 2).Draw(t, "tolerant") == 0 {
		spec.Placement.Tolerations = []*pb.Toleration{{Key: "bad"}}
		spec.Placement.Pools = []string{"*"}
	}
	// What is only preferred changes nothing about how many find room.
	if rapid.Bool().Draw(t, "picky") {
		spec.Placement.Spread = []*pb.Spread{{Label: "zone"}, {Label: "gen", Targets: []*pb.SpreadTarget{{Value: "1", Percent: 50}}}}
		spec.Placement.Affinities = []*pb.Affinity{{Label: "zone", Values: []string{"us"}, Weight: proto.Int32(-70)}}
		spec.Placement.WorkloadAffinities = []*pb.WorkloadAffinity{{Workload: "web", Anti: true, Weight: 50}, {Workload: "other0", Topology: "zone", Weight: 10}}
	}
	if rapid.IntRange(0, 4).Draw(t, "named") == 0 {
		spec.Placement.Nodes = []string{"n1", "n3", "n17"}
	}
	return spec
}

// roomOn is how many replicas of spec n can take beside what is assigned to it,
// said in other words than the scheduler's.
func roomOn(w *world, n *pb.Node, spec *pb.WorkloadSpec) int {
	if n.State != pb.NodeState_READY || n.Unschedulable || w.kvs[model.NodeLeaseKey(n.Id)] == nil || n.Runtimes[0].Type != pb.WorkloadType_CONTAINER {
		return 0
	}
	if len(spec.Placement.Nodes) > 0 && n.Id != "n1" && n.Id != "n3" {
		return 0
	}
	zone, zoned := n.Labels["zone"]
	gen, _ := strconv.Atoi(n.Labels["gen"])
	for _, c := range spec.Placement.Constraints {
		ok := map[pb.Constraint_Operator]bool{
			pb.Constraint_IN: zone == "eu", pb.Constraint_NOT_IN: zone != "eu",
			pb.Constraint_EXISTS: zoned, pb.Constraint_NOT_EXISTS: !zoned,
			pb.Constraint_GREATER: zoned && gen > 4, pb.Constraint_LESS: zoned && gen < 7,
		}[c.Operator]
		if !ok {
			return 0
		}
	}
	if n.Pool == "gpu" && len(spec.Placement.Pools) == 0 {
		return 0
	}
	if len(n.Taints) > 0 && n.Taints[0].Effect != pb.TaintEffect_PREFER_NO_SCHEDULE && len(spec.Placement.Tolerations) == 0 {
		return 0
	}
	gpus, data := len(n.Devices), n.StoragePools[0].CapacityBytes
	left := amounts{n.Capacity.CpuMillis, n.Capacity.MemoryBytes, n.Capacity.DiskBytes}
	port80 := false
	for _, kv := range w.scan(model.AssignmentsPrefix) {
		a := &pb.Assignment{}
		if model.Parse(kv, a) != nil || a.NodeId != n.Id {
			continue
		}
		for d, used := range (amounts{a.CpuMillis, a.MemoryBytes, a.DiskBytes}) {
			left[d] -= used
		}
		for _, d := range a.Devices {
			gpus -= len(d.Ids)
		}
		for _, s := range a.Storage {
			data -= s.Bytes
		}
		for _, p := range a.Ports {
			port80 = port80 || p.HostPort == 80
		}
	}
	room := 1 << 30
	c, err := model.ParseResources(spec.Resources)
	if err != nil {
		panic(err)
	}
	for d, each := range (amounts{c.CpuMillis, c.MemoryBytes, c.DiskBytes}) {
		if each > 0 {
			room = min(room, int(max(0, left[d])/each))
		}
	}
	if ports := spec.GetContainer().Ports; len(ports) == 1 {
		room = min(room, 1)
		if port80 {
			room = 0
		}
	}
	if devices := spec.Resources.Devices; len(devices) > 0 {
		room = min(room, gpus/int(devices[0].Count), int(data>>30))
	}
	if most := spec.Placement.MaxPerNode; most > 0 {
		room = min(room, int(most))
	}
	return room
}
