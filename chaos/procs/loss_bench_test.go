package procs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// lossReplicas run on the agent that is killed.
const lossReplicas = 20

// BenchmarkAgentLost kills an agent that runs all replicas of a service, and
// measures how long it takes until all of them are reported running elsewhere;
// alone, and together with the leader. Run it with -benchtime=5x.
func BenchmarkAgentLost(b *testing.B) {
	b.Run("alone", func(b *testing.B) { benchmarkAgentLost(b, false) })
	b.Run("with-leader", func(b *testing.B) { benchmarkAgentLost(b, true) })
}

func benchmarkAgentLost(b *testing.B, withLeader bool) {
	c := New(b, program)
	servers := map[string]*Process{"s1": c.Init("s1")}
	servers["s2"], servers["s3"] = c.Join("server", "s2"), c.Join("server", "s3")
	c.Eventually("three voters", soon, func() error { return c.voters(3) })
	agents := map[string]*Process{}
	for _, name := range []string{"a1", "a2"} {
		agents[name] = c.Join("agent", name, "--docker-host", "none")
	}
	c.Eventually("two nodes are ready", soon, func() error { return c.readyNodes(2) })
	clients := map[string]pb.WorkloadsClient{}
	for name, s := range servers {
		clients[name] = c.workloads(s)
	}
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	_, err := clients["s1"].ApplyWorkload(ctx, &pb.ApplyWorkloadRequest{Spec: &pb.WorkloadSpec{
		Id: "work", Replicas: proto.Int32(lossReplicas), Resources: &pb.Resources{Cpu: "1m"},
		Placement: &pb.Placement{Policy: pb.PlacementPolicy_BIN_PACK},
		Spec:      &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "sleep", Args: []string{"1000000"}}},
	}})
	if err != nil {
		b.Fatal(err)
	}
	var took []time.Duration
	for b.Loop() {
		victim := c.gather(clients, agents)
		leader := c.leader()
		started := time.Now()
		agents[victim].Kill()
		if withLeader {
			servers[leader].Kill()
		}
		c.Eventually("all of it runs elsewhere", 2*afterLoss, func() error { return runsBeside(clients, victim) })
		took = append(took, time.Since(started))
		agents[victim].Start()
		if withLeader {
			servers[leader].Start()
			c.Eventually(leader+" is back", soon, func() error { return c.caughtUp(leader) })
		}
		c.Eventually("both nodes are ready", afterLoss, func() error { return c.readyNodes(2) })
	}
	slices.Sort(took)
	b.ReportMetric(took[len(took)/2].Seconds(), "p50-s")
	b.ReportMetric(took[len(took)-1].Seconds(), "max-s")
	b.ReportMetric(0, "ns/op")
}

// gather has all replicas on one node and names it.
func (c *Cluster) gather(clients map[string]pb.WorkloadsClient, agents map[string]*Process) string {
	c.t.Helper()
	var home string
	c.Eventually("the work is placed", soon, func() error {
		w, err := askAny(clients)
		if err == nil && len(w.Replicas) == 0 {
			err = errors.New("nothing is placed yet")
		}
		if err == nil {
			home = w.Replicas[0].NodeId
		}
		return err
	})
	for name := range agents {
		if name == home {
			continue
		}
		c.Must("node", "drain", name)
		c.Eventually("nothing runs on "+name, soon, func() error { return runsBeside(clients, name) })
		c.Must("node", "uncordon", name)
	}
	return home
}

// runsBeside reports whether all replicas run on other nodes than this one.
func runsBeside(clients map[string]pb.WorkloadsClient, node string) error {
	w, err := askAny(clients)
	if err != nil {
		return err
	}
	running := 0
	for _, r := range w.Replicas {
		if r.State == pb.State_RUNNING && r.NodeId != node {
			running++
		}
	}
	if running != lossReplicas {
		return fmt.Errorf("%d of %d run elsewhere than on %s", running, lossReplicas, node)
	}
	return nil
}

// askAny asks one server after another for the workload.
func askAny(clients map[string]pb.WorkloadsClient) (w *pb.Workload, err error) {
	err = errors.New("no server")
	for _, client := range clients {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		w, err = client.GetWorkload(ctx, &pb.GetWorkloadRequest{Id: "work"})
		cancel()
		if err == nil {
			return w, nil
		}
	}
	return nil, err
}
