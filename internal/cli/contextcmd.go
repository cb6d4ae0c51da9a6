package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"github.com/persys-dev/persys/internal/server"
)

func (a *app) contextGroup() *cobra.Command {
	g := group("context", "The clusters this command line knows", a.listContexts(), a.useContext(), a.addContext(), a.removeContext(), a.exportContext())
	g.Aliases = []string{"contexts"}
	return g
}

func (a *app) listContexts() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "Show the contexts", Args: takes(""),
		RunE: func(*cobra.Command, []string) error {
			path, err := a.configPath()
			if err != nil {
				return err
			}
			config, err := loadUserConfig(path)
			if err != nil {
				return err
			}
			if a.out.format == "json" || a.out.format == "yaml" {
				return usageErrorf("contexts are shown as a table or as names; the file itself is %s", path)
			}
			t := table{head: []string{"CURRENT", "NAME", "ENDPOINTS"}}
			for _, name := range config.names() {
				mark := " "
				if name == config.CurrentContext {
					mark = "*"
				}
				t.add(mark, name, strings.Join(config.Contexts[name].Endpoints, ","))
			}
			return a.out.list(listing{names: config.names(), table: t, empty: "no cluster is known; `persys dev` or `persys init` makes one"})
		},
	}
}

func (a *app) useContext() *cobra.Command {
	return &cobra.Command{
		Use: "use NAME", Short: "Make a context the current one", Args: takes("NAME"), ValidArgsFunction: a.completeContexts,
		RunE: func(_ *cobra.Command, args []string) error {
			err := a.changeContexts(func(c *userConfig) error {
				if c.Contexts[args[0]] == nil {
					return coded(exitNotFound, "there is no context %q%s", args[0], didYouMean(args[0], c.names()))
				}
				c.CurrentContext = args[0]
				return nil
			})
			return a.contextIs(args[0], "is the current one", err)
		},
	}
}

func (a *app) removeContext() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME", Aliases: []string{"remove", "delete"}, Short: "Forget a context", Args: takes("NAME"), ValidArgsFunction: a.completeContexts,
		RunE: func(_ *cobra.Command, args []string) error {
			return a.contextIs(args[0], "is forgotten", a.forgetContext(args[0], nil))
		},
	}
}

func (a *app) addContext() *cobra.Command {
	var dataDir string
	c := &cobra.Command{
		Use: "add NAME --data-dir DIR", Short: "Make a context from the first server's data directory", Args: takes("NAME"),
		Long: `Makes a context with the administrator's certificate that ` + "`persys init`" + ` left in
its data directory. Run it on that server, as a user who may read the directory.`,
		RunE: func(_ *cobra.Command, args []string) error {
			endpoints := a.global.endpoints
			if len(endpoints) == 0 {
				return usageErrorf("which server to talk to is missing: give --endpoint")
			}
			x, err := a.adminContext(dataDir, endpoints)
			if err != nil {
				return err
			}
			err = a.changeContexts(func(c *userConfig) error { return c.add(args[0], x, true) })
			return a.contextIs(args[0], "is the current one", err)
		},
	}
	c.Flags().StringVar(&dataDir, "data-dir", defaultDataDir(), "the server's data `directory`")
	return c
}

// contextIs says what has become of a context, unless it failed.
func (a *app) contextIs(name, what string, err error) error {
	if err == nil {
		a.note("context %q %s", name, what)
	}
	return err
}

// adminContext is a context with the administrator's credentials inside.
func (a *app) adminContext(dataDir string, endpoints []string) (*clusterContext, error) {
	endpoints, err := cleanEndpoints(endpoints)
	if err != nil {
		return nil, err
	}
	certificate, key, roots, err := a.Node.AdminContext(dataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, usageErrorf("there is no administrator's certificate in %s; `persys init` leaves one on the first server", dataDir)
	}
	if err != nil {
		return nil, err
	}
	return &clusterContext{Endpoints: endpoints, CA: string(roots), Cert: string(certificate), Key: string(key)}, nil
}

// add takes a context in. One of another cluster by that name is not replaced:
// its key may be the only one there is.
func (c *userConfig) add(name string, x *clusterContext, current bool) error {
	if old := c.Contexts[name]; old != nil && old.CA != x.CA {
		return coded(exitConflict, "context %q belongs to another cluster; choose another name, or forget it with `persys context rm %s`", name, name)
	}
	if c.Contexts == nil {
		c.Contexts = map[string]*clusterContext{}
	}
	c.Contexts[name] = x
	if current || c.CurrentContext == "" {
		c.CurrentContext = name
	}
	return nil
}

func (a *app) changeContexts(change func(*userConfig) error) error {
	path, err := a.configPath()
	if err != nil {
		return err
	}
	return updateUserConfig(path, change)
}

// forgetContext drops a context, unless it is another one than expected by now.
func (a *app) forgetContext(name string, expected *clusterContext) error {
	path, err := a.configPath()
	if err != nil {
		return err
	}
	err = updateUserConfig(path, func(c *userConfig) error {
		x := c.Contexts[name]
		if x == nil {
			return coded(exitNotFound, "there is no context %q%s", name, didYouMean(name, c.names()))
		}
		if expected != nil && x.CA != expected.CA {
			return nil
		}
		delete(c.Contexts, name)
		if c.CurrentContext == name {
			c.CurrentContext = ""
		}
		return nil
	})
	if err != nil {
		return err
	}
	return saveKnownServers(path, name, nil)
}

// serverEndpoint is where clients reach the server with this configuration.
func serverEndpoint(c server.Config) string { return hostPort(c.Advertise, c.GRPCPort) }

func consoleURL(c server.Config) string {
	return fmt.Sprintf("https://%s", hostPort(c.Advertise, c.HTTPSPort))
}
