package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) tokenGroup() *cobra.Command {
	list := a.listTokens("ls")
	list.Aliases = []string{"list"}
	g := group("token", "Tokens with which machines join", a.createTokenCommand(), list, a.revokeTokenCommand())
	g.Aliases = []string{"tokens"}
	return g
}

func roleText(r pb.Role) string { return pki.RoleName(r) }

func (a *app) createTokenCommand() *cobra.Command {
	var (
		role, name string
		ttl        time.Duration
		uses       int32
		labels     map[string]string
	)
	c := &cobra.Command{
		Use: "create --role server|agent", Short: "Make a join token; it is shown this once", Args: takes(""),
		Long: `Makes a join token and prints it on standard output, alone, so that it can be
put into a variable or a pipe. Whoever has it can join until it expires or is
used up.`,
		Example: "  TOKEN=$(persys token create --role agent --uses 10)\n  persys token create --role server --node s4",
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := pki.ParseRole(role)
			if err != nil || r != pb.Role_ROLE_SERVER && r != pb.Role_ROLE_AGENT {
				return usageErrorf("--role must be server or agent, not %q", role)
			}
			if ttl <= 0 {
				return usageErrorf("--ttl must be positive, not %s", ttl)
			}
			if uses < 1 {
				return usageErrorf("--uses must be at least 1, not %d", uses)
			}
			request := &pb.CreateTokenRequest{Role: r, Node: name, Ttl: durationpb.New(ttl), Uses: uses, Labels: labels}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				answer, err := c.cluster.CreateToken(ctx, request)
				if err != nil {
					return err
				}
				return a.printNewToken(answer)
			})
		},
	}
	flags := c.Flags()
	flags.StringVar(&role, "role", "", "what joins with it: server or agent")
	flags.StringVar(&name, "node", "", "the only `name` that may join with it (default: any)")
	flags.DurationVar(&ttl, "ttl", defaultTokenTTL, "how long it can be used")
	flags.Int32Var(&uses, "uses", 1, "how many machines may join with it")
	labelsVar(flags, &labels, "label", "", "label `k=v` of the nodes that join with it; may be repeated")
	completeFixed(c, "role", "server", "agent")
	return c
}

const defaultTokenTTL = 3 * time.Hour

func (a *app) printNewToken(answer *pb.CreateTokenResponse) error {
	if a.out.format == "json" || a.out.format == "yaml" {
		return a.out.message(answer)
	}
	if _, err := fmt.Fprintln(a.Stdout, answer.Secret); err != nil || a.out.format == "name" {
		return err
	}
	t := answer.Token
	who := "any machine"
	if t.GetNode() != "" {
		who = t.Node
	}
	a.note("token %s lets %s join as %s, %s, with%s; on that machine: persys join TOKEN", t.GetId(), who, roleText(t.GetRole()),
		times(t.GetUsesLeft()), expiry(t, time.Now()))
	return nil
}

func times(n int32) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

func (a *app) listTokens(use string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: "Show the join tokens that are left", Args: takes(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				all, err := c.cluster.ListTokens(ctx, &pb.ListTokensRequest{})
				if err != nil {
					return err
				}
				l := listing{table: tokenTable(all.Tokens, time.Now()), message: all, empty: "there are no join tokens"}
				for _, t := range all.Tokens {
					l.names = append(l.names, t.Id)
				}
				return a.out.list(l)
			})
		},
	}
}

func (a *app) revokeTokenCommand() *cobra.Command {
	return &cobra.Command{
		Use: "revoke ID...", Aliases: []string{"rm"}, Short: "Make join tokens useless", Args: takes("ID..."), ValidArgsFunction: a.completeTokens,
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				return forEach(ids, func(id string) error {
					if _, err := c.cluster.RevokeToken(ctx, &pb.TokenRequest{Id: id}); err != nil {
						return about("token", id, err)
					}
					_, err := fmt.Fprintf(a.Stdout, "token/%s is revoked\n", id)
					return err
				})
			})
		},
	}
}
