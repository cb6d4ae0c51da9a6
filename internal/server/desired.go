package server

import (
	"context"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// desired knows which assignments each node has, at one keyspace revision, and
// tells the sessions of this replica what changes. It follows the store and
// never writes.
type desired struct {
	progress
	node   map[string]string                     // assignment key → node
	byNode map[string]map[string]*pb.Assignment  // node → assignment key → assignment
	subs   map[string]map[*subscription]struct{} // node → its sessions
}

func newDesired() *desired {
	return &desired{
		progress: newProgress(),
		node:     map[string]string{},
		byNode:   map[string]map[string]*pb.Assignment{},
		subs:     map[string]map[*subscription]struct{}{},
	}
}

// reset starts over from a view; every session gets a complete set.
func (d *desired) reset(v *fsm.View) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.node, d.byNode = map[string]string{}, map[string]map[string]*pb.Assignment{}
	for kv := range v.Scan(model.AssignmentsPrefix) {
		if err := d.put(string(kv.Key), kv.Value); err != nil {
			return err
		}
	}
	for _, subs := range d.subs {
		for s := range subs {
			s.complete = true
			s.signal()
		}
	}
	d.advance(v.Revision())
	return nil
}

// apply takes the events of the whole keyspace up to revision.
func (d *desired) apply(events []*pb.KeyEvent, revision int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range events {
		key := string(e.Kv.Key)
		if _, _, ok := model.SplitReplicaKey(model.AssignmentsPrefix, key); !ok {
			continue
		}
		if before, ok := d.node[key]; ok {
			generation := d.byNode[before][key].GetGeneration()
			delete(d.byNode[before], key)
			delete(d.node, key)
			d.touch(before, key, generation)
		}
		if e.Type == pb.KeyEvent_PUT {
			if err := d.put(key, e.Kv.Value); err != nil {
				return err
			}
			d.touch(d.node[key], key, 0)
		}
	}
	d.advance(revision)
	return nil
}

func (d *desired) put(key string, value []byte) error {
	a := &pb.Assignment{}
	if err := proto.Unmarshal(value, a); err != nil {
		return err
	}
	if d.byNode[a.NodeId] == nil {
		d.byNode[a.NodeId] = map[string]*pb.Assignment{}
	}
	d.byNode[a.NodeId][key] = a
	d.node[key] = a.NodeId
	return nil
}

// touch notes that the node's sessions have to hear of the key, and which
// generation of it went.
func (d *desired) touch(node, key string, gone int64) {
	for s := range d.subs[node] {
		s.changed[key] = max(s.changed[key], gone)
		s.signal()
	}
}

// subscription is what one session has still to be told.
type subscription struct {
	hub      *desired
	node     string
	complete bool
	// Keys that changed, with the newest generation that was taken away.
	changed map[string]int64
	wake    chan struct{}
}

func (d *desired) subscribe(node string) *subscription {
	s := &subscription{hub: d, node: node, complete: true, changed: map[string]int64{}, wake: make(chan struct{}, 1)}
	s.signal()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.subs[node] == nil {
		d.subs[node] = map[*subscription]struct{}{}
	}
	d.subs[node][s] = struct{}{}
	return s
}

func (s *subscription) close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	delete(s.hub.subs[s.node], s)
	if len(s.hub.subs[s.node]) == 0 {
		delete(s.hub.subs, s.node)
	}
}

func (s *subscription) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// next waits for something to tell and returns it. The specs are read from a
// view made afterwards: where an assignment's revision is gone by then, the
// assignment has changed again, and a later set says how.
func (s *subscription) next(ctx context.Context, view func() *fsm.View) (*pb.DesiredSet, error) {
	select {
	case <-s.wake:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	set, assignments := s.take()
	v := view()
	for _, a := range assignments {
		revision := &pb.Revision{}
		_, ok, err := model.Load(v, model.RevisionKey(a.WorkloadId, a.Revision), revision)
		if err != nil {
			return nil, err
		}
		if ok {
			set.Items = append(set.Items, &pb.DesiredItem{Assignment: a, Spec: revision.Spec})
		}
	}
	return set, nil
}

func (s *subscription) take() (*pb.DesiredSet, []*pb.Assignment) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	set := &pb.DesiredSet{Complete: s.complete, Revision: s.hub.revision}
	var assignments []*pb.Assignment
	if s.complete {
		for _, a := range s.hub.byNode[s.node] {
			assignments = append(assignments, a)
		}
	} else {
		for key, generation := range s.changed {
			if a, ok := s.hub.byNode[s.node][key]; ok {
				assignments = append(assignments, a)
			} else if workload, replica, ok := model.SplitReplicaKey(model.AssignmentsPrefix, key); ok {
				set.Removed = append(set.Removed, &pb.ReplicaKey{WorkloadId: workload, Replica: replica, Generation: generation})
			}
		}
	}
	s.complete = false
	clear(s.changed)
	return set, assignments
}
