package scheduler

import (
	"fmt"
	"math/bits"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// run places replicas of one workload in one decision. All of them have the
// same shape, and while a plan is made room only shrinks: a node that was found
// full stays out for the rest of it.
//
// The best cohorts of the workload's layout are searched together: first the
// nodes that hold fewest replicas of it, and among these the emptiest or the
// fullest.
type run struct {
	d      *decider
	w      *workload
	layout *layout
	ready  bool
	// Assignments of others that it relies on, by condition and place.
	known map[string]*replica
	// For each hard condition to be near others, where it is fulfilled.
	allowed []bitset
	// A replica was placed that the next ones have to be near to.
	gathered bool
	// No room can be made for a replica, as of so many placements of the decision and
	// one.
	hopeless int
	// The replica that is being moved.
	lifted *replica
	*scratch
	// Why the node that was last chosen.
	reason string
}

// scratch is what a run needs room for, lent to one after another.
type scratch struct {
	// Slots that are not considered: full ones, and those that hold more of the
	// workload's replicas than the depth of their cohort.
	masked bitset
	// Nodes that hold replicas of the workload.
	crowd []*node
	// By cohort.
	berths []berth
	// Cells that are not searched yet, as a heap; those that are, and their nodes.
	queue, tierCohorts []int32
	tier, own          bitset
	tierSize           int
	// By spread; and by preference for other workloads, the values where they are.
	tallies []tallySpread
	near    []bitset
	// Slots that hard conditions on other workloads forbid.
	barred bitset
	hidden []string
}

func (s *run) prepare() {
	if s.ready {
		return
	}
	s.ready = true
	p := s.d.p
	s.layout, s.scratch = s.w.want.layout, &s.d.scratch
	p.prepareShape(s.w.want.shape)
	p.prepareLayout(s.layout)
	p.stamp++
	s.d.runStamp = p.stamp
	s.crowd = s.crowd[:0]
	for _, r := range s.w.replicas {
		if n := r.assignment.node; n != nil {
			s.holds(n)
		}
		if r.next != nil && r.next.node != nil && r.next.node != r.assignment.node {
			s.holds(r.next.node)
		}
	}
	for _, n := range s.d.planned {
		s.holds(n)
	}
	s.start()
}

// holds counts one more replica of the workload on n.
func (s *run) holds(n *node) {
	if n.runStamp != s.d.runStamp {
		n.runStamp, n.runCount = s.d.runStamp, 0
		s.crowd = append(s.crowd, n)
	}
	n.runCount++
}

// spot is where a replica can go.
type spot struct {
	node      *node
	ports     []*pb.Port
	equipment *equipment
	// Whose room it is so far, and what of the node's room the step frees, these and
	// what others have left of what it freed before.
	victims []*replica
	credit  leftover
}

// choose finds the best node for a replica. The nodes in avoid are left out;
// unless strict, they are taken where nothing else fits.
func (s *run) choose(number int32, seed uint64, avoid []string, strict bool) (spot, bool) {
	s.prepare()
	// What is to be moved does not stand in its own way.
	if r := s.w.find(number); r != nil && r.assignment.mod != 0 && !s.indifferent() {
		s.lift(r, -1)
		defer s.lift(r, 1)
	}
	if len(avoid) > 0 {
		s.hidden = avoid
		s.hide()
		found, ok := s.search(number, seed)
		s.hidden = nil
		s.start()
		if ok || strict {
			return found, ok
		}
	}
	return s.search(number, seed)
}

// lift has a replica that is assigned count for nothing, or count again.
func (s *run) lift(r *replica, sign int32) {
	r.assignment.node.runCount += int(sign)
	s.lifted = nil
	if sign < 0 {
		s.lifted = r
	}
	if r.assignment.reserves {
		s.d.p.countPresence(s.w, r.assignment.node, presence{sign, sign * r.settled()}, false)
	}
	s.start()
}

// indifferent reports whether it matters nothing on how many nodes, and which,
// replicas of the workload and of others are.
func (s *run) indifferent() bool {
	return s.layout.plain() && s.w.want.maxPerNode == 0 && !s.relates()
}

func (s *run) hide() {
	for _, id := range s.hidden {
		if n := s.d.p.nodes[id]; n != nil && n.mod != 0 {
			s.masked.set(n.slot)
		}
	}
}

func (s *run) search(number int32, seed uint64) (spot, bool) {
	p := s.d.p
	if len(p.index.slots) == 0 {
		return spot{}, false
	}
	start := int(mix(s.w.hash^uint64(number)) % uint64(len(p.index.slots)))
	for s.fill() {
		n := s.scan(start)
		if n == nil {
			s.exhaust()
			s.hide()
			continue
		}
		if to, ok := s.settle(n, seed); ok {
			s.reason = s.because(s.cohortOf(n))
			return to, true
		}
		s.reject(n)
	}
	return spot{}, false
}

// because says in a few words why a replica goes to a cohort. There are no more
// such texts than cohorts, for each is kept.
func (s *run) because(c int32) string {
	b := &s.berths[c]
	if b.reason == "" {
		how := "emptiest"
		if s.w.want.policy == pb.PlacementPolicy_BIN_PACK {
			how = "fullest with room"
		}
		b.reason = fmt.Sprintf("%s of %d that match%s", how, s.layout.filter.matching, s.layout.cohorts[c].praise)
		s.eachNear(c, func(h *wish) {
			if h.anti {
				b.reason += "; despite " + h.text()
			} else {
				b.reason += "; near " + h.text()
			}
		})
	}
	return b.reason
}

func (s *run) reject(n *node) {
	s.w.want.shape.full.set(n.slot)
	s.masked.set(n.slot)
}

// placed notes that a replica went to n.
func (s *run) placed(n *node) {
	s.prepare()
	s.d.planned = append(s.d.planned, n)
	s.holds(n)
	if c := s.cohortOf(n); c >= 0 {
		b := &s.berths[c]
		if n.runCount == 1 {
			b.crowd = append(b.crowd, n)
		}
		if n.runCount > b.depth {
			s.masked.set(n.slot)
		}
	}
	s.recount(n)
	s.nearAfter(n)
	s.barAfter(n)
}

// scan is the best node of the tier that is not masked, or nil.
func (s *run) scan(start int) *node {
	x, needs := &s.d.p.index, &s.w.want.shape.needs
	up := s.w.want.policy != pb.PlacementPolicy_BIN_PACK
	if s.tierSize <= probes {
		return s.scanFew(up)
	}
	from, step := 0, 1
	if !up {
		from, step = levels-1, -1
	}
	for l := x.next(from, up); l >= 0; l = x.next(l+step, up) {
		if _, lacks := needs.lacking(&x.levels[l].free); lacks {
			continue
		}
		if n := s.scanLevel(&x.levels[l], start, up); n != nil {
			return n
		}
	}
	return nil
}

// scanFew compares all nodes of a tier that has no more than a search of a level
// compares.
func (s *run) scanFew(emptiest bool) *node {
	shape := s.w.want.shape
	var best *node
	var bestShare int64
	for _, c := range s.tierCohorts {
		for _, slot := range s.layout.cohorts[c].slots {
			n := s.d.p.index.slots[slot]
			if s.masked.has(n.slot) || !n.indexed {
				continue
			}
			if !fits(n, shape) {
				s.reject(n)
				continue
			}
			share := n.share(&shape.needs, fine)
			if best == nil || better(n, share, best, bestShare, emptiest) {
				best, bestShare = n, share
			}
		}
	}
	return best
}

// scanLevel compares the first few nodes of a level that fit, beginning at slot
// start and going round.
func (s *run) scanLevel(l *level, start int, emptiest bool) *node {
	slots := s.d.p.index.slots
	shape := s.w.want.shape
	var best *node
	var bestShare int64
	found, rejected := 0, 0
	words := len(l.members)
	i := start >> 6
	for k := 0; k <= words; k++ {
		w := l.members[i] & s.tier[i] &^ s.masked[i]
		switch k {
		case 0:
			w &= ^uint64(0) << (start & 63)
		case words:
			w &= 1<<(start&63) - 1
		}
		for ; w != 0; w &= w - 1 {
			n := slots[i<<6+bits.TrailingZeros64(w)]
			if !fits(n, shape) {
				s.reject(n)
				rejected++
				continue
			}
			share := n.share(&shape.needs, fine)
			if best == nil || better(n, share, best, bestShare, emptiest) {
				best, bestShare = n, share
			}
			if found++; found == probes {
				return best
			}
		}
		if i++; i == words {
			i = 0
		}
	}
	if best == nil && rejected > l.count/2 {
		s.d.p.index.tighten(l)
	}
	return best
}

// better reports whether a is to be preferred to b. Where they are alike it is
// the one in the lower slot, in which order the nodes of cohorts come.
func better(a *node, shareA int64, b *node, shareB int64, emptiest bool) bool {
	if !emptiest {
		a, shareA, b, shareB = b, shareB, a, shareA
	}
	if shareA != shareB {
		return shareA < shareB
	}
	return a.reserving < b.reserving
}

// fits reports whether there is room on n; whether n matches is for the filter.
func fits(n *node, s *shape) bool {
	if _, lacks := s.needs.lacking(&n.free); lacks {
		return false
	}
	if _, lack := s.filter.equip(n.gear, nil, nil); lack != "" {
		return false
	}
	if len(s.ports) == 0 {
		return true
	}
	_, ok := portsFit(n, s.ports, nil)
	return ok
}

// settle fills in what a replica is given on n, which fits.
func (s *run) settle(n *node, seed uint64) (spot, bool) {
	shape := s.w.want.shape
	ports, ok := choosePorts(n, shape.ports, nil, nil, n.hash^seed)
	if !ok {
		return spot{}, false
	}
	equipment, lack := shape.filter.equip(n.gear, nil, nil)
	return spot{node: n, ports: ports, equipment: equipment}, lack == ""
}

// fitsOn reports whether a replica can go to n, which matches.
func (s *run) fitsOn(n *node, seed uint64) (spot, bool) {
	s.prepare()
	if s.barred.has(n.slot) || !fits(n, s.w.want.shape) {
		return spot{}, false
	}
	return s.settle(n, seed)
}

// fitsInPlace reports whether a new assignment of r can take the place of the
// present one on its node, whose room it then takes over.
func (s *run) fitsInPlace(r *replica, seed uint64) (spot, bool) {
	s.prepare()
	n, shape := r.assignment.node, s.w.want.shape
	if !n.open() || !shape.filter.accepts(n) {
		return spot{}, false
	}
	needs, own, mine := shape.needs, []portUse(nil), (*equipment)(nil)
	if r.assignment.reserves {
		needs, own, mine = needs.beyond(r.assignment.needs), usedPorts(r.assignment.ports), r.assignment.equipment
	}
	if _, lacks := needs.lacking(&n.free); lacks {
		return spot{}, false
	}
	if _, ok := portsFit(n, shape.ports, own); !ok {
		return spot{}, false
	}
	equipment, lack := shape.filter.equip(n.gear, r.assignment.equipment, mine)
	if lack != "" {
		return spot{}, false
	}
	ports, ok := choosePorts(n, shape.ports, r.assignment.ports, own, n.hash^seed)
	return spot{node: n, ports: ports, equipment: equipment}, ok
}

// mix spreads the bits of x (the finalizer of splitmix64).
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}
