package etcd

import (
	"context"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// errNoPassword has no place among etcd's own errors; its server answers so.
var errNoPassword = status.Error(codes.Unknown, "auth: authentication failed, password was given for no password user")

// Authenticate gives a token for a password.
func (s *Server) Authenticate(ctx context.Context, r *etcdpb.AuthenticateRequest) (*etcdpb.AuthenticateResponse, error) {
	v, err := s.store.Linearizable(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	st, err := s.auth.at(v)
	if err != nil {
		return nil, statusOf(err)
	}
	u := st.users[r.Name]
	switch {
	case !st.enabled:
		return nil, rpctypes.ErrGRPCAuthNotEnabled
	case u == nil:
		return nil, rpctypes.ErrGRPCAuthFailed
	case u.Options.GetNoPassword():
		return nil, errNoPassword
	}
	ok, err := s.auth.matches(ctx, u.Password, r.Password)
	if err != nil {
		return nil, err
	}
	if !ok {
		s.log.Warn("wrong password", "user", r.Name)
		return nil, rpctypes.ErrGRPCAuthFailed
	}
	token := newToken(r.Name, st.secret, u.Password, time.Now().Add(s.config.TokenTTL))
	return &etcdpb.AuthenticateResponse{Header: s.header(v.Revision()), Token: token}, nil
}

// UserAdd makes a user, with a password or, as in etcd, for certificates alone.
func (s *Server) UserAdd(ctx context.Context, r *etcdpb.AuthUserAddRequest) (*etcdpb.AuthUserAddResponse, error) {
	_, _, st, err := s.manager(ctx)
	switch {
	case err != nil:
		return nil, err
	case r.Name == "":
		return nil, rpctypes.ErrGRPCUserEmpty
	case st.users[r.Name] != nil:
		return nil, rpctypes.ErrGRPCUserAlreadyExist
	}
	options := r.Options
	if options == nil {
		options = &authpb.UserAddOptions{}
	}
	var hash []byte
	if !options.NoPassword {
		if hash, err = s.auth.hash(ctx, r.Password, r.HashedPassword); err != nil {
			return nil, err
		}
	}
	header, err := s.changeAuth(ctx, "user added", r.Name, func(e *authEdit) error {
		if e.users[r.Name] != nil {
			return rpctypes.ErrGRPCUserAlreadyExist
		}
		e.putUser(&authpb.User{Name: []byte(r.Name), Password: hash, Options: options})
		return nil
	})
	return &etcdpb.AuthUserAddResponse{Header: header}, err
}

// UserGet says which roles a user has. Users may ask for themselves.
func (s *Server) UserGet(ctx context.Context, r *etcdpb.AuthUserGetRequest) (*etcdpb.AuthUserGetResponse, error) {
	v, who, st, err := s.reader(ctx)
	if err != nil {
		return nil, err
	}
	if who.user == nil || string(who.user.Name) != r.Name {
		if err := who.mayAdminister(); err != nil {
			return nil, err
		}
	}
	u := st.users[r.Name]
	if u == nil {
		return nil, rpctypes.ErrGRPCUserNotFound
	}
	return &etcdpb.AuthUserGetResponse{Header: s.header(v.Revision()), Roles: u.Roles}, nil
}

// UserList is the names of all users, in order.
func (s *Server) UserList(ctx context.Context, _ *etcdpb.AuthUserListRequest) (*etcdpb.AuthUserListResponse, error) {
	v, _, st, err := s.manager(ctx)
	if err != nil {
		return nil, err
	}
	return &etcdpb.AuthUserListResponse{Header: s.header(v.Revision()), Users: namesOf(st.users)}, nil
}

// UserDelete ends a user, and with it the user's tokens.
func (s *Server) UserDelete(ctx context.Context, r *etcdpb.AuthUserDeleteRequest) (*etcdpb.AuthUserDeleteResponse, error) {
	header, err := s.changeAuth(ctx, "user deleted", r.Name, func(e *authEdit) error {
		if e.enabled && r.Name == rootName {
			return rpctypes.ErrGRPCInvalidAuthMgmt
		}
		if e.users[r.Name] == nil {
			return rpctypes.ErrGRPCUserNotFound
		}
		e.delete(authUsersPrefix + r.Name)
		return nil
	})
	return &etcdpb.AuthUserDeleteResponse{Header: header}, err
}

// UserChangePassword sets a new password and ends the tokens of the old one. A user
// without password stays so, as in etcd.
func (s *Server) UserChangePassword(ctx context.Context, r *etcdpb.AuthUserChangePasswordRequest) (*etcdpb.AuthUserChangePasswordResponse, error) {
	_, _, st, err := s.manager(ctx)
	if err != nil {
		return nil, err
	}
	if st.users[r.Name] == nil {
		return nil, rpctypes.ErrGRPCUserNotFound
	}
	hash, err := s.auth.hash(ctx, r.Password, r.HashedPassword)
	if err != nil {
		return nil, err
	}
	header, err := s.changeAuth(ctx, "password changed", r.Name, func(e *authEdit) error {
		return e.user(r.Name, func(u *authpb.User) error {
			if !u.Options.GetNoPassword() {
				u.Password = hash
			}
			return nil
		})
	})
	return &etcdpb.AuthUserChangePasswordResponse{Header: header}, err
}

// UserGrantRole gives a user a role. The role root need not exist.
func (s *Server) UserGrantRole(ctx context.Context, r *etcdpb.AuthUserGrantRoleRequest) (*etcdpb.AuthUserGrantRoleResponse, error) {
	header, err := s.changeAuth(ctx, "role granted to user", r.User, func(e *authEdit) error {
		u := e.users[r.User]
		switch {
		case u == nil:
			return rpctypes.ErrGRPCUserNotFound
		case r.Role != rootName && e.roles[r.Role] == nil:
			return rpctypes.ErrGRPCRoleNotFound
		case u.is(r.Role):
			return nil
		}
		return e.user(r.User, func(u *authpb.User) error {
			u.Roles = append(u.Roles, r.Role)
			slices.Sort(u.Roles)
			return nil
		})
	})
	return &etcdpb.AuthUserGrantRoleResponse{Header: header}, err
}

// UserRevokeRole takes a role from a user.
func (s *Server) UserRevokeRole(ctx context.Context, r *etcdpb.AuthUserRevokeRoleRequest) (*etcdpb.AuthUserRevokeRoleResponse, error) {
	header, err := s.changeAuth(ctx, "role revoked from user", r.Name, func(e *authEdit) error {
		if e.enabled && r.Name == rootName && r.Role == rootName {
			return rpctypes.ErrGRPCInvalidAuthMgmt
		}
		return e.user(r.Name, func(u *authpb.User) error {
			if !slices.Contains(u.Roles, r.Role) {
				return rpctypes.ErrGRPCRoleNotGranted
			}
			u.Roles = without(u.Roles, r.Role)
			return nil
		})
	})
	return &etcdpb.AuthUserRevokeRoleResponse{Header: header}, err
}

// user changes a copy of a user.
func (e *authEdit) user(name string, change func(*authpb.User) error) error {
	u := e.users[name]
	if u == nil {
		return rpctypes.ErrGRPCUserNotFound
	}
	changed := proto.CloneOf(u.User)
	if err := change(changed); err != nil {
		return err
	}
	e.putUser(changed)
	return nil
}

func without(list []string, one string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == one })
}
