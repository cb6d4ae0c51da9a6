package scheduler

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// worldReader reads a world as admission does.
type worldReader struct{ *world }

func (r worldReader) Get(key string) (*pb.KeyValue, bool) {
	kv := r.kvs[key]
	return kv, kv != nil
}

func (r worldReader) Scan(prefix string) iter.Seq[*pb.KeyValue] {
	return func(yield func(*pb.KeyValue) bool) {
		for _, kv := range r.scan(prefix) {
			if !yield(kv) {
				return
			}
		}
	}
}

func (w *world) trial() *Trial {
	t, err := NewTrial(worldReader{w}, w.revision, w.now, w.opt)
	if err != nil {
		w.t.Fatal(err)
	}
	return t
}

// difference is a transaction that leads from one keyspace to another.
func difference(from, to map[string]*pb.KeyValue) *pb.Txn {
	txn := &pb.Txn{}
	for _, key := range sortedKeys(to) {
		if from[key] != to[key] {
			txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: to[key].Key, Value: to[key].Value}}})
		}
	}
	for _, key := range sortedKeys(from) {
		if to[key] == nil {
			txn.Success = append(txn.Success, model.Delete(key))
		}
	}
	return txn
}

// whatIf carries out commands in a copy of the world ("submit web replicas=3, lose
// n1"), and tells what would follow from them in this one.
func (s *script) whatIf(args []string) {
	copied := *s.world
	copied.kvs = maps.Clone(s.kvs)
	other := &script{world: &copied, specs: map[string]*pb.WorkloadSpec{}}
	for id, spec := range s.specs {
		other.specs[id] = proto.CloneOf(spec)
	}
	trial := s.trial()
	add, like := 0, ""
	for _, command := range strings.Split(strings.Join(args, " "), ", ") {
		if _, err := fmt.Sscanf(command, "add %d %s", &add, &like); err != nil {
			other.command(strings.Fields(command))
		}
	}
	trial.Commit(difference(s.kvs, copied.kvs))
	if add > 0 {
		if err := trial.AddNodes(like, add); err != nil {
			s.t.Fatal(err)
		}
	}
	out, err := trial.Outcome()
	if err != nil {
		s.t.Fatal(err)
	}
	s.tellOutcome(strings.Join(args, " "), out)
}

func (s *script) tellOutcome(what string, out *Outcome) {
	fmt.Fprintf(&s.out, "what if %s: %d unchanged\n", what, out.Unchanged)
	for _, c := range out.Changes {
		fmt.Fprintf(&s.out, "  %s/%d %s", c.WorkloadId, c.Replica, c.Action)
		if c.FromNodeId != "" {
			fmt.Fprintf(&s.out, " from %s", c.FromNodeId)
		}
		if c.NodeId != "" {
			fmt.Fprintf(&s.out, " on %s", c.NodeId)
		}
		if c.Explanation != "" {
			fmt.Fprintf(&s.out, " (%s)", c.Explanation)
		}
		s.out.WriteString("\n")
	}
	for _, w := range out.Pending {
		fmt.Fprintf(&s.out, "  %s waits: %s\n", w.Workload, strings.Join(w.Lines, "; "))
	}
	if out.Cut {
		s.out.WriteString("  and so on\n")
	}
}

// A trial is read and written beside the keyspace that it is made of.
func TestTrialReads(t *testing.T) {
	w := newWorld(t)
	for _, key := range []string{"/a/1", "/a/3", "/a/5", "/b/1"} {
		w.put(key, &pb.Event{Message: "old"})
	}
	trial := w.trial()
	trial.Commit(&pb.Txn{Success: []*pb.RequestOp{
		model.Put("/a/0", &pb.Event{}, 0), model.Put("/a/3", &pb.Event{Message: "new"}, 0), model.Put("/a/4", &pb.Event{}, 0),
		model.Delete("/a/5"), model.Put("/a/6", &pb.Event{}, 0), model.DeletePrefix("/b/"), model.Put("/c", &pb.Event{}, 0),
	}})
	read := func(prefix string) string {
		var keys []string
		for kv := range trial.Scan(prefix) {
			e := &pb.Event{}
			if err := model.Parse(kv, e); err != nil {
				t.Fatal(err)
			}
			keys = append(keys, string(kv.Key)+e.Message)
		}
		return strings.Join(keys, " ")
	}
	for prefix, want := range map[string]string{
		"/a/": "/a/0 /a/1old /a/3new /a/4 /a/6", "/b/": "", "/c": "/c", "": "/a/0 /a/1old /a/3new /a/4 /a/6 /c",
	} {
		if got := read(prefix); got != want {
			t.Errorf("%q: %s, want %s", prefix, got, want)
		}
	}
	for range trial.Scan("/a/") {
		break // a reader may stop
	}
	if _, ok := trial.Get("/a/5"); ok {
		t.Error("a deleted key is there")
	}
	if len(w.kvs) != 4 {
		t.Errorf("the keyspace has %d keys, want 4", len(w.kvs))
	}
}

// What follows from a change in a trial is what follows from it in the keyspace,
// where agents are as quick.
func TestTrialForesees(t *testing.T) {
	for _, change := range []string{
		"submit new replicas=5 cpu=500m", "update web image=v2", "scale web 2", "scale web 9", "stop web", "delete web", "drain n1", "lose n2", "cordon n3", "restart web",
	} {
		t.Run(change, func(t *testing.T) {
			s := &script{world: newWorld(t), specs: map[string]*pb.WorkloadSpec{}}
			for _, line := range []string{"node n1", "node n2", "node n3 cpu=2", "submit web replicas=6 cpu=700m parallel=2", "submit all kind=global"} {
				s.command(strings.Fields(line))
			}
			s.rest()
			s.whatIf(strings.Fields(change))
			before := maps.Clone(s.kvs)
			foreseen := map[string]string{}
			trial := s.trial()
			s.command(strings.Fields(change))
			trial.Commit(difference(before, s.kvs))
			if _, err := trial.Outcome(); err != nil {
				t.Fatal(err)
			}
			for kv := range trial.Scan(model.AssignmentsPrefix) {
				foreseen[string(kv.Key)] = placeOf(t, kv)
			}
			s.rest()
			real := map[string]string{}
			for key, kv := range s.scan(model.AssignmentsPrefix) {
				real[key] = placeOf(t, kv)
			}
			if !maps.Equal(foreseen, real) {
				t.Errorf("foreseen %v\nreal %v", foreseen, real)
			}
		})
	}
}

func placeOf(t *testing.T, kv *pb.KeyValue) string {
	a := &pb.Assignment{}
	if err := model.Parse(kv, a); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(a.NodeId, " ", a.Revision, " ", a.DesiredState)
}

// rest lets scheduler and agents act until nothing happens any more.
func (s *script) rest() {
	for range 100 {
		before := s.revision
		s.settle(nil)
		s.agents()
		if s.revision == before {
			return
		}
	}
	s.t.Fatal("it does not come to rest")
}

// BenchmarkTrial is a dry run of a workload of ten replicas on a large cluster.
func BenchmarkTrial(b *testing.B) {
	w := newWorld(b)
	const nodes, workloads, replicas = 10_000, 1_000, 100
	for i := range nodes {
		w.node(fmt.Sprintf("n%05d", i), 32_000, 64<<30, 1<<40, map[string]string{"rack": fmt.Sprint(i % 25)}, pb.WorkloadType_CONTAINER)
	}
	for i := range workloads {
		w.submit(&pb.WorkloadSpec{
			Id: fmt.Sprintf("w%04d", i), Replicas: proto.Int32(replicas), Resources: &pb.Resources{Cpu: "100m", Memory: "64Mi"},
			Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "v1"}},
		}, "v1")
	}
	// A trial fills the cluster: it is quicker than a world, which checks everything.
	full := w.trial()
	if _, err := full.Outcome(); err != nil {
		b.Fatal(err)
	}
	base := &sortedReader{kvs: maps.Collect(func(yield func(string, *pb.KeyValue) bool) {
		for kv := range full.Scan("") {
			if !yield(string(kv.Key), kv) {
				return
			}
		}
	})}
	base.keys = sortedKeys(base.kvs)
	revision := full.picture.revision
	change := &pb.Txn{Success: []*pb.RequestOp{
		model.Put(model.WorkloadKey("new"), &pb.Workload{Uid: "new", Revision: "v1", Spec: &pb.WorkloadSpec{
			Id: "new", Replicas: proto.Int32(10), Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "v1"}},
		}}, 0),
	}}
	b.ReportAllocs()
	for b.Loop() {
		trial, err := NewTrial(base, revision, w.now.Add(time.Hour), w.opt)
		if err != nil {
			b.Fatal(err)
		}
		trial.Commit(change)
		out, err := trial.Outcome()
		if err != nil || len(out.Changes) != 10 {
			b.Fatal(out, err)
		}
	}
}

// sortedReader does not sort at each scan.
type sortedReader struct {
	kvs  map[string]*pb.KeyValue
	keys []string
}

func (r *sortedReader) Get(key string) (*pb.KeyValue, bool) {
	kv := r.kvs[key]
	return kv, kv != nil
}

func (r *sortedReader) Scan(prefix string) iter.Seq[*pb.KeyValue] {
	return func(yield func(*pb.KeyValue) bool) {
		at, _ := slices.BinarySearch(r.keys, prefix)
		for _, key := range r.keys[at:] {
			if !strings.HasPrefix(key, prefix) || !yield(r.kvs[key]) {
				return
			}
		}
	}
}

// Whatever state it is made of, a trial leaves that as it is, breaks nothing that must
// hold, tells the same twice, and its picture shows its keyspace.
func TestTrialProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &machine{world: newWorld(t), t: t}
		t.Repeat(map[string]func(*rapid.T){
			"":       func(t *rapid.T) { m.t, m.world.t = t, t },
			"node":   func(*rapid.T) { m.changeANode() },
			"spec":   func(*rapid.T) { m.changeAWorkload() },
			"config": func(*rapid.T) { m.configure() },
			"time":   func(*rapid.T) { m.now = m.now.Add(time.Duration(rapid.IntRange(1, 40).Draw(m.t, "s")) * time.Second) },
			"agent":  func(*rapid.T) { m.catchUp(m.aNode()) },
			"fail":   func(*rapid.T) { m.failSomething() },
			"rest":   func(*rapid.T) { m.settle(nil) },
		})
		m.see()
		picture, keys := dump(m.picture), maps.Clone(m.kvs)
		drain, lose := m.aNode(), m.aNode()
		ask := func() (*Trial, *Outcome) {
			trial := m.trial()
			// Where there is no such node, nothing is asked.
			_ = trial.DrainNode(drain)
			_ = trial.LoseNode(lose)
			out, err := trial.Outcome()
			if err != nil {
				t.Fatal(err)
			}
			return trial, out
		}
		trial, out := ask()
		if _, again := ask(); outcomeText(out) != outcomeText(again) {
			t.Fatalf("two answers to one question:\n%s\n%s", outcomeText(out), outcomeText(again))
		}
		if dump(m.picture) != picture || !maps.Equal(keys, m.kvs) {
			t.Fatal("the trial has changed what it was made of")
		}
		after := *m.world
		after.kvs = map[string]*pb.KeyValue{}
		for kv := range trial.Scan("") {
			after.kvs[string(kv.Key)] = kv
		}
		after.check()
		built, err := Build(trial.Scan(""), trial.picture.revision)
		if err != nil {
			t.Fatal(err)
		}
		if is, want := dump(trial.picture), dump(built); is != want {
			t.Fatalf("the trial's picture\n%s\nits keyspace\n%s", is, want)
		}
		checkOutcome(t, trial, out)
	})
}

func outcomeText(out *Outcome) string {
	s := &script{}
	s.tellOutcome("", out)
	return s.out.String()
}

// checkOutcome compares what is told with what is there.
func checkOutcome(t *rapid.T, trial *Trial, out *Outcome) {
	for _, c := range out.Changes {
		a := &pb.Assignment{}
		_, there, err := model.Load(trial, model.AssignmentKey(c.WorkloadId, c.Replica), a)
		if err != nil {
			t.Fatal(err)
		}
		switch c.Action {
		case pb.PlannedChange_PLACE, pb.PlannedChange_MOVE, pb.PlannedChange_REPLACE, pb.PlannedChange_STOP:
			if !there || a.NodeId != c.NodeId {
				t.Fatalf("told %v, and there is %v", c, a)
			}
		case pb.PlannedChange_REMOVE, pb.PlannedChange_PREEMPT:
			if there {
				t.Fatalf("told %v, and there is %v", c, a)
			}
		}
	}
}
