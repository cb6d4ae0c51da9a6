package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// rebalancedFrom is in the explanation of an assignment that was made to even the
// load. The budget is counted by it, so that another leader counts the same.
const rebalancedFrom = "rebalanced from "

func wasRebalanced(a *pb.Assignment) bool {
	return strings.Contains(a.Explanation, rebalancedFrom)
}

// mostLooks bounds how many replicas are looked at by one decision, those beside
// the one to be moved included.
const mostLooks = 50_000

// lookPause is how long after a look that moved nothing the next one is: it costs what
// the cluster is large, whatever small thing has changed.
const lookPause = 10 * time.Second

// rebalance moves a few replicas from nodes that are much fuller than others, when
// there is nothing else to do. It ends by itself: a move takes a node that is fuller
// than the two nodes are afterwards, so that the fullness of all nodes, the fullest
// first, gets less with every move.
func (d *decider) rebalance() {
	p := d.p
	if !p.mayRebalance(d.nano) {
		return
	}
	p.uneven, p.rebalanceAt = false, 0
	if !d.calm() {
		return
	}
	full := d.fullest()
	moves := 0
	if len(full) > 0 {
		moves = d.movesLeft()
	}
	d.leaving = map[*node]amounts{}
	moved := map[*workload]bool{}
	looks := 0
	for _, n := range full {
		if moves == 0 || looks >= mostLooks {
			break
		}
		var last *workload
		for _, r := range byName(n.assigned) {
			if moves == 0 || looks >= mostLooks {
				break
			}
			// Of one workload one is as good as another.
			if r.w == last || moved[r.w] || !movable(r) || d.settled(r) > d.nano || !d.relieves(n, r) {
				continue
			}
			last = r.w
			looks += 1 + len(r.w.replicas)
			steps := len(d.plan.Steps)
			d.away = r
			d.decide(r.w)
			d.away = nil
			if len(d.plan.Steps) > steps {
				moved[r.w] = true
				moves--
			}
		}
	}
	if p.uneven = len(d.plan.Steps) > 0; !p.uneven {
		p.evenSince = d.nano
	}
}

// mayRebalance reports whether the load may have become uneven since it was looked
// at: in a cluster where nothing happens it is looked at once.
func (p *Picture) mayRebalance(now int64) bool {
	at := p.nextLook()
	return at != 0 && at <= now
}

// nextLook is when the load is to be looked at; 0: not until something changes.
func (p *Picture) nextLook() int64 {
	at := p.rebalanceAt
	switch soon := p.evenSince + int64(lookPause); {
	case !p.config.Rebalance:
		return 0
	case p.uneven && (at == 0 || soon < at):
		return soon
	}
	return at
}

// fullest are the open nodes that are fuller than the emptiest by the threshold,
// the fullest first.
func (d *decider) fullest() []*node {
	d.p.index.rebuild(d.p.nodes)
	least := int64(fine)
	for _, n := range d.p.index.slots {
		if n.open() {
			least = min(least, n.fullness())
		}
	}
	var full []*node
	for _, n := range d.p.index.slots {
		if n.open() && n.fullness()-least >= d.threshold() {
			full = append(full, n)
		}
	}
	slices.SortStableFunc(full, func(a, b *node) int { return cmp.Compare(b.fullness(), a.fullness()) })
	return full
}

func (n *node) fullness() int64 { return n.share(&amounts{}, fine) }

// fullness of a node if it had so much more, and what the plan moves away were gone.
func (d *decider) fullness(n *node, more amounts) int64 {
	leaving := d.leaving[n]
	for i := range more {
		more[i] -= leaving[i]
	}
	return n.share(&more, fine)
}

func (d *decider) threshold() int64 { return int64(d.p.config.RebalanceThreshold) * fine / 100 }

// relieves reports whether a node is less full without a replica.
func (d *decider) relieves(n *node, r *replica) bool {
	var without amounts
	for i, needed := range r.assignment.needs {
		without[i] = -needed
	}
	return d.fullness(n, without) < d.fullness(n, amounts{})
}

// calm reports whether nothing else is under way: nothing waits for a place, no
// revision is being rolled out, no node is being emptied or does not answer, and no
// step is on its way.
func (d *decider) calm() bool {
	p := d.p
	if p.assumed > 0 || len(p.confirmed) > 0 || len(p.waiting.list) > 0 || len(p.rolling.list) > 0 {
		return false
	}
	for _, n := range p.index.slots {
		if n.drains() && !alone(n) || len(n.assigned) > 0 && (n.lost() || n.lease == 0) {
			return false
		}
	}
	return true
}

// movesLeft is what the present interval has left of the budget. Those that were
// moved in it may not be again; where there are any, the look is repeated when that
// changes.
func (d *decider) movesLeft() int {
	p := d.p
	left := int(p.config.RebalanceMoves)
	for _, n := range p.index.slots {
		for _, r := range n.assigned {
			if over := d.settled(r); over > d.nano {
				left--
				if p.rebalanceAt == 0 || over < p.rebalanceAt {
					p.rebalanceAt = over
				}
			}
		}
	}
	return max(0, left)
}

// settled is when the interval ends in which a replica was moved; 0 where it was
// not.
func (d *decider) settled(r *replica) int64 {
	if !r.assignment.rebalanced {
		return 0
	}
	return r.assignment.created + int64(d.p.config.RebalanceIntervalSeconds)*int64(time.Second)
}

func byName(all []*replica) []*replica {
	return slices.SortedFunc(slices.Values(all), func(a, b *replica) int {
		return cmp.Or(cmp.Compare(a.w.id, b.w.id), cmp.Compare(a.number, b.number))
	})
}

// movable reports whether a replica may be moved for no other reason than to even
// the load: one of a service that spreads and has no preferences of its own, whose
// replica may run twice for a moment, and that runs as wanted.
func movable(r *replica) bool {
	want := r.w.want
	return want != nil && want.kind == pb.WorkloadKind_SERVICE && want.desired == pb.DesiredState_DESIRED_RUNNING &&
		!want.exclusive && want.layout.plain() && len(want.wishes) == 0 && want.policy == pb.PlacementPolicy_SPREAD && r.number < want.replicas && r.serves()
}

// rebalance moves the replica that the decider wants away to a node that is better
// for all, if the update strategy has one to spare.
func (b *builder) rebalance() {
	r := b.d.away
	if r == nil || len(b.candidates) > 0 || b.tally.busy || b.spare() <= 0 || b.full() ||
		b.situationOf(r, b.desireOf(r)).action() != keep {
		return
	}
	from := r.assignment.node
	avoid := []string{from.id}
	if t := b.retryOf(r); t != nil {
		avoid = append(avoid, t.failedNodes...)
	}
	// The best place for a replica is not always one that evens the load.
	var to spot
	ok := false
	for range probes {
		if to, ok = b.run.choose(r.number, b.seed(r.number, r), avoid, true); !ok {
			return
		}
		if ok = b.evener(from, to.node); ok {
			break
		}
		avoid = append(avoid, to.node.id)
	}
	if !ok {
		return
	}
	percent := func(n *node) int64 { return (b.d.fullness(n, amounts{})*100 + fine/2) / fine }
	why := fmt.Sprintf("%s%s, which was %d %% full, this one %d %%", rebalancedFrom, from.id, percent(from), percent(to.node))
	b.move(r, to, why, pb.EventType_REBALANCED)
	leaving := b.d.leaving[from]
	for i, n := range r.assignment.needs {
		leaving[i] += n
	}
	b.d.leaving[from] = leaving
}

// evener reports whether a replica that relieves its node is better on another: that
// one is emptier by the threshold, is afterwards not as full as the first was, and
// has fewer replicas of the workload.
func (b *builder) evener(from, to *node) bool {
	d := b.d
	was := d.fullness(from, amounts{})
	return to.class.unloved() <= from.class.unloved() && was-d.fullness(to, amounts{}) >= d.threshold() && d.fullness(to, b.w.want.shape.needs) < was &&
		b.run.holding(to) < b.run.holding(from)
}

// holding is how many replicas of the workload n has.
func (s *run) holding(n *node) int {
	if n.runStamp != s.d.runStamp {
		return 0
	}
	return n.runCount
}
