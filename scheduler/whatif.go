package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Outcome is what follows from what was committed to a trial.
type Outcome struct {
	// What becomes of replicas: what is done first comes first, what waits last.
	Changes []*pb.PlannedChange
	// Why workloads have to wait, by workload, as Explain says it.
	Pending []Waiting
	// Replicas of workloads that were asked about which are left as they are.
	Unchanged int
	// It was not followed to its end.
	Cut bool
}

// Waiting is a workload that has to wait, and why.
type Waiting struct {
	Workload string   `json:"workload"`
	Lines    []string `json:"lines"`
}

// Plan is the outcome as the answer to whom asked about one workload.
func (o *Outcome) Plan(workload string) *pb.WorkloadPlan {
	plan := &pb.WorkloadPlan{Placements: o.Changes, Unchanged: int32(o.Unchanged)}
	for _, w := range o.Pending {
		for _, line := range w.Lines {
			if w.Workload != workload {
				line = w.Workload + ": " + line
			}
			plan.Pending = append(plan.Pending, line)
		}
	}
	if o.Cut {
		plan.Pending = append(plan.Pending, "the update goes on in the same way; it was not followed to its end")
	}
	return plan
}

// DrainNode asks what if the node were drained.
func (t *Trial) DrainNode(id string) error {
	txn, _, err := model.DrainNode(t, &pb.DrainNodeRequest{Id: id}, t.meta())
	if err != nil {
		return err
	}
	t.Commit(txn)
	return nil
}

// LoseNode asks what if the node did not answer any more.
func (t *Trial) LoseNode(id string) error {
	node, lease := &pb.Node{}, &pb.NodeLease{}
	_, known, err := model.Load(t, model.NodeKey(id), node)
	if err != nil {
		return err
	}
	if !known {
		return noNode(id)
	}
	key := model.NodeLeaseKey(id)
	if _, leased, err := model.Load(t, key, lease); err != nil || !leased {
		return cmp.Or(err, error(&model.Refusal{Code: codes.FailedPrecondition, Message: fmt.Sprintf("node %q is lost already", id)}))
	}
	txn, err := model.LoseNode(t, lease.LeaseId, [][]byte{[]byte(key)}, t.now)
	if err != nil {
		return err
	}
	txn.Success = append(txn.Success, model.Delete(key)) // it goes with the lease
	t.Commit(txn)
	return nil
}

// AddNodes asks what if there were n more nodes like one that exists.
func (t *Trial) AddNodes(like string, n int) error {
	pattern := &pb.Node{}
	if _, known, err := model.Load(t, model.NodeKey(like), pattern); err != nil || !known {
		return cmp.Or(err, noNode(like))
	}
	pattern.State, pattern.Unschedulable, pattern.Draining, pattern.DrainDeadline, pattern.Reason = pb.NodeState_READY, false, false, nil, nil
	pattern.CreateTime, pattern.LastTransition = timestamppb.New(t.now), timestamppb.New(t.now)
	for number := 1; n > 0; number++ {
		id := fmt.Sprintf("new-%d", number)
		if _, taken := t.Get(model.NodeKey(id)); taken {
			continue
		}
		node := proto.CloneOf(pattern)
		node.Id, node.Incarnation = id, id
		t.Commit(&pb.Txn{Success: []*pb.RequestOp{
			model.Put(model.NodeKey(id), node, 0), model.Put(model.NodeLeaseKey(id), &pb.NodeLease{Incarnation: id}, 0),
		}})
		n--
	}
	return nil
}

func noNode(id string) error {
	return &model.Refusal{Code: codes.NotFound, Message: fmt.Sprintf("there is no node %q", id)}
}

// Apply asks what if a workload were applied, with the errors that ApplyWorkload
// has.
func (t *Trial) Apply(spec *pb.WorkloadSpec) (pb.ApplyWorkloadResponse_Outcome, error) {
	txn, outcome, w, err := model.ApplyWorkload(t, &pb.ApplyWorkloadRequest{Spec: spec}, t.meta())
	if err != nil {
		return outcome, err
	}
	t.Ask(w.Spec.Id)
	t.Commit(txn)
	return outcome, nil
}

// NodeLoad is what is reserved on a node.
type NodeLoad struct {
	ID                 string
	State              string
	Replicas           int
	Reserved, Capacity *pb.NodeCapacity
}

// Nodes are all nodes as they are in the trial now, by name.
func (t *Trial) Nodes() []NodeLoad {
	var all []NodeLoad
	for _, id := range sortedKeys(t.picture.nodes) {
		n := t.picture.nodes[id]
		if n.mod == 0 {
			continue
		}
		load := NodeLoad{ID: id, State: "ready", Replicas: n.reserving, Capacity: capacityOf(n.capacity)}
		if !n.open() {
			load.State = n.closedBecause()
		}
		var used amounts
		for d := range used {
			used[d] = n.capacity[d] - n.free[d]
		}
		load.Reserved = capacityOf(used)
		all = append(all, load)
	}
	return all
}

func capacityOf(a amounts) *pb.NodeCapacity {
	return &pb.NodeCapacity{CpuMillis: a[cpu], MemoryBytes: a[memory], DiskBytes: a[disk]}
}

func (t *Trial) meta() model.Meta { return model.Meta{Now: t.now, Actor: "nobody", NewID: "trial"} }

// Outcome lets everything happen that follows from what was committed.
func (t *Trial) Outcome() (*Outcome, error) {
	finished, err := t.run()
	if err != nil {
		return nil, err
	}
	out := &Outcome{Cut: !finished}
	var moves []planned
	t.moves.Scan(func(key string, m *movement) bool {
		id, number, _ := model.SplitReplicaKey(model.AssignmentsPrefix, key)
		if !t.concerned[id] {
			return true
		}
		if c := t.planOf(id, number, m); c != nil {
			moves = append(moves, planned{m.round, c})
		}
		return true
	})
	slices.SortStableFunc(moves, func(a, b planned) int { return a.round - b.round })
	out.Changes = inOrder(moves)
	for _, id := range sortedKeys(t.concerned) {
		t.conclude(id, out)
	}
	return out, nil
}

// planned is a change and the round in which it begins.
type planned struct {
	round  int
	change *pb.PlannedChange
}

// inOrder says of each change in which step it comes, where there is more than
// one.
func inOrder(moves []planned) []*pb.PlannedChange {
	steps := 0
	at := make([]int, len(moves))
	for i, m := range moves {
		if i == 0 || m.round != moves[i-1].round {
			steps++
		}
		at[i] = steps
	}
	out := make([]*pb.PlannedChange, len(moves))
	for i, m := range moves {
		out[i] = m.change
		if steps > 1 {
			m.change.Explanation = strings.TrimSuffix(fmt.Sprintf("step %d of %d: %s", at[i], steps, m.change.Explanation), ": ")
		}
	}
	return out
}

// planOf is what becomes of a replica that was touched; nil where nothing does.
func (t *Trial) planOf(id string, number int32, m *movement) *pb.PlannedChange {
	now := &pb.Assignment{}
	_, assigned, _ := model.Load(t, model.AssignmentKey(id, number), now) // it was written here, or read before
	c := &pb.PlannedChange{WorkloadId: id, Replica: number, NodeId: now.NodeId, FromNodeId: m.before.GetNodeId(), Explanation: now.Explanation}
	switch {
	case m.before == nil && !assigned:
		return nil
	case m.before == nil:
		c.Action = pb.PlannedChange_PLACE
	case !assigned && m.preempted != "":
		c.Action, c.Explanation = pb.PlannedChange_PREEMPT, "it makes room for "+m.preempted
	case !assigned:
		c.Action, c.Explanation = pb.PlannedChange_REMOVE, t.removedBecause(id, number, m.before.NodeId)
	case now.Generation == m.before.Generation:
		return nil
	case now.DesiredState == pb.DesiredState_DESIRED_STOPPED:
		c.Action, c.FromNodeId, c.Explanation = pb.PlannedChange_STOP, "", "it is to be stopped"
	case now.NodeId != m.before.NodeId:
		c.Action = pb.PlannedChange_MOVE
		if m.preempted != "" {
			c.Explanation = "it makes room for " + m.preempted + "; " + c.Explanation
		}
	default:
		c.Action, c.FromNodeId = pb.PlannedChange_REPLACE, ""
	}
	return c
}

func (t *Trial) removedBecause(id string, number int32, node string) string {
	w, n := t.picture.workloads[id], t.picture.nodes[node]
	switch {
	case w == nil || w.want == nil || w.want.desired == pb.DesiredState_DESIRED_DELETED:
		return "the workload is deleted"
	case n != nil && n.drains():
		return "node " + node + " is drained"
	case n == nil || n.mod == 0 || n.lost():
		return "node " + node + " is lost"
	case w.want.schedule != nil:
		return "it runs by its schedule"
	case w.want.kind != pb.WorkloadKind_GLOBAL && number >= w.want.replicas:
		return counted(int(w.want.replicas), "replica is wanted", "replicas are wanted")
	}
	return "it does not belong on node " + node + " any more"
}

// conclude adds which replicas of a workload have to wait, and how many are left
// alone.
func (t *Trial) conclude(id string, out *Outcome) {
	w := t.picture.workloads[id]
	if w == nil || w.want == nil {
		return
	}
	why := w.status.GetReason()
	global, runs := w.want.kind == pb.WorkloadKind_GLOBAL, w.want.desired == pb.DesiredState_DESIRED_RUNNING
	stuck := why.GetCode() == pb.ReasonCode_NO_PLACEMENT || why.GetCode() == pb.ReasonCode_PREEMPTED
	wait := func(number int32, from *node) {
		c := &pb.PlannedChange{WorkloadId: id, Replica: number, Action: pb.PlannedChange_WAIT, Explanation: why.GetMessage()}
		if from != nil {
			c.FromNodeId = from.id
		}
		switch {
		case global && from != nil && from.lost():
			c.Explanation = "until node " + from.id + " is back"
		case out.Cut && !stuck:
			c.Explanation = "its turn"
		}
		out.Changes = append(out.Changes, c)
	}
	for _, r := range w.replicas {
		a := &r.assignment
		switch m, touched := t.moves.Get(model.AssignmentKey(id, r.number)); {
		case a.mod == 0:
		case runs && (a.node.lost() || a.node.drains() || t.outdated(w, a) && (out.Cut || stuck)):
			wait(r.number, a.node)
		case !touched || m.before.GetGeneration() == a.generation:
			out.Unchanged++
		}
	}
	if runs && !global && w.want.schedule == nil {
		for number := range w.want.replicas {
			if m, touched := t.moves.Get(model.AssignmentKey(id, number)); touched && m.before != nil && m.preempted != "" {
				continue // that is said
			}
			if r := w.find(number); r == nil || r.assignment.mod == 0 && (r.retry == nil || !r.retry.exhausted) {
				wait(number, nil)
			}
		}
	}
	if runs && (stuck || w.rollout.GetState() == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION) {
		if e, ok := t.picture.Explain(id); ok {
			out.Pending = append(out.Pending, Waiting{id, e.Lines})
		}
	}
}

// outdated reports whether a replica is assigned as it was before a change.
func (t *Trial) outdated(w *workload, a *assignment) bool {
	return a.revision != w.want.revision || a.restart != w.want.restart || a.uid != w.want.uid
}
