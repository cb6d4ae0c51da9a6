package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Before the name of a node, where persys why is asked about one.
const nodePrefix = "node/"

func (a *app) whyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "why ID", Short: "Explain why a workload is pending, is where it is, or failed, or why a node gets no work", Args: takes("ID"),
		Example: "  persys why web\n  persys why node/n1", ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				if node, ok := strings.CutPrefix(args[0], nodePrefix); ok {
					return a.whyNode(ctx, c, node)
				}
				x, err := c.workloads.ExplainWorkload(ctx, &pb.WorkloadRequest{Id: strings.TrimPrefix(args[0], "workload/")})
				if err != nil {
					return about("workload", args[0], err)
				}
				if !a.out.forPeople() {
					return a.out.list(listing{names: []string{x.Id}, message: x})
				}
				p := a.page()
				p.explanation(x)
				return p.write(a.Stdout)
			})
		},
	}
}

// explanation is the lines that the scheduler says, then each replica.
func (p *page) explanation(x *pb.Explanation) {
	state := stateName(x.State)
	if p.color {
		state = colored(state)
	}
	fmt.Fprintf(&p.b, "%s is %s\n", oneLine(x.Id), state)
	for _, line := range x.Lines {
		fmt.Fprintf(&p.b, "  %s\n", oneLine(line))
	}
	t := table{head: []string{"REPLICA", "STATE", "NODE", "WHY"}}
	for _, r := range x.Replicas {
		why := r.Message
		switch said := reason(r.Reason); {
		case why == "":
			why = said
		case said != "":
			why = said + " (" + why + ")"
		}
		t.add(fmt.Sprint(r.Replica), stateName(r.State), r.NodeId, why)
	}
	p.section("Replicas", t)
}

func (a *app) whyNode(ctx context.Context, c *client, id string) error {
	n, err := c.nodes.GetNode(ctx, &pb.NodeRequest{Id: id})
	if err != nil {
		return about("node", id, err)
	}
	x := &pb.Explanation{Id: nodePrefix + n.Id, Lines: explainNode(n, time.Now())}
	if !a.out.forPeople() {
		return a.out.list(listing{names: []string{x.Id}, message: x})
	}
	p := a.page()
	fmt.Fprintf(&p.b, "%s is %s\n", oneLine(x.Id), nodeState(n))
	for _, line := range x.Lines {
		fmt.Fprintf(&p.b, "  %s\n", oneLine(line))
	}
	return p.write(a.Stdout)
}

// explainNode says what keeps new work away from a node, the gravest first.
func explainNode(n *pb.Node, now time.Time) []string {
	var lines []string
	if n.State == pb.NodeState_NOT_READY {
		line := "it does not answer: its work runs elsewhere, and it gets none"
		if at := n.LastTransition; at != nil {
			line += "; since " + clock(at, now)
		}
		lines = append(lines, line)
	}
	switch {
	case n.Draining || n.State == pb.NodeState_DRAINING:
		line := fmt.Sprintf("it is drained: it gets no new work, and %s left on it; persys node uncordon %s undoes it", counted(int(n.Assignments), "replica"), n.Id)
		if n.DrainDeadline != nil {
			line += "; by " + clock(n.DrainDeadline, now) + " all has to be gone"
		}
		lines = append(lines, line)
	case n.Unschedulable:
		lines = append(lines, "it is cordoned: what runs stays, and it gets no new work; persys node uncordon "+n.Id+" undoes it")
	}
	if said := reason(n.Reason); said != "" {
		lines = append(lines, said)
	}
	for _, r := range n.Runtimes {
		if !r.Healthy {
			lines = append(lines, strings.TrimSuffix(fmt.Sprintf("it gets no work of type %s: %s is not healthy: %s", typeName(r.Type), r.Name, r.Message), ": "))
		}
	}
	for _, t := range model.TaintsOf(n) {
		lines = append(lines, fmt.Sprintf("it is tainted: %s: %s, unless the work tolerates that", strings.TrimSuffix(t.Key+"="+t.Value, "="), taintText(t.Effect)))
	}
	if n.Pool != "" && n.Pool != "default" {
		lines = append(lines, "it is in the pool "+n.Pool+": it gets only work that asks for that pool, or for any")
	}
	if len(lines) == 0 {
		lines = append(lines, "nothing keeps work away that matches its labels and fits")
	}
	free := func(capacity, reserved int64) int64 { return max(0, capacity-reserved) }
	c, r := n.Capacity, n.Reserved
	return append(lines, fmt.Sprintf("free: cpu %s of %s, memory %s of %s, disk %s of %s; %s",
		cores(free(c.GetCpuMillis(), r.GetCpuMillis())), cores(c.GetCpuMillis()), bytesText(free(c.GetMemoryBytes(), r.GetMemoryBytes())), bytesText(c.GetMemoryBytes()),
		bytesText(free(c.GetDiskBytes(), r.GetDiskBytes())), bytesText(c.GetDiskBytes()), counted(int(n.Assignments), "replica")))
}

func taintText(e pb.TaintEffect) string {
	switch e {
	case pb.TaintEffect_PREFER_NO_SCHEDULE:
		return "new work comes only where there is no other place"
	case pb.TaintEffect_NO_EXECUTE:
		return "no new work comes, and what runs has to leave"
	default:
		return "no new work comes"
	}
}
