package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) nodeGroup() *cobra.Command {
	list, get := a.getNodes("ls"), a.getNodes("get")
	list.Aliases = []string{"list"}
	describe := &cobra.Command{
		Use: "describe ID", Short: "Tell everything about a node", Args: takes("ID"), ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error { return a.describeNode(ctx, c, args[0]) })
		},
	}
	g := group("node", "The machines that run work",
		list, get, describe,
		a.nodeChange("cordon", "Give nodes no new work; what runs stays", "is cordoned", pb.NodesClient.CordonNode),
		a.nodeChange("uncordon", "Undo cordon and drain", "takes work again", pb.NodesClient.UncordonNode),
		a.drainCommand(), a.labelCommand(), a.taintCommand(), a.removeNodeCommand())
	g.Aliases = []string{"nodes"}
	return g
}

func (a *app) nodeChange(use, short, done string, method func(pb.NodesClient, context.Context, *pb.NodeRequest, ...grpc.CallOption) (*pb.Node, error)) *cobra.Command {
	return &cobra.Command{
		Use: use + " ID...", Short: short, Args: takes("ID..."), ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				return forEach(ids, func(id string) error {
					n, err := method(c.nodes, ctx, &pb.NodeRequest{Id: id})
					if err != nil {
						return about("node", id, err)
					}
					return a.nodeDone(n, done)
				})
			})
		},
	}
}

func (a *app) nodeDone(n *pb.Node, what string) error {
	switch a.out.format {
	case "json", "yaml":
		return a.out.message(n)
	case "name":
		_, err := fmt.Fprintln(a.Stdout, n.Id)
		return err
	}
	_, err := fmt.Fprintf(a.Stdout, "node/%s %s\n", n.Id, what)
	return err
}

func (a *app) drainCommand() *cobra.Command {
	var wait bool
	var deadline time.Duration
	c := &cobra.Command{
		Use: "drain ID...", Short: "Move the work of nodes elsewhere and give them no more", Args: takes("ID..."), ValidArgsFunction: a.completeNodes,
		Example: "  persys node drain n1 --deadline 10m --wait",
		RunE: func(cmd *cobra.Command, ids []string) error {
			request := &pb.DrainNodeRequest{}
			if cmd.Flags().Changed("deadline") {
				if deadline < 0 {
					return usageErrorf("--deadline must not be negative; 0 means at once")
				}
				request.Deadline = durationpb.New(deadline)
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				return forEach(ids, func(id string) error {
					request.Id = id
					n, err := c.nodes.DrainNode(ctx, request)
					if err != nil {
						return about("node", id, err)
					}
					if err := a.nodeDone(n, "is drained; `persys node uncordon "+id+"` undoes it"); err != nil || !wait {
						return err
					}
					return a.awaitEmpty(ctx, c, id)
				})
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait until no work is left on them")
	c.Flags().DurationVar(&deadline, "deadline", 0, "after so long what is left is moved, or stopped, without regard to anything; 0s: at once; without it: never")
	return c
}

const drainPoll = 500 * time.Millisecond

// awaitEmpty waits until a node has no work. There is no watch of nodes; a look
// twice a second costs little beside moving work.
func (a *app) awaitEmpty(ctx context.Context, c *client, id string) error {
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	left := int32(-1)
	for {
		n, err := c.nodes.GetNode(ctx, &pb.NodeRequest{Id: id})
		if err != nil {
			return about("node", id, err)
		}
		switch {
		case n.Assignments == 0:
			a.note("%s: nothing is left on it", id)
			return nil
		case !n.Draining:
			return coded(exitConflict, "node %q is not drained any more: somebody has called it off", id)
		}
		if n.Assignments != left {
			left = n.Assignments
			a.note("%s: %d still to move", id, left)
		}
		select {
		case <-ctx.Done():
			return coded(exitCode(ctx.Err()), "node %q still has %d: %w", id, left, ctx.Err())
		case <-tick.C:
		}
	}
}

func (a *app) labelCommand() *cobra.Command {
	return &cobra.Command{
		Use: "label ID KEY=VALUE... KEY-...", Short: "Set labels of a node, or remove them (KEY-)", Args: takes("ID LABEL..."),
		Example: "  persys node label n1 zone=eu disk=ssd old-", ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			request := &pb.LabelNodeRequest{Id: args[0], Set: map[string]string{}}
			for _, text := range args[1:] {
				key, value, set := strings.Cut(text, "=")
				if set && key != "" {
					request.Set[key] = value
				} else if key, ok := strings.CutSuffix(text, "-"); ok && key != "" {
					request.Remove = append(request.Remove, key)
				} else {
					return usageErrorf("label %q: must be KEY=VALUE to set it, or KEY- to remove it", text)
				}
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				n, err := c.nodes.LabelNode(ctx, request)
				if err != nil {
					return about("node", args[0], err)
				}
				return a.nodeDone(n, "has labels "+cellText(labelText(nodeLabels(n))))
			})
		},
	}
}

func (a *app) taintCommand() *cobra.Command {
	return &cobra.Command{
		Use: "taint ID KEY[=VALUE]:EFFECT... KEY-...", Short: "Keep work away from a node unless it tolerates it, or not any more (KEY-)", Args: takes("ID TAINT..."),
		Long: `Sets taints of a node, or removes them. Effects are NoSchedule (no new work),
PreferNoSchedule (no new work where there is another place) and NoExecute (what
runs has to leave, too). Workloads with a matching toleration do not mind.`,
		Example: "  persys node taint n1 dedicated=gpu:NoSchedule old-", ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			request := &pb.TaintNodeRequest{Id: args[0]}
			for _, text := range args[1:] {
				if key, ok := strings.CutSuffix(text, "-"); ok && key != "" && !strings.Contains(key, ":") {
					request.Remove = append(request.Remove, key)
					continue
				}
				taint, err := model.ParseTaint(text)
				if err != nil {
					return usageErrorf("%w; or KEY- to remove one", err)
				}
				request.Set = append(request.Set, taint)
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				n, err := c.nodes.TaintNode(ctx, request)
				if err != nil {
					return about("node", args[0], err)
				}
				if taints := taintsText(n); taints != "" {
					return a.nodeDone(n, "has taints "+taints)
				}
				return a.nodeDone(n, "has no taints")
			})
		},
	}
}

func (a *app) removeNodeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm ID...", Aliases: []string{"remove", "delete"}, Short: "Forget nodes that are gone for good", Args: takes("ID..."), ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				return forEach(ids, func(id string) error {
					if _, err := c.nodes.RemoveNode(ctx, &pb.NodeRequest{Id: id}); err != nil {
						return about("node", id, err)
					}
					_, err := fmt.Fprintf(a.Stdout, "node/%s is removed\n", id)
					return err
				})
			})
		},
	}
}
