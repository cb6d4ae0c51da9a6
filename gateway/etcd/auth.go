package etcd

import (
	"context"
	"sync"
	"sync/atomic"

	"go.etcd.io/etcd/api/v3/authpb"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The keys of etcd's users and roles. Whatever changes one of them also writes
// authStatusKey: who has seen its revision has seen all.
const (
	authStatusKey   = model.SystemPrefix + "auth/status" // etcdpb.AuthStatusResponse
	authSecretKey   = model.SystemPrefix + "auth/secret" // signs tokens; new each time auth is enabled
	authUsersPrefix = model.SystemPrefix + "auth/users/" // authpb.User
	authRolesPrefix = model.SystemPrefix + "auth/roles/" // authpb.Role
)

// rootName is etcd's name for the user that can't be missing and the role that may
// everything.
const rootName = "root"

// auth is etcd's users and roles, and who calls.
type auth struct {
	store    Store
	config   Config
	sessions sessions
	bcrypt   bcryptQueue

	mu      sync.Mutex // held to read a state
	current atomic.Pointer[authState]
}

func newAuth(c Config) *auth {
	return &auth{store: c.Store, config: c, sessions: newSessions(c.TokenTTL), bcrypt: newBcryptQueue()}
}

// authState is users and roles as they were from one change to the next.
type authState struct {
	// mod is the revision of authStatusKey, 0 as long as auth was never used.
	mod int64
	// It was seen in views from log index first to last.
	first uint64
	last  atomic.Uint64

	enabled bool
	// revision counts changes from 1, as etcd does.
	revision uint64
	secret   []byte
	users    map[string]*user
	roles    map[string]*authpb.Role

	store Store
	guard []*pb.Compare
	// These may be anybody: nobody who needs a user, everybody where none is needed.
	unknown, anybody *caller
}

// user is a user with what the roles add up to.
type user struct {
	*authpb.User
	caller func() *caller
}

func (u *user) is(role string) bool {
	for _, r := range u.Roles {
		if r == role {
			return true
		}
	}
	return false
}

// at is the state in a view; a nil view stands for what was read last.
func (a *auth) at(v *fsm.View) (*authState, error) {
	st := a.current.Load()
	if v == nil {
		if st != nil {
			return st, nil
		}
		v = a.store.View()
	}
	if st != nil && st.isOf(v) {
		return st, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if st = a.current.Load(); st != nil && st.isOf(v) {
		return st, nil
	}
	read, err := readAuth(a.store, v)
	if err != nil {
		return nil, err
	}
	if st == nil || read.first > st.first {
		a.current.Store(read)
	}
	return read, nil
}

// isOf reports whether the view has this state. Views between two that have it
// have it too, which saves looking.
func (st *authState) isOf(v *fsm.View) bool {
	index := v.Index()
	if st.first <= index && index <= st.last.Load() {
		return true
	}
	var mod int64
	if kv, ok := v.Get(authStatusKey); ok {
		mod = kv.ModRevision
	}
	if st.mod != mod {
		return false
	}
	if index > st.last.Load() {
		st.last.Store(index)
	}
	return true
}

func readAuth(store Store, v *fsm.View) (*authState, error) {
	st := &authState{store: store, first: v.Index(), revision: 1, users: map[string]*user{}, roles: map[string]*authpb.Role{}}
	st.last.Store(st.first)
	if kv, ok := v.Get(authStatusKey); ok {
		var status etcdpb.AuthStatusResponse
		if err := proto.Unmarshal(kv.Value, &status); err != nil {
			return nil, err
		}
		st.mod, st.enabled, st.revision = kv.ModRevision, status.Enabled, status.AuthRevision
	}
	if kv, ok := v.Get(authSecretKey); ok {
		st.secret = kv.Value
	}
	for kv := range v.Scan(authRolesPrefix) {
		role := &authpb.Role{}
		if err := proto.Unmarshal(kv.Value, role); err != nil {
			return nil, err
		}
		st.roles[string(role.Name)] = role
	}
	st.guard = []*pb.Compare{{
		Key: []byte(authStatusKey), Target: pb.Compare_MOD,
		TargetUnion: &pb.Compare_ModRevision{ModRevision: st.mod},
	}}
	for kv := range v.Scan(authUsersPrefix) {
		u := &user{User: &authpb.User{}}
		if err := proto.Unmarshal(kv.Value, u.User); err != nil {
			return nil, err
		}
		u.caller = sync.OnceValue(func() *caller { return st.callerOf(u) })
		st.users[string(u.Name)] = u
	}
	st.anybody = &caller{actor: "etcd", root: true, manages: true, as: st}
	st.unknown = &caller{actor: "etcd", refused: rpctypes.ErrGRPCUserEmpty, as: st}
	return st, nil
}

// callerOf adds up what the roles of a user grant.
func (st *authState) callerOf(u *user) *caller {
	c := &caller{actor: "etcd/" + string(u.Name), user: u, as: st}
	for _, name := range u.Roles {
		if name == rootName {
			c.root, c.manages = true, true
			return c
		}
		for _, p := range st.roles[name].GetKeyPermission() {
			s := grantOf(p.Key, p.RangeEnd)
			if p.PermType != authpb.Permission_WRITE {
				c.reads = append(c.reads, s)
			}
			if p.PermType != authpb.Permission_READ {
				c.writes = append(c.writes, s)
			}
		}
	}
	c.reads, c.writes = c.reads.merged(), c.writes.merged()
	return c
}

// caller finds out who calls, as of v. A nil view stands for what was read last:
// then a refusal is not final.
func (a *auth) caller(ctx context.Context, v *fsm.View) (*caller, error) {
	st, err := a.at(v)
	if err != nil {
		return nil, err
	}
	if a.config.Identity != nil {
		if actor, role, ok := a.config.Identity(ctx); ok {
			return a.identified(ctx, st, actor, role)
		}
	}
	if !st.enabled {
		return st.anybody, nil
	}
	return a.byToken(ctx, st)
}

// identified is a caller with a certificate of the cluster: its role there bounds
// what an etcd user may.
func (a *auth) identified(ctx context.Context, st *authState, actor string, role pb.Role) (*caller, error) {
	c := &caller{actor: actor, root: true, as: st}
	switch role {
	case pb.Role_ROLE_ADMIN, pb.Role_ROLE_SERVER:
		c.manages = true
		return c, nil
	case pb.Role_ROLE_OPERATOR:
		c.limited = true
	case pb.Role_ROLE_VIEWER:
		c.limited, c.viewer = true, true
	default:
		return &caller{actor: actor, refused: rpctypes.ErrGRPCPermissionDenied, as: st}, nil
	}
	if !st.enabled {
		return c, nil
	}
	by, err := a.byToken(ctx, st)
	if err != nil {
		return nil, err
	}
	bounded := *by
	bounded.actor, bounded.manages, bounded.limited, bounded.viewer = actor, false, true, c.viewer
	return &bounded, nil
}

// byToken is the etcd user that the caller has a token of or, where there is none,
// is by certificate.
func (a *auth) byToken(ctx context.Context, st *authState) (*caller, error) {
	if s := pinned(ctx); s != nil {
		return a.sessions.user(s, st)
	}
	if token, ok := tokenOf(ctx); ok {
		s, err := a.sessions.open(token, st)
		if err != nil {
			return nil, err
		}
		return a.sessions.user(s, st)
	}
	if a.config.CertUser == nil || len(metadata.ValueFromIncomingContext(ctx, "grpcgateway-accept")) > 0 {
		return st.unknown, nil
	}
	name := a.config.CertUser(ctx)
	if name == "" {
		return st.unknown, nil
	}
	if u := st.users[name]; u != nil {
		return u.caller(), nil
	}
	return &caller{actor: "etcd/" + name, refused: rpctypes.ErrGRPCPermissionDenied, as: st}, nil
}

// pin makes a stream keep the user of the token that it was opened with, for as long
// as the user keeps the password: a stream can't bring a new token.
func (a *auth) pin(ctx context.Context) context.Context {
	token, ok := tokenOf(ctx)
	if !ok {
		return ctx
	}
	st, err := a.at(a.store.View())
	if err != nil || !st.enabled {
		return ctx
	}
	s, err := a.sessions.open(token, st)
	if err != nil {
		return ctx
	}
	return context.WithValue(ctx, pinKey{}, s)
}

// mustBeRoot refuses who may not change users, members, alarms and the like.
func (s *Server) mustBeRoot(ctx context.Context) error {
	_, _, _, err := s.manager(ctx)
	return err
}

// mustBeUser refuses who needs a user and is none.
func (s *Server) mustBeUser(ctx context.Context) error {
	who, err := s.auth.caller(ctx, s.store.View())
	if err == nil && who.refused == nil {
		return nil
	}
	if _, who, _, err = s.reader(ctx); err != nil {
		return err
	}
	return who.refused
}

// mustBeRootHere is mustBeRoot for what concerns this replica alone, and has to work
// while there is no leader. A refusal is only given on a linearizable view.
func (s *Server) mustBeRootHere(ctx context.Context) error {
	who, err := s.auth.caller(ctx, s.store.View())
	if err == nil && who.mayAdminister() == nil {
		return nil
	}
	return s.mustBeRoot(ctx)
}
