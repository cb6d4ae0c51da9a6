package agent

import (
	"fmt"
	"maps"
	"slices"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// fenceGrace is what exclusive work gets between signal and kill when the lease
// is about to end.
const fenceGrace = 500 * time.Millisecond

// picture is all that a decision is made from.
type picture struct {
	now     time.Time
	desired desired
	// actual is what runtimes showed last.
	actual map[Key][]Instance
	// answers has each runtime that this node has, and whether it answered when
	// it was last asked. What belongs to one that did not is not touched.
	answers map[pb.WorkloadType]bool
	busy    map[Key]bool
	history map[Key]history
	// dropped is what a server took out of the set while this agent ran.
	dropped map[Key]dropped
	// current: a complete set came in this session.
	current bool
	// orphans: since when an instance (by its ID) is known to be unwanted.
	orphans     map[string]time.Time
	orphanGrace time.Duration
	// leaseEnd is when exclusive work has to be down. Zero: there is no lease.
	leaseEnd time.Time
}

// dropped is a replica that was in the desired set and is no more.
type dropped struct {
	generation int64
	kind       pb.WorkloadType
	// gone is when it was reported gone.
	gone time.Time
}

type verb string

const (
	// start: prepare, remove what is to be replaced, apply.
	start  verb = "start"
	stop   verb = "stop"
	remove verb = "remove"
)

// action is a thing to do for one replica. It holds all that is needed: carrying
// it out decides nothing.
type action struct {
	verb verb
	key  Key
	// item to start.
	item *pb.DesiredItem
	// again: it ran before in this generation.
	again bool
	// instances to replace, to stop or to remove.
	instances []Instance
	// grace instead of the instance's own, where it is set.
	grace time.Duration
	fence bool
	why   string
}

func (a action) String() string {
	s := fmt.Sprintf("%s %s: %s", a.verb, a.key, a.why)
	for _, in := range a.instances {
		s += " [" + in.ID + "]"
	}
	return s
}

// decision is what diff found.
type decision struct {
	actions []action
	// waiting says what a replica that could be started waits for.
	waiting map[Key]string
	// wake is when time alone may change the decision; zero: never.
	wake time.Time
}

func (d *decision) wakeAt(t time.Time) {
	if !t.IsZero() && (d.wake.IsZero() || t.Before(d.wake)) {
		d.wake = t
	}
}

// diff decides what to do about the difference between what is wanted and what
// is there. It is pure, and gives at most one action for each replica: table says
// which. Behind it is this:
//
//   - What belongs to a runtime that does not answer is left as it is.
//   - What was dropped by a server goes at once.
//   - Orphans, instances that no set speaks of, go only while the agent holds a
//     complete set of this session that is no older than what runs (a
//     generation is at most the keyspace revision at which it was committed),
//     and after a grace.
//   - What runs is taken over by a later assignment that asks for the same,
//     unless it is exclusive: then its fencing token would be a lie.
//   - What runs is left alone by a set that is older than it.
//   - Exclusive work runs only within the lease, and is started only by what a
//     server says in this session: while a lease was over, or the agent away, the
//     work may have been given to another node.
func diff(p picture) decision {
	d := decision{waiting: map[Key]string{}}
	keys := map[Key]bool{}
	for key := range p.desired.items {
		keys[key] = true
	}
	for key := range p.actual {
		keys[key] = true
	}
	leaving := p.leavingPorts()
	for _, key := range slices.SortedFunc(maps.Keys(keys), Key.compare) {
		p.look(key, leaving).answer(&d)
	}
	return d
}

// split tells the instance that fulfils the assignment from those to be
// replaced by it.
func split(a *pb.Assignment, all []Instance) (current *Instance, stale []Instance) {
	for i := range all {
		if fulfils(a, &all[i]) && (current == nil || all[i].Generation == a.GetGeneration()) {
			current = &all[i]
		}
	}
	for i := range all {
		if &all[i] != current {
			stale = append(stale, all[i])
		}
	}
	return current, stale
}

func fulfils(a *pb.Assignment, in *Instance) bool {
	if in.UID != a.GetWorkloadUid() || in.Revision != a.GetRevision() || in.Type != a.GetType() ||
		in.RestartGeneration != a.GetRestartGeneration() || in.Exclusive != a.GetExclusive() ||
		formatPorts(in.Ports) != formatPorts(a.GetPorts()) {
		return false
	}
	return in.Generation == a.GetGeneration() || in.Phase == Running && !a.GetExclusive()
}

func runningOf(all []Instance) []Instance {
	var running []Instance
	for _, in := range all {
		if in.Phase == Running {
			running = append(running, in)
		}
	}
	return running
}

// leavingPorts are the ports held by what runs and is not going to.
func (p picture) leavingPorts() map[string]Key {
	ports := map[string]Key{}
	for key, all := range p.actual {
		item := p.desired.items[key]
		a := item.GetAssignment()
		var current *Instance
		if item != nil && a.GetDesiredState() == pb.DesiredState_DESIRED_RUNNING {
			current, _ = split(a, all)
		}
		for i := range all {
			if all[i].Phase != Running || &all[i] == current {
				continue
			}
			for _, port := range all[i].Ports {
				// Where two hold it, the name of the first is as good.
				if holder, ok := ports[portName(port)]; !ok || key.compare(holder) < 0 {
					ports[portName(port)] = key
				}
			}
		}
	}
	return ports
}

func portName(p *pb.Port) string { return fmt.Sprintf("%d/%s", p.GetHostPort(), protocolOf(p)) }
