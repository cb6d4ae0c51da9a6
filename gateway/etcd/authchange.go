package etcd

import (
	"context"
	"crypto/rand"

	"go.etcd.io/etcd/api/v3/authpb"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// maxAuthAttempts bounds how often a change of users and roles is made anew because
// another one came first.
const maxAuthAttempts = 64

// authEdit collects what one call changes.
type authEdit struct {
	*authState
	ops []*pb.RequestOp
	// status is that of after the change.
	status *etcdpb.AuthStatusResponse
	err    error
}

func (e *authEdit) put(key string, value []byte) {
	e.ops = append(e.ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
		RequestPut: &pb.PutRequest{Key: []byte(key), Value: value},
	}})
}

func (e *authEdit) marshal(key string, m proto.Message) {
	value, err := proto.Marshal(m)
	if err != nil {
		e.err = err
		return
	}
	e.put(key, value)
}

func (e *authEdit) putUser(u *authpb.User) { e.marshal(authUsersPrefix+string(u.Name), u) }
func (e *authEdit) putRole(r *authpb.Role) { e.marshal(authRolesPrefix+string(r.Name), r) }

func (e *authEdit) delete(key string) {
	e.ops = append(e.ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{
		RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)},
	}})
}

// changeAuth carries out an edit by somebody who manages users. It may be made several
// times, until it is made on the newest state; one without operations is done already.
func (s *Server) changeAuth(ctx context.Context, what, name string, edit func(*authEdit) error) (*etcdpb.ResponseHeader, error) {
	for range maxAuthAttempts {
		v, who, st, err := s.manager(ctx)
		if err != nil {
			return nil, err
		}
		e := &authEdit{authState: st, status: &etcdpb.AuthStatusResponse{Enabled: st.enabled, AuthRevision: st.revision + 1}}
		if err := edit(e); err != nil {
			return nil, err
		}
		if len(e.ops) == 0 {
			return s.header(v.Revision()), nil
		}
		e.marshal(authStatusKey, e.status)
		if e.err != nil {
			return nil, statusOf(e.err)
		}
		answer, err := s.store.Propose(ctx, &pb.Txn{Compare: st.guard, Success: e.ops})
		if err != nil {
			return nil, statusOf(err)
		}
		if answer.Succeeded {
			s.log.Info("users and roles changed", "change", what, "name", name, "actor", who.actor)
			return s.header(answer.Revision), nil
		}
	}
	return nil, status.Errorf(codes.Unavailable, "etcdserver: others changed users and roles %d times in a row; try again", maxAuthAttempts)
}

// manager is the caller, who manages users, with the newest state.
func (s *Server) manager(ctx context.Context) (*fsm.View, *caller, *authState, error) {
	v, who, st, err := s.reader(ctx)
	if err == nil {
		err = who.mayAdminister()
	}
	return v, who, st, err
}

// reader is any caller, with the newest state.
func (s *Server) reader(ctx context.Context) (*fsm.View, *caller, *authState, error) {
	v, err := s.store.Linearizable(ctx)
	if err != nil {
		return nil, nil, nil, statusOf(err)
	}
	who, err := s.auth.caller(ctx, v)
	if err != nil {
		return nil, nil, nil, statusOf(err)
	}
	st, err := s.auth.at(v)
	if err != nil {
		return nil, nil, nil, statusOf(err)
	}
	return v, who, st, nil
}

// AuthEnable makes users and roles count. The user root with the role root must
// exist: somebody has to be able to end it.
func (s *Server) AuthEnable(ctx context.Context, _ *etcdpb.AuthEnableRequest) (*etcdpb.AuthEnableResponse, error) {
	header, err := s.changeAuth(ctx, "enable", "", func(e *authEdit) error {
		root := e.users[rootName]
		switch {
		case e.enabled:
			return nil
		case root == nil:
			return rpctypes.ErrGRPCRootUserNotExist
		case !root.is(rootName):
			return rpctypes.ErrGRPCRootRoleNotExist
		}
		secret := make([]byte, 32)
		if _, err := rand.Read(secret); err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		e.put(authSecretKey, secret)
		e.status.Enabled, e.status.AuthRevision = true, e.revision
		return nil
	})
	return &etcdpb.AuthEnableResponse{Header: header}, err
}

// AuthDisable lets everybody do everything. All tokens end.
func (s *Server) AuthDisable(ctx context.Context, _ *etcdpb.AuthDisableRequest) (*etcdpb.AuthDisableResponse, error) {
	header, err := s.changeAuth(ctx, "disable", "", func(e *authEdit) error {
		if e.enabled {
			e.delete(authSecretKey)
			e.status.Enabled = false
		}
		return nil
	})
	return &etcdpb.AuthDisableResponse{Header: header}, err
}

// AuthStatus says whether users count, and how many changes there were.
func (s *Server) AuthStatus(ctx context.Context, _ *etcdpb.AuthStatusRequest) (*etcdpb.AuthStatusResponse, error) {
	v, _, st, err := s.manager(ctx)
	if err != nil {
		return nil, err
	}
	return &etcdpb.AuthStatusResponse{Header: s.header(v.Revision()), Enabled: st.enabled, AuthRevision: st.revision}, nil
}
