package cli

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) schedulerGroup() *cobra.Command {
	get := &cobra.Command{
		Use: "get", Aliases: []string{"ls", "list"}, Short: "Tell how the scheduler is set", Args: takes(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				config, err := c.cluster.GetSchedulerConfig(ctx, &pb.SchedulerConfigRequest{})
				if err != nil {
					return err
				}
				return a.schedulerConfig(config)
			})
		},
	}
	set := &cobra.Command{
		Use: "set NAME=VALUE...", Short: "Change how the scheduler is set, for the whole cluster", Args: takes("NAME=VALUE..."),
		Example: "  persys scheduler set rebalance=true rebalance-moves=5 rebalance-interval=10m\n  persys scheduler set rebalance-moves=default",
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			for _, s := range schedulerSettings {
				names = append(names, s.name+"=")
			}
			return names, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := setScheduler(&pb.SchedulerConfig{}, args); err != nil {
				return err
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				config, err := c.cluster.GetSchedulerConfig(ctx, &pb.SchedulerConfigRequest{})
				if err != nil {
					return err
				}
				if err := setScheduler(config, args); err != nil {
					return err
				}
				if config, err = c.cluster.SetSchedulerConfig(ctx, config); err != nil {
					return err
				}
				return a.schedulerConfig(config)
			})
		},
	}
	return group("scheduler", "What the scheduler does by itself", get, set)
}

func (a *app) schedulerConfig(c *pb.SchedulerConfig) error {
	if !a.out.forPeople() {
		return a.out.list(listing{names: []string{"scheduler"}, message: c})
	}
	for _, s := range schedulerSettings {
		if _, err := fmt.Fprintf(a.Stdout, "%-20s %s\n", s.name, s.get(c)); err != nil {
			return err
		}
	}
	return nil
}

// schedulerSetting is a setting by the name that people give it. set with an empty
// text is the default.
type schedulerSetting struct {
	name string
	get  func(*pb.SchedulerConfig) string
	set  func(*pb.SchedulerConfig, string) error
}

var schedulerSettings = []schedulerSetting{
	flagSetting("rebalance", func(c *pb.SchedulerConfig) *bool { return &c.Rebalance }),
	numberSetting("rebalance-moves", func(c *pb.SchedulerConfig) *int32 { return &c.RebalanceMoves }),
	{
		"rebalance-interval",
		func(c *pb.SchedulerConfig) string {
			return (time.Duration(c.RebalanceIntervalSeconds) * time.Second).String()
		},
		func(c *pb.SchedulerConfig, text string) error {
			if text == "" {
				c.RebalanceIntervalSeconds = 0
				return nil
			}
			d, err := time.ParseDuration(text)
			if err != nil || d < time.Second || d != d.Truncate(time.Second) || d > 1<<30*time.Second {
				return fmt.Errorf("%q is no duration in seconds or more; allowed: 90s, 5m, 1h", text)
			}
			c.RebalanceIntervalSeconds = int32(d / time.Second)
			return nil
		},
	},
	numberSetting("rebalance-threshold", func(c *pb.SchedulerConfig) *int32 { return &c.RebalanceThreshold }),
	flagSetting("no-preemption", func(c *pb.SchedulerConfig) *bool { return &c.NoPreemption }),
}

func flagSetting(name string, field func(*pb.SchedulerConfig) *bool) schedulerSetting {
	return schedulerSetting{
		name, func(c *pb.SchedulerConfig) string { return strconv.FormatBool(*field(c)) },
		func(c *pb.SchedulerConfig, text string) error {
			on, err := strconv.ParseBool(text)
			if err != nil && text != "" {
				return fmt.Errorf("%q is not allowed; allowed: true, false", text)
			}
			*field(c) = on
			return nil
		},
	}
}

func numberSetting(name string, field func(*pb.SchedulerConfig) *int32) schedulerSetting {
	return schedulerSetting{
		name, func(c *pb.SchedulerConfig) string { return strconv.Itoa(int(*field(c))) },
		func(c *pb.SchedulerConfig, text string) error {
			n, err := strconv.ParseInt(text, 10, 32)
			if text != "" && (err != nil || n <= 0) {
				return fmt.Errorf("%q is not allowed; allowed: a number above 0, or default", text)
			}
			*field(c) = int32(n)
			return nil
		},
	}
}

// setScheduler carries out NAME=VALUE.
func setScheduler(c *pb.SchedulerConfig, settings []string) error {
	for _, text := range settings {
		name, value, ok := strings.Cut(text, "=")
		at := slices.IndexFunc(schedulerSettings, func(s schedulerSetting) bool { return s.name == strings.ReplaceAll(name, "_", "-") })
		switch {
		case !ok:
			return usageErrorf("%q: must be NAME=VALUE", text)
		case at < 0:
			var names []string
			for _, s := range schedulerSettings {
				names = append(names, s.name)
			}
			return usageErrorf("there is no setting %q; allowed: %s", name, strings.Join(names, ", "))
		case value == "":
			return usageErrorf("%s: a value is missing; default means the default", name)
		case value == "default":
			value = ""
		}
		if err := schedulerSettings[at].set(c, value); err != nil {
			return usageErrorf("%s: %w", name, err)
		}
	}
	return nil
}
