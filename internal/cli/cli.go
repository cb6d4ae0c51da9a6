// Package cli is the persys command line: it reads flags, environment and
// files, talks to a cluster through its gRPC API, prints answers, and starts
// servers and agents through the functions it is handed (Node). It decides
// nothing about the cluster, and never opens a data directory itself. What-if
// questions it answers from a snapshot, with the scheduler's own decisions.
//
// It is a package, and not the main package, so that main stays a few lines
// and whole commands are tested as users type them.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Env is the process as the commands see it.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	LookupEnv      func(string) (string, bool)
	// ConfigDir is where the user's configuration lives (~/.config).
	ConfigDir func() (string, error)
	Version   string
	Node      Node
}

// Node starts and prepares servers and agents: the functions of package
// server, or a test's.
type Node struct {
	Init func(context.Context, server.Config) error
	Join func(ctx context.Context, c server.Config, token string) (pb.Role, error)
	Run  func(context.Context, server.Config) error
	// AdminContext gives the administrator's credentials that Init left in the
	// data directory, as PEM.
	AdminContext func(dataDir string) (certificate, key, roots []byte, err error)
}

// app is one run of the program.
type app struct {
	Env
	global globalFlags
	out    *printer
	// Set once flags, environment and files are read: an error before that is
	// one of usage.
	started bool
	// How to end the deadline that --timeout set.
	cancel context.CancelFunc
}

type globalFlags struct {
	config    string
	context   string
	endpoints []string
	caFile    string
	certFile  string
	keyFile   string
	output    string
	timeout   time.Duration
}

// Main carries out one command line, without the program's name, and returns
// the exit code. ctx ends with the signals that are to stop the program.
func Main(ctx context.Context, args []string, env Env) int {
	a := &app{Env: env, cancel: func() {}}
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	refuseUnknown(root) // cobra's commands keep the output as it is now
	err := root.ExecuteContext(ctx)
	a.cancel()
	if err == nil {
		return exitOK
	}
	if ctx.Err() != nil && exitCode(err) == exitInterrupted {
		return exitInterrupted // whoever pressed ^C knows why
	}
	if errors.Is(err, errDiffers) {
		return exitDiffers
	}
	fmt.Fprintln(env.Stderr, "persys:", message(err))
	if !a.started {
		return exitUsage
	}
	return exitCode(err)
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "persys",
		Short: "Runs containers and processes on a cluster of machines",
		Long: `Persys runs containers and processes on a cluster of machines. One program is
the servers (the scheduler's replicas, with the state inside), the agents on the
machines that run work, and this command line.

  persys dev                 try it: a cluster in one process
  persys init                the first server of a real one
  persys apply -f web.yaml   run something`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		PersistentPreRunE: a.start,
		Args:              cobra.ArbitraryArgs,
		RunE:              groupRun,
	}
	root.SetFlagErrorFunc(flagError)
	flags := root.PersistentFlags()
	g := &a.global
	flags.StringVar(&g.config, "config", "", "the user's configuration `file` (default ~/.config/persys/config.yaml)")
	flags.StringVar(&g.context, "context", "", "`name` of the cluster in the configuration file")
	flags.StringSliceVar(&g.endpoints, "endpoint", nil, "gRPC `address` of a server, host[:port]; may be several, tried in turn")
	flags.StringVar(&g.caFile, "ca-file", "", "`file` with the cluster's root certificates (PEM)")
	flags.StringVar(&g.certFile, "cert-file", "", "`file` with the certificate to present (PEM)")
	flags.StringVar(&g.keyFile, "key-file", "", "`file` with its key (PEM)")
	flags.StringVarP(&g.output, "output", "o", "table", "`format` of what is printed: table, wide, json, yaml or name")
	flags.DurationVar(&g.timeout, "timeout", defaultTimeout, "how long the command may take; with --wait 5m0s unless given; 0: no limit")
	settings(flags, "config", "context", "endpoint", "ca-file", "cert-file", "key-file", "output", "timeout")
	completeFixed(root, "output", outputFormats...)
	must(root.RegisterFlagCompletionFunc("context", a.completeContexts))

	root.AddGroup(
		&cobra.Group{ID: groupWork, Title: "Workloads:"},
		&cobra.Group{ID: groupCluster, Title: "The cluster:"},
		&cobra.Group{ID: groupMachine, Title: "This machine:"},
	)
	root.AddCommand(a.workCommands()...)
	root.AddCommand(a.clusterCommands()...)
	root.AddCommand(a.machineCommands()...)
	root.AddCommand(a.workloadGroup(), a.jobGroup(), a.versionCommand())
	return root
}

// refuseUnknown has cobra's own commands refuse what does not exist; they would
// show their help and succeed.
func refuseUnknown(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "completion":
			c.Args, c.RunE = cobra.ArbitraryArgs, groupRun
		case "help":
			c.RunE = func(_ *cobra.Command, args []string) error {
				about, rest, err := root.Find(args)
				if err != nil || len(rest) == 0 {
					return errors.Join(err, about.Help())
				}
				return groupRun(about, rest)
			}
		}
	}
}

const (
	groupWork    = "work"
	groupCluster = "cluster"
	groupMachine = "machine"

	defaultTimeout = 15 * time.Second
	waitTimeout    = 5 * time.Minute
)

func (a *app) workCommands() []*cobra.Command {
	return inGroup(groupWork,
		a.applyCommand(), a.diffCommand(), a.runCommand(), a.getCommand(), a.describeCommand(), a.deleteCommand(), a.scaleCommand(),
		a.startCommand(), a.stopCommand(), a.restartCommand(), a.retryCommand(), a.rolloutGroup(), a.logsCommand(), a.whyCommand())
}

func (a *app) clusterCommands() []*cobra.Command {
	return inGroup(groupCluster,
		a.clusterGroup(), a.memberGroup(), a.nodeGroup(), a.planCommand(), a.tokenGroup(), a.schedulerGroup(), a.eventsCommand(), a.contextGroup())
}

func (a *app) machineCommands() []*cobra.Command {
	return inGroup(groupMachine, a.devCommand(), a.initCommand(), a.joinCommand(), a.serverCommand(), a.agentCommand(), a.simCommand())
}

func inGroup(id string, commands ...*cobra.Command) []*cobra.Command {
	for _, c := range commands {
		c.GroupID = id
	}
	return commands
}

// start reads what the environment and the user's file say beside the flags,
// and sets the deadline.
func (a *app) start(cmd *cobra.Command, args []string) error {
	for _, arg := range args {
		if !utf8.ValidString(arg) {
			return usageErrorf("argument %q is not UTF-8 text", arg)
		}
	}
	timeoutAsked := cmd.Flags().Changed("timeout")
	if err := fromEnvironment(cmd.Flags(), a.LookupEnv); err != nil {
		return err
	}
	if err := a.userDefaults(cmd); err != nil {
		return err
	}
	out, err := newPrinter(a.global.output, a.Stdout, a.Stderr, a.color(a.Stdout))
	if err != nil {
		return err
	}
	a.out = out
	if a.global.timeout < 0 {
		return usageErrorf("--timeout must not be negative; 0 means no limit")
	}
	ctx := cmd.Context()
	if limit := a.limit(cmd, timeoutAsked); limit > 0 {
		ctx, a.cancel = context.WithTimeout(ctx, limit)
		cmd.SetContext(ctx)
	}
	a.started = true
	return nil
}

// Commands that go on until they are stopped carry this annotation.
const endless = "persys-endless"

// limit is how long the command may take; 0 means no limit. What environment
// and file say is for single requests: it cuts short neither --wait nor -f.
func (a *app) limit(cmd *cobra.Command, asked bool) time.Duration {
	if asked {
		return a.global.timeout
	}
	isSet := func(name string) bool {
		f := cmd.Flags().Lookup(name)
		return f != nil && f.Value.String() == "true"
	}
	switch {
	case cmd.Annotations[endless] != "", isSet("follow"), isSet("watch"):
		return 0
	case isSet("wait"):
		limit := waitTimeout
		if f := cmd.Flags().Lookup("deadline"); f != nil {
			deadline, _ := time.ParseDuration(f.Value.String()) // it was parsed before
			limit = max(limit, deadline+time.Minute)
		}
		return limit
	}
	return a.global.timeout
}

// color reports whether w is a terminal whose user did not ask for plain text
// (https://no-color.org).
func (a *app) color(w io.Writer) bool {
	if v, _ := a.LookupEnv("NO_COLOR"); v != "" {
		return false
	}
	if v, _ := a.LookupEnv("TERM"); v == "dumb" {
		return false
	}
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// note tells the user something that is not the answer.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.Stderr, format+"\n", args...)
}

// groupRun is the run function of a command that only holds others.
func groupRun(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	var known []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			known = append(append(known, c.Name()), c.Aliases...)
		}
	}
	return usageErrorf("unknown command %q for %q%s; see %s --help", args[0], cmd.CommandPath(), didYouMean(args[0], known), cmd.CommandPath())
}

// flagError says what is wrong with a flag in a user's words. After a command
// that does not exist the flags are not the mistake.
func flagError(cmd *cobra.Command, err error) error {
	if words := cmd.Flags().Args(); cmd.HasSubCommands() && len(words) > 0 {
		return groupRun(cmd, words)
	}
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		return usageErrorf("--%s: %w", invalid.GetFlag().Name, causeOf(err))
	}
	return usageErrorf("%w; see %s --help", err, cmd.CommandPath())
}

func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: groupRun}
	c.AddCommand(commands...)
	return c
}

// takes checks the arguments against their names: "ID", "ID REPLICAS",
// "[NAME]", "ID..." for one or more, "[ID...]" for any number.
func takes(names string) cobra.PositionalArgs {
	least, most := 0, 0
	for _, n := range strings.Fields(names) {
		optional := strings.HasPrefix(n, "[")
		if !optional {
			least++
		}
		most++
		if strings.Contains(n, "...") {
			most = 1 << 20
		}
	}
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return usageErrorf("%s needs %s; see %s --help", cmd.CommandPath(), names, cmd.CommandPath())
		case len(args) > most && most == 0:
			return usageErrorf("%s takes no arguments, but there is %q", cmd.CommandPath(), args[0])
		case len(args) > most:
			return usageErrorf("%s takes %s, but there is also %q", cmd.CommandPath(), names, args[most])
		}
		return nil
	}
}

// must is for mistakes in the set-up of commands, which every run would meet.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func completeFixed(cmd *cobra.Command, flag string, values ...string) {
	must(cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)))
}
