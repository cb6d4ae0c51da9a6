package server

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/gateway"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	helloTimeout  = 10 * time.Second
	tunnelTimeout = 10 * time.Second
	// Messages to an agent that wait to be sent; one that does not read is cut off.
	sessionQueue = 64
)

// sessions are the agents attached to this replica. It serves pb.Agents: what
// agents say goes to the relay, what the keyspace wants of them goes out.
type sessions struct {
	pb.UnimplementedAgentsServer

	log     *slog.Logger
	desired *desired
	view    func() *fsm.View
	// fresh returns a view that holds everything committed before the call.
	fresh   func(context.Context) (*fsm.View, error)
	welcome func() *pb.Welcome

	mu      sync.Mutex
	byNode  map[string]*session
	lanes   [lanes]lane
	tunnels map[string]*tunnel
}

func newSessions(log *slog.Logger, d *desired, view func() *fsm.View, fresh func(context.Context) (*fsm.View, error), welcome func() *pb.Welcome) *sessions {
	return &sessions{
		log: log, desired: d, view: view, fresh: fresh, welcome: welcome,
		byNode:  map[string]*session{},
		lanes:   [lanes]lane{{wake: make(chan struct{}, 1)}, {wake: make(chan struct{}, 1)}},
		tunnels: map[string]*tunnel{},
	}
}

// session is one attached agent.
type session struct {
	node  string
	hello *pb.AgentHello
	out   chan *pb.ServerMessage
	stop  context.CancelCauseFunc

	// Guarded by sessions.mu.
	loads [lanes]load
	// Closed when the leader has accepted the hello.
	accepted   chan struct{}
	isAccepted bool
}

// Session serves one agent until either side ends it.
func (s *sessions) Session(stream pb.Agents_SessionServer) error {
	hello, err := s.receiveHello(stream)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(stream.Context())
	defer stop(nil)
	se := &session{
		node: hello.NodeId, hello: hello, stop: stop,
		out:      make(chan *pb.ServerMessage, sessionQueue),
		accepted: make(chan struct{}),
	}
	s.attach(se)
	defer s.detach(se)
	s.log.Info("agent attached", "node", se.node, "version", hello.Version)

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.pushDesired(ctx, se) })
	group.Go(func() error { return sendAll(ctx, stream, se.out) })
	// Recv returns when the handler does, so it is not waited for.
	received := make(chan error, 1)
	go func() { received <- s.receive(stream, se) }()
	group.Go(func() error {
		select {
		case err := <-received:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	err = group.Wait()
	s.log.Info("agent detached", "node", se.node, "reason", err)
	return err
}

func (s *sessions) receiveHello(stream pb.Agents_SessionServer) (*pb.AgentHello, error) {
	first := make(chan *pb.AgentMessage, 1)
	failed := make(chan error, 1)
	go func() {
		m, err := stream.Recv()
		if err != nil {
			failed <- err
			return
		}
		first <- m
	}()
	select {
	case err := <-failed:
		return nil, err
	case <-time.After(helloTimeout):
		return nil, status.Errorf(codes.DeadlineExceeded, "no hello within %s", helloTimeout)
	case m := <-first:
		hello := m.GetHello()
		if hello == nil {
			return nil, status.Error(codes.InvalidArgument, "the first message of a session must be hello")
		}
		id, ok := gateway.IdentityFrom(stream.Context())
		if !ok || id.Role != pb.Role_ROLE_AGENT || id.Name != hello.NodeId {
			return nil, status.Errorf(codes.PermissionDenied, "certificate of %q can't speak for node %q", id.Name, hello.NodeId)
		}
		return hello, nil
	}
}

// attach registers the session, ends an older one of the same node, and queues
// its hello.
func (s *sessions) attach(se *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.byNode[se.node]; old != nil {
		old.stop(status.Error(codes.Aborted, "the agent opened another session"))
	}
	s.byNode[se.node] = se
	s.pending(se, beats).Hello = se.hello
}

func (s *sessions) detach(se *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byNode[se.node] == se {
		delete(s.byNode, se.node)
	}
}

func (s *sessions) receive(stream pb.Agents_SessionServer, se *session) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		switch {
		case m.GetHeartbeat() != nil, m.GetStatus() != nil:
			if !s.take(se, m) {
				return status.Error(codes.ResourceExhausted, "too many unacknowledged status reports; report again in full")
			}
		case m.GetRefused() != nil:
			s.refuseTunnel(se.node, m.GetRefused())
		default:
			return status.Error(codes.InvalidArgument, "a session carries hello once, then heartbeat, status and refused")
		}
	}
}

// take queues a heartbeat or a report; it is false where too many reports wait.
func (s *sessions) take(se *session, m *pb.AgentMessage) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := m.GetHeartbeat()
	if h == nil {
		report := s.pending(se, statuses)
		report.Status = append(report.Status, m.GetStatus())
		return len(report.Status) <= sessionQueue
	}
	report := s.pending(se, beats)
	report.Heartbeat = h
	if len(h.Runtimes) > 0 {
		// A copy: the relay may be sending the old one.
		hello := proto.CloneOf(se.hello)
		hello.Runtimes = h.Runtimes
		se.hello, report.Hello = hello, hello
	}
	return true
}

// pushDesired greets the agent once the leader has accepted it, and from then
// on tells it what it is to run.
func (s *sessions) pushDesired(ctx context.Context, se *session) error {
	select {
	case <-se.accepted:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := se.post(&pb.ServerMessage{Message: &pb.ServerMessage_Welcome{Welcome: s.welcome()}}); err != nil {
		return err
	}
	// The first set must not be older than what any other replica has told.
	v, err := s.fresh(ctx)
	if err != nil {
		return status.Errorf(codes.Unavailable, "desired set: %v", err)
	}
	if err := s.desired.picture.reached(ctx, v.Revision()); err != nil {
		return err
	}
	sub := s.desired.subscribe(se.node)
	defer sub.close()
	for {
		set, err := sub.next(ctx, s.view)
		if err != nil {
			return err
		}
		if err := se.post(&pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: set}}); err != nil {
			return err
		}
		select {
		case <-time.After(desiredGap):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// post hands a message to the sender; it never blocks.
func (se *session) post(m *pb.ServerMessage) error {
	select {
	case se.out <- m:
		return nil
	default:
		return status.Errorf(codes.ResourceExhausted, "agent %s does not read its session", se.node)
	}
}

func sendAll(ctx context.Context, stream pb.Agents_SessionServer, out <-chan *pb.ServerMessage) error {
	for {
		select {
		case m := <-out:
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// attached reports whether the node's agent has a session here.
func (s *sessions) attached(node string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byNode[node] != nil
}

// tunnel is a stream that an agent was asked to open.
type tunnel struct {
	node   string
	opened chan pb.Agents_TunnelServer
	failed chan error
	done   chan struct{} // closed when the user of the tunnel has finished
}

// open asks the node's agent for a tunnel and waits until it is there. The
// caller must call the returned function when it has finished with it.
func (s *sessions) open(ctx context.Context, node string, request *pb.OpenTunnel) (pb.Agents_TunnelServer, func(), error) {
	t := &tunnel{node: node, opened: make(chan pb.Agents_TunnelServer, 1), failed: make(chan error, 1), done: make(chan struct{})}
	request.StreamId = uuid.NewString()
	s.mu.Lock()
	se := s.byNode[node]
	if se != nil {
		s.tunnels[request.StreamId] = t
	}
	s.mu.Unlock()
	if se == nil {
		return nil, nil, status.Errorf(codes.Unavailable, "node %s is not attached", node)
	}
	finish := sync.OnceFunc(func() {
		s.mu.Lock()
		delete(s.tunnels, request.StreamId)
		s.mu.Unlock()
		close(t.done)
	})
	if err := se.post(&pb.ServerMessage{Message: &pb.ServerMessage_Open{Open: request}}); err != nil {
		finish()
		return nil, nil, err
	}
	timeout := time.NewTimer(tunnelTimeout)
	defer timeout.Stop()
	var err error
	select {
	case stream := <-t.opened:
		return stream, finish, nil
	case err = <-t.failed:
	case <-timeout.C:
		err = status.Errorf(codes.DeadlineExceeded, "node %s did not answer within %s", node, tunnelTimeout)
	case <-ctx.Done():
		err = ctx.Err()
	}
	finish()
	return nil, nil, err
}

// Tunnel is called by an agent that was asked to.
func (s *sessions) Tunnel(stream pb.Agents_TunnelServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	s.mu.Lock()
	t := s.tunnels[first.StreamId]
	s.mu.Unlock()
	id, ok := gateway.IdentityFrom(stream.Context())
	if t == nil || !ok || id.Name != t.node {
		return status.Error(codes.NotFound, "no such stream was asked for")
	}
	select {
	case t.opened <- stream:
	default:
		return status.Error(codes.AlreadyExists, "the stream is open already")
	}
	select {
	case <-t.done:
		return nil
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
}

func (s *sessions) refuseTunnel(node string, r *pb.TunnelRefused) {
	s.mu.Lock()
	t := s.tunnels[r.StreamId]
	s.mu.Unlock()
	if t == nil || t.node != node {
		return
	}
	select {
	case t.failed <- status.Error(codes.FailedPrecondition, fmt.Sprintf("node %s: %s", node, r.Message)):
	default:
	}
}
