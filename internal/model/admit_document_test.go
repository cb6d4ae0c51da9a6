package model

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func documentOf(t testing.TB, m proto.Message) string {
	t.Helper()
	data, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestPutWorkload(t *testing.T) {
	w := newWorld(t)
	put := func(document string) (*pb.Txn, *pb.Workload, error) {
		t.Helper()
		txn, wl, err := PutWorkload(w.view(), "web", []byte(document), w.meta())
		if txn != nil {
			w.do(txn)
		}
		return txn, wl, err
	}
	for _, document := range []string{
		`{"container": {"image": "nginx:1"}, "replicas": 2}`,
		`{"id": "web", "container": {"image": "nginx:1"}, "replicas": 2}`,
		`{"spec": {"container": {"image": "nginx:1"}, "replicas": 2}}`,
		"spec:\n  container: {image: 'nginx:1'}\n  replicas: 2\n",
	} {
		if txn, wl, err := put(document); err != nil || (txn != nil) != (w.calls == 1) || wl.Spec.Id != "web" {
			t.Errorf("%s: %v, %v, %v", document, txn, wl, err)
		}
	}
	stored := &pb.Workload{}
	mod, _, err := Load(w.view(), WorkloadKey("web"), stored)
	if err != nil {
		t.Fatal(err)
	}
	stored.ResourceVersion = mod
	// As it was read, and with another number of replicas.
	if txn, _, err := put(documentOf(t, stored)); err != nil || txn != nil {
		t.Errorf("as it was read: %v, %v", txn, err)
	}
	stored.Spec.Replicas = proto.Int32(3)
	read := documentOf(t, stored)
	if txn, wl, err := put(read); err != nil || txn == nil || wl.Spec.GetReplicas() != 3 || wl.Uid != stored.Uid {
		t.Errorf("changed: %v, %v, %v", txn, wl, err)
	}
	_, _, err = put(read)
	wantCode(t, err, codes.Aborted, `workload "web" is at version 3, not 2`)
	stored.ResourceVersion, stored.Uid = 0, "other"
	_, _, err = put(documentOf(t, stored))
	wantCode(t, err, codes.InvalidArgument, "uid: is written by the system")
	// Of one that is gone only the spec counts.
	w.do(&pb.Txn{Success: []*pb.RequestOp{Delete(WorkloadKey("web"))}})
	if txn, wl, err := put(read); err != nil || txn == nil || wl.Uid == "other" || wl.Spec.GetReplicas() != 3 {
		t.Errorf("brought back: %v, %v", wl, err)
	}
}

// What is shown of a workload can be put back, and changes nothing.
func TestDocumentsOfWorkloadsAreRead(t *testing.T) {
	for _, spec := range []string{
		web,
		"{id: web, kind: job, process: {command: /bin/x, args: [a, ''], env: {A: '1', B: ''}, ports: [{host_port: 80, protocol: udp}], stop_grace_seconds: 0}, restart: {condition: never}}",
		"{id: web, kind: global, exclusive: true, priority: 0, placement: {policy: bin_pack, constraints: [{label: zone, operator: in, values: [a, b]}], node_labels: {a: b}}, container: {image: a, command: [x], volumes: [{host_path: /a, container_path: /b, read_only: true}], pids_limit: 9}}",
	} {
		w := newWorld(t)
		stored := w.apply(spec)
		txn, _, err := PutWorkload(w.view(), "web", []byte(documentOf(t, stored)), w.meta())
		if err != nil || txn != nil {
			t.Errorf("%s: %v, %v", spec, txn, err)
		}
	}
}

func TestPutNodeRefuses(t *testing.T) {
	w := newWorld(t)
	w.put(NodeKey("n1"), &pb.Node{Id: "n1", State: pb.NodeState_DRAINING, Unschedulable: true, Draining: true, Capacity: &pb.NodeCapacity{CpuMillis: 1000}})
	for document, want := range map[string]struct {
		code codes.Code
		text string
	}{
		`{"draining": true}`:                         {codes.InvalidArgument, "unschedulable: a node that is drained takes no new work"},
		`{"capacity": {"cpu_millis": 2000}}`:         {codes.InvalidArgument, "capacity: is written by the system"},
		`{"state": "READY"}`:                         {codes.InvalidArgument, "state: is written by the system"},
		`{"id": "n2"}`:                               {codes.InvalidArgument, `id: "n2" contradicts the key`},
		`{"resource_version": "9"}`:                  {codes.Aborted, `node "n1" is at version 2, not 9`},
		`{"user_taints": [{"key": "-"}]}`:            {codes.InvalidArgument, `user_taints[0].key: "-" is not allowed`},
		`{"user_labels": {"-": "x"}}`:                {codes.InvalidArgument, `user_labels: name "-" is not allowed`},
		`{"usage": {"cpu_percent": 1}}`:              {codes.InvalidArgument, "usage: is written by the system"},
		`{"draining": false, "unschedulable": "no"}`: {codes.InvalidArgument, "unschedulable"},
		`{"drain_deadline": "2026-11-01T12:00:00Z"}`: {codes.InvalidArgument, "drain_deadline: the node is not drained"},
	} {
		txn, _, err := PutNode(w.view(), "n1", []byte(document), w.meta())
		if txn != nil {
			t.Errorf("%s: a transaction", document)
		}
		wantCode(t, err, want.code, want.text)
	}
	_, _, err := PutNode(w.view(), "n2", []byte("{}"), w.meta())
	wantCode(t, err, codes.NotFound, `there is no node "n2"; a machine becomes one when it joins`)
}

// Whatever users have said of a node, a document that says something else leads to
// just that, and to nothing more when it is put again.
func TestPutNode(t *testing.T) {
	draw := func(t *rapid.T, n *pb.Node, name string) {
		n.UserLabels = rapid.MapOfN(rapid.SampledFrom([]string{"a", "b", "c"}), rapid.SampledFrom([]string{"", "x", "y"}), 0, 3).Draw(t, name+" labels")
		n.UserTaints = nil
		for _, key := range []string{"k", "l"} {
			for _, effect := range []pb.TaintEffect{pb.TaintEffect_NO_SCHEDULE, pb.TaintEffect_NO_EXECUTE} {
				if rapid.Bool().Draw(t, name+" tainted") {
					n.UserTaints = append(n.UserTaints, &pb.Taint{Key: key, Value: rapid.SampledFrom([]string{"", "x"}).Draw(t, name+" value"), Effect: effect})
				}
			}
		}
		n.Draining = rapid.Bool().Draw(t, name+" draining")
		n.DrainDeadline = nil
		if n.Draining && rapid.Bool().Draw(t, name+" deadline") {
			n.DrainDeadline = timestamppb.New(at.Add(time.Duration(rapid.IntRange(0, 3).Draw(t, name+" minutes")) * time.Minute))
		}
		n.Unschedulable = n.Draining || rapid.Bool().Draw(t, name+" unschedulable")
	}
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld(t)
		was := &pb.Node{Id: "n1", State: pb.NodeState_READY, Labels: map[string]string{"a": "own"}}
		if draw(rt, was, "before"); was.Draining {
			was.State = pb.NodeState_DRAINING
		}
		w.put(NodeKey("n1"), was)
		want := proto.CloneOf(was)
		draw(rt, want, "after")
		document := documentOf(t, want)
		txn, _, err := PutNode(w.view(), "n1", []byte(document), w.meta())
		if err != nil {
			rt.Fatalf("%s: %v", document, err)
		}
		if txn != nil {
			w.do(txn)
		}
		got := &pb.Node{}
		if _, _, err := Load(w.view(), NodeKey("n1"), got); err != nil {
			rt.Fatal(err)
		}
		if want.State = pb.NodeState_READY; want.Draining {
			want.State = pb.NodeState_DRAINING
		}
		got.LastTransition = nil
		if !proto.Equal(got, want) {
			rt.Fatalf("from %v\nto   %v\ngot  %v", was, want, got)
		}
		want.State = pb.NodeState_NODE_STATE_UNSPECIFIED
		if txn, _, err := PutNode(w.view(), "n1", []byte(documentOf(t, want)), w.meta()); err != nil || txn != nil {
			rt.Fatalf("again: %v, %v", txn, err)
		}
	})
}

// Whatever is put is refused or admitted; what is admitted can be stored, shown and
// put back.
func FuzzPutDocument(f *testing.F) {
	for _, s := range []string{
		web, `{"container": {"image": "nginx:1"}}`, `{"spec": {"process": {"command": "a"}}, "resource_version": "2"}`, `{"user_labels": {"a": "b"}, "unschedulable": true}`,
		"{}", "[]", "null", `{"spec": null}`, `{"id": 7}`, "a: &a {b: *a}", `{"draining": true, "state": "READY", "create_time": "2026-11-01T12:00:00Z"}`, "\xff", "{\"\x00\": 1}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, document []byte) {
		w := newWorld(t)
		w.put(NodeKey("web"), &pb.Node{Id: "web", State: pb.NodeState_READY, Labels: map[string]string{"a": "b"}})
		if txn, _, err := PutNode(w.view(), "web", document, w.meta()); err == nil && txn != nil {
			w.do(txn)
		}
		txn, _, err := PutWorkload(w.view(), "web", document, w.meta())
		if err != nil || txn == nil {
			return
		}
		mod := w.do(txn).Revision
		stored := &pb.Workload{}
		if _, _, err := Load(w.view(), WorkloadKey("web"), stored); err != nil {
			t.Fatal(err)
		}
		stored.ResourceVersion = mod
		shown := documentOf(t, stored)
		if txn, _, err := PutWorkload(w.view(), "web", []byte(shown), w.meta()); err != nil || txn != nil {
			t.Fatalf("%q became %s, which is %v, %v", document, shown, txn, err)
		}
	})
}
