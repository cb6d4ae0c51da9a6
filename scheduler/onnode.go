package scheduler

import (
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// AssignedTo is what is assigned to a node, in no order.
func (p *Picture) AssignedTo(id string) []*pb.ReplicaKey {
	n := p.nodes[id]
	if n == nil {
		return nil
	}
	return keysOf(n.assigned, func(r *replica) int64 { return r.assignment.generation })
}

// RecordedOn is what is recorded in /replicas of a node, in no order.
func (p *Picture) RecordedOn(id string) []*pb.ReplicaKey {
	n := p.nodes[id]
	if n == nil {
		return nil
	}
	return keysOf(n.observed, func(r *replica) int64 { return r.observed.generation })
}

func keysOf(replicas []*replica, generation func(*replica) int64) []*pb.ReplicaKey {
	block := make([]pb.ReplicaKey, len(replicas))
	keys := make([]*pb.ReplicaKey, len(replicas))
	for i, r := range replicas {
		k := &block[i]
		k.WorkloadId, k.Replica, k.Generation = r.w.id, r.number, generation(r)
		keys[i] = k
	}
	return keys
}
