package scheduler

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// fleet is a picture of n nodes: three zones, 25 racks, a label of its own on
// each node, two sizes.
func fleet(b testing.TB, n int) *Picture {
	p := NewPicture()
	revision := int64(1)
	for i := range n {
		id := fmt.Sprintf("node-%05d", i)
		rec := &pb.Node{
			Id: id, State: pb.NodeState_READY, LastTransition: timestamppb.New(epoch),
			Labels:   map[string]string{"zone": fmt.Sprintf("z%d", i%3), "rack": fmt.Sprintf("r%d", i%25), "hostname": id},
			Capacity: &pb.NodeCapacity{CpuMillis: 32_000 << (i % 2), MemoryBytes: 128 << 30 << (i % 2), DiskBytes: 1 << 40},
			Runtimes: []*pb.RuntimeInfo{{Type: pb.WorkloadType_CONTAINER, Healthy: true}},
		}
		revision += 2
		feed(b, p, revision-1, model.NodeKey(id), rec)
		feed(b, p, revision, model.NodeLeaseKey(id), &pb.NodeLease{LeaseId: 1})
	}
	return p
}

func feed(b testing.TB, p *Picture, revision int64, key string, m proto.Message) {
	kv := &pb.KeyValue{Key: []byte(key), Value: model.Encode(m), ModRevision: revision, CreateRevision: revision}
	if err := p.Apply([]*pb.KeyEvent{{Kv: kv}}, revision); err != nil {
		b.Fatal(err)
	}
}

func benchSpec(id string, replicas int32, policy pb.PlacementPolicy) *pb.Workload {
	return &pb.Workload{Uid: id, Revision: "v1", Spec: &pb.WorkloadSpec{
		Id: id, Replicas: proto.Int32(replicas), Resources: &pb.Resources{Cpu: "100m", Memory: "256Mi"},
		Placement: &pb.Placement{Policy: policy, Constraints: []*pb.Constraint{
			{Label: "zone", Values: []string{"z0", "z1"}}, {Label: "rack", Operator: pb.Constraint_NOT_IN, Values: []string{"r7"}},
		}},
		Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "i"}},
	}}
}

// place decides until everything is placed and answers with the number of
// placements; the steps are assumed, as a leader does.
func place(p *Picture) int {
	placed := 0
	for {
		plan := Decide(p, epoch, Options{})
		if len(plan.Steps) == 0 {
			return placed
		}
		for i := range plan.Steps {
			placed += len(plan.Steps[i].effects)
			p.Assume(plan.Steps[i])
		}
	}
}

// BenchmarkPlace is Decide alone, with Assume: 100,000 replicas with two
// constraints, of workloads of 1,000, on so many nodes.
func BenchmarkPlace(b *testing.B) {
	for _, policy := range []pb.PlacementPolicy{pb.PlacementPolicy_SPREAD, pb.PlacementPolicy_BIN_PACK} {
		for _, nodes := range []int{100, 1_000, 10_000} {
			// As many as fit on the smaller fleets.
			total := min(100_000, nodes*200)
			for _, each := range []int{1, 1000} {
				b.Run(fmt.Sprintf("%s/nodes=%d/placements=%d/each=%d", policy, nodes, total, each), func(b *testing.B) {
					placed := 0
					var busy time.Duration
					for range b.N {
						b.StopTimer()
						p := fleet(b, nodes)
						for i := range total / each {
							id := fmt.Sprintf("w%06d", i)
							feed(b, p, p.Revision()+1, model.WorkloadKey(id), benchSpec(id, int32(each), policy))
						}
						b.StartTimer()
						before := cpuTime(b)
						placed += place(p)
						busy += cpuTime(b) - before
						if placed%total != 0 {
							b.Fatalf("%d of %d placed", placed, total)
						}
					}
					b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(placed), "ns/placement")
					b.ReportMetric(float64(busy.Nanoseconds())/float64(placed), "cpu-ns/placement")
					b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1e6, "ms/all")
				})
			}
		}
	}
}

// BenchmarkSpread is Decide alone with soft spread over racks. "racks" is beside
// it without the spread, "constraints" with two constraints on a larger fleet, and
// "hostname" spreads over a label whose value is another one on each node.
func BenchmarkSpread(b *testing.B) {
	over := func(labels ...string) *pb.Placement {
		placement := &pb.Placement{}
		for _, label := range labels {
			placement.Spread = append(placement.Spread, &pb.Spread{Label: label})
		}
		return placement
	}
	constrained := func(labels ...string) *pb.Placement {
		placement := over(labels...)
		placement.Constraints = benchSpec("", 1, 0).Spec.Placement.Constraints
		return placement
	}
	for _, c := range []struct {
		name               string
		nodes, total, each int
		placement          *pb.Placement
	}{
		{"racks", 1_000, 600, 600, over("rack")},
		{"without", 1_000, 600, 600, over()},
		{"skew", 1_000, 600, 600, &pb.Placement{Spread: []*pb.Spread{{Label: "rack", MaxSkew: 1}}}},
		{"constraints", 10_000, 100_000, 1000, constrained("rack")},
		{"constraints-without", 10_000, 100_000, 1000, constrained()},
		{"constraints-small", 1_000, 100_000, 1000, constrained("rack")},
		{"constraints-each", 10_000, 100_000, 1, constrained("rack")},
		{"two", 10_000, 100_000, 1000, constrained("zone", "rack")},
		{"hostname", 10_000, 100_000, 1000, constrained("hostname")},
	} {
		b.Run(fmt.Sprintf("%s/nodes=%d/placements=%d/each=%d", c.name, c.nodes, c.total, c.each), func(b *testing.B) {
			placed := 0
			var busy time.Duration
			for range b.N {
				b.StopTimer()
				p := fleet(b, c.nodes)
				for i := range c.total / c.each {
					id := fmt.Sprintf("w%06d", i)
					w := benchSpec(id, int32(c.each), pb.PlacementPolicy_SPREAD)
					w.Spec.Placement = c.placement
					feed(b, p, p.Revision()+1, model.WorkloadKey(id), w)
				}
				b.StartTimer()
				before := cpuTime(b)
				placed += place(p)
				busy += cpuTime(b) - before
			}
			if placed != b.N*c.total {
				b.Fatalf("%d of %d placed", placed, b.N*c.total)
			}
			b.ReportMetric(float64(busy.Nanoseconds())/float64(placed), "cpu-ns/placement")
			b.ReportMetric(float64(busy.Nanoseconds())/float64(b.N)/1e6, "cpu-ms/all")
		})
	}
}

// cpuTime is what the process has used, garbage collection included: on a
// machine that has other work it says more than the clock.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkNothing is Decide on a large picture in which nothing has changed.
func BenchmarkNothing(b *testing.B) {
	p := fleet(b, 10_000)
	feed(b, p, p.Revision()+1, model.WorkloadKey("web"), benchSpec("web", 1000, pb.PlacementPolicy_SPREAD))
	place(p)
	b.ReportAllocs()
	for b.Loop() {
		if plan := Decide(p, epoch.Add(time.Second), Options{}); len(plan.Steps) != 0 {
			b.Fatal("something to do")
		}
	}
}

// BenchmarkPreempt is Decide alone, with Assume, where all nodes are full of work of
// a low priority: 1,000 replicas that have to be made room for, or for which none can
// be made; the latter also where it matters what else each node has.
func BenchmarkPreempt(b *testing.B) {
	for _, nodes := range []int{100, 1_000, 10_000} {
		for _, c := range []struct {
			name               string
			hopeless, choosier bool
		}{{"hopeless=false", false, false}, {"hopeless=true", true, false}, {"hopeless=true/max_per_node", true, true}} {
			b.Run(fmt.Sprintf("nodes=%d/%s", nodes, c.name), func(b *testing.B) {
				hopeless := c.hopeless
				p := fleet(b, nodes)
				fill(b, p, nodes)
				var busy time.Duration
				for i := range b.N {
					id := fmt.Sprintf("high%d", i)
					want := benchSpec(id, 1000, pb.PlacementPolicy_SPREAD)
					want.Spec.Priority, want.Spec.Resources.Cpu = proto.Int32(60), "8"
					if hopeless {
						want.Spec.Resources.Cpu = "100"
					}
					if c.choosier {
						want.Spec.Placement.MaxPerNode = 1
					}
					feed(b, p, p.Revision()+1, model.WorkloadKey(id), want)
					before := cpuTime(b)
					plan := Decide(p, epoch, Options{})
					busy += cpuTime(b) - before
					effects := 0
					for _, s := range plan.Steps {
						effects += len(s.effects)
					}
					if (effects > 0) == hopeless {
						b.Fatalf("%d replicas are touched", effects)
					}
					want.Spec.DesiredState = pb.DesiredState_DESIRED_STOPPED
					feed(b, p, p.Revision()+1, model.WorkloadKey(id), want)
				}
				b.ReportMetric(float64(busy.Nanoseconds())/float64(b.N)/1e6, "cpu-ms/decision")
			})
		}
	}
}

// fill assigns 32 replicas of a low priority to each node, which have all of it.
func fill(b *testing.B, p *Picture, nodes int) {
	low := benchSpec("low", int32(nodes*32), pb.PlacementPolicy_SPREAD)
	low.Spec.Priority, low.Spec.Placement.Constraints = proto.Int32(10), nil
	feed(b, p, p.Revision()+1, model.WorkloadKey("low"), low)
	for n := range nodes {
		for i := range 32 {
			number := int32(n*32 + i)
			feed(b, p, p.Revision()+1, model.AssignmentKey("low", number), &pb.Assignment{
				WorkloadId: "low", Replica: number, NodeId: fmt.Sprintf("node-%05d", n), Generation: 1, Revision: "v1", WorkloadUid: "low",
				Type: pb.WorkloadType_CONTAINER, CpuMillis: 1000 << (n % 2), MemoryBytes: 1 << 30,
			})
			feed(b, p, p.Revision()+1, model.ReplicaKey("low", number), &pb.Replica{
				WorkloadId: "low", Replica: number, NodeId: fmt.Sprintf("node-%05d", n), Generation: 1, State: pb.State_RUNNING,
			})
		}
	}
}
