package cli

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

var testNow = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func before(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(testNow.Add(-d)) }

func sampleWorkloads() []*pb.Workload {
	return []*pb.Workload{
		{
			Spec: &pb.WorkloadSpec{
				Id: "web", Replicas: proto.Int32(2), Labels: map[string]string{"tier": "front", "app": "shop"}, Resources: &pb.Resources{Cpu: "500m", Memory: "64Mi"},
				Placement: &pb.Placement{NodeLabels: map[string]string{"zone": "eu"}, Constraints: []*pb.Constraint{{Label: "disk", Operator: pb.Constraint_NOT_IN, Values: []string{"hdd"}}}},
				Spec:      &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "persys-demo-web:1", Args: []string{"-v"}}},
			},
			Revision: "8f14e45f", CreateTime: before(3 * time.Hour), UpdateTime: before(90 * time.Second), ResourceVersion: 17,
			Status: &pb.WorkloadStatus{State: pb.State_RUNNING, Revision: "8f14e45f", Desired: 2, Assigned: 2, Running: 2, Updated: 2},
			Replicas: []*pb.Replica{
				{WorkloadId: "web", Replica: 0, NodeId: "n2", State: pb.State_RUNNING, Generation: 12, Address: "127.0.0.22", LastTransition: before(time.Minute), Ports: []*pb.Port{{HostPort: 20001, ContainerPort: 80}}, RuntimeId: "4a7d1ed4"},
				{WorkloadId: "web", Replica: 1, NodeId: "n1", State: pb.State_RUNNING, Generation: 13, Restarts: 2, Address: "127.0.0.21", LastTransition: before(49 * time.Hour), Ports: []*pb.Port{{HostPort: 53, ContainerPort: 53, Protocol: "udp", HostIp: "127.0.0.9"}}},
			},
		},
		{
			Spec:     &pb.WorkloadSpec{Id: "batch", Kind: pb.WorkloadKind_JOB, Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "sh", Args: []string{"-c", "exit 3"}}}},
			Revision: "45c48cce", CreateTime: before(50 * time.Hour),
			Status: &pb.WorkloadStatus{
				State: pb.State_RETRY_PENDING, Revision: "45c48cce", Desired: 1,
				Reason: &pb.Reason{Code: pb.ReasonCode_EXITED, Message: "the program ended with exit code 3 and said nothing on its way out\x1b[2J\nat all", NextRetryAt: before(-20 * time.Second)},
			},
			Replicas: []*pb.Replica{{WorkloadId: "batch", NodeId: "n1", State: pb.State_FAILED, ExitCode: proto.Int32(3), LastTransition: before(10 * time.Second)}},
		},
		{Spec: &pb.WorkloadSpec{Id: "new", Replicas: proto.Int32(3), DesiredState: pb.DesiredState_DESIRED_STOPPED}, CreateTime: before(-time.Second)},
	}
}

// sampleJob runs by a schedule; sampleRuns are its runs, the newest first.
func sampleJob() *pb.Workload {
	return &pb.Workload{
		Spec: &pb.WorkloadSpec{
			Id: "backup", Kind: pb.WorkloadKind_JOB, Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "backup"}},
			Schedule: &pb.Schedule{Cron: "30 * * * *", Timezone: "Europe/Berlin", Concurrency: pb.Schedule_REPLACE, Suspend: true},
		},
		Revision: "45c48cce", CreateTime: before(50 * time.Hour),
		Status: &pb.WorkloadStatus{State: pb.State_RUNNING, Revision: "45c48cce", LastRun: before(31 * time.Minute), NextRun: before(-29 * time.Minute), ActiveRuns: 1},
	}
}

func sampleRuns() []*pb.Workload {
	return []*pb.Workload{
		{
			Spec:   &pb.WorkloadSpec{Id: "backup-29924609", Kind: pb.WorkloadKind_JOB},
			Status: &pb.WorkloadStatus{State: pb.State_RUNNING, Desired: 2, Running: 1, Completed: 1}, Parent: "backup", ScheduledTime: before(31 * time.Minute),
		},
		{
			Spec:   &pb.WorkloadSpec{Id: "backup-29924549", Kind: pb.WorkloadKind_JOB},
			Status: &pb.WorkloadStatus{State: pb.State_FAILED, Desired: 1, Failed: 1, Reason: &pb.Reason{Code: pb.ReasonCode_EXITED, Message: "exited with code 3"}},
			Parent: "backup", ScheduledTime: before(91 * time.Minute),
		},
	}
}

func sampleNodes() []*pb.Node {
	return []*pb.Node{
		{
			Id: "n1", State: pb.NodeState_READY, Address: "127.0.0.21", Version: "v1", Os: "linux", Arch: "amd64", Kernel: "6.1", CreateTime: before(72 * time.Hour), LastHeartbeat: before(2 * time.Second),
			Capacity: &pb.NodeCapacity{CpuMillis: 2000, MemoryBytes: 24 << 30, DiskBytes: 1 << 40}, Reserved: &pb.NodeCapacity{CpuMillis: 1500, MemoryBytes: 1536 << 20}, Assignments: 3,
			Labels: map[string]string{"zone": "eu", "disk": "hdd"}, UserLabels: map[string]string{"disk": "ssd"}, Unschedulable: true, Pool: "gpu",
			Devices:      []*pb.Device{{Name: "nvidia/a100", Ids: []string{"GPU-0", "GPU-1"}, Attributes: map[string]string{"memory": "40"}}},
			StoragePools: []*pb.StoragePool{{Name: "fast", Driver: "local", CapacityBytes: 5 << 30, Path: "/srv/fast"}},
			Taints:       []*pb.Taint{{Key: "dedicated", Value: "gpu"}}, UserTaints: []*pb.Taint{{Key: "old", Effect: pb.TaintEffect_NO_EXECUTE}},
			Runtimes: []*pb.RuntimeInfo{{Type: pb.WorkloadType_CONTAINER, Name: "docker", Version: "20.10", Healthy: true}, {Type: pb.WorkloadType_PROCESS, Name: "process", Healthy: false, Message: "no cgroups"}},
			Usage:    &pb.NodeUsage{CpuPercent: 12.3, MemoryBytes: 900 << 20, DiskBytes: 10 << 30, CollectedAt: before(2 * time.Second)},
		},
		{Id: "n2", State: pb.NodeState_NOT_READY, CreateTime: before(time.Minute), Reason: &pb.Reason{Code: pb.ReasonCode_NODE_LOST, Message: "silent for 10s"}},
		{Id: "n3", State: pb.NodeState_READY, Unschedulable: true, Draining: true},
		{Id: "n4"},
	}
}

func sampleEvents() []*pb.Event {
	return []*pb.Event{
		{Id: "1", Time: before(25 * time.Hour), Type: pb.EventType_NODE_LOST_EVENT, NodeId: "n2", Message: "silent for 10s", Actor: "system"},
		{Id: "2", Time: before(time.Minute), Type: pb.EventType_WORKLOAD_SCHEDULED, WorkloadId: "web", Replica: proto.Int32(0), NodeId: "n1", Message: "emptiest of 2", Actor: "system"},
		{Id: "3", Time: before(time.Second), Type: pb.EventType_RETRY_TRIGGERED, WorkloadId: "batch", Reason: &pb.Reason{Code: pb.ReasonCode_EXITED}},
	}
}

func TestTables(t *testing.T) {
	members := []*pb.Member{
		{Id: "s1.a", Name: "s1", GrpcAddress: "127.0.0.11:7481", HttpsAddress: "127.0.0.11:7480", Leader: true, Voter: true, Reachable: true, AppliedIndex: 99, JoinTime: before(time.Hour), Version: "v1"},
		{Id: "s2.b", Name: "s2", GrpcAddress: "127.0.0.12:7481", Voter: true},
		{Id: "s3.c", Name: "s3", Demoted: true, Reachable: true},
		{Id: "s4.d", Name: "s4", Reachable: true},
		{Id: "s0.e", Name: "s0", Removed: true},
	}
	tokens := []*pb.Token{
		{Id: "t1", Role: pb.Role_ROLE_AGENT, UsesLeft: 3, ExpireTime: before(-3 * time.Hour), Labels: map[string]string{"zone": "eu"}, CreatedBy: "admin/admin", CreateTime: before(time.Minute)},
		{Id: "t2", Role: pb.Role_ROLE_SERVER, Node: "s4", UsesLeft: 1, ExpireTime: before(time.Minute)},
	}
	var b strings.Builder
	for _, x := range []struct {
		name  string
		table table
	}{
		{"workloads", workloadTable(sampleWorkloads(), testNow)},
		{"jobs", workloadTable(append(sampleRuns(), sampleJob()), testNow)},
		{"nodes", nodeTable(sampleNodes(), testNow)},
		{"members", memberTable(members, testNow)},
		{"tokens", tokenTable(tokens, testNow)},
		{"events", eventTable(sampleEvents(), testNow)},
	} {
		for _, wide := range []bool{false, true} {
			b.WriteString("== " + x.name + map[bool]string{true: " wide"}[wide] + "\n")
			if err := x.table.write(&b, wide, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	b.WriteString("== events as they come\n")
	for _, e := range sampleEvents() {
		b.WriteString(eventLine(e, testNow) + "\n")
	}
	golden(t, "tables.txt", b.String())
}

func TestPages(t *testing.T) {
	var b strings.Builder
	for _, w := range sampleWorkloads() {
		p := page{}
		p.workload(w, nil, sampleEvents()[1:], testNow)
		b.WriteString(p.b.String() + "\n")
	}
	job := page{}
	job.workload(sampleJob(), sampleRuns(), nil, testNow)
	job.workload(sampleRuns()[0], nil, nil, testNow)
	b.WriteString(job.b.String() + "\n")
	for _, n := range sampleNodes() {
		p := page{wide: true}
		p.node(n, nil, testNow)
		b.WriteString(p.b.String() + "\n")
	}
	golden(t, "pages.txt", b.String())
}

func TestColors(t *testing.T) {
	tab := table{head: []string{"ID", "STATE", "X"}}
	tab.add("a", "Running", "1")
	tab.add("b", "Ready,Cordoned", "22")
	tab.add("c", "Odd", "3")
	var plain, painted strings.Builder
	if err := tab.write(&plain, false, false); err != nil {
		t.Fatal(err)
	}
	if err := tab.write(&painted, false, true); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(painted.String(), "\x1b[32mRunning\x1b[0m ") {
		t.Errorf("got %q", painted.String())
	}
	if got := strings.NewReplacer("\x1b[32m", "", "\x1b[0m", "").Replace(painted.String()); got != plain.String() {
		t.Errorf("colours shift columns:\n%s\n%s", got, plain.String())
	}
}

func TestJSONAndYAML(t *testing.T) {
	var b strings.Builder
	w := sampleWorkloads()[1]
	w.Spec.Env = map[string]string{"SCRIPT": "line 1\nline 2\n", "NUMBER": "8080", "TRUTH": "yes", "EMPTY": ""}
	for _, format := range []string{"json", "yaml"} {
		p, err := newPrinter(format, &b, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.message(w); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := p.line(sampleEvents()[2]); err != nil {
				t.Fatal(err)
			}
		}
	}
	golden(t, "formats.txt", b.String())
}

func TestAmounts(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 1023: "1023", 1024: "1Ki", 1536: "1.5Ki", 24 << 30: "24Gi", 25184575488: "23Gi", 1 << 40: "1Ti"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-time.Second: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 119 * time.Minute: "119m", 47 * time.Hour: "47h", 48 * time.Hour: "2d"} {
		if got := span(d); got != want {
			t.Errorf("%s: got %s, want %s", d, got, want)
		}
	}
	for n, want := range map[int32]string{-1: "you can lose 0 more servers", 0: "you can lose 0 more servers", 1: "you can lose 1 more server", 2: "you can lose 2 more servers"} {
		if got := tolerance(n); !strings.HasPrefix(got, want) {
			t.Errorf("%d: got %s", n, got)
		}
	}
}
