package scheduler

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// machine drives a world with random events, and commits plans as a leader
// does: some steps are pipelined, some are refused.
type machine struct {
	*world
	t *rapid.T
	// Steps that are assumed and proposed but neither committed nor refused.
	proposed []Step
}

var (
	nodeNames     = []string{"n1", "n2", "n3", "n4", "n5"}
	workloadNames = []string{"a", "b", "c", "d"}
)

func TestProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &machine{world: newWorld(t), t: t}
		m.opt = Options{
			StepPlacements: rapid.SampledFrom([]int{1, 2, 256}).Draw(t, "step"),
			MaxPlacements:  rapid.SampledFrom([]int{1, 3, 1000}).Draw(t, "max"),
		}
		t.Repeat(map[string]func(*rapid.T){
			"":        func(t *rapid.T) { m.t = t; m.world.t = t; m.checkExclusive() },
			"node":    func(*rapid.T) { m.changeANode() },
			"spec":    func(*rapid.T) { m.changeAWorkload() },
			"config":  func(*rapid.T) { m.configure() },
			"agent":   func(*rapid.T) { m.catchUp(m.aNode()); m.checkExclusive() },
			"fail":    func(*rapid.T) { m.failSomething() },
			"time":    func(*rapid.T) { m.now = m.now.Add(time.Duration(rapid.IntRange(1, 40).Draw(m.t, "s")) * time.Second) },
			"decide":  func(*rapid.T) { m.decide() },
			"decide2": func(*rapid.T) { m.decide() },
			"decide3": func(*rapid.T) { m.decide() },
			"commit":  func(*rapid.T) { m.commit(rapid.IntRange(0, 5).Draw(m.t, "steps")) },
		})
		m.commit(len(m.proposed))
		m.calmDown()
		m.converge()
	})
}

func (m *machine) configure() {
	// What was proposed before is not bound by it.
	m.commit(len(m.proposed))
	m.put(model.SchedulerKey, &pb.SchedulerConfig{
		Rebalance: rapid.Bool().Draw(m.t, "rebalance"), RebalanceMoves: rapid.Int32Range(1, 5).Draw(m.t, "moves"),
		RebalanceIntervalSeconds: 60, RebalanceThreshold: rapid.Int32Range(1, 30).Draw(m.t, "threshold"),
		NoPreemption: rapid.IntRange(0, 3).Draw(m.t, "patient") == 0,
	})
}

func (m *machine) aNode() string { return rapid.SampledFrom(nodeNames).Draw(m.t, "node") }

func (m *machine) changeANode() {
	id := m.aNode()
	if m.kvs[model.NodeKey(id)] == nil {
		scale := int64(1)
		for _, kv := range m.scan(model.AssignmentsPrefix) {
			if a := (&pb.Assignment{}); model.Parse(kv, a) == nil && a.NodeId == id {
				// A node that comes back smaller than what it runs is over its
				// capacity by nobody's decision.
				scale = 100
			}
		}
		m.node(id, scale*rapid.Int64Range(1, 4).Draw(m.t, "cpu")*1000, scale*rapid.Int64Range(1, 4).Draw(m.t, "memory")<<30, 10<<30,
			map[string]string{"zone": rapid.SampledFrom([]string{"eu", "us"}).Draw(m.t, "zone")}, pb.WorkloadType_CONTAINER)
		m.changeNode(id, func(n *pb.Node) { equipNode(m.t, n, scale) })
		return
	}
	switch rapid.SampledFrom([]string{"lose", "lose", "return", "return", "drain", "uncordon", "cordon", "label", "forget", "grow", "unwell", "taint", "pool", "gear"}).Draw(m.t, "what") {
	case "lose":
		m.lose(id)
	case "return":
		m.comeBack(id)
	case "drain":
		m.changeNode(id, func(n *pb.Node) {
			n.Unschedulable, n.Draining = true, true
			if n.State == pb.NodeState_READY {
				n.State = pb.NodeState_DRAINING
			}
			if rapid.Bool().Draw(m.t, "deadline") {
				n.DrainDeadline = timestamppb.New(m.now.Add(10 * time.Second))
			}
		})
	case "uncordon":
		m.changeNode(id, func(n *pb.Node) {
			n.Unschedulable, n.Draining, n.DrainDeadline = false, false, nil
			if n.State == pb.NodeState_DRAINING {
				n.State = pb.NodeState_READY
			}
		})
	case "cordon":
		m.changeNode(id, func(n *pb.Node) { n.Unschedulable = true })
	case "label":
		m.changeNode(id, func(n *pb.Node) {
			n.UserLabels = map[string]string{"zone": rapid.SampledFrom([]string{"eu", "us"}).Draw(m.t, "zone")}
		})
	case "unwell":
		m.changeNode(id, func(n *pb.Node) { n.Runtimes[0].Healthy = !n.Runtimes[0].Healthy })
	case "taint":
		m.changeNode(id, func(n *pb.Node) {
			n.UserTaints = nil
			if rapid.Bool().Draw(m.t, "tainted") {
				n.UserTaints = []*pb.Taint{{Key: "bad", Effect: pb.TaintEffect(rapid.IntRange(0, 2).Draw(m.t, "effect"))}}
			}
		})
	case "pool":
		m.changeNode(id, func(n *pb.Node) { n.Pool = rapid.SampledFrom([]string{"", "default", "gpu"}).Draw(m.t, "pool") })
	case "grow":
		m.changeNode(id, func(n *pb.Node) { n.Capacity.CpuMillis += 500 })
	case "gear":
		m.changeNode(id, func(n *pb.Node) {
			if len(n.Devices) == 0 {
				equipNode(m.t, n, 1)
				return
			}
			n.Devices[0].Ids = append(n.Devices[0].Ids, fmt.Sprint("x", len(n.Devices[0].Ids)))
		})
	case "forget":
		n := &pb.Node{}
		if m.load(model.NodeKey(id), n) && n.State == pb.NodeState_NOT_READY {
			m.remove(model.NodeKey(id))
		}
	}
}

func (m *machine) changeAWorkload() {
	id := rapid.SampledFrom(workloadNames).Draw(m.t, "workload")
	rec := &pb.Workload{}
	if m.load(model.WorkloadKey(id), rec) && rec.Spec.DesiredState == pb.DesiredState_DESIRED_DELETED {
		return
	}
	if rec.Spec != nil {
		switch rapid.SampledFrom([]string{"", "", "stop", "start", "delete", "restart", "retry", "promote"}).Draw(m.t, "what") {
		case "promote":
			m.changeWorkload(id, func(w *pb.Workload) { w.PromotedRevision = w.Revision })
			return
		case "stop":
			m.changeWorkload(id, func(w *pb.Workload) { w.Spec.DesiredState = pb.DesiredState_DESIRED_STOPPED })
			return
		case "start":
			m.changeWorkload(id, func(w *pb.Workload) { w.Spec.DesiredState = pb.DesiredState_DESIRED_RUNNING })
			return
		case "delete":
			m.changeWorkload(id, func(w *pb.Workload) { w.Spec.DesiredState = pb.DesiredState_DESIRED_DELETED })
			return
		case "restart":
			m.changeWorkload(id, func(w *pb.Workload) { w.RestartGeneration++ })
			return
		case "retry":
			m.retry(id)
			return
		}
	}
	spec := &pb.WorkloadSpec{
		Id: id, Replicas: proto.Int32(rapid.Int32Range(0, 6).Draw(m.t, "replicas")),
		Resources: &pb.Resources{
			Cpu:    rapid.SampledFrom([]string{"", "300m", "700m", "1500m"}).Draw(m.t, "cpu"),
			Memory: rapid.SampledFrom([]string{"", "500Mi", "1Gi"}).Draw(m.t, "memory"),
		},
		Placement: &pb.Placement{Policy: pb.PlacementPolicy(rapid.IntRange(0, 1).Draw(m.t, "policy"))},
		Update:    m.strategy(),
		Priority:  proto.Int32(rapid.SampledFrom([]int32{0, 40, 50, 55, 60, 100}).Draw(m.t, "priority")),
		Preemption: &pb.Preemption{
			NeverPreempts: rapid.IntRange(0, 5).Draw(m.t, "patient") == 0, Protected: rapid.IntRange(0, 5).Draw(m.t, "protected") == 0,
		},
		// By name, so that it stays what it is: exclusive work that becomes
		// something else is no promise to keep.
		Exclusive: id == "a" || id == "d",
	}
	if id == "d" {
		spec.Kind = rapid.SampledFrom([]pb.WorkloadKind{pb.WorkloadKind_SERVICE, pb.WorkloadKind_JOB}).Draw(m.t, "kind")
	}
	if id == "c" {
		spec.Kind = rapid.SampledFrom([]pb.WorkloadKind{pb.WorkloadKind_SERVICE, pb.WorkloadKind_GLOBAL}).Draw(m.t, "kind")
	}
	if id == "d" && rec.Spec != nil {
		// Admission lets no kind change, and what of a job has failed has no room to
		// fall back on.
		spec.Kind = rec.Spec.Kind
	}
	if spec.Kind == pb.WorkloadKind_JOB {
		spec.Update = &pb.UpdateStrategy{MaxParallel: spec.Update.MaxParallel}
	}
	if rapid.Bool().Draw(m.t, "constrained") {
		spec.Placement.NodeLabels = map[string]string{"zone": "eu"}
	}
	switch rapid.IntRange(0, 3).Draw(m.t, "tolerates") {
	case 0:
		spec.Placement.Tolerations = []*pb.Toleration{{Key: "bad"}}
	case 1:
		spec.Placement.Tolerations = []*pb.Toleration{{Effect: pb.TaintEffect_NO_SCHEDULE.Enum()}, {Key: "other"}}
	}
	spec.Placement.Pools = rapid.SampledFrom([][]string{nil, nil, {"*"}, {"default", "gpu"}}).Draw(m.t, "pools")
	if spec.Kind != pb.WorkloadKind_GLOBAL {
		anyPreference(m.t, spec.Placement)
		anyWish(m.t, spec.Placement)
	}
	if rapid.Bool().Draw(m.t, "labelled") {
		spec.Labels = map[string]string{"app": rapid.SampledFrom([]string{"x", "y"}).Draw(m.t, "app")}
	}
	if rapid.IntRange(0, 2).Draw(m.t, "geared") == 0 {
		spec.Resources.Devices = []*pb.DeviceRequest{{Name: "gpu", Count: rapid.Int32Range(0, 2).Draw(m.t, "gpus")}}
		if rapid.Bool().Draw(m.t, "large") {
			spec.Resources.Devices[0].Constraints = []*pb.Constraint{{Label: "memory", Operator: pb.Constraint_GREATER, Values: []string{"10"}}}
		}
	}
	if rapid.IntRange(0, 2).Draw(m.t, "stored") == 0 {
		spec.Resources.Storage = []*pb.StorageRequest{{Driver: rapid.SampledFrom([]string{"", "nfs"}).Draw(m.t, "driver"), Size: "3Gi"}, {Pool: "data", Size: rapid.SampledFrom([]string{"1Gi", "4Gi"}).Draw(m.t, "size")}}
	}
	container := &pb.ContainerSpec{Image: rapid.SampledFrom([]string{"v1", "v2"}).Draw(m.t, "image")}
	switch rapid.IntRange(0, 3).Draw(m.t, "ports") {
	case 1:
		container.Ports = []*pb.Port{{HostPort: 80, ContainerPort: 80}}
	case 2:
		container.Ports = []*pb.Port{{ContainerPort: 80}, {HostPort: 81, ContainerPort: 81, HostIp: "127.0.0.1"}}
	}
	spec.Spec = &pb.WorkloadSpec_Container{Container: container}
	m.submit(spec, fmt.Sprint(container.Image, spec.Resources.Cpu, spec.Resources.Memory, len(container.Ports), spec.Resources.Devices, spec.Resources.Storage))
}

// equipForAll gives a node more than all could ask for.
func equipForAll(n *pb.Node) {
	d := &pb.Device{Name: "gpu", Ids: []string{"0", "1", "2", "a"}, Attributes: map[string]string{"memory": "40"}}
	for i := range 200 {
		d.Ids = append(d.Ids, fmt.Sprint("g", i))
	}
	n.Devices = []*pb.Device{d}
	n.StoragePools = []*pb.StoragePool{
		{Name: "data", Driver: "local", CapacityBytes: 1000 << 30}, {Name: "share", Driver: "nfs", CapacityBytes: 1000 << 30},
	}
}

// equipNode gives a node devices and storage, or none.
func equipNode(t *rapid.T, n *pb.Node, scale int64) {
	if rapid.Bool().Draw(t, "gpus") || scale > 1 {
		n.Devices = []*pb.Device{
			{Name: "gpu", Ids: []string{"0", "1", "2"}, Attributes: map[string]string{"memory": "40"}}, {Name: "gpu", Ids: []string{"a"}, Paths: []string{"/dev/a"}},
		}
	}
	if rapid.Bool().Draw(t, "pools") || scale > 1 {
		n.StoragePools = []*pb.StoragePool{
			{Name: "data", Driver: "local", CapacityBytes: scale * 6 << 30}, {Name: "share", Driver: "nfs", CapacityBytes: scale * 5 << 30},
		}
	}
}

// anyPreference has a placement look at where replicas are, now and then.
func anyPreference(t *rapid.T, placement *pb.Placement) {
	if rapid.IntRange(0, 3).Draw(t, "bounded") == 0 {
		placement.MaxPerNode = rapid.Int32Range(1, 2).Draw(t, "maxPerNode")
	}
	if rapid.IntRange(0, 3).Draw(t, "affine") == 0 {
		placement.Affinities = []*pb.Affinity{{Label: "zone", Values: []string{"us"}, Weight: proto.Int32(rapid.SampledFrom([]int32{-50, 10, 100}).Draw(t, "weight"))}}
	}
	switch rapid.IntRange(0, 5).Draw(t, "spread") {
	case 0:
		placement.Spread = []*pb.Spread{{Label: "zone"}}
	case 1:
		placement.Spread = []*pb.Spread{{Label: "zone", MaxSkew: rapid.Int32Range(1, 2).Draw(t, "skew")}}
	case 2:
		placement.Spread = []*pb.Spread{{Label: "zone", Targets: []*pb.SpreadTarget{{Value: "eu", Percent: 70}}}, {Label: "nothing", Weight: 1}}
	}
}

// strategy is one that admission lets pass, but for kinds that it is not for.
func (m *machine) strategy() *pb.UpdateStrategy {
	u := &pb.UpdateStrategy{
		MaxParallel:  rapid.Int32Range(0, 3).Draw(m.t, "parallel"),
		MaxSurge:     rapid.SampledFrom([]int32{0, 0, 1, 2}).Draw(m.t, "surge"),
		MinHealthy:   rapid.SampledFrom([]string{"", "50%", "75%"}).Draw(m.t, "least"),
		Canary:       rapid.SampledFrom([]int32{0, 0, 1, 2}).Draw(m.t, "canary"),
		AutoPromote:  rapid.Bool().Draw(m.t, "promote"),
		AutoRollback: rapid.Bool().Draw(m.t, "rollback"),
	}
	if u.MaxSurge > 0 && rapid.Bool().Draw(m.t, "all") {
		u.MinHealthy = "100%"
	}
	if rapid.Bool().Draw(m.t, "soon") {
		u.MinHealthySeconds = proto.Int32(0)
		u.HealthyDeadlineSeconds = proto.Int32(rapid.Int32Range(20, 60).Draw(m.t, "deadline"))
	}
	return u
}

func anyWish(t *rapid.T, placement *pb.Placement) {
	for range rapid.SampledFrom([]int{0, 0, 1, 2}).Draw(t, "wishes") {
		a := &pb.WorkloadAffinity{
			Anti: rapid.Bool().Draw(t, "anti"), Topology: rapid.SampledFrom([]string{"", "zone"}).Draw(t, "topology"),
			Weight: rapid.SampledFrom([]int32{0, 0, 50}).Draw(t, "weight"),
		}
		if rapid.Bool().Draw(t, "byLabel") {
			a.Labels = map[string]string{"app": rapid.SampledFrom([]string{"x", "y"}).Draw(t, "app")}
		} else {
			a.Workload = rapid.SampledFrom(workloadNames).Draw(t, "other")
		}
		placement.WorkloadAffinities = append(placement.WorkloadAffinities, a)
	}
}

func (m *machine) failSomething() {
	keys := []string{}
	for key, kv := range m.scan(model.AssignmentsPrefix) {
		a, n := &pb.Assignment{}, &pb.Node{}
		if err := model.Parse(kv, a); err != nil {
			m.t.Fatal(err)
		}
		if m.load(model.NodeKey(a.NodeId), n) && n.State != pb.NodeState_NOT_READY {
			keys = append(keys, strings.TrimPrefix(key, model.AssignmentsPrefix))
		}
	}
	if len(keys) == 0 {
		return
	}
	key := rapid.SampledFrom(keys).Draw(m.t, "replica")
	a := &pb.Assignment{}
	m.load(model.AssignmentsPrefix+key, a)
	r := &pb.Replica{}
	if m.load(model.ReplicasPrefix+key, r) && r.Generation == a.Generation && m.over(r) {
		return
	}
	state := pb.State_FAILED
	if key[0] == 'd' && rapid.Bool().Draw(m.t, "completed") {
		state = pb.State_COMPLETED
	}
	code := rapid.SampledFrom([]pb.ReasonCode{pb.ReasonCode_EXITED, pb.ReasonCode_INSUFFICIENT_RESOURCES}).Draw(m.t, "code")
	// An agent reports what is on its node: it has taken away what else was there.
	m.catchUp(a.NodeId)
	m.report(key, state, &pb.Reason{Code: code, Message: "no", Retryable: true})
	delete(m.running[a.NodeId], key)
}

// decide makes a plan, checks it, and lets it go its way.
func (m *machine) decide() {
	m.see()
	m.checkTable()
	plan := Decide(m.picture, m.now, m.opt)
	if again := Decide(m.picture, m.now, m.opt); planText(m.world, plan) != planText(m.world, again) {
		m.t.Fatalf("two decisions on one picture differ:\n%s\n%s", planText(m.world, plan), planText(m.world, again))
	}
	if len(m.proposed) == 0 {
		p := m.rebuilt()
		p.evenSince = m.picture.evenSince // it is how often it looks, not at what
		fresh := Decide(p, m.now, m.opt)
		if a, b := dump(m.picture), dump(p); a != b {
			m.t.Fatalf("the picture differs from one that is built anew:\n%s\n%s", a, b)
		}
		if a, b := planText(m.world, plan), planText(m.world, fresh); a != b && m.opt.MaxPlacements == 1000 {
			m.t.Fatalf("the plan differs from that of a picture that is built anew:\n%s\n%s", a, b)
		}
	}
	m.checkDisruptions(plan)
	for i := range plan.Steps {
		if rapid.IntRange(0, 9).Draw(m.t, "lost") == 0 {
			continue // Neither assumed nor proposed: it will be decided again.
		}
		m.picture.Assume(plan.Steps[i])
		m.proposed = append(m.proposed, plan.Steps[i])
	}
	if rapid.Bool().Draw(m.t, "wait") {
		m.commit(len(m.proposed))
	}
}

// commit carries out the first n proposed steps, or refuses some.
func (m *machine) commit(n int) {
	for range min(n, len(m.proposed)) {
		step := m.proposed[0]
		m.proposed = m.proposed[1:]
		before, stood, was := m.revision, m.placements(), m.placesBefore(step.Txn)
		if rapid.IntRange(0, 9).Draw(m.t, "refused") == 0 || !m.apply(step.Txn) {
			m.picture.Rollback(step)
			continue
		}
		m.checkVictims(step, stood)
		m.check()
		m.checkPlaces(was)
		m.checkApart(was, func(a *pb.WorkloadAffinity) bool { return a.Workload != "" && a.Topology == "" }, false)
		m.checkPlacements(step.Txn)
		m.checkExclusive()
		m.picture.Confirm(step, before+1)
	}
}

// checkPlacements holds that whatever is placed now goes to a node that takes
// new work and matches.
func (m *machine) checkPlacements(txn *pb.Txn) {
	for _, op := range txn.Success {
		put := op.GetRequestPut()
		if put == nil || !strings.HasPrefix(string(put.Key), model.AssignmentsPrefix) {
			continue
		}
		a, n, w := &pb.Assignment{}, &pb.Node{}, &pb.Workload{}
		m.load(string(put.Key), a)
		if a.DesiredState == pb.DesiredState_DESIRED_STOPPED {
			continue
		}
		if !m.load(model.NodeKey(a.NodeId), n) || !m.load(model.WorkloadKey(a.WorkloadId), w) {
			m.t.Fatalf("%s is assigned to %s: one of them is not there", put.Key, a.NodeId)
		}
		if w.Spec.Kind == pb.WorkloadKind_SERVICE && a.Replica >= w.Spec.GetReplicas()+max(w.Spec.Update.MaxSurge, w.Spec.Update.Canary) {
			m.t.Fatalf("%s is one too many", put.Key)
		}
		zone := n.UserLabels["zone"]
		if zone == "" {
			zone = n.Labels["zone"]
		}
		wanted := w.Spec.Placement.GetNodeLabels()["zone"]
		if n.State != pb.NodeState_READY || n.Unschedulable || n.Draining || !n.Runtimes[0].Healthy || wanted != "" && zone != wanted {
			m.t.Fatalf("%s is assigned to %s, which may not take it: %v", put.Key, a.NodeId, n)
		}
		m.checkAdmitted(n, w.Spec.Placement)
		if a.Generation > m.revision {
			m.t.Fatalf("%s: generation %d at revision %d", put.Key, a.Generation, m.revision)
		}
	}
}

// checkDisruptions holds what an update strategy promises: so many serve whatever
// is decided, and where an update has failed or waits for promotion nothing is
// touched that serves at another revision.
func (m *machine) checkDisruptions(plan *Plan) {
	touched := map[string]bool{}
	for i := range m.proposed {
		m.touches(&m.proposed[i], touched)
	}
	serving, ended := map[string]bool{}, map[string]bool{}
	for key, kv := range m.scan(model.AssignmentsPrefix) {
		a, r, n := &pb.Assignment{}, &pb.Replica{}, &pb.Node{}
		if err := model.Parse(kv, a); err != nil {
			m.t.Fatal(err)
		}
		key = strings.TrimPrefix(key, model.AssignmentsPrefix)
		serving[key] = !touched[key] && m.load(model.ReplicasPrefix+key, r) && r.Generation == a.Generation && r.NodeId == a.NodeId &&
			(r.State == pb.State_RUNNING || r.State == pb.State_COMPLETED) && m.load(model.NodeKey(a.NodeId), n) && n.State != pb.NodeState_NOT_READY
		ended[key] = r.State == pb.State_COMPLETED
	}
	now := map[string]bool{}
	for i := range plan.Steps {
		m.touches(&plan.Steps[i], now)
		// What has to make room is no matter of its own update strategy.
		for _, e := range plan.Steps[i].effects {
			if e.workload != "" {
				delete(serving, strings.TrimPrefix(model.ReplicaKey(e.workload, e.number), model.ReplicasPrefix))
			}
		}
	}
	for _, id := range workloadNames {
		w, ro := &pb.Workload{}, &pb.Rollout{}
		if !m.load(model.WorkloadKey(id), w) || w.Spec.DesiredState != pb.DesiredState_DESIRED_RUNNING || w.Spec.Kind != pb.WorkloadKind_SERVICE {
			continue
		}
		m.load(model.RolloutKey(id), ro)
		held := goesOn(ro) && ro.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION && w.PromotedRevision != w.Revision && w.Spec.Update.Canary > 0 || ro.State == pb.RolloutState_ROLLOUT_FAILED
		held = held && ro.Revision == w.Revision && ro.RestartGeneration == w.RestartGeneration &&
			!slices.ContainsFunc(m.proposed, func(s Step) bool { return s.Workload == id && s.rollout != nil })
		m.checkDisruption(w, held, serving, ended, now)
		if held && ro.Previous != w.Revision && m.kvs[model.RevisionKey(id, ro.Previous)] != nil {
			m.checkFormer(w, plan)
		}
	}
}

// checkFormer holds that while an update does not go on, what is not at its
// revision does not come to it: neither what is down nor what has to leave.
func (m *machine) checkFormer(w *pb.Workload, plan *Plan) {
	for i := range plan.Steps {
		for _, op := range plan.Steps[i].Txn.Success {
			key := string(op.GetRequestPut().GetKey())
			id, number, ok := model.SplitReplicaKey(model.AssignmentsPrefix, key)
			if !ok || id != w.Spec.Id || number >= w.Spec.GetReplicas() {
				continue
			}
			was, is := &pb.Assignment{}, &pb.Assignment{}
			m.load(key, was)
			if err := proto.Unmarshal(op.GetRequestPut().Value, is); err != nil {
				m.t.Fatal(err)
			}
			if was.Revision != w.Revision && is.Revision == w.Revision {
				m.t.Fatalf("%s is brought to %s from %q though the update does not go on", key, is.Revision, was.Revision)
			}
		}
	}
}

func (m *machine) checkDisruption(w *pb.Workload, held bool, serving, completed, touched map[string]bool) {
	wanted, beyond := w.Spec.GetReplicas(), max(w.Spec.Update.MaxSurge, w.Spec.Update.Canary)
	left, ended, forced := 0, 0, false
	for _, key := range sortedKeys(serving) {
		id, number, _ := model.SplitReplicaKey("", key)
		if id != w.Spec.Id || !serving[key] || number >= wanted+beyond {
			continue
		}
		a, n := &pb.Assignment{}, &pb.Node{}
		m.load(model.AssignmentsPrefix+key, a)
		m.load(model.NodeKey(a.NodeId), n)
		if n.Draining && n.DrainDeadline != nil && !m.now.Before(n.DrainDeadline.AsTime()) {
			forced = true
		}
		if completed[key] && (a.Revision != w.Revision || a.RestartGeneration != w.RestartGeneration) {
			continue
		}
		if !touched[key] {
			left++
			continue
		}
		if completed[key] && number >= wanted {
			continue // It has served its time.
		}
		ended++
		has := n.UserLabels["zone"]
		if has == "" {
			has = n.Labels["zone"]
		}
		leaves := n.Draining || w.Spec.Placement.GetNodeLabels()["zone"] == "eu" && has != "eu" || !n.Runtimes[0].Healthy
		if held && a.Revision != w.Revision && number < wanted && !leaves {
			m.t.Fatalf("%s served at %s and is touched though the update does not go on", key, a.Revision)
		}
	}
	if least := int(model.MinHealthy(w.Spec.Update.MinHealthy, w.Spec.Update.MaxSurge, wanted)); ended > 0 && left < least && !forced {
		m.t.Fatalf("%d of %s are taken out of service, %d are left, %d have to serve", ended, w.Spec.Id, left, least)
	}
}

// touches notes the replicas whose assignments a step changes.
func (m *machine) touches(s *Step, into map[string]bool) {
	for _, op := range s.Txn.Success {
		key := string(op.GetRequestPut().GetKey())
		if d := op.GetRequestDeleteRange(); d != nil {
			key = string(d.Key)
		}
		if key, ok := strings.CutPrefix(key, model.AssignmentsPrefix); ok {
			into[key] = true
		}
	}
}

// checkExclusive holds that no replica of exclusive work runs twice. The agent
// of a lost node stops its exclusive work at the last moment that is allowed.
func (m *machine) checkExclusive() {
	where := map[string]string{}
	for _, id := range sortedKeys(m.running) {
		n := &pb.Node{}
		lost := m.load(model.NodeKey(id), n) && n.State == pb.NodeState_NOT_READY
		over := lost && !m.now.Before(n.LastTransition.AsTime().Add(15*time.Second)) || m.kvs[model.NodeKey(id)] == nil
		for _, key := range sortedKeys(m.running[id]) {
			if key[0] != 'a' && key[0] != 'd' {
				continue
			}
			if over {
				delete(m.running[id], key)
				continue
			}
			if other := where[key]; other != "" {
				m.t.Fatalf("%s runs on %s and on %s", key, other, id)
			}
			where[key] = id
		}
	}
}

// calmDown demands that in whatever state it is, a cluster in which nothing happens
// but what agents do at once comes to rest: nothing is decided any more, and nothing
// is to be looked at again.
func (m *machine) calmDown() {
	const patience = 400
	for range patience {
		plan := m.settle(nil)
		m.checkExclusive()
		before := m.revision
		m.agents()
		m.checkExclusive()
		switch {
		case m.revision != before:
		case plan.Wake.IsZero():
			// Nobody waits for nothing but to be looked at.
			p := m.rebuilt()
			p.evenSince = m.picture.evenSince
			if more := planText(m.world, Decide(p, m.now, m.opt)); more != "" {
				m.t.Fatalf("a picture that is built anew finds something to do:\n%s\n%s", more, dump(p))
			}
			return
		default:
			m.now = plan.Wake
		}
	}
	m.t.Fatalf("no calm:\n%s", dump(m.picture))
}

// converge heals everything and demands that the cluster comes to rest with
// all of its work done.
func (m *machine) converge() {
	for _, id := range nodeNames {
		if m.kvs[model.NodeKey(id)] == nil {
			m.node(id, 4000, 4<<30, 10<<30, map[string]string{"zone": "eu"}, pb.WorkloadType_CONTAINER)
		}
		m.changeNode(id, func(n *pb.Node) {
			n.Unschedulable, n.Draining, n.DrainDeadline = false, false, nil
			n.Capacity = &pb.NodeCapacity{CpuMillis: 100_000, MemoryBytes: 100 << 30, DiskBytes: 100 << 30}
			n.Runtimes[0].Healthy = true
			equipForAll(n)
			n.UserLabels, n.UserTaints, n.Pool = map[string]string{"zone": "eu"}, nil, ""
		})
		m.comeBack(id)
	}
	for _, id := range workloadNames {
		m.retry(id)
		m.changeWorkload(id, func(w *pb.Workload) { w.Spec.Placement.MaxPerNode, w.Spec.Placement.WorkloadAffinities = 0, nil })
	}
	for range 400 {
		plan := m.settle(nil)
		m.checkExclusive()
		before := m.revision
		m.agents()
		m.checkExclusive()
		if m.revision != before {
			continue
		}
		if plan.Wake.IsZero() {
			if m.goOn() {
				continue
			}
			m.checkRest()
			return
		}
		m.now = plan.Wake
	}
	m.t.Fatalf("no rest:\n%s", dump(m.picture))
}

// goOn does what users do about updates that wait for them or have failed, and
// reports whether there were any.
func (m *machine) goOn() bool {
	any := false
	for _, id := range workloadNames {
		w, r := &pb.Workload{}, &pb.Rollout{}
		if !m.load(model.WorkloadKey(id), w) || !m.load(model.RolloutKey(id), r) || w.Spec.DesiredState != pb.DesiredState_DESIRED_RUNNING ||
			w.Spec.Kind == pb.WorkloadKind_JOB {
			continue
		}
		switch {
		case r.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION:
			m.changeWorkload(id, func(w *pb.Workload) { w.PromotedRevision = w.Revision })
		case r.State == pb.RolloutState_ROLLOUT_FAILED && len(w.Spec.GetContainer().Ports) == 0:
			m.changeWorkload(id, func(w *pb.Workload) { w.RestartGeneration++ })
		default:
			continue
		}
		any = true
	}
	return any
}

// checkRest holds what a cluster at rest, with room for everything, looks like.
func (m *machine) checkRest() {
	for _, id := range workloadNames {
		w, st := &pb.Workload{}, &pb.WorkloadStatus{}
		if !m.load(model.WorkloadKey(id), w) {
			continue
		}
		m.load(model.WorkloadStatusKey(id), st)
		rollout := &pb.Rollout{}
		m.load(model.RolloutKey(id), rollout)
		want := []pb.State{pb.State_RUNNING, pb.State_COMPLETED}
		if w.Spec.DesiredState == pb.DesiredState_DESIRED_STOPPED {
			want = []pb.State{pb.State_STOPPED}
		}
		// A port on every node, or none left to take it: as many as there are nodes.
		short := len(w.Spec.GetContainer().Ports) > 0
		if !slices.Contains(want, st.State) && !(short && st.State == pb.State_PENDING) &&
			!(short && st.State == pb.State_UPDATING && st.Reason.GetCode() == pb.ReasonCode_NO_PLACEMENT) &&
			!(short && st.State == pb.State_FAILED && rollout.State == pb.RolloutState_ROLLOUT_FAILED) {
			m.t.Fatalf("%s is %v at rest; %v", id, st, w)
		}
		if !short && w.Spec.DesiredState == pb.DesiredState_DESIRED_RUNNING && w.Spec.Kind == pb.WorkloadKind_SERVICE {
			m.checkRolledOut(w)
		}
		if !short && st.State == pb.State_RUNNING && st.Running != st.Desired && id != "d" {
			m.t.Fatalf("%s: %v", id, st)
		}
	}
	// What is unrelated moves nothing.
	before := map[string]int64{}
	for key, kv := range m.scan(model.AssignmentsPrefix) {
		before[key] = kv.ModRevision
	}
	m.submit(&pb.WorkloadSpec{Id: "unrelated", Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{}}}, "v1")
	m.settle(nil)
	for _, key := range sortedKeys(before) {
		if kv := m.kvs[key]; kv == nil || kv.ModRevision != before[key] {
			m.t.Fatalf("%s was touched on account of another workload", key)
		}
	}
}

// checkRolledOut holds that an update is over at rest, and has left nothing.
func (m *machine) checkRolledOut(w *pb.Workload) {
	r := &pb.Rollout{}
	m.load(model.RolloutKey(w.Spec.Id), r)
	if goesOn(r) || r.State == pb.RolloutState_ROLLOUT_FAILED || r.Revision != w.Revision {
		m.t.Fatalf("the rollout is %v at rest; %v", r, w)
	}
	for key, kv := range m.scan(model.AssignmentsPrefix + w.Spec.Id + "/") {
		a := &pb.Assignment{}
		if err := model.Parse(kv, a); err != nil {
			m.t.Fatal(err)
		}
		if a.Replica >= w.Spec.GetReplicas() || a.Revision != w.Revision {
			m.t.Fatalf("%s is left at rest: %v; %v", key, a, w)
		}
	}
}

// planText is a plan as it is compared: all of its transactions, without those
// that bring nothing but the message of a pending placement up to date.
func planText(w *world, p *Plan) string {
	var out strings.Builder
	for i := range p.Steps {
		s := &p.Steps[i]
		if s.status != nil && len(s.Txn.Success) == 1 {
			old := &pb.WorkloadStatus{}
			known := w.load(model.WorkloadStatusKey(s.Workload), old)
			if old.Reason != nil && s.status.Reason != nil {
				old.Reason.LastTransition = s.status.Reason.LastTransition
			}
			if known && onlyMessage(old, s.status) {
				continue
			}
		}
		fmt.Fprintf(&out, "%s %s\n", s.Workload, s.Summary)
		for _, c := range s.Txn.Compare {
			fmt.Fprintf(&out, "  if %s %d\n", c.Key, c.GetModRevision())
		}
		for _, op := range s.Txn.Success {
			if put := op.GetRequestPut(); put != nil {
				fmt.Fprintf(&out, "  put %s %x\n", put.Key, put.Value)
			} else {
				fmt.Fprintf(&out, "  delete %s\n", op.GetRequestDeleteRange().Key)
			}
		}
	}
	return out.String()
}

// dump is all that a picture knows, without what it remembers for speed.
func dump(p *Picture) string {
	var out strings.Builder
	p.index.rebuild(p.nodes)
	for _, id := range sortedKeys(p.nodes) {
		n := p.nodes[id]
		if n.gear != nil {
			fmt.Fprintf(&out, "gear %v %v %v %v\n", n.gear.devices, n.gear.pools, n.gear.taken, n.gear.used)
		}
		fmt.Fprintf(&out, "node %s mod %d lease %d %v %v %v %d %d free %v of %v reserving %d ports %v assigned %d observed %d indexed %v",
			n.id, n.mod, n.lease, n.state, n.unschedulable, n.draining, n.drainDeadline, n.transition, n.free, n.capacity,
			n.reserving, n.ports, len(n.assigned), len(n.observed), n.indexed && n.open())
		if n.mod != 0 {
			fmt.Fprintf(&out, " class %q of %d slot %d", n.class.key, n.class.nodes, n.slot)
			if n.indexed && !p.index.levels[n.level].members.has(n.slot) {
				out.WriteString(" NOT IN ITS LEVEL")
			}
		}
		out.WriteString("\n")
	}
	for _, id := range sortedKeys(p.workloads) {
		w := p.workloads[id]
		var revisions []string
		for _, r := range w.revisions {
			revisions = append(revisions, fmt.Sprintf("%s %d %x", r.name, r.mod, r.value))
		}
		fmt.Fprintf(&out, "workload %s mod %d created %d status %d %v rollout %d %v revisions %v leaving %v %v assumed %v %v global %v record %d runs %d\n",
			w.id, w.mod, w.created, w.statusMod, w.status, w.rolloutMod, w.rollout, revisions, w.leaving, w.rewriting, w.assumed, w.assumedRollout, p.globals.has(w), len(w.record), len(p.runs[id]))
		if w.want != nil {
			want := *w.want
			fmt.Fprintf(&out, "  shape %q used %d filter used %d\n", want.shape.key, want.shape.uses, want.shape.filter.uses)
			if want.schedule != nil {
				fmt.Fprintf(&out, "  schedule %v of %v\n", want.schedule.Schedule, want.schedule.job)
			}
			fmt.Fprintf(&out, "  run %v\n", want.run)
			fmt.Fprintf(&out, "  layout %q used %d\n", want.layout.key, want.layout.uses)
			fmt.Fprintf(&out, "  labels %v matches %d repels %d\n", w.labels, len(w.matches), len(w.repels))
			want.shape, want.layout, want.wishes, want.schedule, want.run = nil, nil, nil, nil, nil
			fmt.Fprintf(&out, "  wants %+v\n", want)
		}
		for _, r := range w.replicas {
			a, o := r.assignment, r.observed
			fmt.Fprintf(&out, "  %d next %v", r.number, r.next)
			if a.mod != 0 {
				fmt.Fprintf(&out, " assigned %d %s %d %s %s %d %v %v %v %v %v", a.mod, a.node.id, a.generation, a.revision, a.uid, a.restart, a.needs, usedPorts(a.ports), a.desired, a.exclusive, a.reserves)
			}
			if o.mod != 0 {
				fmt.Fprintf(&out, " observed %d %s %d %v %d %v", o.mod, o.node.id, o.generation, o.state, o.transition, o.reason)
			}
			if r.retry != nil {
				t := *r.retry
				t.reason = nil
				fmt.Fprintf(&out, " retry %+v %v", t, r.retry.reason)
			}
			out.WriteString("\n")
		}
	}
	for _, key := range sortedKeys(p.terms) {
		t := p.terms[key]
		fmt.Fprintf(&out, "term %s used %d:%s;%s\n", key, t.uses, t.targets.dump(p, t), t.repellers.dump(p, t))
	}
	fmt.Fprintf(&out, "%d selectors, %d labels\n", len(p.selectors), len(p.labelled))
	fmt.Fprintf(&out, "%d classes, %d filters, %d shapes, %d layouts, priorities %v\n", len(p.classes), len(p.filters), len(p.shapes), len(p.layouts), p.priorities)
	return out.String()
}
