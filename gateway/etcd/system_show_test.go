package etcd

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

var update = flag.Bool("update", false, "write recorded answers anew")

// recorded compares with a file in testdata.
func recorded(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", filepath.FromSlash(name))
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s (go test -update writes it anew):\n%s", file, got)
	}
}

var at = timestamppb.New(time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC))

// webSpec is a workload as users write it.
const webSpec = `{"id": "web", "replicas": 2, "labels": {"app": "web"}, "resources": {"cpu": "500m", "memory": "128Mi"}, "container": {"image": "nginx:1", "ports": [{"container_port": 80}]}}`

func specOf(t testing.TB, document string) *pb.WorkloadSpec {
	t.Helper()
	spec := &pb.WorkloadSpec{}
	if err := model.DecodeInto([]byte(document), spec); err != nil {
		t.Fatal(err)
	}
	return spec
}

// examples are one message for each kind of key.
func examples(t testing.TB) map[string]proto.Message {
	spec := model.Normalize(specOf(t, webSpec))
	reason := &pb.Reason{Code: pb.ReasonCode_EXITED, Message: "exited with code 3", LastTransition: at, NextRetryAt: at, Retryable: true}
	capacity := &pb.NodeCapacity{CpuMillis: 4000, MemoryBytes: 8 << 30, DiskBytes: 100 << 30}
	return map[string]proto.Message{
		model.WorkloadKey("web"):                   &pb.Workload{Spec: spec, Revision: model.Revision(spec), Uid: "u1", CreateTime: at, UpdateTime: at, RestartGeneration: 1},
		model.WorkloadStatusKey("web"):             &pb.WorkloadStatus{State: pb.State_RUNNING, Desired: 2, Assigned: 2, Running: 2},
		model.RolloutKey("web"):                    &pb.Rollout{State: pb.RolloutState_ROLLOUT_PROGRESSING, Revision: "0123456789abcd", StartTime: at, ProgressTime: at, Desired: 2, Updated: 1},
		model.RevisionKey("web", "0123456789abcd"): &pb.Revision{Spec: spec, Revision: "0123456789abcd", CreateTime: at, Uid: "u1"},
		model.AssignmentKey("web", 0):              &pb.Assignment{WorkloadId: "web", NodeId: "n1", Generation: 1, CpuMillis: 500, Epoch: 1, CreateTime: at, Explanation: "emptiest"},
		model.ReplicaKey("web", 0):                 &pb.Replica{WorkloadId: "web", NodeId: "n1", Generation: 1, State: pb.State_RUNNING, StartTime: at, RuntimeId: "c1"},
		model.RetryKey("web", 1):                   &pb.Retry{WorkloadId: "web", Replica: 1, Attempts: 2, MaxAttempts: 5, Reason: reason, NextRetryAt: at, FailedNodes: []string{"n2"}},
		model.NodeKey("n1"): &pb.Node{
			Id: "n1", State: pb.NodeState_READY, Labels: map[string]string{"zone": "a"}, UserLabels: map[string]string{"rack": "7"}, Capacity: capacity,
			Runtimes: []*pb.RuntimeInfo{{Type: pb.WorkloadType_CONTAINER, Name: "docker", Version: "29", Healthy: true}}, Address: "10.0.0.1", LeaseId: 7, CreateTime: at,
		},
		model.NodeLeaseKey("n1"):                    &pb.NodeLease{LeaseId: 7, TtlSeconds: 10, Incarnation: "i1"},
		model.EventKey(at.AsTime(), "e1"):           &pb.Event{Time: at, Type: pb.EventType_WORKLOAD_SUBMITTED, WorkloadId: "web", Message: "submitted", Actor: "admin/ann"},
		model.MemberKey("s1.abc"):                   &pb.Member{Id: "s1.abc", Name: "s1", GrpcAddress: "10.0.0.1:7481", JoinTime: at},
		model.TokenKey("t1"):                        &pb.Token{Id: "t1", SecretHash: []byte("secret hash"), Role: pb.Role_ROLE_AGENT, ExpireTime: at, UsesLeft: 1, CreateTime: at, CreatedBy: "admin/ann"},
		model.CertificateKey("0a"):                  &pb.Certificate{Serial: "0a", Identity: "agent/n1", NotAfter: at, TokenId: "t1", CreateTime: at},
		model.EpochKey:                              &pb.LeaderEpoch{Epoch: 3, MemberId: "s1.abc"},
		model.ClusterKey:                            &pb.ClusterInfo{Id: "c1", Name: "test", CreateTime: at},
		model.SchedulerKey:                          &pb.SchedulerConfig{Rebalance: true, RebalanceMoves: 3},
		model.SystemPrefix + "alarms/0f/NOSPACE":    &etcdpb.AlarmMember{},
		authPrefix + "users/ann":                    &pb.Token{SecretHash: []byte("secret hash")},
		model.WorkloadsPrefix + "web/unknown/below": &pb.Workload{},
	}
}

func TestDocuments(t *testing.T) {
	var got strings.Builder
	all := examples(t)
	for i := range kinds {
		shown := 0
		for key := range all {
			if matches(kinds[i].pattern, key) {
				shown++
			}
		}
		if shown != 1 {
			t.Errorf("%d examples of %s", shown, kinds[i].pattern)
		}
	}
	for _, key := range sortedKeys(all) {
		kv := &pb.KeyValue{Key: []byte(key), Value: model.Encode(all[key]), CreateRevision: 5, ModRevision: 6, Version: 2, Lease: 7}
		before := proto.CloneOf(kv)
		shown := show(kv)
		if !proto.Equal(kv, before) || shown.CreateRevision != 5 || shown.ModRevision != 6 || shown.Version != 2 || shown.Lease != 7 {
			t.Errorf("%s: %v", key, shown)
		}
		if !json.Valid(shown.Value) {
			t.Errorf("%s: no JSON: %s", key, shown.Value)
		}
		if bytes.Contains(shown.Value, []byte("secret")) {
			t.Errorf("%s: %s", key, shown.Value)
		}
		if ownerOf([]byte(key)) == hidden {
			continue
		}
		fmt.Fprintf(&got, "%s\n%s\n\n", key, shown.Value)
	}
	recorded(t, "system/documents.txt", got.String())
}

func TestDocumentsOfWhatCannotBeRead(t *testing.T) {
	for key, value := range map[string]string{
		"/workloads/web":              "\xff\xff\xff\xff",
		"/workloads/":                 "x",
		"/system/something":           "x",
		"/assignments/web/000000/sub": "x",
		"/nodes/n1":                   string(model.Encode(&pb.Node{CreateTime: &timestamppb.Timestamp{Seconds: 1 << 60}})),
	} {
		shown := show(&pb.KeyValue{Key: []byte(key), Value: []byte(value), Version: 1})
		var document struct{ Error string }
		if err := json.Unmarshal(shown.Value, &document); err != nil || document.Error == "" {
			t.Errorf("%s: %s, %v", key, shown.Value, err)
		}
	}
	for _, kv := range []*pb.KeyValue{nil, {Key: []byte("/workloads/web"), ModRevision: 7}, {Key: []byte("users"), Value: []byte("x"), Version: 1}} {
		if shown := show(kv); shown != kv {
			t.Errorf("%v is shown as %v", kv, shown)
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
