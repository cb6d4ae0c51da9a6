package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/credentials"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// A shell that completes a word does not wait longer.
const completionTimeout = 2 * time.Second

// complete asks the cluster. Where it can't be asked there is nothing to
// propose, and nothing is said: the user is typing.
func (a *app) complete(cmd *cobra.Command, ask func(context.Context, *client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	if fromEnvironment(cmd.Flags(), a.LookupEnv) != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	t, err := a.target()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c := newClient(t.endpoints, credentials.NewTLS(t.creds.ClientTLS(nil, "h2")))
	defer c.pool.close()
	parent := cmd.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithTimeout(parent, completionTimeout)
	defer cancel()
	names, err := ask(ctx, c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeWorkloads(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, func(ctx context.Context, c *client) ([]string, error) {
		all, err := c.workloads.ListWorkloads(ctx, &pb.ListWorkloadsRequest{})
		var names []string
		for _, w := range all.GetWorkloads() {
			names = append(names, w.GetSpec().GetId())
		}
		return names, err
	})
}

func (a *app) completeNodes(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, func(ctx context.Context, c *client) ([]string, error) {
		all, err := c.nodes.ListNodes(ctx, &pb.ListNodesRequest{})
		var names []string
		for _, n := range all.GetNodes() {
			names = append(names, n.Id)
		}
		return names, err
	})
}

func (a *app) completeMembers(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, func(ctx context.Context, c *client) ([]string, error) {
		all, err := c.cluster.ListMembers(ctx, &pb.ListMembersRequest{})
		var names []string
		for _, m := range all.GetMembers() {
			if !m.Removed {
				names = append(names, m.Name)
			}
		}
		return names, err
	})
}

func (a *app) completeTokens(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, func(ctx context.Context, c *client) ([]string, error) {
		all, err := c.cluster.ListTokens(ctx, &pb.ListTokensRequest{})
		var names []string
		for _, t := range all.GetTokens() {
			names = append(names, t.Id)
		}
		return names, err
	})
}

func (a *app) completeContexts(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	path, err := a.configPath()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	config, err := loadUserConfig(path)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return config.names(), cobra.ShellCompDirectiveNoFileComp
}
