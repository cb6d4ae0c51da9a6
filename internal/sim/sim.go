// Package sim runs a cluster on this machine to see how large it can be: real
// servers as processes of their own, with real raft, files and certificates, and
// in this process thousands of real agents whose runtime only pretends. It
// submits work, takes agents and the leader away, and measures.
//
// It uses no shortcut into the servers: what it knows of them it is told by their
// API, by /proc, and by the agents that they talk to.
package sim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Scenarios.
const (
	Submit             = "submit"
	SubmitMany         = "submit-many"
	AgentLoss          = "agent-loss"
	LeaderAndAgentLoss = "leader-and-agent-loss"
)

// Idle is the name of the phase in which nothing happens.
const Idle = "idle"

// Scenarios are all there are, in the order of their size.
var Scenarios = []string{Submit, SubmitMany, AgentLoss, LeaderAndAgentLoss}

// Config says what is simulated.
type Config struct {
	// Program is the persys program, which the servers run.
	Program string
	// Dir is where the servers' data goes, below a directory of its own that is
	// removed at the end.
	Dir string

	Scenario string
	Servers  int
	Nodes    int
	// Replicas in all; they are divided among the workloads.
	Replicas  int
	Workloads int
	// Template is the spec of each workload, but for id and replicas.
	Template *pb.WorkloadSpec
	// Callers submit at once; REST: over HTTPS and not gRPC.
	Callers int
	REST    bool
	// StartDelay is how long the runtime takes to start a replica.
	StartDelay time.Duration
	// Lose is how many agents are lost in the scenarios that lose some.
	Lose int
	// LeaseTTL of the servers.
	LeaseTTL time.Duration
	// Idle is for how long what an idle cluster costs is measured; 0: not at all.
	Idle time.Duration

	// Progress is told what goes on.
	Progress func(format string, args ...any)
}

// Run simulates until the scenario is over, and leaves nothing behind. Where ctx
// ends before, the report has what was measured until then.
func Run(ctx context.Context, c Config) (report *Report, err error) {
	dir, err := os.MkdirTemp(c.Dir, "persys-sim-")
	if err != nil {
		return nil, fmt.Errorf("directory for the servers: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s := &simulation{Config: c, report: newReport(c)}
	s.servers = newServers(c, dir)
	defer s.servers.stop()
	if s.fleet, err = newFleet(c, s.servers); err != nil {
		return nil, err
	}
	defer s.fleet.close()
	err = s.run(ctx)
	if err != nil {
		err = errors.Join(err, s.servers.complaints())
	}
	return s.report, err
}

// Check refuses what can't be simulated.
func (c Config) Check() error {
	for _, x := range []struct {
		what     string
		n, least int
	}{
		{"servers", c.Servers, 1}, {"nodes", c.Nodes, 1}, {"replicas", c.Replicas, 1}, {"workloads", c.Workloads, 1}, {"callers", c.Callers, 1},
	} {
		if x.n < x.least {
			return fmt.Errorf("%s: %d; allowed: %d or more", x.what, x.n, x.least)
		}
	}
	if c.Workloads > c.Replicas {
		return fmt.Errorf("workloads: %d, with %d replicas in all; allowed: at most one workload for each replica", c.Workloads, c.Replicas)
	}
	if c.loses() && (c.Lose < 1 || c.Lose >= c.Nodes) {
		return fmt.Errorf("lose: %d of %d nodes; allowed: 1 to %d", c.Lose, c.Nodes, c.Nodes-1)
	}
	if c.Scenario == LeaderAndAgentLoss && c.Servers < 3 {
		return fmt.Errorf("servers: %d; allowed: 3 or more, where the leader is lost", c.Servers)
	}
	return checkFiles(c.Nodes)
}

func (c Config) loses() bool { return c.Scenario == AgentLoss || c.Scenario == LeaderAndAgentLoss }

// simulation is one run.
type simulation struct {
	Config
	report  *Report
	servers *servers
	fleet   *fleet
	api     *api
}

func (s *simulation) run(ctx context.Context) (err error) {
	phase := s.begin("servers up")
	s.Progress("starting %d servers in %s", s.Servers, s.servers.dir)
	if s.api, err = s.servers.start(ctx); err != nil {
		return err
	}
	defer s.api.close()
	phase.end()

	giveWay()
	phase = s.begin("agents attached")
	s.Progress("attaching %d agents", s.Nodes)
	if err := s.fleet.start(ctx); err != nil {
		return err
	}
	if err := s.api.await(ctx, "nodes ready", func() (bool, error) {
		n, err := s.api.count(ctx, "/nodes/")
		return n >= 2*int64(s.Nodes), err // a record and a lease each
	}); err != nil {
		return err
	}
	phase.count(s.Nodes).end()

	if err := s.submit(ctx); err != nil {
		return err
	}
	if err := s.idle(ctx); err != nil {
		return err
	}
	if s.loses() {
		if err := s.lose(ctx); err != nil {
			return err
		}
	}
	s.report.Processes = s.processes()
	return nil
}

// submit sends all workloads and waits until they run.
func (s *simulation) submit(ctx context.Context) error {
	s.Progress("submitting %d replicas (workloads: %d)", s.Replicas, s.Workloads)
	submitted, placed, running := s.begin("submitted"), s.begin("all placed"), s.begin("all running")
	group, waiting := errgroup.WithContext(ctx)
	group.Go(func() error {
		latencies, err := s.api.submit(waiting, s.Config, s.fleet.submitted)
		submitted.count(s.Workloads).spread(latencies).end()
		return err
	})
	group.Go(func() error {
		return s.api.await(waiting, "replicas placed", func() (bool, error) {
			n, err := s.api.count(waiting, "/assignments/")
			return n >= int64(s.Replicas), err
		})
	})
	if err := group.Wait(); err != nil {
		return err
	}
	placed.count(s.Replicas).end()
	if err := s.awaitRunning(ctx); err != nil {
		return err
	}
	running.count(s.Replicas).end()
	told := s.report.phase("told to its agent").count(s.Replicas).spread(s.fleet.latencies())
	told.Note = "from the submission of its workload until the replica is started"
	return nil
}

// awaitRunning waits until the workloads' status says that all run.
func (s *simulation) awaitRunning(ctx context.Context) error {
	return s.api.await(ctx, "replicas running", func() (bool, error) {
		n, err := s.api.count(ctx, "/replicas/")
		if err != nil || n < int64(s.Replicas) {
			return false, err
		}
		return s.api.running(ctx, s.Replicas)
	})
}

// idle measures what a cluster costs in which nothing happens.
func (s *simulation) idle(ctx context.Context) error {
	if s.Idle <= 0 {
		return nil
	}
	s.Progress("watching the idle cluster for %s", s.Idle)
	before, err := s.api.position(ctx)
	if err != nil {
		return err
	}
	phase := s.begin(Idle)
	select {
	case <-time.After(s.Idle):
	case <-ctx.Done():
		return ctx.Err()
	}
	phase.end()
	after, err := s.api.position(ctx)
	if err != nil {
		return err
	}
	s.report.IdleRevisions, s.report.IdleEntries = after.revision-before.revision, after.index-before.index
	return nil
}

// lose takes agents away, and the leader with them where the scenario says so,
// and waits until their work runs elsewhere.
func (s *simulation) lose(ctx context.Context) error {
	replicas := s.fleet.choose(s.Lose)
	s.Progress("losing agents with %d replicas (agents: %d)", replicas, s.Lose)
	elsewhere, running := s.begin("all started elsewhere"), s.begin("all running again")
	lost := time.Now()
	if s.Scenario == LeaderAndAgentLoss {
		s.Progress("losing the leader")
		if err := s.servers.killLeader(ctx, s.api); err != nil {
			return err
		}
	}
	s.fleet.lose(lost)
	latencies, err := s.fleet.awaitMoved(ctx)
	if err != nil {
		return err
	}
	elsewhere.count(replicas).spread(latencies).end()
	if err := s.awaitRunning(ctx); err != nil {
		return err
	}
	running.count(replicas).end()
	return nil
}

// sharedMemory is where the agents' data goes: thousands of machines have
// thousands of disks, this one has one.
func sharedMemory(other string) string {
	const dir = "/dev/shm"
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return dir
	}
	return other
}

func agentDir(dir string, i int) string { return filepath.Join(dir, nodeName(i)) }

func nodeName(i int) string { return fmt.Sprintf("sim-%05d", i) }

// parallel is how many agents are started at once: enough to keep everybody busy,
// and not so much that a connection is not made in time.
func parallel() int { return 64 * runtime.NumCPU() }
