package cli

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) jobGroup() *cobra.Command {
	g := group("job", "Jobs with a schedule", a.jobRunCommand())
	g.Aliases = []string{"jobs"}
	g.GroupID = groupWork
	return g
}

func (a *app) jobRunCommand() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: "run ID...", Short: "Start a run of a job with a schedule now", Args: takes("ID..."),
		Example: "  persys job run backup --wait", ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				var goals []goal
				err := forEach(ids, func(id string) error {
					run, err := c.workloads.RunWorkload(ctx, &pb.WorkloadRequest{Id: id})
					if err != nil {
						return about("workload", id, err)
					}
					goals = append(goals, goal{id: run.GetSpec().GetId(), version: run.ResourceVersion})
					return a.done(run, "is to run")
				})
				if err != nil || !wait {
					return err
				}
				return a.await(ctx, c, goals)
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait until it has ended; a failure is exit code 6")
	return c
}

// runsOf are the runs of a job with a schedule, the newest first.
func runsOf(ctx context.Context, c *client, id string) ([]*pb.Workload, error) {
	all, err := listWorkloads(ctx, c, "", false)
	if err != nil {
		return nil, err
	}
	runs := slices.DeleteFunc(all.Workloads, func(w *pb.Workload) bool { return w.Parent != id })
	slices.SortStableFunc(runs, func(a, b *pb.Workload) int { return b.ScheduledTime.AsTime().Compare(a.ScheduledTime.AsTime()) })
	return runs, nil
}

func runTable(runs []*pb.Workload, now time.Time) table {
	t := table{head: []string{"RUN", "DUE", "STATE", "COMPLETED", "REASON"}}
	for _, w := range runs {
		t.add(w.GetSpec().GetId(), clock(w.ScheduledTime, now), stateName(w.GetStatus().GetState()), completed(w), short(reason(w.GetStatus().GetReason())))
	}
	return t
}

// scheduleText is a schedule in one line.
func scheduleText(s *pb.Schedule) string {
	if s == nil {
		return ""
	}
	text := s.Cron + " (" + s.Timezone + ")"
	if c := s.Concurrency; c != pb.Schedule_FORBID {
		text += ", concurrency " + strings.ToLower(c.String())
	}
	if s.Suspend {
		text += ", suspended"
	}
	return text
}

// lastAndNext are the runs of a job with a schedule as the list of workloads
// shows them: how long ago, and in how long.
func lastAndNext(w *pb.Workload, now time.Time) (last, next string) {
	if w.GetSpec().GetSchedule() == nil {
		return "", ""
	}
	last, next = "-", "-"
	if at := w.GetStatus().GetLastRun(); at != nil {
		last = ago(age(at, now))
	}
	if at := w.GetStatus().GetNextRun(); at != nil {
		next = "in " + span(at.AsTime().Sub(now).Round(time.Second))
	}
	return last, next
}
