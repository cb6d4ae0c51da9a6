package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) rolloutGroup() *cobra.Command {
	return group("rollout", "How new revisions reach the replicas, and the way back",
		a.rolloutStatusCommand(), a.rolloutHistoryCommand(), a.rolloutUndoCommand(), a.rolloutPromoteCommand())
}

func (a *app) rolloutStatusCommand() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: "status ID", Short: "Tell how far the newest revision has come", Args: takes("ID"), ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				id := args[0]
				get := func() (*pb.Workload, error) {
					w, err := c.workloads.GetWorkload(ctx, &pb.GetWorkloadRequest{Id: id})
					return w, about("workload", id, err)
				}
				w, err := get()
				if err != nil {
					return err
				}
				var failure error
				if wait {
					failure = a.await(ctx, c, []goal{{id: id, rollout: true}})
					if ctx.Err() != nil {
						return failure
					}
					if w, err = get(); err != nil {
						return errors.Join(failure, err)
					}
				}
				return errors.Join(a.printRollout(w), failure)
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait until it is rolled out; a failure or a way back is exit code 6")
	return c
}

func (a *app) printRollout(w *pb.Workload) error {
	switch {
	case a.out.format == "name":
		_, err := fmt.Fprintln(a.Stdout, rolloutState(w.Rollout.GetState()))
		return err
	case !a.out.forPeople():
		r := w.Rollout
		if r == nil {
			r = &pb.Rollout{}
		}
		return a.out.message(r)
	}
	p := page{}
	p.rollout(w, time.Now())
	return p.write(a.Stdout)
}

func (p *page) rollout(w *pb.Workload, now time.Time) {
	r := w.GetRollout()
	if r == nil {
		p.field("State", "none")
		return
	}
	p.field("State", rolloutState(r.State))
	p.field("Revision", r.Revision)
	if r.Previous != r.Revision {
		p.field("Before", r.Previous)
	}
	p.field("Taken back", r.FailedRevision)
	p.field("Replicas", rolloutCounts(w))
	p.field("Started", clock(r.StartTime, now))
	p.field("Progress", clock(r.ProgressTime, now))
	if r.EndTime != nil {
		p.field("Ended", clock(r.EndTime, now))
	}
	p.field("Reason", reason(r.Reason))
	if r.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION && !w.GetSpec().GetUpdate().GetAutoPromote() {
		p.field("Go on", "persys rollout promote "+w.GetSpec().GetId())
	}
}

func rolloutState(s pb.RolloutState) string {
	if s == pb.RolloutState_ROLLOUT_STATE_UNSPECIFIED {
		return "none"
	}
	return camel(strings.TrimPrefix(s.String(), "ROLLOUT_"))
}

func rolloutCounts(w *pb.Workload) string {
	r := w.GetRollout()
	text := fmt.Sprintf("%d of %d updated, %d healthy", r.GetUpdated(), r.GetDesired(), r.GetHealthy())
	if r.GetState() == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION {
		text += fmt.Sprintf(", %d of %d canaries healthy", r.Canaries, w.GetSpec().GetUpdate().GetCanary())
	}
	return text
}

// rolloutText is a rollout in one line.
func rolloutText(w *pb.Workload) string {
	r := w.GetRollout()
	if r == nil {
		return ""
	}
	text := rolloutState(r.State)
	if r.State != pb.RolloutState_ROLLOUT_COMPLETED {
		text += ", " + rolloutCounts(w)
	}
	if r.FailedRevision != "" {
		text += "; revision " + r.FailedRevision + " was taken back"
	}
	if why := reason(r.Reason); why != "" {
		text += ": " + why
	}
	return text
}

func (a *app) rolloutHistoryCommand() *cobra.Command {
	return &cobra.Command{
		Use: "history ID", Short: "Show the revisions that are kept, the newest first", Args: takes("ID"), ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				all, err := c.workloads.ListRevisions(ctx, &pb.WorkloadRequest{Id: args[0]})
				if err != nil {
					return about("workload", args[0], err)
				}
				l := listing{table: revisionTable(all, time.Now()), message: all, empty: "there are no revisions"}
				for _, r := range all.Revisions {
					l.names = append(l.names, r.Revision)
				}
				return a.out.list(l)
			})
		},
	}
}

func revisionTable(all *pb.ListRevisionsResponse, now time.Time) table {
	t := table{head: []string{"REVISION", "PRESENT", "AGE", "RUNS", "CHANGED", "+RESOURCES"}}
	for i, r := range all.Revisions {
		present := ""
		if r.Revision == all.Current {
			present = "*"
		}
		changed := ""
		if i+1 < len(all.Revisions) {
			changed = changedFields(all.Revisions[i+1], r)
		}
		t.add(r.Revision, present, age(r.CreateTime, now), whatRuns(r.Spec), changed, resourcesText(r.GetSpec().GetResources()))
	}
	return t
}

// changedFields is which fields make one revision another one than that before.
func changedFields(before, r *pb.Revision) string {
	var paths []string
	for _, c := range model.Diff(before.Spec, model.Restored(&pb.Workload{Spec: before.Spec}, r).Spec) {
		paths = append(paths, c.Path)
	}
	return strings.Join(paths, ", ")
}

func (a *app) rolloutUndoCommand() *cobra.Command {
	var to string
	c := a.changeCommand(change{
		use: "undo", short: "Go back to the revision before, or to a named one", done: "goes back",
		call: func(ctx context.Context, c *client, id string) (*pb.Workload, error) {
			return c.workloads.RollbackWorkload(ctx, &pb.RollbackWorkloadRequest{Id: id, Revision: to})
		},
	})
	c.Flags().StringVar(&to, "to", "", "`revision` of persys rollout history")
	return c
}

func (a *app) rolloutPromoteCommand() *cobra.Command {
	return a.changeCommand(change{
		use: "promote", short: "Accept the canaries: the update goes on", done: "is promoted", call: onWorkload(pb.WorkloadsClient.PromoteWorkload),
	})
}
