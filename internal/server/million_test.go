package server

import (
	"flag"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/scheduler"
)

var million = flag.Int("replicas", 20_000, "replicas of the test of a server's memory, on a hundredth as many nodes")

// What a server keeps for each replica: decided by the scheduler, reported by
// agents, applied by the state machine, with the picture following.
//
//	go test ./internal/server -run MemoryOfReplicas -v -replicas 1000000
func TestMemoryOfReplicas(t *testing.T) {
	const perWorkload, entryTxns = 1000, 3
	replicas := *million
	nodes := max(1, replicas/100)
	before := heap()

	store, picture := fsm.New(), newPicture()
	index, now := uint64(0), time.Unix(1_800_000_000, 0)
	apply := func(txns ...*pb.Txn) {
		for len(txns) > 0 {
			n := min(len(txns), entryTxns)
			index++
			_, events, err := store.Apply(index, &pb.Entry{TimeUnixNano: now.UnixNano(), FeatureLevel: fsm.FeatureLevel, Txns: txns[:n]})
			if err != nil {
				t.Fatal(err)
			}
			if err := picture.apply(events, store.View().Revision()); err != nil {
				t.Fatal(err)
			}
			txns = txns[n:]
		}
	}
	for i := range nodes {
		name := fmt.Sprintf("node-%05d", i)
		hello := &pb.AgentHello{
			NodeId: name, Incarnation: fmt.Sprintf("00000000-0000-4000-8000-%012d", i), Version: "1.0.0", Address: "10.0.0.1",
			Labels:   map[string]string{"zone": fmt.Sprintf("z%d", i%3), "rack": fmt.Sprintf("r%d", i%25)},
			Capacity: &pb.NodeCapacity{CpuMillis: 64_000, MemoryBytes: 256 << 30, DiskBytes: 1 << 40},
			Runtimes: []*pb.RuntimeInfo{{Type: pb.WorkloadType_PROCESS, Healthy: true}},
		}
		txn, err := model.RegisterNode(store.View(), hello, model.Lease{ID: int64(i + 1), TTLSeconds: 10}, now)
		if err != nil {
			t.Fatal(err)
		}
		apply(txn)
	}
	empty := heap()

	decided := time.Duration(0)
	for i := range replicas / perWorkload {
		txn, _, _, err := model.ApplyWorkload(store.View(), &pb.ApplyWorkloadRequest{Spec: smallProcess(fmt.Sprintf("workload-%04d", i), perWorkload)},
			model.Meta{Now: now, Actor: "admin", NewID: fmt.Sprintf("00000000-0000-4000-8000-%012d", i)})
		if err != nil {
			t.Fatal(err)
		}
		apply(txn)
		settle(t, picture, now, &decided, apply)
	}
	for n, id := range nodeIDs(store.View()) {
		var report pb.StatusReport
		for _, k := range picture.current.AssignedTo(id) {
			a := &pb.Assignment{}
			if _, _, err := model.Load(store.View(), model.AssignmentKey(k.WorkloadId, k.Replica), a); err != nil {
				t.Fatal(err)
			}
			report.Replicas = append(report.Replicas, &pb.Replica{
				WorkloadId: a.WorkloadId, Replica: a.Replica, NodeId: id, Generation: a.Generation, Revision: a.Revision,
				State: pb.State_RUNNING, RuntimeId: "12345:67890123", StartTime: a.CreateTime,
			})
		}
		words, err := model.Words(id, &report, nil)
		if err != nil {
			t.Fatal(err)
		}
		txn, err := model.ReportStatus(store.View(), words, now)
		if err != nil {
			t.Fatal(err)
		}
		if txn != nil {
			apply(txn)
		}
		if n%100 == 0 {
			settle(t, picture, now, &decided, apply)
		}
	}
	settle(t, picture, now, &decided, apply)

	// A server that comes to lead has looked at nothing yet.
	began := time.Now()
	warm, err := scheduler.Build(store.View().Scan(""), store.View().Revision())
	if err != nil {
		t.Fatal(err)
	}
	built := time.Since(began)
	began = time.Now()
	scheduler.Decide(warm, now, scheduler.Options{})
	first := time.Since(began)

	all := heap()
	if got := store.View(); got.Len() < 2*replicas {
		t.Fatalf("%d keys", got.Len())
	}
	apply(&pb.Txn{Success: []*pb.RequestOp{{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: store.View().Revision()}}}}})
	compacted := heap()
	bytes := store.View().Bytes()
	runtime.KeepAlive(store)
	store = nil
	alone := heap()
	runtime.KeepAlive(picture)
	per := func(bytes int64) string {
		return fmt.Sprintf("%d MiB, %d bytes a replica", bytes>>20, bytes/int64(replicas))
	}
	t.Logf("%d replicas on %d nodes, decided in %s", replicas, nodes, decided.Round(time.Millisecond))
	t.Logf("a new leader's first decision: %s; its picture, were it not warm, %s", first.Round(time.Millisecond), built.Round(time.Millisecond))
	t.Logf("nodes alone: %d KiB a node", (empty-before)/int64(nodes)>>10)
	t.Logf("with the past: %s", per(all-empty))
	t.Logf("compacted:     %s", per(compacted-empty))
	t.Logf("  keyspace:    %s, of which keys and values %s", per(compacted-alone), per(bytes))
	t.Logf("  picture:     %s", per(alone-empty))
	if most := int64(1400); (compacted-empty)/int64(replicas) > most {
		t.Errorf("more than %d bytes a replica", most)
	}
}

// settle carries out what is to be decided.
func settle(t *testing.T, p *picture, now time.Time, decided *time.Duration, apply func(...*pb.Txn)) {
	t.Helper()
	for {
		began := time.Now()
		plan := scheduler.Decide(p.current, now, scheduler.Options{Epoch: 1})
		*decided += time.Since(began)
		if len(plan.Steps) == 0 {
			return
		}
		for _, s := range plan.Steps {
			apply(s.Txn)
		}
	}
}

func nodeIDs(v *fsm.View) []string {
	var ids []string
	for kv := range v.Scan(model.NodesPrefix) {
		if id, sub, ok := model.SplitKey(model.NodesPrefix, string(kv.Key)); ok && sub == "" {
			ids = append(ids, id)
		}
	}
	return ids
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
