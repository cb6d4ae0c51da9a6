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
// is there. It is pure, and gives at most one action for each replica:
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
		if p.busy[key] || !p.known(key) {
			continue
		}
		item := p.desired.items[key]
		a := item.GetAssignment()
		guarded := slices.DeleteFunc(runningOf(p.actual[key]), func(in Instance) bool { return !in.Exclusive })
		switch {
		case len(guarded) > 0 && !p.leased(&d):
			// Whatever else is to become of it: now it has to be down.
			d.actions = append(d.actions, action{
				verb: stop, key: key, instances: guarded, grace: fenceGrace, fence: true, why: "is exclusive, and the node's lease ends",
			})
		case item == nil || a.GetDesiredState() == pb.DesiredState_DESIRED_DELETED:
			p.unwanted(key, item != nil, &d)
		case !p.answers[a.GetType()]:
		case a.GetDesiredState() == pb.DesiredState_DESIRED_STOPPED:
			if running := runningOf(p.actual[key]); len(running) > 0 {
				d.actions = append(d.actions, action{verb: stop, key: key, instances: running, why: "is to be stopped"})
			}
		default:
			p.wanted(key, item, leaving, &d)
		}
	}
	return d
}

// known is false where something of the replica is, or may be, in a runtime
// that does not answer.
func (p picture) known(key Key) bool {
	for _, in := range p.actual[key] {
		if !p.answers[in.Type] {
			return false
		}
	}
	return true
}

// leased reports whether exclusive work may run, and sees to it that the
// decision is made again when that ends.
func (p picture) leased(d *decision) bool {
	if !p.leaseEnd.After(p.now) {
		return false
	}
	d.wakeAt(p.leaseEnd)
	return true
}

func (p picture) unwanted(key Key, deleted bool, d *decision) {
	var gone []Instance
	why := "was taken out of the desired set"
	told, isTold := p.dropped[key]
	for _, in := range p.actual[key] {
		if deleted || isTold && in.Generation <= told.generation {
			gone = append(gone, in)
			continue
		}
		if p.current && in.Generation <= p.desired.revision {
			since, ok := p.orphans[in.ID]
			if ok && p.now.Sub(since) >= p.orphanGrace {
				gone = append(gone, in)
				why = "is in nobody's desired set"
				continue
			}
			if ok {
				d.wakeAt(since.Add(p.orphanGrace))
			}
		}
	}
	if len(gone) > 0 {
		d.actions = append(d.actions, action{verb: remove, key: key, instances: gone, why: why})
	}
}

func (p picture) wanted(key Key, item *pb.DesiredItem, leaving map[string]Key, d *decision) {
	a, all := item.GetAssignment(), p.actual[key]
	for _, in := range all {
		if in.UID == a.GetWorkloadUid() && in.Generation > a.GetGeneration() && in.Generation > p.desired.revision {
			d.waiting[key] = fmt.Sprintf("what runs (generation %d) is newer than the assignment", in.Generation)
			return
		}
	}
	if a.GetExclusive() && !p.leased(d) {
		d.waiting[key] = "exclusive work waits for the node's lease"
		return
	}
	current, stale := split(a, all)
	h := p.history[key].of(a.GetGeneration())
	act := action{verb: start, key: key, item: item, instances: stale, why: "is to run"}
	switch {
	case h.failure != nil && (h.retryAt.IsZero() || h.retryAt.After(p.now)):
		// What ran before goes on: a revision that can't be started does not take
		// the one that works down.
		d.wakeAt(h.retryAt)
		return
	case current == nil:
		if len(stale) > 0 {
			act.why = "replaces what ran before"
		}
	case current.Phase == Running:
		if len(stale) > 0 {
			d.actions = append(d.actions, action{verb: remove, key: key, instances: stale, why: "was replaced"})
		}
		return
	case current.Phase == Exited && !h.stopped:
		if endingOf(*current, item.GetSpec(), h) != restarts {
			return
		}
		if h.retryAt.After(p.now) {
			d.wakeAt(h.retryAt)
			return
		}
		act.again, act.why = true, "has ended"
	case current.Phase == Exited:
		act.again, act.why = true, "is to run again"
	}
	for _, port := range a.GetPorts() {
		if holder, ok := leaving[portName(port)]; ok && holder != key && port.GetHostPort() != 0 {
			d.waiting[key] = fmt.Sprintf("port %s is still held by %s, which is on its way out", portName(port), holder)
			if running := runningOf(stale); len(running) > 0 {
				// Its own may be what the other waits for.
				d.actions = append(d.actions, action{verb: remove, key: key, instances: running, why: "makes way, in turn"})
			}
			return
		}
	}
	if a.GetExclusive() && !p.current {
		d.waiting[key] = "exclusive work waits for a server to say that it is still wanted here"
		return
	}
	d.actions = append(d.actions, act)
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
