package etcd

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/authpb"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

// guarded is an etcd or a replica of ours, with the tokens that it gave. They are sent
// while auth is enabled: etcd 3.4 refuses old ones before, where later ones and we
// don't look at them.
type guarded struct {
	conn    *grpc.ClientConn
	enabled bool
	tokens  map[string]string
}

// guardedCall is one request by the holder of a token of a user, or of none.
type guardedCall struct {
	method  string
	request proto.Message
	as      string
	answer  func() proto.Message
}

func (c guardedCall) String() string {
	return fmt.Sprintf("%s: %s {%v}", c.as, c.method, c.request)
}

// ask shows an answer without what differs by right: headers, and revisions, of which
// changes of users and roles make one here.
func (g *guarded) ask(ctx context.Context, c guardedCall) string {
	if token := g.tokens[c.as]; token != "" && g.enabled {
		ctx = metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, token)
	}
	answer := c.answer()
	if err := g.conn.Invoke(ctx, "/etcdserverpb."+c.method, c.request, answer); err != nil {
		return err.Error()
	}
	switch a := answer.(type) {
	case *etcdpb.AuthEnableResponse:
		g.enabled = true
	case *etcdpb.AuthDisableResponse:
		g.enabled = false
	case *etcdpb.AuthenticateResponse:
		g.tokens[c.request.(*etcdpb.AuthenticateRequest).Name] = a.Token
		return "a token"
	case *etcdpb.AuthUserGetResponse:
		return fmt.Sprint(a.Roles)
	case *etcdpb.AuthUserListResponse:
		return fmt.Sprint(a.Users)
	case *etcdpb.AuthRoleListResponse:
		return fmt.Sprint(a.Roles)
	case *etcdpb.AuthRoleGetResponse:
		var all []string
		for _, p := range a.Perm {
			all = append(all, fmt.Sprintf("%s %q %q", p.PermType, p.Key, p.RangeEnd))
		}
		return strings.Join(all, ", ")
	case *etcdpb.RangeResponse:
		return fmt.Sprint(a.Count)
	case *etcdpb.DeleteRangeResponse:
		return fmt.Sprint(a.Deleted, len(a.PrevKvs))
	case *etcdpb.TxnResponse:
		return fmt.Sprint(a.Succeeded, len(a.Responses))
	}
	return "done"
}

func to[R any, P interface {
	*R
	proto.Message
}]() proto.Message {
	return P(new(R))
}

// clear takes back all that a sequence has done. Root's password is always "p".
func (g *guarded) clear(ctx context.Context, t *rapid.T) {
	call := func(method string, request proto.Message, answer func() proto.Message) proto.Message {
		a := answer()
		if err := g.conn.Invoke(ctx, "/etcdserverpb."+method, request, a); err != nil {
			t.Fatal(method, err)
		}
		return a
	}
	if g.enabled {
		g.ask(ctx, guardedCall{"Auth/Authenticate", &etcdpb.AuthenticateRequest{Name: "root", Password: "p"}, "", to[etcdpb.AuthenticateResponse]})
		g.ask(ctx, guardedCall{"Auth/AuthDisable", &etcdpb.AuthDisableRequest{}, "root", to[etcdpb.AuthDisableResponse]})
	}
	g.tokens = map[string]string{"garbage": "garbage"}
	for _, name := range call("Auth/UserList", &etcdpb.AuthUserListRequest{}, to[etcdpb.AuthUserListResponse]).(*etcdpb.AuthUserListResponse).Users {
		call("Auth/UserDelete", &etcdpb.AuthUserDeleteRequest{Name: name}, to[etcdpb.AuthUserDeleteResponse])
	}
	for _, name := range call("Auth/RoleList", &etcdpb.AuthRoleListRequest{}, to[etcdpb.AuthRoleListResponse]).(*etcdpb.AuthRoleListResponse).Roles {
		call("Auth/RoleDelete", &etcdpb.AuthRoleDeleteRequest{Role: name}, to[etcdpb.AuthRoleDeleteResponse])
	}
	call("KV/DeleteRange", &etcdpb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}, to[etcdpb.DeleteRangeResponse])
}

var (
	someUser     = rapid.SampledFrom([]string{"ann", "bob", "root", ""})
	someRole     = rapid.SampledFrom([]string{"one", "two", "root", ""})
	somePassword = rapid.SampledFrom([]string{"p", "q"})
	someCaller   = rapid.SampledFrom([]string{"root", "root", "root", "ann", "ann", "bob", "nobody", "garbage"})
	someRange    = rapid.SampledFrom([][2]string{{"a"}, {"b"}, {"c"}, {"a", "b"}, {"a", "c"}, {"a", "d"}, {"b", "d"}, {"b", "\x00"}, {"c", "\x00"}, {"\x00", "\x00"}, {"ab", "bb"}})
	// A key has one range end: etcd 3.4 mixes up several.
	someGrant = rapid.SampledFrom([][2]string{{"a", "b"}, {"aa"}, {"b"}, {"bb", "d"}, {"c", "\x00"}, {"b\x00", "c"}})
)

func genManagement(t *rapid.T) guardedCall {
	user, role, grant := someUser.Draw(t, "user"), someRole.Draw(t, "role"), someGrant.Draw(t, "grant")
	password := "p" // root's does not change
	if user != "root" {
		password = somePassword.Draw(t, "password")
	}
	kind := authpb.Permission_Type(rapid.IntRange(0, 2).Draw(t, "kind"))
	all := []guardedCall{
		{"Auth/AuthEnable", &etcdpb.AuthEnableRequest{}, "", to[etcdpb.AuthEnableResponse]},
		{"Auth/AuthDisable", &etcdpb.AuthDisableRequest{}, "", to[etcdpb.AuthDisableResponse]},
		{"Auth/UserAdd", &etcdpb.AuthUserAddRequest{Name: user, Password: password, Options: &authpb.UserAddOptions{}}, "", to[etcdpb.AuthUserAddResponse]},
		{"Auth/UserDelete", &etcdpb.AuthUserDeleteRequest{Name: user}, "", to[etcdpb.AuthUserDeleteResponse]},
		{"Auth/UserChangePassword", &etcdpb.AuthUserChangePasswordRequest{Name: user, Password: password}, "", to[etcdpb.AuthUserChangePasswordResponse]},
		{"Auth/UserGet", &etcdpb.AuthUserGetRequest{Name: cmp.Or(user, "ann")}, "", to[etcdpb.AuthUserGetResponse]},
		{"Auth/UserList", &etcdpb.AuthUserListRequest{}, "", to[etcdpb.AuthUserListResponse]},
		{"Auth/UserGrantRole", &etcdpb.AuthUserGrantRoleRequest{User: user, Role: role}, "", to[etcdpb.AuthUserGrantRoleResponse]},
		{"Auth/UserRevokeRole", &etcdpb.AuthUserRevokeRoleRequest{Name: user, Role: role}, "", to[etcdpb.AuthUserRevokeRoleResponse]},
		{"Auth/RoleAdd", &etcdpb.AuthRoleAddRequest{Name: role}, "", to[etcdpb.AuthRoleAddResponse]},
		{"Auth/RoleDelete", &etcdpb.AuthRoleDeleteRequest{Role: role}, "", to[etcdpb.AuthRoleDeleteResponse]},
		{"Auth/RoleList", &etcdpb.AuthRoleListRequest{}, "", to[etcdpb.AuthRoleListResponse]},
		{"Auth/RoleGrantPermission", &etcdpb.AuthRoleGrantPermissionRequest{Name: role, Perm: &authpb.Permission{
			PermType: kind, Key: []byte(grant[0]), RangeEnd: []byte(grant[1]),
		}}, "", to[etcdpb.AuthRoleGrantPermissionResponse]},
		{"Auth/RoleRevokePermission", &etcdpb.AuthRoleRevokePermissionRequest{Role: role, Key: []byte(grant[0]), RangeEnd: []byte(grant[1])}, "", to[etcdpb.AuthRoleRevokePermissionResponse]},
		{"Auth/Authenticate", &etcdpb.AuthenticateRequest{Name: user, Password: somePassword.Draw(t, "given")}, "", to[etcdpb.AuthenticateResponse]},
	}
	if role != "root" { // of which etcd 3.4 does not say what it grants
		all = append(all, guardedCall{"Auth/RoleGet", &etcdpb.AuthRoleGetRequest{Role: role}, "", to[etcdpb.AuthRoleGetResponse]})
	}
	return rapid.SampledFrom(all).Draw(t, "call")
}

func genGuardedOp(t *rapid.T) *etcdpb.RequestOp {
	r := someRange.Draw(t, "range")
	key, end := []byte(r[0]), []byte(r[1])
	switch rapid.IntRange(0, 2).Draw(t, "op") {
	case 0:
		return &etcdpb.RequestOp{Request: &etcdpb.RequestOp_RequestRange{RequestRange: &etcdpb.RangeRequest{Key: key, RangeEnd: end, Serializable: rapid.Bool().Draw(t, "serializable")}}}
	case 1:
		return &etcdpb.RequestOp{Request: &etcdpb.RequestOp_RequestPut{RequestPut: &etcdpb.PutRequest{Key: key}}}
	}
	return &etcdpb.RequestOp{Request: &etcdpb.RequestOp_RequestDeleteRange{RequestDeleteRange: &etcdpb.DeleteRangeRequest{Key: key, RangeEnd: end, PrevKv: rapid.Bool().Draw(t, "prev")}}}
}

func genChecked(t *rapid.T) guardedCall {
	switch op := genGuardedOp(t).Request.(type) {
	case *etcdpb.RequestOp_RequestRange:
		return guardedCall{"KV/Range", op.RequestRange, "", to[etcdpb.RangeResponse]}
	case *etcdpb.RequestOp_RequestDeleteRange:
		return guardedCall{"KV/DeleteRange", op.RequestDeleteRange, "", to[etcdpb.DeleteRangeResponse]}
	case *etcdpb.RequestOp_RequestPut:
		if op.RequestPut.PrevKv = rapid.Bool().Draw(t, "prev"); rapid.Bool().Draw(t, "put") {
			return guardedCall{"KV/Put", op.RequestPut, "", to[etcdpb.PutResponse]}
		}
	}
	txn := &etcdpb.TxnRequest{}
	if rapid.Bool().Draw(t, "compares") {
		r := someRange.Draw(t, "compared")
		txn.Compare = []*etcdpb.Compare{{
			Key: []byte(r[0]), RangeEnd: []byte(r[1]), Target: etcdpb.Compare_VERSION, Result: etcdpb.Compare_GREATER,
			TargetUnion: &etcdpb.Compare_Version{},
		}}
	}
	if rapid.Bool().Draw(t, "then") {
		txn.Success = []*etcdpb.RequestOp{genGuardedOp(t)}
	}
	if rapid.Bool().Draw(t, "else") {
		txn.Failure = []*etcdpb.RequestOp{genGuardedOp(t)}
	}
	return guardedCall{"KV/Txn", txn, "", to[etcdpb.TxnResponse]}
}

// fewer is how many sequences a slow test makes, unless -rapid.checks says otherwise.
func fewer(t *testing.T, checks int) {
	t.Helper()
	checked := flag.Lookup("rapid.checks")
	if before := checked.Value.String(); before == checked.DefValue {
		ok(t, checked.Value.Set(strconv.Itoa(checks)))
		t.Cleanup(func() { ok(t, checked.Value.Set(before)) })
	}
}

// The same users, roles, permissions and requests by them, in the same order, are
// answered alike by an etcd and by us, errors included.
func TestDifferentialAuth(t *testing.T) {
	theirs := startEtcd(t, "--bcrypt-cost=4")
	c := newCluster(t, 1, quick)
	etcd, ours := &guarded{conn: dial(t, theirs)}, &guarded{conn: dial(t, c.replicas[0].endpoint)}
	start := []guardedCall{
		{"Auth/UserAdd", &etcdpb.AuthUserAddRequest{Name: "root", Password: "p", Options: &authpb.UserAddOptions{}}, "", to[etcdpb.AuthUserAddResponse]},
		{"Auth/UserGrantRole", &etcdpb.AuthUserGrantRoleRequest{User: "root", Role: "root"}, "", to[etcdpb.AuthUserGrantRoleResponse]},
		{"Auth/UserAdd", &etcdpb.AuthUserAddRequest{Name: "ann", Password: "p", Options: &authpb.UserAddOptions{}}, "", to[etcdpb.AuthUserAddResponse]},
		{"Auth/RoleAdd", &etcdpb.AuthRoleAddRequest{Name: "one"}, "", to[etcdpb.AuthRoleAddResponse]},
		{"Auth/UserGrantRole", &etcdpb.AuthUserGrantRoleRequest{User: "ann", Role: "one"}, "", to[etcdpb.AuthUserGrantRoleResponse]},
		{"Auth/AuthEnable", &etcdpb.AuthEnableRequest{}, "", to[etcdpb.AuthEnableResponse]},
		{"Auth/Authenticate", &etcdpb.AuthenticateRequest{Name: "root", Password: "p"}, "", to[etcdpb.AuthenticateResponse]},
		{"Auth/Authenticate", &etcdpb.AuthenticateRequest{Name: "ann", Password: "p"}, "", to[etcdpb.AuthenticateResponse]},
	}
	fewer(t, 20)
	rapid.Check(t, func(t *rapid.T) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		etcd.clear(ctx, t)
		ours.clear(ctx, t)
		var calls []guardedCall
		if rapid.IntRange(0, 3).Draw(t, "enabled") > 0 {
			calls = start
		}
		for range rapid.IntRange(1, 20).Draw(t, "calls") {
			call := rapid.OneOf(rapid.Custom(genManagement), rapid.Custom(genChecked)).Draw(t, "call")
			if call.method != "Auth/Authenticate" { // at which etcd 3.4 looks at old tokens
				call.as = someCaller.Draw(t, "as")
			}
			calls = append(calls[:len(calls):len(calls)], call)
		}
		for i, call := range calls {
			if a, b := etcd.ask(ctx, call), ours.ask(ctx, call); a != b {
				t.Fatalf("%v\nafter %v\netcd: %s\nours: %s", call, calls[:i], a, b)
			}
		}
	})
}
