package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// builder turns what is decided about one workload into steps.
type builder struct {
	d   *decider
	w   *workload
	run run

	step *Step
	// Nodes whose record the step compares carry this stamp.
	stamp   uint64
	notes   []note
	retries retryChange

	tally   tally
	rollout rollout
	// Assignments of others that the step compares.
	witnesses []*replica
	// What the step has freed by preemption and not used.
	leftovers []leftover
	// Replicas that serve and are to be replaced, as far as the update strategy
	// allows.
	candidates []candidate
	// The plan is as large as it may be; the rest comes with the next one.
	truncated bool
	// It is to be looked at again when the steps of this plan are known.
	again   bool
	waiting bool
	wake    int64
}

// note is what an event says of one or more replicas.
type note struct {
	kind pb.EventType
	// Another workload than the step's.
	of     string
	verb   string
	why    string
	number int32
	node   string
	count  int
	reason *pb.Reason
	// Of the workload as a whole, instead of all that.
	text string
}

// begin makes sure that there is a step to add to.
func (b *builder) begin() {
	if b.step != nil {
		return
	}
	b.d.p.stamp++
	b.stamp = b.d.p.stamp
	b.step = &Step{Workload: b.w.id, Txn: &pb.Txn{}}
	b.witnesses = b.witnesses[:0]
	if b.w.want != nil {
		// Room for a step that places: a compare of the assignment and one of the
		// node for each, and a put.
		n := min(int(b.w.want.replicas), b.d.opt.StepPlacements)
		b.step.effects = make([]effect, 0, n)
		b.step.Txn.Compare = make([]*pb.Compare, 0, 2*n+1)
		b.step.Txn.Success = make([]*pb.RequestOp, 0, n+2)
	}
	b.compare([]byte(model.WorkloadKey(b.w.id)), b.w.mod)
}

func (b *builder) compare(key []byte, mod int64) {
	b.step.Txn.Compare = append(b.step.Txn.Compare, b.d.ops.unchanged(key, mod))
}

func (b *builder) put(key []byte, msg proto.Message) {
	b.do(b.d.ops.put(key, msg))
}

func (b *builder) do(op *pb.RequestOp) {
	b.step.Txn.Success = append(b.step.Txn.Success, op)
}

// relyOn compares the record of a node whose state decided something.
func (b *builder) relyOn(n *node) {
	if n.stepStamp != b.stamp {
		n.stepStamp = b.stamp
		b.compare(n.key, n.mod)
	}
}

// effect is the entry of the step for a replica.
func (b *builder) effect(number int32) *effect { return b.effectOn("", number) }

// effectOn is the entry of the step for a replica of another workload.
func (b *builder) effectOn(workload string, number int32) *effect {
	if n := len(b.step.effects); n == 0 || b.step.effects[n-1].number != number || b.step.effects[n-1].workload != workload {
		b.step.effects = append(b.step.effects, effect{workload: workload, number: number})
	}
	return &b.step.effects[len(b.step.effects)-1]
}

// full reports whether the plan has no room for another placement, and
// remembers that there was one.
func (b *builder) full() bool {
	if b.d.placements >= b.d.opt.MaxPlacements {
		b.truncated = true
	}
	return b.truncated
}

// assign puts a replica somewhere. r is nil where nothing is stored of it.
func (b *builder) assign(number int32, r *replica, to spot, explanation string) {
	b.begin()
	want, n := b.w.want, to.node
	var old assignment
	generation := b.d.p.revision + 1
	if r != nil {
		b.d.unsettle(r)
		old = r.assignment
		generation = max(generation, old.generation+1, r.observed.generation+1)
	}
	needs, ports, equipped := want.shape.needs, usedPorts(to.ports), to.equipment
	if old.reserves && old.node == n {
		needs, equipped = needs.beyond(old.needs), equipped.beyond(old.equipment)
		own := usedPorts(old.ports)
		ports = slices.DeleteFunc(ports, func(u portUse) bool { return slices.Contains(own, u) })
	}
	needs, equipped = needs.beyond(to.credit.free), equipped.beyond(to.credit.equipment)
	ports = slices.DeleteFunc(ports, func(u portUse) bool { return slices.Contains(to.credit.ports, u) })
	b.makeRoom(number, &to)
	b.d.reserve(n, needs, ports)
	b.d.equip(n, equipped)
	b.d.appear(b.w, n, presence{all: 1})
	key := []byte(model.AssignmentKey(b.w.id, number))
	b.compare(key, old.mod)
	if old.node != n {
		b.relyOnOthers(n)
		b.run.placed(n)
		if old.mod != 0 {
			b.run.depart(old.node)
		}
		if want.exclusive {
			// That nothing else may be running was read from this record.
			var seen int64
			if r != nil {
				seen = r.observed.mod
			}
			b.compare([]byte(model.ReplicaKey(b.w.id, number)), seen)
		}
	}
	b.relyOn(n)
	b.putAssignment(key, number, generation, &assignment{
		node: n, revision: want.revision, uid: want.uid, restart: want.restart, needs: want.shape.needs, ports: to.ports,
		runtime: want.runtime, desired: pb.DesiredState_DESIRED_RUNNING, exclusive: want.exclusive, explanation: explanation, equipment: to.equipment,
	})
	b.effect(number).next = assumption{node: n, generation: generation, needs: needs, ports: ports, equipment: equipped, reserves: true}
	b.d.placements++
	if r == nil || old.mod == 0 || b.renewed(r) {
		b.tally.current++
	}
}

// putAssignment stores a as the replica's assignment of this generation.
func (b *builder) putAssignment(key []byte, number int32, generation int64, a *assignment) {
	// One message serves all: it is only encoded.
	rec := &b.d.assignment
	rec.WorkloadId, rec.Replica, rec.NodeId, rec.Generation = b.w.id, number, a.node.id, generation
	rec.Revision, rec.WorkloadUid, rec.Type, rec.RestartGeneration = a.revision, a.uid, a.runtime, a.restart
	rec.CpuMillis, rec.MemoryBytes, rec.DiskBytes = a.needs[cpu], a.needs[memory], a.needs[disk]
	rec.Ports, rec.DesiredState, rec.Exclusive, rec.Explanation = a.ports, a.desired, a.exclusive, a.explanation
	rec.Devices, rec.Storage = nil, nil
	if e := a.equipment; e != nil {
		rec.Devices, rec.Storage = e.devices, e.storage
	}
	rec.CreateTime, rec.Epoch = b.d.nowStamp, b.d.opt.Epoch
	b.put(key, rec)
}

// restate writes the assignment anew with another desired state.
func (b *builder) restate(r *replica, desired pb.DesiredState) {
	b.begin()
	b.d.unsettle(r)
	key := []byte(model.AssignmentKey(b.w.id, r.number))
	generation := max(b.d.p.revision+1, r.assignment.generation+1)
	b.compare(key, r.assignment.mod)
	next := r.assignment
	next.desired = desired
	b.putAssignment(key, r.number, generation, &next)
	b.effect(r.number).next = assumption{generation: generation}
}

// release takes the assignment away. Of exclusive work a record of what may
// still run stays until the agent says that it is gone, whether or not the
// agent has reported it before.
func (b *builder) release(r *replica) {
	b.begin()
	b.d.unsettle(r)
	a := &r.assignment
	if r.w == b.w {
		b.run.depart(a.node)
	}
	key := model.AssignmentKey(r.w.id, r.number)
	b.compare([]byte(key), a.mod)
	b.do(model.Delete(key))
	if b.exclusive(r) {
		record := []byte(model.ReplicaKey(r.w.id, r.number))
		b.compare(record, r.observed.mod)
		if r.observed.mod == 0 || r.observed.generation != a.generation || r.observed.node != a.node {
			b.put(record, &pb.Replica{
				WorkloadId: r.w.id, Replica: r.number, NodeId: a.node.id, Generation: a.generation, Revision: a.revision,
				State: pb.State_DELETING, LastTransition: b.d.nowStamp,
			})
		}
	}
	other := ""
	if r.w != b.w {
		other = r.w.id
	}
	e := b.effectOn(other, r.number)
	e.next.generation, e.next.gone = a.generation, true
}

// exclusive reports whether no second instance of r may be started before the
// first is known to be gone.
func (b *builder) exclusive(r *replica) bool {
	return r.assignment.exclusive || r.w.want != nil && r.w.want.exclusive
}

// dropObserved deletes the record of an instance that nobody will report on.
func (b *builder) dropObserved(r *replica) {
	b.begin()
	key := model.ReplicaKey(b.w.id, r.number)
	b.compare([]byte(key), r.observed.mod)
	b.relyOn(r.observed.node)
	b.do(model.Delete(key))
	b.effect(r.number)
}

// putRetry stores rec as what is known of failed attempts.
func (b *builder) putRetry(r *replica, rec *pb.Retry) {
	rec.WorkloadId, rec.Replica, rec.MaxAttempts, rec.Revision = b.w.id, r.number, maxAttempts, b.w.want.revision
	b.retries = retryChange{r, rec}
}

// dropRetry forgets failed attempts, if there are any.
func (b *builder) dropRetry(r *replica) {
	if r.retry != nil {
		b.retries = retryChange{r: r}
	}
}

// retryChange is what becomes of the retry record of the replica that is being
// decided about: a transaction writes a key once, so the last word counts.
type retryChange struct {
	r   *replica
	rec *pb.Retry
}

func (b *builder) changeRetry() {
	r, rec := b.retries.r, b.retries.rec
	if r == nil {
		return
	}
	b.retries = retryChange{}
	b.begin()
	key := model.RetryKey(b.w.id, r.number)
	var mod int64
	if r.retry != nil {
		mod = r.retry.mod
	}
	b.compare([]byte(key), mod)
	if rec != nil {
		b.put([]byte(key), rec)
	} else {
		b.do(model.Delete(key))
	}
	b.effect(r.number)
}

// done ends the step where it has grown as large as a step may be. It is called
// between replicas only: what concerns one replica is in one step.
func (b *builder) done() {
	b.changeRetry()
	if b.step != nil && len(b.step.effects) >= b.d.opt.StepPlacements {
		b.flush()
	}
}

// say adds to what the step's events tell. What is alike is told once.
func (b *builder) say(n note) {
	b.begin()
	for i := range b.notes {
		if m := &b.notes[i]; m.kind == n.kind && m.of == n.of && m.verb == n.verb && m.why == n.why && n.text == "" {
			m.count++
			return
		}
	}
	n.count = 1
	b.notes = append(b.notes, n)
}

// What happens to replicas, as events tell it.
const (
	verbPlaced   = "placed"
	verbReplaced = "replaced"
	verbMoved    = "moved"
	verbLeaving  = "about to move away"
	verbRemoved  = "removed"
	verbStopped  = "told to stop"
	verbFailed   = "failed"

	verbPreempted = "preempted"
)

func (n *note) message() string {
	if n.text != "" {
		return n.text
	}
	what := fmt.Sprintf("%d replicas %s", n.count, n.verb)
	if n.count == 1 {
		preposition := "on"
		switch n.verb {
		case verbMoved:
			preposition = "to"
		case verbRemoved, verbLeaving:
			preposition = "from"
		}
		what = fmt.Sprintf("replica %d %s %s %s", n.number, n.verb, preposition, n.node)
	}
	if n.why != "" {
		what += ": " + n.why
	}
	return what
}

// flush ends the step.
func (b *builder) flush() {
	if b.step == nil {
		return
	}
	if len(b.step.Txn.Success) == 0 && len(b.notes) == 0 {
		b.step = nil
		return
	}
	// No two steps on one revision begin with the same replica.
	first := int32(-1)
	if i := slices.IndexFunc(b.step.effects, func(e effect) bool { return e.workload == "" }); i >= 0 {
		first = b.step.effects[i].number
	}
	var summary strings.Builder
	for i := range b.notes {
		n := &b.notes[i]
		e := &pb.Event{Type: n.kind, WorkloadId: cmp.Or(n.of, b.w.id), Message: n.message(), Reason: n.reason}
		if n.count == 1 {
			e.NodeId = n.node
			if n.number >= 0 {
				e.Replica = proto.Int32(n.number)
			}
		}
		b.do(model.PutEvent(e, b.d.now, fmt.Sprintf("%s-%d-%d-%d", b.w.id, b.d.p.revision, first, i)))
		if i > 0 {
			summary.WriteString("; ")
		}
		summary.WriteString(e.Message)
	}
	b.step.Summary = summary.String()
	switch {
	case b.step.Summary != "":
	case b.step.rollout != nil:
		b.step.Summary = b.step.rollout.State.String()
	case b.step.status != nil:
		b.step.Summary = b.step.status.State.String()
	}
	b.d.plan.Steps = append(b.d.plan.Steps, *b.step)
	b.step = nil
	if n := len(b.d.departed); n > b.d.earlier {
		b.d.earlier, b.run.ready = n, false
	}
	b.notes, b.leftovers = b.notes[:0], nil
}

func (b *builder) at(t int64) {
	if b.wake == 0 || t < b.wake {
		b.wake = t
	}
}

// stampAt is nil for no time.
func stampAt(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func stampOf(nanos int64) *timestamppb.Timestamp {
	return &timestamppb.Timestamp{Seconds: nanos / 1e9, Nanos: int32(nanos % 1e9)}
}
