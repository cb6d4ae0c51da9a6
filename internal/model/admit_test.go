package model

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// world is a keyspace to which transactions are applied one by one.
type world struct {
	t     *testing.T
	store *fsm.Store
	index uint64
	calls int
}

var epochStart = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func newWorld(t *testing.T) *world { return &world{t: t, store: fsm.New()} }

func (w *world) view() *fsm.View { return w.store.View() }

// meta is that of a new call, one second after the one before.
func (w *world) meta() Meta {
	w.calls++
	return Meta{Now: epochStart.Add(time.Duration(w.calls) * time.Second), Actor: "admin/ann", NewID: fmt.Sprintf("id-%d", w.calls)}
}

func (w *world) try(txn *pb.Txn) *pb.TxnResult {
	w.t.Helper()
	if err := fsm.ValidateTxn(txn); err != nil {
		w.t.Fatalf("malformed transaction: %v", err)
	}
	w.index++
	results, _, err := w.store.Apply(w.index, &pb.Entry{FeatureLevel: fsm.FeatureLevel, TimeUnixNano: epochStart.UnixNano(), Txns: []*pb.Txn{txn}})
	if err != nil {
		w.t.Fatal(err)
	}
	return results[0]
}

func (w *world) do(txn *pb.Txn) *pb.TxnResponse {
	w.t.Helper()
	r := w.try(txn)
	if r.Error != pb.TxnError_TXN_ERROR_NONE || !r.Response.Succeeded {
		w.t.Fatalf("refused: %v", r)
	}
	return r.Response
}

func (w *world) put(key string, msg proto.Message) {
	w.t.Helper()
	w.do(&pb.Txn{Success: []*pb.RequestOp{Put(key, msg, 0)}})
}

func (w *world) apply(spec string) *pb.Workload {
	w.t.Helper()
	txn, _, wl, err := ApplyWorkload(w.view(), &pb.ApplyWorkloadRequest{Spec: decodeOne(w.t, spec)}, w.meta())
	if err != nil {
		w.t.Fatal(err)
	}
	if txn != nil {
		wl.ResourceVersion = w.do(txn).Revision
	}
	return wl
}

func (w *world) events() []string {
	var all []string
	for kv := range w.view().Scan(EventsPrefix) {
		e := &pb.Event{}
		if err := Parse(kv, e); err != nil {
			w.t.Fatal(err)
		}
		all = append(all, fmt.Sprintf("%s %s%s by %s: %s", e.Type, e.WorkloadId, e.NodeId, e.Actor, e.Message))
	}
	return all
}

func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	var r *Refusal
	var f FieldErrors
	switch {
	case errors.As(err, &r) && r.Code == code && strings.Contains(err.Error(), text):
	case errors.As(err, &f) && code == codes.InvalidArgument && strings.Contains(err.Error(), text):
	default:
		t.Errorf("error %v, want %s with %q", err, code, text)
	}
}

const web = "{id: web, replicas: 2, container: {image: 'nginx:1'}}"

func TestApplyWorkload(t *testing.T) {
	w := newWorld(t)
	created := w.apply(web)
	if created.Uid != "id-1" || created.Revision == "" || created.ResourceVersion != 2 {
		t.Fatalf("created: %v", created)
	}
	// The same again writes nothing, in whatever spelling.
	txn, outcome, same, err := ApplyWorkload(w.view(), &pb.ApplyWorkloadRequest{Spec: decodeOne(t, "{id: web, replicas: 2, priority: 50, type: container, container: {image: 'nginx:1'}}")}, w.meta())
	if err != nil || txn != nil || outcome != pb.ApplyWorkloadResponse_UNCHANGED || same.ResourceVersion != 2 {
		t.Errorf("unchanged: %v %v %v %v", txn, outcome, same, err)
	}
	// Another number of replicas keeps the revision, another image does not.
	scaled := w.apply("{id: web, replicas: 3, container: {image: 'nginx:1'}}")
	if scaled.Revision != created.Revision || scaled.Uid != created.Uid || !proto.Equal(scaled.CreateTime, created.CreateTime) {
		t.Errorf("scaled: %v", scaled)
	}
	if changed := w.apply("{id: web, replicas: 3, container: {image: 'nginx:2'}}"); changed.Revision == created.Revision {
		t.Errorf("changed: %v", changed)
	}
	var stored pb.Workload
	if mod, ok, err := Load(w.view(), WorkloadKey("web"), &stored); err != nil || !ok || mod != 4 || stored.Spec.GetContainer().Image != "nginx:2" || stored.ResourceVersion != 0 {
		t.Errorf("stored: %v %v %v", &stored, mod, err)
	}
	got := strings.Join(w.events(), "\n")
	want := fmt.Sprintf(`WORKLOAD_SUBMITTED web by admin/ann: submitted at revision %s
WORKLOAD_UPDATED web by admin/ann: spec changed, replicas keep running at revision %[1]s
WORKLOAD_UPDATED web by admin/ann: spec changed, revision %s replaces %[1]s`, created.Revision, stored.Revision)
	if got != want {
		t.Errorf("events:\n%s", got)
	}
}

func TestApplyWorkloadRefuses(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	w.apply("{id: gone, process: {command: sleep}}")
	txn, _, err := DeleteWorkload(w.view(), &pb.DeleteWorkloadRequest{Id: "gone"}, w.meta())
	if err != nil {
		t.Fatal(err)
	}
	w.do(txn)
	spec := func(s string) *pb.WorkloadSpec { return decodeOne(t, s) }
	for _, tt := range []struct {
		req  *pb.ApplyWorkloadRequest
		code codes.Code
		text string
	}{
		{&pb.ApplyWorkloadRequest{}, codes.InvalidArgument, "spec: missing"},
		{&pb.ApplyWorkloadRequest{Spec: spec("{id: X}")}, codes.InvalidArgument, `id: "X" is not allowed`},
		{&pb.ApplyWorkloadRequest{Spec: spec(web), CreateOnly: true}, codes.AlreadyExists, `workload "web" exists already`},
		{&pb.ApplyWorkloadRequest{Spec: spec(web), IfVersion: 1}, codes.Aborted, `workload "web" is at version 2, not 1`},
		{&pb.ApplyWorkloadRequest{Spec: spec(web), IfVersion: -1}, codes.InvalidArgument, "if_version: -1 is negative"},
		{&pb.ApplyWorkloadRequest{Spec: spec(web), IfVersion: 2, CreateOnly: true}, codes.InvalidArgument, "if_version: contradicts create_only"},
		{&pb.ApplyWorkloadRequest{Spec: spec(web), IdempotencyKey: strings.Repeat("x", 256)}, codes.InvalidArgument, "idempotency_key: has 256 bytes; allowed: 255"},
		{&pb.ApplyWorkloadRequest{Spec: spec("{id: new, process: {command: a}}"), IfVersion: 2}, codes.Aborted, `workload "new" does not exist`},
		{&pb.ApplyWorkloadRequest{Spec: spec("{id: gone, process: {command: sleep}}")}, codes.FailedPrecondition, `workload "gone" is being deleted; apply it again when it is gone`},
		{&pb.ApplyWorkloadRequest{Spec: spec("{id: web, kind: job, container: {image: 'nginx:1'}}")}, codes.FailedPrecondition, `workload "web" is of kind service and cannot become job`},
	} {
		txn, _, _, err := ApplyWorkload(w.view(), tt.req, w.meta())
		wantCode(t, err, tt.code, tt.text)
		if txn != nil {
			t.Errorf("%v: a transaction", tt.req)
		}
	}
}

// Two admissions of one view: the second one to be applied is a conflict.
func TestAdmissionComparesWhatItRead(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	w.put(NodeKey("n1"), &pb.Node{Id: "n1", State: pb.NodeState_NOT_READY})
	v := w.view()
	id := &pb.WorkloadRequest{Id: "web"}
	var txns []*pb.Txn
	admit := func(txn *pb.Txn, err error) {
		t.Helper()
		if err != nil || txn == nil {
			t.Fatalf("%v, %v", txn, err)
		}
		txns = append(txns, txn)
	}
	txn, _, _, err := ApplyWorkload(v, &pb.ApplyWorkloadRequest{Spec: decodeOne(t, "{id: web, container: {image: other}}")}, w.meta())
	admit(txn, err)
	txn, _, err = ScaleWorkload(v, &pb.ScaleWorkloadRequest{Id: "web", Replicas: proto.Int32(9)}, w.meta())
	admit(txn, err)
	txn, _, err = StopWorkload(v, id, w.meta())
	admit(txn, err)
	txn, _, err = RestartWorkload(v, id, w.meta())
	admit(txn, err)
	txn, _, err = DeleteWorkload(v, &pb.DeleteWorkloadRequest{Id: "web"}, w.meta())
	admit(txn, err)
	w.do(txns[0])
	for _, txn := range txns {
		if r := w.try(txn); r.Response.GetSucceeded() {
			t.Errorf("carried out on an older version: %v", txn)
		}
	}
	nodeTxns := txns[:0]
	txns = nil
	txn, _, err = CordonNode(v, &pb.NodeRequest{Id: "n1"}, w.meta())
	admit(txn, err)
	txn, _, err = DrainNode(v, &pb.DrainNodeRequest{Id: "n1"}, w.meta())
	admit(txn, err)
	txn, _, err = RemoveNode(v, &pb.NodeRequest{Id: "n1"}, w.meta())
	admit(txn, err)
	txn, _, err = LabelNode(v, &pb.LabelNodeRequest{Id: "n1", Set: map[string]string{"a": "b"}}, w.meta())
	admit(txn, err)
	nodeTxns = append(nodeTxns, txns...)
	w.do(nodeTxns[0])
	for _, txn := range nodeTxns {
		if r := w.try(txn); r.Response.GetSucceeded() {
			t.Errorf("carried out on an older version: %v", txn)
		}
	}
}

func TestIdempotencyKey(t *testing.T) {
	w := newWorld(t)
	first := &pb.ApplyWorkloadRequest{Spec: decodeOne(t, web), IdempotencyKey: "k", CreateOnly: true}
	txn, _, _, err := ApplyWorkload(w.view(), first, w.meta())
	if err != nil {
		t.Fatal(err)
	}
	if r := w.try(Recall(txn.RequestId)); r.Error != pb.TxnError_TXN_ERROR_FUTURE_REVISION {
		t.Fatalf("recalled before it was carried out: %v", r)
	}
	// A conflict is a refusal, and is not remembered.
	conflicting := proto.CloneOf(txn)
	conflicting.Compare = append(conflicting.Compare, Exists("nothing"))
	if r := w.try(conflicting); r.Error != pb.TxnError_TXN_ERROR_FUTURE_REVISION {
		t.Fatalf("conflict: %v", r)
	}
	w.do(txn)
	w.apply("{id: web, container: {image: changed}}")
	for name, again := range map[string]*pb.Txn{"the same": txn, "recall": Recall(txn.RequestId)} {
		outcome, wl, err := Applied(first, w.do(again))
		if err != nil || outcome != pb.ApplyWorkloadResponse_CREATED || wl.Spec.GetContainer().Image != "nginx:1" || wl.ResourceVersion != 2 {
			t.Errorf("%s: %v %v %v", name, outcome, wl, err)
		}
	}
	var now pb.Workload
	if _, _, err := Load(w.view(), WorkloadKey("web"), &now); err != nil || now.Spec.GetContainer().Image != "changed" {
		t.Errorf("carried out again: %v %v", &now, err)
	}
	other := &pb.ApplyWorkloadRequest{Spec: decodeOne(t, "{id: web, container: {image: other}}"), IdempotencyKey: "k"}
	_, _, err = Applied(other, w.do(Recall(txn.RequestId)))
	wantCode(t, err, codes.InvalidArgument, "idempotency_key: was used before, for another request")
	if string(RequestID("a", "b", "c")) == string(RequestID("a", "bc", "")) || len(txn.RequestId) != fsm.MaxRequestID {
		t.Error("request ids")
	}
}

func TestRevisionHistory(t *testing.T) {
	w := newWorld(t)
	first := w.apply("{id: web, container: {image: 'nginx:0'}}")
	w.put(AssignmentKey("web", 0), &pb.Assignment{WorkloadId: "web", Revision: first.Revision})
	var last *pb.Workload
	for i := 1; i <= 15; i++ {
		last = w.apply(fmt.Sprintf("{id: web, container: {image: 'nginx:%d'}}", i))
	}
	count := 0
	for kv := range w.view().Scan(RevisionKey("web", "")) {
		count++
		if kv.Version != 1 {
			t.Errorf("%s written %d times", kv.Key, kv.Version)
		}
	}
	if _, used := w.view().Get(RevisionKey("web", first.Revision)); !used || count != keptRevisions+1 {
		t.Errorf("%d revisions are kept, the one that runs: %v", count, used)
	}
	if _, ok := w.view().Get(RevisionKey("web", last.Revision)); !ok {
		t.Error("the present revision is gone")
	}
}

func TestLifecycle(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	w.apply("{id: all, kind: global, process: {command: a}}")
	id := &pb.WorkloadRequest{Id: "web"}
	step := func(name string, txn *pb.Txn, wl *pb.Workload, err error) *pb.Workload {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if txn != nil {
			w.do(txn)
		}
		return wl
	}
	nothing := func(name string, txn *pb.Txn, wl *pb.Workload, err error) {
		t.Helper()
		if err != nil || txn != nil || wl == nil {
			t.Errorf("%s: %v %v %v", name, txn, wl, err)
		}
	}
	txn, wl, err := StopWorkload(w.view(), id, w.meta())
	if got := step("stop", txn, wl, err); got.Spec.DesiredState != pb.DesiredState_DESIRED_STOPPED {
		t.Errorf("stop: %v", got)
	}
	txn, wl, err = StopWorkload(w.view(), id, w.meta())
	nothing("stop twice", txn, wl, err)
	_, _, err = RestartWorkload(w.view(), id, w.meta())
	wantCode(t, err, codes.FailedPrecondition, `workload "web" is stopped; start it instead`)
	txn, wl, err = StartWorkload(w.view(), id, w.meta())
	step("start", txn, wl, err)
	txn, wl, err = RestartWorkload(w.view(), id, w.meta())
	if got := step("restart", txn, wl, err); got.RestartGeneration != 1 {
		t.Errorf("restart: %v", got)
	}
	txn, wl, err = ScaleWorkload(w.view(), &pb.ScaleWorkloadRequest{Id: "web", Replicas: proto.Int32(0)}, w.meta())
	if got := step("scale", txn, wl, err); got.Spec.GetReplicas() != 0 {
		t.Errorf("scale: %v", got)
	}
	txn, wl, err = ScaleWorkload(w.view(), &pb.ScaleWorkloadRequest{Id: "web", Replicas: proto.Int32(0)}, w.meta())
	nothing("scale twice", txn, wl, err)
	txn, wl, err = RetryWorkload(w.view(), id, w.meta())
	nothing("retry of nothing", txn, wl, err)
	w.put(RetryKey("web", 1), &pb.Retry{WorkloadId: "web", Replica: 1, Attempts: 5, Exhausted: true})
	txn, wl, err = RetryWorkload(w.view(), id, w.meta())
	step("retry", txn, wl, err)
	retry := &pb.Retry{}
	if _, ok, err := Load(w.view(), RetryKey("web", 1), retry); !ok || err != nil || retry.Exhausted || retry.Attempts != 0 || retry.NextRetryAt == nil {
		t.Errorf("retry: %v, %v, %v", retry, ok, err)
	}

	for _, tt := range []struct {
		req  *pb.ScaleWorkloadRequest
		code codes.Code
		text string
	}{
		{&pb.ScaleWorkloadRequest{Id: "web", Replicas: proto.Int32(-1)}, codes.InvalidArgument, "replicas: -1 is out of range; allowed: 0 to 10000"},
		{&pb.ScaleWorkloadRequest{Id: "web", Replicas: proto.Int32(10001)}, codes.InvalidArgument, "replicas: 10001 is out of range"},
		{&pb.ScaleWorkloadRequest{Id: "all", Replicas: proto.Int32(3)}, codes.FailedPrecondition, `workload "all" is global`},
		{&pb.ScaleWorkloadRequest{Id: "none", Replicas: proto.Int32(3)}, codes.NotFound, `there is no workload "none"`},
		{&pb.ScaleWorkloadRequest{Id: "web/status", Replicas: proto.Int32(3)}, codes.InvalidArgument, `id: "web/status" is not allowed`},
	} {
		_, _, err := ScaleWorkload(w.view(), tt.req, w.meta())
		wantCode(t, err, tt.code, tt.text)
	}

	_, _, err = DeleteWorkload(w.view(), &pb.DeleteWorkloadRequest{Id: "web", IfVersion: 1}, w.meta())
	wantCode(t, err, codes.Aborted, `workload "web" is at version`)
	_, _, err = DeleteWorkload(w.view(), &pb.DeleteWorkloadRequest{Id: "none"}, w.meta())
	wantCode(t, err, codes.NotFound, `there is no workload "none"`)
	txn, wl, err = DeleteWorkload(w.view(), &pb.DeleteWorkloadRequest{Id: "web"}, w.meta())
	step("delete", txn, wl, err)
	txn, wl, err = DeleteWorkload(w.view(), &pb.DeleteWorkloadRequest{Id: "web", IfVersion: 1}, w.meta())
	nothing("delete twice", txn, wl, err)
	for name, call := range map[string]func(Reader, *pb.WorkloadRequest, Meta) (*pb.Txn, *pb.Workload, error){
		"start": StartWorkload, "stop": StopWorkload, "restart": RestartWorkload, "retry": RetryWorkload,
	} {
		if _, _, err := call(w.view(), id, w.meta()); err == nil || !strings.Contains(err.Error(), "is being deleted") {
			t.Errorf("%s while deleting: %v", name, err)
		}
	}
}

func TestNodes(t *testing.T) {
	w := newWorld(t)
	w.put(NodeKey("n1"), &pb.Node{Id: "n1", State: pb.NodeState_READY, Labels: map[string]string{"zone": "eu"}, Taints: []*pb.Taint{{Key: "own"}}})
	w.put(NodeLeaseKey("n1"), &pb.NodeLease{LeaseId: 1})
	id := &pb.NodeRequest{Id: "n1"}
	do := func(txn *pb.Txn, n *pb.Node, err error) *pb.Node {
		t.Helper()
		if err != nil || txn == nil {
			t.Fatalf("%v %v", txn, err)
		}
		w.do(txn)
		return n
	}
	nothing := func(txn *pb.Txn, _ *pb.Node, err error) {
		t.Helper()
		if err != nil || txn != nil {
			t.Errorf("%v %v", txn, err)
		}
	}
	if n := do(DrainNode(w.view(), &pb.DrainNodeRequest{Id: "n1"}, w.meta())); n.State != pb.NodeState_DRAINING || !n.Unschedulable || !n.Draining {
		t.Errorf("drain: %v", n)
	}
	nothing(DrainNode(w.view(), &pb.DrainNodeRequest{Id: "n1"}, w.meta()))
	nothing(CordonNode(w.view(), id, w.meta()))
	within := func(d time.Duration) *pb.DrainNodeRequest {
		return &pb.DrainNodeRequest{Id: "n1", Deadline: durationpb.New(d)}
	}
	if n := do(DrainNode(w.view(), within(time.Minute), w.meta())); !n.DrainDeadline.AsTime().After(epochStart.Add(time.Minute)) {
		t.Errorf("drain by a deadline: %v", n)
	}
	if n := do(DrainNode(w.view(), &pb.DrainNodeRequest{Id: "n1"}, w.meta())); n.DrainDeadline != nil {
		t.Errorf("drain without a deadline: %v", n)
	}
	do(DrainNode(w.view(), within(0), w.meta()))
	for _, d := range []time.Duration{-time.Second, 366 * 24 * time.Hour} {
		_, _, err := DrainNode(w.view(), within(d), w.meta())
		wantCode(t, err, codes.InvalidArgument, "deadline: is not allowed; allowed: 0s")
	}
	if n := do(UncordonNode(w.view(), id, w.meta())); n.State != pb.NodeState_READY || n.Unschedulable || n.Draining || n.DrainDeadline != nil {
		t.Errorf("uncordon: %v", n)
	}
	nothing(UncordonNode(w.view(), id, w.meta()))
	do(LabelNode(w.view(), &pb.LabelNodeRequest{Id: "n1", Set: map[string]string{"zone": "us", "disk": "ssd"}}, w.meta()))
	nothing(LabelNode(w.view(), &pb.LabelNodeRequest{Id: "n1", Set: map[string]string{"disk": "ssd"}, Remove: []string{"unknown"}}, w.meta()))
	if n := do(LabelNode(w.view(), &pb.LabelNodeRequest{Id: "n1", Remove: []string{"zone"}}, w.meta())); n.UserLabels["disk"] != "ssd" || len(n.UserLabels) != 1 {
		t.Errorf("labels: %v", n)
	}
	for _, tt := range []struct {
		req  *pb.LabelNodeRequest
		code codes.Code
		text string
	}{
		{&pb.LabelNodeRequest{Id: "n1"}, codes.InvalidArgument, "set: missing"},
		{&pb.LabelNodeRequest{Id: "n1", Remove: []string{"zone"}}, codes.FailedPrecondition, `label "zone" of node "n1" is in its agent's configuration`},
		{&pb.LabelNodeRequest{Id: "n1", Set: map[string]string{"a b": "c"}}, codes.InvalidArgument, `set: name "a b" is not allowed`},
		{&pb.LabelNodeRequest{Id: "n1", Set: map[string]string{"a": "c"}, Remove: []string{"a"}}, codes.InvalidArgument, `remove[0]: "a" is to be set too`},
		{&pb.LabelNodeRequest{Id: "n2", Remove: []string{"a"}}, codes.NotFound, `there is no node "n2"`},
	} {
		_, _, err := LabelNode(w.view(), tt.req, w.meta())
		wantCode(t, err, tt.code, tt.text)
	}
	taint := func(text string) *pb.Taint {
		parsed, err := ParseTaint(text)
		if err != nil {
			t.Fatal(err)
		}
		return parsed
	}
	do(TaintNode(w.view(), &pb.TaintNodeRequest{Id: "n1", Set: []*pb.Taint{taint("gpu=yes:NoSchedule"), taint("old:no_execute")}}, w.meta()))
	nothing(TaintNode(w.view(), &pb.TaintNodeRequest{Id: "n1", Set: []*pb.Taint{taint("old:NoExecute")}, Remove: []string{"unknown"}}, w.meta()))
	n := do(TaintNode(w.view(), &pb.TaintNodeRequest{Id: "n1", Set: []*pb.Taint{taint("gpu=no:NoSchedule"), taint("gpu:PreferNoSchedule")}, Remove: []string{"old"}}, w.meta()))
	if got := fmt.Sprint(FormatTaint(n.UserTaints[0]), " ", FormatTaint(n.UserTaints[1]), " ", len(n.UserTaints)); got != "gpu=no:NoSchedule gpu:PreferNoSchedule 2" {
		t.Errorf("taints: %s", got)
	}
	for _, tt := range []struct {
		req  *pb.TaintNodeRequest
		code codes.Code
		text string
	}{
		{&pb.TaintNodeRequest{Id: "n1"}, codes.InvalidArgument, "set: missing"},
		{&pb.TaintNodeRequest{Id: "n1", Remove: []string{"own"}}, codes.FailedPrecondition, `taint "own" of node "n1" is in its agent's configuration`},
		{&pb.TaintNodeRequest{Id: "n1", Set: []*pb.Taint{{Key: "a b"}}}, codes.InvalidArgument, `set[0].key: "a b" is not allowed`},
		{&pb.TaintNodeRequest{Id: "n1", Set: []*pb.Taint{{Key: "a", Value: "b c"}}}, codes.InvalidArgument, `set[0].value: value "b c" is not allowed`},
		{&pb.TaintNodeRequest{Id: "n1", Set: []*pb.Taint{{Key: "a", Effect: 9}}}, codes.InvalidArgument, "set[0].effect: value 9 is unknown to this version; allowed: no_schedule, prefer_no_schedule, no_execute"},
		{&pb.TaintNodeRequest{Id: "n1", Set: []*pb.Taint{taint("a:NoSchedule"), taint("a=b:NoSchedule")}}, codes.InvalidArgument, `set[1]: "a=b:NoSchedule" is listed twice`},
		{&pb.TaintNodeRequest{Id: "n1", Set: []*pb.Taint{taint("a:NoSchedule")}, Remove: []string{"a"}}, codes.InvalidArgument, `remove[0]: "a" is to be set too`},
		{&pb.TaintNodeRequest{Id: "n2", Remove: []string{"a"}}, codes.NotFound, `there is no node "n2"`},
	} {
		_, _, err := TaintNode(w.view(), tt.req, w.meta())
		wantCode(t, err, tt.code, tt.text)
	}
	_, _, err := RemoveNode(w.view(), id, w.meta())
	wantCode(t, err, codes.FailedPrecondition, `node "n1" is running; drain it`)
	w.do(&pb.Txn{Success: []*pb.RequestOp{Delete(NodeLeaseKey("n1")), Put(NodeKey("n1"), &pb.Node{Id: "n1", State: pb.NodeState_NOT_READY}, 0)}})
	do(RemoveNode(w.view(), id, w.meta()))
	_, _, err = RemoveNode(w.view(), id, w.meta())
	wantCode(t, err, codes.NotFound, `there is no node "n1"`)
}

func TestTokens(t *testing.T) {
	w := newWorld(t)
	hash := []byte("hash of the secret")
	txn, shown, err := CreateToken(&pb.CreateTokenRequest{Role: pb.Role_ROLE_AGENT, Node: "n1", Labels: map[string]string{"zone": "eu"}, Uses: 2}, "t1", hash, w.meta())
	if err != nil {
		t.Fatal(err)
	}
	w.do(txn)
	if shown.SecretHash != nil || shown.UsesLeft != 2 || shown.ExpireTime.AsTime().Sub(shown.CreateTime.AsTime()) != defaultTokenTTL {
		t.Errorf("shown: %v", shown)
	}
	redeem := func(change func(*Redemption)) error {
		r := Redemption{TokenID: "t1", SecretHash: hash, Name: "n1"}
		if change != nil {
			change(&r)
		}
		if _, err := CheckToken(w.view(), r, w.meta().Now); err != nil {
			return err
		}
		m := w.meta()
		txn, _, err := RedeemToken(w.view(), r, &pb.Certificate{Serial: m.NewID, Identity: "agent/n1"}, m)
		if err == nil {
			if r := w.try(txn); !r.Response.GetSucceeded() {
				return fmt.Errorf("conflict: %v", r)
			}
			if r := w.try(txn); r.Response.GetSucceeded() {
				return errors.New("used twice by one transaction")
			}
			cert := &pb.Certificate{}
			if _, ok, err := Load(w.view(), CertificateKey(m.NewID), cert); !ok || err != nil || cert.TokenId != "t1" {
				return fmt.Errorf("certificate: %v %v", cert, err)
			}
		}
		return err
	}
	for _, tt := range []struct {
		change func(*Redemption)
		code   codes.Code
		text   string
	}{
		{func(r *Redemption) { r.TokenID = "t2" }, codes.Unauthenticated, "is not known to this cluster"},
		{func(r *Redemption) { r.SecretHash = nil }, codes.Unauthenticated, "is not known to this cluster"},
		{func(r *Redemption) { r.SecretHash = []byte("other") }, codes.Unauthenticated, "is not known to this cluster"},
		{func(r *Redemption) { r.Name = "n2" }, codes.PermissionDenied, `the join token is for "n1" only, not for "n2"`},
		{func(r *Redemption) { r.Name = "N2" }, codes.InvalidArgument, `name: "N2" is not allowed`},
		{func(r *Redemption) { r.Role = pb.Role_ROLE_SERVER }, codes.PermissionDenied, "the join token is for role agent, not for server"},
	} {
		wantCode(t, redeem(tt.change), tt.code, tt.text)
	}
	if err := redeem(nil); err != nil {
		t.Errorf("first use: %v", err)
	}
	w.put(NodeLeaseKey("n1"), &pb.NodeLease{})
	wantCode(t, redeem(nil), codes.AlreadyExists, `a node named "n1" is running`)
	w.do(&pb.Txn{Success: []*pb.RequestOp{Delete(NodeLeaseKey("n1"))}})
	if err := redeem(nil); err != nil {
		t.Errorf("second use: %v", err)
	}
	wantCode(t, redeem(nil), codes.PermissionDenied, "the join token is used up; make another")
	w.put(TokenKey("t1"), &pb.Token{Id: "t1", SecretHash: hash, Role: pb.Role_ROLE_AGENT, UsesLeft: 1, ExpireTime: timestamppb.New(epochStart)})
	wantCode(t, redeem(nil), codes.PermissionDenied, "the join token expired at 2026-11-01T12:00:00Z")
	w.put(TokenKey("t1"), &pb.Token{Id: "t1", SecretHash: hash, Role: pb.Role_ROLE_ADMIN, UsesLeft: 1, ExpireTime: timestamppb.New(epochStart.Add(time.Hour))})
	wantCode(t, redeem(nil), codes.PermissionDenied, "for role admin, which cannot join")

	txn, _, err = RevokeToken(w.view(), &pb.TokenRequest{Id: "t1"}, w.meta())
	if err != nil {
		t.Fatal(err)
	}
	w.do(txn)
	_, _, err = RevokeToken(w.view(), &pb.TokenRequest{Id: "t1"}, w.meta())
	wantCode(t, err, codes.NotFound, `there is no token "t1"`)

	_, _, err = CreateToken(&pb.CreateTokenRequest{Role: pb.Role_ROLE_ADMIN, Node: "N", Ttl: durationpb.New(31 * 24 * time.Hour), Uses: -1, Labels: map[string]string{"": ""}}, "t3", hash, w.meta())
	for _, want := range []string{
		"role: admin cannot join; allowed: server, agent", `node: "N" is not allowed`, "ttl: 744h0m0s is out of range; allowed: 1s to 720h",
		"uses: -1 is out of range", `labels: name "" is not allowed`,
	} {
		wantCode(t, err, codes.InvalidArgument, want)
	}
	_, _, err = CreateToken(&pb.CreateTokenRequest{Role: pb.Role_ROLE_SERVER, Labels: map[string]string{"a": "b"}}, "t3", hash, w.meta())
	wantCode(t, err, codes.InvalidArgument, "labels: servers have no labels")
}

func TestRunWorkload(t *testing.T) {
	w := newWorld(t)
	run := func(id string) (*pb.Workload, error) {
		txn, wl, err := RunWorkload(w.view(), &pb.WorkloadRequest{Id: id}, w.meta())
		if err == nil {
			w.do(txn)
		}
		return wl, err
	}
	w.apply(web)
	_, err := run("web")
	wantCode(t, err, codes.FailedPrecondition, `workload "web" has no schedule`)
	_, err = run("nothing")
	wantCode(t, err, codes.NotFound, `there is no workload "nothing"`)

	const job = "{id: sum, kind: job, labels: {app: shop}, process: {command: sum}, schedule: {cron: '@daily'"
	parent := w.apply(job + "}}")
	first, err := run("sum")
	if err != nil {
		t.Fatal(err)
	}
	stored := &pb.Workload{}
	if _, ok, err := Load(w.view(), WorkloadKey(first.Spec.Id), stored); !ok || err != nil || !proto.Equal(stored, first) {
		t.Errorf("stored: %v, %v", stored, err)
	}
	if first.Spec.Id != "sum-29892240-1" || first.Spec.Schedule != nil || first.Spec.Labels["app"] != "shop" || first.Revision != parent.Revision || first.Parent != "sum" || first.Uid == parent.Uid {
		t.Errorf("run: %v", first)
	}
	if _, ok := w.view().Get(RevisionKey(first.Spec.Id, first.Revision)); !ok {
		t.Error("its revision is not stored")
	}
	// One goes on, though nobody has looked at it yet.
	_, err = run("sum")
	wantCode(t, err, codes.FailedPrecondition, `run "sum-29892240-1" goes on, and the schedule of "sum" forbids another one beside it`)
	w.put(WorkloadStatusKey(first.Spec.Id), &pb.WorkloadStatus{State: pb.State_FAILED, Desired: 2, Failed: 1})
	_, err = run("sum")
	wantCode(t, err, codes.FailedPrecondition, "goes on")
	w.put(WorkloadStatusKey(first.Spec.Id), &pb.WorkloadStatus{State: pb.State_FAILED, Desired: 2, Failed: 1, Completed: 1})
	if second, err := run("sum"); err != nil || second.Spec.Id != "sum-29892240-2" {
		t.Errorf("second: %v, %v", second, err)
	}
	if txn, _, err := RunWorkload(w.view(), &pb.WorkloadRequest{Id: "sum"}, w.meta()); txn != nil || err == nil {
		t.Errorf("%v, %v", txn, err)
	}
	// Where a new one replaces what goes on, that is deleted, once.
	w.apply(job + ", concurrency: replace}}")
	for range 2 {
		if _, err := run("sum"); err != nil {
			t.Fatal(err)
		}
	}
	for id, want := range map[string]pb.DesiredState{
		"sum-29892240-1": pb.DesiredState_DESIRED_RUNNING, "sum-29892240-2": pb.DesiredState_DESIRED_DELETED,
		"sum-29892240-3": pb.DesiredState_DESIRED_DELETED, "sum-29892240-4": pb.DesiredState_DESIRED_RUNNING,
	} {
		stored := &pb.Workload{}
		if _, ok, err := Load(w.view(), WorkloadKey(id), stored); !ok || err != nil || stored.Spec.DesiredState != want {
			t.Errorf("%s: %v, %v; want %v", id, stored.GetSpec().GetDesiredState(), err, want)
		}
	}
	// Where they may be beside each other there are names for a few in each minute.
	w.apply(job + ", concurrency: allow}}")
	for range runsPerMinute - 4 {
		if _, err := run("sum"); err != nil {
			t.Fatal(err)
		}
	}
	_, err = run("sum")
	wantCode(t, err, codes.ResourceExhausted, "9 runs of \"sum\" were started in this minute already")

	// What is admitted of one state of the job is not carried out on another.
	w.calls += 60
	txn, _, err := RunWorkload(w.view(), &pb.WorkloadRequest{Id: "sum"}, w.meta())
	if err != nil {
		t.Fatal(err)
	}
	w.put(WorkloadStatusKey("sum"), &pb.WorkloadStatus{State: pb.State_RUNNING, ActiveRuns: 1})
	if r := w.try(txn); r.Response.Succeeded {
		t.Error("carried out though the plan has started a run meanwhile")
	}
	for _, tt := range []struct {
		call func() error
		want string
	}{
		{func() error {
			_, _, err := RestartWorkload(w.view(), &pb.WorkloadRequest{Id: "sum"}, w.meta())
			return err
		}, "has no replicas; persys job run sum starts a run now"},
		{func() error {
			_, _, _, err := ApplyWorkload(w.view(), &pb.ApplyWorkloadRequest{Spec: decodeOne(t, "{id: sum-29892240-1, kind: job, process: {command: sum}, schedule: {cron: '@daily'}}")}, w.meta())
			return err
		}, `is a run of "sum" and can have no schedule of its own`},
	} {
		wantCode(t, tt.call(), codes.FailedPrecondition, tt.want)
	}
	// A run that is changed stays a run.
	if changed := w.apply("{id: sum-29892240-1, kind: job, process: {command: other}}"); changed.Parent != "sum" || changed.ScheduledTime == nil {
		t.Errorf("changed: %v", changed)
	}
	stop, _, err := StopWorkload(w.view(), &pb.WorkloadRequest{Id: "sum"}, w.meta())
	if err != nil {
		t.Fatal(err)
	}
	w.do(stop)
	_, err = run("sum")
	wantCode(t, err, codes.FailedPrecondition, `workload "sum" is stopped; start it first`)
}
