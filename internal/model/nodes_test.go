package model

import (
	"cmp"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (k *world) node(id string) *pb.Node {
	k.t.Helper()
	n := &pb.Node{}
	if _, ok, err := Load(k.store.View(), NodeKey(id), n); err != nil || !ok {
		k.t.Fatalf("node %s: %v %v", id, ok, err)
	}
	return n
}

func (k *world) replica(workload string) *pb.Replica {
	k.t.Helper()
	r := &pb.Replica{}
	if _, ok, err := Load(k.store.View(), ReplicaKey(workload, 0), r); err != nil {
		k.t.Fatal(err)
	} else if !ok {
		return nil
	}
	return r
}

var at = time.Unix(1_800_000_000, 0)

func hello(incarnation string) *pb.AgentHello {
	return &pb.AgentHello{NodeId: "a1", Incarnation: incarnation, Capacity: &pb.NodeCapacity{CpuMillis: 1000, MemoryBytes: 1 << 30}}
}

func TestRegisterNode(t *testing.T) {
	k := newWorld(t)
	register := func(h *pb.AgentHello, lease int64) (*pb.Txn, error) {
		return RegisterNode(k.store.View(), h, Lease{ID: lease, TTLSeconds: 10}, at)
	}
	txn, err := register(hello("one"), 7)
	if err != nil {
		t.Fatal(err)
	}
	k.do(txn)
	if n := k.node("a1"); n.State != pb.NodeState_READY || n.LeaseId != 7 || n.CreateTime == nil {
		t.Fatalf("registered as %v", n)
	}
	if _, ok := k.store.View().Lease(7); !ok {
		t.Fatal("no lease was granted")
	}

	if txn, err = register(hello("one"), 8); err != nil || txn != nil {
		t.Fatalf("coming back within the lease writes %v, %v", txn, err)
	}
	changed := hello("one")
	changed.Labels = map[string]string{"zone": "eu"}
	if txn, err = register(changed, 8); err != nil {
		t.Fatal(err)
	}
	k.do(txn)
	if n := k.node("a1"); n.Labels["zone"] != "eu" || n.LeaseId != 7 {
		t.Fatalf("changed to %v", n)
	}
	if _, err = register(hello("two"), 8); err == nil {
		t.Fatal("another incarnation took the name while the lease lives")
	}

	txn, err = LoseNode(k.store.View(), 7, k.store.View().LeaseKeys(7), at)
	if err != nil {
		t.Fatal(err)
	}
	k.do(txn)
	if n := k.node("a1"); n.State != pb.NodeState_NOT_READY || n.Reason.GetCode() != pb.ReasonCode_NODE_LOST || n.LeaseId != 0 {
		t.Fatalf("lost as %v", n)
	}
	if _, ok := k.store.View().Get(NodeLeaseKey("a1")); ok {
		t.Fatal("the lease key outlived the lease")
	}
	if txn, err = register(hello("two"), 8); err != nil {
		t.Fatal(err)
	}
	k.do(txn)
	if n := k.node("a1"); n.State != pb.NodeState_READY || n.LeaseId != 8 || n.Incarnation != "two" || n.Reason != nil {
		t.Fatalf("returned as %v", n)
	}
}

func TestRegisterNodeTakesInItsConfiguration(t *testing.T) {
	k, h := newWorld(t), hello("one")
	h.Taints = []*pb.Taint{{Key: "gpu", Effect: pb.TaintEffect_NO_EXECUTE}}
	h.Devices = []*pb.Device{{Name: "gpu", Ids: []string{"0", "1"}, Paths: []string{"/dev/g0", "/dev/g1"}, Attributes: map[string]string{"memory": "40"}}}
	h.StoragePools = []*pb.StoragePool{{Name: "data", Driver: "local", CapacityBytes: 1 << 30, Path: "/data"}}
	for _, pool := range []string{"", "gpu"} {
		h.Pool = pool
		txn, err := RegisterNode(k.store.View(), h, Lease{ID: 7, TTLSeconds: 10}, at)
		if err != nil {
			t.Fatal(err)
		}
		k.do(txn)
		n := k.node("a1")
		if want := cmp.Or(pool, DefaultPool); n.Pool != want || FormatTaint(n.Taints[0]) != "gpu:NoExecute" || len(n.Devices[0].Ids) != 2 || n.StoragePools[0].Path != "/data" {
			t.Errorf("pool %q: registered as %v", pool, n)
		}
	}
}

func TestRegisterNodeRefuses(t *testing.T) {
	for name, breakIt := range map[string]func(*pb.AgentHello){
		"id":          func(h *pb.AgentHello) { h.NodeId = "No_Label" },
		"incarnation": func(h *pb.AgentHello) { h.Incarnation = "" },
		"capacity":    func(h *pb.AgentHello) { h.Capacity = nil },
		"cpu":         func(h *pb.AgentHello) { h.Capacity.CpuMillis = 0 },
		"pool":        func(h *pb.AgentHello) { h.Pool = "No_Label" },
		"taint":       func(h *pb.AgentHello) { h.Taints = []*pb.Taint{{Key: "a b"}} },
		"device":      func(h *pb.AgentHello) { h.Devices = []*pb.Device{{Name: "gpu"}} },
		"ids": func(h *pb.AgentHello) {
			h.Devices = []*pb.Device{{Name: "gpu", Ids: []string{"0"}}, {Name: "gpu", Ids: []string{"0"}}}
		},
		"paths": func(h *pb.AgentHello) {
			h.Devices = []*pb.Device{{Name: "gpu", Ids: []string{"0", "1"}, Paths: []string{"/dev/a"}}}
		},
		"storage": func(h *pb.AgentHello) { h.StoragePools = []*pb.StoragePool{{Name: "data", Path: "/data"}} },
	} {
		h := hello("one")
		breakIt(h)
		if txn, err := RegisterNode(newWorld(t).store.View(), h, Lease{ID: 1, TTLSeconds: 10}, at); err == nil {
			t.Errorf("%s: accepted as %v", name, txn)
		}
	}
}

func TestLoseNodeLeavesOtherLeasesAlone(t *testing.T) {
	k := newWorld(t)
	if txn, err := LoseNode(k.store.View(), 5, [][]byte{[]byte("/app/lock")}, at); txn != nil || err != nil {
		t.Errorf("%v, %v", txn, err)
	}
}

func TestReportStatus(t *testing.T) {
	assigned := func(node string, generation int64) *pb.Assignment {
		return &pb.Assignment{WorkloadId: "web", NodeId: node, Generation: generation}
	}
	observed := func(node string, generation int64, state pb.State) *pb.Replica {
		return &pb.Replica{WorkloadId: "web", NodeId: node, Generation: generation, State: state}
	}
	running := &pb.StatusReport{Replicas: []*pb.Replica{observed("", 2, pb.State_RUNNING)}}
	gone := &pb.StatusReport{Removed: []*pb.Replica{{WorkloadId: "web", Generation: 2}}}

	for _, c := range []struct {
		name       string
		assignment *pb.Assignment
		stored     *pb.Replica
		report     *pb.StatusReport
		want       *pb.Replica // nil: no record afterwards
		unchanged  bool
	}{
		{"the first word of an assignment", assigned("a1", 2), observed("a1", 2, pb.State_SCHEDULED), running, observed("a1", 2, pb.State_RUNNING), false},
		{"nothing new", assigned("a1", 2), observed("a1", 2, pb.State_RUNNING), running, observed("a1", 2, pb.State_RUNNING), true},
		{"an older generation", assigned("a1", 3), observed("a1", 3, pb.State_SCHEDULED), running, observed("a1", 3, pb.State_SCHEDULED), true},
		{"another node's by now", assigned("a2", 3), observed("a2", 3, pb.State_RUNNING), running, observed("a2", 3, pb.State_RUNNING), true},
		{"still there after its assignment went", nil, observed("a1", 2, pb.State_RUNNING), &pb.StatusReport{Replicas: []*pb.Replica{observed("", 2, pb.State_DELETING)}}, observed("a1", 2, pb.State_DELETING), false},
		{"never heard of", nil, nil, running, nil, true},
		{"removed as wanted", nil, observed("a1", 2, pb.State_RUNNING), gone, nil, false},
		{"stopped and removed in one report", nil, observed("a1", 2, pb.State_RUNNING), &pb.StatusReport{
			Replicas: []*pb.Replica{observed("", 2, pb.State_STOPPED)}, Removed: gone.Removed,
		}, nil, false},
		{"the next generation's word and the removal of the one before", assigned("a1", 3), observed("a1", 2, pb.State_RUNNING), &pb.StatusReport{
			Replicas: []*pb.Replica{observed("", 3, pb.State_RUNNING)}, Removed: gone.Removed,
		}, observed("a1", 3, pb.State_RUNNING), false},
		{"removed where it is still wanted", assigned("a1", 2), observed("a1", 2, pb.State_RUNNING), gone, observed("a1", 2, pb.State_RUNNING), true},
		{"the old one removed, the new one starting on the same node", assigned("a1", 3), observed("a1", 3, pb.State_SCHEDULED), gone, observed("a1", 3, pb.State_SCHEDULED), true},
		{"removed here, running elsewhere", assigned("a2", 3), observed("a2", 3, pb.State_RUNNING), gone, observed("a2", 3, pb.State_RUNNING), true},
		{"a full report without it", nil, observed("a1", 2, pb.State_RUNNING), &pb.StatusReport{Full: true, DesiredRevision: 100}, nil, false},
		{"a full report without what is yet to start", assigned("a1", 2), observed("a1", 2, pb.State_SCHEDULED), &pb.StatusReport{Full: true, DesiredRevision: 100}, observed("a1", 2, pb.State_SCHEDULED), true},
		{"a full report of before it was decided", nil, observed("a1", 2, pb.State_DELETING), &pb.StatusReport{Full: true, DesiredRevision: 1}, observed("a1", 2, pb.State_DELETING), true},
		{"a full report of another node", nil, observed("a2", 2, pb.State_RUNNING), &pb.StatusReport{Full: true, DesiredRevision: 100}, observed("a2", 2, pb.State_RUNNING), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newWorld(t)
			if c.assignment != nil {
				k.put(AssignmentKey("web", 0), c.assignment)
			}
			if c.stored != nil {
				k.put(ReplicaKey("web", 0), c.stored)
			}
			var recorded []*pb.ReplicaKey
			if c.stored.GetNodeId() == "a1" {
				recorded = append(recorded, &pb.ReplicaKey{WorkloadId: "web"})
			}
			words, err := Words("a1", c.report, recorded)
			if err != nil {
				t.Fatal(err)
			}
			txn, err := ReportStatus(k.store.View(), words, at)
			if err != nil {
				t.Fatal(err)
			}
			if (txn == nil) != c.unchanged {
				t.Fatalf("the transaction is %v", txn)
			}
			if txn != nil {
				k.do(txn)
			}
			got := k.replica("web")
			if got != nil {
				got.LastTransition = nil
			}
			if !proto.Equal(got, c.want) {
				t.Errorf("the record is %v, want %v", got, c.want)
			}
		})
	}
}

func TestRunningAgain(t *testing.T) {
	exited := &pb.Reason{Code: pb.ReasonCode_EXITED, Message: "exited with code 3"}
	for name, c := range map[string]struct {
		before, now *pb.Replica
		want        string
	}{
		"first":                  {&pb.Replica{}, &pb.Replica{Generation: 2}, ""},
		"after its image was in": {&pb.Replica{Generation: 2, State: pb.State_RETRY_PENDING, Reason: exited}, &pb.Replica{Generation: 2}, ""},
		"of another generation":  {&pb.Replica{Generation: 1, State: pb.State_RETRY_PENDING, Reason: exited}, &pb.Replica{Generation: 2, Restarts: 1}, ""},
		"after a pause":          {&pb.Replica{Generation: 2, State: pb.State_RETRY_PENDING, Restarts: 1, Reason: exited}, &pb.Replica{Generation: 2, Restarts: 1}, " again, restart 1, after: exited with code 3"},
		"why was not heard of":   {&pb.Replica{Generation: 2, State: pb.State_SCHEDULED}, &pb.Replica{Generation: 2, Restarts: 1}, " again, restart 1"},
	} {
		if got := runningAgain(c.before, c.now); got != c.want {
			t.Errorf("%s: %s", name, got)
		}
	}
}
