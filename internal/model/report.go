package model

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Word is what an agent's report says of one replica. It stands for itself:
// words of many reports may be taken in together, in any parts, as long as those
// of one replica are taken in one after the other.
type Word struct {
	Node    string
	Replica *pb.Replica
	// The instance is gone from the node: of Replica only workload, number and
	// generation are set.
	Gone bool
	// Whatever its generation, a record of this keyspace revision or before is
	// about something that is not there.
	UpTo int64
}

// Key is that of the record that the word is about.
func (w *Word) Key() string { return ReplicaKey(w.Replica.WorkloadId, w.Replica.Replica) }

// Words takes a report apart, into one word for each replica. recorded is what
// is stored of the node, for a full report: what of that is not in the report is
// gone, and nobody has heard of its removal.
func Words(node string, report *pb.StatusReport, recorded []*pb.ReplicaKey) ([]Word, error) {
	type id struct {
		workload string
		number   int32
	}
	words := make([]Word, 0, len(report.Replicas)+len(report.Removed))
	at := make(map[id]int, cap(words))
	add := func(w Word) error {
		r := w.Replica
		if !IsDNSLabel(r.WorkloadId) || r.Replica < 0 {
			return fmt.Errorf("status: %q is no replica of a workload", w.Key())
		}
		n := id{r.WorkloadId, r.Replica}
		if i, ok := at[n]; !ok {
			at[n] = len(words)
			words = append(words, w)
		} else if r.Generation > words[i].Replica.Generation {
			words[i] = w
		}
		return nil
	}
	// Removals first: of the same generation they are the last word.
	for _, r := range report.Removed {
		if err := add(Word{Node: node, Replica: r, Gone: true}); err != nil {
			return nil, err
		}
	}
	for _, r := range report.Replicas {
		if err := add(Word{Node: node, Replica: r}); err != nil {
			return nil, err
		}
	}
	if !report.Full {
		return words, nil
	}
	for i := range words {
		words[i].UpTo = report.DesiredRevision
	}
	for _, k := range recorded {
		if _, ok := at[id{k.WorkloadId, k.Replica}]; !ok {
			words = append(words, Word{
				Node: node, Replica: &pb.Replica{WorkloadId: k.WorkloadId, Replica: k.Replica}, Gone: true, UpTo: report.DesiredRevision,
			})
		}
	}
	return words, nil
}

// ReportStatus is what words of different replicas change in /replicas. What an
// agent says of an assignment that is no longer its own, or of an older
// generation, is passed over; what it says is gone is removed only where the
// record is about that very instance. Nil means that nothing changes.
func ReportStatus(v Reader, words []Word, now time.Time) (*pb.Txn, error) {
	r := reporting{view: v, now: now, txn: &pb.Txn{}, of: map[string]int{}}
	for i := range words {
		if err := r.take(&words[i]); err != nil {
			return nil, err
		}
	}
	r.tell()
	if len(r.txn.Success) == 0 {
		return nil, nil
	}
	return r.txn, nil
}

type reporting struct {
	view Reader
	now  time.Time
	txn  *pb.Txn
	// Replicas that run for the first time, by workload.
	starts []starts
	of     map[string]int
}

// starts are told as one event.
type starts struct {
	first *pb.Replica
	count int
	nodes bool // they are on several
}

func (t *reporting) take(w *Word) error {
	r := w.Replica
	key, stored, assignment := w.Key(), &pb.Replica{}, &pb.Assignment{}
	mod, known, err := Load(t.view, key, stored)
	if err != nil || w.Gone && (!known || stored.NodeId != w.Node || stored.Generation > r.Generation && mod > w.UpTo) {
		return err
	}
	if known && !w.Gone && w.repeats(stored) {
		return nil
	}
	assignmentKey := AssignmentKey(r.WorkloadId, r.Replica)
	assignmentMod, assigned, err := Load(t.view, assignmentKey, assignment)
	if err != nil {
		return err
	}
	if w.Gone {
		if !assigned || assignment.NodeId != w.Node || assignment.Generation != stored.Generation {
			t.txn.Compare = append(t.txn.Compare, Unchanged(key, mod))
			t.txn.Success = append(t.txn.Success, Delete(key))
		}
		return nil
	}
	switch {
	case assigned && (assignment.NodeId != w.Node || assignment.Generation != r.Generation):
		return nil
	case !assigned && !(known && stored.NodeId == w.Node && stored.Generation == r.Generation):
		return nil
	}
	// The rest of next is the agent's and is not changed.
	next := proto.CloneOf(r)
	next.NodeId = w.Node
	next.LastTransition = stored.LastTransition
	// One that ended and runs again between two reports has been in another state.
	if !known || stored.State != next.State || stored.Generation != next.Generation || stored.Restarts != next.Restarts {
		next.LastTransition = timestamppb.New(t.now)
	}
	t.txn.Compare = append(t.txn.Compare, Unchanged(key, mod), Unchanged(assignmentKey, assignmentMod))
	t.txn.Success = append(t.txn.Success, Put(key, next, 0))
	if next.State != stored.State && next.State == pb.State_RUNNING {
		t.started(stored, next)
	}
	return nil
}

// repeats reports whether the word says what is stored. Of what an agent says the
// node and the time are the server's.
func (w *Word) repeats(stored *pb.Replica) bool {
	node, at := stored.NodeId, stored.LastTransition
	stored.NodeId, stored.LastTransition = w.Replica.NodeId, w.Replica.LastTransition
	same := node == w.Node && proto.Equal(stored, w.Replica)
	stored.NodeId, stored.LastTransition = node, at
	return same
}

// started tells at once of a replica that runs again: what ended it nothing else
// will remember.
func (t *reporting) started(before, r *pb.Replica) {
	if again := runningAgain(before, r); again != "" {
		t.event(r, fmt.Sprintf("replica %d is running on %s%s", r.Replica, r.NodeId, again))
		return
	}
	i, ok := t.of[r.WorkloadId]
	if !ok {
		i = len(t.starts)
		t.of[r.WorkloadId] = i
		t.starts = append(t.starts, starts{first: r})
	}
	s := &t.starts[i]
	s.count++
	s.nodes = s.nodes || s.first.NodeId != r.NodeId
}

func (t *reporting) event(r *pb.Replica, message string) {
	e := &pb.Event{Type: pb.EventType_WORKLOAD_RUNNING, WorkloadId: r.WorkloadId, Replica: &r.Replica, NodeId: r.NodeId, Message: message}
	t.txn.Success = append(t.txn.Success, PutEvent(e, t.now, fmt.Sprintf("run-%s-%d", r.WorkloadId, r.Replica)))
}

func (t *reporting) tell() {
	for _, s := range t.starts {
		if s.count == 1 {
			t.event(s.first, fmt.Sprintf("replica %d is running on %s", s.first.Replica, s.first.NodeId))
			continue
		}
		e := &pb.Event{Type: pb.EventType_WORKLOAD_RUNNING, WorkloadId: s.first.WorkloadId, Message: fmt.Sprintf("%d replicas are running", s.count)}
		if !s.nodes {
			e.NodeId = s.first.NodeId
			e.Message += " on " + s.first.NodeId
		}
		t.txn.Success = append(t.txn.Success, PutEvent(e, t.now, fmt.Sprintf("run-%s-%d", s.first.WorkloadId, s.first.Replica)))
	}
}

// runningAgain says, where a replica's node has restarted it, how often and what
// ended it; it is empty for a first start.
func runningAgain(before, r *pb.Replica) string {
	if r.Restarts == 0 || before.Generation != r.Generation || before.Restarts == r.Restarts && before.State != pb.State_RETRY_PENDING {
		return ""
	}
	message := fmt.Sprintf(" again, restart %d", r.Restarts)
	if why := before.GetReason().GetMessage(); why != "" {
		message += ", after: " + why
	}
	return message
}

const (
	// maxDrifts is how many of one report are told; an agent sends no more.
	maxDrifts       = 64
	maxDriftMessage = 300
)

// ReportDrifts tells what a node's agent found to be otherwise than wanted, by
// nobody's order. What makes no sense is passed over. Nil: there is nothing to tell.
func ReportDrifts(node string, drifts []*pb.Drift, now time.Time) *pb.Txn {
	txn := &pb.Txn{}
	for i, d := range drifts[:min(len(drifts), maxDrifts)] {
		if _, known := pb.DriftKind_name[int32(d.Kind)]; !known || d.Kind == pb.DriftKind_DRIFT_KIND_UNSPECIFIED || !IsDNSLabel(d.WorkloadId) || d.Replica < 0 {
			continue
		}
		message := strings.ToValidUTF8(d.Message[:min(len(d.Message), maxDriftMessage)], "")
		txn.Success = append(txn.Success, PutEvent(&pb.Event{
			Type: pb.EventType_DRIFT_DETECTED, Drift: d.Kind, WorkloadId: d.WorkloadId, Replica: &d.Replica, NodeId: node,
			Message: fmt.Sprintf("replica %d on %s %s", d.Replica, node, message),
		}, now, fmt.Sprintf("drift-%s-%d", node, i)))
	}
	if len(txn.Success) == 0 {
		return nil
	}
	return txn
}
