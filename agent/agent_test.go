package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

var web = Key{"web", 0}

// bubble runs a conversation between an agent and its servers in virtual time.
func bubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		test(t)
	})
}

func TestWorkIsStartedReportedAndRemoved(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		if s.hello.GetNodeId() != "n1" || s.hello.GetIncarnation() != "i1" || s.hello.GetCapacity().GetCpuMillis() <= 0 || len(s.hello.GetRuntimes()) != 1 {
			t.Errorf("hello: %v", s.hello)
		}
		s.await(t, "a full status", func() bool { return len(s.reports) > 0 && s.reports[0].GetFull() })
		s.desire(t, true, 10, container("web", 7))
		r := s.awaitState(t, web, pb.State_RUNNING)
		if r.GetGeneration() != 7 || r.GetRuntimeId() == "" || r.GetStartTime() == nil || r.GetNodeId() != "n1" {
			t.Errorf("reported: %v", r)
		}
		s.drop(t, 11, web)
		s.await(t, "it is gone", func() bool { return s.removed[web] == 7 })
		if left := f.runtime.running(); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		// A replica that was told to be gone before anything was made of it is
		// reported too, for the server has a record of it.
		held := make(chan struct{})
		f.runtime.set(func() { f.runtime.hold["slow"] = held })
		s.desire(t, false, 12, container("slow", 12))
		s.awaitState(t, Key{"slow", 0}, pb.State_SCHEDULED)
		s.drop(t, 13, Key{"slow", 0})
		s.await(t, "it is gone", func() bool { return s.removed[Key{"slow", 0}] == 12 })
		// So is one that came and went before the agent heard of it.
		s.send(t, &pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: &pb.DesiredSet{
			Revision: 14, Removed: []*pb.ReplicaKey{{WorkloadId: "brief", Generation: 14}},
		}}})
		s.await(t, "it is gone", func() bool { return s.removed[Key{"brief", 0}] == 14 })
	})
}

func TestFullReportFollowsEachCompleteSet(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		full := func(revision int64) func() bool {
			return func() bool {
				return slices.ContainsFunc(s.reports, func(r *pb.StatusReport) bool { return r.GetFull() && r.GetDesiredRevision() == revision })
			}
		}
		s.desire(t, true, 10, container("web", 7))
		s.await(t, "a full report that knows of revision 10", full(10))
		s.desire(t, true, 20)
		s.await(t, "a full report that knows of revision 20", full(20))
	})
}

func TestAgentRestartLeavesWorkAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7), container("db", 8, exclusive))
		s.awaitState(t, web, pb.State_RUNNING)
		s.awaitState(t, Key{"db", 0}, pb.State_RUNNING)
		before := f.runtime.running()
		f.stop()
		if now := f.runtime.running(); !slices.Equal(now, before) {
			t.Fatalf("the end of the agent changed what runs: %v, before %v", now, before)
		}
		f.start()
		s = f.attach()
		s.await(t, "a full status with both", func() bool {
			return len(s.replicas) == 2 && s.reports[0].GetFull() && s.replicas[web].GetState() == pb.State_RUNNING
		})
		s.desire(t, true, 10, container("web", 7), container("db", 8, exclusive))
		time.Sleep(time.Minute) // virtual
		if now := f.runtime.running(); !slices.Equal(now, before) {
			t.Errorf("a restart changed what runs: %v, before %v", now, before)
		}
	})
}

func TestCrashIsRestartedWithoutAnyServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7))
		id := s.awaitState(t, web, pb.State_RUNNING).GetRuntimeId()
		f.mu.Lock()
		f.down["s1"] = true
		f.mu.Unlock()
		s.end <- status.Error(codes.Unavailable, "going away")
		for range 3 {
			f.runtime.crash(id, 1)
			time.Sleep(10 * time.Second) // virtual: more than the backoff is by now
			if len(f.runtime.running()) != 1 {
				t.Fatalf("it was not restarted: %v", f.runtime.called())
			}
		}
		f.mu.Lock()
		f.down["s1"] = false
		f.mu.Unlock()
		s = f.attach()
		s.await(t, "three restarts", func() bool { return s.replicas[web].GetRestarts() == 3 })
		// How often it crashed outlives the agent.
		f.stop()
		f.start()
		s = f.attach()
		s.await(t, "three restarts", func() bool { return s.replicas[web].GetRestarts() == 3 })
	})
}

func TestCrashLoopBacksOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7, func(i *pb.DesiredItem) { i.Spec.Restart = &pb.RestartPolicy{MaxAttempts: 4} }))
		id := s.awaitState(t, web, pb.State_RUNNING).GetRuntimeId()
		for n := range 5 {
			began := time.Now()
			f.runtime.crash(id, 3)
			if n == 4 {
				break
			}
			r := s.awaitState(t, web, pb.State_RETRY_PENDING)
			if r.GetReason().GetCode() != pb.ReasonCode_EXITED || r.GetExitCode() != 3 {
				t.Errorf("reported: %v", r)
			}
			s.awaitState(t, web, pb.State_RUNNING)
			if took, want := time.Since(began), restartFirst<<n; took < want || took > want+time.Second {
				t.Errorf("restart %d after %s, want %s", n, took, want)
			}
		}
		r := s.awaitState(t, web, pb.State_FAILED)
		if r.GetReason().GetCode() != pb.ReasonCode_EXITED || !r.GetReason().GetRetryable() || r.GetRestarts() != 4 {
			t.Errorf("reported: %v", r)
		}
		// A new assignment begins anew.
		s.desire(t, false, 20, container("web", 15))
		s.await(t, "it runs again", func() bool {
			return s.replicas[web].GetState() == pb.State_RUNNING && s.replicas[web].GetGeneration() == 15 && s.replicas[web].GetRestarts() == 0
		})
	})
}

func TestOlderIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1", "s2")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7))
		s.awaitState(t, web, pb.State_RUNNING)
		// A set from a server that lags behind ends the session; another server is tried.
		first := s.server.address
		s.desire(t, true, 9)
		s = f.attach()
		if s.server.address == first {
			t.Errorf("the same server again: %s", first)
		}
		s.desire(t, true, 11, container("web", 6), container("db", 8))
		s.awaitState(t, Key{"db", 0}, pb.State_RUNNING)
		if got := f.runtime.running(); len(got) != 2 || !strings.Contains(got[1], "gen=7") {
			t.Errorf("running: %v", got)
		}
		// Nor is it forgotten by a restart what the last revision was.
		f.stop()
		f.start()
		s = f.attach()
		s.desire(t, true, 10)
		s = f.attach()
		if got := f.runtime.running(); len(got) != 2 {
			t.Errorf("running: %v", got)
		}
		// Changes without a set to change.
		s.desire(t, false, 12, container("x", 12))
		f.attach()
		if got := f.runtime.running(); len(got) != 2 {
			t.Errorf("running: %v", got)
		}
	})
}

func TestOtherCluster(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.arrival()
		s.welcome(t, "another")
		s = f.attach()
		s.desire(t, true, 10, container("web", 7))
		s.awaitState(t, web, pb.State_RUNNING)
		f.stop()
		cfg := f.config()
		cfg.ClusterID = "another"
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), `belongs to cluster "c"`) {
			t.Errorf("an agent of another cluster took the directory: %v", err)
		}
		cfg = f.config()
		cfg.NodeID = "n2"
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), `belongs to node "n1"`) {
			t.Errorf("another agent took the directory: %v", err)
		}
	})
}

func TestOrphans(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7), container("db", 8))
		s.awaitState(t, web, pb.State_RUNNING)
		s.awaitState(t, Key{"db", 0}, pb.State_RUNNING)
		f.stop()
		// All that the agent knew is lost.
		if err := os.WriteFile(filepath.Join(f.dir, stateFile), []byte("\xff\xff damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
		f.start()
		s = f.attach()
		time.Sleep(time.Hour) // virtual: no set comes, so nothing is judged
		if got := f.runtime.running(); len(got) != 2 {
			t.Fatalf("without a set it removed something: %v", got)
		}
		began := time.Now()
		s.desire(t, true, 10, container("web", 7))
		s.await(t, "db is gone", func() bool { return s.removed[Key{"db", 0}] == 8 })
		if took := time.Since(began); took < time.Minute {
			t.Errorf("the orphan was removed after %s", took)
		}
		if got := f.runtime.running(); len(got) != 1 || !strings.HasPrefix(got[0], "web/0") {
			t.Errorf("running: %v", got)
		}
	})
}

// A machine that was wiped, but for its containers, comes back as another one under
// the same name: it goes on with what it is given, and starts what is exclusive anew.
func TestWipedMachineUnderTheSameName(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7), container("db", 8, exclusive), container("old", 9))
		ids := map[string]string{}
		for _, id := range []string{"web", "db", "old"} {
			ids[id] = s.awaitState(t, Key{id, 0}, pb.State_RUNNING).GetRuntimeId()
		}
		f.stop()
		f.dir, f.incarnation = t.TempDir(), "i2"
		f.start()
		one := f.arrival()
		if one.hello.GetIncarnation() != "i2" {
			t.Fatalf("hello: %v", one.hello)
		}
		// While the lease of the old one lives, nobody welcomes it. What is exclusive may
		// not run meanwhile: it has no lease of its own.
		time.Sleep(20 * time.Second) // virtual
		running := f.runtime.running()
		if len(running) != 2 || slices.ContainsFunc(running, func(r string) bool { return strings.HasPrefix(r, "db/") }) {
			t.Fatalf("without a lease runs: %v", running)
		}
		one = f.attach()
		one.desire(t, true, 20, container("web", 7), container("db", 18, exclusive))
		if r := one.awaitState(t, web, pb.State_RUNNING); r.GetRuntimeId() != ids["web"] {
			t.Errorf("web was made anew: %v", r)
		}
		one.await(t, "the new db", func() bool {
			r := one.replicas[Key{"db", 0}]
			return r.GetState() == pb.State_RUNNING && r.GetGeneration() == 18
		})
		one.await(t, "old is gone", func() bool { return one.removed[Key{"old", 0}] == 9 })
		if len(one.drifts) != 1 || one.drifts[0].Kind != pb.DriftKind_ORPHAN_ON_AGENT || one.drifts[0].WorkloadId != "old" {
			t.Errorf("drifts: %v", one.drifts)
		}
	})
}

func TestSilentRuntime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7), container("db", 8))
		s.awaitState(t, web, pb.State_RUNNING)
		s.awaitState(t, Key{"db", 0}, pb.State_RUNNING)
		before, calls := f.runtime.running(), len(f.runtime.called())
		f.runtime.set(func() { f.runtime.down = true })
		s.await(t, "the runtime is not healthy", func() bool {
			last := s.beats[len(s.beats)-1]
			return len(last.GetRuntimes()) == 1 && !last.GetRuntimes()[0].GetHealthy()
		})
		s.desire(t, true, 11, container("web", 7), container("new", 11))
		r := s.awaitState(t, web, pb.State_UNKNOWN)
		if r.GetReason().GetCode() != pb.ReasonCode_RUNTIME_UNAVAILABLE {
			t.Errorf("reported: %v", r)
		}
		time.Sleep(time.Hour) // virtual
		if got := f.runtime.running(); !slices.Equal(got, before) || len(f.runtime.called()) != calls {
			t.Errorf("a runtime that did not answer was asked for %v, and runs %v", f.runtime.called()[calls:], got)
		}
		f.runtime.set(func() { f.runtime.down = false })
		s.awaitState(t, web, pb.State_RUNNING)
		s.awaitState(t, Key{"new", 0}, pb.State_RUNNING)
		s.await(t, "db is gone", func() bool { return s.removed[Key{"db", 0}] == 8 })
	})
}

func TestStartThatIsCutOffLeavesNothing(t *testing.T) {
	for name, late := range map[string]bool{"the runtime answers": false, "what it makes is seen late": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				f := newFixture(t, "s1")
				held := make(chan struct{})
				f.runtime.hold["web"], f.runtime.halves = held, late
				f.start()
				s := f.attach()
				s.desire(t, true, 10, container("web", 7))
				s.await(t, "its start is under way", func() bool { return len(f.runtime.called()) > 0 })
				s.desire(t, true, 11)
				if late {
					f.runtime.set(func() { f.runtime.hidden = true })
					s.await(t, "it is given up", func() bool { return s.removed[web] == 7 })
					f.runtime.set(func() { f.runtime.hidden = false })
					f.runtime.announce()
				} else {
					close(held)
					s.await(t, "it is gone", func() bool { return s.removed[web] == 7 })
				}
				began := time.Now()
				s.await(t, "nothing runs", func() bool { return len(f.runtime.running()) == 0 })
				if took := time.Since(began); took > 15*time.Second {
					t.Errorf("it took %s: it was wanted once, and is no orphan", took)
				}
			})
		})
	}
}

func TestSlowWorkDelaysNoOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		held := make(chan struct{})
		f.runtime.hold["slow"] = held
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("slow", 7), container("web", 8))
		began := time.Now()
		s.awaitState(t, web, pb.State_RUNNING)
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %s", took)
		}
		close(held)
		s.awaitState(t, Key{"slow", 0}, pb.State_RUNNING)
	})
}

func TestFailureIsReportedAndWhatRanGoesOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7))
		s.awaitState(t, web, pb.State_RUNNING)
		before := f.runtime.running()
		f.runtime.set(func() { f.runtime.prepare["web"] = Refuse(pb.ReasonCode_IMAGE_NOT_FOUND, "no such image") })
		s.desire(t, false, 12, container("web", 12, func(i *pb.DesiredItem) { i.Assignment.Revision = "r2" }))
		r := s.awaitState(t, web, pb.State_FAILED)
		if r.GetReason().GetCode() != pb.ReasonCode_IMAGE_NOT_FOUND || r.GetGeneration() != 12 {
			t.Errorf("reported: %v", r)
		}
		time.Sleep(time.Hour) // virtual: no attempts of its own
		if got := f.runtime.running(); !slices.Equal(got, before) {
			t.Errorf("running: %v, before %v", got, before)
		}
		f.runtime.set(func() { delete(f.runtime.prepare, "web") })
		s.desire(t, false, 14, container("web", 14, func(i *pb.DesiredItem) { i.Assignment.Revision = "r2" }))
		s.await(t, "the next attempt runs", func() bool {
			return s.replicas[web].GetState() == pb.State_RUNNING && s.replicas[web].GetGeneration() == 14
		})
		if got := f.runtime.running(); len(got) != 1 || !strings.Contains(got[0], "gen=14") {
			t.Errorf("running: %v", got)
		}
	})
}

func TestStopAndStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7))
		id := s.awaitState(t, web, pb.State_RUNNING).GetRuntimeId()
		s.desire(t, false, 11, container("web", 7, func(i *pb.DesiredItem) { i.Assignment.DesiredState = pb.DesiredState_DESIRED_STOPPED }))
		s.awaitState(t, web, pb.State_STOPPED)
		time.Sleep(time.Hour) // virtual: it stays so
		if got := f.runtime.running(); len(got) != 0 {
			t.Errorf("running: %v", got)
		}
		s.desire(t, false, 12, container("web", 7))
		r := s.awaitState(t, web, pb.State_RUNNING)
		if r.GetRuntimeId() != id || r.GetRestarts() != 0 {
			t.Errorf("started as %v, it was %s", r, id)
		}
	})
}

func TestExclusiveWorkEndsBeforeTheLease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.runtime.slowStop["db"] = time.Hour // it would take its whole grace
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("db", 7, exclusive), container("web", 8))
		s.awaitState(t, Key{"db", 0}, pb.State_RUNNING)
		s.awaitState(t, web, pb.State_RUNNING)
		time.Sleep(time.Minute) // virtual: within the lease nothing happens
		if got := f.runtime.running(); len(got) != 2 {
			t.Fatalf("running: %v", got)
		}
		var last time.Time
		s.mu.Lock()
		s.acking = false
		last = time.Now() // acknowledged heartbeats were sent before
		f.mu.Lock()
		f.down["s1"] = true
		f.mu.Unlock()
		s.mu.Unlock()
		for len(f.runtime.running()) == 2 {
			time.Sleep(10 * time.Millisecond) // virtual
		}
		if took := time.Since(last); took > 10*time.Second {
			t.Errorf("exclusive work ended %s after the last heartbeat, later than the lease", took)
		}
		if got := f.runtime.running(); len(got) != 1 || !strings.HasPrefix(got[0], "web/0") {
			t.Fatalf("running: %v", got)
		}
		time.Sleep(time.Hour) // virtual
		if got := f.runtime.running(); len(got) != 1 {
			t.Errorf("without a lease it was started: %v", got)
		}
		f.mu.Lock()
		f.down["s1"] = false
		f.mu.Unlock()
		s = f.attach()
		s.desire(t, true, 10, container("db", 7, exclusive), container("web", 8))
		s.awaitState(t, Key{"db", 0}, pb.State_RUNNING)
	})
}

func TestSlowStopIsOvertakenByTheFence(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.runtime.slowStop["db"] = time.Hour
		f.start()
		s := f.attach()
		patient := func(i *pb.DesiredItem) {
			seconds := int32(3600)
			i.Spec.GetContainer().StopGraceSeconds = &seconds
		}
		s.desire(t, true, 10, container("db", 7, exclusive, patient))
		s.awaitState(t, Key{"db", 0}, pb.State_RUNNING)
		s.drop(t, 11, Key{"db", 0})
		s.awaitState(t, Key{"db", 0}, pb.State_DELETING)
		s.acks(false)
		f.mu.Lock()
		f.down["s1"] = true
		f.mu.Unlock()
		last := time.Now()
		for len(f.runtime.running()) > 0 {
			time.Sleep(10 * time.Millisecond) // virtual
		}
		if took := time.Since(last); took > 10*time.Second {
			t.Errorf("it ended %s after the last heartbeat, later than the lease", took)
		}
	})
}

func TestReportsAreRepeatedUntilAcknowledged(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.await(t, "a full status", func() bool { return len(s.reports) == 1 })
		s.desire(t, true, 10, container("web", 7))
		s.awaitState(t, web, pb.State_RUNNING)
		// Nothing is acknowledged, and the session ends: all is said again in the next.
		s.acks(false)
		s.drop(t, 11, web)
		s.await(t, "it is gone", func() bool { return s.removed[web] == 7 })
		s.end <- status.Error(codes.Aborted, "the leader does not know this session")
		s = f.attach()
		s.await(t, "that it is gone is said again", func() bool { return len(s.reports) > 0 && s.reports[0].GetFull() && s.removed[web] == 7 })
		s.end <- status.Error(codes.Aborted, "and once more")
		s = f.attach()
		s.await(t, "a full status", func() bool { return len(s.reports) > 0 })
		if len(s.removed) != 0 {
			t.Errorf("what was acknowledged is said again: %v", s.removed)
		}
	})
}

func TestHeartbeatsAndAnotherServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1", "s2", "s3")
		f.start()
		s := f.attach()
		began := time.Now()
		s.await(t, "five heartbeats", func() bool { return len(s.beats) == 5 })
		if took := time.Since(began); took < 7*time.Second || took > 9*time.Second {
			t.Errorf("five heartbeats took %s", took)
		}
		// The server lives, and can't reach the leader: the agent goes elsewhere before
		// its lease is over.
		s.acks(false)
		first, began := s.server.address, time.Now()
		s = f.attach()
		if s.server.address == first || time.Since(began) > 8*time.Second {
			t.Errorf("after %s it came to %s, from %s", time.Since(began), s.server.address, first)
		}
	})
}

func TestTunnel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7))
		id := s.awaitState(t, web, pb.State_RUNNING).GetRuntimeId()
		line := func(text string) {
			f.runtime.set(func() {
				f.runtime.logs[id] = append(f.runtime.logs[id], &pb.LogChunk{Line: []byte(text), Time: timestamppb.New(time.Now())})
			})
		}
		line("one")
		request := func(stream, workload string, follow bool) {
			s.send(t, &pb.ServerMessage{Message: &pb.ServerMessage_Open{Open: &pb.OpenTunnel{
				StreamId: stream, What: &pb.OpenTunnel_Logs{Logs: &pb.WorkloadLogsRequest{Id: workload, Follow: follow}},
			}}})
		}
		collect := func(stream string, n int) (lines []string, problem string) {
			tunnel := <-s.server.tunnels
			for {
				frame, err := tunnel.Recv()
				if err != nil {
					t.Fatal(err)
				}
				if frame.GetStreamId() != "" && frame.GetStreamId() != stream {
					t.Errorf("stream %q, want %q", frame.GetStreamId(), stream)
				}
				if frame.GetLog() != nil {
					if frame.GetLog().GetNodeId() != "n1" {
						t.Errorf("line: %v", frame.GetLog())
					}
					lines = append(lines, string(frame.GetLog().GetLine()))
				}
				if frame.GetEnd() || n > 0 && len(lines) == n {
					return lines, frame.GetError()
				}
				if n > 0 && len(lines) == 1 {
					// The next run says more: what was said before is not said again.
					time.Sleep(time.Second) // virtual
					line("two")
					f.runtime.crash(id, 1)
				}
			}
		}
		request("t1", "web", false)
		if lines, problem := collect("t1", 0); !slices.Equal(lines, []string{"one"}) || problem != "" {
			t.Errorf("logs: %q %q", lines, problem)
		}
		request("t2", "nothing", false)
		if lines, problem := collect("t2", 0); len(lines) != 0 || !strings.Contains(problem, "nothing of nothing is on node n1") {
			t.Errorf("logs: %q %q", lines, problem)
		}
		request("t3", "web", true)
		if lines, _ := collect("t3", 2); !slices.Equal(lines, []string{"one", "two"}) {
			t.Errorf("logs: %q", lines)
		}
		s.send(t, &pb.ServerMessage{Message: &pb.ServerMessage_Open{Open: &pb.OpenTunnel{StreamId: "t4"}}})
		s.await(t, "a refusal", func() bool { return len(s.refusals) == 1 && s.refusals[0].GetStreamId() == "t4" })
	})
}
