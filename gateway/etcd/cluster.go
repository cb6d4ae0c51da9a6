package etcd

import (
	"context"
	"net/url"
	"slices"

	"github.com/cespare/xxhash/v2"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
)

// Control is the server around the keyspace: who its members are, and its raft.
// Its errors are gRPC statuses, those of rpctypes where etcd has one.
type Control interface {
	// Members are the servers as v knows them, with ids made by ID. ctx is the
	// caller's: it tells which addresses are of use.
	Members(ctx context.Context, v *fsm.View) ([]*etcdpb.Member, error)
	Status() Status
	// RemoveMember returns when the server is none of the cluster any more.
	RemoveMember(ctx context.Context, m *etcdpb.Member) error
	// PromoteMember returns when the learner has its vote.
	PromoteMember(ctx context.Context, m *etcdpb.Member) error
	// MoveLeader hands leadership, which this replica has, over to a voter, and
	// returns when that one leads.
	MoveLeader(ctx context.Context, m *etcdpb.Member) error
	// Snapshot writes the state to disk, and drops the log that led to it.
	Snapshot(ctx context.Context) error
}

// Status is raft's, as this replica has it.
type Status struct {
	Leader                uint64 // 0 where none is known
	Term, Commit, Applied uint64
	// Errors are what hinders this replica.
	Errors []string
}

// ID is the number by which etcd's API knows a member or a cluster of this id. It
// is never 0, which stands for none.
func ID(id string) uint64 { return max(1, xxhash.Sum64String(id)) }

// MemberList lists the servers; on request as they surely are now. As JSON it needs no
// user: Patroni up to 4.1 asks for it before it logs in.
func (s *Server) MemberList(ctx context.Context, r *etcdpb.MemberListRequest) (*etcdpb.MemberListResponse, error) {
	if !asJSON(ctx) {
		if err := s.mustBeUser(ctx); err != nil {
			return nil, err
		}
	}
	v, members, err := s.members(ctx, r.Linearizable)
	if err != nil {
		return nil, err
	}
	return &etcdpb.MemberListResponse{Header: s.header(v.Revision()), Members: members}, nil
}

func (s *Server) members(ctx context.Context, linearizable bool) (*fsm.View, []*etcdpb.Member, error) {
	v := s.store.View()
	if linearizable {
		var err error
		if v, err = s.store.Linearizable(ctx); err != nil {
			return nil, nil, statusOf(err)
		}
	}
	members, err := s.config.Control.Members(ctx, v)
	return v, members, statusOf(err)
}

// member finds the member that a change is for.
func (s *Server) member(ctx context.Context, id uint64) (*etcdpb.Member, error) {
	if err := s.mustBeRoot(ctx); err != nil {
		return nil, err
	}
	_, members, err := s.members(ctx, true)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(members, func(m *etcdpb.Member) bool { return m.ID == id })
	if i < 0 {
		return nil, rpctypes.ErrGRPCMemberNotFound
	}
	return members[i], nil
}

// MemberAdd is refused: a server's certificate and address come with its join.
func (s *Server) MemberAdd(ctx context.Context, r *etcdpb.MemberAddRequest) (*etcdpb.MemberAddResponse, error) {
	if err := s.mustBeRoot(ctx); err != nil {
		return nil, err
	}
	if !validURLs(r.PeerURLs) {
		return nil, rpctypes.ErrGRPCMemberBadURLs
	}
	_, members, err := s.members(ctx, true)
	if err != nil {
		return nil, err
	}
	for _, m := range members {
		if slices.ContainsFunc(m.PeerURLs, func(u string) bool { return slices.Contains(r.PeerURLs, u) }) {
			return nil, rpctypes.ErrGRPCPeerURLExist
		}
	}
	return nil, status.Error(codes.FailedPrecondition, "etcdserver: a server adds itself with a token: run `persys token create --role server`, and on the new machine `persys join TOKEN`")
}

// MemberRemove takes a server out of the cluster; the leader hands over first.
func (s *Server) MemberRemove(ctx context.Context, r *etcdpb.MemberRemoveRequest) (*etcdpb.MemberRemoveResponse, error) {
	m, err := s.member(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if err := s.config.Control.RemoveMember(ctx, m); err != nil {
		return nil, statusOf(err)
	}
	// If it was this replica, there is nobody left for it to ask.
	v, members, err := s.members(ctx, m.ID != s.config.Member)
	if err != nil {
		return nil, err
	}
	members = slices.DeleteFunc(members, func(one *etcdpb.Member) bool { return one.ID == m.ID })
	return &etcdpb.MemberRemoveResponse{Header: s.header(v.Revision()), Members: members}, nil
}

// MemberUpdate accepts the addresses that the server has: it announces them itself.
func (s *Server) MemberUpdate(ctx context.Context, r *etcdpb.MemberUpdateRequest) (*etcdpb.MemberUpdateResponse, error) {
	m, err := s.member(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if !validURLs(r.PeerURLs) {
		return nil, rpctypes.ErrGRPCMemberBadURLs
	}
	if !slices.Equal(slices.Sorted(slices.Values(r.PeerURLs)), slices.Sorted(slices.Values(m.PeerURLs))) {
		return nil, status.Errorf(codes.FailedPrecondition,
			"etcdserver: server %s announces its address itself: change `advertise` or `grpc_port` of its configuration, and restart it", m.Name)
	}
	v, members, err := s.members(ctx, true)
	if err != nil {
		return nil, err
	}
	return &etcdpb.MemberUpdateResponse{Header: s.header(v.Revision()), Members: members}, nil
}

// MemberPromote gives a server that holds the log its vote.
func (s *Server) MemberPromote(ctx context.Context, r *etcdpb.MemberPromoteRequest) (*etcdpb.MemberPromoteResponse, error) {
	m, err := s.member(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if !m.IsLearner {
		return nil, rpctypes.ErrGRPCMemberNotLearner
	}
	if err := s.config.Control.PromoteMember(ctx, m); err != nil {
		return nil, statusOf(err)
	}
	v, members, err := s.members(ctx, true)
	if err != nil {
		return nil, err
	}
	return &etcdpb.MemberPromoteResponse{Header: s.header(v.Revision()), Members: members}, nil
}

// validURLs reports what etcd takes for addresses of a peer: http or https, a host,
// a port, and nothing else.
func validURLs(urls []string) bool {
	for _, one := range urls {
		u, err := url.Parse(one)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" || u.Path != "" {
			return false
		}
	}
	return len(urls) > 0
}
