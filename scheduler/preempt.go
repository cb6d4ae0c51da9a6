package scheduler

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// Work makes room only for work whose priority is higher by at least so much.
	preemptionGap = 10
	// So many nodes on which room can be made are compared.
	preemptionProbes = 16

	noPriority = model.MaxPriority + 1
)

// A replica that fits nowhere may take the room of work of a lower priority. Its
// victims are released and it is assigned in one transaction: nobody else gets
// the room meanwhile, a refusal leaves all as it was, and there is nothing to
// remember from one decision to the next. Each time one replica of a priority
// comes to be and none of that priority or a higher one goes, so this comes to an
// end. What the victims leave beyond that can be used by the same step only, like
// all that is freed: whoever else it would do for waits until it is there.

// offer is a node on which room can be made.
type offer struct {
	to spot
	// It failed there before.
	avoided bool
	// How grave it is: the highest priority among the victims, how many they are,
	// how many of them serve as their workload's only ones, how large they are, and
	// how long ago the oldest was assigned, as a revision.
	priority int32
	last     int
	size     int64
	oldest   int64
	tie      uint64
}

func (a *offer) compare(b *offer) int {
	avoided := func(o *offer) int {
		if o.avoided {
			return 1
		}
		return 0
	}
	return cmp.Or(
		cmp.Compare(avoided(a), avoided(b)), cmp.Compare(a.priority, b.priority), cmp.Compare(len(a.to.victims), len(b.to.victims)),
		cmp.Compare(a.last, b.last), cmp.Compare(a.size, b.size), cmp.Compare(b.oldest, a.oldest), cmp.Compare(a.tie, b.tie),
	)
}

// leftover is what the step frees on a node beyond what it uses.
type leftover struct {
	node      *node
	free      amounts
	ports     []portUse
	equipment *equipment
}

// apart is a copy of n whose room can be changed.
func (n *node) apart() *node {
	c := *n
	c.ports, c.gear = slices.Clone(n.ports), n.gear.clone()
	return &c
}

// without and with are n when an assignment is taken away, and when it is given back.
func (n *node) without(a *assignment) {
	n.give(a.needs, usedPorts(a.ports))
	n.unequip(a.equipment)
}

func (n *node) with(a *assignment) {
	n.take(a.needs, usedPorts(a.ports))
	n.equip(a.equipment)
}

// mayPreempt reports whether the workload may take the room of others at all.
func (p *Picture) mayPreempt(w *workload) bool {
	return w.want.preempts && !p.config.NoPreemption && p.outranks(w.want.priority)
}

// outranks reports whether there is work that would make room for this priority.
func (p *Picture) outranks(priority int32) bool {
	for n := range priority - preemptionGap + 1 {
		if p.priorities[n] > 0 {
			return true
		}
	}
	return false
}

// claims is what of a node's room could be made free at most, by tens of the
// priority that it has: what is being deleted counts as the lowest.
type claims struct {
	version uint64
	room    [model.MaxPriority/10 + 1]amounts
}

// mayFree is an upper bound of what making room for work frees on n.
func (n *node) mayFree(limit int32) amounts {
	if n.claims == nil || n.claims.version != n.version {
		n.claims = &claims{version: n.version}
		for _, r := range n.assigned {
			tens := int32(0)
			switch {
			case !r.assignment.reserves || r.w.want == nil:
				continue
			case r.w.deleted():
			case r.w.want.protected:
				continue
			default:
				tens = r.w.want.priority / 10
			}
			for d, needs := range r.assignment.needs {
				n.claims.room[tens][d] += needs
			}
		}
	}
	var sum amounts
	for tens := range limit/10 + 1 {
		for d, room := range n.claims.room[tens] {
			sum[d] += room
		}
	}
	return sum
}

// mayHold reports whether a replica could fit on n at best if room were made for it.
func (n *node) mayHold(w *want) bool {
	most := n.mayFree(w.priority - preemptionGap)
	for d := range most {
		most[d] += n.free[d]
	}
	_, lacks := w.shape.needs.lacking(&most)
	return !lacks
}

// countPriority keeps the number of workloads by priority that may make room.
func (p *Picture) countPriority(w *workload, by int32) {
	if w.want != nil && !w.want.protected {
		p.priorities[w.want.priority] += by
	}
}

// newVictims wakes, with the next decision, what may take the room of this
// workload's replicas and waits.
func (p *Picture) newVictims(w *workload) {
	if w.want != nil && !w.want.protected {
		p.newest = min(p.newest, w.want.priority)
	}
}

// standing is what of a workload says who has to make room for whom.
type standing struct {
	priority           int32
	protected, deleted bool
}

func (w *workload) standing() standing {
	if w.want == nil {
		return standing{priority: -1}
	}
	return standing{w.want.priority, w.want.protected, w.deleted()}
}

// rankChanged notes that the room of the workload's replicas is another matter now.
func (p *Picture) rankChanged(w *workload) {
	for _, r := range w.replicas {
		if n := r.assignment.node; n != nil {
			n.version++
		}
	}
	if len(w.replicas) > 0 {
		p.newVictims(w)
	}
}

// preempt finds a node on which the least damage makes room for a replica that
// fits nowhere; on says which node, nil any.
func (b *builder) preempt(number int32, r *replica, avoid []string, on *node) (spot, bool) {
	p, w := b.d.p, b.w
	if b.truncated || !p.mayPreempt(w) {
		return spot{}, false
	}
	if w.want.kind != pb.WorkloadKind_GLOBAL && number >= w.want.replicas {
		return spot{}, false // It is there for the time of an update only.
	}
	b.run.prepare()
	shape, seed := w.want.shape, b.seed(number, r)
	if on != nil {
		o, ok := b.offerOf(on, seed, nil)
		return b.accept(o, ok)
	}
	if b.run.hopeless == b.d.placements+1 || b.run.indifferent() && shape.hopelessStamp == b.d.stamp && w.want.priority <= shape.hopelessFor {
		return spot{}, false
	}
	for _, l := range b.leftovers {
		if o, ok := b.offerOf(l.node, seed, avoid); ok && o != nil && len(o.to.victims) == 0 {
			return b.accept(o, ok)
		}
	}
	var best *offer
	found := 0
	for n := range p.openNodes(shape.filter, w.hash^uint64(number)) {
		o, ok := b.offerOf(n, seed, avoid)
		if !ok {
			continue
		}
		if o == nil {
			return b.accept(nil, true)
		}
		if best == nil || o.compare(best) < 0 {
			best = o
		}
		if found++; found == preemptionProbes {
			break
		}
	}
	if best == nil {
		b.run.hopeless = b.d.placements + 1
		if b.run.indifferent() {
			shape.hopelessStamp, shape.hopelessFor = b.d.stamp, w.want.priority
		}
	}
	return b.accept(best, best != nil)
}

// accept turns an offer into a spot; nil where room is coming.
func (b *builder) accept(o *offer, ok bool) (spot, bool) {
	switch {
	case !ok:
		return spot{}, false
	case o == nil:
		b.again = true
		return spot{}, false
	}
	return o.to, true
}

// openNodes gives the open nodes that match in the order of their hashes, from a
// place that start decides.
func (p *Picture) openNodes(f *filter, start uint64) func(yield func(*node) bool) {
	return func(yield func(*node) bool) {
		words := len(f.eligible)
		if words == 0 {
			return
		}
		first := int(mix(start) % uint64(words))
		for k := range words {
			i := (first + k) % words
			for set := f.eligible[i]; set != 0; set &= set - 1 {
				if n := p.index.slots[i<<6+bits.TrailingZeros64(set)]; n.open() && !yield(n) {
					return
				}
			}
		}
	}
}

// offerOf says what it takes to make room on n; false: it can't be done; nil: what
// is on its way out leaves room enough.
func (b *builder) offerOf(n *node, seed uint64, avoid []string) (*offer, bool) {
	if b.run.refusal(n) != "" {
		return nil, false
	}
	limit, l := b.w.want.priority-preemptionGap, b.leftover(n)
	if l == nil && !n.mayHold(b.w.want) {
		return nil, false
	}
	var victims []*replica
	coming := n.apart()
	for _, r := range n.assigned {
		switch step := b.d.victims[r]; {
		case !r.assignment.reserves || step != nil && step == b.step:
		case step != nil || r.next != nil && r.next.gone || r.next == nil && r.w.deleted():
			coming.without(&r.assignment)
		case r.next == nil && r.w != b.w && r.w.want != nil && r.w.want.priority <= limit && !r.w.want.protected && !b.w.needs(r.w):
			victims = append(victims, r)
		}
	}
	shape := b.w.want.shape
	if coming.reserving < n.reserving && fits(coming, shape) {
		return nil, true
	}
	if len(victims) == 0 && l == nil {
		return nil, false
	}
	var best *offer
	for _, largestFirst := range []bool{true, false} {
		if o := b.bargain(n, l, slices.Clone(victims), largestFirst, seed); o != nil && (best == nil || o.compare(best) < 0) {
			best = o
		}
	}
	if best == nil {
		return nil, false
	}
	best.avoided = slices.Contains(avoid, n.id)
	return best, true
}

// needs reports whether w is to be only where replicas of the other workload are.
func (w *workload) needs(other *workload) bool {
	return slices.ContainsFunc(w.want.wishes, func(h wish) bool { return h.weight == 0 && !h.anti && h.selects(other) })
}

func (b *builder) leftover(n *node) *leftover {
	if i := slices.IndexFunc(b.leftovers, func(l leftover) bool { return l.node == n }); i >= 0 {
		return &b.leftovers[i]
	}
	return nil
}

// bargain takes all victims away and gives back, the most important first, as many
// as leave room enough; nil where there is none even so. Which of equals goes
// first decides whether few large or many small ones remain: both are tried.
func (b *builder) bargain(n *node, l *leftover, victims []*replica, largestFirst bool, seed uint64) *offer {
	shape := b.w.want.shape
	left, credit := n.apart(), leftover{node: n}
	if l != nil {
		credit = leftover{n, l.free, slices.Clone(l.ports), l.equipment}
		left.give(l.free, l.ports)
		left.unequip(l.equipment)
	}
	for _, v := range victims {
		left.without(&v.assignment)
	}
	if !fits(left, shape) {
		return nil
	}
	size := func(r *replica) int64 { return r.assignment.needs.shareOf(&n.capacity) }
	slices.SortFunc(victims, func(a, b *replica) int {
		bySize := cmp.Compare(size(a), size(b))
		if largestFirst {
			bySize = -bySize
		}
		return cmp.Or(
			cmp.Compare(b.w.want.priority, a.w.want.priority), cmp.Compare(a.w.serving(), b.w.serving()), bySize,
			cmp.Compare(a.assignment.generation, b.assignment.generation), cmp.Compare(a.w.id, b.w.id), cmp.Compare(a.number, b.number),
		)
	})
	o := &offer{tie: mix(n.hash ^ b.w.hash)}
	for _, v := range victims {
		left.with(&v.assignment)
		if fits(left, shape) {
			continue
		}
		left.without(&v.assignment)
		credit.ports = append(credit.ports, usedPorts(v.assignment.ports)...)
		credit.equipment = credit.equipment.plus(v.assignment.equipment)
		for d := range credit.free {
			credit.free[d] += v.assignment.needs[d]
		}
		o.to.victims = append(o.to.victims, v)
		o.priority = max(o.priority, v.w.want.priority)
		o.size += size(v)
		if v.w.serving() == 1 && v.serves() {
			o.last++
		}
		if o.oldest == 0 || v.assignment.generation < o.oldest {
			o.oldest = v.assignment.generation
		}
	}
	ports, ok := choosePorts(left, shape.ports, nil, nil, n.hash^seed)
	if !ok {
		return nil
	}
	equipment, lack := shape.filter.equip(left.gear, nil, nil)
	if lack != "" {
		return nil
	}
	o.to.node, o.to.ports, o.to.equipment, o.to.credit = n, ports, equipment, credit
	return o
}

// serving is how many replicas of the workload run.
func (w *workload) serving() int32 { return w.status.GetRunning() }

// makeRoom releases the victims of a spot for a replica and takes what they leave
// beyond that into account.
func (b *builder) makeRoom(number int32, to *spot) {
	if to.credit.node == nil {
		return
	}
	for i, v := range to.victims {
		if i == 0 || to.victims[i-1].w != v.w {
			b.compare([]byte(model.WorkloadKey(v.w.id)), v.w.mod)
		}
		b.dislodge(v, fmt.Sprintf("%s/%d", b.w.id, number))
	}
	left := to.credit
	left.free, left.equipment = left.free.beyond(b.w.want.shape.needs), left.equipment.beyond(to.equipment)
	for _, u := range usedPorts(to.ports) {
		if i := slices.Index(left.ports, u); i >= 0 {
			left.ports = slices.Delete(slices.Clone(left.ports), i, i+1)
		}
	}
	if l := b.leftover(to.node); l != nil {
		*l = left
	} else {
		b.leftovers = append(b.leftovers, left)
	}
}

// dislodge takes the assignment of a victim away and says on whose account.
func (b *builder) dislodge(v *replica, who string) {
	if b.d.victims == nil {
		b.d.victims = map[*replica]*Step{}
	}
	b.release(v)
	b.d.victims[v] = b.step
	reason := &pb.Reason{
		Code: pb.ReasonCode_PREEMPTED, Message: "made room for " + who + " on " + v.assignment.node.id, LastTransition: b.d.nowStamp, Retryable: true,
	}
	// What is global is numbered anew where it comes again.
	if v.w.want.kind != pb.WorkloadKind_GLOBAL {
		rec := &pb.Retry{WorkloadId: v.w.id, Replica: v.number, MaxAttempts: maxAttempts, Reason: reason, Revision: v.w.want.revision}
		var mod int64
		if t := v.retry; t != nil {
			mod = t.mod
			if t.revision == rec.Revision {
				rec.Attempts, rec.FailedNodes, rec.Exhausted = t.attempts, t.failedNodes, t.exhausted
			}
			if rec.Exhausted {
				rec.Reason = t.reason // It does not wait for room.
			}
		}
		key := []byte(model.RetryKey(v.w.id, v.number))
		b.compare(key, mod)
		b.put(key, rec)
	}
	b.say(note{
		kind: pb.EventType_WORKLOAD_PREEMPTED, of: v.w.id, verb: verbPreempted, why: "made room for " + who, number: v.number, node: v.assignment.node.id, reason: reason,
	})
}

// explain says why a spot was chosen.
func (s *run) explain(to *spot) string {
	if len(to.victims) == 0 {
		return s.reason
	}
	var names []string
	for _, v := range to.victims {
		names = append(names, fmt.Sprintf("%s/%d", v.w.id, v.number))
	}
	slices.Sort(names)
	const most = 3
	if extra := len(names) - most; extra > 0 {
		names = append(names[:most], fmt.Sprintf("%d more", extra))
	}
	return "room made by " + strings.Join(names, ", ")
}

// taken reports whether what becomes of r is decided already: by a step that is
// being committed, or by a workload that took its room in this plan.
func (b *builder) taken(r *replica) bool {
	if b.d.victims[r] != nil {
		b.again = true
		return true
	}
	return r.next != nil
}

// explainPreemption says why a workload that waits takes nobody's room; nil where
// nobody has any that it could take.
func (p *Picture) explainPreemption(w *workload) []string {
	switch limit := w.want.priority - preemptionGap; {
	case !p.outranks(w.want.priority):
		return nil
	case !w.want.preempts:
		return []string{"work of a lower priority is left alone: preemption.never_preempts"}
	case p.config.NoPreemption:
		return []string{"work of a lower priority is left alone: preemption is switched off"}
	default:
		return []string{fmt.Sprintf("work of priority %d or lower makes no room for it on any node", limit)}
	}
}
