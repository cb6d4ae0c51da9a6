package agent

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/persys-dev/persys/internal/doctest"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// TestTableDocument prints the table.
func TestTableDocument(t *testing.T) {
	names := func(typ string, n int) []doctest.Constant {
		all := doctest.Constants(t, "table.go", typ)
		if len(all) != n {
			t.Fatalf("%d of %d constants of type %s have a comment", len(all), n, typ)
		}
		return all
	}
	wants, seen := names("desire", int(desires)), names("sight", int(sights))
	helds, does := names("constraint", int(constraints)), names("answer", int(answers))
	var out strings.Builder
	glossary := func(title string, all []doctest.Constant) {
		fmt.Fprintf(&out, "\n| %s | |\n|---|---|\n", title)
		for _, c := range all {
			fmt.Fprintf(&out, "| `%s` | %s |\n", c.Name, c.Comment)
		}
	}
	glossary("seen", seen)
	glossary("held back", helds)
	glossary("answer", does[1:])
	for w := range table {
		fmt.Fprintf(&out, "\n**%s**: %s\n\n| seen |", wants[w].Name, wants[w].Comment)
		for _, h := range helds {
			fmt.Fprintf(&out, " %s |", h.Name)
		}
		out.WriteString("\n|" + strings.Repeat("---|", len(helds)+1) + "\n")
		for s, r := range table[w] {
			if r == (row{}) {
				continue
			}
			fmt.Fprintf(&out, "| %s |", seen[s].Name)
			for _, a := range r {
				if a == never {
					out.WriteString(" |")
				} else {
					fmt.Fprintf(&out, " %s |", does[a].Name)
				}
			}
			out.WriteString("\n")
		}
	}
	doctest.Section(t, "../docs/reconciliation.md", "agent", out.String(), *update)
}

// TestTable brings an agent into each cell of the table, and sees what it does.
func TestTable(t *testing.T) {
	wants, sees := doctest.Constants(t, "table.go", "desire"), doctest.Constants(t, "table.go", "sight")
	helds, does := doctest.Constants(t, "table.go", "constraint"), doctest.Constants(t, "table.go", "answer")
	for want := range desires {
		for seen := range sights {
			for held := range constraints {
				c := cell{situation{want, seen, held}}
				if c.answer() == never {
					continue
				}
				t.Run(fmt.Sprintf("%s %s %s %s", wants[want].Name, sees[seen].Name, helds[held].Name, does[c.answer()].Name), c.test)
			}
		}
	}
}

type cell struct{ situation }

var cellKey = Key{"w", 0}

// picture is one in which w/0 is in the cell.
func (c cell) picture() picture {
	exclusive := c.held == fenced || c.held == unleased || c.held == unconfirmed
	p := picture{
		now: begin, desired: desired{revision: 100, items: map[Key]*pb.DesiredItem{}}, actual: map[Key][]Instance{},
		answers: map[pb.WorkloadType]bool{pb.WorkloadType_CONTAINER: true}, busy: map[Key]bool{}, history: map[Key]history{},
		dropped: map[Key]dropped{}, current: c.held != unconfirmed, orphans: map[string]time.Time{}, orphanGrace: time.Minute,
		leaseEnd: begin.Add(time.Hour),
	}
	if c.held == fenced || c.held == unleased {
		p.leaseEnd = time.Time{}
	}
	var ports []*pb.Port
	if c.held == portless {
		ports = []*pb.Port{{HostPort: 80, ContainerPort: 80}}
		p.actual[Key{"a", 0}] = []Instance{{
			Labels: Labels{Key: Key{"a", 0}, UID: "u", Generation: 1, Ports: ports}, ID: "a", Type: pb.WorkloadType_CONTAINER, Phase: Running,
		}}
	}
	a := &pb.Assignment{
		WorkloadId: "w", NodeId: "n1", Generation: 50, WorkloadUid: "u", Revision: "r1", Type: pb.WorkloadType_CONTAINER,
		Exclusive: exclusive, Ports: ports,
	}
	spec := &pb.WorkloadSpec{Id: "w"}
	has := func(generation int64, phase Phase) *Instance {
		id := fmt.Sprintf("w-%d", generation)
		revision := "r1"
		if generation < 50 {
			revision = "r0"
		}
		p.actual[cellKey] = append(p.actual[cellKey], Instance{
			Labels: Labels{Key: cellKey, UID: "u", Revision: revision, Generation: generation, Exclusive: exclusive && (c.held != unleased || generation == 50), Ports: ports},
			ID:     id, Type: pb.WorkloadType_CONTAINER, Phase: phase,
		})
		return &p.actual[cellKey][len(p.actual[cellKey])-1]
	}
	exited := func(code int32) time.Time {
		in := has(50, Exited)
		in.ExitCode, in.Started, in.Finished = code, begin.Add(-time.Minute), begin.Add(-time.Second)
		return in.Finished
	}
	switch c.want {
	case wantGone:
		if c.seen == absent {
			a.DesiredState = pb.DesiredState_DESIRED_DELETED
			p.desired.items[cellKey] = &pb.DesiredItem{Assignment: a, Spec: spec}
		} else {
			p.dropped[cellKey] = dropped{generation: 50, kind: pb.WorkloadType_CONTAINER}
		}
	case wantStopped:
		a.DesiredState = pb.DesiredState_DESIRED_STOPPED
		p.desired.items[cellKey] = &pb.DesiredItem{Assignment: a, Spec: spec}
	case wantRun:
		p.desired.items[cellKey] = &pb.DesiredItem{Assignment: a, Spec: spec}
	}
	switch c.seen {
	case doubtful, newer:
		has(200, Running)
	case young:
		p.orphans[has(10, Running).ID] = begin
	case orphaned:
		p.orphans[has(10, Running).ID] = begin.Add(-2 * time.Minute)
	case idle:
		has(50, Exited)
	case running:
		has(50, Running)
	case doubled:
		has(40, Running)
		has(50, Running)
	case outdated:
		has(40, Running)
	case made:
		has(50, Created)
	case crashed:
		p.history[cellKey] = history{generation: 50, crashes: 1, counted: exited(1), retryAt: begin.Add(-time.Millisecond)}
	case pausing:
		p.history[cellKey] = history{generation: 50, crashes: 1, counted: exited(1), retryAt: begin.Add(time.Second)}
	case finished:
		spec.Kind = pb.WorkloadKind_JOB
		exited(0)
	case held:
		exited(143)
		p.history[cellKey] = history{generation: 50, stopped: true}
	case blocked:
		p.history[cellKey] = history{generation: 50, failure: &Error{Code: pb.ReasonCode_RUNTIME_UNAVAILABLE}, retryAt: begin.Add(time.Second)}
	}
	if c.held == fenced && len(runningOf(p.actual[cellKey])) == 0 {
		has(40, Running)
	}
	if c.held == unknown {
		p.busy[cellKey] = true
	}
	return p
}

func (c cell) test(t *testing.T) {
	p := c.picture()
	if got := p.look(cellKey, p.leavingPorts()).situation; got != c.situation {
		t.Fatalf("the agent is in %v", got)
	}
	d := diff(p)
	var act action
	for _, a := range d.actions {
		if a.key == cellKey {
			act = a
		}
	}
	waiting := d.waiting[cellKey]
	nothing := func(why string) {
		t.Helper()
		if act.verb != "" || !strings.Contains(waiting, why) || (why == "") != (waiting == "") {
			t.Fatalf("does %v, waits for %q", act, waiting)
		}
	}
	does := func(v verb, again bool, instances ...int64) {
		t.Helper()
		var on []int64
		for _, in := range act.instances {
			on = append(on, in.Generation)
		}
		if act.verb != v || act.again != again || (act.item != nil) != (v == start) || !slices.Equal(on, instances) {
			t.Fatalf("does %q again=%v on %v; want %q again=%v on %v", act.verb, act.again, on, v, again, instances)
		}
	}
	wakes := func(at time.Time) {
		t.Helper()
		if !d.wake.Equal(at) {
			t.Fatalf("looks again at %v, want %v", d.wake, at)
		}
	}
	switch c.answer() {
	case leaveIt:
		nothing("")
		if c.held == unknown {
			c.testSilent(t)
		}
	case startIt:
		does(start, false)
	case replaceIt:
		does(start, false, 40)
	case startAgain:
		does(start, true)
	case stopIt:
		does(stop, false, 50)
	case removeIt:
		if c.want == wantUnknown {
			does(remove, false, 10)
		} else {
			does(remove, false, 50)
		}
	case removeOthers:
		does(remove, false, 40)
	case fenceIt:
		var guarded []int64
		for _, in := range runningOf(p.actual[cellKey]) {
			guarded = append(guarded, in.Generation)
		}
		does(stop, false, guarded...)
		if !act.fence || act.grace != fenceGrace {
			t.Fatalf("%+v", act)
		}
	case awaitGrace:
		nothing("")
		wakes(begin.Add(time.Minute))
	case awaitPause:
		nothing("")
		wakes(begin.Add(time.Second))
	case awaitSet:
		nothing("newer")
	case awaitLease:
		nothing("lease")
	case awaitPort:
		if !strings.Contains(waiting, "port 80/tcp is still held by a/0") {
			t.Fatalf("waits for %q", waiting)
		}
		if c.seen == outdated {
			does(remove, false, 40)
		}
	case awaitWord:
		nothing("server")
	default:
		t.Fatalf("no test sees answer %d", c.answer())
	}
}

// testSilent sees that a runtime that does not answer is as good as an action that
// is under way.
func (c cell) testSilent(t *testing.T) {
	p := c.picture()
	clear(p.busy)
	p.answers[pb.WorkloadType_CONTAINER] = false
	if c.want == wantGone && c.seen == absent {
		return // Nothing is there, and nothing is to be.
	}
	if got := p.look(cellKey, nil).situation; got != c.situation {
		t.Fatalf("with a silent runtime the agent is in %v", got)
	}
	if d := diff(p); len(d.actions) > 0 {
		t.Fatalf("with a silent runtime: %v", d.actions)
	}
}
