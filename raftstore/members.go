package raftstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
)

// Server is a member as raft has it.
type Server struct {
	ID, Address string
	Voter       bool
}

func (s *Store) servers() []raft.Server { return s.raft.GetConfiguration().Configuration().Servers }

func (s *Store) voters() int {
	n := 0
	for _, server := range s.servers() {
		if server.Suffrage == raft.Voter {
			n++
		}
	}
	return n
}

// caller is the server of that raft id; all servers, where it is empty.
func (s *Store) caller(id string) []raft.Server {
	servers := s.servers()
	if id == "" {
		return servers
	}
	for i, server := range servers {
		if string(server.ID) == id {
			return servers[i : i+1]
		}
	}
	return nil
}

// Servers are the members, as far as this replica knows; on the leader a change
// may be included that is not committed yet.
func (s *Store) Servers() ([]Server, error) {
	if !s.isStarted() {
		return nil, ErrClosed
	}
	var all []Server
	for _, server := range s.servers() {
		all = append(all, Server{
			ID: string(server.ID), Address: string(server.Address), Voter: server.Suffrage == raft.Voter,
		})
	}
	return all, nil
}

// changeLag is how many log entries a server may lack to become a voter.
const changeLag = 256

// AddNonvoter lets a server follow the log without a vote. For one that is a member
// already the address is changed. Leader only, as are the following.
func (s *Store) AddNonvoter(ctx context.Context, id, address string) error {
	return s.change(ctx, "add", id, func(*leadership, []raft.Server) (raft.Future, error) {
		return s.raft.AddNonvoter(raft.ServerID(id), raft.ServerAddress(address), 0, s.cfg.Timing.Peer), nil
	})
}

// Promote makes a non-voter a voter. It must hold nearly all of the log
// (ErrNotCaughtUp), since a majority may need it from then on.
func (s *Store) Promote(ctx context.Context, id string) error {
	return s.change(ctx, "promote", id, func(l *leadership, servers []raft.Server) (raft.Future, error) {
		server, ok := find(servers, id)
		switch {
		case !ok:
			return nil, ErrUnknownServer
		case server.Suffrage == raft.Voter:
			return nil, nil
		}
		index, followed := s.link.progress(server.ID, l.term)
		if time.Since(followed) > s.reachable() || index+changeLag < s.raft.CommitIndex() {
			return nil, ErrNotCaughtUp
		}
		if err := s.keepsQuorum(l, servers, id, true); err != nil {
			return nil, err
		}
		return s.raft.AddVoter(server.ID, server.Address, 0, s.cfg.Timing.Peer), nil
	})
}

// Demote takes a server's vote. The leader hands leadership over first and fails
// with ErrNotLeader: the new leader can be asked then.
func (s *Store) Demote(ctx context.Context, id string) error {
	return s.change(ctx, "demote", id, func(l *leadership, servers []raft.Server) (raft.Future, error) {
		server, ok := find(servers, id)
		switch {
		case !ok:
			return nil, ErrUnknownServer
		case server.Suffrage != raft.Voter:
			return nil, nil
		}
		if err := s.keepsQuorum(l, servers, id, false); err != nil {
			return nil, err
		}
		if err := s.stepAside(ctx, id); err != nil {
			return nil, err
		}
		return s.raft.DemoteVoter(server.ID, 0, s.cfg.Timing.Peer), nil
	})
}

// Remove ends a membership; one that does not exist is fine. For the leader itself
// see Demote.
func (s *Store) Remove(ctx context.Context, id string) error {
	return s.change(ctx, "remove", id, func(l *leadership, servers []raft.Server) (raft.Future, error) {
		server, ok := find(servers, id)
		if !ok {
			return nil, nil
		}
		if server.Suffrage == raft.Voter {
			if err := s.keepsQuorum(l, servers, id, false); err != nil {
				return nil, err
			}
		}
		if err := s.stepAside(ctx, id); err != nil {
			return nil, err
		}
		return s.raft.RemoveServer(server.ID, 0, s.cfg.Timing.Peer), nil
	})
}

// TransferLeadership hands leadership to the server, or with an empty id to the
// one that holds most of the log.
func (s *Store) TransferLeadership(ctx context.Context, id string) error {
	return s.change(ctx, "transfer leadership to", id, func(_ *leadership, servers []raft.Server) (raft.Future, error) {
		s.offer()
		if id == "" {
			return s.raft.LeadershipTransfer(), nil
		}
		server, ok := find(servers, id)
		switch {
		case !ok:
			return nil, ErrUnknownServer
		case id == s.cfg.ID:
			return nil, nil
		case server.Suffrage != raft.Voter:
			return nil, errors.New("it has no vote")
		}
		return s.raft.LeadershipTransferToServer(server.ID, server.Address), nil
	})
}

// change carries out one change of membership: make checks it and starts it, and
// returns no future where there is nothing to do.
func (s *Store) change(ctx context.Context, what, id string, make func(*leadership, []raft.Server) (raft.Future, error)) error {
	if err := s.awaitStart(ctx); err != nil {
		return err
	}
	s.membership.Lock()
	defer s.membership.Unlock()
	l := s.reigning()
	if l == nil {
		return ErrNotLeader
	}
	future, err := make(l, s.servers())
	if err == nil && future != nil {
		err = await(ctx, future)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipLost):
		return fmt.Errorf("raftstore: %s server %s: %w", what, id, ErrNotLeader)
	default:
		return fmt.Errorf("raftstore: %s server %s: %w", what, id, err)
	}
}

// await waits for a future; when ctx ends first, the change may still happen.
func await(ctx context.Context, future raft.Future) error {
	done := make(chan error, 1)
	go func() { done <- future.Error() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stepAside is for changes that take the vote of the leader itself.
func (s *Store) stepAside(ctx context.Context, id string) error {
	if id != s.cfg.ID {
		return nil
	}
	s.offer()
	if err := await(ctx, s.raft.LeadershipTransfer()); err != nil {
		return fmt.Errorf("hand leadership over: %w", err)
	}
	return ErrNotLeader
}

// reachable is how long ago a server may have followed to count as there.
func (s *Store) reachable() time.Duration { return 3 * s.cfg.Timing.Heartbeat }

// keepsQuorum reports whether the voters that are there would still be a majority
// after the server got a vote or lost it.
func (s *Store) keepsQuorum(l *leadership, servers []raft.Server, id string, vote bool) error {
	var after []raft.Server
	for _, server := range servers {
		if string(server.ID) == id {
			server.Suffrage = raft.Nonvoter
			if vote {
				server.Suffrage = raft.Voter
			}
		}
		after = append(after, server)
	}
	there, voters := s.link.followedSince(after, l.term, time.Now().Add(-s.reachable()))
	if voters == 0 || there <= voters/2 {
		return fmt.Errorf("%w: of %d voters %d would be there", ErrQuorum, voters, there)
	}
	return nil
}

func find(servers []raft.Server, id string) (raft.Server, bool) {
	for _, server := range servers {
		if string(server.ID) == id {
			return server, true
		}
	}
	return raft.Server{}, false
}
