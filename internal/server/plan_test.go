package server

import (
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// A plan says where replicas would go, and leaves everything as it is, the picture
// that decides included.
func TestPlanChangesNothing(t *testing.T) {
	c := newTestCluster(t)
	s1 := c.init("s1")
	c.join(pb.Role_ROLE_AGENT, "n1")
	c.nodeState(s1, "n1", pb.NodeState_READY)
	r := s1.replica.Load()
	before := r.store.View()
	spec := &pb.WorkloadSpec{Id: "web", Replicas: proto.Int32(2), Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "sleep", Args: []string{"60"}}}}
	plan, err := r.gateway.PlanWorkload(t.Context(), &pb.ApplyWorkloadRequest{Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	if plan.Outcome != pb.ApplyWorkloadResponse_CREATED || plan.Revision == "" || len(plan.Changes) == 0 || len(plan.Pending) != 0 {
		t.Errorf("plan %v", plan)
	}
	var placed []string
	for _, p := range plan.Placements {
		placed = append(placed, fmt.Sprintf("%s/%d %s %s", p.WorkloadId, p.Replica, p.Action, p.NodeId))
	}
	if fmt.Sprint(placed) != "[web/0 PLACE n1 web/1 PLACE n1]" {
		t.Errorf("placements %q", placed)
	}
	after := r.store.View()
	if after.Revision() != before.Revision() || after.Hash() != before.Hash() {
		t.Errorf("revision %d became %d", before.Revision(), after.Revision())
	}
	if _, ok := r.picture.explain("web"); ok {
		t.Error("the picture knows the workload")
	}
	if _, ok := after.Get(model.WorkloadKey("web")); ok {
		t.Error("the workload is stored")
	}
	spec.Resources = &pb.Resources{Cpu: "1000"}
	plan, err = r.gateway.PlanWorkload(t.Context(), &pb.ApplyWorkloadRequest{Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Placements) != 2 || plan.Placements[0].Action != pb.PlannedChange_WAIT || len(plan.Pending) == 0 {
		t.Errorf("plan without room: %v", plan)
	}
}
