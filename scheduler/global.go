package scheduler

import (
	"cmp"
	"math/bits"
	"slices"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// global decides about a workload that has one replica on each matching node.
// The replicas are numbered in the order in which they came. They never move:
// one leaves with its node, and one on a node that does not answer stays
// assigned and counts for nothing until the node comes back.
func (b *builder) global() {
	p, f := b.d.p, b.w.want.shape.filter
	p.prepare(f)
	p.stamp++
	covered := p.stamp
	b.beginRollout()
	taken := make([]int32, 0, len(b.w.replicas))
	for _, r := range b.w.replicas {
		taken = append(taken, r.number)
		b.globalReplica(r, covered)
		b.done()
	}
	for _, n := range missing(p, f, covered) {
		b.tally.desired++
		if b.full() {
			continue
		}
		to, ok := b.run.fitsOn(n, mix(b.w.hash^n.hash))
		if !ok {
			to, ok = b.preempt(0, nil, nil, n)
		}
		if !ok {
			b.tally.pending++
			b.waiting = true
			continue
		}
		number := firstFree(&taken)
		explanation := "one on each node that matches"
		if len(to.victims) > 0 {
			explanation += ", " + b.run.explain(&to)
		}
		b.assign(number, nil, to, explanation)
		b.tally.assigned++
		b.tally.scheduled++
		b.say(note{kind: pb.EventType_WORKLOAD_SCHEDULED, verb: verbPlaced, number: number, node: n.id})
		b.done()
	}
	b.judgeRollout()
	b.replaceServing()
}

func (b *builder) globalReplica(r *replica, covered uint64) {
	if b.d.victims[r] != nil {
		b.again, b.tally.busy = true, true
		r.assignment.node.coverStamp = covered
		return
	}
	if next := r.next; next != nil {
		b.tally.busy = true
		if n := cmp.Or(next.node, r.assignment.node); n != nil && !next.gone {
			n.coverStamp = covered
		}
		return
	}
	if r.assignment.mod == 0 {
		b.reconcile(r, wantGone)
		if n := r.observed.node; n != nil && b.exclusive(r) && !n.lost() {
			n.coverStamp = covered
		}
		return
	}
	r.assignment.node.coverStamp = covered
	b.reconcile(r, b.desireOf(r))
}

// missing are the open nodes that match and are not covered, by name.
func missing(p *Picture, f *filter, covered uint64) []*node {
	var out []*node
	for i, w := range f.eligible {
		for ; w != 0; w &= w - 1 {
			if n := p.index.slots[i<<6+bits.TrailingZeros64(w)]; n.open() && n.coverStamp != covered {
				out = append(out, n)
			}
		}
	}
	slices.SortFunc(out, func(a, b *node) int { return cmp.Compare(a.id, b.id) })
	return out
}

// firstFree takes the lowest number that is not in taken, which is sorted.
func firstFree(taken *[]int32) int32 {
	at := 0
	for at < len(*taken) && (*taken)[at] == int32(at) {
		at++
	}
	*taken = slices.Insert(*taken, at, int32(at))
	return int32(at)
}
