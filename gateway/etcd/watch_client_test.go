package etcd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/mirror"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/client/v3/ordering"
	"google.golang.org/grpc/metadata"
)

// putOnce creates a key, however often it must be tried.
func putOnce(t testing.TB, client *clientv3.Client, key string) {
	t.Helper()
	eventually(t, "put "+key, func() error {
		_, err := client.Txn(within(t, patience)).If(clientv3.Compare(clientv3.Version(key), "=", 0)).
			Then(clientv3.OpPut(key, "")).Commit()
		return err
	})
}

// A watch goes on at another replica when its own is killed: nothing is lost and
// nothing comes twice.
func TestWatchGoesOnThroughKilledReplicas(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, 3*patience)
	writer := c.client()
	watches := map[string]clientv3.WatchChan{}
	for _, r := range c.replicas {
		// This one begins at the replica and finds the others when it has to.
		client := c.client(r.endpoint)
		watches[r.name] = client.Watch(ctx, "k", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		if first := <-watches[r.name]; !first.Created {
			t.Fatalf("created: %v", first)
		}
		client.SetEndpoints(c.endpoints()...)
	}
	n := 0
	put := func(times int) {
		for range times {
			putOnce(t, writer, fmt.Sprintf("k%03d", n))
			n++
		}
	}
	put(10)
	for _, r := range c.replicas {
		r.kill()
		put(10)
		r.start(c, false)
		put(10)
		eventually(t, "back", func() error {
			if r.store.View().Revision() < c.leader().store.View().Revision() {
				return errors.New("it is behind")
			}
			return nil
		})
	}
	all, err := writer.Get(ctx, "k", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, kv := range all.Kvs {
		want = append(want, fmt.Sprintf("%s@%d", kv.Key, kv.ModRevision))
	}
	for name, watch := range watches {
		var got []string
		for len(got) < n {
			answer, ok := <-watch
			if !ok || answer.Err() != nil {
				t.Fatalf("from %s: after %d events the watch ended: %v", name, len(got), answer.Err())
			}
			for _, e := range answer.Events {
				got = append(got, fmt.Sprintf("%s@%d", e.Kv.Key, e.Kv.ModRevision))
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("from %s: %v\nwant %v", name, got, want)
		}
	}
}

func TestWatchInNamespace(t *testing.T) {
	c := newCluster(t, 1, nil)
	client := c.client()
	ctx := within(t, patience)
	inside := namespace.NewWatcher(client, "ns/")
	watch := inside.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithCreatedNotify())
	if first := <-watch; !first.Created {
		t.Fatalf("created: %v", first)
	}
	kv := namespace.NewKV(client, "ns/")
	for _, write := range []func() error{
		func() error { _, err := client.Put(ctx, "outside", "x"); return err },
		func() error { _, err := kv.Put(ctx, "a", "1"); return err },
		func() error { _, err := client.Put(ctx, "ns0", "x"); return err },
		func() error { _, err := kv.Put(ctx, "a", "2"); return err },
		func() error { _, err := kv.Delete(ctx, "", clientv3.WithFromKey()); return err },
	} {
		if err := write(); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for len(got) < 3 {
		for _, e := range (<-watch).Events {
			line := fmt.Sprintf("%s %s=%s", e.Type, e.Kv.Key, e.Kv.Value)
			if e.PrevKv != nil {
				line += fmt.Sprintf(" was %s=%s", e.PrevKv.Key, e.PrevKv.Value)
			}
			got = append(got, line)
		}
	}
	if want := "PUT a=1; PUT a=2 was a=1; DELETE a= was a=2"; strings.Join(got, "; ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestMirror(t *testing.T) {
	c := newCluster(t, 1, nil)
	client := c.client()
	ctx := within(t, patience)
	put := func(key, value string) {
		t.Helper()
		if _, err := client.Put(ctx, key, value); err != nil {
			t.Fatal(err)
		}
	}
	const many = 2500 // more than two of the mirror's pages
	for i := range many {
		if i%100 == 0 {
			put("other", "x")
		}
		put(fmt.Sprintf("m/%04d", i), "base")
	}
	copied := map[string]string{}
	syncer := mirror.NewSyncer(client, "m/", 0)
	pages, failed := syncer.SyncBase(ctx)
	for page := range pages {
		for _, kv := range page.Kvs {
			copied[string(kv.Key)] = string(kv.Value)
		}
	}
	if err := <-failed; err != nil || len(copied) != many {
		t.Fatalf("base: %d keys, %v", len(copied), err)
	}
	put("m/0001", "changed")
	if _, err := client.Delete(ctx, "m/1", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	updates := syncer.SyncUpdates(ctx)
	put("m/end", "")
	for copied["m/end"] = "none yet"; copied["m/end"] != ""; {
		answer := <-updates
		if err := answer.Err(); err != nil {
			t.Fatal(err)
		}
		for _, e := range answer.Events {
			if e.Type == clientv3.EventTypeDelete {
				delete(copied, string(e.Kv.Key))
			} else {
				copied[string(e.Kv.Key)] = string(e.Kv.Value)
			}
		}
	}
	all, err := client.Get(ctx, "m/", clientv3.WithPrefix())
	if err != nil || len(all.Kvs) != len(copied) {
		t.Fatalf("%d keys in the mirror, %d here, %v", len(copied), len(all.Kvs), err)
	}
	for _, kv := range all.Kvs {
		if copied[string(kv.Key)] != string(kv.Value) {
			t.Errorf("%s is %s in the mirror, %s here", kv.Key, copied[string(kv.Key)], kv.Value)
		}
	}
}

// A client that refuses to see the past finds a replica that is not behind.
func TestOrdering(t *testing.T) {
	c := newCluster(t, 3, nil)
	client := c.client()
	ctx := within(t, patience)
	kv := ordering.NewKV(client.KV, ordering.NewOrderViolationSwitchEndpointClosure(client))
	for i := range 20 {
		put, err := kv.Txn(ctx).Then(clientv3.OpPut("k", fmt.Sprint(i))).Commit()
		if err != nil {
			t.Fatal(err)
		}
		got, err := kv.Get(ctx, "k", clientv3.WithSerializable())
		if errors.Is(err, ordering.ErrNoGreaterRev) {
			continue
		}
		if err != nil || got.Header.Revision < put.Header.Revision || string(got.Kvs[0].Value) != fmt.Sprint(i) {
			t.Fatalf("after put %d at %d: %v, %v", i, put.Header.Revision, got, err)
		}
	}
}

func TestClientWatchEnds(t *testing.T) {
	c := newCluster(t, 1, nil)
	client := c.client()
	ctx, cancel := context.WithCancel(within(t, patience))
	watch := client.Watch(ctx, "k")
	refused := client.Watch(ctx, "b", clientv3.WithRange("a"))
	if answer, ok := <-refused; ok && answer.Err() == nil {
		t.Errorf("an empty range: %v", answer)
	}
	if _, err := client.Put(ctx, "k", "1"); err != nil {
		t.Fatal(err)
	}
	if answer := <-watch; len(answer.Events) != 1 {
		t.Errorf("%v", answer)
	}
	cancel()
	for range watch {
	}
}

func TestWatchPermissions(t *testing.T) {
	c := newCluster(t, 1, quick)
	root := c.client()
	addUser(t, root, "reader", "r a c")
	root = c.enableAuth(root)
	ctx := within(t, patience)
	asReader := metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, tokenOfUser(t, root, "reader"))
	conn := dial(t, c.replicas[0].endpoint)
	denied, nobody := rpctypes.ErrGRPCPermissionDenied.Error(), rpctypes.ErrGRPCUserEmpty.Error()
	user, anybody := talkTo(t, asReader, conn), talkTo(t, ctx, conn)
	for _, w := range []struct {
		*talk
		key, end, reason string
	}{
		{user, "a", "", ""}, {user, "a", "c", ""}, {user, "b", "bb", ""},
		{user, "c", "", denied}, {user, "a", "d", denied}, {user, "a", "\x00", denied}, {user, "", "\x00", denied}, {user, "", "", denied},
		{anybody, "a", "", nobody},
	} {
		w.send(creating(&etcdpb.WatchCreateRequest{Key: []byte(w.key), RangeEnd: []byte(w.end)}))
		answer := w.recv()
		if refused := w.reason != ""; !answer.Created || answer.Canceled != refused || answer.CancelReason != w.reason || refused != (answer.WatchId == -1) {
			t.Errorf("%q to %q: %v, want %q", w.key, w.end, answer, w.reason)
		}
	}
	// As with etcd a watcher stays, even when what it was allowed by is gone.
	ok(t, errOf(root.RoleRevokePermission(ctx, "reader", "a", "c")))
	ok(t, errOf(root.Put(ctx, "bb", "1")))
	if got := user.events(1); string(got[0].Kv.Key) != "bb" {
		t.Errorf("%v", got)
	}
	watch := c.as("reader").Watch(ctx, "a")
	if answer := <-watch; answer.Err() == nil || answer.Err().Error() != denied {
		t.Errorf("through the client: %v", answer.Err())
	}
}

func TestWatchSystemKeys(t *testing.T) {
	c := newCluster(t, 1, nil)
	client := c.client()
	ctx := within(t, patience)
	everything := client.Watch(ctx, "", clientv3.WithFromKey(), clientv3.WithCreatedNotify())
	system := client.Watch(ctx, "/workloads/", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithCreatedNotify())
	<-everything
	<-system
	ok(t, errOf(client.Put(ctx, "/workloads/web", webSpec)))
	ok(t, errOf(client.Put(ctx, "/workloads/web", strings.Replace(webSpec, "nginx:1", "nginx:2", 1))))
	ok(t, errOf(client.Put(ctx, "mine", "1")))
	shown, err := client.Get(ctx, "/workloads/web")
	ok(t, err)
	var events []*clientv3.Event
	for len(events) < 2 {
		events = append(events, (<-system).Events...)
	}
	if last := events[1]; string(last.Kv.Value) != string(shown.Kvs[0].Value) || string(last.PrevKv.Value) != string(events[0].Kv.Value) {
		t.Errorf("a watch shows %s after %s, a read %s", last.Kv.Value, last.PrevKv.Value, shown.Kvs[0].Value)
	}
	if answer := <-everything; len(answer.Events) != 1 || string(answer.Events[0].Kv.Key) != "mine" {
		t.Errorf("a watch of everything shows %v", answer.Events)
	}
}
