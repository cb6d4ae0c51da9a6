package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// seeded is a cluster with an example of each kind of key.
func seeded(t *testing.T, replicas int) (*cluster, *clientv3.Client) {
	t.Helper()
	c := newCluster(t, replicas, nil)
	all := examples(t)
	txn := &pb.Txn{}
	for _, key := range sortedKeys(all) {
		// The epoch is raftstore's, and an alarm would have effects.
		if k := kindOf(key); k != nil && key != model.EpochKey && !strings.HasPrefix(key, alarmsPrefix) {
			txn.Success = append(txn.Success, model.Put(key, all[key], 0))
		}
	}
	c.must(txn)
	return c, c.client()
}

// must carries out a transaction past admission.
func (c *cluster) must(txn *pb.Txn) {
	c.t.Helper()
	eventually(c.t, "proposed", func() error {
		_, err := c.leader().store.Propose(within(c.t, patience), txn)
		return err
	})
}

func stored[M proto.Message](t *testing.T, c *cluster, key string, into M) (M, int64) {
	t.Helper()
	v, err := c.leader().store.Linearizable(within(t, patience))
	if err != nil {
		t.Fatal(err)
	}
	mod, _, err := model.Load(v, key, into)
	if err != nil {
		t.Fatal(err)
	}
	return into, mod
}

func events(t *testing.T, c *cluster) []*pb.Event {
	t.Helper()
	v, err := c.leader().store.Linearizable(within(t, patience))
	if err != nil {
		t.Fatal(err)
	}
	var all []*pb.Event
	for kv := range v.Scan(model.EventsPrefix) {
		e := &pb.Event{}
		if err := model.Parse(kv, e); err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

func keysOf(t *testing.T, answer *clientv3.GetResponse, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, kv := range answer.Kvs {
		keys = append(keys, string(kv.Key))
	}
	return strings.Join(keys, " ")
}

func TestPutOfAWorkloadIsApplyWorkload(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx, client := within(t, patience), c.client()
	put, err := client.Put(ctx, "/workloads/web", webSpec, clientv3.WithPrevKV())
	if err != nil || put.PrevKv != nil {
		t.Fatalf("%v, %v", put, err)
	}
	got, mod := stored(t, c, "/workloads/web", &pb.Workload{})
	want := model.Normalize(specOf(t, webSpec))
	if !proto.Equal(got.Spec, want) || got.Revision != model.Revision(want) || got.Uid == "" || got.CreateTime == nil || mod != put.Header.Revision {
		t.Errorf("stored at %d (answer %d): %v", mod, put.Header.Revision, got)
	}
	if r, mod := stored(t, c, model.RevisionKey("web", got.Revision), &pb.Revision{}); mod != put.Header.Revision || !proto.Equal(r.Spec, want) {
		t.Errorf("the revision at %d: %v", mod, r)
	}
	if e := events(t, c); len(e) != 1 || e[0].Actor == "" || e[0].Type != pb.EventType_WORKLOAD_SUBMITTED {
		t.Errorf("events: %v", e)
	}

	// The same again, in whatever spelling, writes nothing; so does what get shows.
	shown, err := client.Get(ctx, "/workloads/web")
	if err != nil {
		t.Fatal(err)
	}
	document := string(shown.Kvs[0].Value)
	for _, same := range []string{webSpec, document, "replicas: 2\nlabels: {app: web}\nresources: {cpu: 0.5, memory: 128Mi}\ncontainer:\n  image: nginx:1\n  ports: [{container_port: 80}]\n"} {
		again, err := client.Put(ctx, "/workloads/web", same, clientv3.WithPrevKV())
		if err != nil || again.Header.Revision != put.Header.Revision || string(again.PrevKv.Value) != document {
			t.Errorf("%s: %v, %v", same, again, err)
		}
	}
	if again, err := client.Put(ctx, "/workloads/web", "", clientv3.WithIgnoreValue()); err != nil || again.Header.Revision != put.Header.Revision {
		t.Errorf("ignore_value: %v, %v", again, err)
	}

	// Read, modify, write.
	changed, err := client.Put(ctx, "/workloads/web", strings.Replace(document, "nginx:1", "nginx:2", 1), clientv3.WithPrevKV(), clientv3.WithIgnoreLease())
	if err != nil || string(changed.PrevKv.Value) != document || changed.PrevKv.ModRevision != put.Header.Revision {
		t.Fatalf("%v, %v", changed, err)
	}
	now, mod := stored(t, c, "/workloads/web", &pb.Workload{})
	if now.Spec.GetContainer().Image != "nginx:2" || now.Uid != got.Uid || now.Revision == got.Revision || mod != changed.Header.Revision {
		t.Errorf("changed at %d: %v", mod, now)
	}
	// What was read before that is old now.
	_, err = client.Put(ctx, "/workloads/web", document)
	if status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), "somebody changed it") {
		t.Errorf("an old document: %v", err)
	}

	// A kept document brings a workload back that is gone.
	c.must(&pb.Txn{Success: []*pb.RequestOp{model.Delete("/workloads/web")}})
	if _, err := client.Put(ctx, "/workloads/web", document); err != nil {
		t.Errorf("brought back: %v", err)
	}
	if back, _ := stored(t, c, "/workloads/web", &pb.Workload{}); back.Uid == got.Uid || !proto.Equal(back.Spec, want) || back.RestartGeneration != 0 {
		t.Errorf("brought back: %v", back)
	}
}

func TestPutOfANode(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	edit := func(change func(map[string]any)) (*clientv3.PutResponse, error) {
		t.Helper()
		answer, err := client.Get(ctx, "/nodes/n1")
		if err != nil {
			t.Fatal(err)
		}
		document := map[string]any{}
		if err := json.Unmarshal(answer.Kvs[0].Value, &document); err != nil {
			t.Fatal(err)
		}
		change(document)
		data, err := json.Marshal(document)
		if err != nil {
			t.Fatal(err)
		}
		return client.Put(ctx, "/nodes/n1", string(data))
	}
	for _, step := range []struct {
		name    string
		change  func(map[string]any)
		message string // of the event
		is      string
	}{
		{"cordon", func(n map[string]any) { n["unschedulable"] = true }, "cordoned", "READY true false map[rack:7]"},
		{"nothing", func(n map[string]any) {}, "", "READY true false map[rack:7]"},
		{"drain and label", func(n map[string]any) {
			n["draining"], n["user_labels"] = true, map[string]string{"disk": "ssd"}
		}, "labels changed: disk=ssd rack-, drain asked for", "DRAINING true true map[disk:ssd]"},
		{"taint", func(n map[string]any) {
			n["user_taints"] = []map[string]string{{"key": "old", "effect": "NO_SCHEDULE"}}
		}, "taints changed: old:NoSchedule", "DRAINING true true map[disk:ssd]"},
		{"no taint", func(n map[string]any) { delete(n, "user_taints") }, "taints changed: old-", "DRAINING true true map[disk:ssd]"},
		{"stop draining", func(n map[string]any) { n["draining"] = false }, "uncordoned, cordoned", "READY true false map[disk:ssd]"},
		{"uncordon", func(n map[string]any) { n["unschedulable"] = false }, "uncordoned", "READY false false map[disk:ssd]"},
		{"drain", func(n map[string]any) { n["draining"] = true }, "drain asked for", "DRAINING true true map[disk:ssd]"},
		{"by a deadline", func(n map[string]any) { n["drain_deadline"] = "2030-01-01T00:00:00Z" }, "drain asked for, by 2030-01-01T00:00:00Z", "DRAINING true true map[disk:ssd]"},
		{"undrain", func(n map[string]any) { n["draining"], n["unschedulable"] = false, false }, "uncordoned", "READY false false map[disk:ssd]"},
	} {
		before := len(events(t, c))
		answer, err := edit(step.change)
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		n, mod := stored(t, c, "/nodes/n1", &pb.Node{})
		if got := fmt.Sprint(n.State, " ", n.Unschedulable, n.Draining, n.UserLabels); got != step.is {
			t.Errorf("%s: %s", step.name, got)
		}
		all := events(t, c)
		switch {
		case step.message == "" && len(all) == before:
		case len(all) == before+1 && all[before].Message == step.message && mod == answer.Header.Revision:
		default:
			t.Errorf("%s: events %v", step.name, all[before:])
		}
	}

	// Removal is refused as long as it runs.
	if _, err := client.Delete(ctx, "/nodes/n1"); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("removed while it runs: %v", err)
	}
	n, _ := stored(t, c, "/nodes/n1", &pb.Node{})
	n.State = pb.NodeState_NOT_READY
	c.must(&pb.Txn{Success: []*pb.RequestOp{model.Put("/nodes/n1", n, 0), model.Delete("/nodes/n1/lease")}})
	gone, err := client.Delete(ctx, "/nodes/n1", clientv3.WithPrevKV())
	if err != nil || gone.Deleted != 1 || !strings.Contains(string(gone.PrevKvs[0].Value), `"NOT_READY"`) {
		t.Errorf("%v, %v", gone, err)
	}
	if _, mod := stored(t, c, "/nodes/n1", &pb.Node{}); mod != 0 {
		t.Error("it is still there")
	}
}

func TestDeleteOfWorkloads(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	for _, id := range []string{"a", "b", "web2"} {
		if _, err := client.Put(ctx, "/workloads/"+id, `{"process": {"command": "sleep"}}`); err != nil {
			t.Fatal(err)
		}
	}
	deleted := func(want int64, answer *clientv3.DeleteResponse, err error) {
		t.Helper()
		if err != nil || answer.Deleted != want {
			t.Errorf("%v, %v, want %d deleted", answer, err, want)
		}
	}
	desired := func(id string) pb.DesiredState {
		t.Helper()
		w, _ := stored(t, c, model.WorkloadKey(id), &pb.Workload{})
		return w.Spec.GetDesiredState()
	}
	one, err := client.Delete(ctx, "/workloads/a", clientv3.WithPrevKV())
	deleted(1, one, err)
	if desired("a") != pb.DesiredState_DESIRED_DELETED || !strings.Contains(string(one.PrevKvs[0].Value), "DESIRED_RUNNING") {
		t.Errorf("after its delete: %s, %v", desired("a"), one)
	}
	// It is there until its replicas are gone, and can be deleted again.
	again, err := client.Delete(ctx, "/workloads/a")
	deleted(1, again, err)
	if again.Header.Revision != one.Header.Revision {
		t.Errorf("the second delete wrote something: %v, %v", one, again)
	}
	none, err := client.Delete(ctx, "/workloads/none")
	deleted(0, none, err)
	// Statuses go with their workloads.
	prefix, err := client.Delete(ctx, "/workloads/we", clientv3.WithPrefix(), clientv3.WithPrevKV())
	deleted(2, prefix, err)
	if desired("web") != pb.DesiredState_DESIRED_DELETED || desired("web2") != pb.DesiredState_DESIRED_DELETED || desired("b") != pb.DesiredState_DESIRED_RUNNING {
		t.Error("the wrong ones")
	}
	if len(prefix.PrevKvs) != 2 || string(prefix.PrevKvs[0].Key) != "/workloads/web" || !strings.HasPrefix(string(prefix.PrevKvs[0].Value), "{") {
		t.Errorf("prev_kvs: %v", prefix.PrevKvs)
	}
	all, err := client.Delete(ctx, "/workloads/", clientv3.WithPrefix())
	deleted(4, all, err)
	// Beside users' keys.
	if _, err := client.Put(ctx, "/work", "mine"); err != nil {
		t.Fatal(err)
	}
	both, err := client.Delete(ctx, "/work", clientv3.WithPrefix(), clientv3.WithPrevKV())
	deleted(5, both, err)
	if len(both.PrevKvs) != 5 || string(both.PrevKvs[0].Value) != "mine" {
		t.Errorf("prev_kvs: %v", both.PrevKvs)
	}
	if answer, err := client.Get(ctx, "/work"); err != nil || answer.Count != 0 {
		t.Errorf("the user's key: %v, %v", answer, err)
	}
}

// Tools that handle all keys handle those that are theirs.
func TestTheWholeKeyspaceIsTheUsers(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	secret := &pb.Txn{Success: []*pb.RequestOp{model.Put(authPrefix+"users/x", &pb.Token{Id: "x"}, 0)}}
	watch := client.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created := <-watch; !created.Created {
		t.Fatalf("%v", created)
	}
	own := []string{"-", "/a", "/workload", "/workloads", "0", "zz"}
	for _, key := range own {
		if _, err := client.Put(ctx, key, "v"); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Put(ctx, "/workloads/w-"+fmt.Sprintf("%x", key), `{"process": {"command": "a"}}`); err != nil {
			t.Fatal(err)
		}
		c.must(secret)
	}
	for _, want := range own {
		next := <-watch
		if len(next.Events) != 1 || string(next.Events[0].Kv.Key) != want || string(next.Events[0].Kv.Value) != "v" {
			t.Fatalf("watched %v, want %s", next.Events, want)
		}
	}
	for name, opts := range map[string][]clientv3.OpOption{
		"prefix":    {clientv3.WithPrefix()},
		"from":      {clientv3.WithFromKey()},
		"keys only": {clientv3.WithPrefix(), clientv3.WithKeysOnly()},
	} {
		answer, err := client.Get(ctx, "", opts...)
		if got := keysOf(t, answer, err); got != strings.Join(own, " ") || answer.Count != int64(len(own)) {
			t.Errorf("%s: %s (%d)", name, got, answer.Count)
		}
	}
	answer, err := client.Get(ctx, "", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil || answer.Count != int64(len(own)) {
		t.Errorf("count: %v, %v", answer, err)
	}
	page, err := client.Get(ctx, "", clientv3.WithPrefix(), clientv3.WithLimit(3))
	if got := keysOf(t, page, err); got != "- /a /workload" || !page.More || page.Count != int64(len(own)) {
		t.Errorf("page: %s %v %d", got, page.More, page.Count)
	}
	txn, err := client.Txn(ctx).Then(clientv3.OpGet("", clientv3.WithFromKey(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(2))).Commit()
	if err != nil || len(txn.Responses) != 1 {
		t.Fatalf("%v, %v", txn, err)
	}
	if kvs := txn.Responses[0].GetResponseRange(); len(kvs.Kvs) != 2 || string(kvs.Kvs[0].Key) != "zz" || string(kvs.Kvs[1].Key) != "0" || !kvs.More || kvs.Count != 6 {
		t.Errorf("in a transaction: %v", kvs)
	}
	before := c.leader().store.View().Len()
	gone, err := client.Delete(ctx, "", clientv3.WithPrefix(), clientv3.WithPrevKV())
	if err != nil || gone.Deleted != int64(len(own)) || len(gone.PrevKvs) != len(own) {
		t.Fatalf("%v, %v", gone, err)
	}
	if after := c.leader().store.View().Len(); before-after != len(own) {
		t.Errorf("%d keys went", before-after)
	}
}

func TestRangesThatBeginWithASlashShowDocuments(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	c.must(&pb.Txn{Success: []*pb.RequestOp{model.Put(authPrefix+"users/x", &pb.Token{Id: "x"}, 0)}})
	if _, err := client.Put(ctx, "/mine", "mine"); err != nil {
		t.Fatal(err)
	}
	v := c.leader().store.View()
	answer, err := client.Get(ctx, "/", clientv3.WithPrefix())
	if err != nil || answer.Count != int64(v.Len()-1) || len(answer.Kvs) != v.Len()-1 {
		t.Fatalf("%d of %d keys: %v", len(answer.Kvs), v.Len(), err)
	}
	for _, kv := range answer.Kvs {
		raw, ok := v.Get(string(kv.Key))
		if !ok || ownerOf(kv.Key) == hidden || string(kv.Value) != string(show(raw).Value) || kv.ModRevision != raw.ModRevision {
			t.Errorf("%v", kv)
		}
	}
	for _, opts := range [][]clientv3.OpOption{nil, {clientv3.WithPrefix()}, {clientv3.WithFromKey(), clientv3.WithRange("/system/auth/zz")}, {clientv3.WithPrefix(), clientv3.WithCountOnly()}} {
		if none, err := client.Get(ctx, authPrefix+"users/x", opts...); err != nil || none.Count != 0 || len(none.Kvs) != 0 || none.Header.Revision != v.Revision() {
			t.Errorf("secrets: %v, %v", none, err)
		}
	}
	if _, err := client.Get(ctx, authPrefix+"users/x", clientv3.WithRev(v.Revision()+100)); !errors.Is(err, rpctypes.ErrFutureRev) {
		t.Errorf("a future revision: %v", err)
	}
	first, err := client.Get(ctx, "/", clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByValue, clientv3.SortDescend), clientv3.WithLimit(2), clientv3.WithKeysOnly())
	if got := keysOf(t, first, err); got != "/workloads/web/status /retries/web/000001" && len(first.Kvs) != 2 || !first.More || first.Kvs[0].Value != nil {
		t.Errorf("sorted: %s", got)
	}
	old, err := client.Get(ctx, "/workloads/web", clientv3.WithRev(v.Revision()))
	if err != nil || len(old.Kvs) != 1 || !strings.HasPrefix(string(old.Kvs[0].Value), `{"spec":`) {
		t.Errorf("at a revision: %v, %v", old, err)
	}
}

func TestWatchOfDocuments(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	watch := client.Watch(ctx, "/workloads/", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithCreatedNotify())
	secrets := client.Watch(ctx, "/system/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-watch
	<-secrets
	if _, err := client.Put(ctx, "/workloads/web", strings.Replace(webSpec, "nginx:1", "nginx:2", 1)); err != nil {
		t.Fatal(err)
	}
	put := (<-watch).Events[0]
	if !put.IsModify() || !strings.Contains(string(put.Kv.Value), `"image":"nginx:2"`) || !strings.Contains(string(put.PrevKv.Value), `"image":"nginx:1"`) {
		t.Errorf("%v", put)
	}
	c.must(&pb.Txn{Success: []*pb.RequestOp{
		model.Delete("/workloads/web"), model.Put(authPrefix+"users/x", &pb.Token{Id: "x"}, 0), model.Put("/system/cluster", &pb.ClusterInfo{Id: "other"}, 0),
	}})
	gone := (<-watch).Events[0]
	if gone.Type != clientv3.EventTypeDelete || len(gone.Kv.Value) != 0 || !strings.Contains(string(gone.PrevKv.Value), `"image":"nginx:2"`) {
		t.Errorf("%v", gone)
	}
	if seen := (<-secrets).Events; len(seen) != 1 || string(seen[0].Kv.Value) != `{"id":"other","name":""}` {
		t.Errorf("of /system/ was seen: %v", seen)
	}
}

// Puts of one workload through several replicas come one after the other: each
// answer is of a version that was there, with the document before it.
func TestConcurrentPutsOfOneWorkload(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	const writers, puts = 3, 8
	type answer struct{ revision, before int64 }
	answers := make(chan answer, writers*puts)
	var group sync.WaitGroup
	for w := range writers {
		client := c.client(c.replicas[w].endpoint)
		group.Go(func() {
			for i := range puts {
				var put *clientv3.PutResponse
				eventually(t, "put", func() (err error) {
					put, err = client.Put(ctx, "/workloads/web", fmt.Sprintf(`{"process": {"command": "c%d-%d"}}`, w, i), clientv3.WithPrevKV())
					return err
				})
				answers <- answer{put.Header.Revision, put.PrevKv.GetModRevision()}
			}
		})
	}
	group.Wait()
	close(answers)
	next := map[int64]int64{}
	for a := range answers {
		if other, twice := next[a.before]; twice {
			t.Errorf("both %d and %d follow %d", other, a.revision, a.before)
		}
		next[a.before] = a.revision
	}
	last, length := int64(0), 0
	for next[last] != 0 {
		last, length = next[last], length+1
	}
	got, err := c.client().Get(ctx, "/workloads/web")
	if err != nil || length != writers*puts || got.Kvs[0].ModRevision != last || got.Kvs[0].Version != int64(length) {
		t.Errorf("%d in a row, up to %d: %v, %v", length, last, got, err)
	}
}

func put(client *clientv3.Client, key, value string, opts ...clientv3.OpOption) func(context.Context) error {
	return func(ctx context.Context) error { _, err := client.Put(ctx, key, value, opts...); return err }
}

func del(client *clientv3.Client, key string, opts ...clientv3.OpOption) func(context.Context) error {
	return func(ctx context.Context) error { _, err := client.Delete(ctx, key, opts...); return err }
}

func TestRefusals(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	const lease, nodes = 4711, 4712
	c.must(&pb.Txn{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: lease, TtlSeconds: 600}}},
		{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: nodes, TtlSeconds: 600}}},
		model.Put("/nodes/leased/lease", &pb.NodeLease{}, nodes),
		model.Put("/workloads/gone", &pb.Workload{Spec: &pb.WorkloadSpec{Id: "gone", DesiredState: pb.DesiredState_DESIRED_DELETED}}, 0),
	}})
	var got strings.Builder
	try := func(name string, do func(context.Context) error) {
		before := c.leader().store.View().Revision()
		err := do(ctx)
		if after := c.leader().store.View().Revision(); after != before {
			t.Errorf("%s changed something", name)
		}
		code, message := status.Code(err), status.Convert(err).Message()
		var etcd rpctypes.EtcdError
		if errors.As(err, &etcd) {
			code, message = etcd.Code(), etcd.Error()
		}
		fmt.Fprintf(&got, "%s\n  %s: %s\n", name, code, strings.ReplaceAll(message, "\n", "\n    "))
	}
	for _, key := range append(sortedKeys(examples(t)), "/workloads/", "/workloads/a/b", "/assignments/x", "/system/x", "/events/", "/nodes/n1/x") {
		try("put "+key, put(client, key, "x"))
		if k := kindOf(key); k == nil || k.remove == nil {
			try("del "+key, del(client, key))
		}
	}
	for _, prefix := range []string{"/", "/workloads/web/", "/nodes/", "/nodes/n1/", "/system/auth/", "/assign", "/events/"} {
		try("del --prefix "+prefix, del(client, prefix, clientv3.WithPrefix()))
	}
	try("del --from-key /", del(client, "/", clientv3.WithFromKey()))
	for _, value := range []string{
		"", "null", "[]", "{", `"text"`, "{}", `{"id": "other", "process": {"command": "a"}}`, `{"spec": {"id": "other"}}`, `{"spec": null}`,
		`{"container": {"image": "nginx"}, "replica": 2}`, `{"container": {"image": ""}, "replicas": -1}`, `{"process": {"command": "a"}} {}`,
		`{"spec": {"process": {"command": "a"}}, "uid": "mine"}`, `{"spec": {"process": {"command": "a"}}, "restart_generation": 7}`,
		`{"spec": {"process": {"command": "a"}}, "status": {"state": "RUNNING"}}`, `{"spec": {"process": {"command": "a"}}, "resource_version": 1}`,
		`{"kind": "job", "process": {"command": "a"}}`, `{"desired_state": "deleted", "process": {"command": "a"}}`,
	} {
		try("put /workloads/web "+value, put(client, "/workloads/web", value))
	}
	try("put /workloads/UPPER", put(client, "/workloads/UPPER", webSpec[:1]+webSpec[13:]))
	try("put /workloads/gone", put(client, "/workloads/gone", `{"process": {"command": "a"}}`))
	try("put --lease", put(client, "/workloads/web", webSpec, clientv3.WithLease(lease)))
	try("put --ignore-value of nothing", put(client, "/workloads/none", "", clientv3.WithIgnoreValue()))
	try("put --ignore-lease of nothing", put(client, "/workloads/none", `{"process": {"command": "a"}}`, clientv3.WithIgnoreLease()))
	try("put --ignore-value", put(client, "/assignments/x/0", "", clientv3.WithIgnoreValue()))
	for _, value := range []string{
		"", `{"id": "n2"}`, `{"state": "NOT_READY"}`, `{"labels": {"zone": "b"}}`, `{"capacity": {"cpu_millis": 1}, "address": "x"}`, `{"resource_version": 1}`,
		`{"user_labels": {"a b": "c"}}`, `{"drain": true}`, `{"assignments": 3}`, `{"drain_deadline": "2026-11-01T12:00:00Z"}`,
		`{"draining": true, "unschedulable": true, "drain_deadline": "soon"}`,
	} {
		try("put /nodes/n1 "+value, put(client, "/nodes/n1", value))
	}
	for _, value := range []string{"", `{"rebalance": "often"}`, `{"rebalance_moves": -1}`, `{"resource_version": 1}`} {
		try("put /system/scheduler "+value, put(client, "/system/scheduler", value))
	}
	try("put /nodes/none", put(client, "/nodes/none", "{}"))
	try("the same workload twice", func(ctx context.Context) error {
		_, err := client.Txn(ctx).Then(clientv3.OpPut("/workloads/a", webSpec), clientv3.OpDelete("/workloads/a")).Commit()
		return err
	})
	try("one refused put among others", func(ctx context.Context) error {
		_, err := client.Txn(ctx).Then(clientv3.OpPut("mine", "x"), clientv3.OpPut("/workloads/a", `{"process": {"command": "a"}}`), clientv3.OpPut("/assignments/a/0", "x")).Commit()
		return err
	})
	try("a compare of a wrong document", func(ctx context.Context) error {
		_, err := client.Txn(ctx).If(clientv3.Compare(clientv3.Value("/workloads/web"), "=", "x")).Then(clientv3.OpPut("mine", "x")).Else(clientv3.OpPut("/assignments/a/0", "x")).Commit()
		return err
	})
	recorded(t, "system/refusals.txt", got.String())
}

// The scheduler's configuration is a document that can be put, and its removal
// brings the defaults back.
func TestSchedulerConfigAsADocument(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	if _, err := client.Put(ctx, model.SchedulerKey, `{"rebalance": true, "rebalance_moves": 9}`); err != nil {
		t.Fatal(err)
	}
	if config, _ := stored(t, c, model.SchedulerKey, &pb.SchedulerConfig{}); !config.Rebalance || config.RebalanceMoves != 9 {
		t.Errorf("%v", config)
	}
	all := events(t, c)
	if last := all[len(all)-1]; last.Type != pb.EventType_SCHEDULER_CHANGED || last.Message != "scheduler: rebalance-moves=9" {
		t.Errorf("%v", last)
	}
	if _, err := client.Delete(ctx, model.SchedulerKey); err != nil {
		t.Fatal(err)
	}
	if answer, err := client.Get(ctx, model.SchedulerKey); err != nil || len(answer.Kvs) != 0 {
		t.Errorf("%v %v", answer, err)
	}
}

// How the scheduler is set is for admins, as by the other APIs.
func TestSchedulerConfigIsForAdmins(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) {
		cfg.Identity = func(ctx context.Context) (string, pb.Role, bool) {
			v := metadata.ValueFromIncomingContext(ctx, "test-role")
			return strings.Join(v, ""), pb.Role(pb.Role_value[strings.Join(v, "")]), len(v) > 0
		}
	})
	client := c.client()
	is := func(role string) context.Context {
		return metadata.AppendToOutgoingContext(within(t, patience), "test-role", role)
	}
	on := clientv3.OpPut(model.SchedulerKey, `{"rebalance": true}`)
	for _, write := range []clientv3.Op{on, clientv3.OpDelete(model.SchedulerKey)} {
		if err := errOf(client.Do(is("ROLE_OPERATOR"), write)); err == nil || !strings.Contains(err.Error(), "is changed by admins only") {
			t.Errorf("operator: %v", err)
		}
		wants(t, "admin", errOf(client.Do(is("ROLE_ADMIN"), write)), nil)
	}
}
