package cli

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// snapshotOfSome is the state of a cluster of three nodes, on which two workloads
// run, as etcdctl saves it.
func snapshotOfSome(t *testing.T) []byte {
	t.Helper()
	now := timestamppb.New(time.Date(2026, 11, 2, 12, 0, 0, 0, time.UTC))
	txn := &pb.Txn{}
	put := func(key string, m proto.Message) { txn.Success = append(txn.Success, model.Put(key, m, 0)) }
	for i := range 3 {
		id := fmt.Sprintf("n%d", i+1)
		put(model.NodeKey(id), &pb.Node{
			Id: id, State: pb.NodeState_READY, CreateTime: now, LastTransition: now, LeaseId: int64(i + 1),
			Capacity: &pb.NodeCapacity{CpuMillis: 2000, MemoryBytes: 4 << 30, DiskBytes: 1 << 40}, Runtimes: []*pb.RuntimeInfo{{Type: pb.WorkloadType_CONTAINER, Healthy: true}},
		})
		put(model.NodeLeaseKey(id), &pb.NodeLease{LeaseId: int64(i + 1)})
	}
	for i, id := range []string{"web", "db"} {
		spec := model.Normalize(&pb.WorkloadSpec{
			Id: id, Replicas: proto.Int32(2), Resources: &pb.Resources{Cpu: "800m", Memory: "1Gi"}, Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "x:1"}},
		})
		revision := model.Revision(spec)
		put(model.WorkloadKey(id), &pb.Workload{Spec: spec, Revision: revision, Uid: id, CreateTime: now})
		put(model.RevisionKey(id, revision), &pb.Revision{Spec: spec, Revision: revision, CreateTime: now})
		for r := range int32(2) {
			node := fmt.Sprintf("n%d", i+1)
			put(model.AssignmentKey(id, r), &pb.Assignment{
				WorkloadId: id, Replica: r, NodeId: node, Generation: 1, Revision: revision, WorkloadUid: id, Type: spec.Type, CpuMillis: 800, MemoryBytes: 1 << 30, CreateTime: now,
			})
			put(model.ReplicaKey(id, r), &pb.Replica{
				WorkloadId: id, Replica: r, NodeId: node, Generation: 1, Revision: revision, State: pb.State_RUNNING, StartTime: now, LastTransition: now,
			})
		}
	}
	store := fsm.New()
	if _, _, err := store.Apply(1, &pb.Entry{FeatureLevel: fsm.FeatureLevel, TimeUnixNano: now.AsTime().UnixNano(), Txns: []*pb.Txn{txn}}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := store.View().WriteSealed(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestPlanOffline(t *testing.T) {
	snapshot := snapshotOfSome(t)
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	flipped := bytes.Clone(snapshot)
	flipped[len(flipped)/2] ^= 1
	write("whole", snapshot)
	write("cut", snapshot[:len(snapshot)-100])
	write("flipped", flipped)
	write("more", append(bytes.Clone(snapshot), 0))
	write("other", []byte("SQLite format 3"))
	write("empty", nil)
	write("web.yaml", []byte("{id: web, replicas: 3, resources: {cpu: 800m, memory: 1Gi}, container: {image: 'x:1'}}"))
	write("job.yaml", []byte("{id: web, kind: job, container: {image: 'x:1'}}"))
	u := newUser(t)
	u.in = string(snapshot)
	var b strings.Builder
	for _, line := range []string{
		"--snapshot DIR/whole --drain n1", "--snapshot DIR/whole --lose n1 --lose n2", "--snapshot DIR/whole --lose n1 --lose n2 --add-nodes 2 --like n3",
		"--snapshot DIR/whole -f DIR/web.yaml -o wide", "--snapshot - --drain n3", "--snapshot DIR/whole --drain n1 -o name", "--snapshot DIR/whole --drain n2 -o json",
		"--snapshot DIR/whole", "--snapshot DIR/whole --drain n9", "--snapshot DIR/whole --lose n9", "--snapshot DIR/whole --add-nodes 1 --like n9", "--snapshot DIR/whole --add-nodes 1",
		"--snapshot DIR/whole --like n1", "--snapshot DIR/whole --add-nodes -1 --like n1", "--snapshot DIR/whole -f DIR/job.yaml", "--snapshot DIR/cut --drain n1", "--snapshot DIR/flipped --drain n1",
		"--snapshot DIR/more --drain n1", "--snapshot DIR/other --drain n1", "--snapshot DIR/empty --drain n1", "--snapshot DIR/none --drain n1", "--snapshot DIR --drain n1", "--drain n1",
	} {
		r := u.types(append([]string{"plan"}, strings.Fields(strings.ReplaceAll(line, "DIR", dir))...)...)
		b.WriteString("$ persys plan " + line + "\n" + r.out)
		if r.errors != "" {
			b.WriteString("! " + strings.ReplaceAll(strings.TrimSuffix(r.errors, "\n"), "\n", "\n! ") + "\n")
		}
		if r.code != 0 {
			b.WriteString("exit code " + string(rune('0'+r.code)) + "\n")
		}
		b.WriteString("\n")
	}
	// Protobuf writes its errors with one kind of space or another, from build to build.
	golden(t, "whatif.txt", strings.NewReplacer(dir, "DIR", "\u00a0", " ").Replace(b.String()))
}

// sendsSnapshot streams it in pieces that have nothing to do with its records.
type sendsSnapshot struct {
	etcdpb.UnimplementedMaintenanceServer
	data []byte
	fail error
}

func (s sendsSnapshot) Snapshot(_ *etcdpb.SnapshotRequest, stream etcdpb.Maintenance_SnapshotServer) error {
	for rest := s.data; len(rest) > 0; {
		n := min(len(rest), 1000)
		if err := stream.Send(&etcdpb.SnapshotResponse{Blob: rest[:n]}); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return s.fail
}

func TestPlanAsksTheCluster(t *testing.T) {
	snapshot := snapshotOfSome(t)
	for what, x := range map[string]struct {
		from sendsSnapshot
		code int
		says string
	}{
		"whole":   {sendsSnapshot{data: snapshot}, exitOK, ""},
		"cut":     {sendsSnapshot{data: snapshot[:3000]}, exitUsage, "what the cluster sent is not a whole snapshot"},
		"refused": {sendsSnapshot{fail: status.Error(codes.PermissionDenied, "only for administrators")}, exitDenied, "only for administrators"},
	} {
		trust := newTrust(t)
		u := newUser(t).knows(trust, trust.serve(&fakeCluster{more: func(s *grpc.Server) { etcdpb.RegisterMaintenanceServer(s, x.from) }}))
		r := u.types("plan", "--drain", "n1")
		if r.code != x.code || !strings.Contains(r.errors, x.says) || (x.code == exitOK) != strings.Contains(r.out, "node n1 is drained") {
			t.Errorf("%s: %+v", what, r)
		}
	}
}
