package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	initContext = "default"
	devContext  = "dev"
	// How often a server that starts is asked whether it answers.
	readyPoll = 100 * time.Millisecond
	// How long persys dev takes to delete what runs before it ends.
	cleanupTimeout = 15 * time.Second
)

func (a *app) initCommand() *cobra.Command {
	var noStart bool
	c := &cobra.Command{
		Use: "init", Short: "Found a cluster: set up its first server, and run it", Args: takes(""),
		Long: `Founds a cluster with this machine as its first server: makes the certificate
authority and the administrator's certificate, writes a context for this command
line, runs the server, and prints the lines with which other machines join.
Later starts are ` + "`persys server`" + `.`,
		Example: "  persys init --name s1 --advertise 192.0.2.11",
	}
	m := machineFlags(c, "/etc/persys/server.yaml")
	m.agentFlag(c)
	c.Flags().BoolVar(&noStart, "no-start", false, "only set up; `persys server` runs it later")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		config, err := m.complete()
		if err != nil {
			return err
		}
		name := a.global.context
		if name == "" {
			name = initContext
		}
		if err := a.contextFree(name, config.DataDir); err != nil {
			return err
		}
		if err := portsFree(config, pb.Role_ROLE_SERVER); err != nil {
			return err
		}
		if err := a.Node.Init(cmd.Context(), config); err != nil {
			return err
		}
		x, err := a.saveAdmin(config, name, true)
		if err != nil {
			return err
		}
		if noStart {
			a.note("set up; start it with: persys server --data-dir %s --name %s", config.DataDir, config.Name)
			return nil
		}
		return a.serve(cmd.Context(), config, x, func(ctx context.Context, c *client) error {
			return a.announce(ctx, c, config, name)
		}, nil)
	}
	return c
}

// contextFree refuses a name that is taken before anything is made: the key of
// that other cluster must not be lost.
func (a *app) contextFree(name, dataDir string) error {
	path, err := a.configPath()
	if err != nil {
		return nil // nothing is written then, and the user is told
	}
	config, err := loadUserConfig(path)
	if err != nil {
		return err
	}
	if x := config.Contexts[name]; x != nil {
		if _, _, roots, err := a.Node.AdminContext(dataDir); err == nil && string(roots) == x.CA {
			return coded(exitConflict, "data directory %s already belongs to the cluster of context %q; start it with `persys server`, or choose another directory", dataDir, name)
		}
		return coded(exitConflict, "context %q in %s is another cluster's; name this one with --context NAME, or forget that one with `persys context rm %s`", name, path, name)
	}
	return nil
}

// saveAdmin writes the context. Where there is no place for it the cluster is
// none the worse, and the user is told.
func (a *app) saveAdmin(config server.Config, name string, current bool) (*clusterContext, error) {
	x, err := a.adminContext(config.DataDir, []string{serverEndpoint(config)})
	if err != nil {
		return nil, err
	}
	if err := a.changeContexts(func(c *userConfig) error { return c.add(name, x, current) }); err != nil {
		a.note("persys: warning: no context was written: %s; `persys context add` does it later", message(err))
	}
	return x, nil
}

// announce prints where the cluster is and how others join.
func (a *app) announce(ctx context.Context, c *client, config server.Config, name string) error {
	path, err := a.configPath()
	if err != nil {
		path = "nowhere"
	}
	w := a.Stdout
	fmt.Fprintf(w, "The cluster is up; this is server %s.\n\n", config.Name)
	fmt.Fprintf(w, "  REST and metrics  %s\n  gRPC              %s\n  context           %q in %s\n", consoleURL(config), serverEndpoint(config), name, path)
	fmt.Fprint(w, etcdLine(config))
	for _, x := range []struct {
		role pb.Role
		what string
	}{
		{pb.Role_ROLE_SERVER, "A further server (three in all survive the loss of one)"},
		{pb.Role_ROLE_AGENT, "A machine that runs work"},
	} {
		token, err := c.cluster.CreateToken(ctx, &pb.CreateTokenRequest{Role: x.role, Ttl: durationpb.New(defaultTokenTTL), Uses: 1})
		if err != nil {
			return fmt.Errorf("join token: %w", err)
		}
		fmt.Fprintf(w, "\n%s joins with\n\n  persys join %s\n", x.what, token.Secret)
	}
	_, err = fmt.Fprintf(w, "\nEach line is for one machine, within %s; `persys token create` makes more.\n", span(defaultTokenTTL))
	return err
}

// etcdLine says where etcd's clients find a port of their own; empty where there is
// none.
func etcdLine(c server.Config) string {
	if c.Etcd.Listen == "" {
		return ""
	}
	return fmt.Sprintf("  etcd              %s\n", c.Etcd.Listen)
}

func (a *app) devCommand() *cobra.Command {
	m := &machine{flags: pflag.NewFlagSet("machine", pflag.ContinueOnError)}
	m.config = server.Config{Name: "dev", Advertise: "127.0.0.1", Bind: "127.0.0.1", Agent: true, LogLevel: "error"}
	m.sharedFlags()
	c := &cobra.Command{
		Use: "dev", Short: "Run a cluster in one process, to try things", Args: takes(""),
		Long: `Runs a server and an agent in one process, with temporary data, on loopback.
When it is stopped, its workloads and its data are gone.`,
		Annotations: map[string]string{onMachine: "yes", endless: "yes"},
	}
	c.Flags().AddFlagSet(m.flags)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if m.flags.Changed("bind") {
			m.config.Advertise = m.config.Bind
		}
		dir, err := os.MkdirTemp("", "persys-dev-")
		if err != nil {
			return fmt.Errorf("temporary data: %w", err)
		}
		m.config.DataDir = dir
		return errors.Join(a.dev(cmd.Context(), m), os.RemoveAll(dir))
	}
	return c
}

func (a *app) dev(ctx context.Context, m *machine) error {
	config, err := m.complete()
	if err != nil {
		return err
	}
	if err := portsFree(config, pb.Role_ROLE_SERVER); err != nil {
		return err
	}
	name := a.global.context
	if name == "" {
		name = devContext
		// One that a killed dev left behind is nobody's.
		if err := a.forgetContext(name, nil); err != nil && exitCode(err) != exitNotFound {
			a.note("persys: warning: %s", message(err))
		}
	} else if err := a.contextFree(name, config.DataDir); err != nil {
		return err
	}
	if err := a.Node.Init(ctx, config); err != nil {
		return err
	}
	x, err := a.saveAdmin(config, name, false)
	if err != nil {
		return err
	}
	defer func() {
		if err := a.forgetContext(name, x); err != nil && exitCode(err) != exitNotFound {
			a.note("persys: warning: %s", message(err))
		}
	}()
	return a.serve(ctx, config, x, func(ctx context.Context, c *client) error {
		if err := awaitNode(ctx, c); err != nil {
			return err
		}
		return a.announceDev(config, name)
	}, a.deleteAll)
}

func (a *app) announceDev(config server.Config, name string) error {
	current := false
	if path, err := a.configPath(); err == nil {
		if c, err := loadUserConfig(path); err == nil {
			current = c.CurrentContext == name
		}
	}
	persys := "persys" + where(name, current)
	_, err := fmt.Fprintf(a.Stdout, `A cluster of one is up. Its data is temporary; ^C ends it.

  REST and metrics  %s
  gRPC              %s
%s
Try, in another terminal:

  %s run --process --name hello -- sh -c 'while sleep 1; do date; done'
  %s logs hello -f
  %s get workloads
`, consoleURL(config), serverEndpoint(config), etcdLine(config), persys, persys, persys)
	return err
}

// awaitNode waits until there is a node to run something on.
func awaitNode(ctx context.Context, c *client) error {
	return poll(ctx, func() (bool, error) {
		all, err := c.nodes.ListNodes(ctx, &pb.ListNodesRequest{})
		for _, n := range all.GetNodes() {
			if n.State == pb.NodeState_READY {
				return true, nil
			}
		}
		return false, err
	})
}

// deleteAll ends what runs on a cluster that is about to vanish, and with it
// the only one who knows of it.
func (a *app) deleteAll(ctx context.Context, c *client) error {
	all, err := listWorkloads(ctx, c, "", false)
	if err != nil || len(all.Workloads) == 0 {
		return err
	}
	a.note("deleting %s", counted(len(all.Workloads), "workload"))
	for _, w := range all.Workloads {
		if _, err := c.workloads.DeleteWorkload(ctx, &pb.DeleteWorkloadRequest{Id: w.GetSpec().GetId()}); err != nil {
			return err
		}
	}
	return poll(ctx, func() (bool, error) {
		all, err := listWorkloads(ctx, c, "", false)
		return err == nil && len(all.Workloads) == 0, err
	})
}

func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// serve runs the machine until ctx ends or the machine does. Once its API
// answers, ready is called with a client; before it is stopped, leave is.
func (a *app) serve(ctx context.Context, config server.Config, x *clusterContext, ready, leave func(context.Context, *client) error) error {
	creds, err := pki.CredentialsFromPEM([]byte(x.Cert), []byte(x.Key), []byte(x.CA))
	if err != nil {
		return err
	}
	c := newClient(x.Endpoints, credentials.NewTLS(creds.ClientTLS(nil, "h2")))
	defer c.pool.close()

	// The machine outlives ctx for as long as leave takes.
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	stopped := make(chan error, 1)
	go func() { stopped <- a.Node.Run(running, config) }()
	announced := make(chan error, 1)
	starting, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { announced <- whenReady(starting, c, ready) }()
	for {
		select {
		case err := <-stopped:
			return err
		case err := <-announced:
			if err != nil && ctx.Err() == nil {
				stop()
				return errors.Join(err, ended(running, <-stopped))
			}
			announced = nil
		case <-ctx.Done():
			if leave != nil {
				a.leave(context.WithoutCancel(ctx), c, leave)
			}
			stop()
			return ended(running, <-stopped)
		}
	}
}

func (a *app) leave(ctx context.Context, c *client, leave func(context.Context, *client) error) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	if err := leave(ctx, c); err != nil {
		a.note("persys: warning: some workloads may go on: %s", message(err))
	}
}

func whenReady(ctx context.Context, c *client, ready func(context.Context, *client) error) error {
	err := poll(ctx, func() (bool, error) {
		_, err := c.cluster.GetClusterSummary(ctx, &pb.ClusterSummaryRequest{})
		if exitCode(err) == exitUnavailable {
			return false, ctx.Err() // not yet
		}
		return err == nil, err
	})
	if err != nil {
		return err
	}
	return ready(ctx, c)
}

// ended takes the end that was asked for as what it is.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// More than this is no token, configuration or certificate.
const smallFile = 1 << 20

// readSmallFile reads a file that has no reason to be large, and perhaps no end.
func readSmallFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readSmall(path, f)
}

func readSmall(path string, r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, smallFile+1))
	if err == nil && len(data) > smallFile {
		err = fmt.Errorf("%s is larger than %d MiB", path, smallFile>>20)
	}
	return data, err
}
