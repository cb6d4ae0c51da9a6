package etcd

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/crypto/bcrypt"
	"google.golang.org/grpc/metadata"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// quick makes passwords cheap, which are not what is tested.
func quick(c *Config) { c.BcryptCost = bcrypt.MinCost }

// as is a client of a user, whose password is the name.
func (c *cluster) as(name string, endpoints ...string) *clientv3.Client {
	c.t.Helper()
	if len(endpoints) == 0 {
		endpoints = c.endpoints()
	}
	return newClient(c.t, clientv3.Config{Endpoints: endpoints, Username: name, Password: name})
}

// addUser makes a user with a role of the same name and grants, as in "rw a b": how,
// key and range end.
func addUser(t testing.TB, client *clientv3.Client, name string, grants ...string) {
	t.Helper()
	ctx := within(t, patience)
	ok(t, errOf(client.UserAdd(ctx, name, name)))
	ok(t, errOf(client.RoleAdd(ctx, name)))
	for _, g := range grants {
		grantTo(t, client, name, g)
	}
	ok(t, errOf(client.UserGrantRole(ctx, name, name)))
}

var permissions = map[string]clientv3.PermissionType{
	"r": clientv3.PermissionType(clientv3.PermRead), "w": clientv3.PermissionType(clientv3.PermWrite), "rw": clientv3.PermissionType(clientv3.PermReadWrite),
}

func grantTo(t testing.TB, client *clientv3.Client, role, grant string) {
	t.Helper()
	f := strings.Split(grant, " ")
	end := ""
	if len(f) > 2 {
		end = f[2]
	}
	if _, err := client.RoleGrantPermission(within(t, patience), role, f[1], end, permissions[f[0]]); err != nil {
		t.Fatal(err)
	}
}

// enableAuth adds root and enables; the client is root's.
func (c *cluster) enableAuth(client *clientv3.Client) *clientv3.Client {
	c.t.Helper()
	ctx := within(c.t, patience)
	ok(c.t, errOf(client.UserAdd(ctx, "root", "root")))
	ok(c.t, errOf(client.UserGrantRole(ctx, "root", "root")))
	ok(c.t, errOf(client.AuthEnable(ctx)))
	return c.as("root")
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func tokenOfUser(t testing.TB, client *clientv3.Client, name string) string {
	t.Helper()
	answer, err := client.Authenticate(within(t, patience), name, name)
	ok(t, err)
	return answer.Token
}

func errOf[T any](_ T, err error) error { return err }

// wants reports another error than the one expected; nil is one too.
func wants(t testing.TB, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) && (got == nil || want == nil || got.Error() != want.Error()) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestAuthLifecycle(t *testing.T) {
	c := newCluster(t, 1, quick)
	client, ctx := c.client(), within(t, patience)

	step := func(what string, err, want error) { t.Helper(); wants(t, what, err, want) }
	step("enable without root", errOf(client.AuthEnable(ctx)), rpctypes.ErrRootUserNotExist)
	step("disable what is not enabled", errOf(client.AuthDisable(ctx)), nil)
	step("authenticate before", errOf(client.Authenticate(ctx, "root", "root")), rpctypes.ErrAuthNotEnabled)
	step("add root", errOf(client.UserAdd(ctx, "root", "root")), nil)
	step("enable without role", errOf(client.AuthEnable(ctx)), rpctypes.ErrRootRoleNotExist)
	step("again", errOf(client.UserAdd(ctx, "root", "x")), rpctypes.ErrUserAlreadyExist)
	step("no name", errOf(client.UserAdd(ctx, "", "x")), rpctypes.ErrUserEmpty)
	step("grant the role that need not exist", errOf(client.UserGrantRole(ctx, "root", "root")), nil)
	step("role root is not there", errOf(client.RoleGet(ctx, "root")), rpctypes.ErrRoleNotFound)
	step("role without name", errOf(client.RoleAdd(ctx, "")), rpctypes.ErrRoleEmpty)
	step("role", errOf(client.RoleAdd(ctx, "reader")), nil)
	step("role again", errOf(client.RoleAdd(ctx, "reader")), rpctypes.ErrRoleAlreadyExist)
	step("role root", errOf(client.RoleAdd(ctx, "root")), nil)
	step("user", errOf(client.UserAdd(ctx, "ann", "ann")), nil)
	step("grant of no role", errOf(client.UserGrantRole(ctx, "ann", "none")), rpctypes.ErrRoleNotFound)
	step("grant to no user", errOf(client.UserGrantRole(ctx, "none", "none")), rpctypes.ErrUserNotFound)
	step("revoke what was not granted", errOf(client.UserRevokeRole(ctx, "ann", "reader")), rpctypes.ErrRoleNotGranted)
	step("revoke from nobody", errOf(client.UserRevokeRole(ctx, "none", "reader")), rpctypes.ErrUserNotFound)
	step("grant", errOf(client.UserGrantRole(ctx, "ann", "reader")), nil)
	step("grant again", errOf(client.UserGrantRole(ctx, "ann", "reader")), nil)
	step("permission", errOf(client.RoleGrantPermission(ctx, "reader", "b", "d", permissions["r"])), nil)
	step("permission again", errOf(client.RoleGrantPermission(ctx, "reader", "b", "d", permissions["rw"])), nil)
	step("another", errOf(client.RoleGrantPermission(ctx, "reader", "a", "", permissions["w"])), nil)
	step("to no role", errOf(client.RoleGrantPermission(ctx, "none", "a", "", permissions["w"])), rpctypes.ErrRoleNotFound)
	step("range the wrong way", errOf(client.RoleGrantPermission(ctx, "reader", "b", "a", permissions["w"])), rpctypes.Error(rpctypes.ErrGRPCInvalidAuthMgmt))
	step("revoke no permission", errOf(client.RoleRevokePermission(ctx, "reader", "b", "")), rpctypes.ErrPermissionNotGranted)
	_, err := etcdpb.NewAuthClient(dial(t, c.replicas[0].endpoint)).RoleGrantPermission(ctx, &etcdpb.AuthRoleGrantPermissionRequest{Name: "reader"})
	step("no permission", err, rpctypes.ErrGRPCPermissionNotGiven)
	role, err := client.RoleGet(ctx, "reader")
	if err != nil || len(role.Perm) != 2 || string(role.Perm[0].Key) != "a" || role.Perm[1].PermType != authpb.Permission_READWRITE {
		t.Errorf("role: %v, %v", role, err)
	}
	step("delete no user", errOf(client.UserDelete(ctx, "none")), rpctypes.ErrUserNotFound)
	step("delete no role", errOf(client.RoleDelete(ctx, "none")), rpctypes.ErrRoleNotFound)
	step("password of nobody", errOf(client.UserChangePassword(ctx, "none", "x")), rpctypes.ErrUserNotFound)
	status, err := client.AuthStatus(ctx)
	if err != nil || status.Enabled || status.AuthRevision != 10 {
		t.Errorf("status: %v, %v", status, err)
	}

	step("enable", errOf(client.AuthEnable(ctx)), nil)
	root := c.as("root")
	step("enable again", errOf(root.AuthEnable(ctx)), nil)
	step("without user", errOf(client.Get(ctx, "a")), rpctypes.ErrUserEmpty)
	step("manage without user", errOf(client.UserList(ctx)), rpctypes.ErrUserEmpty)
	step("delete root", errOf(root.UserDelete(ctx, "root")), rpctypes.ErrInvalidAuthMgmt)
	step("delete role root", errOf(root.RoleDelete(ctx, "root")), rpctypes.ErrInvalidAuthMgmt)
	step("take root from root", errOf(root.UserRevokeRole(ctx, "root", "root")), rpctypes.ErrInvalidAuthMgmt)

	ann := c.as("ann")
	user, err := ann.UserGet(ctx, "ann")
	if err != nil || !reflect.DeepEqual(user.Roles, []string{"reader"}) {
		t.Errorf("ann about herself: %v, %v", user, err)
	}
	step("ann about root", errOf(ann.UserGet(ctx, "root")), rpctypes.ErrPermissionDenied)
	step("ann about her role", errOf(ann.RoleGet(ctx, "reader")), nil)
	step("ann about another role", errOf(ann.RoleGet(ctx, "root")), rpctypes.ErrPermissionDenied)
	for what, err := range map[string]error{
		"list users": errOf(ann.UserList(ctx)), "list roles": errOf(ann.RoleList(ctx)), "status": errOf(ann.AuthStatus(ctx)),
		"own password": errOf(ann.UserChangePassword(ctx, "ann", "x")), "add": errOf(ann.UserAdd(ctx, "bob", "x")),
		"disable": errOf(ann.AuthDisable(ctx)), "role": errOf(ann.RoleAdd(ctx, "x")),
	} {
		step("ann: "+what, err, rpctypes.ErrPermissionDenied)
	}
	users, err := root.UserList(ctx)
	if err != nil || !reflect.DeepEqual(users.Users, []string{"ann", "root"}) {
		t.Errorf("users: %v, %v", users, err)
	}
	step("ann reads", errOf(ann.Get(ctx, "b")), nil)
	step("delete the role", errOf(root.RoleDelete(ctx, "reader")), nil)
	step("ann reads no more", errOf(ann.Get(ctx, "b")), rpctypes.ErrPermissionDenied)
	if user, err := root.UserGet(ctx, "ann"); err != nil || len(user.Roles) != 0 {
		t.Errorf("a deleted role is kept: %v, %v", user, err)
	}
	step("disable", errOf(root.AuthDisable(ctx)), nil)
	step("anybody reads", errOf(client.Get(ctx, "b")), nil)
	step("root goes", errOf(client.UserDelete(ctx, "root")), nil)
}

// What a user does without the permission is refused, whatever it is hidden in.
func TestAuthMatrix(t *testing.T) {
	c := newCluster(t, 1, quick)
	client, ctx := c.client(), within(t, patience)
	addUser(t, client, "reader", "r k", "r m p")
	addUser(t, client, "writer", "w k", "w m p")
	addUser(t, client, "both", "rw k", "rw m n", "rw n p", "r q \x00")
	addUser(t, client, "none")
	root := c.enableAuth(client)
	theirs, err := root.Grant(ctx, 600)
	if err != nil {
		t.Fatal(err)
	}
	free, err := root.Grant(ctx, 600)
	if err != nil {
		t.Fatal(err)
	}
	ok(t, errOf(root.Put(ctx, "alone", "x", clientv3.WithLease(theirs.ID))))

	denied := rpctypes.ErrPermissionDenied
	txn := func(c *clientv3.Client, txn func(clientv3.Txn) clientv3.Txn) error {
		_, err := txn(c.Txn(ctx)).Commit()
		return err
	}
	nested := func(op clientv3.Op) func(clientv3.Txn) clientv3.Txn {
		inner := clientv3.OpTxn(nil, nil, []clientv3.Op{clientv3.OpTxn(nil, []clientv3.Op{op}, nil)})
		return func(t clientv3.Txn) clientv3.Txn { return t.Then(inner) }
	}
	for _, test := range []struct {
		what                       string
		do                         func(*clientv3.Client) error
		reader, writer, both, none error
	}{
		{"get a key", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "k")) }, nil, denied, nil, denied},
		{"get another", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "kk")) }, denied, denied, denied, denied},
		{"get a range", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "m", clientv3.WithRange("n"))) }, nil, denied, nil, denied},
		{"get all of a range", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "m", clientv3.WithRange("p"))) }, nil, denied, nil, denied},
		{"get past a range", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "m", clientv3.WithRange("p\x00"))) }, denied, denied, denied, denied},
		{"get before a range", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "l", clientv3.WithRange("n"))) }, denied, denied, denied, denied},
		{"get from a key on", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "r", clientv3.WithFromKey())) }, denied, denied, nil, denied},
		{"get all", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "\x00", clientv3.WithFromKey())) }, denied, denied, denied, denied},
		{"get serializable", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "k", clientv3.WithSerializable())) }, nil, denied, nil, denied},
		{"count", func(c *clientv3.Client) error { return errOf(c.Get(ctx, "x", clientv3.WithCountOnly())) }, denied, denied, nil, denied},
		{"put", func(c *clientv3.Client) error { return errOf(c.Put(ctx, "k", "")) }, denied, nil, nil, denied},
		{"put in a range", func(c *clientv3.Client) error { return errOf(c.Put(ctx, "mm", "")) }, denied, nil, nil, denied},
		{"put at its end", func(c *clientv3.Client) error { return errOf(c.Put(ctx, "p", "")) }, denied, denied, denied, denied},
		{"put and see", func(c *clientv3.Client) error { return errOf(c.Put(ctx, "k", "", clientv3.WithPrevKV())) }, denied, denied, nil, denied},
		{"put with a lease", func(c *clientv3.Client) error { return errOf(c.Put(ctx, "m", "", clientv3.WithLease(free.ID))) }, denied, nil, nil, denied},
		{"put with theirs", func(c *clientv3.Client) error { return errOf(c.Put(ctx, "k", "", clientv3.WithLease(theirs.ID))) }, denied, denied, denied, denied},
		{"delete", func(c *clientv3.Client) error { return errOf(c.Delete(ctx, "k")) }, denied, nil, nil, denied},
		{"delete a range", func(c *clientv3.Client) error { return errOf(c.Delete(ctx, "m", clientv3.WithRange("p"))) }, denied, nil, nil, denied},
		{"delete more", func(c *clientv3.Client) error { return errOf(c.Delete(ctx, "m", clientv3.WithRange("q"))) }, denied, denied, denied, denied},
		{"delete and see", func(c *clientv3.Client) error { return errOf(c.Delete(ctx, "k", clientv3.WithPrevKV())) }, denied, denied, nil, denied},
		{"compare", func(c *clientv3.Client) error {
			return txn(c, func(t clientv3.Txn) clientv3.Txn {
				return t.If(clientv3.Compare(clientv3.Version("k"), "=", 0))
			})
		}, nil, denied, nil, denied},
		{"compare a range", func(c *clientv3.Client) error {
			return txn(c, func(t clientv3.Txn) clientv3.Txn {
				return t.If(clientv3.Compare(clientv3.Version("m"), "=", 0).WithRange("q"))
			})
		}, denied, denied, denied, denied},
		{"write in the branch not taken", func(c *clientv3.Client) error {
			return txn(c, func(t clientv3.Txn) clientv3.Txn { return t.Else(clientv3.OpPut("alone", "")) })
		}, denied, denied, denied, denied},
		{"read in a nested txn", func(c *clientv3.Client) error { return txn(c, nested(clientv3.OpGet("alone"))) }, denied, denied, denied, denied},
		{"allowed in a nested txn", func(c *clientv3.Client) error { return txn(c, nested(clientv3.OpPut("k", ""))) }, denied, nil, nil, denied},
		{"see in a nested txn", func(c *clientv3.Client) error { return txn(c, nested(clientv3.OpPut("k", "", clientv3.WithPrevKV()))) }, denied, denied, nil, denied},
		{"theirs in a nested txn", func(c *clientv3.Client) error {
			return txn(c, nested(clientv3.OpPut("k", "", clientv3.WithLease(theirs.ID))))
		}, denied, denied, denied, denied},
		{"nothing at all", func(c *clientv3.Client) error { return txn(c, func(t clientv3.Txn) clientv3.Txn { return t }) }, nil, nil, nil, nil},
	} {
		for name, want := range map[string]error{"reader": test.reader, "writer": test.writer, "both": test.both, "none": test.none, "root": nil} {
			wants(t, name+": "+test.what, test.do(c.as(name)), want)
		}
		wants(t, "nobody: "+test.what, test.do(client), map[bool]error{true: nil, false: rpctypes.ErrUserEmpty}[test.what == "nothing at all"])
	}
}

// What shows no keys needs a user all the same, and compaction needs root.
func TestAuthBeyondKeys(t *testing.T) {
	c := newCluster(t, 1, quick)
	client, ctx := c.client(), within(t, patience)
	addUser(t, client, "ann", "rw a z")
	ok(t, errOf(client.Put(ctx, "a", "1")))
	put, err := client.Put(ctx, "a", "2")
	ok(t, err)
	root := c.enableAuth(client)
	ann, nobody, denied := c.as("ann"), rpctypes.ErrUserEmpty, rpctypes.ErrPermissionDenied
	endpoint := c.endpoints()[0]
	for _, test := range []struct {
		what                    string
		do                      func(*clientv3.Client) error
		byNobody, byAnn, byRoot error
	}{
		{"member list", func(c *clientv3.Client) error { return errOf(c.MemberList(ctx)) }, nobody, nil, nil},
		{"alarms", func(c *clientv3.Client) error { return errOf(c.AlarmList(ctx)) }, nobody, nil, nil},
		{"status", func(c *clientv3.Client) error { return errOf(c.Status(ctx, endpoint)) }, nobody, nil, nil},
		{"disarm", func(c *clientv3.Client) error {
			return errOf(c.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: 1, Alarm: etcdpb.AlarmType_NOSPACE}))
		}, nobody, denied, nil},
		{"hash", func(c *clientv3.Client) error { return errOf(c.HashKV(ctx, endpoint, 0)) }, nobody, denied, nil},
		{"compaction", func(c *clientv3.Client) error { return errOf(c.Compact(ctx, put.Header.Revision)) }, nobody, denied, nil},
	} {
		wants(t, "nobody: "+test.what, test.do(client), test.byNobody)
		wants(t, "ann: "+test.what, test.do(ann), test.byAnn)
		wants(t, "root: "+test.what, test.do(root), test.byRoot)
	}
}

// A permission is gone everywhere when taking it back was acknowledged, also on a
// replica that has not heard of it yet.
func TestRevokeIsEverywhere(t *testing.T) {
	c := newCluster(t, 3, quick)
	client, ctx := c.client(), within(t, patience)
	addUser(t, client, "ann", "rw a")
	root := c.enableAuth(client)
	var at []*clientv3.Client
	for _, r := range c.replicas {
		at = append(at, c.as("ann", r.endpoint))
	}
	for round := range 10 {
		for i, ann := range at {
			if _, err := ann.Put(ctx, "a", ""); err != nil {
				t.Fatal("granted", round, i, err)
			}
		}
		ok(t, errOf(root.RoleRevokePermission(ctx, "ann", "a", "")))
		var all sync.WaitGroup
		for i, ann := range at {
			all.Go(func() {
				wants(t, fmt.Sprint("put ", round, i), errOf(ann.Put(ctx, "a", "")), rpctypes.ErrPermissionDenied)
				wants(t, fmt.Sprint("get ", round, i), errOf(ann.Get(ctx, "a")), rpctypes.ErrPermissionDenied)
			})
		}
		all.Wait()
		grantTo(t, root, "ann", "rw a")
	}
}

// Nothing of nobody is acknowledged after enabling was.
func TestEnableWhileWriting(t *testing.T) {
	c := newCluster(t, 3, quick)
	client, ctx := c.client(), within(t, patience)
	ok(t, errOf(client.UserAdd(ctx, "root", "root")))
	ok(t, errOf(client.UserGrantRole(ctx, "root", "root")))
	enabled := make(chan struct{})
	var writers sync.WaitGroup
	for i, r := range c.replicas {
		w := c.client(r.endpoint)
		writers.Go(func() {
			for n := 0; ; n++ {
				after := false
				select {
				case <-enabled:
					after = true
				default:
				}
				_, err := w.Put(ctx, fmt.Sprintf("w%d", i), fmt.Sprint(n))
				switch {
				case err == nil && after:
					t.Errorf("written through s%d after auth was enabled", i+1)
					return
				case errors.Is(err, rpctypes.ErrUserEmpty):
					return
				case err != nil:
					t.Errorf("s%d: %v", i+1, err)
					return
				}
			}
		})
	}
	ok(t, errOf(client.AuthEnable(ctx)))
	close(enabled)
	writers.Wait()
}

// A token is good at any replica, and after the one that gave it has gone.
func TestTokenElsewhere(t *testing.T) {
	c := newCluster(t, 3, quick)
	client, ctx := c.client(), within(t, patience)
	addUser(t, client, "ann", "rw a")
	c.enableAuth(client)
	leader := c.leader()
	got, err := c.client(leader.endpoint).Authenticate(ctx, "ann", "ann")
	if err != nil {
		t.Fatal(err)
	}
	with := metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, got.Token)
	swagger := metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameSwagger, got.Token)
	for _, r := range c.replicas {
		if _, err := c.client(r.endpoint).Put(with, "a", r.name); err != nil {
			t.Error(r.name, err)
		}
		if _, err := c.client(r.endpoint).Get(swagger, "a"); err != nil {
			t.Error(r.name, err)
		}
	}
	leader.kill()
	for _, r := range c.replicas {
		if r != leader {
			eventually(t, "a put with the token", func() error { return errOf(c.client(r.endpoint).Put(with, "a", "")) })
		}
	}
}

func TestTokenEnds(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { quick(cfg); cfg.TokenTTL = 2 * time.Second })
	client, ctx := c.client(), within(t, patience)
	for _, name := range []string{"ann", "bob", "eve"} {
		addUser(t, client, name, "rw a")
	}
	root := c.enableAuth(client)
	token := func(name string) context.Context {
		got, err := client.Authenticate(ctx, name, name)
		if err != nil {
			t.Fatal(err)
		}
		with := metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, got.Token)
		if _, err := client.Get(with, "a"); err != nil {
			t.Fatal(err)
		}
		return with
	}
	everywhere := func(what string, with context.Context) {
		t.Helper()
		for _, r := range c.replicas {
			wants(t, what, errOf(etcdpb.NewKVClient(dial(t, r.endpoint)).Range(with, &etcdpb.RangeRequest{Key: []byte("a")})), rpctypes.ErrGRPCInvalidAuthToken)
		}
	}
	ann, bob := token("ann"), token("bob")
	ok(t, errOf(root.UserChangePassword(ctx, "ann", "other")))
	everywhere("password changed", ann)
	ok(t, errOf(root.UserDelete(ctx, "bob")))
	ok(t, errOf(root.UserAdd(ctx, "bob", "bob")))
	everywhere("user deleted", bob)
	everywhere("garbage", metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, "garbage"))
	everywhere("empty", metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, ""))

	eve := token("eve")
	used := time.Now()
	eventually(t, "the token expires", func() error {
		if left := time.Until(used.Add(3 * time.Second)); left > 0 {
			return fmt.Errorf("in %s", left)
		}
		return nil
	})
	everywhere("expired", eve)
	wants(t, "a client with a password gets a new one", errOf(root.Put(ctx, "a", "")), nil)

	old := token("eve")
	ok(t, errOf(root.AuthDisable(ctx)))
	if _, err := client.Get(ctx, "a"); err != nil {
		t.Error(err)
	}
	ok(t, errOf(client.AuthEnable(ctx)))
	everywhere("of before auth was disabled", old)
	wants(t, "root goes on", errOf(root.Get(ctx, "a")), nil)
}

func TestWrongPassword(t *testing.T) {
	c := newCluster(t, 1, quick)
	client, ctx := c.client(), within(t, patience)
	c.enableAuth(client)
	_, err := client.UserAddWithOptions(ctx, "cert", "", &clientv3.UserAddOptions{NoPassword: true})
	wants(t, "nobody adds users", err, rpctypes.ErrUserEmpty)
	root := c.as("root")
	ok(t, errOf(root.UserAddWithOptions(ctx, "cert", "", &clientv3.UserAddOptions{NoPassword: true})))
	for name, want := range map[string]error{"root": rpctypes.ErrAuthFailed, "none": rpctypes.ErrAuthFailed} {
		_, err := client.Authenticate(ctx, name, "wrong")
		wants(t, name, err, want)
		_, err = clientv3.New(clientv3.Config{Endpoints: c.endpoints(), Username: name, Password: "wrong", DialTimeout: patience})
		wants(t, name+"'s client", err, want)
	}
	if _, err := client.Authenticate(ctx, "cert", ""); err == nil || !strings.Contains(err.Error(), "no password user") {
		t.Errorf("a user without password: %v", err)
	}
	ok(t, errOf(root.UserChangePassword(ctx, "cert", "x")))
	if _, err := client.Authenticate(ctx, "cert", "x"); err == nil || !strings.Contains(err.Error(), "no password user") {
		t.Errorf("a user without password has one: %v", err)
	}
	hash, err := bcrypt.GenerateFromPassword([]byte("given"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	raw := etcdpb.NewAuthClient(dial(t, c.replicas[0].endpoint))
	token := tokenOfUser(t, client, "root")
	with := metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, token)
	_, err = raw.UserAdd(with, &etcdpb.AuthUserAddRequest{Name: "hashed", HashedPassword: "bm8gaGFzaA=="})
	if err == nil || !strings.Contains(err.Error(), "not a bcrypt hash") {
		t.Errorf("no hash: %v", err)
	}
	if _, err = raw.UserAdd(with, &etcdpb.AuthUserAddRequest{Name: "hashed", HashedPassword: base64.StdEncoding.EncodeToString(hash)}); err != nil {
		t.Fatal(err)
	}
	wants(t, "password of a hash", errOf(client.Authenticate(ctx, "hashed", "given")), nil)
}

// Users and roles are changed by many at once, through all replicas, and no change is
// lost.
func TestConcurrentAuthChanges(t *testing.T) {
	c := newCluster(t, 3, quick)
	ctx := within(t, patience)
	ok(t, errOf(c.client().RoleAdd(ctx, "role")))
	var all sync.WaitGroup
	for i := range 12 {
		client := c.client(c.replicas[i%3].endpoint)
		all.Go(func() {
			for n := range 4 {
				key := fmt.Sprintf("%d-%d", i, n)
				if _, err := client.RoleGrantPermission(ctx, "role", key, "", permissions["r"]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	role, err := c.client().RoleGet(ctx, "role")
	if err != nil || len(role.Perm) != 48 {
		t.Errorf("%d permissions of 48, %v", len(role.Perm), err)
	}
}

// What the caller's certificate in the Persys cluster says bounds what a token allows.
func TestPersysIdentities(t *testing.T) {
	roles := map[string]pb.Role{
		"admin": pb.Role_ROLE_ADMIN, "server": pb.Role_ROLE_SERVER, "operator": pb.Role_ROLE_OPERATOR,
		"viewer": pb.Role_ROLE_VIEWER, "agent": pb.Role_ROLE_AGENT, "metrics": pb.Role_ROLE_METRICS,
	}
	c := newCluster(t, 1, func(cfg *Config) {
		quick(cfg)
		cfg.Identity = func(ctx context.Context) (string, pb.Role, bool) {
			v := metadata.ValueFromIncomingContext(ctx, "test-role")
			if len(v) == 0 {
				return "", 0, false
			}
			return v[0] + "/someone", roles[v[0]], true
		}
	})
	client := c.client()
	is := func(role string) context.Context {
		return metadata.AppendToOutgoingContext(within(t, patience), "test-role", role)
	}
	denied := rpctypes.ErrPermissionDenied
	check := func(when string, ctx func(string) context.Context, want map[string][3]error) {
		t.Helper()
		for role, want := range want {
			read := clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpGet("a")}, nil)
			write := clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpTxn(nil, nil, []clientv3.Op{clientv3.OpPut("a", "")})}, nil)
			wants(t, when+role+" reads", errOf(client.Do(ctx(role), read)), want[0])
			wants(t, when+role+" writes", errOf(client.Do(ctx(role), write)), want[1])
			wants(t, when+role+" manages", errOf(client.UserList(ctx(role))), want[2])
		}
	}
	check("before: ", is, map[string][3]error{
		"admin": {}, "server": {}, "operator": {nil, nil, denied}, "viewer": {nil, denied, denied},
		"agent": {denied, denied, denied}, "metrics": {denied, denied, denied},
	})
	c.enableAuth(client)
	empty := rpctypes.ErrUserEmpty
	check("enabled: ", is, map[string][3]error{
		"admin": {}, "server": {}, "operator": {empty, empty, empty}, "viewer": {empty, empty, empty},
		"agent": {denied, denied, denied},
	})
	token := tokenOfUser(t, client, "root")
	check("with root's token: ", func(role string) context.Context {
		return metadata.AppendToOutgoingContext(is(role), rpctypes.TokenFieldNameGRPC, token)
	}, map[string][3]error{
		"admin": {}, "operator": {nil, nil, denied}, "viewer": {nil, denied, denied}, "agent": {denied, denied, denied},
	})
}

// A certificate's name is a user where there is no token.
func TestCertificateUsers(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) {
		quick(cfg)
		cfg.CertUser = func(ctx context.Context) string {
			return strings.Join(metadata.ValueFromIncomingContext(ctx, "test-name"), "")
		}
	})
	client := c.client()
	addUser(t, client, "ann", "r a")
	c.enableAuth(client)
	is := func(name string) context.Context {
		return metadata.AppendToOutgoingContext(within(t, patience), "test-name", name)
	}
	wants(t, "ann", errOf(client.Get(is("ann"), "a")), nil)
	wants(t, "ann writes", errOf(client.Put(is("ann"), "a", "")), rpctypes.ErrPermissionDenied)
	wants(t, "nobody's name", errOf(client.Get(is("zoe"), "a")), rpctypes.ErrPermissionDenied)
	wants(t, "nobody", errOf(client.Get(within(t, patience), "a")), rpctypes.ErrUserEmpty)
	wants(t, "root", errOf(client.UserList(is("root"))), nil)
	wants(t, "through the JSON gateway", errOf(client.Get(metadata.AppendToOutgoingContext(is("ann"), "grpcgateway-accept", "*/*"), "a")), rpctypes.ErrUserEmpty)
}

// Tokens and certificates are for admins, whichever way one asks for them.
func TestTokensAreForAdmins(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) {
		cfg.Identity = func(ctx context.Context) (string, pb.Role, bool) {
			v := metadata.ValueFromIncomingContext(ctx, "test-role")
			return strings.Join(v, ""), pb.Role(pb.Role_value[strings.Join(v, "")]), len(v) > 0
		}
	})
	put := func(key string) {
		c.must(&pb.Txn{Success: []*pb.RequestOp{model.Put(key, &pb.Token{Id: "t"}, 0)}})
	}
	keys := []string{"/nodes/n", "/tokens/t", "/certificates/a"}
	for _, key := range keys {
		put(key)
	}
	for role, want := range map[string]int{"": 3, "ROLE_ADMIN": 3, "ROLE_OPERATOR": 1, "ROLE_VIEWER": 1} {
		client, ctx := c.client(), within(t, patience)
		if role != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "test-role", role)
		}
		before := c.leader().store.View().Revision()
		now := client.Watch(ctx, "/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		<-now
		for _, key := range keys {
			put(key)
		}
		put("/nodes/last")
		later := client.Watch(ctx, "/", clientv3.WithPrefix(), clientv3.WithRev(before+1))
		for what, w := range map[string]clientv3.WatchChan{"now": now, "later": later} {
			seen := map[string]bool{}
			for !seen["/nodes/last"] {
				answer, open := <-w
				if !open || answer.Err() != nil {
					t.Fatalf("%s: %v", role, answer.Err())
				}
				for _, e := range answer.Events {
					seen[string(e.Kv.Key)] = true
				}
			}
			if len(seen) != want+1 {
				t.Errorf("%q watches, %s: %v", role, what, seen)
			}
		}
		c.must(&pb.Txn{Success: []*pb.RequestOp{model.Delete("/nodes/last")}})
		all, err := client.Get(ctx, "/", clientv3.WithPrefix(), clientv3.WithSerializable())
		ok(t, err)
		// One more is the epoch.
		if len(all.Kvs) != want+1 || all.Count != int64(want+1) {
			t.Errorf("%q sees %v of %d", role, all.Kvs, all.Count)
		}
		exists := clientv3.Compare(clientv3.Version("/tokens/t"), ">", 0)
		one := clientv3.OpGet("/tokens/t")
		for _, write := range []clientv3.Op{one, clientv3.OpPut("a", "")} {
			if role == "ROLE_VIEWER" && write.IsPut() {
				continue
			}
			answer, err := client.Txn(ctx).If(exists).Then(one, write).Else(one, write).Commit()
			ok(t, err)
			if n := len(answer.Responses[0].GetResponseRange().Kvs); answer.Succeeded != (want == 3) || n != want/3 {
				t.Errorf("%q compares: %v, and finds %d", role, answer.Succeeded, n)
			}
		}
	}
}
