package gateway

import (
	"cmp"
	"iter"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// workload reads one workload with its status and its rollout.
func workload(v *fsm.View, id string) (*pb.Workload, bool, error) {
	w := &pb.Workload{}
	mod, ok, err := model.Load(v, model.WorkloadKey(id), w)
	if err != nil || !ok {
		return nil, false, err
	}
	w.ResourceVersion = mod
	rollout := &pb.Rollout{}
	switch _, ok, err := model.Load(v, model.RolloutKey(id), rollout); {
	case err != nil:
		return nil, false, err
	case ok:
		w.Rollout = rollout
	}
	return w, true, addStatus(v, w)
}

func addStatus(v *fsm.View, w *pb.Workload) error {
	w.Status = &pb.WorkloadStatus{}
	_, ok, err := model.Load(v, model.WorkloadStatusKey(w.Spec.GetId()), w.Status)
	if err == nil && !ok {
		// Nobody has looked at it yet.
		w.Status.State, w.Status.Desired = pb.State_PENDING, w.Spec.GetReplicas()
	}
	return err
}

// fullWorkload has its replicas too.
func fullWorkload(v *fsm.View, id string) (*pb.Workload, error) {
	w, ok, err := workload(v, id)
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, notThere("workload", id)
	}
	w.Replicas, err = replicas(v, id)
	return w, err
}

func notThere(what, id string) error {
	if !model.IsDNSLabel(id) {
		return badField("id", "%.100q is not allowed; allowed: a DNS label: 1 to 63 lower case letters, digits and inner hyphens", id)
	}
	return status.Errorf(codes.NotFound, "there is no %s %q", what, id)
}

// replicas are what is reported, and what is assigned and not yet reported.
func replicas(v *fsm.View, id string) ([]*pb.Replica, error) {
	byNumber := map[int32]*pb.Replica{}
	for kv := range v.Scan(model.ReplicasPrefix + id + "/") {
		r := &pb.Replica{}
		if err := model.Parse(kv, r); err != nil {
			return nil, err
		}
		byNumber[r.Replica] = r
	}
	for kv := range v.Scan(model.AssignmentsPrefix + id + "/") {
		a := &pb.Assignment{}
		if err := model.Parse(kv, a); err != nil {
			return nil, err
		}
		if r := byNumber[a.Replica]; r == nil || r.Generation < a.Generation {
			byNumber[a.Replica] = &pb.Replica{
				WorkloadId: id, Replica: a.Replica, NodeId: a.NodeId, Generation: a.Generation, Revision: a.Revision,
				State: pb.State_SCHEDULED, Ports: a.Ports, LastTransition: a.CreateTime,
			}
		}
	}
	all := make([]*pb.Replica, 0, len(byNumber))
	for _, r := range byNumber {
		all = append(all, r)
	}
	slices.SortFunc(all, func(x, y *pb.Replica) int { return cmp.Compare(x.Replica, y.Replica) })
	return all, nil
}

// rangeChunk is how many keys are read at a time where reading may stop early.
const rangeChunk = 512

// keysFrom gives the keys in [from, end) in order, in chunks.
func keysFrom(v *fsm.View, from string, end []byte) iter.Seq2[*pb.KeyValue, error] {
	return func(yield func(*pb.KeyValue, error) bool) {
		for {
			chunk, err := v.Range(&pb.RangeRequest{Key: []byte(from), RangeEnd: end, Limit: rangeChunk})
			if err != nil {
				yield(nil, err)
				return
			}
			for _, kv := range chunk.Kvs {
				if !yield(kv, nil) {
					return
				}
				from = string(kv.Key) + "\x00"
			}
			if !chunk.More {
				return
			}
		}
	}
}

// demand is what assignments reserve, by node, and how many there are. What has run
// to its end needs nothing any more.
type demand struct {
	reserved map[string]*pb.NodeCapacity
	count    map[string]int32
}

func demandOf(v *fsm.View) (demand, error) {
	d := demand{map[string]*pb.NodeCapacity{}, map[string]int32{}}
	for kv := range v.Scan(model.AssignmentsPrefix) {
		a := &pb.Assignment{}
		if err := model.Parse(kv, a); err != nil {
			return d, err
		}
		r := &pb.Replica{}
		if _, _, err := model.Load(v, model.ReplicaKey(a.WorkloadId, a.Replica), r); err != nil {
			return d, err
		}
		if r.State == pb.State_COMPLETED && r.Generation == a.Generation && r.NodeId == a.NodeId {
			continue
		}
		sum := d.reserved[a.NodeId]
		if sum == nil {
			sum = &pb.NodeCapacity{}
			d.reserved[a.NodeId] = sum
		}
		sum.CpuMillis += a.CpuMillis
		sum.MemoryBytes += a.MemoryBytes
		sum.DiskBytes += a.DiskBytes
		d.count[a.NodeId]++
	}
	return d, nil
}

func nodes(v *fsm.View) iter.Seq2[*pb.Node, error] {
	return func(yield func(*pb.Node, error) bool) {
		for kv := range v.Scan(model.NodesPrefix) {
			if _, sub, _ := model.SplitKey(model.NodesPrefix, string(kv.Key)); sub != "" {
				continue
			}
			n := &pb.Node{}
			err := model.Parse(kv, n)
			n.ResourceVersion = kv.ModRevision
			if !yield(n, err) {
				return
			}
		}
	}
}
