package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) memberGroup() *cobra.Command {
	list := a.listMembers("ls")
	list.Aliases = []string{"list"}
	remove := a.memberChange("rm NAME", "Take a server out of the cluster, for good", "is removed", pb.ClusterClient.RemoveMember)
	remove.Aliases = []string{"remove", "delete"}
	g := group("member", "The servers that hold the state", list,
		a.memberChange("promote NAME", "Make a server vote", "is to vote, once it has caught up", pb.ClusterClient.PromoteMember),
		a.memberChange("demote NAME", "Keep a server from voting", "does not vote", pb.ClusterClient.DemoteMember),
		remove,
		a.memberChange("transfer-leader [NAME]", "Let another server lead", "leads", pb.ClusterClient.TransferLeadership))
	g.Aliases = []string{"members"}
	return g
}

func (a *app) listMembers(use string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: "Show the servers, and how many can be lost", Args: takes(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				all, err := c.cluster.ListMembers(ctx, &pb.ListMembersRequest{})
				if err != nil {
					return err
				}
				return a.printMembers(all)
			})
		},
	}
}

// printMembers ends with what matters about the number of servers; on stderr
// where a program reads the answer.
func (a *app) printMembers(all *pb.ListMembersResponse) error {
	l := listing{table: memberTable(all.Members, time.Now()), message: all, empty: "there are no members"}
	for _, m := range all.Members {
		if !m.Removed {
			l.names = append(l.names, m.Name)
		}
	}
	if err := a.out.list(l); err != nil {
		return err
	}
	w := a.Stderr
	if a.out.forPeople() {
		w = a.Stdout
	}
	_, err := fmt.Fprintln(w, tolerance(all.FailureTolerance))
	return err
}

func (a *app) memberChange(use, short, done string, method func(pb.ClusterClient, context.Context, *pb.MemberRequest, ...grpc.CallOption) (*pb.ListMembersResponse, error)) *cobra.Command {
	_, names, _ := strings.Cut(use, " ")
	return &cobra.Command{
		Use: use, Short: short, Args: takes(names), ValidArgsFunction: a.completeMembers,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				all, err := method(c.cluster, ctx, &pb.MemberRequest{Name: name})
				if err != nil && name != "" {
					return about("member", name, err)
				}
				if err != nil {
					return err
				}
				if name == "" {
					name = leaderOf(all)
				}
				a.note("member/%s %s", name, done)
				return a.printMembers(all)
			})
		},
	}
}

func leaderOf(all *pb.ListMembersResponse) string {
	for _, m := range all.Members {
		if m.Leader {
			return m.Name
		}
	}
	return "another"
}
