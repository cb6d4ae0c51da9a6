package model

import (
	"fmt"
	"slices"
	"testing"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Many that start are one event for each workload; one that was restarted is
// told of by itself, with what ended it.
func TestReportStatusTellsOnce(t *testing.T) {
	k := newWorld(t)
	var words []Word
	report := func(workload string, number int32, node string, restarts int32) {
		k.put(AssignmentKey(workload, number), &pb.Assignment{WorkloadId: workload, Replica: number, NodeId: node, Generation: 2})
		words = append(words, Word{Node: node, Replica: &pb.Replica{
			WorkloadId: workload, Replica: number, Generation: 2, State: pb.State_RUNNING, Restarts: restarts,
		}})
	}
	for n := range int32(3) {
		report("many", n, "a1", 0)
		report("spread", n, fmt.Sprintf("a%d", n), 0)
	}
	report("one", 0, "a1", 0)
	k.put(ReplicaKey("again", 7), &pb.Replica{
		WorkloadId: "again", Replica: 7, NodeId: "a1", Generation: 2, State: pb.State_RETRY_PENDING, Reason: &pb.Reason{Message: "exited with code 3"},
	})
	report("again", 7, "a1", 1)

	txn, err := ReportStatus(k.store.View(), words, at)
	if err != nil {
		t.Fatal(err)
	}
	k.do(txn)
	var told []string
	for kv := range k.store.View().Scan(EventsPrefix) {
		e := &pb.Event{}
		if err := Parse(kv, e); err != nil {
			t.Fatal(err)
		}
		told = append(told, e.WorkloadId+": "+e.Message)
	}
	slices.Sort(told)
	want := []string{
		"again: replica 7 is running on a1 again, restart 1, after: exited with code 3",
		"many: 3 replicas are running on a1",
		"one: replica 0 is running on a1",
		"spread: 3 replicas are running",
	}
	if !slices.Equal(told, want) {
		t.Errorf("%q", told)
	}
}

func TestWords(t *testing.T) {
	replica := func(workload string, number int32, generation int64) *pb.Replica {
		return &pb.Replica{WorkloadId: workload, Replica: number, Generation: generation}
	}
	recorded := []*pb.ReplicaKey{{WorkloadId: "web"}, {WorkloadId: "web", Replica: 9}}
	words, err := Words("a1", &pb.StatusReport{
		Full: true, DesiredRevision: 7,
		Replicas: []*pb.Replica{replica("web", 0, 2), replica("web", 1, 2), replica("web", 2, 3)},
		Removed:  []*pb.Replica{replica("web", 1, 2), replica("web", 2, 2), replica("web", 3, 1), replica("web", 3, 4)},
	}, recorded)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, w := range words {
		got = append(got, fmt.Sprintf("%s %d gone=%t upTo=%d", w.Key(), w.Replica.Generation, w.Gone, w.UpTo))
	}
	slices.Sort(got)
	want := []string{
		"/replicas/web/000000 2 gone=false upTo=7",
		"/replicas/web/000001 2 gone=true upTo=7",
		"/replicas/web/000002 3 gone=false upTo=7",
		"/replicas/web/000003 4 gone=true upTo=7",
		"/replicas/web/000009 0 gone=true upTo=7",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	for _, bad := range []*pb.Replica{replica("", 0, 1), replica("a/b", 0, 1), replica("web", -1, 1)} {
		if words, err := Words("a1", &pb.StatusReport{Replicas: []*pb.Replica{bad}}, nil); err == nil {
			t.Errorf("%v: taken as %v", bad, words)
		}
	}
}

func TestReportDrifts(t *testing.T) {
	k := newWorld(t)
	drifts := []*pb.Drift{
		{WorkloadId: "web", Replica: 1, Kind: pb.DriftKind_MISSING_ON_AGENT, Message: "is not there any more"},
		{WorkloadId: "web", Replica: 1, Message: "no kind"},
		{WorkloadId: "web", Replica: 1, Kind: 99, Message: "no such kind"},
		{WorkloadId: "No Name", Kind: pb.DriftKind_ORPHAN_ON_AGENT},
		{WorkloadId: "web", Replica: -1, Kind: pb.DriftKind_ORPHAN_ON_AGENT},
	}
	k.do(ReportDrifts("a1", drifts, at))
	var told []*pb.Event
	for kv := range k.store.View().Scan(EventsPrefix) {
		e := &pb.Event{}
		if err := Parse(kv, e); err != nil {
			t.Fatal(err)
		}
		told = append(told, e)
	}
	if len(told) != 1 || told[0].Type != pb.EventType_DRIFT_DETECTED || told[0].Drift != pb.DriftKind_MISSING_ON_AGENT ||
		told[0].NodeId != "a1" || told[0].GetReplica() != 1 || told[0].Message != "replica 1 on a1 is not there any more" {
		t.Errorf("%v", told)
	}
	if txn := ReportDrifts("a1", drifts[1:], at); txn != nil {
		t.Errorf("%v", txn)
	}
	storm := slices.Repeat(drifts[:1], 1000)
	if txn := ReportDrifts("a1", storm, at); len(txn.Success) != maxDrifts {
		t.Errorf("%d events", len(txn.Success))
	}
}
