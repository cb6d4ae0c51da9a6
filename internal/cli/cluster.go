package cli

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) clusterGroup() *cobra.Command {
	info := &cobra.Command{
		Use: "info", Aliases: []string{"get", "list", "ls", "status"}, Short: "Tell how the cluster is", Args: takes(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				s, err := c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{})
				if err != nil {
					return err
				}
				if !a.out.forPeople() {
					return a.out.list(listing{names: []string{s.GetCluster().GetId()}, message: s})
				}
				p := a.page()
				p.cluster(s, time.Now())
				return p.write(a.Stdout)
			})
		},
	}
	return group("cluster", "The cluster as a whole", info)
}

func (a *app) whyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "why ID", Short: "Explain why a workload is pending, is where it is, or failed", Args: takes("ID"), ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				x, err := c.workloads.ExplainWorkload(ctx, &pb.WorkloadRequest{Id: args[0]})
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

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the version of this program", Args: takes(""),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(a.Stdout, "persys %s %s %s/%s\n", a.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
