// Package scheduler decides where work runs. Decide is a pure function: from a
// picture of the keyspace and a time it makes a plan, a list of transactions
// that leave nothing to decide. The package owns the picture, which is kept up
// to date by the keyspace's events, the filters, the scores, and what is done
// about updates, failures, lost and drained nodes.
//
// It never reads a clock, draws a random number, starts a goroutine or does
// I/O, and it never changes anything but its picture: proposing a plan is the
// leader's business. Equal pictures give equal plans, whatever way they came
// about; where the order of things matters it comes from ids, numbers and
// hashes of ids, never from the order of a map.
package scheduler

import (
	"cmp"
	"container/heap"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Picture is the part of the keyspace that placement depends on, compact and
// indexed. It is for one goroutine.
type Picture struct {
	// Moved, if it is set, is told of each assignment that comes to a node, with
	// gone 0, or leaves it, with the generation that is gone. One that changes on
	// its node leaves it and comes.
	Moved func(node, workload string, replica int32, gone int64)

	revision  int64
	nodes     map[string]*node
	workloads map[string]*workload
	classes   map[string]*class
	filters   map[string]*filter
	shapes    map[string]*shape
	layouts   map[string]*layout
	terms     map[string]*term
	// Terms by what workloads find them by, and workloads by label.
	selectors map[string][]*term
	labelled  map[string][]*workload
	groups    map[string]*slotsBy
	// Terms that the waiting have to be told of.
	changedTerms []*term
	// Classes with a taint that makes their nodes a last resort.
	unloved int
	// Strings that many assignments have in common.
	strings map[string]string
	index   index
	// With defaults filled in; never nil.
	config *pb.SchedulerConfig

	// Workloads that have to be looked at.
	dirty workloadSet
	// Workloads that would do something if a node had more room.
	waiting workloadSet
	globals workloadSet
	// Workloads of which a rollout goes on.
	rolling workloadSet
	// Something has changed since the load of nodes was last looked at; when it was
	// found to be even, or not to be changed; when it is to be looked at again though
	// nothing changes.
	uneven                 bool
	evenSince, rebalanceAt int64
	// Steps that are assumed and neither committed nor refused.
	assumed int
	timers  timers
	// The runs of jobs with a schedule, by the id of the job.
	runs map[string][]*workload
	// Nodes that gained room since the waiting were asked.
	freed []*node
	// Steps that are committed at a revision that the picture has not reached.
	confirmed []confirmation

	// Workloads of which replicas are to be dropped before anybody looks.
	thinning []*workload

	// Lent to one decision after another.
	touched []saved

	// How many workloads that may make room there are of each priority, and the lowest
	// of those that have come to have replicas since the waiting were asked.
	priorities [model.MaxPriority + 1]int32
	newest     int32

	// Counts changes by which something may fit that did not.
	growth uint64
	// Counts changes of nodes' labels and runtimes.
	attributes uint64
	// The last number given to a computation that marks nodes or classes.
	stamp uint64
}

// NewPicture is the picture of an empty keyspace.
func NewPicture() *Picture {
	return &Picture{
		nodes: map[string]*node{}, workloads: map[string]*workload{}, classes: map[string]*class{},
		filters: map[string]*filter{}, shapes: map[string]*shape{}, layouts: map[string]*layout{},
		terms: map[string]*term{}, selectors: map[string][]*term{}, labelled: map[string][]*workload{}, groups: map[string]*slotsBy{},
		strings: map[string]string{}, runs: map[string][]*workload{},
		dirty: workloadSet{kind: setDirty}, waiting: workloadSet{kind: setWaiting}, globals: workloadSet{kind: setGlobals}, rolling: workloadSet{kind: setRolling},
		index: index{stale: true}, config: model.EffectiveSchedulerConfig(nil), uneven: true, newest: noPriority,
	}
}

// Build makes a picture from the newest versions of all keys at a revision, in
// any order; keys that do not concern it are passed over.
func Build(kvs iter.Seq[*pb.KeyValue], revision int64) (*Picture, error) {
	p := NewPicture()
	for kv := range kvs {
		if err := p.put(kv); err != nil {
			return nil, err
		}
	}
	p.revision = revision
	return p, nil
}

// Revision is the keyspace revision that the picture shows.
func (p *Picture) Revision() int64 { return p.revision }

// Apply takes in the events of whole revisions, in order, up to and including
// revision. After an error the picture is to be built anew.
func (p *Picture) Apply(events []*pb.KeyEvent, revision int64) error {
	if revision < p.revision {
		return fmt.Errorf("scheduler: events up to revision %d after %d", revision, p.revision)
	}
	for _, e := range events {
		if e.Kv.ModRevision <= p.revision {
			continue
		}
		if e.Type == pb.KeyEvent_DELETE {
			p.remove(string(e.Kv.Key))
		} else if err := p.put(e.Kv); err != nil {
			return err
		}
	}
	p.revision = revision
	p.settle()
	return nil
}

func (p *Picture) put(kv *pb.KeyValue) error {
	key := string(kv.Key)
	switch {
	case strings.HasPrefix(key, model.AssignmentsPrefix):
		rec := &pb.Assignment{}
		return p.replicaRecord(key, model.AssignmentsPrefix, kv, rec, func(id string, number int32) {
			p.putAssignment(id, number, kv.ModRevision, rec)
		})
	case strings.HasPrefix(key, model.ReplicasPrefix):
		rec := &pb.Replica{}
		return p.replicaRecord(key, model.ReplicasPrefix, kv, rec, func(id string, number int32) {
			p.putObserved(id, number, kv.ModRevision, rec)
		})
	case strings.HasPrefix(key, model.RetriesPrefix):
		rec := &pb.Retry{}
		return p.replicaRecord(key, model.RetriesPrefix, kv, rec, func(id string, number int32) {
			p.putRetry(id, number, kv.ModRevision, rec)
		})
	case strings.HasPrefix(key, model.WorkloadsPrefix):
		return p.putWorkloadKey(key, kv)
	case strings.HasPrefix(key, model.NodesPrefix):
		return p.putNodeKey(key, kv)
	case strings.HasPrefix(key, model.RevisionsPrefix):
		if id, name, ok := model.SplitRevisionKey(key); ok {
			p.putRevision(id, name, kv.ModRevision, kv.Value)
		}
	case key == model.SchedulerKey:
		rec := &pb.SchedulerConfig{}
		if err := model.Parse(kv, rec); err != nil {
			return fmt.Errorf("scheduler: %w", err)
		}
		p.putConfig(rec)
	}
	return nil
}

// putConfig takes in the scheduler's configuration; nil: there is none.
func (p *Picture) putConfig(rec *pb.SchedulerConfig) {
	p.config = model.EffectiveSchedulerConfig(rec)
	p.uneven = true
	for _, w := range p.waiting.list {
		p.touch(w)
	}
}

func (p *Picture) replicaRecord(key, prefix string, kv *pb.KeyValue, rec proto.Message, take func(id string, number int32)) error {
	id, number, ok := model.SplitReplicaKey(prefix, key)
	if !ok {
		return nil
	}
	if err := model.Parse(kv, rec); err != nil {
		return fmt.Errorf("scheduler: %w", err)
	}
	take(id, number)
	return nil
}

func (p *Picture) putWorkloadKey(key string, kv *pb.KeyValue) error {
	id, sub, ok := model.SplitKey(model.WorkloadsPrefix, key)
	switch {
	case !ok:
	case sub == "":
		rec := &pb.Workload{}
		if err := model.Parse(kv, rec); err != nil {
			return fmt.Errorf("scheduler: %w", err)
		}
		p.putWorkload(id, kv.CreateRevision, kv.ModRevision, rec, kv.Value)
	case sub == "status":
		rec := &pb.WorkloadStatus{}
		if err := model.Parse(kv, rec); err != nil {
			return fmt.Errorf("scheduler: %w", err)
		}
		p.putStatus(id, kv.ModRevision, rec)
	case sub == "rollout":
		rec := &pb.Rollout{}
		if err := model.Parse(kv, rec); err != nil {
			return fmt.Errorf("scheduler: %w", err)
		}
		p.putRollout(id, kv.ModRevision, rec)
	}
	return nil
}

func (p *Picture) putNodeKey(key string, kv *pb.KeyValue) error {
	id, sub, ok := model.SplitKey(model.NodesPrefix, key)
	switch {
	case !ok:
	case sub == "":
		rec := &pb.Node{}
		if err := model.Parse(kv, rec); err != nil {
			return fmt.Errorf("scheduler: %w", err)
		}
		p.putNode(id, kv.ModRevision, rec)
	case sub == "lease":
		p.putLease(id, kv.ModRevision)
	}
	return nil
}

func (p *Picture) remove(key string) {
	if id, number, ok := model.SplitReplicaKey(model.AssignmentsPrefix, key); ok {
		p.putAssignment(id, number, 0, nil)
	} else if id, number, ok := model.SplitReplicaKey(model.ReplicasPrefix, key); ok {
		p.putObserved(id, number, 0, nil)
	} else if id, number, ok := model.SplitReplicaKey(model.RetriesPrefix, key); ok {
		p.putRetry(id, number, 0, nil)
	} else if id, sub, ok := model.SplitKey(model.WorkloadsPrefix, key); ok {
		switch sub {
		case "":
			p.putWorkload(id, 0, 0, nil, nil)
		case "status":
			p.putStatus(id, 0, nil)
		case "rollout":
			p.putRollout(id, 0, nil)
		}
	} else if id, sub, ok := model.SplitKey(model.NodesPrefix, key); ok {
		switch sub {
		case "":
			p.putNode(id, 0, nil)
		case "lease":
			p.putLease(id, 0)
		}
	} else if id, name, ok := model.SplitRevisionKey(key); ok {
		p.putRevision(id, name, 0, nil)
	} else if key == model.SchedulerKey {
		p.putConfig(nil)
	}
}

// touch marks a workload to be looked at.
func (p *Picture) touch(w *workload) {
	p.dirty.add(w)
	p.uneven = true
}

// intern makes equal strings one. What is kept is small: revisions, uids and
// explanations in use, and it begins anew before it is not.
func (p *Picture) intern(s string) string {
	const most = 1 << 16
	if known, ok := p.strings[s]; ok {
		return known
	}
	if len(p.strings) >= most {
		clear(p.strings)
	}
	p.strings[s] = s
	return s
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// The sets that a workload may be in.
const (
	setDirty = iota
	setWaiting
	setGlobals
	setRolling
	sets
)

// workloadSet is a set without an order that could matter: whoever needs one
// sorts.
type workloadSet struct {
	kind int
	list []*workload
}

func (s *workloadSet) has(w *workload) bool { return w.places[s.kind] != 0 }

func (s *workloadSet) add(w *workload) {
	if s.has(w) {
		return
	}
	s.list = append(s.list, w)
	w.places[s.kind] = int32(len(s.list))
}

func (s *workloadSet) remove(w *workload) {
	at := w.places[s.kind]
	if at == 0 {
		return
	}
	last := s.list[len(s.list)-1]
	s.list[at-1], last.places[s.kind] = last, at
	s.list[len(s.list)-1] = nil
	s.list = s.list[:len(s.list)-1]
	w.places[s.kind] = 0
}

// queue is a heap of the set's members in the order in which they are served:
// by priority, then who came first. A heap, since one plan may serve few of many.
func (s *workloadSet) queue() workloadQueue {
	q := slices.Clone(workloadQueue(s.list))
	heap.Init(&q)
	return q
}

type workloadQueue []*workload

func (q workloadQueue) Len() int      { return len(q) }
func (q workloadQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *workloadQueue) Push(x any)   { *q = append(*q, x.(*workload)) }
func (q workloadQueue) Less(i, j int) bool {
	a, b := q[i], q[j]
	return cmp.Or(cmp.Compare(b.rank(), a.rank()), cmp.Compare(a.created, b.created), cmp.Compare(a.id, b.id)) < 0
}

func (q *workloadQueue) Pop() any {
	last := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return last
}

// rank is the priority, or less than any for what changes other workloads, its
// runs: it comes when these have been decided about.
func (w *workload) rank() int32 {
	switch {
	case w.want == nil:
		return 0
	case w.want.schedule != nil || w.job() && w.deleted():
		return -1
	}
	return w.want.priority
}

// timers is a heap of the times at which workloads want to be looked at again.
// An entry that is not its workload's present time is void.
type timers []timer

type timer struct {
	at int64
	w  *workload
}

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].at < t[j].at }
func (t timers) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *timers) Push(x any)        { *t = append(*t, x.(timer)) }
func (t *timers) Pop() any {
	last := (*t)[len(*t)-1]
	*t = (*t)[:len(*t)-1]
	return last
}
