package cli

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// runOptions are the flags of persys run.
type runOptions struct {
	process    bool
	name       string
	replicas   int32
	global     bool
	job        bool
	kind       string
	schedule   string
	timezone   string
	priority   int32
	ports      []string
	env        []string
	volumes    []string
	cpu        string
	memory     string
	labels     map[string]string
	nodeLabels map[string]string
	node       string
	restart    string
	exclusive  bool
	wait       bool
	print      bool
}

func (a *app) runCommand() *cobra.Command {
	o := &runOptions{}
	c := &cobra.Command{
		Use:   "run IMAGE [ARG...] | run --process COMMAND [ARG...]",
		Short: "Run an image or a program, without writing a file",
		Long: `Runs a container from an image or, with --process, a program that is on the
nodes. What follows the image or command is its own. --print shows the file for
` + "`persys apply`" + ` instead of running anything.`,
		Example: `  persys run --name web -p 8080:80 --replicas 2 --wait nginx:1.29
  persys run --process --name tick -- sh -c 'while sleep 1; do date; done'
  persys run --print -p 80 nginx > web.yaml`,
		Args: takes("IMAGE|COMMAND [ARG]..."),
		RunE: func(cmd *cobra.Command, args []string) error {
			spec, err := o.spec(cmd, args)
			if err != nil {
				return usageErrorf("%w", err)
			}
			if o.print {
				if a.out.format != "json" {
					a.out.format = "yaml"
				}
				return a.out.message(spec)
			}
			return a.apply(cmd, []*pb.ApplyWorkloadRequest{{Spec: spec, CreateOnly: true}}, o.wait)
		},
	}
	flags := c.Flags()
	flags.SetInterspersed(false)
	flags.BoolVar(&o.process, "process", false, "run a program of the nodes, not an image")
	flags.StringVar(&o.name, "name", "", "`id` of the workload (default: from the image or command)")
	flags.Int32Var(&o.replicas, "replicas", 1, "how many")
	flags.BoolVar(&o.global, "global", false, "one on each node that fits")
	flags.BoolVar(&o.job, "job", false, "run to completion")
	flags.StringVar(&o.kind, "kind", "", "service, global or job")
	flags.StringVar(&o.schedule, "schedule", "", "run a job again and again, at the times of a `cron` expression; implies --job")
	flags.StringVar(&o.timezone, "timezone", "", "of the schedule, an IANA `name` (default UTC)")
	flags.Int32Var(&o.priority, "priority", model.DefaultPriority, "0 to 100; higher goes first where room is short")
	flags.StringArrayVarP(&o.ports, "publish", "p", nil, "port `[[IP:]NODE-PORT:]PORT[/udp]`; without a node port one is chosen; may be repeated")
	flags.StringArrayVarP(&o.env, "env", "e", nil, "variable `NAME=VALUE`; may be repeated")
	flags.StringArrayVarP(&o.volumes, "volume", "v", nil, "bind mount `NODE-PATH:PATH[:ro]`; may be repeated")
	flags.StringVar(&o.cpu, "cpu", "", "cores, as in 0.5 or 500m")
	flags.StringVar(&o.memory, "memory", "", "as in 256Mi")
	labelsVar(flags, &o.labels, "label", "l", "label `k=v` of the workload; may be repeated")
	labelsVar(flags, &o.nodeLabels, "node-label", "", "only on nodes with this label `k=v`; may be repeated")
	flags.StringVar(&o.node, "node", "", "only on this node")
	flags.StringVar(&o.restart, "restart", "", "always, on-failure or never")
	flags.BoolVar(&o.exclusive, "exclusive", false, "never two running instances of a replica")
	flags.BoolVar(&o.wait, "wait", false, "wait until it runs, or the job has ended; a failure is exit code 6")
	flags.BoolVar(&o.print, "print", false, "print the file for apply; run nothing")
	must(c.RegisterFlagCompletionFunc("node", a.completeNodes))
	completeFixed(c, "restart", "always", "on-failure", "never")
	completeFixed(c, "kind", "service", "global", "job")
	return c
}

// spec is the workload that the flags describe, checked.
func (o *runOptions) spec(cmd *cobra.Command, args []string) (*pb.WorkloadSpec, error) {
	s := &pb.WorkloadSpec{Id: o.name, Labels: o.labels, Exclusive: o.exclusive}
	if s.Id == "" {
		s.Id = nameFor(args[0])
		if s.Id == "" {
			return nil, fmt.Errorf("no id can be made from %q; give --name", args[0])
		}
	}
	var err error
	if s.Kind, err = o.kindOf(cmd); err != nil {
		return nil, err
	}
	if o.schedule != "" {
		s.Schedule = &pb.Schedule{Cron: o.schedule, Timezone: o.timezone}
	}
	if cmd.Flags().Changed("replicas") {
		s.Replicas = &o.replicas
	}
	if cmd.Flags().Changed("priority") {
		s.Priority = &o.priority
	}
	if o.cpu != "" || o.memory != "" {
		s.Resources = &pb.Resources{Cpu: o.cpu, Memory: o.memory}
	}
	if len(o.nodeLabels) > 0 || o.node != "" {
		s.Placement = &pb.Placement{NodeLabels: o.nodeLabels}
		if o.node != "" {
			s.Placement.Nodes = []string{o.node}
		}
	}
	if s.Restart, err = parseRestart(o.restart); err != nil {
		return nil, err
	}
	if s.Env, err = o.environment(); err != nil {
		return nil, err
	}
	var ports []*pb.Port
	for _, p := range o.ports {
		port, err := parsePort(p)
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	if o.process {
		if len(o.volumes) > 0 {
			return nil, fmt.Errorf("--volume is for containers; a process sees the node's files as they are")
		}
		for _, p := range ports {
			// A process listens on the node itself: there is one port.
			if p.HostPort != 0 && p.HostPort != p.ContainerPort {
				return nil, fmt.Errorf("--publish %d:%d: a process has no port of its own to lead to; give one number, or 0 for a chosen one", p.HostPort, p.ContainerPort)
			}
			p.HostPort, p.ContainerPort = p.ContainerPort, 0
		}
		s.Spec = &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: args[0], Args: args[1:], Ports: ports}}
	} else {
		mounts, err := parseMounts(o.volumes)
		if err != nil {
			return nil, err
		}
		s.Spec = &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: args[0], Args: args[1:], Ports: ports, Volumes: mounts}}
	}
	return s, model.Validate(model.Normalize(s))
}

// kindOf is what --kind and its short forms say.
func (o *runOptions) kindOf(cmd *cobra.Command) (pb.WorkloadKind, error) {
	kinds := map[string]pb.WorkloadKind{"": pb.WorkloadKind_SERVICE, "service": pb.WorkloadKind_SERVICE, "global": pb.WorkloadKind_GLOBAL, "job": pb.WorkloadKind_JOB}
	kind, ok := kinds[o.kind]
	if !ok {
		return 0, fmt.Errorf("--kind %q; there are service, global, job", o.kind)
	}
	job, global := o.job || o.schedule != "", o.global
	if o.kind != "" && (job && kind != pb.WorkloadKind_JOB || global && kind != pb.WorkloadKind_GLOBAL) {
		return 0, fmt.Errorf("--kind %s contradicts --job, --schedule or --global", o.kind)
	}
	switch {
	case job:
		kind = pb.WorkloadKind_JOB
	case global:
		kind = pb.WorkloadKind_GLOBAL
	}
	if kind == pb.WorkloadKind_GLOBAL && cmd.Flags().Changed("replicas") || global && job {
		return 0, fmt.Errorf("--global goes with neither --job nor --replicas")
	}
	if o.timezone != "" && o.schedule == "" {
		return 0, fmt.Errorf("--timezone is of a --schedule")
	}
	return kind, nil
}

func (o *runOptions) environment() (map[string]string, error) {
	if len(o.env) == 0 {
		return nil, nil
	}
	env := map[string]string{}
	for _, e := range o.env {
		name, value, ok := strings.Cut(e, "=")
		if name == "" || !ok {
			return nil, fmt.Errorf("--env %q: must be NAME=VALUE", e)
		}
		env[name] = value
	}
	return env, nil
}

func parseRestart(text string) (*pb.RestartPolicy, error) {
	conditions := map[string]pb.RestartPolicy_Condition{
		"always": pb.RestartPolicy_ALWAYS, "on-failure": pb.RestartPolicy_ON_FAILURE, "never": pb.RestartPolicy_NEVER,
	}
	if text == "" {
		return nil, nil
	}
	condition, ok := conditions[text]
	if !ok {
		return nil, fmt.Errorf("--restart %q%s; there are %s", text, didYouMean(text, slices.Sorted(maps.Keys(conditions))), strings.Join(slices.Sorted(maps.Keys(conditions)), ", "))
	}
	return &pb.RestartPolicy{Condition: condition}, nil
}

// parsePort reads [[IP:]NODE-PORT:]PORT[/PROTOCOL].
func parsePort(text string) (*pb.Port, error) {
	bad := fmt.Errorf("--publish %q: must be [[IP:]NODE-PORT:]PORT[/udp], as in 80, 8080:80 or 127.0.0.1:8080:80", text)
	rest, protocol, _ := strings.Cut(text, "/")
	p := &pb.Port{Protocol: protocol}
	container, host := rest, ""
	if i := strings.LastIndex(rest, ":"); i >= 0 {
		container, host = rest[i+1:], rest[:i]
		if i := strings.LastIndex(host, ":"); i >= 0 {
			p.HostIp, host = strings.Trim(host[:i], "[]"), host[i+1:]
		}
	}
	for _, x := range []struct {
		text string
		into *int32
	}{{container, &p.ContainerPort}, {host, &p.HostPort}} {
		if x.text == "" {
			continue
		}
		n, err := strconv.ParseUint(x.text, 10, 16)
		if err != nil {
			return nil, bad
		}
		*x.into = int32(n)
	}
	if container == "" {
		return nil, bad
	}
	return p, nil
}

func parseMounts(texts []string) ([]*pb.Mount, error) {
	var mounts []*pb.Mount
	for _, text := range texts {
		parts := strings.Split(text, ":")
		readOnly := len(parts) == 3 && parts[2] == "ro"
		if len(parts) != 2 && !readOnly || !path.IsAbs(parts[0]) || !path.IsAbs(parts[1]) {
			return nil, fmt.Errorf("--volume %q: must be NODE-PATH:PATH or NODE-PATH:PATH:ro, both absolute", text)
		}
		mounts = append(mounts, &pb.Mount{HostPath: parts[0], ContainerPath: parts[1], ReadOnly: readOnly})
	}
	return mounts, nil
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// nameFor makes a DNS label from an image or a path, or nothing.
func nameFor(what string) string {
	base := path.Base(what)
	base, _, _ = strings.Cut(base, "@")
	base, _, _ = strings.Cut(base, ":")
	name := strings.Trim(notInNames.ReplaceAllString(strings.ToLower(base), "-"), "-")
	if len(name) > 63 {
		name = strings.Trim(name[:63], "-")
	}
	return name
}
