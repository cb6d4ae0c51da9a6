package procs

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestJobsBySchedule runs a job with a schedule at once and when it is due, each
// run a workload of its own, and sees them go with it.
func TestJobsBySchedule(t *testing.T) {
	c := New(t, program)
	c.Init("s1")
	c.Join("agent", "a1")
	c.Eventually("a1 is ready", soon, func() error { return c.readyNodes(1) })

	// Nothing is due before somebody asks.
	c.Must("run", "--process", "--name", "yearly", "--schedule", "0 0 1 1 *", "--timezone", "Europe/Berlin", "--wait", "sh", "-c", "echo done")
	if all := c.Must("get", "workloads", "-o", "name"); all != "yearly\n" {
		t.Fatalf("workloads: %s", all)
	}
	run := strings.TrimSpace(c.Must("job", "run", "yearly", "-o", "name"))
	c.Eventually("the run has completed", soon, func() error {
		if got := c.Must("describe", run); !strings.Contains(got, "Completed") || !strings.Contains(got, "yearly") {
			return errors.New(got)
		}
		return nil
	})
	if got := c.Must("logs", run); got != "done\n" && !strings.Contains(got, "done") {
		t.Errorf("logs: %q", got)
	}
	if got := c.Must("describe", "yearly"); !strings.Contains(got, run) || !strings.Contains(got, "0 0 1 1 * (Europe/Berlin)") {
		t.Errorf("%s", got)
	}

	t.Log("a run that fails is exit code 6")
	c.Must("run", "--process", "--name", "failing", "--schedule", "@yearly", "--restart", "never", "sh", "-c", "exit 3")
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	_, said, err := c.Exec(ctx, "job", "run", "failing", "--wait")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitRollout || !strings.Contains(said, "exited with code 3") {
		t.Errorf("%v: %s", err, said)
	}

	t.Log("what is due each minute runs without being asked")
	c.Must("run", "--process", "--name", "minutely", "--schedule", "* * * * *", "true")
	c.Eventually("a run that was due has completed", 75*time.Second, func() error {
		got := c.Must("describe", "minutely")
		if _, runs, ok := strings.Cut(got, "\nRuns:\n"); !ok || !strings.Contains(runs, "Completed") {
			return errors.New(got)
		}
		return nil
	})

	t.Log("runs go with the job")
	c.Must("delete", "yearly", "failing", "minutely", "--wait")
	if all := c.Must("get", "workloads", "-o", "name"); all != "" {
		t.Errorf("left: %s", all)
	}
}

// TestPreemption has work of a higher priority take the port of other work, which
// comes back when it can.
func TestPreemption(t *testing.T) {
	c := New(t, program)
	c.Init("s1")
	c.Join("agent", "a1")
	c.Eventually("a1 is ready", soon, func() error { return c.readyNodes(1) })

	c.Must("run", "--process", "--name", "low", "--priority", "30", "-p", "18080", "--wait", "sh", "-c", "exec sleep 1000")
	c.Must("run", "--process", "--name", "near", "--priority", "39", "-p", "18080", "sh", "-c", "exec sleep 1000")
	c.Must("run", "--process", "--name", "high", "--priority", "40", "-p", "18080", "--wait", "sh", "-c", "exec sleep 1000")
	c.Eventually("low says for whom it made room", soon, func() error {
		if got := c.Must("why", "low"); !strings.Contains(got, "made room for high/0 on a1") {
			return errors.New(got)
		}
		return nil
	})
	if got := c.Must("why", "near"); !strings.Contains(got, "port 18080") {
		t.Errorf("%s", got)
	}
	if got := c.Must("events"); !strings.Contains(got, "made room for high/0") {
		t.Errorf("%s", got)
	}

	c.Must("delete", "high", "near", "--wait")
	c.Eventually("low runs again", soon, func() error {
		if all := c.replicas("low"); len(all) != 1 || all[0].State != "RUNNING" {
			return fmt.Errorf("%+v", all)
		}
		return nil
	})
}
