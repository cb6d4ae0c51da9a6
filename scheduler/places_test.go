package scheduler

import (
	"fmt"
	"slices"
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
func (w *world) moved(was map[string]string, each func(a *pb.Assignment, n *pb.Node, spec *pb.WorkloadSpec)) {
	for _, key := range sortedKeys(was) {
		a, n, rec := &pb.Assignment{}, &pb.Node{}, &pb.Workload{}
		if !w.load(key, a) || a.NodeId == was[key] {
			continue
		}
		w.load(model.NodeKey(a.NodeId), n)
		w.load(model.WorkloadKey(a.WorkloadId), rec)
		each(a, n, rec.GetSpec())
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
	w.moved(was, func(a *pb.Assignment, n *pb.Node, spec *pb.WorkloadSpec) {
		placement := spec.GetPlacement()
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
	w.moved(was, func(a *pb.Assignment, n *pb.Node, spec *pb.WorkloadSpec) {
		placement, gear := spec.GetPlacement(), spec.GetResources()
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
				if len(gear.GetDevices()) > len(other.Devices) || len(gear.GetStorage()) > len(other.StoragePools) {
					continue
				}
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

func (c *census) dump(p *Picture, t *term) string {
	texts := []string{}
	for _, e := range c.nodes {
		texts = append(texts, fmt.Sprintf(" %s %v of %v", e.node.id, e.presence, c.near(p, t, e.node)))
	}
	slices.Sort(texts)
	return strings.Join(texts, ",")
}

// resident is a replica and where it is.
type resident struct {
	key  string
	spec *pb.WorkloadSpec
	node *pb.Node
	over bool
}

func (w *world) residents() []resident {
	var out []resident
	for key, kv := range w.scan(model.AssignmentsPrefix) {
		a, n, r, rec := &pb.Assignment{}, &pb.Node{}, &pb.Replica{}, &pb.Workload{}
		if model.Parse(kv, a) != nil || !w.load(model.NodeKey(a.NodeId), n) {
			continue
		}
		w.load(model.WorkloadKey(a.WorkloadId), rec)
		over := w.load(model.ReplicasPrefix+strings.TrimPrefix(key, model.AssignmentsPrefix), r) && r.Generation == a.Generation && r.State == pb.State_COMPLETED
		out = append(out, resident{key, rec.Spec, n, over})
	}
	return out
}

func spokenOf(a *pb.WorkloadAffinity, spec *pb.WorkloadSpec) bool {
	if a.Workload != "" {
		return a.Workload == spec.GetId()
	}
	for k, v := range a.Labels {
		if got, there := spec.GetLabels()[k]; !there || got != v {
			return false
		}
	}
	return true
}

func onePlace(topology string, a, b *pb.Node) bool {
	if topology == "" {
		return a.Id == b.Id
	}
	x, there := labelsOf(a)[topology]
	y, also := labelsOf(b)[topology]
	return there && also && x == y
}

// checkApart holds that what came to another place is near what it has to be
// near, and away from what it, or who is there, has to be away from.
func (w *world) checkApart(was map[string]string, which func(*pb.WorkloadAffinity) bool, both bool) {
	all := w.residents()
	w.moved(was, func(a *pb.Assignment, n *pb.Node, spec *pb.WorkloadSpec) {
		placement := spec.GetPlacement()
		self := &pb.Workload{}
		w.load(model.WorkloadKey(a.WorkloadId), self)
		key := model.AssignmentKey(a.WorkloadId, a.Replica)
		for _, wish := range placement.GetWorkloadAffinities() {
			if wish.Weight != 0 || !which(wish) {
				continue
			}
			near, anywhere := 0, 0
			for _, o := range all {
				if o.key == key || !spokenOf(wish, o.spec) || o.over && wish.Anti {
					continue
				}
				if !o.over && o.node.State == pb.NodeState_READY && !o.node.Draining {
					anywhere++
				}
				if onePlace(wish.Topology, n, o.node) {
					near++
				}
			}
			switch {
			case wish.Anti && near > 0:
				w.t.Fatalf("%s on %s is not away from %v", key, n.Id, wish)
			case !wish.Anti && near == 0 && !(spokenOf(wish, self.Spec) && (anywhere == 0 || !both)):
				w.t.Fatalf("%s on %s is not near %v", key, n.Id, wish)
			}
		}
		for _, o := range all {
			for _, wish := range o.spec.GetPlacement().GetWorkloadAffinities() {
				if both && o.key != key && !o.over && wish.Anti && wish.Weight == 0 && spokenOf(wish, self.Spec) && onePlace(wish.Topology, n, o.node) {
					w.t.Fatalf("%s on %s is where %s wants none of %v", key, n.Id, o.key, wish)
				}
			}
		}
	})
}

// checkGear holds that no device is given twice and no pool is over-committed.
func (w *world) checkGear(taken func(node string) map[string]int64) {
	for key, kv := range w.scan(model.NodesPrefix) {
		n := &pb.Node{}
		if id, sub, _ := model.SplitKey(model.NodesPrefix, key); sub != "" || model.Parse(kv, n) != nil || len(taken(id)) == 0 {
			continue
		}
		capacity := map[string]int64{}
		for _, p := range n.StoragePools {
			capacity[p.Name] = p.CapacityBytes
		}
		gear := taken(n.Id)
		for _, what := range sortedKeys(gear) {
			most := int64(1)
			if !strings.Contains(what, ":") {
				most = capacity[what]
			}
			if gear[what] > most {
				w.t.Fatalf("%s: %d of %s are given; there are %d", n.Id, gear[what], what, most)
			}
		}
	}
}
