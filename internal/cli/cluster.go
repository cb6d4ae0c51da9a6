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

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the version of this program", Args: takes(""),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(a.Stdout, "persys %s %s %s/%s\n", a.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
