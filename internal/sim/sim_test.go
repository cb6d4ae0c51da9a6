package sim

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func testConfig(t *testing.T) Config {
	return Config{
		Dir: t.TempDir(), Scenario: Submit, Servers: 3, Nodes: 4, Replicas: 10, Workloads: 3, Callers: 2, Lose: 1, LeaseTTL: 2 * time.Second,
		Progress: t.Logf,
		Template: &pb.WorkloadSpec{
			Id: "sim", Resources: &pb.Resources{Cpu: "100m"}, Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "simulated"}},
		},
	}
}

// TestLeaderAndAgentLoss runs the scenario that has everything in it.
func TestLeaderAndAgentLoss(t *testing.T) {
	if testing.Short() {
		t.Skip("starts three servers")
	}
	c := testConfig(t)
	c.Program = filepath.Join(t.TempDir(), "persys")
	if out, err := exec.Command("go", "build", "-o", c.Program, "../../cmd/persys").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	c.Scenario, c.REST, c.Idle = LeaderAndAgentLoss, true, time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	r, err := Run(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range r.Phases {
		names = append(names, p.Name)
		if p.Seconds < 0 || p.P50 < 0 || p.Max > 120 {
			t.Errorf("%+v", p)
		}
	}
	if len(names) != 9 || r.IdleRevisions != 0 {
		t.Errorf("phases %q, %d revisions while idle", names, r.IdleRevisions)
	}
	lost := 0
	for _, p := range r.Processes {
		if p.Lost {
			lost++
		} else if p.Memory == 0 || p.CPU == 0 {
			t.Errorf("%+v", p)
		}
	}
	if lost != 1 || len(r.Processes) != c.Servers+1 {
		t.Errorf("processes %+v", r.Processes)
	}
	if left, _ := filepath.Glob(filepath.Join(c.Dir, "*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestCheck(t *testing.T) {
	for what, change := range map[string]func(*Config){
		"no nodes":             func(c *Config) { c.Nodes = 0 },
		"too many workloads":   func(c *Config) { c.Workloads = 11 },
		"all agents lost":      func(c *Config) { c.Scenario, c.Lose = AgentLoss, 4 },
		"leader of one server": func(c *Config) { c.Scenario, c.Servers = LeaderAndAgentLoss, 1 },
		"more than files":      func(c *Config) { c.Nodes = 1 << 30 },
	} {
		c := testConfig(t)
		if err := c.Check(); err != nil {
			t.Fatal(err)
		}
		if change(&c); c.Check() == nil {
			t.Errorf("%s: not refused", what)
		}
	}
}

func TestWorkloadsShareTheReplicas(t *testing.T) {
	c := testConfig(t)
	var sum int32
	for i := range c.Workloads {
		sum += *c.workload(i).Replicas
	}
	if sum != int32(c.Replicas) {
		t.Errorf("%d replicas, want %d", sum, c.Replicas)
	}
}
