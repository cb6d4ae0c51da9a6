package procs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// stamps is a directory shared by all nodes, in which work itself says when it
// starts and as whom.
type stamps struct {
	t   testing.TB
	dir string
}

func newStamps(t testing.TB) *stamps { return &stamps{t, t.TempDir()} }

// spec is a process that stamps its start and then runs. An exclusive one takes a
// lock for as long as it runs, and says so when it is held.
func (s *stamps) spec(id string, replicas int, exclusive bool, env string) string {
	script := fmt.Sprintf(`exec 9>>%[1]s/%[2]s.lock; if %[3]t && ! flock -n 9; then echo "double $PERSYS_REPLICA $PERSYS_NODE $PERSYS_EPOCH $$" >>%[1]s/%[2]s; fi
echo "start $PERSYS_REPLICA $PERSYS_NODE $PERSYS_EPOCH $$" >>%[1]s/%[2]s; exec sleep 100000`, s.dir, id, exclusive)
	return fmt.Sprintf(`{"id":%q,"replicas":%d,"exclusive":%t,"env":{"MARK":%q},"resources":{"cpu":"10m","memory":"16Mi"},"update":{"min_healthy_seconds":0},"process":{"command":"sh","args":["-c",%q],"stop_grace_seconds":2}}`,
		id, replicas, exclusive, env, script)
}

// stamp is one line.
type stamp struct {
	what, node, epoch string
	replica, pid      int
}

func (s *stamps) of(id string) []stamp {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(s.dir, id))
	if err != nil && !os.IsNotExist(err) {
		s.t.Fatal(err)
	}
	var all []stamp
	for line := range strings.Lines(string(data)) {
		var one stamp
		if _, err := fmt.Sscan(line, &one.what, &one.replica, &one.node, &one.epoch, &one.pid); err != nil {
			s.t.Fatalf("stamp %q: %v", line, err)
		}
		all = append(all, one)
	}
	return all
}

// alive are the starts whose process still runs.
func (s *stamps) alive(id string) []stamp {
	s.t.Helper()
	var all []stamp
	for _, one := range s.of(id) {
		if one.what == "start" && one.runs() {
			all = append(all, one)
		}
	}
	return all
}

// count waits until so many instances run.
func (s *stamps) count(c *Cluster, id string, want int) {
	s.t.Helper()
	c.Eventually(fmt.Sprintf("%d instances of %s run", want, id), soon, func() error {
		if got := len(s.alive(id)); got != want {
			return fmt.Errorf("%d run", got)
		}
		return nil
	})
}

// single waits until exactly one instance runs.
func (s *stamps) single(c *Cluster, id string) (one stamp) {
	s.t.Helper()
	c.Eventually("one instance of "+id+" runs", soon, func() error {
		all := s.alive(id)
		if len(all) != 1 {
			return fmt.Errorf("%+v", all)
		}
		one = all[0]
		return nil
	})
	return one
}

func (s stamp) runs() bool {
	command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.pid))
	return err == nil && bytes.HasPrefix(command, []byte("sleep\x00"))
}

// neverTwice fails the test where exclusive work found another instance running,
// or was started with a token that does not grow.
func (s *stamps) neverTwice(id string) {
	s.t.Helper()
	var epoch, generation int64
	for _, one := range s.of(id) {
		if one.what == "double" {
			s.t.Errorf("two instances of %s ran at a time: %+v", id, one)
			continue
		}
		e, g, _ := strings.Cut(one.epoch, ".")
		nextEpoch, _ := strconv.ParseInt(e, 10, 64)
		nextGeneration, _ := strconv.ParseInt(g, 10, 64)
		if nextEpoch < epoch || nextEpoch == epoch && nextGeneration < generation {
			s.t.Errorf("token %s of %s comes after %d.%d", one.epoch, id, epoch, generation)
		}
		epoch, generation = nextEpoch, nextGeneration
	}
}

// supervisors are the processes of this cluster that stand beside work and agents;
// they outlive the agents, as they should.
func (c *Cluster) supervisors(kind string) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		c.t.Fatal(err)
	}
	var all []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		command, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err == nil && bytes.HasPrefix(command, []byte(c.program+"\x00"+kind+"\x00")) && bytes.Contains(command, []byte(c.dir)) {
			all = append(all, pid)
		}
	}
	return all
}

// clean ends what outlives the agents, when the test ends.
func (c *Cluster) clean() {
	c.t.Cleanup(func() {
		for _, pid := range c.supervisors("process-shim") {
			_ = syscall.Kill(pid, syscall.SIGTERM)
		}
		for _, pid := range c.supervisors("agent-guard") {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
}
