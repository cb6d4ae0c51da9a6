package agent

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Each kind of drift is found, told once, and mended.
func TestDrift(t *testing.T) {
	for _, c := range []struct {
		name string
		kind pb.DriftKind
		// tamper does it behind the agent's back; id is that of the one that runs.
		tamper func(f *fixture, id string)
	}{
		{
			"removed by hand", pb.DriftKind_MISSING_ON_AGENT,
			func(f *fixture, id string) { f.runtime.set(func() { delete(f.runtime.instances, id) }) },
		},
		{
			"stopped by hand", pb.DriftKind_STATE_MISMATCH,
			func(f *fixture, id string) {
				f.runtime.set(func() {
					in := f.runtime.instances[id]
					in.Phase, in.Finished, in.Stopped = Exited, time.Now(), true
					f.runtime.instances[id] = in
				})
			},
		},
		{
			"killed by hand", pb.DriftKind_STATE_MISMATCH,
			func(f *fixture, id string) { f.runtime.crash(id, 137) },
		},
		{
			"another revision beside it", pb.DriftKind_REVISION_MISMATCH,
			func(f *fixture, id string) {
				f.runtime.set(func() {
					in := f.runtime.instances[id]
					in.ID, in.Revision, in.Generation = "other", "r0", 3
					f.runtime.instances["other"] = in
				})
			},
		},
		{
			"a second one beside it", pb.DriftKind_ORPHAN_ON_AGENT,
			func(f *fixture, id string) {
				f.runtime.set(func() {
					in := f.runtime.instances[id]
					in.ID, in.Generation = "other", 3
					f.runtime.instances["other"] = in
				})
			},
		},
		{
			"one that nobody wants", pb.DriftKind_ORPHAN_ON_AGENT,
			func(f *fixture, id string) {
				f.runtime.set(func() {
					in := f.runtime.instances[id]
					in.ID, in.Key = "other", Key{"stray", 0}
					f.runtime.instances["other"] = in
				})
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				f := newFixture(t, "s1")
				metrics := prometheus.NewRegistry()
				f.metrics = metrics
				f.start()
				s := f.attach()
				s.desire(t, true, 10, container("web", 7))
				id := s.awaitState(t, web, pb.State_RUNNING).GetRuntimeId()
				c.tamper(f, id)
				s.await(t, "the drift", func() bool { return len(s.drifts) > 0 })
				time.Sleep(5 * time.Minute) // virtual
				if len(s.drifts) != 1 || s.drifts[0].Kind != c.kind || s.drifts[0].Message == "" {
					t.Errorf("told: %v", s.drifts)
				}
				now := f.runtime.running()
				want := "web/0 gen=7 " + id
				if c.kind == pb.DriftKind_MISSING_ON_AGENT {
					if len(now) != 1 || now[0] == want {
						t.Errorf("running: %v", now)
					}
				} else if len(now) != 1 || now[0] != want {
					t.Errorf("running: %v, want %s", now, want)
				}
				if got := counted(t, metrics, "persys_agent_drift_total"); len(got) != 4 || got[c.kind.String()] != 1 {
					t.Errorf("counted: %v", got)
				}
			})
		})
	}
}

// What is to be stopped and was started by hand is stopped again.
func TestDriftOfStoppedWork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7))
		id := s.awaitState(t, web, pb.State_RUNNING).GetRuntimeId()
		s.desire(t, false, 20, container("web", 17, func(i *pb.DesiredItem) { i.Assignment.DesiredState = pb.DesiredState_DESIRED_STOPPED }))
		s.awaitState(t, web, pb.State_STOPPED)
		f.runtime.set(func() {
			in := f.runtime.instances[id]
			in.Phase, in.Started = Running, time.Now()
			f.runtime.instances[id] = in
		})
		s.await(t, "the drift", func() bool { return len(s.drifts) == 1 && s.drifts[0].Kind == pb.DriftKind_STATE_MISMATCH })
		time.Sleep(time.Minute) // virtual
		if now := f.runtime.running(); len(now) != 0 {
			t.Errorf("running: %v", now)
		}
	})
}

// What was taken away while the agent was not there is found when it is back.
func TestDriftWhileTheAgentIsAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7))
		id := s.awaitState(t, web, pb.State_RUNNING).GetRuntimeId()
		f.stop()
		f.runtime.set(func() { delete(f.runtime.instances, id) })
		f.start()
		s = f.attach()
		s.desire(t, true, 10, container("web", 7))
		s.await(t, "the drift", func() bool { return len(s.drifts) == 1 && s.drifts[0].Kind == pb.DriftKind_MISSING_ON_AGENT })
		s.awaitState(t, web, pb.State_RUNNING)
	})
}

// Nothing that the servers ask for is a drift: updates, restarts, moves, crashes.
func TestNoDriftInOrdinaryLife(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFixture(t, "s1")
		f.start()
		s := f.attach()
		s.desire(t, true, 10, container("web", 7))
		id := s.awaitState(t, web, pb.State_RUNNING).GetRuntimeId()
		f.runtime.crash(id, 1)
		s.await(t, "a restart", func() bool { return s.replicas[web].GetRestarts() == 1 })
		s.desire(t, false, 20, container("web", 15, func(i *pb.DesiredItem) { i.Assignment.Revision = "r2" }))
		s.await(t, "the new revision", func() bool {
			return s.replicas[web].GetGeneration() == 15 && s.replicas[web].GetState() == pb.State_RUNNING
		})
		// A start that fails, and is made again by a later assignment.
		f.runtime.set(func() { f.runtime.refuse["web"] = Refuse(pb.ReasonCode_BAD_COMMAND, "no") })
		s.desire(t, false, 30, container("web", 25, func(i *pb.DesiredItem) { i.Assignment.Revision = "r3" }))
		s.awaitState(t, web, pb.State_FAILED)
		f.runtime.set(func() { delete(f.runtime.refuse, "web") })
		s.desire(t, false, 40, container("web", 35, func(i *pb.DesiredItem) { i.Assignment.Revision = "r3" }))
		s.awaitState(t, web, pb.State_RUNNING)
		// An update that came while the agent was away.
		f.stop()
		f.start()
		s2 := f.attach()
		s2.desire(t, true, 50, container("web", 45, func(i *pb.DesiredItem) { i.Assignment.Revision = "r4" }))
		s2.await(t, "the next revision", func() bool {
			return s2.replicas[web].GetGeneration() == 45 && s2.replicas[web].GetState() == pb.State_RUNNING
		})
		s2.drop(t, 60, web)
		s2.await(t, "it is gone", func() bool { return s2.removed[web] == 45 })
		if len(s.drifts)+len(s2.drifts) != 0 {
			t.Errorf("told: %v %v", s.drifts, s2.drifts)
		}
	})
}

// A storm of drifts is counted in full and told in part; what was told is told
// again where no server has acknowledged it.
func TestDriftsAreBounded(t *testing.T) {
	o := newOutbox()
	for range 3 * maxDrifts {
		o.drift(&pb.Drift{WorkloadId: "w"})
	}
	first := o.next()
	if len(first.GetDrifts()) != maxDrifts {
		t.Fatalf("%d drifts", len(first.GetDrifts()))
	}
	if again := o.full(); len(again.GetDrifts()) != maxDrifts {
		t.Fatalf("%d drifts in the report that begins the next session", len(again.GetDrifts()))
	}
	o.acknowledged(o.sent.GetSeq())
	if r := o.next(); r != nil {
		t.Fatalf("told once more: %v", r)
	}
}

// counted are the values of a counter with one label.
func counted(t *testing.T, g prometheus.Gatherer, name string) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			values[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
		}
	}
	return values
}
