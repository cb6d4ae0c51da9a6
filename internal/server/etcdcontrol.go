package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/gateway"
	"github.com/persys-dev/persys/gateway/etcd"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
)

const (
	// A change of membership or of the leader that was carried out is seen here
	// within this, or the caller is told that it takes longer.
	changeWait  = 10 * time.Second
	changeEvery = 50 * time.Millisecond
)

// etcdControl is the replica as etcd's API sees it.
type etcdControl struct{ *replica }

var _ etcd.Control = etcdControl{}

// Members are the servers that are not removed, each with the URL that the caller
// can use, for clients go on to those. With a certificate of the cluster that is the
// port called, gRPC or HTTPS; without one it is the port for etcd's clients, where
// there is one.
func (c etcdControl) Members(ctx context.Context, v *fsm.View) ([]*etcdpb.Member, error) {
	_, certified := gateway.IdentityFrom(ctx)
	var all []*etcdpb.Member
	for _, m := range members(v) {
		if m.Removed {
			continue
		}
		grpcURL := "https://" + m.GrpcAddress
		clientURL := m.EtcdUrl
		switch {
		case ctx.Value(overHTTPS{}) != nil:
			clientURL = "https://" + m.HttpsAddress
		case certified || clientURL == "":
			clientURL = grpcURL
		}
		all = append(all, &etcdpb.Member{
			ID: etcd.ID(m.Id), Name: m.Name, PeerURLs: []string{grpcURL}, ClientURLs: []string{clientURL}, IsLearner: !c.votes(m.Id),
		})
	}
	return all, nil
}

func (c etcdControl) votes(id string) bool {
	return slices.ContainsFunc(c.raftServers(), func(s raftServer) bool { return s.voter && s.id == id })
}

// Status never blocks.
func (c etcdControl) Status() etcd.Status {
	raft := c.store.Status()
	s := etcd.Status{Term: raft.Term, Commit: raft.Commit, Applied: raft.Applied}
	if raft.Leader != "" {
		s.Leader = etcd.ID(raft.Leader)
	}
	if raft.DiskStalled {
		s.Errors = append(s.Errors, "a write to the log hangs")
	}
	if raft.Halted != nil {
		s.Errors = append(s.Errors, raft.Halted.Error())
	}
	return s
}

// RemoveMember is `persys member remove`, but that the leader hands over first.
func (c etcdControl) RemoveMember(ctx context.Context, m *etcdpb.Member) error {
	ctx, cancel := context.WithTimeout(ctx, 2*changeWait)
	defer cancel()
	voters := slices.DeleteFunc(c.raftServers(), func(s raftServer) bool { return !s.voter })
	if !m.IsLearner && len(voters) == 1 {
		return rpctypes.ErrGRPCMemberNotEnoughStarted
	}
	err := c.remove(ctx, m)
	if err != nil && c.Status().Leader == m.ID {
		if err := c.ChangeMember(ctx, &pb.ChangeMemberRequest{Change: pb.ChangeMemberRequest_TRANSFER}); err != nil {
			return err
		}
		if err := c.awaitLeader(ctx, func(id string) bool { return etcd.ID(id) != m.ID }); err != nil {
			return err
		}
		err = c.remove(ctx, m)
	}
	return err
}

func (c etcdControl) remove(ctx context.Context, m *etcdpb.Member) error {
	err := c.ChangeMember(ctx, &pb.ChangeMemberRequest{Change: pb.ChangeMemberRequest_REMOVE, Name: m.Name})
	switch {
	case status.Code(err) == codes.NotFound:
		return rpctypes.ErrGRPCMemberNotFound
	case strings.Contains(status.Convert(err).Message(), raftstore.ErrQuorum.Error()):
		return rpctypes.ErrGRPCUnhealthy
	}
	return err
}

// PromoteMember is `persys member promote`, where the server could vote at once.
func (c etcdControl) PromoteMember(ctx context.Context, m *etcdpb.Member) error {
	ctx, cancel := context.WithTimeout(ctx, changeWait)
	defer cancel()
	servers := c.raftServers()
	i := slices.IndexFunc(servers, func(s raftServer) bool { return etcd.ID(s.id) == m.ID })
	if i < 0 || !c.keepsUp(ctx, servers[i]) {
		return rpctypes.ErrGRPCLearnerNotReady
	}
	if err := c.ChangeMember(ctx, &pb.ChangeMemberRequest{Change: pb.ChangeMemberRequest_PROMOTE, Name: m.Name}); err != nil {
		return err
	}
	tick := time.NewTicker(changeEvery)
	defer tick.Stop()
	for !c.votes(servers[i].id) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return rpctypes.ErrGRPCTimeout
		}
	}
	return nil
}

// MoveLeader is `persys member transfer-leader`, on the leader.
func (c etcdControl) MoveLeader(ctx context.Context, m *etcdpb.Member) error {
	ctx, cancel := context.WithTimeout(ctx, changeWait)
	defer cancel()
	servers := c.raftServers()
	i := slices.IndexFunc(servers, func(s raftServer) bool { return etcd.ID(s.id) == m.ID })
	if i < 0 {
		return rpctypes.ErrGRPCBadLeaderTransferee
	}
	err := c.store.TransferLeadership(ctx, servers[i].id)
	switch {
	case errors.Is(err, raftstore.ErrNotLeader):
		return rpctypes.ErrGRPCNotLeader
	case err != nil:
		return etcdError(fmt.Errorf("etcdserver: %w", err))
	}
	return c.awaitLeader(ctx, func(id string) bool { return id == servers[i].id })
}

// awaitLeader returns when a leader is known here that is as wanted.
func (c etcdControl) awaitLeader(ctx context.Context, wanted func(id string) bool) error {
	for {
		changed := c.store.LeaderChanged()
		if id, _, ok := c.store.Leader(); ok && wanted(id) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return rpctypes.ErrGRPCTimeout
		}
	}
}

// Snapshot writes the state to disk, and drops the log that led to it.
func (c etcdControl) Snapshot(ctx context.Context) error { return etcdError(c.store.Snapshot(ctx)) }
