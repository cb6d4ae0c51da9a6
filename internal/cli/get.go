package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) getCommand() *cobra.Command {
	get := group("get", "Show workloads, nodes, members, tokens or events")
	get.Aliases = []string{"list", "ls"}
	get.Example = "  persys get workloads -o wide\n  persys get workload web -o yaml\n  persys get nodes"
	for _, c := range []*cobra.Command{a.getWorkloads("workloads"), a.getNodes("nodes"), a.listMembers("members"), a.listTokens("tokens"), a.listEvents("events")} {
		c.Aliases = append(c.Aliases, singularAnd[c.Name()]...)
		get.AddCommand(c)
	}
	return get
}

var singularAnd = map[string][]string{
	"workloads": {"workload", "wl", "w"}, "nodes": {"node", "n"}, "members": {"member", "m"}, "tokens": {"token"}, "events": {"event", "ev"},
}

func (a *app) getWorkloads(use string) *cobra.Command {
	var selector string
	var spec bool
	c := &cobra.Command{
		Use: use + " [ID...]", Short: "Show workloads", Args: takes("[ID...]"), ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, ids []string) error {
			if spec && len(ids) == 0 {
				return usageErrorf("--spec needs the ID of a workload")
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				if len(ids) > 0 {
					return a.getSomeWorkloads(ctx, c, ids, spec)
				}
				all, err := listWorkloads(ctx, c, selector, a.out.format == "wide")
				if err != nil {
					return err
				}
				return a.printWorkloads(all)
			})
		},
	}
	c.Flags().StringVarP(&selector, "selector", "l", "", "only workloads with these labels, `k=v,k=v`")
	c.Flags().BoolVar(&spec, "spec", false, "only what was asked for, as `persys apply` reads it (-o yaml or json)")
	return c
}

func (a *app) getSomeWorkloads(ctx context.Context, c *client, ids []string, spec bool) error {
	var found []*pb.Workload
	missing := forEach(ids, func(id string) error {
		w, err := c.workloads.GetWorkload(ctx, &pb.GetWorkloadRequest{Id: id})
		if err != nil {
			return about("workload", id, err)
		}
		found = append(found, w)
		return nil
	})
	var err error
	switch {
	case spec:
		if a.out.format != "json" {
			a.out.format = "yaml"
		}
		for i, w := range found {
			if i > 0 && a.out.format == "yaml" {
				fmt.Fprintln(a.Stdout, "---")
			}
			err = errors.Join(err, a.out.message(w.Spec))
		}
	case len(found) == 1 && len(ids) == 1 && (a.out.format == "json" || a.out.format == "yaml"):
		err = a.out.message(found[0])
	case len(found) > 0:
		err = a.printWorkloads(&pb.ListWorkloadsResponse{Workloads: found})
	}
	if missing != nil {
		return missing
	}
	return err
}

func (a *app) printWorkloads(all *pb.ListWorkloadsResponse) error {
	l := listing{table: workloadTable(all.Workloads, time.Now()), message: all, empty: "there are no workloads; `persys run` or `persys apply` makes some"}
	for _, w := range all.Workloads {
		l.names = append(l.names, w.GetSpec().GetId())
	}
	return a.out.list(l)
}

// listWorkloads fetches every page.
func listWorkloads(ctx context.Context, c *client, selector string, replicas bool) (*pb.ListWorkloadsResponse, error) {
	all := &pb.ListWorkloadsResponse{}
	request := &pb.ListWorkloadsRequest{LabelSelector: selector, Replicas: replicas}
	for {
		page, err := c.workloads.ListWorkloads(ctx, request)
		if err != nil {
			return nil, err
		}
		all.Workloads = append(all.Workloads, page.Workloads...)
		all.Revision = page.Revision
		if page.NextPageToken == "" {
			return all, nil
		}
		request.PageToken = page.NextPageToken
	}
}

func (a *app) getNodes(use string) *cobra.Command {
	return &cobra.Command{
		Use: use + " [ID...]", Short: "Show nodes", Args: takes("[ID...]"), ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				if len(ids) == 1 && (a.out.format == "json" || a.out.format == "yaml") {
					n, err := c.nodes.GetNode(ctx, &pb.NodeRequest{Id: ids[0]})
					if err != nil {
						return about("node", ids[0], err)
					}
					return a.out.message(n)
				}
				all, err := c.nodes.ListNodes(ctx, &pb.ListNodesRequest{})
				if err != nil {
					return err
				}
				missing := keepNodes(all, ids)
				if len(ids) > 0 && len(all.Nodes) == 0 {
					return missing
				}
				return errors.Join(a.printNodes(all), missing)
			})
		},
	}
}

// keepNodes leaves only those asked for, in that order, and says which are not
// there.
func keepNodes(all *pb.ListNodesResponse, ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	var kept []*pb.Node
	missing := forEach(ids, func(id string) error {
		i := slices.IndexFunc(all.Nodes, func(n *pb.Node) bool { return n.Id == id })
		if i < 0 {
			return coded(exitNotFound, "node %q: not found", id)
		}
		kept = append(kept, all.Nodes[i])
		return nil
	})
	all.Nodes = kept
	return missing
}

func (a *app) printNodes(all *pb.ListNodesResponse) error {
	l := listing{table: nodeTable(all.Nodes, time.Now()), message: all, empty: "there are no nodes; `persys token create --role agent` makes a token for `persys join`"}
	for _, n := range all.Nodes {
		l.names = append(l.names, n.Id)
	}
	return a.out.list(l)
}

func (a *app) describeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "describe ID | describe node ID", Short: "Tell everything about a workload or a node", Args: takes("[workload|node] ID"),
		Example:           "  persys describe web\n  persys describe node n1",
		ValidArgsFunction: a.completeWorkloads,
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, id := "workload", args[0]
			if len(args) == 2 {
				kind, id = args[0], args[1]
			} else if k, rest, ok := strings.Cut(id, "/"); ok {
				kind, id = k, rest
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				switch kind {
				case "workload", "workloads", "w":
					return a.describeWorkload(ctx, c, id)
				case "node", "nodes", "n":
					return a.describeNode(ctx, c, id)
				}
				return usageErrorf("%q can't be described; there are workload and node", kind)
			})
		},
	}
}

const describedEvents = 10

func (a *app) describeWorkload(ctx context.Context, c *client, id string) error {
	w, err := c.workloads.GetWorkload(ctx, &pb.GetWorkloadRequest{Id: id})
	if err != nil {
		return about("workload", id, err)
	}
	if !a.out.forPeople() {
		return a.out.list(listing{names: []string{w.GetSpec().GetId()}, message: w})
	}
	events, err := c.cluster.ListEvents(ctx, &pb.ListEventsRequest{WorkloadId: id, Limit: describedEvents})
	if err != nil {
		return err
	}
	var runs []*pb.Workload
	if w.GetSpec().GetSchedule() != nil {
		if runs, err = runsOf(ctx, c, id); err != nil {
			return err
		}
	}
	p := a.page()
	p.workload(w, runs, events.Events, time.Now())
	return p.write(a.Stdout)
}

func (a *app) describeNode(ctx context.Context, c *client, id string) error {
	n, err := c.nodes.GetNode(ctx, &pb.NodeRequest{Id: id})
	if err != nil {
		return about("node", id, err)
	}
	if !a.out.forPeople() {
		return a.out.list(listing{names: []string{n.Id}, message: n})
	}
	events, err := c.cluster.ListEvents(ctx, &pb.ListEventsRequest{NodeId: id, Limit: describedEvents})
	if err != nil {
		return err
	}
	p := a.page()
	p.node(n, events.Events, time.Now())
	return p.write(a.Stdout)
}

func (a *app) page() *page { return &page{color: a.out.color, wide: a.out.format == "wide"} }

// workloadGroup holds the commands under the names that users of Persys Compute
// know them by.
func (a *app) workloadGroup() *cobra.Command {
	list, get := a.getWorkloads("list"), a.getWorkloads("get")
	list.Aliases = []string{"ls"}
	g := group("workload", "The commands for workloads, noun first",
		a.applyCommand(), list, get, a.describeCommand(), a.deleteCommand(), a.retryCommand(), a.startCommand(), a.stopCommand(),
		a.restartCommand(), a.scaleCommand(), a.logsCommand(), a.whyCommand())
	g.Aliases = []string{"workloads", "wl"}
	g.GroupID = groupWork
	return g
}
