package server

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	relayBackoff = 100 * time.Millisecond
	// What one relay carries, at least one report: the leader is to answer in time.
	relayReports = 1024
	relayBytes   = 1 << 20
)

// What agents say travels in two lanes, so that no lease waits for the status of
// thousands of replicas.
const (
	beats = iota // hello and heartbeats
	statuses
	lanes
)

// relayTimeout is when the leader is asked again, or another one: status it has to
// write to disk.
var relayTimeout = [lanes]time.Duration{beats: 2 * time.Second, statuses: 5 * time.Second}

// lane holds the sessions that have something of one kind to relay.
type lane struct {
	waiting []*session // who came first is first
	wake    chan struct{}
}

func (l *lane) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// load is what one session has said of one kind and the leader has not yet
// acknowledged: not yet sent, or being relayed.
type load struct {
	pending, flying *pb.AgentReport
	waits           bool // its session is in lane.waiting
}

// relay carries what this replica's agents say to the leader, in batches: while
// one is under way the next gathers. Who has waited longest comes first, so that
// an agent with much to say delays nobody for long. What the leader did not
// acknowledge is sent again, to the next leader if need be; agents notice nothing
// of it.
func (s *sessions) relay(ctx context.Context, kind int, memberID string, send func(context.Context, *pb.RelayRequest) (*pb.RelayResponse, error)) error {
	for {
		select {
		case <-s.lanes[kind].wake:
		case <-ctx.Done():
			return ctx.Err()
		}
		batch, request := s.gather(kind, memberID)
		if len(batch) == 0 {
			continue
		}
		callCtx, cancel := context.WithTimeout(ctx, relayTimeout[kind])
		response, err := send(callCtx, request)
		cancel()
		if err == nil && len(response.Results) != len(batch) {
			err = errors.New("relay: the answer does not match the reports")
		}
		if err != nil {
			s.log.Debug("relay to the leader failed", "error", err)
			s.giveBack(kind, batch)
			select {
			case <-time.After(relayBackoff):
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		s.settle(kind, batch, response)
	}
}

func (s *sessions) gather(kind int, memberID string) ([]*session, *pb.RelayRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lane := &s.lanes[kind]
	request := &pb.RelayRequest{MemberId: memberID}
	var batch []*session
	n, bytes := 0, 0
	for ; n < len(lane.waiting) && len(batch) < relayReports && bytes < relayBytes; n++ {
		se := lane.waiting[n]
		load := &se.loads[kind]
		load.waits = false
		if s.byNode[se.node] != se {
			continue // it has ended
		}
		load.flying, load.pending = load.pending, nil
		batch = append(batch, se)
		request.Reports = append(request.Reports, load.flying)
		bytes += proto.Size(load.flying)
	}
	lane.waiting = slices.Delete(lane.waiting, 0, n)
	if len(lane.waiting) > 0 {
		lane.signal()
	}
	return batch, request
}

// pending is what the session has still to send, to be added to. It is called
// with mu held.
func (s *sessions) pending(se *session, kind int) *pb.AgentReport {
	load := &se.loads[kind]
	if load.pending == nil {
		load.pending = &pb.AgentReport{NodeId: se.node, Incarnation: se.hello.Incarnation}
	}
	lane := &s.lanes[kind]
	if !load.waits {
		load.waits = true
		lane.waiting = append(lane.waiting, se)
	}
	lane.signal()
	return load.pending
}

// giveBack queues again what was not acknowledged: before what has gathered
// since.
func (s *sessions) giveBack(kind int, batch []*session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, se := range batch {
		report := se.loads[kind].flying
		se.loads[kind].flying = nil
		if s.byNode[se.node] != se {
			continue
		}
		later := s.pending(se, kind)
		later.Status = append(report.Status, later.Status...)
		if later.Heartbeat == nil {
			later.Heartbeat = report.Heartbeat
		}
		if later.Hello == nil {
			later.Hello = report.Hello
		}
	}
}

// settle tells the agents what became of their reports.
func (s *sessions) settle(kind int, batch []*session, response *pb.RelayResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, se := range batch {
		result := response.Results[i]
		switch {
		case result.Unknown:
			// It holds no lease any more, so its work may have been given to others.
			// In a new session it is told all that is wanted of it now.
			se.stop(status.Error(codes.Aborted, "the node's lease has ended: attach again"))
		case !result.Ok:
			se.stop(status.Error(codes.Aborted, result.Message))
		default:
			se.acknowledge(se.loads[kind].flying, response.Epoch)
		}
		se.loads[kind].flying = nil
	}
}

func (se *session) acknowledge(report *pb.AgentReport, epoch int64) {
	if report.Hello != nil && !se.isAccepted {
		se.isAccepted = true
		close(se.accepted)
	}
	var messages []*pb.ServerMessage
	if h := report.Heartbeat; h != nil {
		messages = append(messages, &pb.ServerMessage{Message: &pb.ServerMessage_HeartbeatAck{HeartbeatAck: &pb.Ack{Seq: h.Seq, Epoch: epoch}}})
	}
	for _, r := range report.Status {
		messages = append(messages, &pb.ServerMessage{Message: &pb.ServerMessage_StatusAck{StatusAck: &pb.Ack{Seq: r.Seq, Epoch: epoch}}})
	}
	for _, m := range messages {
		if err := se.post(m); err != nil {
			se.stop(err)
			return
		}
	}
}
