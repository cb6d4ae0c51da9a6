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
	relayTimeout = 2 * time.Second
	relayBackoff = 100 * time.Millisecond
	// What one relay carries, at least one report: the leader is to answer in time.
	relayReports = 1024
	relayBytes   = 1 << 20
)

// relay carries what this replica's agents say to the leader, in batches: while
// one is under way the next gathers. Who has waited longest comes first, so that
// an agent with much to say delays nobody for long. What the leader did not acknowledge is
// sent again, to the next leader if need be; agents notice nothing of it.
func (s *sessions) relay(ctx context.Context, memberID string, send func(context.Context, *pb.RelayRequest) (*pb.RelayResponse, error)) error {
	for {
		select {
		case <-s.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
		batch, request := s.gather(memberID)
		if len(batch) == 0 {
			continue
		}
		callCtx, cancel := context.WithTimeout(ctx, relayTimeout)
		response, err := send(callCtx, request)
		cancel()
		if err == nil && len(response.Results) != len(batch) {
			err = errors.New("relay: the answer does not match the reports")
		}
		if err != nil {
			s.log.Debug("relay to the leader failed", "error", err)
			s.giveBack(batch)
			select {
			case <-time.After(relayBackoff):
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		s.settle(batch, response)
	}
}

func (s *sessions) gather(memberID string) ([]*session, *pb.RelayRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	request := &pb.RelayRequest{MemberId: memberID}
	var batch []*session
	n, bytes := 0, 0
	for ; n < len(s.waiting) && len(batch) < relayReports && bytes < relayBytes; n++ {
		se := s.waiting[n]
		se.waits = false
		if s.byNode[se.node] != se {
			continue // it has ended
		}
		se.flying, se.pending = se.pending, nil
		batch = append(batch, se)
		request.Reports = append(request.Reports, se.flying)
		bytes += proto.Size(se.flying)
	}
	s.waiting = slices.Delete(s.waiting, 0, n)
	if len(s.waiting) > 0 {
		s.signal()
	}
	return batch, request
}

// giveBack queues again what was not acknowledged.
func (s *sessions) giveBack(batch []*session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, se := range batch {
		s.requeue(se)
	}
}

// requeue puts what is flying before what has gathered since. It is called
// with mu held.
func (s *sessions) requeue(se *session) {
	report := se.flying
	se.flying = nil
	if later := se.pending; later != nil {
		report.Status = append(report.Status, later.Status...)
		if later.Heartbeat != nil {
			report.Heartbeat = later.Heartbeat
		}
		if later.Hello != nil {
			report.Hello = later.Hello
		}
	}
	se.pending = report
	if s.byNode[se.node] == se {
		s.queue(se)
	}
}

// settle tells the agents what became of their reports.
func (s *sessions) settle(batch []*session, response *pb.RelayResponse) {
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
			se.acknowledge(response.Epoch)
		}
		se.flying = nil
	}
}

func (se *session) acknowledge(epoch int64) {
	if se.flying.Hello != nil && !se.isAccepted {
		se.isAccepted = true
		close(se.accepted)
	}
	var messages []*pb.ServerMessage
	if h := se.flying.Heartbeat; h != nil {
		messages = append(messages, &pb.ServerMessage{Message: &pb.ServerMessage_HeartbeatAck{HeartbeatAck: &pb.Ack{Seq: h.Seq, Epoch: epoch}}})
	}
	for _, r := range se.flying.Status {
		messages = append(messages, &pb.ServerMessage{Message: &pb.ServerMessage_StatusAck{StatusAck: &pb.Ack{Seq: r.Seq, Epoch: epoch}}})
	}
	for _, m := range messages {
		if err := se.post(m); err != nil {
			se.stop(err)
			return
		}
	}
}
