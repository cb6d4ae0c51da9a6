package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/gateway"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// Servers become voters by themselves up to so many; a larger cluster is
	// asked for with `persys member promote`.
	automaticVoters = 3
	// A server is promoted when it has been within promoteLag entries of the
	// leader for promoteAfter.
	promoteLag   = 256
	promoteAfter = 2 * time.Second
	promoteEvery = 500 * time.Millisecond
	statusWait   = time.Second
)

// enroll takes a server into the cluster, as a non-voter, or its new address.
func (r *replica) enroll(ctx context.Context, l *leading, m *pb.Member) (*pb.EnrollResponse, error) {
	id, ok := gateway.IdentityFrom(ctx)
	if !ok || id.Name != m.GetName() {
		return nil, status.Errorf(codes.PermissionDenied, "certificate of %q can't enroll server %q", id.Name, m.GetName())
	}
	known := members(r.store.View())
	for _, old := range known {
		switch {
		case old.Id == m.Id && old.Removed:
			return nil, status.Errorf(codes.PermissionDenied, "server %s was removed from the cluster; to take it in again, empty its data directory and join with a new token", m.Name)
		case old.Name == m.Name && old.Id != m.Id && !old.Removed:
			// The same name with an empty disk is a new member: the old one has
			// forgotten what it acknowledged and must not vote again.
			if err := r.expel(ctx, l, old); err != nil {
				return nil, err
			}
		}
	}
	err := l.propose(ctx, func(v *fsm.View) (*pb.Txn, error) {
		stored := &pb.Member{}
		mod, found, err := model.Load(v, model.MemberKey(m.Id), stored)
		if err != nil {
			return nil, err
		}
		next := proto.CloneOf(m)
		next.Promote, next.Demoted, next.JoinTime = stored.Promote, stored.Demoted, stored.JoinTime
		if !found {
			next.JoinTime = timestamppb.Now()
		} else if proto.Equal(stored, next) {
			return nil, nil
		}
		return r.memberTxn(next, mod, "server "+m.Name+" enrolled at "+m.GrpcAddress), nil
	})
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(r.raftServers(), func(s raftServer) bool { return s.id == m.Id && s.address == m.GrpcAddress }) {
		if err := r.store.AddNonvoter(ctx, m.Id, m.GrpcAddress); err != nil {
			return nil, fmt.Errorf("add server %s: %w", m.Name, err)
		}
	}
	return &pb.EnrollResponse{Members: members(r.store.View())}, nil
}

// memberTxn stores a member, unless it changed since it was read.
func (r *replica) memberTxn(m *pb.Member, mod int64, message string) *pb.Txn {
	key := model.MemberKey(m.Id)
	return &pb.Txn{
		Compare: []*pb.Compare{model.Unchanged(key, mod)},
		Success: []*pb.RequestOp{
			model.Put(key, m, 0),
			model.PutEvent(&pb.Event{Type: pb.EventType_MEMBER_CHANGED, Message: message}, time.Now(), "member-"+m.Name),
		},
	}
}

// expel removes a server from raft and leaves its tombstone.
func (r *replica) expel(ctx context.Context, l *leading, m *pb.Member) error {
	if slices.ContainsFunc(r.raftServers(), func(s raftServer) bool { return s.id == m.Id }) {
		if err := r.store.Remove(ctx, m.Id); err != nil {
			return status.Errorf(codes.FailedPrecondition, "remove server %s: %v", m.Name, err)
		}
	}
	return r.editMember(ctx, l, m.Id, "server "+m.Name+" removed", func(m *pb.Member) { m.Removed = true })
}

func (r *replica) editMember(ctx context.Context, l *leading, id, message string, edit func(*pb.Member)) error {
	return l.propose(ctx, func(v *fsm.View) (*pb.Txn, error) {
		m := &pb.Member{}
		mod, ok, err := model.Load(v, model.MemberKey(id), m)
		if err != nil || !ok {
			return nil, err
		}
		edit(m)
		return r.memberTxn(m, mod, message), nil
	})
}

// changeMember carries out what an administrator asks of a server by its name.
func (r *replica) changeMember(ctx context.Context, l *leading, request *pb.ChangeMemberRequest) error {
	if request.Change == pb.ChangeMemberRequest_TRANSFER && request.Name == "" {
		return r.transfer(ctx, "")
	}
	known := members(r.store.View())
	i := slices.IndexFunc(known, func(m *pb.Member) bool { return m.Name == request.Name && !m.Removed })
	if i < 0 {
		return status.Errorf(codes.NotFound, "there is no server %q", request.Name)
	}
	m := known[i]
	own := m.Id == r.memberID
	switch request.Change {
	case pb.ChangeMemberRequest_PROMOTE:
		return r.editMember(ctx, l, m.Id, "server "+m.Name+" is to vote", func(m *pb.Member) { m.Promote, m.Demoted = true, false })
	case pb.ChangeMemberRequest_DEMOTE:
		if own {
			return r.mayLeave()
		}
		if err := r.store.Demote(ctx, m.Id); err != nil {
			return status.Errorf(codes.FailedPrecondition, "demote server %s: %v", m.Name, err)
		}
		return r.editMember(ctx, l, m.Id, "server "+m.Name+" no longer votes", func(m *pb.Member) { m.Promote, m.Demoted = false, true })
	case pb.ChangeMemberRequest_REMOVE:
		if own {
			return r.mayLeave()
		}
		return r.expel(ctx, l, m)
	case pb.ChangeMemberRequest_TRANSFER:
		return r.transfer(ctx, m.Id)
	}
	return status.Errorf(codes.InvalidArgument, "change: %s", request.Change)
}

// onlyVoter refuses what takes a second server that votes.
func (r *replica) onlyVoter() error {
	others := slices.DeleteFunc(r.raftServers(), func(s raftServer) bool { return !s.voter || s.id == r.memberID })
	if len(others) == 0 {
		return status.Errorf(codes.FailedPrecondition, "server %s is the only one that votes; join another server first: persys token create --role server", r.config.Name)
	}
	return nil
}

// mayLeave refuses to take the leader's vote.
func (r *replica) mayLeave() error {
	if err := r.onlyVoter(); err != nil {
		return err
	}
	return status.Errorf(codes.FailedPrecondition, "server %s leads the cluster; transfer leadership first: persys member transfer-leader", r.config.Name)
}

// transfer hands the leadership over, to whoever is best where id is empty.
func (r *replica) transfer(ctx context.Context, id string) error {
	if id == r.memberID {
		return nil
	}
	if err := r.onlyVoter(); err != nil {
		return err
	}
	if err := r.store.TransferLeadership(ctx, id); err != nil {
		return status.Errorf(codes.FailedPrecondition, "transfer leadership: %v", err)
	}
	return nil
}

// promote is the leader duty that makes voters of servers that have caught up.
func (r *replica) promote(ctx context.Context) error {
	stable := map[string]time.Time{} // since when a server keeps up
	tick := time.NewTicker(promoteEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		byID := map[string]*pb.Member{}
		for _, m := range members(r.store.View()) {
			byID[m.Id] = m
		}
		servers := r.raftServers()
		voters := 0
		for _, s := range servers {
			if s.voter {
				voters++
			}
		}
		for _, s := range servers {
			m := byID[s.id]
			if s.voter || m == nil || m.Demoted || !m.Promote && voters >= automaticVoters || !r.keepsUp(ctx, s) {
				delete(stable, s.id)
				continue
			}
			since, ok := stable[s.id]
			if !ok {
				stable[s.id] = time.Now()
			} else if time.Since(since) >= promoteAfter {
				if err := r.store.Promote(ctx, s.id); err != nil {
					r.log.Warn("promotion failed", "member", s.id, "error", err)
					continue
				}
				r.log.Info("server promoted to voter", "member", s.id)
				voters++
			}
		}
	}
}

func (r *replica) keepsUp(ctx context.Context, s raftServer) bool {
	state, err := r.statusOf(ctx, s.address)
	return err == nil && state.MemberId == s.id && state.AppliedIndex+promoteLag >= r.store.Status().Commit
}

func (r *replica) statusOf(ctx context.Context, address string) (*pb.ReplicaStatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, statusWait)
	defer cancel()
	conn, err := r.peers.dial(address)
	if err != nil {
		return nil, err
	}
	return pb.NewConsensusClient(conn).ReplicaStatus(ctx, &pb.ReplicaStatusRequest{})
}

// members are the servers that the keyspace knows, tombstones included.
func members(v *fsm.View) []*pb.Member {
	var all []*pb.Member
	for kv := range v.Scan(model.MembersPrefix) {
		m := &pb.Member{}
		if model.Parse(kv, m) == nil {
			all = append(all, m)
		}
	}
	return all
}

type raftServer struct {
	id, address string
	voter       bool
}

// raftServers is raft's own membership; empty where it is not known yet.
func (r *replica) raftServers() []raftServer {
	servers, err := r.store.Servers()
	if err != nil {
		return nil
	}
	var all []raftServer
	for _, s := range servers {
		all = append(all, raftServer{id: s.ID, address: s.Address, voter: s.Voter})
	}
	return all
}

// Members answers with the servers as they are now, each asked for its state.
func (r *replica) Members(ctx context.Context) (*pb.ListMembersResponse, error) {
	v, err := r.store.Linearizable(ctx)
	if err != nil {
		return nil, err
	}
	voters := map[string]bool{}
	for _, s := range r.raftServers() {
		voters[s.id] = s.voter
	}
	leader, _, _ := r.store.Leader()
	response := &pb.ListMembersResponse{}
	var group errgroup.Group
	for _, m := range members(v) {
		if m.Removed {
			continue
		}
		m.Voter, m.Leader = voters[m.Id], m.Id == leader
		response.Members = append(response.Members, m)
		group.Go(func() error {
			if state, err := r.statusOf(ctx, m.GrpcAddress); err == nil {
				m.Reachable, m.AppliedIndex, m.Version, m.FeatureLevel = true, state.AppliedIndex, state.Version, state.FeatureLevel
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	all, reachable := 0, 0
	for _, m := range response.Members {
		if m.Voter {
			all++
			if m.Reachable {
				reachable++
			}
		}
	}
	response.FailureTolerance = int32(max(0, reachable-(all/2+1)))
	return response, nil
}

// ChangeMember has the leader change the membership.
func (r *replica) ChangeMember(ctx context.Context, change *pb.ChangeMemberRequest) error {
	return r.onLeader(ctx, func(ctx context.Context, c pb.FleetClient) error {
		_, err := c.ChangeMember(ctx, change)
		return err
	})
}
