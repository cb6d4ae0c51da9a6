package etcd

import (
	"bytes"
	"context"
	"maps"
	"slices"

	"go.etcd.io/etcd/api/v3/authpb"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"
)

// RoleAdd makes a role that may nothing yet.
func (s *Server) RoleAdd(ctx context.Context, r *etcdpb.AuthRoleAddRequest) (*etcdpb.AuthRoleAddResponse, error) {
	header, err := s.changeAuth(ctx, "role added", r.Name, func(e *authEdit) error {
		switch {
		case r.Name == "":
			return rpctypes.ErrGRPCRoleEmpty
		case e.roles[r.Name] != nil:
			return rpctypes.ErrGRPCRoleAlreadyExist
		}
		e.putRole(&authpb.Role{Name: []byte(r.Name)})
		return nil
	})
	return &etcdpb.AuthRoleAddResponse{Header: header}, err
}

// RoleGet says what a role grants. Users may ask for their own roles.
func (s *Server) RoleGet(ctx context.Context, r *etcdpb.AuthRoleGetRequest) (*etcdpb.AuthRoleGetResponse, error) {
	v, who, st, err := s.reader(ctx)
	if err != nil {
		return nil, err
	}
	if who.user == nil || !who.user.is(r.Role) {
		if err := who.mayAdminister(); err != nil {
			return nil, err
		}
	}
	role := st.roles[r.Role]
	if role == nil {
		return nil, rpctypes.ErrGRPCRoleNotFound
	}
	granted := role.KeyPermission
	if r.Role == rootName {
		granted = []*authpb.Permission{{PermType: authpb.Permission_READWRITE, RangeEnd: []byte{0}}}
	}
	return &etcdpb.AuthRoleGetResponse{Header: s.header(v.Revision()), Perm: granted}, nil
}

// RoleList is the names of all roles, in order.
func (s *Server) RoleList(ctx context.Context, _ *etcdpb.AuthRoleListRequest) (*etcdpb.AuthRoleListResponse, error) {
	v, _, st, err := s.manager(ctx)
	if err != nil {
		return nil, err
	}
	return &etcdpb.AuthRoleListResponse{Header: s.header(v.Revision()), Roles: namesOf(st.roles)}, nil
}

// RoleDelete ends a role, and takes it from all users.
func (s *Server) RoleDelete(ctx context.Context, r *etcdpb.AuthRoleDeleteRequest) (*etcdpb.AuthRoleDeleteResponse, error) {
	header, err := s.changeAuth(ctx, "role deleted", r.Role, func(e *authEdit) error {
		if e.enabled && r.Role == rootName {
			return rpctypes.ErrGRPCInvalidAuthMgmt
		}
		if e.roles[r.Role] == nil {
			return rpctypes.ErrGRPCRoleNotFound
		}
		e.delete(authRolesPrefix + r.Role)
		for _, name := range namesOf(e.users) {
			if e.users[name].is(r.Role) {
				changed := proto.CloneOf(e.users[name].User)
				changed.Roles = without(changed.Roles, r.Role)
				e.putUser(changed)
			}
		}
		return nil
	})
	return &etcdpb.AuthRoleDeleteResponse{Header: header}, err
}

// RoleGrantPermission lets a role read or write a key or a range; a permission for
// just that range is replaced.
func (s *Server) RoleGrantPermission(ctx context.Context, r *etcdpb.AuthRoleGrantPermissionRequest) (*etcdpb.AuthRoleGrantPermissionResponse, error) {
	header, err := s.changeAuth(ctx, "permission granted to role", r.Name, func(e *authEdit) error {
		if r.Perm == nil {
			return rpctypes.ErrGRPCPermissionNotGiven
		}
		if !isPermissionRange(r.Perm.Key, r.Perm.RangeEnd) || authpb.Permission_Type_name[int32(r.Perm.PermType)] == "" {
			return rpctypes.ErrGRPCInvalidAuthMgmt
		}
		return e.role(r.Name, func(role *authpb.Role) error {
			at, found := slices.BinarySearchFunc(role.KeyPermission, r.Perm, comparePermissions)
			if found {
				role.KeyPermission[at].PermType = r.Perm.PermType
			} else {
				role.KeyPermission = slices.Insert(role.KeyPermission, at, r.Perm)
			}
			return nil
		})
	})
	return &etcdpb.AuthRoleGrantPermissionResponse{Header: header}, err
}

// RoleRevokePermission takes back a permission for just that key or range.
func (s *Server) RoleRevokePermission(ctx context.Context, r *etcdpb.AuthRoleRevokePermissionRequest) (*etcdpb.AuthRoleRevokePermissionResponse, error) {
	header, err := s.changeAuth(ctx, "permission revoked from role", r.Role, func(e *authEdit) error {
		return e.role(r.Role, func(role *authpb.Role) error {
			given := &authpb.Permission{Key: r.Key, RangeEnd: r.RangeEnd}
			at, found := slices.BinarySearchFunc(role.KeyPermission, given, comparePermissions)
			if !found {
				return rpctypes.ErrGRPCPermissionNotGranted
			}
			role.KeyPermission = slices.Delete(role.KeyPermission, at, at+1)
			return nil
		})
	})
	return &etcdpb.AuthRoleRevokePermissionResponse{Header: header}, err
}

// role changes a copy of a role.
func (e *authEdit) role(name string, change func(*authpb.Role) error) error {
	role := e.roles[name]
	if role == nil {
		return rpctypes.ErrGRPCRoleNotFound
	}
	changed := proto.CloneOf(role)
	if err := change(changed); err != nil {
		return err
	}
	e.putRole(changed)
	return nil
}

func comparePermissions(a, b *authpb.Permission) int {
	if c := bytes.Compare(a.Key, b.Key); c != 0 {
		return c
	}
	return bytes.Compare(a.RangeEnd, b.RangeEnd)
}

// isPermissionRange is etcd's idea of what can be granted.
func isPermissionRange(key, end []byte) bool {
	return len(key) > 0 && (len(end) == 0 || endless(end) || bytes.Compare(key, end) < 0)
}

func namesOf[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
