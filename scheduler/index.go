package scheduler

import (
	"cmp"
	"math/bits"
	"slices"
)

const (
	// Nodes are kept in levels of fullness; a level is so many parts of a node.
	levels = 256
	// So many nodes of the best level are compared in detail.
	probes = 8
	// Fullness inside a level is compared in parts of this.
	fine = 1 << 20
)

// index finds the emptiest or the fullest node that fits without looking at
// the others. The open nodes are kept in levels by how full they are, and each
// level is a set of slots, so that "in this level, allowed by the filter, not
// taken yet" is an intersection of words.
//
// Slots are in the order of the nodes' hashes and nothing else: the answer
// depends on what the picture holds and never on how it came to be. Tried and
// dropped: a tournament tree over the slots, which finds the emptiest node just
// as fast, but degenerates to a scan when asked for the fullest that still fits.
type index struct {
	// Nodes with a record, by hash.
	slots  []*node
	levels [levels]level
	// Which levels have members.
	occupied [levels / 64]uint64
	// Nodes came or went: slots and levels are rebuilt before the next use.
	stale bool
	// Counts rebuilds: sets of slots made before are void.
	epoch uint64
}

type level struct {
	members bitset
	count   int
	// No member has more free than this in a dimension. An upper bound: it is
	// tightened when the level is searched in vain.
	free amounts
}

// rebuild makes slots and levels anew where nodes came or went.
func (x *index) rebuild(nodes map[string]*node) {
	if !x.stale {
		return
	}
	x.stale = false
	x.epoch++
	x.slots = x.slots[:0]
	for _, id := range sortedKeys(nodes) {
		n := nodes[id]
		n.indexed = false
		if n.mod != 0 {
			x.slots = append(x.slots, n)
		}
	}
	slices.SortFunc(x.slots, func(a, b *node) int {
		if c := cmp.Compare(a.hash, b.hash); c != 0 {
			return c
		}
		return cmp.Compare(a.id, b.id)
	})
	x.occupied = [levels / 64]uint64{}
	for i := range x.levels {
		x.levels[i] = level{members: x.levels[i].members.sized(len(x.slots))}
	}
	for i, n := range x.slots {
		n.slot = i
		x.update(n)
	}
}

// update puts n where it belongs now.
func (x *index) update(n *node) {
	if x.stale {
		return
	}
	open := n.open()
	to := int(n.share(&amounts{}, levels-1))
	if n.indexed && (!open || to != n.level) {
		l := &x.levels[n.level]
		l.members.clear(n.slot)
		if l.count--; l.count == 0 {
			l.free = amounts{}
			x.occupied[n.level>>6] &^= 1 << (n.level & 63)
		}
		n.indexed = false
	}
	if !open {
		return
	}
	l := &x.levels[to]
	if !n.indexed {
		n.indexed, n.level = true, to
		l.members.set(n.slot)
		l.count++
		x.occupied[to>>6] |= 1 << (to & 63)
	}
	for d := range l.free {
		l.free[d] = max(l.free[d], n.free[d])
	}
}

// tighten makes the level's bound exact again.
func (x *index) tighten(l *level) {
	l.free = amounts{}
	for i, w := range l.members {
		for ; w != 0; w &= w - 1 {
			n := x.slots[i<<6+bits.TrailingZeros64(w)]
			for d := range l.free {
				l.free[d] = max(l.free[d], n.free[d])
			}
		}
	}
}

// next is the nearest level with members at or after l in the given direction,
// or -1.
func (x *index) next(l int, up bool) int {
	for l >= 0 && l < levels {
		w := x.occupied[l>>6]
		if up {
			if w >>= l & 63; w != 0 {
				return l + bits.TrailingZeros64(w)
			}
			l = (l>>6 + 1) << 6
		} else {
			if w <<= 63 - l&63; w != 0 {
				return l - bits.LeadingZeros64(w)
			}
			l = l>>6<<6 - 1
		}
	}
	return -1
}
