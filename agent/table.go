package agent

import (
	"fmt"
	"slices"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What is done about one replica is looked up: what is wanted of it, what is seen
// of it, and what holds the agent back, give the answer. docs/reconciliation.md is
// printed from this table and from the comments here, and a test brings an agent
// into each of its cells.

// desire is what is wanted of a replica.
type desire uint8

const (
	// No set speaks of it.
	wantUnknown desire = iota
	// It is deleted, or a server took it out of the set.
	wantGone
	// It is to be stopped.
	wantStopped
	// It is to run.
	wantRun
	desires
)

// sight is what the runtimes show of a replica, and what is remembered of it.
type sight uint8

const (
	// No instance.
	absent sight = iota
	// Instances of which nothing can be concluded: there is no complete set of this
	// session, or they are newer than it.
	doubtful
	// Orphans within their grace.
	young
	// Orphans, and their grace is over.
	orphaned
	// Instances, and none of them runs.
	idle
	// At least one runs.
	running
	// Runs as assigned, beside others that were to be replaced by it.
	doubled
	// Only instances that are not as assigned: of another revision or generation.
	outdated
	// Was made and has not been started.
	made
	// As assigned, has ended, and its restart policy has it run again now.
	crashed
	// Likewise, after a pause.
	pausing
	// As assigned, has ended, and is not to run again.
	finished
	// As assigned, was stopped by this agent, and is to run.
	held
	// It could not be started; the scheduler decides, or a pause has to pass.
	blocked
	// Something of a later generation runs that the set does not know yet.
	newer
	sights
)

// constraint is what holds the agent back; the first that applies counts.
type constraint uint8

const (
	// Nothing does.
	free constraint = iota
	// An action is under way, or one was cut off and its outcome is not known, or a
	// runtime that has something of it, or is to have, does not answer.
	unknown
	// Something exclusive runs, and the node's lease is over.
	fenced
	// It is exclusive, and the node's lease is over.
	unleased
	// A port that it is to have is held by what is on its way out.
	portless
	// It is exclusive, and no server has said in this session that it is wanted.
	unconfirmed
	constraints
)

// answer is what is done about a replica.
type answer uint8

const (
	// It can't be so.
	never answer = iota
	// Nothing.
	leaveIt
	// Start it.
	startIt
	// Remove what was there, and start it.
	replaceIt
	// Start it again.
	startAgain
	// Stop what runs.
	stopIt
	// Remove all instances that are not wanted.
	removeIt
	// Remove those beside the one that is as assigned.
	removeOthers
	// Stop what is exclusive at once.
	fenceIt
	// Remove it when the grace is over: a set that speaks of it may be on its way.
	awaitGrace
	// Start it again when the pause is over.
	awaitPause
	// Wait until the set is as new as what runs.
	awaitSet
	// Wait for the lease.
	awaitLease
	// Wait for the port; what runs of it makes way meanwhile, since the other may
	// wait for one of its ports.
	awaitPort
	// Wait for a server's word.
	awaitWord
	answers
)

type row [constraints]answer

var table = [desires][sights]row{
	wantUnknown: {
		doubtful: {free: leaveIt, unknown: leaveIt, fenced: fenceIt},
		young:    {free: awaitGrace, unknown: leaveIt, fenced: fenceIt},
		orphaned: {free: removeIt, unknown: leaveIt, fenced: fenceIt},
	},
	wantGone: {
		absent:  {free: leaveIt, unknown: leaveIt},
		idle:    {free: removeIt, unknown: leaveIt},
		running: {free: removeIt, unknown: leaveIt, fenced: fenceIt},
	},
	wantStopped: {
		absent:  {free: leaveIt, unknown: leaveIt},
		idle:    {free: leaveIt, unknown: leaveIt},
		running: {free: stopIt, unknown: leaveIt, fenced: fenceIt},
	},
	wantRun: {
		absent:   {free: startIt, unknown: leaveIt, unleased: awaitLease, portless: awaitPort, unconfirmed: awaitWord},
		outdated: {free: replaceIt, unknown: leaveIt, fenced: fenceIt, unleased: awaitLease, portless: awaitPort, unconfirmed: awaitWord},
		made:     {free: startIt, unknown: leaveIt, fenced: fenceIt, unleased: awaitLease, portless: awaitPort, unconfirmed: awaitWord},
		running:  {free: leaveIt, unknown: leaveIt, fenced: fenceIt, portless: leaveIt, unconfirmed: leaveIt},
		doubled:  {free: removeOthers, unknown: leaveIt, fenced: fenceIt, portless: removeOthers, unconfirmed: removeOthers},
		crashed:  {free: startAgain, unknown: leaveIt, fenced: fenceIt, unleased: awaitLease, portless: awaitPort, unconfirmed: awaitWord},
		pausing:  {free: awaitPause, unknown: leaveIt, fenced: fenceIt, unleased: awaitLease, portless: awaitPause, unconfirmed: awaitPause},
		finished: {free: leaveIt, unknown: leaveIt, fenced: fenceIt, unleased: awaitLease, portless: leaveIt, unconfirmed: leaveIt},
		held:     {free: startAgain, unknown: leaveIt, fenced: fenceIt, unleased: awaitLease, portless: awaitPort, unconfirmed: awaitWord},
		blocked:  {free: awaitPause, unknown: leaveIt, fenced: fenceIt, unleased: awaitLease, portless: awaitPause, unconfirmed: awaitPause},
		newer:    {free: awaitSet, unknown: leaveIt, fenced: fenceIt, unleased: awaitSet, portless: awaitSet, unconfirmed: awaitSet},
	},
}

// situation is a place in the table.
type situation struct {
	want desire
	seen sight
	held constraint
}

func (s situation) answer() answer { return table[s.want][s.seen][s.held] }

// subject is one replica, and all that answers need.
type subject struct {
	p   picture
	key Key
	situation
	item *pb.DesiredItem
	// guarded are exclusive ones that run; unwanted are to be removed; stale are to be
	// replaced by what is assigned.
	guarded, unwanted, stale []Instance
	// until is when the grace or the pause is over; zero: the scheduler decides.
	until time.Time
	// port that is held, and by which replica.
	port, holder string
	// later is the generation of what is newer than the set.
	later int64
	// leased: it may run until the lease ends.
	leased bool
}

// look finds the place of a replica in the table.
func (p picture) look(key Key, leaving map[string]Key) *subject {
	s := &subject{p: p, key: key, item: p.desired.items[key]}
	a := s.item.GetAssignment()
	s.guarded = slices.DeleteFunc(runningOf(p.actual[key]), func(in Instance) bool { return !in.Exclusive })
	switch {
	case s.item == nil:
		s.unasked()
	case a.GetDesiredState() == pb.DesiredState_DESIRED_RUNNING:
		s.want = wantRun
		s.wanted(a)
	default:
		s.want, s.unwanted = wantStopped, p.actual[key]
		if a.GetDesiredState() == pb.DesiredState_DESIRED_DELETED {
			s.want = wantGone
		}
		s.seen = phaseOf(p.actual[key])
	}
	s.held = s.constraint(a, leaving)
	return s
}

func phaseOf(all []Instance) sight {
	switch {
	case len(all) == 0:
		return absent
	case len(runningOf(all)) > 0:
		return running
	default:
		return idle
	}
}

// unasked looks at what is there though no set speaks of it.
func (s *subject) unasked() {
	p, all := s.p, s.p.actual[s.key]
	if told, ok := p.dropped[s.key]; ok {
		for _, in := range all {
			if in.Generation <= told.generation {
				s.unwanted = append(s.unwanted, in)
			}
		}
	}
	if len(s.unwanted) > 0 {
		s.want, s.seen = wantGone, phaseOf(s.unwanted)
		return
	}
	s.want, s.seen = wantUnknown, doubtful
	for _, in := range all {
		since, ok := p.orphans[in.ID]
		if !ok || !p.current || in.Generation > p.desired.revision {
			continue
		}
		due := since.Add(p.orphanGrace)
		if !due.After(p.now) {
			s.unwanted = append(s.unwanted, in)
		} else if s.until.IsZero() || due.Before(s.until) {
			s.until = due
		}
	}
	switch {
	case len(s.unwanted) > 0:
		s.seen = orphaned
	case !s.until.IsZero():
		s.seen = young
	}
}

// wanted looks at what is there of what is to run.
func (s *subject) wanted(a *pb.Assignment) {
	p, all := s.p, s.p.actual[s.key]
	current, stale := split(a, all)
	s.stale = stale
	h := p.history[s.key].of(a.GetGeneration())
	for _, in := range all {
		if in.UID == a.GetWorkloadUid() && in.Generation > max(a.GetGeneration(), p.desired.revision, s.later) {
			s.later = in.Generation
		}
	}
	switch {
	case s.later > 0:
		s.seen = newer
	case h.failure != nil && (h.retryAt.IsZero() || h.retryAt.After(p.now)):
		// What ran before goes on: a revision that can't be started does not take
		// the one that works down.
		s.seen, s.until = blocked, h.retryAt
	case current == nil && len(stale) == 0:
		s.seen = absent
	case current == nil:
		s.seen = outdated
	case current.Phase == Running && len(stale) > 0:
		s.seen = doubled
	case current.Phase == Running:
		s.seen = running
	case current.Phase != Exited:
		s.seen = made
	case h.stopped:
		s.seen = held
	case endingOf(*current, s.item.GetSpec(), h) != restarts:
		s.seen = finished
	case h.retryAt.After(p.now):
		s.seen, s.until = pausing, h.retryAt
	default:
		s.seen = crashed
	}
}

func (s *subject) constraint(a *pb.Assignment, leaving map[string]Key) constraint {
	p := s.p
	leased := p.leaseEnd.After(p.now)
	exclusive := s.want == wantRun && a.GetExclusive()
	if p.busy[s.key] || !p.known(s.key) {
		return unknown
	}
	s.leased = leased && (exclusive || len(s.guarded) > 0)
	switch {
	case len(s.guarded) > 0 && !leased:
		return fenced
	case s.item != nil && s.want != wantGone && !p.answers[a.GetType()]:
		return unknown
	case exclusive && !leased:
		return unleased
	case s.want == wantRun && s.portHeld(a, leaving):
		return portless
	case exclusive && !p.current:
		return unconfirmed
	default:
		return free
	}
}

func (s *subject) portHeld(a *pb.Assignment, leaving map[string]Key) bool {
	for _, port := range a.GetPorts() {
		if holder, ok := leaving[portName(port)]; ok && holder != s.key && port.GetHostPort() != 0 {
			s.port, s.holder = portName(port), holder.String()
			return true
		}
	}
	return false
}

// known is false where something of the replica is, or may be, in a runtime
// that does not answer.
func (p picture) known(key Key) bool {
	return !slices.ContainsFunc(p.actual[key], func(in Instance) bool { return !p.answers[in.Type] })
}

// answer adds to the decision what the table says.
func (s *subject) answer(d *decision) {
	if s.leased {
		d.wakeAt(s.p.leaseEnd)
	}
	act := action{key: s.key, item: s.item}
	do := s.situation.answer()
	switch do {
	case leaveIt, never:
		return
	case awaitGrace, awaitPause:
		d.wakeAt(s.until)
		return
	case awaitSet:
		d.waiting[s.key] = fmt.Sprintf("what runs (generation %d) is newer than the assignment", s.later)
		return
	case awaitLease:
		d.waiting[s.key] = "exclusive work waits for the node's lease"
		return
	case awaitWord:
		d.waiting[s.key] = "exclusive work waits for a server to say that it is still wanted here"
		return
	case awaitPort:
		d.waiting[s.key] = fmt.Sprintf("port %s is still held by %s, which is on its way out", s.port, s.holder)
		if act.instances = runningOf(s.stale); len(act.instances) == 0 {
			return
		}
		act.verb, act.why = remove, "makes way, in turn"
	case startIt, replaceIt:
		act.verb, act.instances, act.why = start, s.stale, "is to run"
		if do == replaceIt {
			act.why = "replaces what ran before"
		}
	case startAgain:
		act.verb, act.instances, act.again, act.why = start, s.stale, true, "has ended"
		if s.seen == held {
			act.why = "is to run again"
		}
	case stopIt:
		act.verb, act.instances, act.why = stop, runningOf(s.p.actual[s.key]), "is to be stopped"
	case removeIt:
		act.verb, act.instances, act.why = remove, s.unwanted, "was taken out of the desired set"
		if s.want == wantUnknown {
			act.why = "is in nobody's desired set"
		}
	case removeOthers:
		act.verb, act.instances, act.why = remove, s.stale, "was replaced"
	case fenceIt:
		act.verb, act.instances, act.grace, act.fence = stop, s.guarded, fenceGrace, true
		act.why = "is exclusive, and the node's lease ends"
	}
	if act.verb != start {
		act.item = nil
	}
	d.actions = append(d.actions, act)
}
