package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/persys-dev/persys/internal/sim"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// How long a simulation may take unless --timeout says otherwise.
const simTimeout = 15 * time.Minute

func (a *app) simCommand() *cobra.Command {
	var c sim.Config
	var template string
	cmd := &cobra.Command{
		Use: "sim", Short: "Simulate a large cluster on this machine, and measure it", Args: takes(""),
		Long: `Starts servers as processes of this machine, with real raft, files and
certificates, and attaches real agents to them that only pretend to run work.
Submits workloads, takes agents and the leader away where the scenario says so,
prints how long everything took and what it cost, and removes all of it.

  submit                  workloads are submitted; they run
  submit-many             as many workloads as replicas, one each
  agent-loss              … and then agents are lost; their work moves
  leader-and-agent-loss   … and the leader is killed at the same moment`,
		Example: "  persys sim --nodes 1000 --replicas 5000\n  persys sim --scenario leader-and-agent-loss --lose 3 -o json",
		// Nothing of it concerns a cluster that exists.
		Annotations: map[string]string{onMachine: "yes", endless: "yes"},
	}
	f := cmd.Flags()
	f.StringVar(&c.Scenario, "scenario", sim.Submit, "what happens: "+strings.Join(sim.Scenarios, ", "))
	f.IntVar(&c.Servers, "servers", 3, "`number` of servers")
	f.IntVar(&c.Nodes, "nodes", 100, "`number` of agents")
	f.IntVar(&c.Replicas, "replicas", 1000, "`number` of replicas in all")
	f.IntVar(&c.Workloads, "workloads", 0, "`number` of workloads that share the replicas (default 1; in submit-many one for each replica)")
	f.StringVarP(&template, "file", "f", "", "`file` with the spec of each workload; its id and replicas are replaced")
	f.IntVar(&c.Callers, "callers", 32, "`number` of callers that submit at once")
	f.BoolVar(&c.REST, "rest", false, "submit over REST and not over gRPC")
	f.DurationVar(&c.StartDelay, "start-delay", 0, "how long a replica takes to start")
	f.IntVar(&c.Lose, "lose", 1, "`number` of agents that are lost, those with most work")
	f.DurationVar(&c.LeaseTTL, "lease-ttl", 0, "how long a silent node is kept (default 10s)")
	f.DurationVar(&c.Idle, "idle", 5*time.Second, "how long the cluster is watched while nothing happens; 0: not at all")
	f.StringVar(&c.Dir, "dir", "", "`directory` for the servers' temporary data (default: the system's for such)")
	must(cmd.MarkFlagDirname("dir"))
	must(cmd.MarkFlagFilename("file", "yaml", "yml", "json"))
	completeFixed(cmd, "scenario", sim.Scenarios...)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !slices.Contains(sim.Scenarios, c.Scenario) {
			return usageErrorf("--scenario: %q; allowed: %s", c.Scenario, strings.Join(sim.Scenarios, ", "))
		}
		if c.Workloads == 0 {
			c.Workloads = 1
			if c.Scenario == sim.SubmitMany {
				c.Workloads = c.Replicas
			}
		}
		var err error
		if c.Template, err = a.simTemplate(template); err != nil {
			return err
		}
		if c.Program, err = os.Executable(); err != nil {
			return fmt.Errorf("this program: %w", err)
		}
		c.Progress = a.note
		ctx := cmd.Context()
		if _, limited := ctx.Deadline(); !limited && !cmd.Flags().Changed("timeout") {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, simTimeout)
			defer cancel()
		}
		if err := c.Check(); err != nil {
			return usageErrorf("%w", err)
		}
		report, err := sim.Run(ctx, c)
		if report == nil || len(report.Phases) == 0 {
			return err
		}
		return errors.Join(err, a.simReport(report))
	}
	return cmd
}

// simTemplate is what each simulated workload looks like.
func (a *app) simTemplate(file string) (*pb.WorkloadSpec, error) {
	if file == "" {
		return &pb.WorkloadSpec{
			Id: "sim", Resources: &pb.Resources{Cpu: "100m", Memory: "64Mi"},
			Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "simulated"}},
		}, nil
	}
	specs, err := readSpecs([]string{file}, false, a.Stdin)
	if err != nil {
		return nil, err
	}
	if len(specs) != 1 || specs[0].Kind != pb.WorkloadKind_SERVICE {
		return nil, usageErrorf("%s: one service is simulated, and not another number or kind of workloads", file)
	}
	return specs[0], nil
}

func (a *app) simReport(r *sim.Report) error {
	if !a.out.forPeople() {
		return a.out.document(indented(r))
	}
	fmt.Fprintf(a.Stdout, "%s, %s, %s, %s in %s; each agent has a connection of its own\n\n", r.Scenario, counted(r.Servers, "server"),
		counted(r.Nodes, "agent"), counted(r.Replicas, "replica"), counted(r.Workloads, "workload"))
	phases := table{head: []string{"PHASE", "TIME", "NUMBER", "PER SECOND", "P50", "P99", "MAX", "CPU SERVERS", "CPU AGENTS"}}
	for _, p := range r.Phases {
		phases.add(p.Name, seconds(p.Seconds), number(float64(p.Count)), number(p.PerSecond), seconds(p.P50), seconds(p.P99), seconds(p.Max),
			seconds(p.ServersCPU), seconds(p.AgentsCPU))
	}
	processes := table{head: []string{"PROCESS", "MEMORY", "PEAK", "CPU"}}
	for _, p := range r.Processes {
		if p.Lost {
			processes.add(p.Name, "killed", "", "")
			continue
		}
		processes.add(p.Name, bytesText(p.Memory), bytesText(p.PeakMemory), seconds(p.CPU))
	}
	if err := phases.write(a.Stdout, true, false); err != nil {
		return err
	}
	if len(r.Processes) == 0 {
		return nil // it was cut short
	}
	if _, err := io.WriteString(a.Stdout, "\n"); err != nil {
		return err
	}
	if err := processes.write(a.Stdout, true, false); err != nil {
		return err
	}
	if !slices.ContainsFunc(r.Phases, func(p *sim.Phase) bool { return p.Name == sim.Idle }) {
		return nil
	}
	_, err := fmt.Fprintf(a.Stdout, "\nwritten while idle: %s, %s of the log\n", counted(int(r.IdleRevisions), "revision"), entries(r.IdleEntries))
	return err
}

func entries(n int64) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}

// seconds is a time with three digits; empty where there is none.
func seconds(s float64) string {
	d := time.Duration(s * float64(time.Second))
	switch {
	case d <= 0:
		return ""
	case d < time.Second:
		return d.Round(100 * time.Microsecond).String()
	case d < time.Minute:
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func number(n float64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f", n)
}
