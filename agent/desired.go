package agent

import (
	"fmt"
	"maps"
	"slices"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// desired is the set that the node is to run. A value is never changed: merge
// makes a new one.
type desired struct {
	// revision of the keyspace that it was built from.
	revision int64
	items    map[Key]*pb.DesiredItem
}

// merged is what merge found.
type merged struct {
	next desired
	// dropped are the generations of replicas that were in the set and are not
	// any more: a server has said so.
	dropped map[Key]int64
	// refused says for each item that was not taken why.
	refused []string
}

// merge applies what a server sent. Older than what is held is refused: as a
// whole by keyspace revision, one by one by generation. A workload of another uid
// is another workload, whose generations are not compared.
func merge(held desired, set *pb.DesiredSet) (merged, error) {
	if set.GetRevision() < held.revision {
		return merged{}, fmt.Errorf("desired set of revision %d is older than the one held, %d", set.GetRevision(), held.revision)
	}
	m := merged{next: desired{revision: set.GetRevision()}, dropped: map[Key]int64{}}
	if set.GetComplete() {
		m.next.items = make(map[Key]*pb.DesiredItem, len(set.GetItems()))
	} else {
		m.next.items = maps.Clone(held.items)
		if m.next.items == nil {
			m.next.items = map[Key]*pb.DesiredItem{}
		}
		for _, r := range set.GetRemoved() {
			delete(m.next.items, Key{r.GetWorkloadId(), r.GetReplica()})
		}
	}
	for _, item := range set.GetItems() {
		a := item.GetAssignment()
		if a.GetWorkloadId() == "" || item.GetSpec() == nil {
			m.refused = append(m.refused, fmt.Sprintf("%s: no assignment or no spec", keyOf(a)))
			continue
		}
		key := keyOf(a)
		if old, ok := held.items[key]; ok {
			o := old.GetAssignment()
			if o.GetWorkloadUid() == a.GetWorkloadUid() && a.GetGeneration() < o.GetGeneration() {
				m.refused = append(m.refused, fmt.Sprintf("%s: generation %d is older than the one held, %d", key, a.GetGeneration(), o.GetGeneration()))
				m.next.items[key] = old
				continue
			}
		}
		m.next.items[key] = item
	}
	for key, old := range held.items {
		if _, ok := m.next.items[key]; !ok {
			m.dropped[key] = old.GetAssignment().GetGeneration()
		}
	}
	for _, r := range set.GetRemoved() {
		key := Key{r.GetWorkloadId(), r.GetReplica()}
		if _, ok := m.next.items[key]; !ok {
			// Perhaps never heard of: it came and went between two sets.
			m.dropped[key] = max(m.dropped[key], r.GetGeneration())
		}
	}
	return m, nil
}

// keys are in order.
func (d desired) keys() []Key {
	return slices.SortedFunc(maps.Keys(d.items), Key.compare)
}
