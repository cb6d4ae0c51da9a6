package procs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const exitRollout = 6

// TestRolloutIsTakenBack applies a revision that ends at once: the one who waits
// is told, and what ran before runs on.
func TestRolloutIsTakenBack(t *testing.T) {
	c := New(t, program)
	c.Init("s1")
	c.Join("agent", "a1")
	c.Eventually("a1 is ready", soon, func() error { return c.readyNodes(1) })
	file := func(script string) string {
		path := filepath.Join(t.TempDir(), "web.yaml")
		text := fmt.Sprintf(`
id: web
replicas: 2
process: {command: sh, args: [-c, %q]}
update: {min_healthy: 50%%, min_healthy_seconds: 3, healthy_deadline_seconds: 9, auto_rollback: true}
`, script)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c.Must("apply", "-f", file("exec sleep 1000"), "--wait")
	c.Must("rollout", "status", "web", "--wait")
	good := c.Must("rollout", "history", "web", "-o", "name")
	before := c.replicas("web")

	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	_, said, err := c.Exec(ctx, "apply", "-f", file("sleep 0.1; exit 3"), "--wait")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitRollout || !strings.Contains(said, "was taken back") {
		t.Fatalf("%v: %s", err, said)
	}
	t.Log(said)
	for i, r := range c.replicas("web") {
		if r.State != "RUNNING" || i == 1 && r.RuntimeID != before[1].RuntimeID {
			t.Errorf("replica %d is %+v, was %+v", i, r, before[i])
		}
	}
	if got := c.Must("describe", "web"); !strings.Contains(got, "exec sleep 1000") || !strings.Contains(got, strings.TrimSpace(good)) {
		t.Errorf("%s", got)
	}
	if all := strings.Fields(c.Must("rollout", "history", "web", "-o", "name")); len(all) != 2 || all[1] != strings.TrimSpace(good) {
		t.Errorf("history %v, the good one is %s", all, good)
	}

	t.Log("a good one is rolled out, and undone on request")
	c.Must("apply", "-f", file("exec sleep 2000"), "--wait")
	c.Must("rollout", "undo", "web", "--wait")
	if got := c.Must("describe", "web"); !strings.Contains(got, "exec sleep 1000") {
		t.Errorf("%s", got)
	}
}
