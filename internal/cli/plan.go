package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What --dry-run asks.
const (
	dryRunServer = "server"
	dryRunClient = "client"
)

func (a *app) diffCommand() *cobra.Command {
	var files []string
	var recursive bool
	c := &cobra.Command{
		Use: "diff -f FILE...", Short: "Show what files would change, field by field", Args: noFiles("diff"),
		Long: `Shows how the workloads that the files describe differ from those that there are,
field by field; fields that are left out have their defaults. Nothing is changed.
The exit code is 0 where nothing differs, 1 where something does, and greater where
it could not be found out.`,
		Example: "  persys diff -f web.yaml\n  persys get workload web --spec -o yaml | sed s/nginx:1/nginx:2/ | persys diff -f -",
		RunE: func(cmd *cobra.Command, _ []string) error {
			specs, err := a.specsOf("diff", files, recursive)
			if err != nil {
				return err
			}
			differ := false
			err = a.plans(cmd, requestsFor(specs), func(id string, plan *pb.WorkloadPlan) error {
				differ = differ || len(plan.Changes) > 0
				return a.printDiff(id, plan)
			})
			switch {
			case err != nil && exitCode(err) == exitFailure:
				return &codedError{exitUsage, err} // 1 says that something differs
			case err != nil:
				return err
			case differ:
				return errDiffers
			}
			return nil
		},
	}
	fileFlags(c, &files, &recursive)
	return c
}

func requestsFor(specs []*pb.WorkloadSpec) []*pb.ApplyWorkloadRequest {
	requests := make([]*pb.ApplyWorkloadRequest, len(specs))
	for i, s := range specs {
		requests[i] = &pb.ApplyWorkloadRequest{Spec: s}
	}
	return requests
}

// plans asks for each request what would follow from it, were it the only one.
func (a *app) plans(cmd *cobra.Command, requests []*pb.ApplyWorkloadRequest, tell func(id string, plan *pb.WorkloadPlan) error) error {
	return a.withClient(cmd, func(ctx context.Context, c *client) error {
		if len(requests) > 1 {
			a.note("each is shown as if it alone were applied")
		}
		return forEach(requests, func(request *pb.ApplyWorkloadRequest) error {
			plan, err := c.workloads.PlanWorkload(ctx, request)
			if err != nil {
				return about("workload", request.Spec.Id, err)
			}
			if !a.out.forPeople() && a.out.format != "name" {
				return a.out.streamed(planDocument(request.Spec.Id, plan))
			}
			return tell(request.Spec.Id, plan)
		})
	})
}

// planDocument is the plan with the id of its workload. It says all that is so, of
// PLACE and UNCHANGED too, which protobuf would leave out.
func planDocument(id string, plan *pb.WorkloadPlan) ([]byte, error) {
	data, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(plan)
	if err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	name, err := json.Marshal(id)
	if err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	return slices.Concat([]byte(`{"id":`), name, []byte(","), data[1:]), nil
}

func (a *app) printDiff(id string, plan *pb.WorkloadPlan) error {
	if len(plan.Changes) == 0 {
		return nil
	}
	if a.out.format == "name" {
		_, err := fmt.Fprintln(a.Stdout, id)
		return err
	}
	var b strings.Builder
	was := "workload/" + id
	if plan.Outcome == pb.ApplyWorkloadResponse_CREATED {
		was = "/dev/null"
	}
	fmt.Fprintf(&b, "--- %s\n+++ workload/%s\n", was, id)
	line := func(sign, color, path, value string) {
		if value == "" {
			return
		}
		text := sign + " " + path + ": " + oneLine(value)
		if a.out.color {
			text = "\x1b[" + color + "m" + text + "\x1b[0m"
		}
		b.WriteString(text + "\n")
	}
	for _, c := range plan.Changes {
		line("-", "31", c.Path, c.Old)
		line("+", "32", c.Path, c.New)
	}
	_, err := io.WriteString(a.Stdout, b.String())
	return err
}

// printPlans is printPlan for one after the other, set off from each other.
func (a *app) printPlans() func(id string, plan *pb.WorkloadPlan) error {
	further := false
	return func(id string, plan *pb.WorkloadPlan) error {
		if further && a.out.forPeople() {
			fmt.Fprintln(a.Stdout)
		}
		further = true
		return a.printPlan(id, plan)
	}
}

// printPlan tells what applying would do.
func (a *app) printPlan(id string, plan *pb.WorkloadPlan) error {
	if a.out.format == "name" {
		_, err := fmt.Fprintln(a.Stdout, id)
		return err
	}
	p := &page{color: a.out.color, wide: a.out.format == "wide"}
	switch plan.Outcome {
	case pb.ApplyWorkloadResponse_UNCHANGED:
		fmt.Fprintf(&p.b, "workload/%s would be unchanged\n", id)
	default:
		fmt.Fprintf(&p.b, "workload/%s would be %s (revision %s)\n", id, strings.ToLower(plan.Outcome.String()), plan.Revision)
	}
	changes := table{head: []string{"FIELD", "OLD", "NEW"}}
	if plan.Outcome == pb.ApplyWorkloadResponse_UPDATED {
		for _, c := range plan.Changes {
			changes.add(c.Path, short(c.Old), short(c.New))
		}
	}
	p.section("Changes", changes)
	p.section("Replicas", planTable(plan.Placements))
	if plan.Unchanged > 0 {
		fmt.Fprintf(&p.b, "\nLeft alone: %s\n", counted(int(plan.Unchanged), "replica"))
	}
	if len(plan.Pending) > 0 {
		p.b.WriteString("\nPending:\n")
		for _, l := range plan.Pending {
			p.b.WriteString("  " + oneLine(l) + "\n")
		}
	}
	return p.write(a.Stdout)
}

func planTable(changes []*pb.PlannedChange) table {
	t := table{head: []string{"ACTION", "REPLICA", "NODE", "FROM", "WHY"}}
	for _, c := range changes {
		t.add(strings.ToLower(c.Action.String()), fmt.Sprintf("%s/%d", c.WorkloadId, c.Replica), c.NodeId, c.FromNodeId, c.Explanation)
	}
	return t
}

// specsOf reads what -f names.
func (a *app) specsOf(command string, files []string, recursive bool) ([]*pb.WorkloadSpec, error) {
	if len(files) == 0 {
		return nil, usageErrorf("persys %s needs -f FILE", command)
	}
	return readSpecs(files, recursive, a.Stdin)
}

// noFiles tells those who forget -f.
func noFiles(command string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageErrorf("files are given with -f, as in `persys %s -f %s`", command, args[0])
		}
		return nil
	}
}

func fileFlags(c *cobra.Command, files *[]string, recursive *bool) {
	c.Flags().StringArrayVarP(files, "file", "f", nil, "`file` or directory to read; - is standard input; may be repeated")
	c.Flags().BoolVarP(recursive, "recursive", "R", false, "read directories below directories too")
	must(c.MarkFlagFilename("file", "yaml", "yml", "json"))
}
