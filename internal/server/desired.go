package server

import (
	"context"
	"sync"
	"time"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// desiredGap is the least time between two sets to one agent: what changes
// meanwhile is told in one.
const desiredGap = 10 * time.Millisecond

// desired tells the sessions of this replica which assignments of their nodes
// change. It holds no assignments: the picture knows which are on a node, the
// store what they say.
type desired struct {
	picture *picture

	mu sync.Mutex
	// Sessions have been told of, or owe to tell, every change up to here.
	revision int64
	subs     map[string]map[*subscription]struct{} // node → its sessions
}

func newDesired(p *picture) *desired {
	d := &desired{picture: p, subs: map[string]map[*subscription]struct{}{}}
	p.tell = d.touch
	return d
}

// reset has every session get a complete set.
func (d *desired) reset(revision int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, subs := range d.subs {
		for s := range subs {
			s.complete = true
			s.signal()
		}
	}
	d.revision = revision
}

// advance says that the picture shows a revision.
func (d *desired) advance(revision int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.revision = revision
}

// touch notes that an assignment came to the node or went, and which generation
// of it went. The picture calls it.
func (d *desired) touch(node, workload string, number int32, gone int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.subs[node] {
		place := place{workload, number}
		s.changed[place] = max(s.changed[place], gone)
		s.signal()
	}
}

// place is where an assignment is: the number of a workload's replica.
type place struct {
	workload string
	number   int32
}

// subscription is what one session has still to be told.
type subscription struct {
	hub      *desired
	node     string
	complete bool
	// What changed, with the newest generation that was taken away.
	changed map[place]int64
	wake    chan struct{}
}

func (d *desired) subscribe(node string) *subscription {
	s := &subscription{hub: d, node: node, complete: true, changed: map[place]int64{}, wake: make(chan struct{}, 1)}
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

// next waits for something to tell and returns it. What assignments say is read
// from a view made afterwards: where one is not there, or not on the node, it has
// changed again, and a later set says how.
func (s *subscription) next(ctx context.Context, view func() *fsm.View) (*pb.DesiredSet, error) {
	select {
	case <-s.wake:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	set, places := s.take()
	specs := map[[2]string]*pb.WorkloadSpec{}
	v := view()
	for place, gone := range places {
		a := &pb.Assignment{}
		_, ok, err := model.Load(v, model.AssignmentKey(place.workload, place.number), a)
		if err != nil {
			return nil, err
		}
		if !ok || a.NodeId != s.node {
			if gone > 0 {
				set.Removed = append(set.Removed, &pb.ReplicaKey{WorkloadId: place.workload, Replica: place.number, Generation: gone})
			}
			continue
		}
		of := [2]string{a.WorkloadId, a.Revision}
		if specs[of] == nil {
			revision := &pb.Revision{}
			if _, ok, err := model.Load(v, model.RevisionKey(a.WorkloadId, a.Revision), revision); err != nil {
				return nil, err
			} else if !ok {
				continue // the workload is being deleted, and the assignment with it
			}
			specs[of] = revision.Spec
		}
		set.Items = append(set.Items, &pb.DesiredItem{Assignment: a, Spec: specs[of]})
	}
	return set, nil
}

// take returns what has to be looked up: of a complete set all that is on the
// node.
func (s *subscription) take() (*pb.DesiredSet, map[place]int64) {
	if set, places := s.takeChanged(); set != nil {
		return set, places
	}
	// While the picture stands still nothing is touched.
	p := s.hub.picture
	p.mu.Lock()
	defer p.mu.Unlock()
	places := map[place]int64{}
	for _, k := range p.current.AssignedTo(s.node) {
		places[place{k.WorkloadId, k.Replica}] = 0
	}
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.complete = false
	clear(s.changed)
	return &pb.DesiredSet{Complete: true, Revision: p.current.Revision()}, places
}

// takeChanged returns nil where a complete set is due.
func (s *subscription) takeChanged() (*pb.DesiredSet, map[place]int64) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if s.complete {
		return nil, nil
	}
	changed := s.changed
	s.changed = map[place]int64{}
	return &pb.DesiredSet{Revision: s.hub.revision}, changed
}
