package process

import (
	"os"
	"testing"

	"github.com/persys-dev/persys/agent"
	"github.com/persys-dev/persys/agent/runtimetest"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The test binary is its own supervisor, as persys is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "process-shim" {
		os.Exit(ShimMain(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func open(t *testing.T, node, dir string) *Runtime {
	t.Helper()
	r, err := New(Config{ClusterID: runtimetest.Cluster, NodeID: node, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestConformance(t *testing.T) {
	program, dir := runtimetest.Program(t), t.TempDir()
	runtimetest.Run(t, runtimetest.Harness{
		New: func(t *testing.T, node string) agent.Runtime { return open(t, node, dir) },
		Spec: func(args ...string) *pb.WorkloadSpec {
			return &pb.WorkloadSpec{Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: program, Args: args}}}
		},
		NoProgram: func() *pb.WorkloadSpec {
			return &pb.WorkloadSpec{Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "no-such-program"}}}
		},
		NoLimits: open(t, runtimetest.Node, dir).cgroups.cannot,
	})
}
