package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Commands that run on a machine of the cluster carry this annotation: they
// read nothing of the user's.
const onMachine = "persys-machine"

// machine is the configuration of a server or an agent on its way from flags,
// environment and file to the process.
type machine struct {
	config server.Config
	flags  *pflag.FlagSet
	file   string
	// Read where there is no -c and it exists.
	usualFile string
}

// machineFlags defines the flags that init, join, server and agent share.
func machineFlags(cmd *cobra.Command, usualFile string) *machine {
	m := &machine{flags: pflag.NewFlagSet("machine", pflag.ContinueOnError), usualFile: usualFile}
	f, c := m.flags, &m.config
	f.StringVar(&c.DataDir, "data-dir", defaultDataDir(), "`directory` for everything that must outlive the process")
	f.StringVar(&c.Name, "name", "", "`name` of this machine in the cluster (default: the host name)")
	f.StringVar(&c.Advertise, "advertise", "", "`IP` address by which others reach this machine")
	m.sharedFlags()
	settings(f, "data-dir", "name", "advertise")
	cmd.Flags().AddFlagSet(f)
	usual := "none"
	if usualFile != "" {
		usual = usualFile + " where it exists"
	}
	cmd.Flags().StringVarP(&m.file, "config-file", "c", "", "YAML `file` with these settings (default: "+usual+")")
	must(cmd.MarkFlagDirname("data-dir"))
	must(cmd.MarkFlagFilename("config-file", "yaml", "yml"))
	cmd.Annotations = map[string]string{onMachine: "yes", endless: "yes"}
	return m
}

// sharedFlags are those that persys dev has too.
func (m *machine) sharedFlags() {
	f, c := m.flags, &m.config
	f.StringVar(&c.Bind, "bind", c.Bind, "`IP` address to listen on (default: the advertised one)")
	f.IntVar(&c.HTTPSPort, "https-port", server.DefaultHTTPSPort, "`port` of REST and metrics")
	f.IntVar(&c.GRPCPort, "grpc-port", server.DefaultGRPCPort, "`port` of gRPC and raft")
	f.IntVar(&c.GossipPort, "gossip-port", server.DefaultGossipPort, "`port` of gossip, TCP and UDP")
	labelsVar(f, &c.Labels, "label", "", "label `k=v` of this node; may be repeated")
	f.StringVar(&c.Pool, "pool", "", "`name` of the pool that this node is in (default \"default\")")
	f.StringSliceVar(&c.Taints, "taint", nil, "taint `KEY[=VALUE]:EFFECT` of this node; may be repeated")
	documentVar(f, &c.Devices, "devices", "`YAML` list of devices that work may be given: name, ids, paths, attributes")
	documentVar(f, &c.StoragePools, "storage-pools", "`YAML` list of storage pools: name, driver, capacity, path")
	f.StringVar(&c.DockerHost, "docker-host", "", "`address` of the Docker Engine (default: DOCKER_HOST or the usual socket; none: no Docker)")
	f.StringSliceVar(&c.AllowBindRoots, "allow-bind-root", nil, "`directory` below which bind mounts are allowed; may be repeated")
	f.BoolVar(&c.AllowPrivileged, "allow-privileged", false, "let containers be privileged")
	f.StringVar(&c.CPU, "cpu", "", "cores to offer to workloads (default: all)")
	f.StringVar(&c.Memory, "memory", "", "memory to offer to workloads (default: all)")
	f.StringVar(&c.Disk, "disk", "", "disk to offer to workloads (default: what is free)")
	f.DurationVar(&c.LeaseTTL, "lease-ttl", 0, "how long a silent node is kept (default 10s)")
	m.etcdFlags()
	f.StringVar(&c.LogLevel, "log-level", c.LogLevel, "debug, info, warn or error")
	f.StringVar(&c.LogFormat, "log-format", "text", "text or json")
	settings(f, "bind", "https-port", "grpc-port", "gossip-port", "label=labels", "pool", "taint=taints", "devices", "storage-pools", "docker-host", "allow-bind-root=allow_bind_roots",
		"allow-privileged", "cpu", "memory", "disk", "lease-ttl", "log-level", "log-format")
}

// etcdFlags are named as etcd's, with the prefix that tells them from our own.
func (m *machine) etcdFlags() {
	f, c := m.flags, &m.config.Etcd
	f.StringVar(&c.Listen, "etcd-listen", "", "`HOST:PORT` for etcd's clients that have no certificate of the cluster (default: none); plain on loopback")
	f.StringVar(&c.CertFile, "etcd-cert-file", "", "certificate `file` of that port, PEM")
	f.StringVar(&c.KeyFile, "etcd-key-file", "", "key `file` of that port, PEM")
	f.StringVar(&c.TrustedCAFile, "etcd-trusted-ca-file", "", "`file` of the authorities that clients' certificates must come from, PEM (default: none needed)")
	f.BoolVar(&c.ClientCertAuth, "etcd-client-cert-auth", false, "the name in a client's certificate is that of a user of etcd's auth")
	f.IntVar(&c.MaxRequestBytes, "etcd-max-request-bytes", 0, "largest request of an etcd client (default 1572864)")
	f.IntVar(&c.MaxTxnOps, "etcd-max-txn-ops", 0, "most operations in a transaction of an etcd client (default 128)")
	f.IntVar(&c.MaxStreams, "etcd-max-streams", 0, "most calls that are open on one connection of an etcd client (default 10000)")
	f.DurationVar(&c.WatchProgress, "etcd-watch-progress-notify-interval", 0, "how often watchers without events that ask for it are told how far they are (default 10m)")
	f.Int64Var(&c.QuotaBytes, "etcd-quota-bytes", 0, "most bytes of keys and values, negative for no bound (default 8 GiB)")
	f.StringVar(&c.AutoCompactionMode, "auto-compaction-mode", "", "what auto-compaction goes by: periodic or revision (default periodic)")
	f.StringVar(&c.AutoCompactionRetention, "auto-compaction-retention", "", "how much of the past is kept: a `time` or a number of revisions; 0: all (default: 5m and 10000 revisions)")
	settings(f, "etcd-quota-bytes", "auto-compaction-mode", "auto-compaction-retention", "etcd-listen", "etcd-cert-file", "etcd-key-file", "etcd-trusted-ca-file", "etcd-client-cert-auth",
		"etcd-max-request-bytes", "etcd-max-txn-ops", "etcd-max-streams", "etcd-watch-progress-notify-interval")
}

// agentFlag is for those that run a server.
func (m *machine) agentFlag(cmd *cobra.Command) {
	m.flags.BoolVar(&m.config.Agent, "agent", false, "run workloads in this process too")
	settings(m.flags, "agent")
	cmd.Flags().AddFlag(m.flags.Lookup("agent"))
}

// complete adds what the file says and the defaults.
func (m *machine) complete() (server.Config, error) {
	if path := m.path(); path != "" {
		if err := fromFile(m.flags, path); err != nil {
			return m.config, usageErrorf("%w", err)
		}
	}
	c, err := m.config.WithDefaults()
	if err != nil {
		return c, usageErrorf("%w", err)
	}
	return c, nil
}

func (m *machine) path() string {
	if m.file != "" || m.usualFile == "" {
		return m.file
	}
	if _, err := os.Stat(m.usualFile); errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	return m.usualFile
}

// defaultDataDir is the system's place for root, else the user's.
func defaultDataDir() string {
	if os.Geteuid() == 0 {
		return "/var/lib/persys"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); dir != "" {
		return filepath.Join(dir, "persys")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".local", "share", "persys")
}

// portsFree says which port is taken, before anything is written: an init or a
// join that stops half-way would leave a used token or a strange directory.
func portsFree(c server.Config, role pb.Role) error {
	type use struct {
		network, flag string
		port          int
	}
	uses := []use{{"tcp", "gossip-port", c.GossipPort}, {"udp", "gossip-port", c.GossipPort}}
	if role == pb.Role_ROLE_SERVER {
		uses = append(uses, use{"tcp", "grpc-port", c.GRPCPort}, use{"tcp", "https-port", c.HTTPSPort})
	}
	for _, u := range uses {
		if err := portFree(u.network, hostPort(c.Bind, u.port)); err != nil {
			return coded(exitConflict, "port %d/%s on %s can't be used: %w; choose another with --%s, or --bind", u.port, u.network, c.Bind, err, u.flag)
		}
	}
	if listen := c.Etcd.Listen; role == pb.Role_ROLE_SERVER && listen != "" {
		if err := portFree("tcp", listen); err != nil {
			return coded(exitConflict, "%s can't be used for etcd's clients: %w; choose another with --etcd-listen", listen, err)
		}
	}
	return nil
}

// etcdOnServer refuses a port that an agent would not open.
func etcdOnServer(c server.Config, role pb.Role) error {
	if role != pb.Role_ROLE_SERVER && c.Etcd.Listen != "" {
		return usageErrorf("etcd_listen: only servers speak etcd, and this is to be an agent; leave it out")
	}
	return nil
}

func portFree(network, address string) error {
	var err error
	if network == "udp" {
		var c net.PacketConn
		if c, err = net.ListenPacket(network, address); err == nil {
			return c.Close()
		}
	} else {
		var l net.Listener
		if l, err = net.Listen(network, address); err == nil {
			return l.Close()
		}
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return errors.New(strings.TrimPrefix(op.Err.Error(), "bind: "))
	}
	return err
}

func (a *app) serverCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "server", Short: "Run a server that init or join has set up", Args: takes(""),
		Long: `Runs the server that the data directory holds; init and join set it up. This
is what systemd runs.`,
		Example: "  persys server -c /etc/persys/server.yaml",
	}
	m := machineFlags(c, "/etc/persys/server.yaml")
	m.agentFlag(c)
	c.RunE = a.runMachine(m, pb.Role_ROLE_SERVER)
	return c
}

func (a *app) agentCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "agent", Short: "Run an agent that join has set up", Args: takes(""),
		Example: "  persys agent -c /etc/persys/agent.yaml",
	}
	m := machineFlags(c, "/etc/persys/agent.yaml")
	c.RunE = a.runMachine(m, pb.Role_ROLE_AGENT)
	return c
}

func (a *app) runMachine(m *machine, role pb.Role) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		c, err := m.complete()
		if err != nil {
			return err
		}
		if err := etcdOnServer(c, role); err != nil {
			return err
		}
		c.Role = role
		return ended(cmd.Context(), a.Node.Run(cmd.Context(), c))
	}
}

func (a *app) joinCommand() *cobra.Command {
	var tokenFile string
	var noStart bool
	c := &cobra.Command{
		Use: "join TOKEN", Short: "Join a cluster as server or agent, and run", Args: takes("[TOKEN]"),
		Long: `Joins the cluster that the token is for, as what it is for, and runs. The same
line serves the first start and every later one: a machine that has joined
already just starts.`,
		Example: "  persys join persys1-… --name n1\n  persys join --token-file /run/secrets/persys --no-start",
	}
	m := machineFlags(c, "")
	m.agentFlag(c)
	c.Flags().StringVar(&tokenFile, "token-file", "", "`file` with the token; - is standard input")
	c.Flags().BoolVar(&noStart, "no-start", false, "only join; `persys server` or `persys agent` runs it later")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		text, err := a.tokenText(args, tokenFile)
		if err != nil {
			return err
		}
		token, err := pki.DecodeToken(text)
		if err != nil {
			return usageErrorf("%w", err)
		}
		config, err := m.complete()
		if err != nil {
			return err
		}
		if err := etcdOnServer(config, token.Role); err != nil {
			return err
		}
		if err := portsFree(config, token.Role); err != nil {
			return err
		}
		role, err := a.Node.Join(cmd.Context(), config, text)
		if err != nil {
			return err
		}
		a.note("%s is %s %s of cluster %s", config.Name, article(role), roleText(role), token.Cluster)
		if noStart {
			a.note("start it with: persys %s --data-dir %s --name %s", roleText(role), config.DataDir, config.Name)
			return nil
		}
		return ended(cmd.Context(), a.Node.Run(cmd.Context(), config))
	}
	return c
}

func article(r pb.Role) string {
	if r == pb.Role_ROLE_AGENT {
		return "an"
	}
	return "a"
}

// tokenText is the token from the argument, a file, or the environment, which
// other users of the machine can't read as they can arguments.
func (a *app) tokenText(args []string, file string) (string, error) {
	fromEnv, _ := a.LookupEnv("PERSYS_TOKEN")
	switch {
	case len(args) == 1 && file != "":
		return "", usageErrorf("the token is given twice: as an argument and with --token-file")
	case len(args) == 1:
		return args[0], nil
	case file == "" && fromEnv != "":
		return fromEnv, nil
	case file == "":
		return "", usageErrorf("persys join needs a TOKEN; `persys token create` on the cluster makes one")
	}
	read := func() ([]byte, error) { return readSmallFile(file) }
	if file == "-" {
		read = func() ([]byte, error) { return readSmall("standard input", a.Stdin) }
	}
	data, err := read()
	if err != nil {
		return "", usageErrorf("token file: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

func hostPort(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }

// where is the part of a command line that says which cluster is meant.
func where(context string, current bool) string {
	if current {
		return ""
	}
	return fmt.Sprintf(" --context %s", context)
}
