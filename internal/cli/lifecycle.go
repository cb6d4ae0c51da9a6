package cli

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// change is a command that asks for one thing for each workload named.
type change struct {
	use, short, done string
	call             func(context.Context, *client, string) (*pb.Workload, error)
	// What --wait waits for; nil: that it runs, or is stopped.
	goal func(ctx context.Context, c *client, id string) (goal, error)
}

func (a *app) changeCommand(x change) *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: x.use + " ID...", Short: x.short, Args: takes("ID..."), ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				var goals []goal
				err := forEach(ids, func(id string) error {
					g := goal{id: id}
					if wait && x.goal != nil {
						var err error
						if g, err = x.goal(ctx, c, id); err != nil {
							return about("workload", id, err)
						}
					}
					w, err := x.call(ctx, c, id)
					if err != nil {
						return about("workload", id, err)
					}
					goals = append(goals, g.asLeft(w))
					return a.done(w, x.done)
				})
				if err != nil || !wait {
					return err
				}
				return a.await(ctx, c, goals)
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait until it is so; a failure is exit code 6")
	return c
}

// onWorkload makes a call of one of the RPCs that take nothing but an id.
func onWorkload(method func(pb.WorkloadsClient, context.Context, *pb.WorkloadRequest, ...grpc.CallOption) (*pb.Workload, error)) func(context.Context, *client, string) (*pb.Workload, error) {
	return func(ctx context.Context, c *client, id string) (*pb.Workload, error) {
		return method(c.workloads, ctx, &pb.WorkloadRequest{Id: id})
	}
}

func (a *app) startCommand() *cobra.Command {
	return a.changeCommand(change{use: "start", short: "Run workloads that were stopped", done: "is to run", call: onWorkload(pb.WorkloadsClient.StartWorkload)})
}

func (a *app) stopCommand() *cobra.Command {
	return a.changeCommand(change{use: "stop", short: "Stop workloads; they keep their place", done: "is to stop", call: onWorkload(pb.WorkloadsClient.StopWorkload)})
}

func (a *app) retryCommand() *cobra.Command {
	return a.changeCommand(change{use: "retry", short: "Forget failed attempts and try again at once", done: "is tried again", call: onWorkload(pb.WorkloadsClient.RetryWorkload)})
}

func (a *app) restartCommand() *cobra.Command {
	return a.changeCommand(change{
		use: "restart", short: "Replace every replica, a few at a time", done: "is restarted", call: onWorkload(pb.WorkloadsClient.RestartWorkload),
		goal: func(ctx context.Context, c *client, id string) (goal, error) {
			g := goal{id: id, replaced: map[int32]int64{}}
			w, err := c.workloads.GetWorkload(ctx, &pb.GetWorkloadRequest{Id: id})
			for _, r := range w.GetReplicas() {
				g.replaced[r.Replica] = r.Generation
			}
			return g, err
		},
	})
}

func (a *app) deleteCommand() *cobra.Command {
	c := a.changeCommand(change{
		use: "delete", short: "Delete workloads", done: "is to be deleted",
		call: func(ctx context.Context, c *client, id string) (*pb.Workload, error) {
			return c.workloads.DeleteWorkload(ctx, &pb.DeleteWorkloadRequest{Id: id})
		},
		goal: func(_ context.Context, _ *client, id string) (goal, error) { return goal{id: id, deleted: true}, nil },
	})
	c.Aliases = []string{"rm"}
	return c
}

func (a *app) scaleCommand() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: "scale ID REPLICAS", Short: "Change how many replicas a workload has", Args: takes("ID REPLICAS"),
		Example: "  persys scale web 5 --wait", ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.ParseInt(args[1], 10, 32)
			if err != nil || n < 0 {
				return usageErrorf("REPLICAS must be a number from 0, not %q", args[1])
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				w, err := c.workloads.ScaleWorkload(ctx, &pb.ScaleWorkloadRequest{Id: args[0], Replicas: proto.Int32(int32(n))})
				if err != nil {
					return about("workload", args[0], err)
				}
				if err := a.done(w, "is to have "+counted(int(n), "replica")); err != nil || !wait {
					return err
				}
				return a.await(ctx, c, []goal{goal{id: args[0]}.asLeft(w)})
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait until it is so; a failure is exit code 6")
	return c
}
