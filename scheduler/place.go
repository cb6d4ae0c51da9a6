package scheduler

import (
	"fmt"
	"math/bits"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// run places replicas of one workload in one decision. All of them have the
// same shape, and while a plan is made room only shrinks: a node that was found
// full stays out for the rest of it.
type run struct {
	d     *decider
	w     *workload
	ready bool
	// Nothing fits any more, wherever.
	exhausted bool
	// Slots that are not considered: full ones, and those that hold more of the
	// workload's replicas than depth.
	masked bitset
	depth  int
	// Nodes that hold replicas of the workload.
	crowd []*node
	// In a few words, why a node was chosen.
	reason string
}

func (s *run) prepare() {
	if s.ready {
		return
	}
	s.ready = true
	p := s.d.p
	shape := s.w.want.shape
	p.prepareShape(shape)
	p.stamp++
	s.d.runStamp = p.stamp
	s.crowd = s.d.crowd[:0]
	for _, r := range s.w.replicas {
		if n := r.assignment.node; n != nil {
			s.holds(n)
		}
		if r.next != nil && r.next.node != nil && r.next.node != r.assignment.node {
			s.holds(r.next.node)
		}
	}
	s.masked = s.d.masked.sized(len(p.index.slots))
	s.d.masked = s.masked
	s.mask()
	how := "emptiest"
	if s.w.want.policy == pb.PlacementPolicy_BIN_PACK {
		how = "fullest with room"
	}
	s.reason = fmt.Sprintf("%s of %d that match", how, shape.filter.matching)
}

// endRun gives back what the run was lent.
func (b *builder) endRun() {
	if b.run.ready {
		b.d.crowd = b.run.crowd[:0]
	}
}

// holds counts one more replica of the workload on n.
func (s *run) holds(n *node) {
	if n.runStamp != s.d.runStamp {
		n.runStamp, n.runCount = s.d.runStamp, 0
		s.crowd = append(s.crowd, n)
	}
	n.runCount++
}

func (s *run) mask() {
	copy(s.masked, s.w.want.shape.full)
	for _, n := range s.crowd {
		if n.mod != 0 && n.runCount > s.depth {
			s.masked.set(n.slot)
		}
	}
}

// deepen admits the nodes that hold the next higher number of replicas.
func (s *run) deepen() bool {
	full := s.w.want.shape.full
	next := 0
	for _, n := range s.crowd {
		if n.mod != 0 && n.runCount > s.depth && !full.has(n.slot) && (next == 0 || n.runCount < next) {
			next = n.runCount
		}
	}
	if next == 0 {
		return false
	}
	s.depth = next
	s.mask()
	return true
}

// spot is where a replica can go.
type spot struct {
	node  *node
	ports []*pb.Port
	// Whose room it is so far, and what of the node's room the step frees, these and
	// what others have left of what it freed before.
	victims []*replica
	credit  leftover
}

// choose finds the best node for a replica: one that holds fewest replicas of
// the workload, then the emptiest or the fullest. The nodes in avoid are left
// out; unless strict, they are taken where nothing else fits.
func (s *run) choose(number int32, seed uint64, avoid []string, strict bool) (spot, bool) {
	s.prepare()
	if s.exhausted {
		return spot{}, false
	}
	if len(avoid) > 0 {
		depth := s.depth
		s.hide(avoid)
		found, ok := s.search(number, seed, avoid)
		s.depth = depth
		s.mask()
		if ok || strict {
			return found, ok
		}
	}
	found, ok := s.search(number, seed, nil)
	s.exhausted = !ok
	return found, ok
}

func (s *run) hide(ids []string) {
	for _, id := range ids {
		if n := s.d.p.nodes[id]; n != nil && n.mod != 0 {
			s.masked.set(n.slot)
		}
	}
}

func (s *run) search(number int32, seed uint64, hidden []string) (spot, bool) {
	p := s.d.p
	if len(p.index.slots) == 0 {
		return spot{}, false
	}
	wishes := s.w.want.shape.ports
	for {
		n := s.scan(int(mix(s.w.hash^uint64(number)) % uint64(len(p.index.slots))))
		if n == nil {
			if !s.deepen() {
				return spot{}, false
			}
			s.hide(hidden)
			continue
		}
		if ports, ok := choosePorts(n, wishes, nil, nil, n.hash^seed); ok {
			return spot{node: n, ports: ports}, true
		}
		s.reject(n)
	}
}

func (s *run) reject(n *node) {
	s.w.want.shape.full.set(n.slot)
	s.masked.set(n.slot)
}

// placed notes that a replica went to n.
func (s *run) placed(n *node) {
	s.prepare()
	s.holds(n)
	if n.runCount > s.depth {
		s.masked.set(n.slot)
	}
}

// scan is the best node that is not masked, or nil.
func (s *run) scan(start int) *node {
	x, needs := &s.d.p.index, &s.w.want.shape.needs
	up := s.w.want.policy != pb.PlacementPolicy_BIN_PACK
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
		w := l.members[i] & shape.filter.eligible[i] &^ s.masked[i]
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
	if len(s.ports) == 0 {
		return true
	}
	_, ok := portsFit(n, s.ports, nil)
	return ok
}

// fitsOn reports whether a replica can go to n, which matches.
func (s *run) fitsOn(n *node, seed uint64) (spot, bool) {
	s.prepare()
	if !fits(n, s.w.want.shape) {
		return spot{}, false
	}
	ports, ok := choosePorts(n, s.w.want.shape.ports, nil, nil, n.hash^seed)
	return spot{node: n, ports: ports}, ok
}

// fitsInPlace reports whether a new assignment of r can take the place of the
// present one on its node, whose room it then takes over.
func (s *run) fitsInPlace(r *replica, seed uint64) (spot, bool) {
	s.prepare()
	n, shape := r.assignment.node, s.w.want.shape
	if !n.open() || !shape.filter.accepts(n) {
		return spot{}, false
	}
	needs, own := shape.needs, []portUse(nil)
	if r.assignment.reserves {
		needs, own = needs.beyond(r.assignment.needs), usedPorts(r.assignment.ports)
	}
	if _, lacks := needs.lacking(&n.free); lacks {
		return spot{}, false
	}
	if _, ok := portsFit(n, shape.ports, own); !ok {
		return spot{}, false
	}
	ports, ok := choosePorts(n, shape.ports, r.assignment.ports, own, n.hash^seed)
	return spot{node: n, ports: ports}, ok
}

// mix spreads the bits of x (the finalizer of splitmix64).
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}
