package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// maxMessage bounds a message between servers, and between a server and an agent: a desired
// set of thousands of workloads fits.
const maxMessage = 64 << 20

// Bytes that may be under way to a receiver on one stream and on one connection. As
// long as gRPC has to find that out itself, it sends a ping with each message.
const (
	streamWindow = 1 << 20
	connWindow   = 4 << 20
)

// leaderWait is how long a call for the leader waits for there to be one.
const leaderWait = 10 * time.Second

// peers keeps one connection to each server that was called.
type peers struct {
	creds credentials.TransportCredentials
	more  []grpc.DialOption

	mu    sync.Mutex
	conns map[string]*grpc.ClientConn
}

func newPeers(creds credentials.TransportCredentials, more ...grpc.DialOption) *peers {
	return &peers{creds: creds, more: more, conns: map[string]*grpc.ClientConn{}}
}

// dial returns the connection to address, which is made when it is used.
func (p *peers) dial(address string) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.conns[address]; c != nil {
		return c, nil
	}
	c, err := grpc.NewClient("passthrough:///"+address, append([]grpc.DialOption{
		grpc.WithTransportCredentials(p.creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithStaticStreamWindowSize(streamWindow), grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
		// A peer that has vanished without a word is noticed by this.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second, PermitWithoutStream: true}),
	}, p.more...)...)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, err)
	}
	p.conns[address] = c
	return c, nil
}

func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	clear(p.conns)
}

// onLeader calls the leader, wherever it is. Where the callee does not lead, or
// there is no leader, nothing was done: it is tried again until leaderWait is
// over.
func (r *replica) onLeader(ctx context.Context, call func(context.Context, pb.FleetClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, leaderWait)
	defer cancel()
	for {
		changed := r.store.LeaderChanged()
		err := errNoLeader
		if _, address, ok := r.store.Leader(); ok {
			conn, dialErr := r.peers.dial(address)
			if dialErr != nil {
				return dialErr
			}
			if err = call(ctx, pb.NewFleetClient(conn)); err == nil || !notLeading(err) {
				return err
			}
		}
		select {
		case <-changed:
		case <-time.After(relayBackoff):
		case <-ctx.Done():
			return err
		}
	}
}

var errNoLeader = status.Error(codes.Unavailable, "the cluster has no leader")

// notLeading reports whether a call reached a server that does not lead, or
// none at all.
func notLeading(err error) bool {
	if errors.Is(err, errNoLeader) {
		return true
	}
	s := status.Convert(err)
	return s.Code() == codes.FailedPrecondition && s.Message() == status.Convert(errNotLeading).Message()
}

// isRefusal reports whether an answer is final: another server would give the
// same.
func isRefusal(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.AlreadyExists, codes.NotFound:
		return true
	case codes.FailedPrecondition:
		return !notLeading(err)
	}
	return false
}
