package server

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// An agent that reads nothing of what it is told is cut off once its queue is full;
// until then, and after, the others are told at once.
func TestAgentThatDoesNotReadDelaysNobody(t *testing.T) {
	s := newSessions(slog.New(slog.DiscardHandler), nil, nil, nil, nil)
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	attach := func(node string) (*session, context.Context) {
		ctx, stop := context.WithCancelCause(ctx)
		se := &session{node: node, hello: &pb.AgentHello{NodeId: node}, stop: stop, out: make(chan *pb.ServerMessage, sessionQueue), accepted: make(chan struct{})}
		s.attach(se)
		return se, ctx
	}
	dead, deadCtx := attach("dead")
	alive, aliveCtx := attach("alive")
	relayed := make(chan error, 1)
	go func() {
		relayed <- s.relay(ctx, beats, "s1", func(_ context.Context, r *pb.RelayRequest) (*pb.RelayResponse, error) {
			response := &pb.RelayResponse{Epoch: 1}
			for range r.Reports {
				response.Results = append(response.Results, &pb.AgentReportResult{Ok: true})
			}
			return response, nil
		})
	}()
	for seq := uint64(1); seq <= 2*sessionQueue; seq++ {
		// The dead one's first, so that its acknowledgement comes no later.
		for _, se := range []*session{dead, alive} {
			if !s.take(se, &pb.AgentMessage{Message: &pb.AgentMessage_Heartbeat{Heartbeat: &pb.Heartbeat{Seq: seq}}}) {
				t.Fatalf("heartbeat %d of %s was not taken", seq, se.node)
			}
		}
		select {
		case m := <-alive.out:
			if got := m.GetHeartbeatAck().GetSeq(); got != seq {
				t.Fatalf("acknowledged %d; sent %d", got, seq)
			}
		case <-ctx.Done():
			t.Fatalf("heartbeat %d was not acknowledged", seq)
		}
	}
	select {
	case <-deadCtx.Done():
	case <-ctx.Done():
		t.Fatal("the agent that does not read was not cut off")
	}
	if err := context.Cause(deadCtx); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("cut off: %v", err)
	}
	if aliveCtx.Err() != nil {
		t.Errorf("the other: %v", context.Cause(aliveCtx))
	}
	stop()
	if err := <-relayed; err != context.Canceled {
		t.Errorf("relay: %v", err)
	}
}
