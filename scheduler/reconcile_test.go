package scheduler

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/doctest"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// TestReconciliationDocument prints the table.
func TestReconciliationDocument(t *testing.T) {
	names := func(typ string, n int) []doctest.Constant {
		all := doctest.Constants(t, "reconcile.go", typ)
		if len(all) != n {
			t.Fatalf("%d of %d constants of type %s have a comment", len(all), n, typ)
		}
		return all
	}
	wants, seen := names("desire", int(desires)), names("sight", int(sights))
	nodes, dos := names("condition", int(conditions)), names("action", int(actions))
	var out strings.Builder
	glossary := func(title string, all []doctest.Constant) {
		fmt.Fprintf(&out, "\n| %s | |\n|---|---|\n", title)
		for _, c := range all {
			fmt.Fprintf(&out, "| `%s` | %s |\n", c.Name, c.Comment)
		}
	}
	line := func(first string, r row) {
		fmt.Fprintf(&out, "| %s |", first)
		for _, a := range r {
			if a == never {
				out.WriteString(" |")
			} else {
				fmt.Fprintf(&out, " %s |", dos[a].Name)
			}
		}
		out.WriteString("\n")
	}
	head := func(first string) {
		fmt.Fprintf(&out, "| %s |", first)
		for _, n := range nodes {
			fmt.Fprintf(&out, " %s |", n.Name)
		}
		out.WriteString("\n|" + strings.Repeat("---|", len(nodes)+1) + "\n")
	}
	glossary("seen", seen)
	glossary("node", nodes)
	glossary("action", dos[1:])
	for w := range table {
		fmt.Fprintf(&out, "\n**%s**: %s\n\n", wants[w].Name, wants[w].Comment)
		head("seen")
		for s, r := range table[w] {
			if r != (row{}) {
				line(seen[s].Name, r)
			}
		}
	}
	out.WriteString("\nThese kinds differ where a replica is assigned:\n\n")
	head("kind, wanted, seen")
	for kind, e := range exceptions {
		if e.row != (row{}) {
			line(fmt.Sprintf("%s, %s to %s, %s to %s", strings.ToLower(pb.WorkloadKind(kind).String()), wants[0].Name, wants[e.want].Name, seen[e.from].Name, seen[e.to].Name), e.row)
		}
	}
	doctest.Section(t, "../docs/reconciliation.md", "scheduler", out.String(), *update)
}

// TestReconciliationTable drives a cluster into each cell of the table, and sees
// what is done.
func TestReconciliationTable(t *testing.T) {
	wants, sees := doctest.Constants(t, "reconcile.go", "desire"), doctest.Constants(t, "reconcile.go", "sight")
	nodes, dos := doctest.Constants(t, "reconcile.go", "condition"), doctest.Constants(t, "reconcile.go", "action")
	for kind := range exceptions {
		for want := range desires {
			for seen := range sights {
				for node := range conditions {
					c := cell{situation{pb.WorkloadKind(kind), want, seen, node}}
					e := exceptions[kind]
					special := want <= e.want && seen >= e.from && seen <= e.to && e.row[node] != never && (seen > exhausted || want == wantRun)
					if c.action() == never || kind != 0 && !special {
						continue
					}
					t.Run(fmt.Sprintf("%v %s %s %s %s", c.kind, wants[want].Name, sees[seen].Name, nodes[node].Name, dos[c.action()].Name), c.test)
				}
			}
		}
	}
}

type cell struct{ situation }

// world makes a cluster in which replica 0 of w is in the cell. Replica 1 is on
// another node and serves, or, where none can be spared, does not yet.
func (c cell) world(t *testing.T, exclusive, spare bool) *cellWorld {
	w := &cellWorld{newWorld(t)}
	zone := map[string]string{"zone": "eu"}
	w.node("n1", 4000, 4<<30, 4<<30, zone, pb.WorkloadType_CONTAINER)
	w.node("n2", 4000, 4<<30, 4<<30, zone, pb.WorkloadType_CONTAINER)
	spec := &pb.WorkloadSpec{
		Id: "w", Kind: c.kind, Replicas: proto.Int32(2), Resources: &pb.Resources{Cpu: "100m"}, Exclusive: exclusive,
		Placement: &pb.Placement{NodeLabels: zone}, Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "v1"}},
	}
	if c.kind == pb.WorkloadKind_GLOBAL {
		spec.Replicas, spec.Placement.Nodes = nil, []string{"n1"}
	}
	// A replica serves as soon as it runs.
	spec.Update = &pb.UpdateStrategy{MinHealthySeconds: proto.Int32(0), Canary: 1}
	rollout := &pb.Rollout{Revision: "v1", State: pb.RolloutState_ROLLOUT_PROGRESSING, ProgressTime: timestamppb.New(w.now)}
	switch c.want {
	case wantHeld:
		rollout.State = pb.RolloutState_ROLLOUT_AWAITING_PROMOTION
		if c.kind == pb.WorkloadKind_GLOBAL {
			rollout.State = pb.RolloutState_ROLLOUT_FAILED
		}
	case wantStop, wantStopped:
		spec.DesiredState = pb.DesiredState_DESIRED_STOPPED
	case wantGone:
		spec.DesiredState = pb.DesiredState_DESIRED_DELETED
	}
	w.submit(spec, "v1")
	w.put(model.RolloutKey("w"), rollout)
	rec := &pb.Workload{}
	w.load(model.WorkloadKey("w"), rec)
	a := &pb.Assignment{
		WorkloadId: "w", NodeId: "n1", Generation: 1, Revision: "v1", WorkloadUid: rec.Uid, Type: pb.WorkloadType_CONTAINER,
		CpuMillis: 100, Exclusive: exclusive,
	}
	if c.kind != pb.WorkloadKind_GLOBAL {
		other := proto.CloneOf(a)
		other.Replica, other.NodeId = 1, "n2"
		w.put(model.AssignmentKey("w", 1), other)
		if spare {
			w.report("w/000001", pb.State_RUNNING, nil)
		}
	}
	switch c.want {
	case wantNew, wantHeld:
		a.Revision = "v0"
	case wantStart, wantStopped:
		a.DesiredState = pb.DesiredState_DESIRED_STOPPED
	}
	if c.seen > exhausted || c.seen == exhausted && c.node != nowhere {
		w.put(model.AssignmentKey("w", 0), a)
	}
	failure := &pb.Reason{Code: pb.ReasonCode_EXITED, Message: "exit code 1", Retryable: true}
	retry := &pb.Retry{WorkloadId: "w", Revision: "v1", Attempts: 1, Reason: failure}
	switch c.seen {
	case absent:
		w.put(model.RetryKey("w", 0), retry)
	case pausing:
		retry.NextRetryAt = timestamppb.New(w.now.Add(time.Minute))
		w.put(model.RetryKey("w", 0), retry)
	case ending:
		w.put(model.ReplicaKey("w", 0), &pb.Replica{WorkloadId: "w", NodeId: "n1", Generation: 1, State: pb.State_DELETING})
	case exhausted:
		retry.Exhausted = true
		w.put(model.RetryKey("w", 0), retry)
	case running:
		w.report("w/000000", pb.State_RUNNING, nil)
	case restarting:
		w.report("w/000000", pb.State_RETRY_PENDING, failure)
	case failed:
		w.report("w/000000", pb.State_FAILED, failure)
	case stopped:
		w.report("w/000000", pb.State_STOPPED, nil)
	case completed:
		w.report("w/000000", pb.State_COMPLETED, nil)
	}
	w.bring("n1", c.node)
	return w
}

type cellWorld struct{ *world }

// bring makes a node so.
func (w *cellWorld) bring(id string, to condition) {
	drain := func(n *pb.Node) { n.State, n.Unschedulable, n.Draining = pb.NodeState_DRAINING, true, true }
	switch to {
	case closed:
		w.changeNode(id, func(n *pb.Node) { n.Unschedulable = true })
	case draining:
		w.changeNode(id, drain)
	case overdue:
		w.changeNode(id, func(n *pb.Node) {
			drain(n)
			n.DrainDeadline = timestamppb.New(w.now)
		})
	case unmatched:
		w.changeNode(id, func(n *pb.Node) { n.UserLabels = map[string]string{"zone": "us"} })
	case lost:
		w.lose(id)
	case gone:
		w.remove(model.NodeLeaseKey(id))
		w.remove(model.NodeKey(id))
	}
}

func (w *cellWorld) assignment() *pb.Assignment {
	a := &pb.Assignment{}
	if !w.load(model.AssignmentKey("w", 0), a) {
		return nil
	}
	return a
}

func (w *cellWorld) status() *pb.WorkloadStatus {
	st := &pb.WorkloadStatus{}
	w.load(model.WorkloadStatusKey("w"), st)
	return st
}

func (w *cellWorld) retryRecord() *pb.Retry {
	r := &pb.Retry{}
	if !w.load(model.RetryKey("w", 0), r) {
		return nil
	}
	return r
}

// The clauses of what a cell is tested for.

func (w *cellWorld) unchanged() {
	w.t.Helper()
	if a := w.assignment(); a == nil || a.Generation != 1 || a.NodeId != "n1" {
		w.t.Fatalf("assignment is %v, want it as it was", a)
	}
}

func (w *cellWorld) unassigned() {
	w.t.Helper()
	if a := w.assignment(); a != nil {
		w.t.Fatalf("assignment is %v, want none", a)
	}
}

// assignedAnew: to another node, or where it was if here is said.
func (w *cellWorld) assignedAnew(here bool) {
	w.t.Helper()
	want := "n2"
	if here {
		want = "n1"
	}
	a := w.assignment()
	if a == nil || a.Generation <= 1 || a.NodeId != want || a.Revision != "v1" || a.DesiredState != pb.DesiredState_DESIRED_RUNNING {
		w.t.Fatalf("assignment is %v, want a new one on %s", a, want)
	}
}

func (w *cellWorld) is(state pb.State) {
	w.t.Helper()
	if st := w.status(); st.State != state {
		w.t.Fatalf("workload is %v, want %v", st, state)
	}
}

// end lets what may still be running come to its end: its agent says so, or the
// time is over.
func (w *cellWorld) end(node condition) {
	if node == lost || node == gone {
		w.now = w.now.Add(time.Minute)
	} else {
		w.gone("w/000000")
	}
}

func (c cell) test(t *testing.T) {
	do := c.action()
	exclusive := do == placeOnceEnded
	w := c.world(t, exclusive, true)
	w.see()
	c.check(w)
	plan := w.settle(nil)
	here := c.node == fit
	switch do {
	case placeIt:
		if a := w.assignment(); a == nil || a.Revision != "v1" {
			t.Fatalf("assignment is %v", a)
		}
	case pause:
		w.unassigned()
		w.is(pb.State_RETRY_PENDING)
		if !plan.Wake.Equal(w.now.Add(time.Minute)) {
			t.Fatalf("decides again at %v", plan.Wake)
		}
	case placeOnceEnded:
		w.unassigned()
		w.end(c.node)
		w.settle(nil)
		if a := w.assignment(); a == nil || a.NodeId == "n1" && !here {
			t.Fatalf("assignment is %v", a)
		}
		w = c.world(t, false, true)
		w.settle(nil)
		if w.assignment() == nil {
			t.Fatal("what is not exclusive waits too")
		}
	case giveUp, vacate:
		w.is(pb.State_FAILED)
		if do == vacate || c.node == nowhere {
			w.unassigned()
		} else {
			w.unchanged()
		}
	case await:
		w.unchanged()
		w.is(pb.State_SCHEDULED)
	case keep:
		w.unchanged()
		w.is(pb.State_RUNNING)
	case localRestart:
		w.unchanged()
		w.is(pb.State_RETRY_PENDING)
	case retryIt:
		c.testRetry(t, w)
	case leave:
		w.unchanged()
		w.is(pb.State_UPDATING)
	case retryNow:
		w.assignedAnew(false)
		if r := w.retryRecord(); r == nil || r.Attempts != 1 {
			t.Fatalf("%v", r)
		}
		w = c.world(t, false, true)
		w.changeNode("n2", func(n *pb.Node) { n.Unschedulable = true })
		w.settle(nil)
		w.unassigned()
		w.is(pb.State_PENDING)
	case rest:
		w.unchanged()
		w.report("w/000001", pb.State_STOPPED, nil)
		w.settle(nil)
		if w.retryRecord() != nil || c.want > wantStart && w.status().State != pb.State_STOPPED || w.status().Failed != 0 {
			t.Fatalf("%v, %v", w.status(), w.retryRecord())
		}
	case moveInTurn, replaceInTurn:
		w.assignedAnew(here)
		w = c.world(t, false, false)
		w.settle(nil)
		w.unchanged()
		w.is(pb.State_UPDATING)
	case finish:
		w.unchanged()
		w.changeNode("n1", func(n *pb.Node) { n.DrainDeadline = timestamppb.New(w.now.Add(time.Minute)) })
		if plan := w.settle(nil); !plan.Wake.Equal(w.now.Add(time.Minute)) {
			t.Fatalf("decides again at %v", plan.Wake)
		}
		w.unchanged()
		w.now = w.now.Add(time.Minute)
		w.settle(nil)
		w.assignedAnew(false)
	case evict:
		w = c.world(t, false, false)
		w.settle(nil)
		w.assignedAnew(false)
		w = c.world(t, false, false)
		w.changeNode("n2", func(n *pb.Node) { n.Unschedulable = true })
		w.settle(nil)
		w.unassigned()
		w.is(pb.State_PENDING)
		w.changeNode("n2", func(n *pb.Node) { n.Unschedulable = false })
		w.settle(nil)
		w.assignedAnew(false)
	case move, replace:
		w = c.world(t, false, false)
		w.settle(nil)
		w.assignedAnew(here)
	case moveLost:
		w = c.world(t, false, false)
		w.settle(nil)
		w.assignedAnew(false)
		w = c.world(t, true, false)
		w.settle(nil)
		w.unchanged()
		w.end(c.node)
		w.settle(nil)
		w.assignedAnew(false)
	case tellToStop:
		if a := w.assignment(); a == nil || a.NodeId != "n1" || a.Generation <= 1 || a.DesiredState != pb.DesiredState_DESIRED_STOPPED {
			t.Fatalf("assignment is %v", a)
		}
	case awaitStop:
		w.unchanged()
		w.report("w/000001", pb.State_STOPPED, nil)
		w.settle(nil)
		w.is(pb.State_UPDATING)
	case keepStopped:
		w.unchanged()
		w.report("w/000001", pb.State_STOPPED, nil)
		w.settle(nil)
		w.is(pb.State_STOPPED)
	case remove:
		w.unassigned()
	case awaitGone:
		if w.kvs[model.ReplicaKey("w", 0)] == nil {
			t.Fatal("forgotten before its agent has said that it is gone")
		}
	case forget:
		c.testForget(t, w)
	case leaveLast:
		w.unassigned()
		c.testLeaveLast(t)
	case park:
		w.unchanged()
		if st := w.status(); st.Assigned != 0 {
			t.Fatalf("%v", st)
		}
	default:
		t.Fatalf("no test sees action %d", do)
	}
}

func (c cell) testRetry(t *testing.T, w *cellWorld) {
	w.unchanged()
	if r := w.retryRecord(); r == nil || r.Attempts != 0 || r.NextRetryAt == nil {
		t.Fatalf("%v", r)
	}
	w.now = w.now.Add(time.Minute)
	w.settle(nil)
	w.assignedAnew(false)
	if r := w.retryRecord(); r == nil || r.Attempts != 1 {
		t.Fatalf("%v", r)
	}
}

// testLeaveLast sees that it stays as long as there is something else.
func (c cell) testLeaveLast(t *testing.T) {
	w := c.world(t, false, true)
	w.submit(&pb.WorkloadSpec{Id: "other", Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{}}}, "v1")
	w.put(model.AssignmentKey("other", 0), &pb.Assignment{WorkloadId: "other", NodeId: "n1", Generation: 1, Revision: "v1"})
	w.report("other/000000", pb.State_RUNNING, nil)
	w.changeNode("n2", func(n *pb.Node) { n.Unschedulable = true }) // so that it stays
	w.settle(nil)
	w.unchanged()
	w.remove(model.AssignmentKey("other", 0))
	w.changeWorkload("other", func(rec *pb.Workload) { rec.Spec.DesiredState = pb.DesiredState_DESIRED_DELETED })
	w.settle(nil)
	w.unchanged() // its agent has not said that it is gone
	w.gone("other/000000")
	w.settle(nil)
	w.unassigned()
}

func (c cell) testForget(t *testing.T, w *cellWorld) {
	left := func() bool { return w.kvs[model.ReplicaKey("w", 0)] != nil || w.kvs[model.RetryKey("w", 0)] != nil }
	if left() {
		t.Fatal("not forgotten")
	}
	if c.seen != ending {
		return
	}
	w = c.world(t, true, true)
	w.settle(nil)
	if !left() {
		t.Fatal("what may still be running is forgotten")
	}
	w.end(c.node)
	w.settle(nil)
	if left() {
		t.Fatal("not forgotten")
	}
}

// check holds that the world is in the cell.
func (c cell) check(w *cellWorld) {
	w.t.Helper()
	if got := w.situation(w.picture.workloads["w"].find(0)); got != c.situation {
		w.t.Fatalf("the cluster is in %v", got)
	}
}

// situation is the one that a replica is in, of which something is stored.
func (w *world) situation(r *replica) situation {
	d := &decider{p: w.picture, now: w.now, nano: w.now.UnixNano(), opt: w.opt.withDefaults(), plan: &Plan{}}
	b := &builder{d: d, w: r.w}
	want := r.w.want
	if want != nil {
		b.beginRollout()
	}
	switch global := want != nil && want.kind == pb.WorkloadKind_GLOBAL; {
	case want == nil || want.desired == pb.DesiredState_DESIRED_DELETED, !global && r.number >= want.replicas, r.assignment.mod == 0 &&
		(global || want.desired == pb.DesiredState_DESIRED_STOPPED):
		return b.situationOf(r, wantGone)
	case want.desired == pb.DesiredState_DESIRED_RUNNING:
		return b.situationOf(r, b.desireOf(r))
	case r.assignment.desired == pb.DesiredState_DESIRED_STOPPED:
		return b.situationOf(r, wantStopped)
	default:
		return b.situationOf(r, wantStop)
	}
}

// checkTable holds that the table has an action for whatever there is.
func (w *world) checkTable() {
	w.t.Helper()
	for _, id := range sortedKeys(w.picture.workloads) {
		for _, r := range w.picture.workloads[id].replicas {
			if s := w.situation(r); r.next == nil && s.action() == never {
				w.t.Fatalf("%s/%d: no action for %+v", id, r.number, s)
			}
		}
	}
}
