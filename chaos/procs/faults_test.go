package procs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const short = 2 * time.Second

// TestServersUnderFaults breaks servers in every way that a majority survives, and
// all at once, and demands that work and agents take no notice.
func TestServersUnderFaults(t *testing.T) {
	c := New(t, program)
	s := newStamps(t)
	servers := map[string]*Process{"s1": c.Init("s1")}
	servers["s2"], servers["s3"] = c.Join("server", "s2"), c.Join("server", "s3")
	agents := []*Process{c.Join("agent", "a1", "--docker-host", "none"), c.Join("agent", "a2", "--docker-host", "none")}
	c.clean()
	c.Eventually("three voters", soon, func() error { return c.voters(3) })
	c.Eventually("two nodes are ready", soon, func() error { return c.readyNodes(2) })
	c.put(servers["s1"], s.spec("steady", 4, false, ""))
	c.put(servers["s1"], s.spec("mark", 1, false, "before"))
	c.runs("steady", 4)
	c.runs("mark", 1)
	steady := c.replicas("steady")
	// untouched: no replica of steady was started again or moved.
	untouched := func(when string) {
		t.Helper()
		c.Eventually("two nodes are ready "+when, soon, func() error { return c.readyNodes(2) })
		c.runs("steady", 4)
		if now := c.replicas("steady"); !slices.EqualFunc(now, steady, sameRun) {
			t.Errorf("%s: the replicas were\n%+v and are\n%+v", when, steady, now)
		}
		if n := len(s.of("steady")); n != 4 {
			t.Errorf("%s: %d starts of 4 replicas", when, n)
		}
	}

	t.Log("the leader is stopped and wakes: nothing old is read through it")
	old := servers[c.leader()]
	if _, mark, _, err := c.mark(old); err != nil || mark != "before" {
		t.Fatalf("%q, %v", mark, err)
	}
	old.Pause()
	took := c.Eventually("a write through another", soon, func() error { return c.tryPut(other(servers, old), s.spec("mark", 1, false, "after")) })
	t.Logf("first write after the leader was stopped: %s", took.Round(time.Millisecond))
	var readers sync.WaitGroup
	for range 8 { // asked while it sleeps
		readers.Go(func() {
			if status, mark, _, err := c.mark(old); err == nil && status == http.StatusOK && mark != "after" {
				t.Errorf("read %q through the leader of before", mark)
			}
		})
	}
	old.Resume()
	c.Eventually("it answers, with what was written", soon, func() error {
		status, mark, body, err := c.mark(old)
		if err == nil && status == http.StatusOK && mark != "after" {
			t.Fatalf("read %q through the leader of before", mark)
		}
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%d %s", status, body)
		}
		return err
	})
	readers.Wait()
	c.Eventually("it has caught up", soon, func() error { return c.caughtUp(old.Name) })
	untouched("after the leader slept")

	t.Log("the leader is killed while a revision is rolled out")
	c.put(servers["s1"], s.spec("many", 6, false, "one"))
	c.runs("many", 6)
	c.put(servers["s1"], s.spec("many", 6, false, "two"))
	dead := servers[c.leader()]
	dead.Kill()
	took = c.runs("many", 6)
	s.count(c, "many", 6)
	t.Logf("all of them new after: %s", took.Round(time.Millisecond))
	dead.Start()
	c.Eventually("it is back", soon, func() error { return c.caughtUp(dead.Name) })

	t.Log("rolling restart")
	w := c.write(servers)
	for _, name := range []string{"s1", "s2", "s3"} {
		p := servers[name]
		p.Stop()
		p.Start()
		c.Eventually(name+" has caught up", soon, func() error { return c.caughtUp(name) })
	}
	gap, writes := w.end()
	t.Logf("%d writes while all servers were restarted in turn; the longest gap between two: %s", writes, gap.Round(time.Millisecond))
	if gap > 5*time.Second {
		t.Errorf("no write for %s", gap)
	}
	untouched("after the rolling restart")

	t.Log("everything is killed at once and started")
	for _, p := range servers {
		p.Kill()
	}
	for _, p := range agents {
		p.Kill()
	}
	for _, p := range servers {
		p.Start()
	}
	for _, p := range agents {
		p.Start()
	}
	took = c.Eventually("a write", soon, func() error { return c.tryPut(servers["s1"], s.spec("mark", 1, false, "again")) })
	t.Logf("first write after everything was started: %s", took.Round(time.Millisecond))
	c.runs("mark", 1)
	c.runs("many", 6)
	untouched("after everything was killed")

	t.Log("a server loses its disk and joins again under its name")
	lost := other(servers, servers[c.leader()])
	was := c.memberID(lost.Name)
	lost.Kill()
	if err := os.RemoveAll(lost.DataDir); err != nil {
		t.Fatal(err)
	}
	lost.args = append([]string{"join", c.Token("server")}, lost.flags()...)
	lost.Start()
	took = c.Eventually("it votes", soon, func() error {
		for _, m := range c.members() {
			if m.Name == lost.Name && (m.ID == was || !m.Voter) {
				return fmt.Errorf("%+v", m)
			}
		}
		return errors.Join(c.voters(3), c.caughtUp(lost.Name))
	})
	t.Logf("a voter again after: %s", took.Round(time.Millisecond))
	untouched("after a server was replaced")
	if n := len(c.members()); n != 3 {
		t.Errorf("%d members", n)
	}
	if lost := c.Must("events", "-n", "500"); strings.Contains(lost, "NodeLost") {
		t.Errorf("a node was declared lost:\n%s", lost)
	}
}

// TestWorkUnderFaults breaks work, supervisors and agents.
func TestWorkUnderFaults(t *testing.T) {
	c := New(t, program)
	s := newStamps(t)
	s1 := c.Init("s1", "--lease-ttl", "5s")
	agents := map[string]*Process{}
	for _, name := range []string{"a1", "a2", "a3"} {
		agents[name] = c.Join("agent", name, "--docker-host", "none")
	}
	c.clean()
	c.Eventually("three nodes are ready", soon, func() error { return c.readyNodes(3) })

	t.Log("a program that crashes, and one whose supervisor is killed, are restarted where they are")
	c.put(s1, s.spec("crash", 1, false, ""))
	c.runs("crash", 1)
	before := c.replicas("crash")[0]
	kill := func(pid int) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	restarted := func(times int) {
		t.Helper()
		c.Eventually("it was restarted", soon, func() error {
			now := c.replicas("crash")[0]
			if now.State != "RUNNING" || now.Restarts != times || len(s.alive("crash")) != 1 {
				return fmt.Errorf("%+v, %d alive", now, len(s.alive("crash")))
			}
			if now.NodeID != before.NodeID || now.Generation != before.Generation {
				t.Fatalf("was %+v, is %+v", before, now)
			}
			return nil
		})
	}
	kill(s.single(c, "crash").pid)
	restarted(1)
	kill(c.supervisors("process-shim")[0])
	restarted(2)

	t.Log("a command that does not exist")
	c.put(s1, `{"id":"bad","process":{"command":"/does/not/exist"},"resources":{"cpu":"10m","memory":"16Mi"}}`)
	retrying := func(after string) {
		t.Helper()
		c.Eventually("it failed and is tried again "+after, soon, func() error {
			get, why := c.Must("get", "workload", "bad"), c.Must("why", "bad")
			if !strings.Contains(get, "RetryPending") || !strings.Contains(get, "BAD_COMMAND") || !strings.Contains(why, "of 5 at") {
				return fmt.Errorf("%s%s", get, why)
			}
			return nil
		})
	}
	retrying("")
	events := strings.Count(c.Must("events", "--workload", "bad", "-n", "100"), "WorkloadFailed")
	c.Must("retry", "bad")
	c.Eventually("it was tried at once", short, func() error {
		if n := strings.Count(c.Must("events", "--workload", "bad", "-n", "100"), "WorkloadFailed"); n <= events {
			return fmt.Errorf("%d failures", n)
		}
		return nil
	})
	retrying("after retry")
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	_, said, err := c.Exec(ctx, "apply", "-f", c.file("bad", `{"id":"bad","process":{"command":"/neither/does/this"},"resources":{"cpu":"10m","memory":"16Mi"}}`), "--wait", "--timeout", "3s")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() == 0 || !strings.Contains(said, "BAD_COMMAND") {
		t.Errorf("apply --wait of what can't start: %v\n%s", err, said)
	}
	c.Must("delete", "bad", "crash", "--wait")

	t.Log("many, none, stopped, started, drained")
	c.put(s1, s.spec("many", 1, false, ""))
	c.Must("scale", "many", "20", "--wait")
	alive := func(n int) { t.Helper(); s.count(c, "many", n) }
	alive(20)
	c.Must("scale", "many", "0", "--wait")
	alive(0)
	c.Must("scale", "many", "6", "--wait")
	c.Must("stop", "many", "--wait")
	alive(0)
	c.Must("start", "many", "--wait")
	alive(6)
	c.Must("node", "drain", "a1", "--wait")
	for _, one := range s.alive("many") {
		if one.node == "a1" {
			t.Errorf("still on the drained node: %+v", one)
		}
	}
	c.Must("node", "uncordon", "a1")
	c.Must("scale", "many", "9", "--wait")
	alive(9)
	if !slices.ContainsFunc(s.alive("many"), func(one stamp) bool { return one.node == "a1" }) {
		t.Error("nothing was given to the node that takes work again")
	}

	t.Log("an agent is stopped beyond its lease: exclusive work ends before it moves, duplicates go on return")
	c.put(s1, s.spec("only", 1, true, ""))
	was := s.single(c, "only")
	agents[was.node].Pause()
	moved := func(from stamp) {
		t.Helper()
		took := c.Eventually("exclusive work runs elsewhere", afterLoss, func() error {
			if now := s.alive("only"); len(now) != 1 || now[0].node == from.node {
				return fmt.Errorf("%+v", now)
			}
			return nil
		})
		t.Logf("exclusive work ran elsewhere after: %s", took.Round(time.Millisecond))
	}
	moved(was)
	c.runs("many", 9)
	if n := len(s.alive("many")); n <= 9 {
		t.Errorf("%d instances run: the stopped agent has ended what is not exclusive", n)
	}
	agents[was.node].Resume()
	took := c.Eventually("the duplicates are gone", soon, func() error {
		if n := len(s.alive("many")); n != 9 {
			return fmt.Errorf("%d instances run", n)
		}
		return c.readyNodes(3)
	})
	t.Logf("duplicates gone after: %s", took.Round(time.Millisecond))

	t.Log("an agent is killed, and work deleted while it is away")
	was = s.single(c, "only")
	agents[was.node].Kill()
	c.Must("delete", "many", "--wait")
	moved(was)
	agents[was.node].Start()
	c.Eventually("what was deleted is gone everywhere", soon, func() error {
		if n := len(s.alive("many")); n != 0 {
			return fmt.Errorf("%d instances run", n)
		}
		return c.readyNodes(3)
	})
	s.neverTwice("only")
	c.Must("delete", "only", "--wait")
	c.Eventually("nothing is left", soon, func() error {
		if left := c.supervisors("process-shim"); len(left) > 0 {
			return fmt.Errorf("supervisors %v", left)
		}
		return nil
	})
}

func sameRun(a, b replica) bool {
	return a.Replica == b.Replica && a.NodeID == b.NodeID && a.RuntimeID == b.RuntimeID && a.Generation == b.Generation && a.Restarts == b.Restarts
}

// other is a server that is not this one.
func other(servers map[string]*Process, not *Process) *Process {
	for _, name := range []string{"s1", "s2", "s3"} {
		if servers[name] != not {
			return servers[name]
		}
	}
	return nil
}

func (c *Cluster) memberID(name string) string {
	for _, m := range c.members() {
		if m.Name == name {
			return m.ID
		}
	}
	return ""
}

func (c *Cluster) file(id, spec string) string {
	c.t.Helper()
	path := c.dir + "/" + id + ".json"
	if err := os.WriteFile(path, []byte(spec), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// tryPut applies a workload through a server, once.
func (c *Cluster) tryPut(p *Process, spec string) error {
	ctx, cancel := context.WithTimeout(context.Background(), short)
	defer cancel()
	status, body, err := c.REST(ctx, p, http.MethodPost, "/v1/workloads", spec)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%d %s", status, body)
	}
	return err
}

func (c *Cluster) put(p *Process, spec string) {
	c.t.Helper()
	c.Eventually("apply", soon, func() error { return c.tryPut(p, spec) })
}

// mark reads the workload of that name through a server.
func (c *Cluster) mark(p *Process) (status int, mark, body string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	status, body, err = c.REST(ctx, p, http.MethodGet, "/v1/workloads/mark", "")
	var w struct {
		Spec struct {
			Env map[string]string `json:"env"`
		} `json:"spec"`
	}
	if err == nil && status == http.StatusOK {
		err = json.Unmarshal([]byte(body), &w)
	}
	return status, w.Spec.Env["MARK"], body, err
}

// runs waits until a workload runs in full, all at its newest revision.
func (c *Cluster) runs(id string, replicas int) time.Duration {
	c.t.Helper()
	return c.Eventually(id+" runs", afterLoss, func() error {
		var w struct {
			Revision string `json:"revision"`
			Status   struct {
				State   string `json:"state"`
				Running int    `json:"running"`
			} `json:"status"`
			Replicas []replica `json:"replicas"`
		}
		out, err := c.Run("get", "workload", id, "-o", "json")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &w); err != nil {
			return err
		}
		if w.Status.State != "RUNNING" || w.Status.Running != replicas || len(w.Replicas) != replicas {
			return fmt.Errorf("%s, %d of %d run, %d records", w.Status.State, w.Status.Running, replicas, len(w.Replicas))
		}
		for _, r := range w.Replicas {
			if r.State != "RUNNING" || r.Revision != w.Revision {
				return fmt.Errorf("%+v", r)
			}
		}
		return nil
	})
}

// writer writes all the time, through whichever server answers.
type writer struct {
	stop   context.CancelFunc
	done   chan struct{}
	gap    time.Duration
	writes int
}

func (c *Cluster) write(servers map[string]*Process) *writer {
	ctx, stop := context.WithCancel(context.Background())
	w := &writer{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		last := time.Now()
		for n := 0; ctx.Err() == nil; n++ {
			name := []string{"s1", "s2", "s3"}[n%3]
			spec := fmt.Sprintf(`{"id":"ticker","replicas":0,"labels":{"n":"%d"},"process":{"command":"true"}}`, n)
			call, cancel := context.WithTimeout(ctx, short)
			status, _, err := c.REST(call, servers[name], http.MethodPost, "/v1/workloads", spec)
			cancel()
			if err == nil && status == http.StatusOK {
				w.writes++
				w.gap = max(w.gap, time.Since(last))
				last = time.Now()
			}
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return w
}

func (w *writer) end() (longest time.Duration, writes int) {
	w.stop()
	<-w.done
	return w.gap, w.writes
}
