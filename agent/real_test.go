package agent_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/persys-dev/persys/agent"
	"github.com/persys-dev/persys/agent/process"
	"github.com/persys-dev/persys/agent/runtimetest"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The test binary is its own supervisor, as persys is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "process-shim" {
		os.Exit(process.ShimMain(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// oneServer gives every agent the same set, and keeps what is reported.
type oneServer struct {
	pb.UnimplementedAgentsServer
	mu       sync.Mutex
	set      *pb.DesiredSet
	streams  map[pb.Agents_SessionServer]bool
	replicas map[string]*pb.Replica
	drifts   []*pb.Drift
	changed  chan struct{}
	lines    chan *pb.LogChunk
}

func (s *oneServer) Session(stream pb.Agents_SessionServer) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	s.mu.Lock()
	err := errors.Join(
		stream.Send(&pb.ServerMessage{Message: &pb.ServerMessage_Welcome{Welcome: &pb.Welcome{ClusterId: runtimetest.Cluster, LeaseTtlSeconds: 10}}}),
		stream.Send(&pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: s.set}}))
	s.streams[stream] = true
	s.mu.Unlock()
	for err == nil {
		var m *pb.AgentMessage
		if m, err = stream.Recv(); err != nil {
			break
		}
		s.mu.Lock()
		switch m := m.GetMessage().(type) {
		case *pb.AgentMessage_Heartbeat:
			err = stream.Send(&pb.ServerMessage{Message: &pb.ServerMessage_HeartbeatAck{HeartbeatAck: &pb.Ack{Seq: m.Heartbeat.GetSeq()}}})
		case *pb.AgentMessage_Status:
			s.drifts = append(s.drifts, m.Status.GetDrifts()...)
			for _, r := range m.Status.GetReplicas() {
				s.replicas[r.GetWorkloadId()] = r
			}
			for _, r := range m.Status.GetRemoved() {
				delete(s.replicas, r.GetWorkloadId())
			}
			err = stream.Send(&pb.ServerMessage{Message: &pb.ServerMessage_StatusAck{StatusAck: &pb.Ack{Seq: m.Status.GetSeq()}}})
		}
		s.mu.Unlock()
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, stream)
	return err
}

func (s *oneServer) Tunnel(stream pb.Agents_TunnelServer) error {
	for {
		frame, err := stream.Recv()
		if err != nil {
			return err
		}
		if frame.GetLog() != nil {
			s.lines <- frame.GetLog()
		}
		if frame.GetEnd() {
			close(s.lines)
			return nil
		}
	}
}

func (s *oneServer) desire(t *testing.T, items ...*pb.DesiredItem) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.set = &pb.DesiredSet{Complete: true, Revision: s.set.GetRevision() + 10, Items: items}
	for stream := range s.streams {
		if err := stream.Send(&pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: s.set}}); err != nil {
			t.Error(err)
		}
	}
}

func (s *oneServer) await(t *testing.T, what string, reached func(map[string]*pb.Replica) bool) {
	t.Helper()
	limit := time.After(runtimetest.Patience)
	for {
		s.mu.Lock()
		ok := reached(s.replicas)
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-s.changed:
		case <-limit:
			t.Fatalf("%s: never; reported are %v", what, s.replicas)
		}
	}
}

// One node with real processes: what it is told runs, goes on without it, is
// restarted when it crashes, and goes when it is to go.
func TestNodeOfProcesses(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &oneServer{
		set: &pb.DesiredSet{Complete: true, Revision: 100}, streams: map[pb.Agents_SessionServer]bool{}, replicas: map[string]*pb.Replica{},
		changed: make(chan struct{}, 1), lines: make(chan *pb.LogChunk, 100),
	}
	server := grpc.NewServer()
	pb.RegisterAgentsServer(server, s)
	serving := make(chan error, 1)
	go func() { serving <- server.Serve(listener) }()
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	dir, program := t.TempDir(), runtimetest.Program(t)
	runtime, err := process.New(process.Config{ClusterID: runtimetest.Cluster, NodeID: runtimetest.Node, Dir: filepath.Join(dir, "process")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		if err := <-serving; err != nil {
			t.Error(err)
		}
		left, err := runtime.List(context.Background())
		if err != nil {
			t.Error(err)
		}
		for _, in := range left {
			if err := runtime.Remove(context.Background(), in, 0); err != nil {
				t.Error(err)
			}
		}
	})
	metrics := prometheus.NewRegistry()
	start := func(reg prometheus.Registerer) (stop func()) {
		a, err := agent.New(agent.Config{
			NodeID: runtimetest.Node, ClusterID: runtimetest.Cluster, Incarnation: "i1", DataDir: filepath.Join(dir, "agent"),
			Servers:  func() []string { return []string{listener.Addr().String()} },
			Dial:     func(context.Context, string) (pb.AgentsClient, error) { return pb.NewAgentsClient(conn), nil },
			Runtimes: []agent.Runtime{runtime}, Registerer: reg,
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	item := func(id string, args ...string) *pb.DesiredItem {
		return runtimetest.Item(id, &pb.WorkloadSpec{Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: program, Args: args}}})
	}
	running := func(id string) func(map[string]*pb.Replica) bool {
		return func(all map[string]*pb.Replica) bool { return all[id].GetState() == pb.State_RUNNING }
	}

	stop := start(nil)
	bad := item("bad")
	bad.Spec.GetProcess().Command = "/no/such/program"
	s.desire(t, item("steady", "wait"), item("brittle", "wait"), bad)
	s.await(t, "both run", func(all map[string]*pb.Replica) bool { return running("steady")(all) && running("brittle")(all) })
	s.await(t, "the bad one has failed", func(all map[string]*pb.Replica) bool {
		return all["bad"].GetState() == pb.State_FAILED && all["bad"].GetReason().GetCode() == pb.ReasonCode_BAD_COMMAND
	})
	steady := s.replicas["steady"]

	stop()
	pids := func(id string) (found []int) {
		entries, err := os.ReadDir("/proc")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
			exe, exeErr := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
			if err == nil && exeErr == nil && exe == program && strings.Contains(string(env), "PERSYS_WORKLOAD="+id+"\x00") {
				var pid int
				for _, digit := range e.Name() {
					pid = pid*10 + int(digit-'0')
				}
				found = append(found, pid)
			}
		}
		return found
	}
	if p := pids("steady"); len(p) != 1 {
		t.Fatalf("without an agent %d processes run, want one", len(p))
	}
	// It dies while nobody looks.
	for _, pid := range pids("brittle") {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	stop = start(metrics)
	s.await(t, "the brittle one was restarted", func(all map[string]*pb.Replica) bool {
		return running("brittle")(all) && all["brittle"].GetRestarts() == 1
	})
	drifted := func(id string, kind pb.DriftKind) func(map[string]*pb.Replica) bool {
		return func(map[string]*pb.Replica) bool {
			return slices.ContainsFunc(s.drifts, func(d *pb.Drift) bool { return d.WorkloadId == id && d.Kind == kind })
		}
	}
	s.await(t, "that it was killed is told", drifted("brittle", pb.DriftKind_STATE_MISMATCH))
	if now := s.replicas["steady"]; !now.GetStartTime().AsTime().Equal(steady.GetStartTime().AsTime()) || now.GetRestarts() != 0 {
		t.Errorf("a restart of the agent touched it: %v, before %v", now, steady)
	}
	s.mu.Lock()
	for stream := range s.streams {
		if err := stream.Send(&pb.ServerMessage{Message: &pb.ServerMessage_Open{Open: &pb.OpenTunnel{
			StreamId: "t", What: &pb.OpenTunnel_Logs{Logs: &pb.WorkloadLogsRequest{Id: "steady"}},
		}}}); err != nil {
			t.Error(err)
		}
	}
	s.mu.Unlock()
	for line := range s.lines {
		if string(line.GetLine()) != "ready" || line.GetNodeId() != runtimetest.Node || line.GetReplica() != 2 {
			t.Errorf("line: %v", line)
		}
	}
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, f := range families {
		names[f.GetName()] = true
	}
	for _, want := range []string{"persys_agent_workloads", "persys_agent_apply_duration_seconds", "persys_agent_failures_total", "persys_agent_runtime_healthy", "persys_agent_restarts_total"} {
		if !names[want] {
			t.Errorf("no metric %s in %v", want, names)
		}
	}

	// Its records are taken away and it is killed: it is made anew.
	records, err := filepath.Glob(filepath.Join(dir, "process", "brittle-*"))
	if err != nil || len(records) != 1 {
		t.Fatalf("records %v: %v", records, err)
	}
	if err := os.Rename(records[0], filepath.Join(dir, "taken")); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids("brittle") {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	s.await(t, "that it is missing is told", drifted("brittle", pb.DriftKind_MISSING_ON_AGENT))
	s.await(t, "it runs again", running("brittle"))

	s.desire(t, item("brittle", "wait"))
	s.await(t, "the steady one is gone", func(all map[string]*pb.Replica) bool { return all["steady"] == nil && all["bad"] == nil })
	if p := pids("steady"); len(p) != 0 {
		t.Errorf("processes %v are left", p)
	}
	stop()
}
