package docker

import (
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// An engine may note the start of what ends at once later than its end.
func TestAnEndIsNeverBeforeItsStart(t *testing.T) {
	work := agent.Work{Item: &pb.DesiredItem{Assignment: &pb.Assignment{WorkloadId: "web", Generation: 1, WorkloadUid: "u", Revision: "r"}, Spec: &pb.WorkloadSpec{}}}
	in, err := instance(container.InspectResponse{
		ID:     "c1",
		Config: &container.Config{Labels: agent.LabelsOf("c", "n1", work).Map()},
		State:  &container.State{StartedAt: "2026-11-01T10:00:00.002Z", FinishedAt: "2026-11-01T10:00:00.001Z", ExitCode: 7},
	})
	if err != nil {
		t.Fatal(err)
	}
	if in.Phase != agent.Exited || in.Finished.Before(in.Started) {
		t.Errorf("%s, started %s, finished %s", in.Phase, in.Started, in.Finished)
	}
}
