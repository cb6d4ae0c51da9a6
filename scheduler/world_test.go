package scheduler

import (
	"bytes"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// world is a keyspace with a picture of it, and the people, nodes and agents
// that change it. It carries out transactions as the fsm does, as far as the
// scheduler uses them, and checks after each what must always hold.
type world struct {
	t        reporter
	kvs      map[string]*pb.KeyValue
	revision int64
	now      time.Time
	picture  *Picture
	// Events that the picture has not been told of.
	unseen []*pb.KeyEvent
	// What really runs: by node, then replica key, then generation.
	running map[string]map[string]int64
	opt     Options
}

var epoch = time.Date(2026, 11, 2, 12, 0, 0, 0, time.UTC)

// reporter is what of *testing.T and *rapid.T is needed.
type reporter interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func newWorld(t reporter) *world {
	return &world{
		t: t, kvs: map[string]*pb.KeyValue{}, revision: 1, now: epoch, picture: NewPicture(),
		running: map[string]map[string]int64{},
	}
}

// apply carries out a transaction and reports whether its compares held.
func (w *world) apply(txn *pb.Txn) bool {
	for _, c := range txn.Compare {
		if !w.holds(c) {
			return false
		}
	}
	w.revision++
	written := map[string]bool{}
	for _, op := range txn.Success {
		switch r := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			key := string(r.RequestPut.Key)
			if written[key] {
				w.t.Fatalf("%s is written twice in one transaction", key)
			}
			written[key] = true
			kv := &pb.KeyValue{Key: r.RequestPut.Key, Value: r.RequestPut.Value, ModRevision: w.revision, CreateRevision: w.revision}
			if old := w.kvs[key]; old != nil {
				kv.CreateRevision = old.CreateRevision
			}
			w.kvs[key] = kv
			w.unseen = append(w.unseen, &pb.KeyEvent{Kv: kv})
		case *pb.RequestOp_RequestDeleteRange:
			for _, key := range sortedKeys(w.kvs) {
				if !inRange(key, r.RequestDeleteRange.Key, r.RequestDeleteRange.RangeEnd) {
					continue
				}
				if written[key] {
					w.t.Fatalf("%s is put and deleted in one transaction", key)
				}
				delete(w.kvs, key)
				w.unseen = append(w.unseen, &pb.KeyEvent{Type: pb.KeyEvent_DELETE, Kv: &pb.KeyValue{Key: []byte(key), ModRevision: w.revision}})
			}
		default:
			w.t.Fatalf("unexpected operation %v", op)
		}
	}
	return true
}

func inRange(key string, from, end []byte) bool {
	if len(end) == 0 {
		return key == string(from)
	}
	return key >= string(from) && bytes.Compare([]byte(key), end) < 0
}

func (w *world) holds(c *pb.Compare) bool {
	kvs := []*pb.KeyValue{}
	for _, key := range sortedKeys(w.kvs) {
		if inRange(key, c.Key, c.RangeEnd) {
			kvs = append(kvs, w.kvs[key])
		}
	}
	if len(kvs) == 0 {
		kvs = append(kvs, &pb.KeyValue{})
	}
	for _, kv := range kvs {
		have, want := kv.ModRevision, c.GetModRevision()
		if c.Target == pb.Compare_CREATE {
			have, want = kv.CreateRevision, c.GetCreateRevision()
		}
		if c.Result != pb.Compare_EQUAL || have != want {
			return false
		}
	}
	return true
}

func (w *world) put(key string, m proto.Message) {
	w.apply(&pb.Txn{Success: []*pb.RequestOp{model.Put(key, m, 0)}})
}

func (w *world) remove(key string) {
	w.apply(&pb.Txn{Success: []*pb.RequestOp{model.Delete(key)}})
}

func (w *world) load(key string, into proto.Message) bool {
	kv := w.kvs[key]
	if kv == nil {
		return false
	}
	if err := model.Parse(kv, into); err != nil {
		w.t.Fatal(err)
	}
	return true
}

func (w *world) scan(prefix string) iter.Seq2[string, *pb.KeyValue] {
	return func(yield func(string, *pb.KeyValue) bool) {
		for _, key := range sortedKeys(w.kvs) {
			if strings.HasPrefix(key, prefix) && !yield(key, w.kvs[key]) {
				return
			}
		}
	}
}

func (w *world) all() iter.Seq[*pb.KeyValue] {
	return func(yield func(*pb.KeyValue) bool) {
		for _, kv := range w.scan("/") {
			if !yield(kv) {
				return
			}
		}
	}
}

// see tells the picture what has happened.
func (w *world) see() {
	if err := w.picture.Apply(w.unseen, w.revision); err != nil {
		w.t.Fatal(err)
	}
	w.unseen = nil
}

func (w *world) rebuilt() *Picture {
	p, err := Build(w.all(), w.revision)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// settle decides and commits until there is nothing more to do now.
func (w *world) settle(each func(*Plan)) *Plan {
	for range 200 {
		w.see()
		plan := Decide(w.picture, w.now, w.opt)
		if len(plan.Steps) == 0 {
			return plan
		}
		for i := range plan.Steps {
			was := w.placesBefore(plan.Steps[i].Txn)
			if !w.apply(plan.Steps[i].Txn) {
				w.t.Fatalf("step refused though nothing came between: %v", plan.Steps[i].Txn)
			}
			w.check()
			w.checkPlaces(was)
			w.checkSkew(was)
			w.checkApart(was, func(*pb.WorkloadAffinity) bool { return true }, true)
		}
		if each != nil {
			each(plan)
		}
	}
	w.t.Fatal("deciding does not come to an end")
	return nil
}

// Nodes.

func (w *world) node(id string, cpuMillis, memoryBytes, diskBytes int64, labels map[string]string, runtimes ...pb.WorkloadType) {
	n := &pb.Node{
		Id: id, State: pb.NodeState_READY, Labels: labels, CreateTime: timestamppb.New(w.now), LastTransition: timestamppb.New(w.now),
		Capacity: &pb.NodeCapacity{CpuMillis: cpuMillis, MemoryBytes: memoryBytes, DiskBytes: diskBytes},
	}
	for _, t := range runtimes {
		n.Runtimes = append(n.Runtimes, &pb.RuntimeInfo{Type: t, Healthy: true})
	}
	w.put(model.NodeKey(id), n)
	w.put(model.NodeLeaseKey(id), &pb.NodeLease{LeaseId: 1})
}

func (w *world) changeNode(id string, change func(*pb.Node)) bool {
	n := &pb.Node{}
	if !w.load(model.NodeKey(id), n) {
		return false
	}
	change(n)
	w.put(model.NodeKey(id), n)
	return true
}

func (w *world) lose(id string) {
	w.changeNode(id, func(n *pb.Node) {
		n.State, n.LastTransition = pb.NodeState_NOT_READY, timestamppb.New(w.now)
	})
	w.remove(model.NodeLeaseKey(id))
}

func (w *world) comeBack(id string) {
	if w.changeNode(id, func(n *pb.Node) {
		n.State, n.LastTransition = pb.NodeState_READY, timestamppb.New(w.now)
		if n.Draining {
			n.State = pb.NodeState_DRAINING
		}
	}) {
		w.put(model.NodeLeaseKey(id), &pb.NodeLease{LeaseId: 1})
	}
}

// Workloads.

func (w *world) submit(spec *pb.WorkloadSpec, revision string) {
	rec := &pb.Workload{}
	if !w.load(model.WorkloadKey(spec.Id), rec) {
		rec.Uid = fmt.Sprintf("uid-%s-%d", spec.Id, w.revision)
	}
	ops := []*pb.RequestOp{}
	if rec.Revision != revision {
		rec.PromotedRevision = ""
		ops = append(ops, model.Put(model.RevisionKey(spec.Id, revision), &pb.Revision{Spec: spec, Revision: revision, CreateTime: timestamppb.New(w.now)}, 0))
	}
	rec.Spec, rec.Revision, rec.UpdateTime = spec, revision, timestamppb.New(w.now)
	w.apply(&pb.Txn{Success: append(ops, model.Put(model.WorkloadKey(spec.Id), rec, 0))})
}

func (w *world) changeWorkload(id string, change func(*pb.Workload)) bool {
	rec := &pb.Workload{}
	if !w.load(model.WorkloadKey(id), rec) {
		return false
	}
	change(rec)
	rec.UpdateTime = timestamppb.New(w.now)
	w.put(model.WorkloadKey(id), rec)
	return true
}

// Agents.

// report is what the agent that has the assignment says of it.
// retry does what admission does when a user asks for it.
func (w *world) retry(id string) {
	for key := range w.scan(model.RetriesPrefix + id + "/") {
		old := &pb.Retry{}
		w.load(key, old)
		w.put(key, &pb.Retry{
			WorkloadId: old.WorkloadId, Replica: old.Replica, Revision: old.Revision, Reason: old.Reason, NextRetryAt: timestamppb.New(w.now),
		})
	}
}

func (w *world) report(key string, state pb.State, reason *pb.Reason) bool {
	a := &pb.Assignment{}
	if !w.load(model.AssignmentsPrefix+key, a) {
		return false
	}
	r := &pb.Replica{
		WorkloadId: a.WorkloadId, Replica: a.Replica, NodeId: a.NodeId, Generation: a.Generation, Revision: a.Revision,
		State: state, Reason: reason, LastTransition: timestamppb.New(w.now),
	}
	old := &pb.Replica{}
	if w.load(model.ReplicasPrefix+key, old) && old.Generation == r.Generation && old.State == state {
		r.LastTransition = old.LastTransition
	}
	w.put(model.ReplicasPrefix+key, r)
	return true
}

// gone is an agent's word that nothing of the replica is left on its node.
func (w *world) gone(key string) {
	r, a := &pb.Replica{}, &pb.Assignment{}
	if !w.load(model.ReplicasPrefix+key, r) {
		return
	}
	if w.load(model.AssignmentsPrefix+key, a) && a.NodeId == r.NodeId {
		return
	}
	w.remove(model.ReplicasPrefix + key)
}

// catchUp lets the agent of a node that answers do all that it is told: it
// stops what is not assigned to it and starts what is.
func (w *world) catchUp(id string) {
	n := &pb.Node{}
	if !w.load(model.NodeKey(id), n) || n.State == pb.NodeState_NOT_READY || w.kvs[model.NodeLeaseKey(id)] == nil {
		return
	}
	for key, kv := range w.scan(model.ReplicasPrefix) {
		r := &pb.Replica{}
		if err := model.Parse(kv, r); err != nil {
			w.t.Fatal(err)
		}
		if r.NodeId == id {
			w.gone(strings.TrimPrefix(key, model.ReplicasPrefix))
		}
	}
	run := map[string]int64{}
	for key, kv := range w.scan(model.AssignmentsPrefix) {
		a := &pb.Assignment{}
		if err := model.Parse(kv, a); err != nil {
			w.t.Fatal(err)
		}
		if a.NodeId != id {
			continue
		}
		key = strings.TrimPrefix(key, model.AssignmentsPrefix)
		r := &pb.Replica{}
		known := w.load(model.ReplicasPrefix+key, r) && r.NodeId == id && r.Generation == a.Generation
		state := pb.State_RUNNING
		if a.DesiredState == pb.DesiredState_DESIRED_STOPPED {
			state = pb.State_STOPPED
		} else {
			run[key] = a.Generation
		}
		switch {
		case known && r.State == state:
		case known && (r.State == pb.State_COMPLETED || r.State == pb.State_FAILED):
			delete(run, key)
		default:
			w.report(key, state, nil)
		}
	}
	w.running[id] = run
}

func (w *world) agents() {
	for key := range w.scan(model.NodesPrefix) {
		if id, sub, ok := model.SplitKey(model.NodesPrefix, key); ok && sub == "" {
			w.catchUp(id)
		}
	}
}

// over reports whether the run that r tells of has ended for good.
func (w *world) over(r *pb.Replica) bool {
	rec := &pb.Workload{}
	job := w.load(model.WorkloadKey(r.WorkloadId), rec) && rec.Spec.Kind == pb.WorkloadKind_JOB
	code := r.GetReason().GetCode()
	return r.State == pb.State_COMPLETED ||
		job && r.State == pb.State_FAILED && (code == pb.ReasonCode_EXITED || code == pb.ReasonCode_OUT_OF_MEMORY)
}

// check holds what is true after every single transaction: no node is
// over-committed and no port is given twice.
func (w *world) check() {
	w.t.Helper()
	type load struct {
		used  amounts
		ports []portUse
		gear  map[string]int64
	}
	loads := map[string]*load{}
	for key, kv := range w.scan(model.AssignmentsPrefix) {
		a, r := &pb.Assignment{}, &pb.Replica{}
		if err := model.Parse(kv, a); err != nil {
			w.t.Fatal(err)
		}
		if w.load(model.ReplicasPrefix+strings.TrimPrefix(key, model.AssignmentsPrefix), r) &&
			r.Generation == a.Generation && r.NodeId == a.NodeId && w.over(r) {
			continue
		}
		l := loads[a.NodeId]
		if l == nil {
			l = &load{gear: map[string]int64{}}
			loads[a.NodeId] = l
		}
		for d, n := range (amounts{a.CpuMillis, a.MemoryBytes, a.DiskBytes}) {
			l.used[d] += n
		}
		for _, d := range a.Devices {
			for _, id := range d.Ids {
				l.gear[d.Name+":"+id]++
			}
		}
		for _, s := range a.Storage {
			l.gear[s.Pool] += s.Bytes
		}
		for _, u := range usedPorts(a.Ports) {
			if slices.ContainsFunc(l.ports, u.conflicts) {
				w.t.Fatalf("%s: port %v is given twice on %s", key, u, a.NodeId)
			}
			l.ports = append(l.ports, u)
		}
	}
	w.checkGear(func(node string) map[string]int64 {
		if l := loads[node]; l != nil {
			return l.gear
		}
		return nil
	})
	for _, id := range sortedKeys(loads) {
		n := &pb.Node{}
		if !w.load(model.NodeKey(id), n) {
			continue
		}
		for d, c := range (amounts{n.Capacity.CpuMillis, n.Capacity.MemoryBytes, n.Capacity.DiskBytes}) {
			if loads[id].used[d] > c {
				w.t.Fatalf("%s is over-committed: %s %d of %d", id, dimensionNames[d], loads[id].used[d], c)
			}
		}
	}
}
