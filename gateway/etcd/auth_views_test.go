package etcd

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
)

// lagging shows an old view, as a replica does that has not heard of what came since.
type lagging struct {
	Store
	old atomic.Pointer[fsm.View]
}

func (l *lagging) View() *fsm.View {
	if v := l.old.Load(); v != nil {
		return v
	}
	return l.Store.View()
}

func (l *lagging) stop() { l.old.Store(l.Store.View()) }
func (l *lagging) goOn() { l.old.Store(nil) }

// newLagging is a cluster of one whose store can be made to lag behind itself.
func newLagging(t *testing.T) (*cluster, *lagging) {
	l := &lagging{}
	c := newCluster(t, 1, func(cfg *Config) {
		quick(cfg)
		l.Store, cfg.Store = cfg.Store, l
	})
	return c, l
}

// other is a server of the same store that does not lag.
func (c *cluster) other(l *lagging) *Server {
	return New(Config{Store: l.Store, Cluster: 1, Member: 2, Logger: testLogger(c.t, "other")})
}

func TestOldViewsDoNotPermit(t *testing.T) {
	c, l := newLagging(t)
	client, ctx := c.client(), within(t, patience)
	addUser(t, client, "ann", "rw a")
	root := c.enableAuth(client)
	ann := c.as("ann")
	ok(t, errOf(ann.Put(ctx, "a", "")))
	revoke := &etcdpb.AuthRoleRevokePermissionRequest{Role: "ann", Key: []byte("a")}

	l.stop()
	// Elsewhere root takes the permission back.
	other := c.other(l)
	as := metadata.NewIncomingContext(ctx, metadata.Pairs(rpctypes.TokenFieldNameGRPC, tokenOfUser(t, client, "root")))
	ok(t, errOf(other.RoleRevokePermission(as, revoke)))
	wants(t, "put", errOf(ann.Put(ctx, "a", "")), rpctypes.ErrPermissionDenied)
	wants(t, "get", errOf(ann.Get(ctx, "a")), rpctypes.ErrPermissionDenied)
	wants(t, "get what was", errOf(ann.Get(ctx, "a", clientv3.WithSerializable())), nil)
	_, err := ann.Txn(ctx).Else(clientv3.OpPut("a", "")).Commit()
	wants(t, "txn", err, rpctypes.ErrPermissionDenied)
	l.goOn()

	// Nor do they refuse.
	wants(t, "before", errOf(ann.Put(ctx, "a", "")), rpctypes.ErrPermissionDenied)
	l.stop()
	ok(t, errOf(other.RoleGrantPermission(as, &etcdpb.AuthRoleGrantPermissionRequest{Name: "ann", Perm: &authpb.Permission{Key: []byte("a"), PermType: authpb.Permission_READWRITE}})))
	wants(t, "put what is granted", errOf(ann.Put(ctx, "a", "")), nil)
	wants(t, "get what is granted", errOf(ann.Get(ctx, "a", clientv3.WithSerializable())), nil)
	l.goOn()

	// A lease that seems free is not.
	lease, err := root.Grant(ctx, 600)
	ok(t, err)
	l.stop()
	ok(t, errOf(other.Put(as, &etcdpb.PutRequest{Key: []byte("alone"), Lease: int64(lease.ID)})))
	wants(t, "put with a lease", errOf(ann.Put(ctx, "a", "", clientv3.WithLease(lease.ID))), rpctypes.ErrPermissionDenied)
	wants(t, "revoke", errOf(ann.Revoke(ctx, lease.ID)), rpctypes.ErrPermissionDenied)
	l.goOn()
	ok(t, errOf(root.Delete(ctx, "alone")))
	wants(t, "put with the lease that is free", errOf(ann.Put(ctx, "a", "", clientv3.WithLease(lease.ID))), nil)
	wants(t, "revoke of the own", errOf(ann.Revoke(ctx, lease.ID)), nil)
	if got, err := ann.Get(ctx, "a"); err != nil || len(got.Kvs) != 0 {
		t.Errorf("revoked: %v, %v", got, err)
	}

	// Enabling and disabling are seen as well.
	l.stop()
	ok(t, errOf(other.AuthDisable(as, &etcdpb.AuthDisableRequest{})))
	wants(t, "nobody puts", errOf(client.Put(ctx, "x", "")), nil)
	l.goOn()
	wants(t, "nobody gets", errOf(client.Get(ctx, "x")), nil)
	l.stop()
	ok(t, errOf(other.AuthEnable(ctx, &etcdpb.AuthEnableRequest{})))
	wants(t, "nobody puts any more", errOf(client.Put(ctx, "x", "")), rpctypes.ErrUserEmpty)
	wants(t, "nobody gets any more", errOf(client.Get(ctx, "x")), rpctypes.ErrUserEmpty)
	wants(t, "nor grants", errOf(client.Grant(ctx, 10)), rpctypes.ErrUserEmpty)
	wants(t, "nor compacts", errOf(client.Compact(ctx, 2)), rpctypes.ErrUserEmpty)
	l.goOn()
}

func TestAuthOfLeases(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { quick(cfg); cfg.TokenTTL = 2 * time.Second })
	client, ctx := c.client(), within(t, patience)
	addUser(t, client, "ann", "rw a", "w b")
	root := c.enableAuth(client)
	ann := c.as("ann")
	denied := rpctypes.ErrPermissionDenied
	lease, err := ann.Grant(ctx, 600)
	ok(t, err)
	ok(t, errOf(ann.Put(ctx, "a", "", clientv3.WithLease(lease.ID))))
	wants(t, "keys", errOf(ann.TimeToLive(ctx, lease.ID, clientv3.WithAttachedKeys())), nil)
	ok(t, errOf(ann.Put(ctx, "b", "", clientv3.WithLease(lease.ID))))
	wants(t, "keys of which one is not to be read", errOf(ann.TimeToLive(ctx, lease.ID, clientv3.WithAttachedKeys())), denied)
	wants(t, "without keys", errOf(ann.TimeToLive(ctx, lease.ID)), nil)
	wants(t, "nobody's question", errOf(client.TimeToLive(ctx, lease.ID)), rpctypes.ErrUserEmpty)
	ok(t, errOf(root.Put(ctx, "c", "", clientv3.WithLease(lease.ID))))
	wants(t, "revoke", errOf(ann.Revoke(ctx, lease.ID)), denied)
	wants(t, "nobody revokes", errOf(client.Revoke(ctx, lease.ID)), rpctypes.ErrUserEmpty)
	wants(t, "nobody grants", errOf(client.Grant(ctx, 10)), rpctypes.ErrUserEmpty)
	wants(t, "keep alive", errOf(ann.KeepAliveOnce(ctx, lease.ID)), denied)
	wants(t, "root keeps alive", errOf(root.KeepAliveOnce(ctx, lease.ID)), nil)
	wants(t, "root revokes", errOf(root.Revoke(ctx, lease.ID)), nil)
	if got, err := root.Get(ctx, "a", clientv3.WithFromKey()); err != nil || len(got.Kvs) != 0 {
		t.Errorf("left: %v, %v", got, err)
	}
	// A stream outlives the token that it was opened with, and not the user.
	lease, err = ann.Grant(ctx, 3)
	ok(t, err)
	alive, err := ann.KeepAlive(ctx, lease.ID)
	ok(t, err)
	for range 3 {
		if answer, open := <-alive; !open || answer.TTL != 3 {
			t.Fatalf("kept alive: %v, %v", answer, open)
		}
	}
	ok(t, errOf(root.UserDelete(ctx, "ann")))
	eventually(t, "the stream ends", func() error {
		select {
		case _, open := <-alive:
			if !open {
				return nil
			}
		default:
		}
		return errors.New("kept alive")
	})
}

func TestAuthOfWatches(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { quick(cfg); cfg.TokenTTL = 2 * time.Second })
	client, ctx := c.client(), within(t, patience)
	addUser(t, client, "ann", "r a c", "r c d", "w x", "r z \x00")
	root := c.enableAuth(client)
	ann := c.as("ann")
	created := func(c *clientv3.Client, key string, opts ...clientv3.OpOption) error {
		answer := <-c.Watch(ctx, key, append(opts, clientv3.WithCreatedNotify())...)
		return answer.Err()
	}
	for what, test := range map[string]struct{ got, want error }{
		"a key":          {created(ann, "a"), nil},
		"two ranges":     {created(ann, "a", clientv3.WithRange("d")), nil},
		"beyond":         {created(ann, "a", clientv3.WithRange("d\x00")), rpctypes.ErrGRPCPermissionDenied},
		"from key":       {created(ann, "z", clientv3.WithFromKey()), nil},
		"all":            {created(ann, "", clientv3.WithFromKey()), rpctypes.ErrGRPCPermissionDenied},
		"a from key on":  {created(ann, "a", clientv3.WithFromKey()), rpctypes.ErrGRPCPermissionDenied},
		"only to write":  {created(ann, "x"), rpctypes.ErrGRPCPermissionDenied},
		"root's of all":  {created(root, "", clientv3.WithFromKey()), nil},
		"of nobody":      {created(client, "a"), rpctypes.ErrGRPCUserEmpty},
		"previous value": {created(ann, "a", clientv3.WithPrevKV()), nil},
	} {
		wants(t, what, test.got, test.want)
	}
	// A watch made on a stream whose token has expired.
	used := time.Now()
	eventually(t, "the token expires", func() error {
		if left := time.Until(used.Add(3 * time.Second)); left > 0 {
			return fmt.Errorf("in %s", left)
		}
		return nil
	})
	wants(t, "later on the stream", created(ann, "b"), nil)
	ok(t, errOf(root.UserChangePassword(ctx, "ann", "new")))
	wants(t, "after the password changed", created(ann, "b"), rpctypes.ErrGRPCInvalidAuthToken)
}

// Nobody sees or changes what passwords and tokens are made of, not even root.
func TestAuthIsHidden(t *testing.T) {
	c := newCluster(t, 1, quick)
	client, ctx := c.client(), within(t, patience)
	root := c.enableAuth(client)
	events := root.Watch(ctx, "/system/", clientv3.WithPrefix(), clientv3.WithRev(2))
	statusKey, secret, user := "/system/auth/status", "/system/auth/secret", "/system/auth/users/root"
	for _, key := range []string{"/system/auth/", "/system/auth", statusKey, secret, user} {
		for what, opts := range map[string][]clientv3.OpOption{
			"prefix": {clientv3.WithPrefix()}, "serializable": {clientv3.WithPrefix(), clientv3.WithSerializable()},
			"keys": {clientv3.WithPrefix(), clientv3.WithKeysOnly()}, "count": {clientv3.WithPrefix(), clientv3.WithCountOnly()}, "one": nil,
			"old": {clientv3.WithPrefix(), clientv3.WithRev(4)},
		} {
			if got, err := root.Get(ctx, key, opts...); err != nil || got.Count != 0 || len(got.Kvs) != 0 {
				t.Errorf("%s of %s: %v, %v", what, key, got, err)
			}
		}
	}
	for _, key := range []string{statusKey, secret, user} {
		guess := clientv3.Compare(clientv3.Value(key), ">", "")
		exists := clientv3.Compare(clientv3.ModRevision(key), ">", 0)
		ranged := clientv3.Compare(clientv3.Version(key), ">", 0).WithPrefix()
		for i, cmp := range []clientv3.Cmp{guess, exists, ranged} {
			if got, err := root.Txn(ctx).If(cmp).Commit(); err == nil && got.Succeeded {
				t.Errorf("compare %d of %s tells: %v, %v", i, key, got, err)
			}
		}
		for what, op := range map[string]clientv3.Op{
			"put": clientv3.OpPut(key, "x"), "delete": clientv3.OpDelete(key), "see": clientv3.OpPut(key, "x", clientv3.WithPrevKV()),
			"nested": clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut(key, "")}, nil),
		} {
			if _, err := root.Do(ctx, op); status.Code(err) != codes.PermissionDenied && what != "delete" {
				t.Errorf("%s of %s: %v", what, key, err)
			}
		}
	}
	ok(t, errOf(root.UserAdd(ctx, "ann", "ann"))) // root and the users are still there
	ok(t, errOf(root.Put(ctx, "last", "")))
	seen := root.Watch(ctx, "last", clientv3.WithRev(2))
	<-seen
	select {
	case e := <-events:
		for _, one := range e.Events {
			if strings.HasPrefix(string(one.Kv.Key), "/system/auth") {
				t.Errorf("seen: %v", one)
			}
		}
	default:
	}
}
