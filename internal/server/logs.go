package server

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Logs gives the logs of work on a node, whichever replica its agent is
// attached to, until they end or the context does.
func (r *replica) Logs(ctx context.Context, node string, request *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error {
	if r.sessions.attached(node) {
		return r.localLogs(ctx, node, request, send)
	}
	var at *pb.FindSessionResponse
	err := r.onLeader(ctx, func(ctx context.Context, c pb.FleetClient) (err error) {
		at, err = c.FindSession(ctx, &pb.FindSessionRequest{NodeId: node})
		return err
	})
	if err != nil {
		return err
	}
	if at.MemberId == r.memberID {
		return status.Errorf(codes.Unavailable, "node %s is not attached to any replica now", node)
	}
	conn, err := r.peers.dial(at.GrpcAddress)
	if err != nil {
		return err
	}
	stream, err := pb.NewFleetClient(conn).AgentLogs(ctx, &pb.AgentLogsRequest{NodeId: node, Logs: request})
	if err != nil {
		return err
	}
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := send(chunk); err != nil {
			return err
		}
	}
}

// localLogs has an agent that is attached here open a tunnel, and reads it.
func (r *replica) localLogs(ctx context.Context, node string, request *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error {
	stream, finish, err := r.sessions.open(ctx, node, &pb.OpenTunnel{What: &pb.OpenTunnel_Logs{Logs: request}})
	if err != nil {
		return err
	}
	defer finish()
	// A reader of a stream that is only followed may leave at any time: then the
	// handler of the tunnel returns, and Recv with it.
	stop := context.AfterFunc(ctx, finish)
	defer stop()
	for {
		frame, err := stream.Recv()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case frame.End && frame.Error != "":
			return status.Errorf(codes.FailedPrecondition, "node %s: %s", node, frame.Error)
		case frame.End:
			return nil
		}
		if frame.Log == nil {
			continue
		}
		frame.Log.NodeId = node
		if err := send(frame.Log); err != nil {
			return err
		}
	}
}
