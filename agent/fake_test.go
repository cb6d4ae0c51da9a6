package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// fakeRuntime is what a container engine looks like from here. It outlives agents.
type fakeRuntime struct {
	mu        sync.Mutex
	instances map[string]Instance
	next      int
	down      bool
	// refuse and hold are by workload: Apply fails, or waits until it is closed.
	refuse map[string]error
	hold   map[string]chan struct{}
	// halves: an Apply that is cut off while it waits leaves what it made.
	halves bool
	// hidden: instances are there and not listed.
	hidden bool
	// prepare fails Prepare, by workload.
	prepare map[string]error
	// trouble delays Stop and Remove by workload.
	slowStop map[string]time.Duration
	calls    []string
	watchers map[int]func()
	logs     map[string][]*pb.LogChunk
}

func newFakeRuntime() *fakeRuntime {
	return &fakeRuntime{
		instances: map[string]Instance{}, refuse: map[string]error{}, hold: map[string]chan struct{}{}, prepare: map[string]error{},
		slowStop: map[string]time.Duration{}, watchers: map[int]func(){}, logs: map[string][]*pb.LogChunk{},
	}
}

var errDown = &Error{Code: pb.ReasonCode_RUNTIME_UNAVAILABLE, Message: "the engine is down", Retryable: true}

func (f *fakeRuntime) Type() pb.WorkloadType { return pb.WorkloadType_CONTAINER }

func (f *fakeRuntime) Info(context.Context) *pb.RuntimeInfo {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &pb.RuntimeInfo{Type: f.Type(), Name: "fake", Healthy: !f.down}
}

func (f *fakeRuntime) List(context.Context) ([]Instance, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return nil, errDown
	}
	if f.hidden {
		return nil, nil
	}
	return slices.Collect(maps.Values(f.instances)), nil
}

func (f *fakeRuntime) Prepare(_ context.Context, w Work) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.prepare[w.Key().Workload]
}

func (f *fakeRuntime) Apply(ctx context.Context, w Work) (Instance, error) {
	f.mu.Lock()
	f.calls = append(f.calls, fmt.Sprintf("apply %s gen=%d", w.Key(), w.Item.GetAssignment().GetGeneration()))
	hold, refuse, down := f.hold[w.Key().Workload], f.refuse[w.Key().Workload], f.down
	f.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			if f.halves {
				f.make(w)
			}
			return Instance{}, ctx.Err()
		}
	}
	switch {
	case down:
		return Instance{}, errDown
	case refuse != nil:
		return Instance{}, refuse
	}
	return f.make(w), nil
}

func (f *fakeRuntime) make(w Work) Instance {
	f.mu.Lock()
	defer f.mu.Unlock()
	labels := LabelsOf("c", "n1", w)
	for id, in := range f.instances {
		if in.Key == labels.Key && in.Generation == labels.Generation && in.UID == labels.UID {
			in.Phase, in.Started = Running, time.Now()
			f.instances[id] = in
			return in
		}
	}
	f.next++
	in := Instance{Labels: labels, ID: fmt.Sprintf("i%d", f.next), Type: f.Type(), Phase: Running, Started: time.Now()}
	f.instances[in.ID] = in
	return in
}

func (f *fakeRuntime) end(ctx context.Context, in Instance, grace time.Duration, what string) error {
	f.mu.Lock()
	f.calls = append(f.calls, fmt.Sprintf("%s %s gen=%d", what, in.Key, in.Generation))
	slow := min(f.slowStop[in.Key.Workload], grace)
	f.mu.Unlock()
	if slow > 0 {
		if sleep(ctx, slow); ctx.Err() != nil {
			return ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return errDown
	}
	return nil
}

func (f *fakeRuntime) Stop(ctx context.Context, in Instance, grace time.Duration) error {
	if err := f.end(ctx, in, grace, "stop"); err != nil {
		return err
	}
	f.crash(in.ID, 143)
	return nil
}

func (f *fakeRuntime) Remove(ctx context.Context, in Instance, grace time.Duration) error {
	if err := f.end(ctx, in, grace, "remove"); err != nil {
		return err
	}
	f.mu.Lock()
	delete(f.instances, in.ID)
	f.mu.Unlock()
	f.announce()
	return nil
}

func (f *fakeRuntime) Watch(ctx context.Context, changed func()) error {
	f.mu.Lock()
	f.next++
	n := f.next
	f.watchers[n] = changed
	f.mu.Unlock()
	<-ctx.Done()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.watchers, n)
	return nil
}

func (f *fakeRuntime) Logs(_ context.Context, in Instance, req *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error {
	f.mu.Lock()
	lines := slices.Clone(f.logs[in.ID])
	f.mu.Unlock()
	for _, c := range lines {
		if req.Since != nil && c.GetTime().AsTime().Before(req.GetSince().AsTime()) {
			continue
		}
		if err := send(&pb.LogChunk{Line: c.GetLine(), Time: c.GetTime()}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeRuntime) announce() {
	f.mu.Lock()
	watchers := slices.Collect(maps.Values(f.watchers))
	f.mu.Unlock()
	for _, changed := range watchers {
		changed()
	}
}

// crash ends a run by itself.
func (f *fakeRuntime) crash(id string, code int32) {
	f.mu.Lock()
	if in, ok := f.instances[id]; ok && in.Phase == Running {
		in.Phase, in.ExitCode, in.Finished = Exited, code, time.Now()
		f.instances[id] = in
	}
	f.mu.Unlock()
	f.announce()
}

func (f *fakeRuntime) set(change func()) {
	f.mu.Lock()
	change()
	f.mu.Unlock()
	f.announce()
}

func (f *fakeRuntime) running() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []string
	for _, in := range f.instances {
		if in.Phase == Running {
			all = append(all, fmt.Sprintf("%s gen=%d %s", in.Key, in.Generation, in.ID))
		}
	}
	slices.Sort(all)
	return all
}

func (f *fakeRuntime) called() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// fakeServer is one replica, as scripted by a test.
type fakeServer struct {
	pb.UnimplementedAgentsServer
	address  string
	listener *bufconn.Listener
	conn     *grpc.ClientConn
	server   *grpc.Server
	attached chan *fakeSession
	tunnels  chan pb.Agents_TunnelServer
}

func newFakeServer(t *testing.T, address string) *fakeServer {
	s := &fakeServer{
		address: address, listener: bufconn.Listen(1 << 20), server: grpc.NewServer(), attached: make(chan *fakeSession),
		tunnels: make(chan pb.Agents_TunnelServer),
	}
	pb.RegisterAgentsServer(s.server, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.server.Serve(s.listener); err != nil {
			t.Errorf("serve: %v", err)
		}
	}()
	var err error
	s.conn, err = grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.conn.Close()
		s.server.Stop()
		<-done
	})
	return s
}

// Session keeps a stream open until the test ends it.
func (s *fakeServer) Session(stream pb.Agents_SessionServer) error {
	one := &fakeSession{stream: stream, server: s, end: make(chan error, 1), acking: true, replicas: map[Key]*pb.Replica{}, removed: map[Key]int64{}, changed: newBroadcast()}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	one.hello = first.GetHello()
	select {
	case s.attached <- one:
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
	go one.read()
	select {
	case err := <-one.end:
		return err
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
}

func (s *fakeServer) Tunnel(stream pb.Agents_TunnelServer) error {
	select {
	case s.tunnels <- stream:
	case <-stream.Context().Done():
	}
	<-stream.Context().Done()
	return nil
}

// fakeSession acknowledges and takes note.
type fakeSession struct {
	stream pb.Agents_SessionServer
	server *fakeServer
	hello  *pb.AgentHello
	end    chan error

	mu sync.Mutex
	// acking: heartbeats and reports are acknowledged.
	acking   bool
	beats    []*pb.Heartbeat
	reports  []*pb.StatusReport
	refusals []*pb.TunnelRefused
	replicas map[Key]*pb.Replica
	removed  map[Key]int64
	drifts   []*pb.Drift
	changed  *broadcast
}

func (s *fakeSession) read() {
	for {
		m, err := s.stream.Recv()
		if err != nil {
			return
		}
		s.mu.Lock()
		var answer *pb.ServerMessage
		switch m := m.GetMessage().(type) {
		case *pb.AgentMessage_Heartbeat:
			s.beats = append(s.beats, m.Heartbeat)
			answer = &pb.ServerMessage{Message: &pb.ServerMessage_HeartbeatAck{HeartbeatAck: &pb.Ack{Seq: m.Heartbeat.GetSeq()}}}
		case *pb.AgentMessage_Status:
			s.reports = append(s.reports, m.Status)
			s.drifts = append(s.drifts, m.Status.GetDrifts()...)
			for _, r := range m.Status.GetReplicas() {
				s.replicas[Key{r.GetWorkloadId(), r.GetReplica()}] = r
			}
			for _, r := range m.Status.GetRemoved() {
				key := Key{r.GetWorkloadId(), r.GetReplica()}
				delete(s.replicas, key)
				s.removed[key] = r.GetGeneration()
			}
			answer = &pb.ServerMessage{Message: &pb.ServerMessage_StatusAck{StatusAck: &pb.Ack{Seq: m.Status.GetSeq()}}}
		case *pb.AgentMessage_Refused:
			s.refusals = append(s.refusals, m.Refused)
		}
		if answer != nil && s.acking {
			_ = s.stream.Send(answer) // the stream may be over
		}
		s.mu.Unlock()
		s.changed.signal()
	}
}

func (s *fakeSession) send(t *testing.T, m *pb.ServerMessage) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.stream.Send(m); err != nil {
		t.Fatalf("send: %v", err)
	}
}

func (s *fakeSession) welcome(t *testing.T, cluster string) {
	t.Helper()
	s.send(t, &pb.ServerMessage{Message: &pb.ServerMessage_Welcome{Welcome: &pb.Welcome{ClusterId: cluster, LeaseTtlSeconds: 10}}})
}

func (s *fakeSession) desire(t *testing.T, complete bool, revision int64, items ...*pb.DesiredItem) {
	t.Helper()
	s.send(t, &pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: &pb.DesiredSet{Complete: complete, Revision: revision, Items: items}}})
}

func (s *fakeSession) drop(t *testing.T, revision int64, keys ...Key) {
	t.Helper()
	set := &pb.DesiredSet{Revision: revision}
	for _, key := range keys {
		set.Removed = append(set.Removed, &pb.ReplicaKey{WorkloadId: key.Workload, Replica: key.Replica})
	}
	s.send(t, &pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: set}})
}

func (s *fakeSession) acks(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.acking = on
}

// await waits until what the agent has said fulfils a condition.
func (s *fakeSession) await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	limit := time.After(5 * time.Minute)
	for {
		next := s.changed.next()
		s.mu.Lock()
		ok := condition()
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-next:
		case <-limit:
			s.mu.Lock()
			defer s.mu.Unlock()
			t.Fatalf("the agent never reported: %s; it said %v, removed %v", what, s.replicas, s.removed)
		}
	}
}

func (s *fakeSession) awaitState(t *testing.T, key Key, state pb.State) *pb.Replica {
	t.Helper()
	var found *pb.Replica
	s.await(t, fmt.Sprintf("%s is %s", key, state), func() bool {
		found = s.replicas[key]
		return found.GetState() == state
	})
	return found
}

// cluster of fake servers with one agent.
type fixture struct {
	t       *testing.T
	dir     string
	servers []*fakeServer
	runtime *fakeRuntime
	down    map[string]bool
	metrics prometheus.Registerer
	// incarnation of the machine; empty: i1.
	incarnation string
	mu          sync.Mutex
	stop        func()
}

func newFixture(t *testing.T, addresses ...string) *fixture {
	f := &fixture{t: t, dir: t.TempDir(), runtime: newFakeRuntime(), down: map[string]bool{}}
	for _, address := range addresses {
		f.servers = append(f.servers, newFakeServer(t, address))
	}
	return f
}

func (f *fixture) config() Config {
	return Config{
		NodeID: "n1", ClusterID: "c", Incarnation: cmp.Or(f.incarnation, "i1"), DataDir: f.dir, Runtimes: []Runtime{f.runtime}, Registerer: f.metrics,
		Servers: func() []string {
			var all []string
			for _, s := range f.servers {
				all = append(all, s.address)
			}
			return all
		},
		Dial: func(_ context.Context, address string) (pb.AgentsClient, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, s := range f.servers {
				if s.address == address && !f.down[address] {
					return pb.NewAgentsClient(s.conn), nil
				}
			}
			return nil, errors.New("connection refused")
		},
	}
}

// start runs an agent; its end is awaited by stop, or at the end of the test.
func (f *fixture) start() {
	f.t.Helper()
	a, err := New(f.config())
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(f.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := a.Run(ctx); err != nil {
			f.t.Errorf("run: %v", err)
		}
	}()
	f.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	f.t.Cleanup(f.stop)
}

// attach waits for a session with any server and welcomes the agent.
func (f *fixture) attach() *fakeSession {
	f.t.Helper()
	s := f.arrival()
	s.welcome(f.t, "c")
	return s
}

func (f *fixture) arrival() *fakeSession {
	f.t.Helper()
	limit := time.After(5 * time.Minute)
	any := make(chan *fakeSession)
	stop := make(chan struct{})
	defer close(stop)
	for _, s := range f.servers {
		go func() {
			select {
			case one := <-s.attached:
				select {
				case any <- one:
				case <-stop:
				}
			case <-stop:
			}
		}()
	}
	select {
	case s := <-any:
		return s
	case <-limit:
		f.t.Fatal("no agent came")
		return nil
	}
}

func container(id string, generation int64, change ...func(*pb.DesiredItem)) *pb.DesiredItem {
	item := &pb.DesiredItem{
		Assignment: &pb.Assignment{
			WorkloadId: id, NodeId: "n1", Generation: generation, Revision: "r1", WorkloadUid: "u-" + id, Type: pb.WorkloadType_CONTAINER,
		},
		Spec: &pb.WorkloadSpec{Id: id, Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "image"}}},
	}
	for _, c := range change {
		c(item)
	}
	return item
}

func exclusive(item *pb.DesiredItem) { item.Assignment.Exclusive = true }
