package agent

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"google.golang.org/grpc"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// heartbeatUsual is the time between heartbeats; it is a third of the lease
	// where that is shorter, and a fifth where that is longer.
	heartbeatUsual = 2 * time.Second
	defaultTTL     = 10 * time.Second

	retryFirst = 100 * time.Millisecond
	retryMost  = 5 * time.Second

	welcomeTimeout = 10 * time.Second
	// listedTimeout is how long the first status report waits for runtimes to be
	// asked for the first time.
	listedTimeout = 5 * time.Second
	// statusAgain is when an unacknowledged report is sent once more.
	statusAgain = 5 * time.Second
	// statusGap gathers changes into one report.
	statusGap = 20 * time.Millisecond

	maxMessage = 64 << 20
)

// sessions keeps the agent attached to one server.
type sessions struct {
	cfg        Config
	log        *slog.Logger
	reconciler *reconciler
	outbox     *outbox
	lease      *nodeLease
	guard      *guard
	infos      *infos
	usage      *usage
	metrics    *metrics
	tunnels    *tunnels
	capacity   *pb.NodeCapacity

	number int
	// told are addresses that a welcome named.
	told []string
}

// run attaches again and again, each time to another server where there is one.
func (s *sessions) run(ctx context.Context) error {
	failures, turn := 0, 0
	for ctx.Err() == nil {
		servers := order(s.cfg.NodeID, s.cfg.Servers(), s.told)
		if len(servers) == 0 {
			s.log.Debug("no server is known")
		} else {
			address := servers[turn%len(servers)]
			turn++
			welcomed, err := s.attach(ctx, address)
			if ctx.Err() != nil {
				return nil
			}
			if welcomed {
				failures = 0
			}
			s.log.Warn("session ended", "server", address, "error", err)
		}
		sleep(ctx, retryDelay(failures, rand.Float64()))
		failures++
	}
	return nil
}

// retryDelay doubles with each failure; portion in [0, 1) spreads agents that
// lost the same server over the upper half of it.
func retryDelay(failures int, portion float64) time.Duration {
	delay := retryMost
	if failures < 6 {
		delay = min(retryFirst<<failures, retryMost)
	}
	return delay/2 + time.Duration(portion*float64(delay/2))
}

// order gives every known address once, in an order of the node's own, so that
// agents spread over the servers.
func order(node string, lists ...[]string) []string {
	all := slices.Concat(lists...)
	slices.Sort(all)
	all = slices.Compact(all)
	weight := func(address string) uint64 {
		h := fnv.New64a()
		io.WriteString(h, node+"\x00"+address)
		return h.Sum64()
	}
	slices.SortFunc(all, func(a, b string) int {
		switch x, y := weight(a), weight(b); {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
	return all
}

// attach holds one session until it fails.
func (s *sessions) attach(ctx context.Context, address string) (welcomed bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// The watchdog ends a session in which nothing is heard: not by a blocked
	// send, nor by a server that lives and can't reach the leader.
	watchdog := time.AfterFunc(welcomeTimeout, func() { cancel(errors.New("the server does not answer")) })
	defer watchdog.Stop()

	client, err := s.cfg.Dial(ctx, address)
	if err != nil {
		return false, fmt.Errorf("dial: %w", err)
	}
	stream, err := client.Session(ctx, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return false, fmt.Errorf("session: %w", cause(ctx, err))
	}
	runtimes, version := s.infos.get()
	hello := &pb.AgentHello{
		NodeId: s.cfg.NodeID, Incarnation: s.cfg.Incarnation, Version: s.cfg.Version, Labels: s.cfg.Labels,
		Capacity: s.capacity, Runtimes: runtimes, Address: s.cfg.Address, Os: runtime.GOOS, Arch: runtime.GOARCH, Kernel: kernel(),
		Pool: s.cfg.Pool, Taints: s.cfg.Taints, Devices: s.cfg.Devices, StoragePools: s.cfg.StoragePools,
	}
	if err := stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Hello{Hello: hello}}); err != nil {
		return false, fmt.Errorf("hello: %w", cause(ctx, err, stream))
	}
	first, err := stream.Recv()
	if err != nil {
		return false, fmt.Errorf("welcome: %w", cause(ctx, err))
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return false, errors.New("the server did not begin with a welcome")
	}
	if welcome.GetClusterId() != s.cfg.ClusterID {
		return false, fmt.Errorf("the server belongs to cluster %q, this agent to %q", welcome.GetClusterId(), s.cfg.ClusterID)
	}
	if len(welcome.GetServers()) > 0 {
		s.told = welcome.GetServers()
	}
	ttl := time.Duration(welcome.GetLeaseTtlSeconds()) * time.Second
	if ttl <= 0 {
		ttl = defaultTTL
	}
	watchdog.Reset(ttl / 2)
	s.number++
	s.metrics.sessions.Inc()
	s.metrics.attached.Set(1)
	defer s.metrics.attached.Set(0)
	s.log.Info("attached", "server", address, "member", welcome.GetMemberId(), "lease", ttl.String())

	one := &session{sessions: s, client: client, stream: stream, ttl: ttl, watchdog: watchdog, version: version, sent: map[uint64]time.Time{}}
	err = one.run(ctx)
	cancel(err)
	return true, cause(ctx, err)
}

// cause tells why a stream failed: by our own hand, by the status that the
// server ended it with, or by err.
func cause(ctx context.Context, err error, streams ...pb.Agents_SessionClient) error {
	if c := context.Cause(ctx); c != nil && !errors.Is(c, context.Canceled) {
		return c
	}
	if errors.Is(err, io.EOF) && len(streams) > 0 {
		if _, status := streams[0].Recv(); status != nil {
			return status
		}
	}
	return err
}

// session is one stream. All sends happen in run.
type session struct {
	*sessions
	client   pb.AgentsClient
	stream   pb.Agents_SessionClient
	ttl      time.Duration
	watchdog *time.Timer
	// version of the runtimes' infos that was sent.
	version int
	beat    uint64
	// renewed: a heartbeat of this session has renewed the lease.
	renewed bool
	// sent is when unacknowledged heartbeats were sent.
	sent map[uint64]time.Time
}

func (s *session) run(ctx context.Context) error {
	received, failed := make(chan *pb.ServerMessage), make(chan error, 1)
	go func() { // ends with ctx, as the stream does
		for {
			m, err := s.stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case received <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	if err := s.tell(ctx, message{begun: true}); err != nil {
		return err
	}
	defer s.tell(context.WithoutCancel(ctx), message{ended: true})

	heartbeat := time.NewTicker(min(s.ttl/3, max(s.ttl/5, heartbeatUsual)))
	defer heartbeat.Stop()
	resend := time.NewTicker(statusAgain)
	defer resend.Stop()
	late := time.NewTimer(listedTimeout)
	defer late.Stop()
	listed, changed := s.reconciler.listed, (chan struct{})(nil)
	var gather <-chan time.Time
	if err := s.heartbeat(); err != nil {
		return err
	}
	for {
		var err error
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err = <-failed:
		case m := <-received:
			err = s.handle(ctx, m)
		case <-heartbeat.C:
			err = s.heartbeat()
		case <-listed:
			listed, changed = nil, s.outbox.changed
			err = s.report(s.outbox.full())
		case <-late.C:
			if listed != nil {
				listed, changed = nil, s.outbox.changed
				err = s.report(s.outbox.full())
			}
		case <-changed:
			if gather == nil {
				gather = time.After(statusGap)
			}
		case <-gather:
			gather = nil
			err = s.report(s.outbox.next())
		case <-resend.C:
			if changed != nil {
				err = s.report(s.outbox.again())
			}
		}
		if errors.Is(err, io.EOF) {
			return ended(ctx, received, failed)
		}
		if err != nil {
			return err
		}
	}
}

// ended waits for the status with which the server ended the stream; a send
// only says that it did. There is one receiver: a second one would take the
// end away from it.
func ended(ctx context.Context, received <-chan *pb.ServerMessage, failed <-chan error) error {
	for {
		select {
		case <-received:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *session) heartbeat() error {
	s.beat++
	m := &pb.Heartbeat{Seq: s.beat, Usage: s.usage.get()}
	infos, version := s.infos.get()
	if version != s.version {
		m.Runtimes = infos
	}
	s.sent[s.beat] = time.Now()
	if err := s.stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Heartbeat{Heartbeat: m}}); err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	s.version = version
	return nil
}

// protect sees to it that exclusive work ends with the lease though the agent may
// not be able to end it.
func (s *session) protect() {
	if err := s.guard.stand(); err != nil {
		s.log.Error("nobody but this process can stop exclusive work", "error", err)
	}
	if err := s.lease.save(s.cfg.DataDir, time.Now()); err != nil {
		s.log.Warn("exclusive work will be stopped when the lease ends that was written last", "error", err)
	}
}

func (s *session) report(r *pb.StatusReport) error {
	if r == nil {
		return nil
	}
	if err := s.stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Status{Status: r}}); err != nil {
		return fmt.Errorf("status: %w", err)
	}
	return nil
}

func (s *session) handle(ctx context.Context, m *pb.ServerMessage) error {
	switch m := m.GetMessage().(type) {
	case *pb.ServerMessage_HeartbeatAck:
		seq := m.HeartbeatAck.GetSeq()
		sent, ok := s.sent[seq]
		if !ok {
			return nil // acknowledged before, or of no heartbeat of ours
		}
		for n := range s.sent {
			if n <= seq {
				delete(s.sent, n)
			}
		}
		if s.renewed && s.lease.lapsed(sent) {
			return errors.New("the node's lease has ended: what is wanted here has to be asked anew")
		}
		s.watchdog.Reset(s.ttl / 2)
		s.lease.renew(sent, s.ttl)
		s.renewed = true
		if s.lease.keep.Load() {
			s.protect()
		}
		return nil
	case *pb.ServerMessage_StatusAck:
		s.outbox.acknowledged(m.StatusAck.GetSeq())
		return nil
	case *pb.ServerMessage_Desired:
		return s.tell(ctx, message{set: m.Desired})
	case *pb.ServerMessage_Open:
		if err := s.tunnels.open(m.Open, s.client); err != nil {
			refused := &pb.TunnelRefused{StreamId: m.Open.GetStreamId(), Message: err.Error()}
			return s.stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Refused{Refused: refused}})
		}
		return nil
	case *pb.ServerMessage_Welcome:
		return errors.New("the server sent a second welcome")
	}
	return nil // from a newer server
}

// tell hands a message to the reconciler and waits for its answer.
func (s *session) tell(ctx context.Context, m message) error {
	m.session, m.reply = s.number, make(chan error, 1)
	select {
	case s.reconciler.messages <- m:
	case <-s.reconciler.over:
		return context.Canceled
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-m.reply:
		return err
	case <-s.reconciler.over:
		return context.Canceled
	}
}
