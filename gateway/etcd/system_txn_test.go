package etcd

import (
	"context"
	"fmt"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const sleeper = `{"process": {"command": "sleep"}}`

// Users' and system's keys change in one revision, and the answer is that of the
// operations as they were asked for.
func TestTransactionOfBothKinds(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	if _, err := client.Put(ctx, "/workloads/old", sleeper); err != nil {
		t.Fatal(err)
	}
	before := c.leader().store.View().Revision()
	answer, err := client.Txn(ctx).
		If(clientv3.Compare(clientv3.Version("/workloads/web"), "=", 1), clientv3.Compare(clientv3.CreateRevision("mine"), "=", 0)).
		Then(
			clientv3.OpPut("mine", "x"),
			clientv3.OpPut("/workloads/new", sleeper, clientv3.WithPrevKV()),
			clientv3.OpGet("/workloads/new"),
			clientv3.OpTxn(
				[]clientv3.Cmp{clientv3.Compare(clientv3.Version("/nodes/n1"), ">", 0)},
				[]clientv3.Op{clientv3.OpPut("/nodes/n1", `{"unschedulable": true, "user_labels": {"rack": "7"}}`, clientv3.WithPrevKV()), clientv3.OpGet("mine")},
				[]clientv3.Op{clientv3.OpPut("/assignments/x/0", "not taken")},
			),
			clientv3.OpDelete("/workloads/old", clientv3.WithPrevKV()),
			clientv3.OpGet("/", clientv3.WithRange("/b"), clientv3.WithCountOnly()),
		).
		Else(clientv3.OpPut("/assignments/x/0", "not taken")).
		Commit()
	if err != nil || !answer.Succeeded || len(answer.Responses) != 6 || answer.Header.Revision != before+1 {
		t.Fatalf("%v, %v", answer, err)
	}
	if put := answer.Responses[1].GetResponsePut(); put == nil || put.PrevKv != nil {
		t.Errorf("put of a workload: %v", put)
	}
	got := answer.Responses[2].GetResponseRange()
	if got == nil || len(got.Kvs) != 1 || got.Kvs[0].ModRevision != before+1 || !strings.Contains(string(got.Kvs[0].Value), fmt.Sprintf(`"resource_version":"%d"`, before+1)) {
		t.Errorf("the workload just put: %v", got)
	}
	inner := answer.Responses[3].GetResponseTxn()
	if inner == nil || !inner.Succeeded || !strings.Contains(string(inner.Responses[0].GetResponsePut().GetPrevKv().GetValue()), `"unschedulable":false`) ||
		string(inner.Responses[1].GetResponseRange().Kvs[0].Value) != "x" {
		t.Errorf("nested: %v", inner)
	}
	if gone := answer.Responses[4].GetResponseDeleteRange(); gone == nil || gone.Deleted != 1 || string(gone.PrevKvs[0].Key) != "/workloads/old" {
		t.Errorf("delete: %v", gone)
	}
	if count := answer.Responses[5].GetResponseRange(); count == nil || count.Count != 1 {
		t.Errorf("count: %v", count)
	}
	for _, key := range []string{"mine", "/workloads/new", "/workloads/old", "/nodes/n1"} {
		if kv, ok := c.leader().store.View().Get(key); !ok || kv.ModRevision != before+1 {
			t.Errorf("%s: %v", key, kv)
		}
	}
	var messages []string
	for _, e := range events(t, c)[2:] {
		messages = append(messages, e.WorkloadId+e.NodeId+": "+e.Message)
	}
	if got := strings.Join(messages, "; "); !strings.HasPrefix(got, "new: submitted at revision ") || !strings.HasSuffix(got, "; n1: cordoned; old: deletion asked for") {
		t.Errorf("events: %s", got)
	}
}

// A refusal in it is one of the whole; but not where it is not carried out.
func TestTransactionIsRefusedAsAWhole(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	before := c.leader().store.View().Revision()
	_, err := client.Txn(ctx).Then(clientv3.OpPut("mine", "x"), clientv3.OpPut("/workloads/a", sleeper), clientv3.OpPut("/workloads/b", "{}")).Commit()
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "/workloads/b: says nothing to run") {
		t.Errorf("%v", err)
	}
	if after := c.leader().store.View().Revision(); after != before {
		t.Error("something was changed")
	}
	answer, err := client.Txn(ctx).If(clientv3.Compare(clientv3.Version("mine"), ">", 0)).Then(clientv3.OpPut("/workloads/b", "{}")).Else(clientv3.OpGet("/workloads/web")).Commit()
	if err != nil || answer.Succeeded || len(answer.Responses[0].GetResponseRange().Kvs) != 1 {
		t.Errorf("%v, %v", answer, err)
	}
	// A future revision is one, whatever branches were not looked at.
	_, err = client.Txn(ctx).If(clientv3.Compare(clientv3.Version("mine"), ">", 0)).Then(clientv3.OpPut("/workloads/b", "{}")).Else(clientv3.OpGet("x", clientv3.WithRev(before+1000))).Commit()
	if status.Code(err) != codes.OutOfRange && !strings.Contains(fmt.Sprint(err), "required revision is a future revision") {
		t.Errorf("a future revision: %v", err)
	}
}

// Values of the system's keys compare as they are shown.
func TestComparesOfDocuments(t *testing.T) {
	_, client := seeded(t, 1)
	ctx := within(t, patience)
	shown, err := client.Get(ctx, "/workloads/web")
	if err != nil {
		t.Fatal(err)
	}
	swap := func(from string) (*clientv3.TxnResponse, error) {
		return client.Txn(ctx).If(clientv3.Compare(clientv3.Value("/workloads/web"), "=", from)).
			Then(clientv3.OpPut("/workloads/web", strings.Replace(from, "nginx:1", "nginx:2", 1)), clientv3.OpPut("swapped", "yes")).
			Else(clientv3.OpGet("/workloads/web")).Commit()
	}
	first, err := swap(string(shown.Kvs[0].Value))
	if err != nil || !first.Succeeded {
		t.Fatalf("%v, %v", first, err)
	}
	second, err := swap(string(shown.Kvs[0].Value))
	if err != nil || second.Succeeded || !strings.Contains(string(second.Responses[0].GetResponseRange().Kvs[0].Value), "nginx:2") {
		t.Errorf("%v, %v", second, err)
	}
	for name, c := range map[string]struct {
		cmp  clientv3.Cmp
		want bool
	}{
		"all below /workloads/":       {clientv3.Compare(clientv3.Value("/workloads/"), ">", "{").WithPrefix(), true},
		"none of users' in all":       {clientv3.Compare(clientv3.Version("\x00").WithRange("\x00"), "=", 1), true},
		"a secret is missing":         {clientv3.Compare(clientv3.Version(authPrefix+"users/ann"), "=", 0), true},
		"a secret has no value":       {clientv3.Compare(clientv3.Value(authPrefix+"users/ann"), "!=", "x"), false},
		"the stored form is not seen": {clientv3.Compare(clientv3.Value("/system/cluster"), "=", `{"id":"c1","name":"test","create_time":"2026-11-01T12:00:00Z"}`), true},
	} {
		answer, err := client.Txn(ctx).If(c.cmp).Commit()
		if err != nil || answer.Succeeded != c.want {
			t.Errorf("%s: %v, %v", name, answer, err)
		}
	}
}

// interposed is a store where something happens right before each proposal, once.
type interposed struct {
	Store
	before func()
}

func (s *interposed) Propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error) {
	if do := s.before; do != nil {
		s.before = nil
		do()
	}
	return s.Store.Propose(ctx, txn)
}

// What changes between admission and the transaction is seen by it: it is admitted
// anew, and where it takes another branch that is admitted then.
func TestAdmissionHoldsWhenApplied(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	store := &interposed{Store: testStore{c.leader().store}}
	s := New(Config{Store: store, Logger: testLogger(t, "s1")})
	putOf := func(key, value string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
	}
	deleteOf := func(key string, end []byte) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: end}}}
	}
	workload := func(id, command string) func() {
		return func() {
			spec := specOf(t, fmt.Sprintf(`{"id": %q, "process": {"command": %q}}`, id, command))
			txn, _, _, err := model.ApplyWorkload(c.leader().store.View(), &pb.ApplyWorkloadRequest{Spec: spec}, model.Meta{NewID: id + command})
			if err != nil {
				t.Fatal(err)
			}
			c.must(txn)
		}
	}
	propose := func(between func(), txn *pb.Txn) (*pb.TxnResponse, error) {
		store.before = between
		return s.propose(ctx, txn)
	}

	// A put is of the version that it replaces.
	if _, err := propose(workload("web", "other"), &pb.Txn{Success: []*pb.RequestOp{putOf("/workloads/web", sleeper)}}); err != nil {
		t.Fatal(err)
	}
	if w, _ := stored(t, c, "/workloads/web", &pb.Workload{}); w.Spec.GetProcess().Command != "sleep" || w.Uid != "webother" {
		t.Errorf("put: %v", w)
	}
	// A delete of a range takes along what has just come.
	answer, err := propose(workload("web2", "sleep"), &pb.Txn{Success: []*pb.RequestOp{deleteOf("/workloads/", model.PrefixEnd("/workloads/"))}})
	if err != nil || answer.Responses[0].GetResponseDeleteRange().Deleted != 2 {
		t.Errorf("delete: %v, %v", answer, err)
	}
	// A branch that is taken all of a sudden is looked at.
	holds := &pb.Compare{Target: pb.Compare_VERSION, Result: pb.Compare_GREATER, Key: []byte("flag"), TargetUnion: &pb.Compare_Version{}}
	set := func() {
		c.must(&pb.Txn{Success: []*pb.RequestOp{putOf("flag", "x")}})
	}
	answer, err = propose(set, &pb.Txn{
		Compare: []*pb.Compare{holds},
		Success: []*pb.RequestOp{putOf("/workloads/new", sleeper)}, Failure: []*pb.RequestOp{putOf("mine", "x")},
	})
	if err != nil || !answer.Succeeded {
		t.Errorf("branch: %v, %v", answer, err)
	}
	if _, mod := stored(t, c, "/workloads/new", &pb.Workload{}); mod == 0 {
		t.Error("the workload is not there")
	}
	// A compare of documents is of those at the time.
	v := c.leader().store.View()
	kv, _ := v.Get("/workloads/new")
	same := &pb.Compare{Key: kv.Key, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: document(kv)}}
	answer, err = propose(workload("new", "changed"), &pb.Txn{Compare: []*pb.Compare{same}, Success: []*pb.RequestOp{putOf("mine", "y")}})
	if err != nil || answer.Succeeded {
		t.Errorf("compare: %v, %v", answer, err)
	}
	// Whatever is asked for at once has its bound, and says so.
	large := &pb.WorkloadSpec{Env: map[string]string{"A": strings.Repeat("x", 200<<10)}}
	for i := range 45 {
		large.Id = fmt.Sprintf("large-%d", i)
		c.must(&pb.Txn{Success: []*pb.RequestOp{model.Put(model.WorkloadKey(large.Id), &pb.Workload{Spec: large}, 0)}})
	}
	_, err = s.propose(ctx, &pb.Txn{Success: []*pb.RequestOp{deleteOf("/workloads/", model.PrefixEnd("/workloads/"))}})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "too much at once: more than 8388608 bytes") {
		t.Errorf("45 large workloads: %v", err)
	}
	if err := fsm.ValidateTxn(&pb.Txn{Success: []*pb.RequestOp{lookAgain()}}); err != nil {
		t.Error(err)
	}
}

// A node's lease is no client's to end.
func TestRevokeOfANodesLease(t *testing.T) {
	c, client := seeded(t, 1)
	ctx := within(t, patience)
	c.must(&pb.Txn{Success: []*pb.RequestOp{
		{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: 7, TtlSeconds: 600}}},
		model.Put("/nodes/n1/lease", &pb.NodeLease{LeaseId: 7}, 7),
	}})
	if _, err := client.Revoke(ctx, 7); err == nil {
		t.Error("it was ended")
	}
	if _, ok := c.leader().store.View().Get("/nodes/n1/lease"); !ok {
		t.Error("it is gone")
	}
}

// Tools that begin anew delete everything and write in one.
func TestDeleteOfAllAndPutInOne(t *testing.T) {
	_, client := seeded(t, 1)
	ctx := within(t, patience)
	for _, key := range []string{"a", "b"} {
		if _, err := client.Put(ctx, key, "before"); err != nil {
			t.Fatal(err)
		}
	}
	answer, err := client.Txn(ctx).Then(clientv3.OpDelete("", clientv3.WithFromKey()), clientv3.OpPut("a", "after"), clientv3.OpGet("", clientv3.WithFromKey())).Commit()
	if err != nil || answer.Responses[0].GetResponseDeleteRange().Deleted != 2 {
		t.Fatalf("%v, %v", answer, err)
	}
	if left := answer.Responses[2].GetResponseRange(); len(left.Kvs) != 1 || string(left.Kvs[0].Value) != "after" || left.Kvs[0].Version != 1 {
		t.Errorf("%v", left)
	}
}
