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
	next.Devices, next.StoragePools = hello.Devices, hello.StoragePools
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
	if err := ValidateTaints("taints", h.Taints); err != nil {
		return err
	}
	return ValidateGear(h.Devices, h.StoragePools)
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
