package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) eventsCommand() *cobra.Command { return a.listEvents("events") }

func (a *app) listEvents(use string) *cobra.Command {
	var (
		workload, node string
		limit          int32
		watch          bool
	)
	c := &cobra.Command{
		Use: use, Short: "Show what happened", Args: takes(""),
		Example: "  persys events -w\n  persys events --workload web -n 20",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < 0 {
				return usageErrorf("--limit must not be negative")
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				if watch {
					return a.watchEvents(ctx, c, &pb.WatchEventsRequest{WorkloadId: workload, NodeId: node, Tail: limit})
				}
				all, err := c.cluster.ListEvents(ctx, &pb.ListEventsRequest{WorkloadId: workload, NodeId: node, Limit: limit})
				if err != nil {
					return err
				}
				l := listing{table: eventTable(all.Events, time.Now()), message: all, empty: "nothing has happened"}
				for _, e := range all.Events {
					l.names = append(l.names, e.Id)
				}
				return a.out.list(l)
			})
		},
	}
	flags := c.Flags()
	flags.BoolVarP(&watch, "watch", "w", false, "go on with what happens from now on")
	flags.StringVar(&workload, "workload", "", "only about this workload")
	flags.StringVar(&node, "node", "", "only about this node")
	flags.Int32VarP(&limit, "limit", "n", 20, "the newest so many")
	must(c.RegisterFlagCompletionFunc("workload", a.completeWorkloads))
	must(c.RegisterFlagCompletionFunc("node", a.completeNodes))
	return c
}

// After the watch was opened anew, so many events are asked for again, so that
// none of the interruption is missed.
const overlap = 100

func (a *app) watchEvents(ctx context.Context, c *client, request *pb.WatchEventsRequest) error {
	last := ""
	return follow(ctx, c.pool, func(ctx context.Context) (grpc.ServerStreamingClient[pb.Event], error) {
		if last != "" {
			request.Tail = overlap
		}
		return c.cluster.WatchEvents(ctx, request)
	}, func(e *pb.Event) (bool, error) {
		// Ids grow with time.
		if e.Id != "" {
			if e.Id <= last {
				return false, nil
			}
			last = e.Id
		}
		return false, a.printEvent(e)
	})
}

func (a *app) printEvent(e *pb.Event) error {
	switch a.out.format {
	case "json", "yaml":
		return a.out.line(e)
	case "name":
		_, err := fmt.Fprintln(a.Stdout, e.Id)
		return err
	}
	_, err := fmt.Fprintln(a.Stdout, eventLine(e, time.Now()))
	return err
}
