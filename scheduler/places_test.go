package scheduler

import (
	"strings"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// placesBefore is where the replicas that a transaction assigns are assigned
// before it; "" for nowhere.
func (w *world) placesBefore(txn *pb.Txn) map[string]string {
	was := map[string]string{}
	for _, op := range txn.Success {
		if put := op.GetRequestPut(); put != nil && strings.HasPrefix(string(put.Key), model.AssignmentsPrefix) {
			a := &pb.Assignment{}
			w.load(string(put.Key), a)
			was[string(put.Key)] = a.NodeId
		}
	}
	return was
}

// moved calls each for what the transaction brought to another place.
func (w *world) moved(was map[string]string, each func(a *pb.Assignment, n *pb.Node, placement *pb.Placement)) {
	for _, key := range sortedKeys(was) {
		a, n, rec := &pb.Assignment{}, &pb.Node{}, &pb.Workload{}
		if !w.load(key, a) || a.NodeId == was[key] {
			continue
		}
		w.load(model.NodeKey(a.NodeId), n)
		w.load(model.WorkloadKey(a.WorkloadId), rec)
		each(a, n, rec.GetSpec().GetPlacement())
	}
}

func labelsOf(n *pb.Node) map[string]string {
	labels := map[string]string{}
	for k, v := range n.Labels {
		labels[k] = v
	}
	for k, v := range n.UserLabels {
		labels[k] = v
	}
	return labels
}

// replicasBy counts the replicas of a workload by what of says of their node.
func (w *world) replicasBy(id string, of func(*pb.Node) string) map[string]int32 {
	counts := map[string]int32{}
	for _, kv := range w.scan(model.AssignmentsPrefix + id + "/") {
		a, n := &pb.Assignment{}, &pb.Node{}
		if model.Parse(kv, a) == nil && w.load(model.NodeKey(a.NodeId), n) {
			counts[of(n)]++
		}
	}
	return counts
}

// checkPlaces holds that what came to another place may be there beside what
// else is there.
func (w *world) checkPlaces(was map[string]string) {
	w.moved(was, func(a *pb.Assignment, n *pb.Node, placement *pb.Placement) {
		on := w.replicasBy(a.WorkloadId, func(n *pb.Node) string { return n.Id })[n.Id]
		if most := placement.GetMaxPerNode(); most > 0 && on > most {
			w.t.Fatalf("%s has %d replicas on %s; allowed: %d", a.WorkloadId, on, n.Id, most)
		}
	})
}

// checkAdmitted holds that a node's pool and taints admit what was placed there.
func (w *world) checkAdmitted(n *pb.Node, placement *pb.Placement) {
	if pools := placement.GetPools(); len(pools) == 0 && n.Pool == "gpu" {
		w.t.Fatalf("placed on %s of pool %s without asking for it", n.Id, n.Pool)
	}
	for _, t := range n.UserTaints {
		tolerated := t.Effect == pb.TaintEffect_PREFER_NO_SCHEDULE
		for _, o := range placement.GetTolerations() {
			tolerated = tolerated || o.Key == t.Key || o.Key == "" && o.GetEffect() == t.Effect
		}
		if !tolerated {
			w.t.Fatalf("placed on %s in spite of %v", n.Id, t)
		}
	}
}

// checkSkew holds the same of the bounds on the skew; where steps that others
// were decided on are refused, it may be off by as many replicas.
func (w *world) checkSkew(was map[string]string) {
	w.moved(was, func(a *pb.Assignment, n *pb.Node, placement *pb.Placement) {
		for _, s := range placement.GetSpread() {
			if s.MaxSkew == 0 {
				continue
			}
			value := func(n *pb.Node) string { return labelsOf(n)[s.Label] }
			counts := w.replicasBy(a.WorkloadId, value)
			least := counts[value(n)]
			for key, kv := range w.scan(model.NodesPrefix) {
				other := &pb.Node{}
				if _, sub, _ := model.SplitKey(model.NodesPrefix, key); sub != "" || model.Parse(kv, other) != nil {
					continue
				}
				labels := labelsOf(other)
				wanted := placement.NodeLabels["zone"]
				if _, there := labels[s.Label]; there && w.kvs[model.NodeLeaseKey(other.Id)] != nil && other.State == pb.NodeState_READY &&
					!other.Unschedulable && other.Pool != "gpu" && len(other.UserTaints) == 0 && other.Runtimes[0].Healthy && (wanted == "" || labels["zone"] == wanted) {
					least = min(least, counts[labels[s.Label]])
				}
			}
			if counts[value(n)]-least > s.MaxSkew {
				w.t.Fatalf("%s on %s: skew of %s is %d; allowed: %d; %v", a.WorkloadId, n.Id, s.Label, counts[value(n)]-least, s.MaxSkew, counts)
			}
		}
	})
}
