package cli

import (
	"bytes"
	"context"
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

var update = flag.Bool("update", false, "rewrite the recorded answers in testdata")

// golden compares with a recorded answer.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test ./internal/cli -update makes it)", err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", path, got, want)
	}
}

// fakeCluster is a replica that answers with what the test put in. What a test
// sets is set before the first call.
type fakeCluster struct {
	pb.UnimplementedWorkloadsServer
	pb.UnimplementedNodesServer
	pb.UnimplementedClusterServer

	mu        sync.Mutex
	calls     []string
	requests  []proto.Message
	workloads map[string]*pb.Workload
	nodes     []*pb.Node
	members   []*pb.Member
	tokens    []*pb.Token
	events    []*pb.Event
	tolerance int32
	scheduler *pb.SchedulerConfig
	// Where set, calls fail with it: all, or the first so many.
	fail     error
	failures int
	// What WatchWorkloads tells, one after the other; then it waits.
	changes []*pb.WorkloadChange
	// Log lines; with breaks, each stream ends as unavailable after them.
	logs   []*pb.LogChunk
	breaks bool
	// Services beside these.
	more func(*grpc.Server)
}

func (f *fakeCluster) note(method string, request proto.Message) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, method)
	f.requests = append(f.requests, request)
	err := f.fail
	if f.failures > 0 {
		if f.failures--; f.failures == 0 {
			f.fail = nil
		}
	}
	return err
}

func (f *fakeCluster) called(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, c := range f.calls {
		if c == method {
			n++
		}
	}
	return n
}

// lastRequest is the newest request of type T.
func lastRequest[T proto.Message](t *testing.T, f *fakeCluster) T {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := len(f.requests) - 1; i >= 0; i-- {
		if r, ok := f.requests[i].(T); ok {
			return r
		}
	}
	var none T
	t.Fatalf("no %T arrived; calls: %v", none, f.calls)
	return none
}

func (f *fakeCluster) find(id string) (*pb.Workload, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if w := f.workloads[id]; w != nil {
		return w, nil
	}
	return nil, status.Errorf(codes.NotFound, "not found")
}

func (f *fakeCluster) ApplyWorkload(_ context.Context, r *pb.ApplyWorkloadRequest) (*pb.ApplyWorkloadResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.workloads[r.Spec.Id]
	if old != nil && r.CreateOnly {
		return nil, status.Errorf(codes.AlreadyExists, "exists already")
	}
	w := &pb.Workload{Spec: r.Spec, Revision: "r1", ResourceVersion: 10}
	if f.workloads == nil {
		f.workloads = map[string]*pb.Workload{}
	}
	f.workloads[r.Spec.Id] = w
	outcome := pb.ApplyWorkloadResponse_CREATED
	if old != nil {
		outcome = pb.ApplyWorkloadResponse_UPDATED
	}
	return &pb.ApplyWorkloadResponse{Outcome: outcome, Workload: w}, nil
}

// PlanWorkload knows no field but the image.
func (f *fakeCluster) PlanWorkload(_ context.Context, r *pb.ApplyWorkloadRequest) (*pb.WorkloadPlan, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.workloads[r.Spec.Id]
	switch {
	case old == nil:
		return &pb.WorkloadPlan{
			Outcome: pb.ApplyWorkloadResponse_CREATED, Revision: "r1",
			Changes: []*pb.FieldChange{{Path: "id", New: r.Spec.Id}},
			Placements: []*pb.PlannedChange{
				{WorkloadId: r.Spec.Id, Action: pb.PlannedChange_PLACE, NodeId: "n1", Explanation: "emptiest of 2 that match"},
				{WorkloadId: r.Spec.Id, Replica: 1, Action: pb.PlannedChange_WAIT, Explanation: "cpu (2 nodes)"},
			},
			Pending: []string{"1 replica is without a place", "2 nodes: cpu: 2 wanted, 1 free at most"},
		}, nil
	case r.CreateOnly:
		return nil, status.Errorf(codes.AlreadyExists, "exists already")
	case old.Spec.GetContainer().GetImage() == r.Spec.GetContainer().GetImage():
		return &pb.WorkloadPlan{Revision: "r1", Unchanged: 2}, nil
	}
	return &pb.WorkloadPlan{
		Outcome: pb.ApplyWorkloadResponse_UPDATED, Revision: "r2",
		Changes: []*pb.FieldChange{{Path: "container.image", Old: old.Spec.GetContainer().GetImage(), New: r.Spec.GetContainer().GetImage()}, {Path: "env.A", New: "1"}},
		Placements: []*pb.PlannedChange{
			{WorkloadId: r.Spec.Id, Action: pb.PlannedChange_REPLACE, NodeId: "n1", Explanation: "step 1 of 2: where it was; new revision"},
			{WorkloadId: r.Spec.Id, Replica: 1, Action: pb.PlannedChange_MOVE, NodeId: "n1", FromNodeId: "n2", Explanation: "step 2 of 2: emptiest of 2 that match; new revision"},
		},
	}, nil
}

func (f *fakeCluster) GetWorkload(_ context.Context, r *pb.GetWorkloadRequest) (*pb.Workload, error) {
	return f.find(r.Id)
}

func (f *fakeCluster) ListWorkloads(context.Context, *pb.ListWorkloadsRequest) (*pb.ListWorkloadsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := &pb.ListWorkloadsResponse{Revision: 42}
	for _, id := range sortedKeys(f.workloads) {
		answer.Workloads = append(answer.Workloads, f.workloads[id])
	}
	return answer, nil
}

func sortedKeys(m map[string]*pb.Workload) []string {
	c := userConfig{Contexts: map[string]*clusterContext{}}
	for k := range m {
		c.Contexts[k] = nil
	}
	return c.names()
}

func (f *fakeCluster) DeleteWorkload(_ context.Context, r *pb.DeleteWorkloadRequest) (*pb.Workload, error) {
	w, err := f.find(r.Id)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.workloads, r.Id)
	return w, err
}

func (f *fakeCluster) ScaleWorkload(_ context.Context, r *pb.ScaleWorkloadRequest) (*pb.Workload, error) {
	return f.find(r.Id)
}

func (f *fakeCluster) RestartWorkload(_ context.Context, r *pb.WorkloadRequest) (*pb.Workload, error) {
	return f.find(r.Id)
}

func (f *fakeCluster) RunWorkload(_ context.Context, r *pb.WorkloadRequest) (*pb.Workload, error) {
	if _, err := f.find(r.Id); err != nil {
		return nil, err
	}
	return &pb.Workload{Spec: &pb.WorkloadSpec{Id: r.Id + "-29924640-1", Kind: pb.WorkloadKind_JOB}, Parent: r.Id}, nil
}

func (f *fakeCluster) ExplainWorkload(_ context.Context, r *pb.WorkloadRequest) (*pb.Explanation, error) {
	if _, err := f.find(r.Id); err != nil {
		return nil, err
	}
	return &pb.Explanation{
		Id: r.Id, State: pb.State_PENDING, Lines: []string{"no node fits: cpu (2 nodes), label zone=eu (1 node)"},
		Replicas: []*pb.ReplicaExplanation{{Replica: 0, State: pb.State_RUNNING, NodeId: "n1", Message: "emptiest of 3"}, {Replica: 1, State: pb.State_PENDING, Reason: &pb.Reason{Code: pb.ReasonCode_NO_PLACEMENT}}},
	}, nil
}

func (f *fakeCluster) WatchWorkloads(_ *pb.WatchWorkloadsRequest, s grpc.ServerStreamingServer[pb.WorkloadChange]) error {
	f.mu.Lock()
	changes := f.changes
	f.mu.Unlock()
	for _, c := range changes {
		if err := s.Send(c); err != nil {
			return err
		}
	}
	<-s.Context().Done()
	return nil
}

func (f *fakeCluster) WorkloadLogs(r *pb.WorkloadLogsRequest, s grpc.ServerStreamingServer[pb.LogChunk]) error {
	for _, l := range f.logs {
		if r.Since != nil && l.Time.AsTime().Before(r.Since.AsTime()) {
			continue
		}
		if err := s.Send(l); err != nil {
			return err
		}
	}
	if f.breaks {
		return status.Error(codes.Unavailable, "shutting down")
	}
	return nil
}

func (f *fakeCluster) ListNodes(context.Context, *pb.ListNodesRequest) (*pb.ListNodesResponse, error) {
	return &pb.ListNodesResponse{Nodes: f.nodes}, nil
}

func (f *fakeCluster) GetNode(_ context.Context, r *pb.NodeRequest) (*pb.Node, error) {
	for _, n := range f.nodes {
		if n.Id == r.Id {
			return n, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "not found")
}

// DrainNode is done at once.
func (f *fakeCluster) DrainNode(ctx context.Context, r *pb.DrainNodeRequest) (*pb.Node, error) {
	n, err := f.GetNode(ctx, &pb.NodeRequest{Id: r.Id})
	if err != nil {
		return nil, err
	}
	n.Draining, n.Unschedulable, n.Assignments = true, true, 0
	return n, nil
}

func (f *fakeCluster) GetSchedulerConfig(context.Context, *pb.SchedulerConfigRequest) (*pb.SchedulerConfig, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.scheduler == nil {
		f.scheduler = model.EffectiveSchedulerConfig(nil)
	}
	return f.scheduler, nil
}

func (f *fakeCluster) SetSchedulerConfig(_ context.Context, c *pb.SchedulerConfig) (*pb.SchedulerConfig, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.scheduler = model.EffectiveSchedulerConfig(c)
	return f.scheduler, nil
}

func (f *fakeCluster) LabelNode(ctx context.Context, r *pb.LabelNodeRequest) (*pb.Node, error) {
	n, err := f.GetNode(ctx, &pb.NodeRequest{Id: r.Id})
	if err != nil {
		return nil, err
	}
	n = proto.CloneOf(n)
	n.UserLabels = r.Set
	return n, nil
}

func (f *fakeCluster) TaintNode(ctx context.Context, r *pb.TaintNodeRequest) (*pb.Node, error) {
	n, err := f.GetNode(ctx, &pb.NodeRequest{Id: r.Id})
	if err != nil {
		return nil, err
	}
	n = proto.CloneOf(n)
	n.UserTaints = r.Set
	return n, nil
}

func (f *fakeCluster) GetClusterSummary(context.Context, *pb.ClusterSummaryRequest) (*pb.ClusterSummary, error) {
	return &pb.ClusterSummary{
		Cluster: &pb.ClusterInfo{Id: "c1"}, Leader: "s1", Epoch: 3, Voters: 3, FailureTolerance: 1, Nodes: 2, NodesReady: 2,
		WorkloadsByState: map[string]int32{"RUNNING": 3, "PENDING": 1}, Capacity: &pb.NodeCapacity{CpuMillis: 4000, MemoryBytes: 8 << 30},
		Reserved: &pb.NodeCapacity{CpuMillis: 1500, MemoryBytes: 1 << 30}, Revision: 42, Version: "v1",
	}, nil
}

func (f *fakeCluster) ListMembers(context.Context, *pb.ListMembersRequest) (*pb.ListMembersResponse, error) {
	return &pb.ListMembersResponse{Members: f.members, FailureTolerance: f.tolerance}, nil
}

func (f *fakeCluster) RemoveMember(context.Context, *pb.MemberRequest) (*pb.ListMembersResponse, error) {
	return &pb.ListMembersResponse{Members: f.members, FailureTolerance: f.tolerance}, nil
}

func (f *fakeCluster) CreateToken(_ context.Context, r *pb.CreateTokenRequest) (*pb.CreateTokenResponse, error) {
	end := timestamppb.New(time.Now().Add(r.Ttl.AsDuration() + time.Minute))
	return &pb.CreateTokenResponse{Token: &pb.Token{Id: "t1", Role: r.Role, UsesLeft: r.Uses, ExpireTime: end}, Secret: "persys1-" + strings.ToLower(r.Role.String())}, nil
}

func (f *fakeCluster) ListTokens(context.Context, *pb.ListTokensRequest) (*pb.ListTokensResponse, error) {
	return &pb.ListTokensResponse{Tokens: f.tokens}, nil
}

func (f *fakeCluster) ListEvents(context.Context, *pb.ListEventsRequest) (*pb.ListEventsResponse, error) {
	return &pb.ListEventsResponse{Events: f.events}, nil
}

func (f *fakeCluster) WatchEvents(_ *pb.WatchEventsRequest, s grpc.ServerStreamingServer[pb.Event]) error {
	for _, e := range f.events {
		if err := s.Send(e); err != nil {
			return err
		}
	}
	if f.breaks {
		return status.Error(codes.Unavailable, "shutting down")
	}
	return nil
}

// trust is the certificates of a test's cluster.
type trust struct {
	t         *testing.T
	authority *pki.Authority
}

func newTrust(t *testing.T) *trust {
	t.Helper()
	authority, err := pki.NewAuthority("test")
	if err != nil {
		t.Fatal(err)
	}
	return &trust{t, authority}
}

func (x *trust) issue(role pb.Role, name string, ttl time.Duration) *pki.Credentials {
	x.t.Helper()
	key, csr, err := pki.NewKeyAndCSR(name)
	if err != nil {
		x.t.Fatal(err)
	}
	chain, _, _, err := x.authority.Issue(csr, pki.Identity{Cluster: "test", Role: role, Name: name}, nil, ttl)
	if err != nil {
		x.t.Fatal(err)
	}
	creds, err := pki.NewCredentials(key, chain, x.authority.Roots())
	if err != nil {
		x.t.Fatal(err)
	}
	return creds
}

func (x *trust) context(endpoints ...string) *clusterContext {
	x.t.Helper()
	certificate, key, roots, err := x.issue(pb.Role_ROLE_ADMIN, "admin", time.Hour).PEM()
	if err != nil {
		x.t.Fatal(err)
	}
	return &clusterContext{Endpoints: endpoints, CA: string(roots), Cert: string(certificate), Key: string(key)}
}

// serve runs the replica until the test ends and returns its address.
func (x *trust) serve(f *fakeCluster) string {
	x.t.Helper()
	address, _ := x.serveUntil(f)
	return address
}

func (x *trust) serveUntil(f *fakeCluster) (address string, stop func()) {
	x.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		x.t.Fatal(err)
	}
	creds := x.issue(pb.Role_ROLE_SERVER, "s1", time.Hour)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(creds.ServerTLS("h2"))),
		grpc.UnaryInterceptor(func(ctx context.Context, r any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := f.note(info.FullMethod, r.(proto.Message)); err != nil {
				return nil, err
			}
			return next(ctx, r)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := f.note(info.FullMethod, nil); err != nil {
				return err
			}
			return next(srv, ss)
		}))
	pb.RegisterWorkloadsServer(s, f)
	pb.RegisterNodesServer(s, f)
	pb.RegisterClusterServer(s, f)
	if f.more != nil {
		f.more(s)
	}
	go func() { _ = s.Serve(l) }()
	x.t.Cleanup(s.Stop)
	return l.Addr().String(), s.Stop
}

// user is somebody who types commands.
type user struct {
	t    *testing.T
	home string
	env  map[string]string
	in   string
	node Node
}

func newUser(t *testing.T) *user {
	return &user{t: t, home: t.TempDir(), env: map[string]string{}}
}

// knows writes a context for the cluster and makes it the current one.
func (u *user) knows(x *trust, endpoints ...string) *user {
	u.t.Helper()
	err := updateUserConfig(u.config(), func(c *userConfig) error { return c.add("test", x.context(endpoints...), true) })
	if err != nil {
		u.t.Fatal(err)
	}
	return u
}

func (u *user) config() string { return filepath.Join(u.home, "persys", "config.yaml") }

// typed is what a command line led to.
type typed struct {
	code        int
	out, errors string
}

func (u *user) types(args ...string) typed {
	return u.typesUntil(context.Background(), args...)
}

func (u *user) typesUntil(ctx context.Context, args ...string) typed {
	var out, errs syncBuffer
	code := Main(ctx, args, Env{
		Stdin: strings.NewReader(u.in), Stdout: &out, Stderr: &errs,
		LookupEnv: func(k string) (string, bool) { v, ok := u.env[k]; return v, ok },
		ConfigDir: func() (string, error) { return u.home, nil },
		Version:   "v0", Node: u.node,
	})
	return typed{code, out.String(), errs.String()}
}

// syncBuffer is written by more than one goroutine.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// deadAddress is where nobody listens.
func deadAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// frozenAddress accepts connections, as a kernel does for a stopped process,
// and never answers.
func frozenAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// nodeOf is the functions of a machine that does nothing but be there.
func nodeOf(x *trust, f *fakeCluster, made *server.Config) Node {
	return Node{
		Init: func(_ context.Context, c server.Config) error { *made = c; return nil },
		Join: func(_ context.Context, c server.Config, _ string) (pb.Role, error) {
			*made = c
			return pb.Role_ROLE_AGENT, nil
		},
		Run: func(ctx context.Context, c server.Config) error {
			*made = c
			l, err := net.Listen("tcp", hostPort(c.Bind, c.GRPCPort))
			if err != nil {
				return err
			}
			s := grpc.NewServer(grpc.Creds(credentials.NewTLS(x.issue(pb.Role_ROLE_SERVER, c.Name, time.Hour).ServerTLS("h2"))))
			pb.RegisterWorkloadsServer(s, f)
			pb.RegisterNodesServer(s, f)
			pb.RegisterClusterServer(s, f)
			served := make(chan struct{})
			go func() {
				defer close(served)
				_ = s.Serve(l) // closes the listener
			}()
			<-ctx.Done()
			s.Stop()
			<-served
			return nil
		},
		AdminContext: func(string) (certificate, key, roots []byte, err error) {
			return x.issue(pb.Role_ROLE_ADMIN, "admin", time.Hour).PEM()
		},
	}
}
