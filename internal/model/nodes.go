package model

import (
	"cmp"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Lease is a lease to be granted: the proposer chooses the id.
type Lease struct {
	ID         int64
	TTLSeconds int64
}

// RegisterNode is what a node's hello changes: the node's record, and a lease
// where it holds none. A nil transaction means that nothing changes: an agent
// that comes back within its lease writes nothing.
//
// While the lease lives, another incarnation under the same name is refused:
// it is a second machine, or the same one wiped, and then the lease of the old
// one must end first, for nobody knows what still runs.
func RegisterNode(v Reader, hello *pb.AgentHello, fresh Lease, now time.Time) (*pb.Txn, error) {
	if err := checkHello(hello); err != nil {
		return nil, err
	}
	key, leaseKey := NodeKey(hello.NodeId), NodeLeaseKey(hello.NodeId)
	node, lease := &pb.Node{}, &pb.NodeLease{}
	nodeMod, known, err := Load(v, key, node)
	if err != nil {
		return nil, err
	}
	leaseMod, leased, err := Load(v, leaseKey, lease)
	if err != nil {
		return nil, err
	}
	if leased && lease.Incarnation != hello.Incarnation {
		return nil, fmt.Errorf("node %q is in use by another incarnation: either a second machine has this name, or it was wiped and the old lease ends soon", hello.NodeId)
	}

	next := proto.CloneOf(node)
	next.Id = hello.NodeId
	next.Labels = hello.Labels
	next.Capacity = hello.Capacity
	next.Runtimes = hello.Runtimes
	next.Address = hello.Address
	next.Version = hello.Version
	next.Incarnation = hello.Incarnation
	next.Pool, next.Taints = cmp.Or(hello.Pool, DefaultPool), hello.Taints
	next.Os, next.Arch, next.Kernel = hello.Os, hello.Arch, hello.Kernel
	if !known {
		next.CreateTime = timestamppb.New(now)
	}
	next.State, next.Reason = readyState(next), nil
	if !leased {
		next.LeaseId = fresh.ID
	}
	if next.State != node.State {
		next.LastTransition = timestamppb.New(now)
	}
	if leased && proto.Equal(node, next) {
		return nil, nil
	}

	txn := &pb.Txn{
		Compare: []*pb.Compare{Unchanged(key, nodeMod), Unchanged(leaseKey, leaseMod)},
		Success: []*pb.RequestOp{Put(key, next, 0)},
	}
	if !leased {
		txn.Success = append(txn.Success,
			&pb.RequestOp{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: fresh.ID, TtlSeconds: fresh.TTLSeconds}}},
			Put(leaseKey, &pb.NodeLease{LeaseId: fresh.ID, TtlSeconds: fresh.TTLSeconds, Incarnation: hello.Incarnation}, fresh.ID),
		)
		event := &pb.Event{Type: pb.EventType_NODE_READY, NodeId: hello.NodeId, Message: "node is ready"}
		if !known {
			event.Type, event.Message = pb.EventType_NODE_JOINED, "node joined"
		}
		txn.Success = append(txn.Success, PutEvent(event, now, "node-"+hello.NodeId))
	}
	return txn, nil
}

func checkHello(h *pb.AgentHello) error {
	switch {
	case !IsDNSLabel(h.NodeId):
		return fmt.Errorf("node_id: %q is not a DNS label", h.NodeId)
	case h.Incarnation == "":
		return fmt.Errorf("incarnation: missing")
	case h.Capacity == nil || h.Capacity.CpuMillis <= 0 || h.Capacity.MemoryBytes <= 0 || h.Capacity.DiskBytes < 0:
		return fmt.Errorf("capacity: cpu and memory must be positive")
	}
	if err := ValidatePool("pool", h.Pool); err != nil {
		return err
	}
	return ValidateTaints("taints", h.Taints)
}

// readyState is the state of a node that answers.
func readyState(n *pb.Node) pb.NodeState {
	if n.Draining {
		return pb.NodeState_DRAINING
	}
	return pb.NodeState_READY
}

// LoseNode is what becomes of a node whose lease has run out: the lease, its
// key and the node's record change in one transaction. It is nil where the
// lease belongs to no node.
func LoseNode(v Reader, leaseID int64, leaseKeys [][]byte, now time.Time) (*pb.Txn, error) {
	for _, k := range leaseKeys {
		id, sub, ok := SplitKey(NodesPrefix, string(k))
		if !ok || sub != "lease" {
			continue
		}
		key, node := NodeKey(id), &pb.Node{}
		mod, known, err := Load(v, key, node)
		if err != nil {
			return nil, err
		}
		txn := &pb.Txn{
			Compare: []*pb.Compare{Unchanged(key, mod)},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_LeaseRevoke{LeaseRevoke: &pb.LeaseRevoke{Id: leaseID}}}},
		}
		if known {
			reason := &pb.Reason{Code: pb.ReasonCode_NODE_LOST, Message: "no heartbeat within the lease", LastTransition: timestamppb.New(now), Retryable: true}
			node.State, node.Reason, node.LastTransition, node.LeaseId = pb.NodeState_NOT_READY, reason, timestamppb.New(now), 0
			txn.Success = append(txn.Success, Put(key, node, 0),
				PutEvent(&pb.Event{Type: pb.EventType_NODE_LOST_EVENT, NodeId: id, Message: "node lost: " + reason.Message, Reason: reason}, now, "lost-"+id))
		}
		return txn, nil
	}
	return nil, nil
}

// ReportStatus is what an agent's report changes in /replicas. What the agent
// says of an assignment that is no longer its own, or of an older generation,
// is passed over; what it says is gone is removed only where the record is
// about that very instance. Nil means that nothing changes.
func ReportStatus(v Reader, node string, report *pb.StatusReport, now time.Time) (*pb.Txn, error) {
	txn := &pb.Txn{}
	gone := map[string]int64{} // the newest generation that was removed
	for _, r := range report.Removed {
		key := ReplicaKey(r.WorkloadId, r.Replica)
		gone[key] = max(gone[key], r.Generation)
	}
	listed := map[string]bool{}
	for _, r := range report.Replicas {
		key := ReplicaKey(r.WorkloadId, r.Replica)
		if r.Generation <= gone[key] {
			continue // its last words; that it is gone came after them
		}
		listed[key] = true
		if err := reportReplica(v, txn, key, node, r, now); err != nil {
			return nil, err
		}
	}
	for _, r := range report.Removed {
		key, stored := ReplicaKey(r.WorkloadId, r.Replica), &pb.Replica{}
		mod, ok, err := Load(v, key, stored)
		if err != nil {
			return nil, err
		}
		if !ok || listed[key] || stored.NodeId != node || stored.Generation > r.Generation || assignedTo(v, stored, node) {
			continue
		}
		listed[key] = true
		removeReplica(txn, key, mod)
	}
	if report.Full {
		if err := removeUnlisted(v, txn, node, report.DesiredRevision, listed); err != nil {
			return nil, err
		}
	}
	if len(txn.Success) == 0 {
		return nil, nil
	}
	return txn, nil
}

func reportReplica(v Reader, txn *pb.Txn, key, node string, r *pb.Replica, now time.Time) error {
	assignmentKey, assignment, stored := AssignmentKey(r.WorkloadId, r.Replica), &pb.Assignment{}, &pb.Replica{}
	assignmentMod, assigned, err := Load(v, assignmentKey, assignment)
	if err != nil {
		return err
	}
	mod, known, err := Load(v, key, stored)
	if err != nil {
		return err
	}
	switch {
	case assigned && (assignment.NodeId != node || assignment.Generation != r.Generation):
		return nil
	case !assigned && !(known && stored.NodeId == node && stored.Generation == r.Generation):
		return nil
	}
	next := proto.CloneOf(r)
	next.NodeId = node
	next.LastTransition = stored.LastTransition
	if !known || stored.State != next.State || stored.Generation != next.Generation {
		next.LastTransition = timestamppb.New(now)
	}
	if known && proto.Equal(stored, next) {
		return nil
	}
	txn.Compare = append(txn.Compare, Unchanged(key, mod), Unchanged(assignmentKey, assignmentMod))
	txn.Success = append(txn.Success, Put(key, next, 0))
	if next.State != stored.State && next.State == pb.State_RUNNING {
		txn.Success = append(txn.Success, PutEvent(&pb.Event{
			Type: pb.EventType_WORKLOAD_RUNNING, WorkloadId: r.WorkloadId, Replica: &r.Replica, NodeId: node,
			Message: runningAgain(stored, next),
		}, now, fmt.Sprintf("run-%s-%d", r.WorkloadId, r.Replica)))
	}
	return nil
}

// runningAgain is the message of the event that a replica runs; where its node
// has restarted it, what ended it is said, as nothing else will remember it.
func runningAgain(before, r *pb.Replica) string {
	message := fmt.Sprintf("replica %d is running on %s", r.Replica, r.NodeId)
	if r.Restarts == 0 || before.Generation != r.Generation || before.Restarts == r.Restarts && before.State != pb.State_RETRY_PENDING {
		return message
	}
	message += fmt.Sprintf(" again, restart %d", r.Restarts)
	if why := before.GetReason().GetMessage(); why != "" {
		message += ", after: " + why
	}
	return message
}

// removeUnlisted removes what is recorded of the node, is not assigned to it
// and was not in its full report: its removal was never heard of. A record that
// is newer than what the node acts on stays: work that the report does not know
// of yet may be about to start.
func removeUnlisted(v Reader, txn *pb.Txn, node string, upTo int64, listed map[string]bool) error {
	for kv := range v.Scan(ReplicasPrefix) {
		if kv.ModRevision > upTo {
			continue
		}
		stored := &pb.Replica{}
		if err := Parse(kv, stored); err != nil {
			return err
		}
		if stored.NodeId == node && !listed[string(kv.Key)] && !assignedTo(v, stored, node) {
			removeReplica(txn, string(kv.Key), kv.ModRevision)
		}
	}
	return nil
}

func removeReplica(txn *pb.Txn, key string, mod int64) {
	txn.Compare = append(txn.Compare, Unchanged(key, mod))
	txn.Success = append(txn.Success, Delete(key))
}

// assignedTo reports whether the instance that r describes is still wanted
// where it is.
func assignedTo(v Reader, r *pb.Replica, node string) bool {
	a := &pb.Assignment{}
	_, ok, err := Load(v, AssignmentKey(r.WorkloadId, r.Replica), a)
	return err == nil && ok && a.NodeId == node && a.Generation == r.Generation
}
