package cli

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestExplainNode(t *testing.T) {
	now := time.Date(2026, 11, 2, 12, 0, 0, 0, time.UTC)
	capacity := &pb.NodeCapacity{CpuMillis: 4000, MemoryBytes: 8 << 30, DiskBytes: 100 << 30}
	for _, x := range []struct {
		node *pb.Node
		says []string
	}{
		{&pb.Node{State: pb.NodeState_READY}, []string{"nothing keeps work away"}},
		{&pb.Node{State: pb.NodeState_NOT_READY, LastTransition: timestamppb.New(now)}, []string{"does not answer", "since 12:00:00"}},
		{&pb.Node{State: pb.NodeState_DRAINING, Assignments: 2, DrainDeadline: timestamppb.New(now)}, []string{"drained", "2 replicas left", "by 12:00:00", "uncordon n1"}},
		{&pb.Node{State: pb.NodeState_READY, Unschedulable: true}, []string{"cordoned"}},
		{
			&pb.Node{State: pb.NodeState_READY, Runtimes: []*pb.RuntimeInfo{{Type: pb.WorkloadType_CONTAINER, Name: "docker", Message: "no socket"}}},
			[]string{"no work of type container: docker is not healthy: no socket"},
		},
		{
			&pb.Node{State: pb.NodeState_READY, Pool: "gpu", Taints: []*pb.Taint{{Key: "a", Value: "b"}}, UserTaints: []*pb.Taint{{Key: "c", Effect: pb.TaintEffect_NO_EXECUTE}}},
			[]string{"a=b: no new work", "c: no new work comes, and what runs", "pool gpu"},
		},
	} {
		x.node.Id, x.node.Capacity, x.node.Reserved = "n1", capacity, &pb.NodeCapacity{CpuMillis: 1500}
		text := strings.Join(explainNode(x.node, now), "\n")
		for _, want := range append(x.says, "free: cpu 2.5 of 4, memory 8Gi of 8Gi, disk 100Gi of 100Gi") {
			if !strings.Contains(text, want) {
				t.Errorf("%q is missing in\n%s", want, text)
			}
		}
	}
}
