package procs

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

var (
	program string
	idle    = flag.Duration("idle", 15*time.Second, "how long an idle cluster is watched")
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		built, remove, err := Build()
		if err != nil {
			fmt.Fprintln(os.Stderr, "build:", err)
			return 1
		}
		defer remove()
		program = built
		return m.Run()
	}())
}

const (
	soon = 30 * time.Second
	// What a lease of 10 s, the decision and the start of a container may take.
	afterLoss = 40 * time.Second
)

// TestTheMainJob is what the product is for: a cluster of processes runs
// containers, loses a leader, an agent, grows, and the work goes on.
func TestTheMainJob(t *testing.T) {
	image := demoImage(t)
	c := New(t, program)
	s1 := c.Init("s1")
	s2, s3 := c.Join("server", "s2"), c.Join("server", "s3")
	a1, a2 := c.Join("agent", "a1"), c.Join("agent", "a2")
	c.Eventually("three voters", soon, func() error { return c.voters(3) })
	c.Eventually("two nodes are ready", soon, func() error { return c.readyNodes(2) })

	t.Log("a container and a replicated one answer HTTP")
	c.apply("web", image, 1)
	c.apply("many", image, 4)
	c.answers(soon, "web", 1)
	c.answers(soon, "many", 4)
	perNode := map[string]int{}
	for _, r := range c.replicas("many") {
		perNode[r.NodeID]++
	}
	if perNode["a1"] != 2 || perNode["a2"] != 2 {
		t.Errorf("the replicas are not spread: %v", perNode)
	}

	t.Log("the leader is killed: another server answers, new work is placed, the old never stopped")
	before := c.containers()
	leader := c.leader()
	dead := map[string]*Process{"s1": s1, "s2": s2, "s3": s3}[leader]
	survivor := s2
	if dead == s2 {
		survivor = s3
	}
	dead.Kill()
	took := c.Eventually("a write through another server", soon, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		status, body, err := c.REST(ctx, survivor, http.MethodPost, "/v1/workloads", spec("after", image, 1))
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%d %s", status, body)
		}
		return err
	})
	t.Logf("first write after the leader was killed: %s", took.Round(time.Millisecond))
	c.answers(soon, "after", 1)
	for id, started := range before {
		if now := c.containers()[id]; now != started {
			t.Errorf("container %s of before was started at %q, now at %q", id, started, now)
		}
	}
	dead.Start()
	c.Eventually("the killed server is back and has caught up", soon, func() error { return c.caughtUp(leader) })

	t.Log("an agent is killed with its containers: its replicas run on the other within the lease and seconds")
	a2.Kill()
	removeContainers(t, "persys.node=a2", c.clusterID())
	took = c.Eventually("all of them run on a1", afterLoss, func() error {
		for _, r := range c.replicas("many") {
			if r.NodeID != "a1" || r.State != "RUNNING" {
				return fmt.Errorf("replica %d is %s on %s", r.Replica, r.State, r.NodeID)
			}
		}
		return nil
	})
	t.Logf("replicas running elsewhere after the agent was killed: %s", took.Round(time.Millisecond))
	c.answers(soon, "many", 4)

	t.Log("the cluster grows while work runs")
	c.Join("server", "s4")
	c.Join("server", "s5")
	a3 := c.Join("agent", "a3")
	c.Eventually("five servers and a3", soon, func() error {
		if err := c.readyNodes(2); err != nil {
			return err
		}
		if n := len(c.members()); n != 5 {
			return fmt.Errorf("%d servers", n)
		}
		return nil
	})
	c.Must("member", "promote", "s4")
	c.Must("member", "promote", "s5")
	c.Eventually("five voters", soon, func() error { return c.voters(5) })
	c.Must("scale", "many", "8")
	c.answers(soon, "many", 8)

	t.Log("delete takes everything away")
	a2.Start()
	c.Eventually("a2 is back", soon, func() error { return c.readyNodes(3) })
	for _, id := range []string{"web", "many", "after"} {
		c.Must("delete", id, "--wait")
	}
	c.Eventually("no container is left", soon, func() error {
		if left := c.containers(); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	for _, p := range []*Process{a1, a3, s1} {
		if !p.Running() {
			t.Errorf("%s has ended", p.Name)
		}
		p.Stop()
	}
}

// TestProcessesWithoutDocker is the same program on machines that have no
// container engine.
func TestProcessesWithoutDocker(t *testing.T) {
	c := New(t, program)
	c.Init("s1")
	a1 := c.Join("agent", "a1")
	c.Eventually("a1 is ready", soon, func() error { return c.readyNodes(1) })
	c.Must("run", "--process", "--name", "clock", "--wait", "--", "sh", "-c", "while sleep 0.2; do date +%s; done")
	pid := c.replicas("clock")[0].RuntimeID
	c.Eventually("it writes its log", soon, func() error {
		out, err := c.Run("logs", "clock", "--tail", "3")
		if err == nil && len(strings.Fields(out)) < 3 {
			err = fmt.Errorf("%q", out)
		}
		return err
	})

	t.Log("the agent is killed and started again: the work runs on, the same process")
	a1.Kill()
	a1.Start()
	c.Eventually("a1 is ready again", soon, func() error { return c.readyNodes(1) })
	c.Eventually("it is the same process", soon, func() error {
		if got := c.replicas("clock")[0]; got.State != "RUNNING" || got.RuntimeID != pid || got.Restarts != 0 {
			return fmt.Errorf("%+v, was %s", got, pid)
		}
		return nil
	})
	c.Must("delete", "clock", "--wait")

	t.Log("what is killed behind the agent's back is told, and started again")
	c.Must("run", "--process", "--name", "victim", "--wait", "--", "sh", "-c", "echo $$; exec sleep 1000")
	var killed int
	c.Eventually("it says its number", soon, func() (err error) {
		killed, err = strconv.Atoi(strings.TrimSpace(c.Must("logs", "victim")))
		return err
	})
	if err := syscall.Kill(killed, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.Eventually("it is told", soon, func() error {
		if out := c.Must("events"); !strings.Contains(out, "STATE_MISMATCH: replica 0 on a1") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	c.Eventually("it runs again", soon, func() error {
		if got := c.replicas("victim"); len(got) != 1 || got[0].State != "RUNNING" || got[0].Restarts != 1 {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})

	t.Log("a drain that is overdue leaves nothing, though there is no other node; undone, it comes back")
	c.Must("node", "drain", "a1", "--deadline", "1s", "--wait")
	c.Eventually("it ends", soon, func() error {
		if got := c.replicas("victim"); len(got) == 1 && got[0].State == "RUNNING" {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	c.Must("node", "uncordon", "a1")
	c.Eventually("it runs again", soon, func() error {
		if got := c.replicas("victim"); len(got) != 1 || got[0].State != "RUNNING" {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	c.Must("scheduler", "set", "rebalance=true", "rebalance-interval=1m")
	if out := c.Must("scheduler", "get"); !strings.Contains(out, "rebalance-interval   1m0s") {
		t.Errorf("%s", out)
	}
	c.Must("delete", "victim", "--wait")
}

// TestIdleClusterWritesNothing watches the log of a cluster with heartbeating
// agents and running work.
func TestIdleClusterWritesNothing(t *testing.T) {
	c := New(t, program)
	c.Init("s1")
	c.Join("agent", "a1")
	c.Eventually("a1 is ready", soon, func() error { return c.readyNodes(1) })
	c.Must("run", "--process", "--name", "idle", "--wait", "--", "sleep", "1000")
	c.Must("rollout", "status", "idle", "--wait")
	start := c.quiet(soon)
	time.Sleep(*idle) // what is measured is that nothing happens in this time
	if end := c.appliedIndex(); end != start {
		t.Errorf("the applied index went from %s to %s within %s", start, end, *idle)
	}
	c.Must("delete", "idle", "--wait")
}

type member struct {
	ID           string `json:"id"`
	Name         string `json:"name"`
	Voter        bool   `json:"voter"`
	Leader       bool   `json:"leader"`
	Reachable    bool   `json:"reachable"`
	AppliedIndex string `json:"applied_index"`
}

func (c *Cluster) members() []member {
	var list struct {
		Members []member `json:"members"`
	}
	c.decode(&list, "member", "ls", "-o", "json")
	return list.Members
}

func (c *Cluster) decode(into any, args ...string) {
	c.t.Helper()
	if err := json.Unmarshal([]byte(c.Must(args...)), into); err != nil {
		c.t.Fatalf("persys %s: %v", strings.Join(args, " "), err)
	}
}

func (c *Cluster) voters(want int) error {
	got := 0
	for _, m := range c.members() {
		if m.Voter {
			got++
		}
	}
	if got != want {
		return fmt.Errorf("%d voters", got)
	}
	return nil
}

func (c *Cluster) leader() string {
	for _, m := range c.members() {
		if m.Leader {
			return m.Name
		}
	}
	c.t.Fatal("no leader")
	return ""
}

func (c *Cluster) caughtUp(name string) error {
	var own, most int
	for _, m := range c.members() {
		var index int
		fmt.Sscan(m.AppliedIndex, &index)
		if m.Name == name {
			if !m.Reachable {
				return fmt.Errorf("%s is not reachable", name)
			}
			own = index
		}
		most = max(most, index)
	}
	if own == 0 || own < most {
		return fmt.Errorf("%s is at %d of %d", name, own, most)
	}
	return nil
}

func (c *Cluster) appliedIndex() string { return c.members()[0].AppliedIndex }

// quiet waits until two looks a second apart show the same applied index.
func (c *Cluster) quiet(within time.Duration) string {
	last := ""
	c.Eventually("the log is quiet", within, func() error {
		now := c.appliedIndex()
		if now != last {
			last = now
			time.Sleep(time.Second)
			return fmt.Errorf("applied index %s", now)
		}
		return nil
	})
	return last
}

func (c *Cluster) readyNodes(want int) error {
	var list struct {
		Nodes []struct {
			ID    string `json:"id"`
			State string `json:"state"`
		} `json:"nodes"`
	}
	c.decode(&list, "node", "ls", "-o", "json")
	got := 0
	for _, n := range list.Nodes {
		if n.State == "READY" {
			got++
		}
	}
	if got != want {
		return fmt.Errorf("%d nodes are ready", got)
	}
	return nil
}

func (c *Cluster) clusterID() string {
	var info struct {
		Cluster struct {
			ID string `json:"id"`
		} `json:"cluster"`
	}
	c.decode(&info, "cluster", "info", "-o", "json")
	return info.Cluster.ID
}

type replica struct {
	Generation string `json:"generation"`
	Revision   string `json:"revision"`
	Replica    int    `json:"replica"`
	NodeID     string `json:"node_id"`
	State      string `json:"state"`
	RuntimeID  string `json:"runtime_id"`
	Restarts   int    `json:"restarts"`
	Ports      []struct {
		HostIP   string `json:"host_ip"`
		HostPort int    `json:"host_port"`
	} `json:"ports"`
}

func (c *Cluster) replicas(id string) []replica {
	var w struct {
		Replicas []replica `json:"replicas"`
	}
	c.decode(&w, "get", "workload", id, "-o", "json")
	return w.Replicas
}

// answers waits until all replicas of a workload answer HTTP.
func (c *Cluster) answers(within time.Duration, id string, replicas int) {
	c.t.Helper()
	addresses := map[string]string{}
	c.Eventually(id+" answers HTTP", within, func() error {
		all := c.replicas(id)
		if len(all) != replicas {
			return fmt.Errorf("%d replicas", len(all))
		}
		for _, r := range all {
			if r.State != "RUNNING" || len(r.Ports) != 1 {
				return fmt.Errorf("replica %d is %s with ports %v", r.Replica, r.State, r.Ports)
			}
			if addresses[r.NodeID] == "" {
				var n struct {
					Address string `json:"address"`
				}
				c.decode(&n, "node", "get", r.NodeID, "-o", "json")
				addresses[r.NodeID] = n.Address
			}
			if err := getOK(fmt.Sprintf("http://%s:%d/", addresses[r.NodeID], r.Ports[0].HostPort)); err != nil {
				return err
			}
		}
		return nil
	})
}

func getOK(url string) error {
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && (response.StatusCode != http.StatusOK || len(body) == 0) {
		err = fmt.Errorf("%s: %s %q", url, response.Status, body)
	}
	return err
}

func spec(id, image string, replicas int) string {
	return fmt.Sprintf(`{"id":%q,"replicas":%d,"resources":{"cpu":"50m","memory":"32Mi"},"container":{"image":%q,"ports":[{"container_port":8080}]}}`, id, replicas, image)
}

func (c *Cluster) apply(id, image string, replicas int) {
	c.t.Helper()
	file := filepath.Join(c.dir, id+".json")
	if err := os.WriteFile(file, []byte(spec(id, image, replicas)), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.Must("apply", "-f", file, "--wait")
}

// containers of this cluster that run, each with when it was started.
func (c *Cluster) containers() map[string]string {
	c.t.Helper()
	list := func() []string {
		return strings.Fields(docker(c.t, "ps", "-q", "--no-trunc", "--filter", "label=persys.cluster="+c.clusterID()))
	}
	started := map[string]string{}
	for _, id := range list() {
		out, err := exec.Command("docker", "inspect", "-f", "{{.State.StartedAt}}", id).Output()
		switch {
		case err == nil:
			started[id] = strings.TrimSpace(string(out))
		case slices.Contains(list(), id): // else it was removed meanwhile
			c.t.Fatalf("docker inspect %s: %v", id, err)
		}
	}
	return started
}

func docker(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("docker", args...).Output()
	if err != nil {
		t.Fatalf("docker %s: %v", strings.Join(args, " "), err)
	}
	return string(out)
}

func removeContainers(t testing.TB, label, cluster string) {
	t.Helper()
	ids := strings.Fields(docker(t, "ps", "-aq", "--filter", "label="+label, "--filter", "label=persys.cluster="+cluster))
	if len(ids) == 0 {
		t.Fatalf("no container with %s", label)
	}
	docker(t, append([]string{"rm", "-f"}, ids...)...)
}

// demoImage builds the image of the examples. Without an engine the test is
// skipped, and says so.
func demoImage(t *testing.T) string {
	t.Helper()
	if err := exec.Command("docker", "version").Run(); err != nil {
		t.Skip("no Docker Engine answers; hack/setup.sh installs one")
	}
	const name = "persys-demo-web:1"
	out, err := exec.Command("sh", "../../hack/demo-image.sh").CombinedOutput()
	if err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return name
}
