package raftstore

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// forward asks the leader to propose. A notProposed error means that it did not.
func (s *Store) forward(ctx context.Context, address string, req *pb.ProposeRequest) (*pb.ProposeResponse, error) {
	ctx, cancel := s.untilLeaderChanges(ctx, address)
	defer cancel()
	client, err := s.cfg.Dial(ctx, address)
	if err != nil {
		return nil, &notProposed{fmt.Errorf("raftstore: connect to the leader at %s: %w", address, err)}
	}
	resp, err := client.Propose(ctx, req)
	switch {
	case status.Code(err) == codes.FailedPrecondition:
		return nil, &notProposed{err}
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
	case len(resp.Results) != len(req.Txns):
		return nil, fmt.Errorf("raftstore: the leader answered %d transactions with %d results: %w",
			len(req.Txns), len(resp.Results), ErrOutcomeUnknown)
	}
	return resp, nil
}

// untilLeaderChanges bounds a call to the leader: by time, and by that it leads. A
// leader that was stopped or cut off keeps its connections and answers nothing.
func (s *Store) untilLeaderChanges(ctx context.Context, address string) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timing.Peer)
	watching := s.spawn(func() {
		for {
			changed := s.leaderChanged.next()
			if _, now, _ := s.Leader(); now != address {
				cancel()
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
		}
	})
	if !watching {
		cancel()
	}
	return ctx, cancel
}

// onLeader answers a question that only the leader can answer: here, or by asking
// it, and again after a change of leadership, until ctx or NoLeader ends.
func onLeader[T any](s *Store, ctx context.Context,
	here func(context.Context, *leadership) (T, error),
	there func(context.Context, pb.ConsensusClient) (T, error),
) (T, error) {
	var none T
	deadline := time.NewTimer(s.cfg.Timing.NoLeader)
	defer deadline.Stop()
	if err := s.awaitStart(ctx); err != nil {
		return none, err
	}
	for {
		changed := s.leaderChanged.next()
		answer, err := ask(s, ctx, here, there)
		if err == nil || ctx.Err() != nil {
			return answer, err
		}
		retry := time.NewTimer(retryPause)
		select {
		case <-changed:
		case <-retry.C:
		case <-deadline.C:
			retry.Stop()
			return none, fmt.Errorf("%w: %w", ErrNoLeader, err)
		case <-ctx.Done():
			retry.Stop()
			return none, ctx.Err()
		case <-s.machine.halted:
			retry.Stop()
			return none, s.closedError()
		case <-s.ended:
			retry.Stop()
			return none, s.closedError()
		}
		retry.Stop()
	}
}

// awaitStart waits for Run.
func (s *Store) awaitStart(ctx context.Context) error {
	select {
	case <-s.started:
	case <-s.ended:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-s.ended:
		return s.closedError()
	default:
		return nil
	}
}

// ask answers once, here or at the leader.
func ask[T any](s *Store, ctx context.Context,
	here func(context.Context, *leadership) (T, error),
	there func(context.Context, pb.ConsensusClient) (T, error),
) (T, error) {
	if l := s.reigning(); l != nil {
		return here(ctx, l)
	}
	var none T
	id, address, ok := s.Leader()
	if !ok || id == s.cfg.ID {
		return none, ErrNoLeader
	}
	ctx, cancel := s.untilLeaderChanges(ctx, address)
	defer cancel()
	client, err := s.cfg.Dial(ctx, address)
	if err != nil {
		return none, fmt.Errorf("raftstore: connect to the leader at %s: %w", address, err)
	}
	return there(ctx, client)
}
