package cli

import (
	"bytes"
	"strings"
	"testing"

	"github.com/persys-dev/persys/internal/sim"
)

func TestSimRefuses(t *testing.T) {
	u := newUser(t)
	for line, says := range map[string]string{
		"--scenario chaos":                  "submit-many",
		"--nodes 0":                         "nodes: 0",
		"--workloads 2000":                  "at most one workload for each replica",
		"--scenario agent-loss --lose 100":  "allowed: 1 to 99",
		"--nodes 100000000":                 "raise the limit",
		"-f ../../examples":                 "one service is simulated",
		"-f /nowhere.yaml":                  "no such file",
		"--servers 1 --scenario leader-and": "allowed: submit",
	} {
		if r := u.types(append([]string{"sim"}, strings.Fields(line)...)...); r.code != exitUsage || !strings.Contains(r.errors, says) {
			t.Errorf("%s: %+v", line, r)
		}
	}
}

func TestSimReport(t *testing.T) {
	report := &sim.Report{
		Scenario: sim.AgentLoss, Servers: 3, Nodes: 100, Workloads: 1, Replicas: 5000, IdleEntries: 1,
		Phases: []*sim.Phase{
			{Name: "all placed", Seconds: 0.6897, Count: 5000, PerSecond: 7250, ServersCPU: 0.37, AgentsCPU: 0.96},
			{Name: sim.Idle, Seconds: 5},
			{Name: "told to its agent", Count: 5000, P50: 0.3079, P99: 0.6812, Max: 71},
		},
		Processes: []sim.Process{{Name: "server s1", Lost: true}, {Name: "agents", Memory: 100 << 20, PeakMemory: 112 << 20, CPU: 1.88}},
	}
	var b strings.Builder
	for _, format := range []string{"table", "json", "yaml"} {
		var out bytes.Buffer
		printer, err := newPrinter(format, &out, &out, false)
		if err != nil {
			t.Fatal(err)
		}
		a := &app{Env: Env{Stdout: &out}, out: printer}
		if err := a.simReport(report); err != nil {
			t.Fatal(err)
		}
		b.WriteString(out.String() + "\n")
	}
	golden(t, "sim.txt", b.String())
}
