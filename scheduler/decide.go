package scheduler

import (
	"container/heap"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Options bound a decision. The zero value is good.
type Options struct {
	// The leader's epoch, given to workloads as part of their fencing token.
	Epoch int64
	// At most about so many placements in one plan; default 10,000.
	MaxPlacements int
	// At most so many replicas are changed by one step; default 256.
	StepPlacements int
	// How long the lease of a node lasts, and how much longer exclusive work
	// waits before it is started elsewhere; default 10 s and 5 s.
	Lease, Margin time.Duration
}

func (o Options) withDefaults() Options {
	if o.MaxPlacements <= 0 {
		o.MaxPlacements = 10_000
	}
	if o.StepPlacements <= 0 {
		o.StepPlacements = 256
	}
	if o.Lease <= 0 {
		o.Lease = 10 * time.Second
	}
	if o.Margin <= 0 {
		o.Margin = 5 * time.Second
	}
	return o
}

// Decide makes the plan for the picture at a time: the leader's, which never
// goes back. The picture afterwards stands for the same keyspace as before; it
// only remembers which workloads need no look until something changes, so that
// deciding costs what the changes cost. Calling it again without Assume gives
// the same plan again.
func Decide(p *Picture, now time.Time, opt Options) *Plan {
	p.wakeDue(now.UnixNano())
	p.wakeForRoom()
	p.wakeForAffinity()
	plan := &Plan{Revision: p.revision}
	if len(p.dirty.list) > 0 || p.mayRebalance(now.UnixNano()) {
		p.stamp++
		d := &decider{
			p: p, now: now, nano: now.UnixNano(), nowStamp: timestamppb.New(now),
			opt: opt.withDefaults(), plan: plan, stamp: p.stamp, touched: p.touched[:0],
		}
		queue := p.dirty.queue()
		for len(queue) > 0 {
			if d.placements >= d.opt.MaxPlacements {
				plan.More = true
				break
			}
			d.decide(heap.Pop(&queue).(*workload))
		}
		if len(plan.Steps) == 0 && !plan.More {
			d.rebalance()
		}
		d.undo()
	}
	at := p.nextWake()
	if look := p.nextLook(); look > now.UnixNano() && (at == 0 || look < at) {
		at = look
	}
	if at != 0 {
		plan.Wake = time.Unix(0, at)
	}
	return plan
}

// decider is one call of Decide.
type decider struct {
	p        *Picture
	now      time.Time
	nano     int64
	nowStamp *timestamppb.Timestamp
	opt      Options
	plan     *Plan

	placements int
	// What is to be moved to even the load, of the workload that is looked at.
	away *replica
	// What such moves take from nodes, once they are through.
	leaving    map[*node]amounts
	ops        ops
	assignment pb.Assignment

	// What the plan reserves is reserved in the picture while it is made, and
	// given back at its end.
	stamp   uint64
	touched []saved
	ports   []takenPort
	present []appearance
	equips  []handedOut
	// Replicas whose assignments the plan changes, as far as others rely on them.
	unsettled []*replica
	changing  map[*replica]bool

	// Whose room was taken, and by which step.
	victims map[*replica]*Step

	// Lent to one run after another.
	runStamp uint64
	scratch  scratch
	// Nodes to which replicas of the workload are brought, once for each, and from
	// which they go; so many of the latter by steps that are complete.
	planned, departed []*node
	earlier           int
}

type saved struct {
	node      *node
	free      amounts
	reserving int
}

type takenPort struct {
	node *node
	use  portUse
}

func (d *decider) reserve(n *node, needs amounts, ports []portUse) {
	if n.undoStamp != d.stamp {
		n.undoStamp = d.stamp
		d.touched = append(d.touched, saved{n, n.free, n.reserving})
	}
	for _, u := range ports {
		d.ports = append(d.ports, takenPort{n, u})
	}
	n.take(needs, ports)
	d.p.index.update(n)
}

// appearance is a replica that the plan places, or is about to take away.
type appearance struct {
	w    *workload
	node *node
	presence
}

func (d *decider) appear(w *workload, n *node, as presence) {
	if len(w.matches)+len(w.repels) > 0 {
		d.present = append(d.present, appearance{w, n, as})
		d.p.countPresence(w, n, as, false)
	}
}

// handedOut is equipment that the plan gives to a replica.
type handedOut struct {
	node *node
	what *equipment
}

func (d *decider) equip(n *node, e *equipment) {
	if e != nil {
		d.equips = append(d.equips, handedOut{n, e})
		n.equip(e)
	}
}

// unsettle notes that the plan changes r's assignment: nobody is to rely on it.
func (d *decider) unsettle(r *replica) {
	if len(r.w.matches) == 0 || !r.assignment.reserves || r.next != nil || d.changing[r] {
		return
	}
	if d.changing == nil {
		d.changing = map[*replica]bool{}
	}
	d.unsettled, d.changing[r] = append(d.unsettled, r), true
	d.p.countPresence(r.w, r.assignment.node, presence{settled: -1}, false)
}

func (d *decider) undo() {
	for _, r := range d.unsettled {
		d.p.countPresence(r.w, r.assignment.node, presence{settled: 1}, false)
	}
	for _, h := range d.equips {
		h.node.unequip(h.what)
	}
	for _, a := range d.present {
		d.p.countPresence(a.w, a.node, presence{-a.all, -a.settled}, false)
	}
	for _, t := range d.ports {
		t.node.ports.remove(t.use)
	}
	for _, t := range d.touched {
		t.node.free, t.node.reserving = t.free, t.reserving
		d.p.index.update(t.node)
	}
	if len(d.touched) > 0 {
		d.p.growth++
	}
	d.p.touched = d.touched[:0]
}

// decide looks at one workload.
func (d *decider) decide(w *workload) {
	steps := len(d.plan.Steps)
	b := &builder{d: d, w: w}
	b.run = run{d: d, w: w}
	d.planned, d.departed, d.earlier = d.planned[:0], d.departed[:0], 0
	switch {
	case w.leaving, w.rewriting:
	case w.want == nil || w.want.desired == pb.DesiredState_DESIRED_DELETED:
		b.leave()
	case w.want.invalid != "":
		b.tally.fail(&pb.Reason{Code: pb.ReasonCode_INVALID_SPEC, Message: w.want.invalid})
	case w.want.schedule != nil:
		b.scheduled()
	case w.want.desired == pb.DesiredState_DESIRED_STOPPED:
		b.stop()
	case w.want.kind == pb.WorkloadKind_GLOBAL:
		b.global()
	default:
		b.replicated()
	}
	b.done()
	if !w.leaving && !w.rewriting {
		b.recordRollout()
		b.pruneRevisions()
		b.writeStatus()
	}
	b.flush()
	if b.rollout.former != nil {
		d.p.dropWant(b.rollout.former)
	}

	if b.waiting {
		d.p.waiting.add(w)
	} else {
		d.p.waiting.remove(w)
	}
	d.p.wakeAt(w, b.wake)
	switch {
	case b.truncated:
		d.plan.More = true
	case b.again:
	case len(d.plan.Steps) == steps:
		d.p.dirty.remove(w)
	default:
		d.plan.Steps[len(d.plan.Steps)-1].last = true
	}
}

// safe reports whether nothing that was started on n can be running there any
// more, so that exclusive work may start elsewhere. Where it is not so yet but
// will be by the clock, due says when.
func (d *decider) safe(n *node) (ok bool, due int64) {
	if !n.lost() || n.mod == 0 {
		return false, 0
	}
	due = n.transition + int64(d.opt.Lease+d.opt.Margin)
	return d.nano >= due, due
}

func (p *Picture) wakeDue(now int64) {
	for len(p.timers) > 0 {
		t := p.timers[0]
		if t.at == t.w.wake && t.at > now {
			return
		}
		heap.Pop(&p.timers)
		if t.at == t.w.wake {
			t.w.wake = 0
			p.touch(t.w)
		}
	}
}

func (p *Picture) nextWake() int64 {
	for len(p.timers) > 0 {
		if t := p.timers[0]; t.at == t.w.wake {
			return t.at
		}
		heap.Pop(&p.timers)
	}
	return 0
}

func (p *Picture) wakeAt(w *workload, at int64) {
	if w.wake == at {
		return
	}
	w.wake = at
	if at != 0 {
		heap.Push(&p.timers, timer{at, w})
	}
	const slack = 1024
	if len(p.timers) > slack+2*len(p.workloads) {
		p.timers = slices.DeleteFunc(p.timers, func(t timer) bool { return t.at != t.w.wake })
		heap.Init(&p.timers)
	}
}

// wakeForRoom wakes the waiting workloads for which there is room now on a node
// that gained some, or can be made.
func (p *Picture) wakeForRoom() {
	newest := p.newest
	p.newest = noPriority
	if len(p.freed) == 0 && newest == noPriority {
		return
	}
	if len(p.waiting.list) > 0 {
		for _, w := range p.waiting.list {
			if !p.dirty.has(w) && w.want != nil && (w.holdsBack() || w.want.priority-preemptionGap >= newest || p.fitsAny(w, p.freed)) {
				p.touch(w)
			}
		}
		// What waits to be replaced where it is gets room by what leaves its node.
		for _, n := range p.freed {
			for _, r := range n.assigned {
				if p.waiting.has(r.w) {
					p.touch(r.w)
				}
			}
		}
	}
	for _, n := range p.freed {
		n.freed = false
	}
	p.freed = p.freed[:0]
}

func (p *Picture) fitsAny(w *workload, nodes []*node) bool {
	s, preempts := w.want.shape, p.mayPreempt(w)
	p.prepare(s.filter)
	for _, n := range nodes {
		if n.open() && s.filter.accepts(n) && (fits(n, s) || preempts && n.mayHold(w.want)) {
			return true
		}
	}
	return false
}
