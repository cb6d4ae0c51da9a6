package scheduler

import (
	"bytes"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/btree"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// How often time passes in a trial without any replica being moved, and for how
	// long, beside the time that replicas need to be healthy and leases to end,
	// before it is taken to have come to rest: deadlines do not pass.
	trialPauses = 64
	trialQuiet  = 30 * time.Second
	// How many replicas it looks at in all: an update of thousands of replicas, one
	// at a time, is not followed to its end.
	trialLooks = 3_000_000
)

// Trial is a keyspace as it would become: whatever is committed to it is there and
// nowhere else, and what is decided then is carried out by agents that do at once
// what they are told. It is a picture of its own, so the one that decisions are made
// on knows nothing of it.
//
// Time passes in it only as far as something that it was asked about needs time:
// a replica has to run for a while before the next is replaced.
type Trial struct {
	base    model.Reader
	changed btree.Map[string, *pb.KeyValue] // nil: deleted
	picture *Picture
	now     time.Time
	opt     Options
	// Not told to the picture yet.
	events []*pb.KeyEvent

	// What was asked about, and what follows from it.
	recording bool
	concerned map[string]bool
	// Time has passed: what else moves does not follow from what was asked.
	later bool
	// When something last moved that does.
	movedAt time.Time
	moves   btree.Map[string, *movement]
	round   int
	looks   int
}

// movement is what becomes of one replica.
type movement struct {
	before    *pb.Assignment // nil: none
	round     int            // in which it is first touched
	preempted string         // the workload that it has to make room for
}

// NewTrial takes the newest versions of all keys at a revision, and lets what is
// under way come to its end.
func NewTrial(base model.Reader, revision int64, now time.Time, opt Options) (*Trial, error) {
	p, err := Build(base.Scan(""), revision)
	if err != nil {
		return nil, err
	}
	t := &Trial{base: base, picture: p, now: now, opt: opt, concerned: map[string]bool{}}
	for _, id := range sortedKeys(p.workloads) {
		for _, r := range slices.Clone(p.workloads[id].replicas) {
			t.obey(id, r.number)
		}
	}
	if err := t.settle(); err != nil {
		return nil, err
	}
	t.recording = true
	return t, nil
}

// Get implements model.Reader.
func (t *Trial) Get(key string) (*pb.KeyValue, bool) {
	if kv, ok := t.changed.Get(key); ok {
		return kv, kv != nil
	}
	return t.base.Get(key)
}

// Scan implements model.Reader.
func (t *Trial) Scan(prefix string) iter.Seq[*pb.KeyValue] {
	return func(yield func(*pb.KeyValue) bool) {
		changed := t.changed.Iter()
		more := changed.Seek(prefix)
		// before yields what was changed and comes before key; false: enough.
		before := func(key string) bool {
			for ; more && strings.HasPrefix(changed.Key(), prefix) && (key == "" || changed.Key() <= key); more = changed.Next() {
				if kv := changed.Value(); kv != nil && !yield(kv) {
					return false
				}
			}
			return true
		}
		for kv := range t.base.Scan(prefix) {
			key := string(kv.Key)
			_, covered := t.changed.Get(key)
			if !before(key) || !covered && !yield(kv) {
				return
			}
		}
		before("")
	}
}

// Ask has the outcome speak of a workload, whatever becomes of it.
func (t *Trial) Ask(workload string) { t.concerned[workload] = true }

// Commit makes a change in the trial that somebody asks for. Its compares are not
// looked at: nobody else is there.
func (t *Trial) Commit(txn *pb.Txn) {
	t.later = false
	t.picture.evenSince = 0 // Time hardly passes here.
	for _, op := range txn.GetSuccess() {
		key := string(op.GetRequestPut().GetKey())
		if id, _, ok := model.SplitKey(model.WorkloadsPrefix, key); ok {
			t.concerned[id] = true
		}
		if id, _, ok := model.SplitKey(model.NodesPrefix, key); ok {
			t.concern(id)
		}
	}
	t.apply(txn.GetSuccess())
}

// concern has the outcome speak of what is on the node, even of what stays there.
func (t *Trial) concern(node string) {
	if n := t.picture.nodes[node]; n != nil {
		for _, r := range n.assigned {
			t.concerned[r.w.id] = true
		}
	}
}

// apply carries out operations as one revision.
func (t *Trial) apply(ops []*pb.RequestOp) {
	revision := t.picture.revision + 1
	if n := len(t.events); n > 0 {
		revision = t.events[n-1].Kv.ModRevision + 1
	}
	for _, op := range ops {
		if put := op.GetRequestPut(); put != nil {
			kv := &pb.KeyValue{Key: put.Key, Value: put.Value, ModRevision: revision, CreateRevision: revision}
			if old, ok := t.Get(string(put.Key)); ok {
				kv.CreateRevision = old.CreateRevision
			}
			t.change(string(put.Key), kv, &pb.KeyEvent{Kv: kv})
		}
		if d := op.GetRequestDeleteRange(); d != nil {
			for _, key := range t.keys(d) {
				t.change(key, nil, &pb.KeyEvent{Type: pb.KeyEvent_DELETE, Kv: &pb.KeyValue{Key: []byte(key), ModRevision: revision}})
			}
		}
	}
}

func (t *Trial) change(key string, kv *pb.KeyValue, e *pb.KeyEvent) {
	t.note(key)
	t.changed.Set(key, kv)
	t.events = append(t.events, e)
}

// keys are those that a deletion is of.
func (t *Trial) keys(d *pb.DeleteRangeRequest) []string {
	if len(d.RangeEnd) == 0 {
		if _, ok := t.Get(string(d.Key)); ok {
			return []string{string(d.Key)}
		}
		return nil
	}
	var keys []string
	for kv := range t.Scan(string(d.Key)) {
		if bytes.Compare(kv.Key, d.RangeEnd) < 0 {
			keys = append(keys, string(kv.Key))
		}
	}
	return keys
}

// note remembers an assignment as it was before it is first changed.
func (t *Trial) note(key string) {
	if !t.recording || !strings.HasPrefix(key, model.AssignmentsPrefix) {
		return
	}
	if _, known := t.moves.Get(key); known {
		return
	}
	m := &movement{round: t.round}
	a := &pb.Assignment{}
	if _, ok, err := model.Load(t, key, a); ok && err == nil { // the picture has read it
		m.before = a
	}
	t.moves.Set(key, m)
}

// run decides until there is nothing more to do. It reports whether it came to
// that point.
func (t *Trial) run() (finished bool, err error) {
	t.movedAt = t.now
	for pauses := 0; pauses < trialPauses; pauses++ {
		moved := t.movedAt
		if err := t.settle(); err != nil {
			return false, err
		}
		if t.movedAt.After(moved) {
			pauses = 0
		}
		wake := t.picture.nextWake()
		switch {
		case t.looks > trialLooks:
			return false, nil
		case wake == 0 || t.rests(time.Unix(0, wake)):
			return true, nil
		}
		t.now, t.later = time.Unix(0, wake), true
	}
	return true, nil
}

// rests reports whether nothing that was asked about has to be looked at before a
// time.
func (t *Trial) rests(wake time.Time) bool {
	opt := t.opt.withDefaults()
	quiet := trialQuiet + opt.Lease + opt.Margin
	rests := true
	for _, id := range sortedKeys(t.concerned) {
		w := t.picture.workloads[id]
		if w == nil || w.want == nil {
			continue
		}
		quiet = max(quiet, trialQuiet+time.Duration(w.want.update.healthyAfter))
		switch w.status.GetState() {
		case pb.State_RUNNING, pb.State_STOPPED, pb.State_COMPLETED, pb.State_FAILED, pb.State_PENDING:
			rests = rests && !goesOn(w.rollout)
		default:
			rests = false
		}
	}
	return rests || wake.Sub(t.movedAt) > quiet
}

// settle decides and carries out until nothing more is to be done at this time.
// What is decided before the agents act is one round.
func (t *Trial) settle() error {
	var touched []string
	for more := false; ; {
		if err := t.see(); err != nil {
			return err
		}
		t.count()
		plan := Decide(t.picture, t.now, t.opt)
		if t.looks > trialLooks {
			return nil
		}
		if len(plan.Steps) > 0 && !more {
			t.round++
		}
		for i := range plan.Steps {
			touched = append(touched, t.carryOut(&plan.Steps[i])...)
		}
		if more = plan.More; more && len(plan.Steps) > 0 {
			continue
		}
		if len(plan.Steps) == 0 && len(touched) == 0 {
			return nil
		}
		if err := t.see(); err != nil {
			return err
		}
		for _, key := range touched {
			if id, number, ok := model.SplitReplicaKey(model.AssignmentsPrefix, key); ok {
				t.obey(id, number)
			}
		}
		touched, more = touched[:0], false
	}
}

// see tells the picture what has changed.
func (t *Trial) see() error {
	if len(t.events) == 0 {
		return nil
	}
	revision := t.events[len(t.events)-1].Kv.ModRevision
	err := t.picture.Apply(t.events, revision)
	t.events = t.events[:0]
	return err
}

// count adds what the next decision will look at.
func (t *Trial) count() {
	if !t.recording {
		return
	}
	for _, w := range t.picture.dirty.list {
		t.looks += 1 + len(w.replicas)
	}
}

// carryOut commits one step and answers with the assignments that it touches.
func (t *Trial) carryOut(s *Step) []string {
	var touched []string
	preempted := map[string]bool{} // workloads
	retried := false
	for _, op := range s.Txn.Success {
		key := string(op.GetRequestPut().GetKey())
		if d := op.GetRequestDeleteRange(); d != nil {
			key = string(d.Key)
		}
		switch {
		case strings.HasPrefix(key, model.AssignmentsPrefix):
			touched = append(touched, key)
		case strings.HasPrefix(key, model.EventsPrefix):
			e := &pb.Event{}
			if proto.Unmarshal(op.GetRequestPut().GetValue(), e) != nil {
				continue
			}
			retried = retried || e.Type == pb.EventType_RETRY_TRIGGERED
			if e.Type == pb.EventType_WORKLOAD_PREEMPTED {
				preempted[e.WorkloadId] = true
			}
		}
	}
	t.apply(s.Txn.Success)
	for _, key := range touched {
		id, _, _ := model.SplitReplicaKey(model.AssignmentsPrefix, key)
		if m, ok := t.moves.Get(key); ok && preempted[id] {
			m.preempted = s.Workload
			t.concerned[id] = true
		}
		if t.recording && !t.later && !retried {
			t.concerned[id] = true
		}
		if t.concerned[id] {
			t.movedAt = t.now
		}
	}
	return touched
}

// obey is what the agents do about a replica: the one that has it runs or stops it,
// the one that had it takes it away. Agents of nodes that do not answer do nothing.
func (t *Trial) obey(id string, number int32) {
	w := t.picture.workloads[id]
	if w == nil {
		return
	}
	r := w.find(number)
	if r == nil {
		return
	}
	a, key := &r.assignment, model.ReplicaKey(id, number)
	switch {
	case a.mod != 0 && a.node.answers() && r.reported() == pb.State_SCHEDULED:
		state := pb.State_RUNNING
		if a.desired == pb.DesiredState_DESIRED_STOPPED {
			state = pb.State_STOPPED
		}
		now := timestamppb.New(t.now)
		t.apply([]*pb.RequestOp{model.Put(key, &pb.Replica{
			WorkloadId: id, Replica: number, NodeId: a.node.id, Generation: a.generation, Revision: a.revision,
			State: state, StartTime: now, LastTransition: now,
		}, 0)})
	case a.mod == 0 && r.observed.mod != 0 && r.observed.node.answers():
		t.apply([]*pb.RequestOp{model.Delete(key)})
	}
}

// answers reports whether the node's agent can be heard.
func (n *node) answers() bool { return n.lease != 0 && !n.lost() }
