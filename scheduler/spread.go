package scheduler

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// Weights are counted in so many parts, so that shares of them can be compared.
	weightScale   = 1_000_000
	defaultWeight = 50
	// More than all preferences together can make up for.
	taintPenalty = 1 << 54
)

// layout is what workloads prefer among the nodes that their filter lets pass.
// The nodes are divided into cohorts by the values of only those labels that the
// preferences look at, so that the score of all nodes of a cohort is one and the
// number of cohorts does not grow with the number of nodes.
type layout struct {
	key        string
	uses       int
	filter     *filter
	affinities []affinity
	spreads    []spread
	// Of the workload's preferences for other workloads, in order; those without a
	// label have each node as a value.
	topologies []axis

	// For which slots and attributes of nodes the rest was computed.
	epoch, attributes uint64
	cohorts           []cohort
	// The cohort of each slot, -1 where the filter lets it not pass; nil where there
	// is one cohort only.
	of []int32
}

type affinity struct {
	constraint
	weight int64
	// No node that matches has it.
	idle bool
}

// axis is a label with the values that nodes have, and the cohorts of each.
type axis struct {
	label   string
	values  map[string]int32
	cohorts [][]int32
}

// spread distributes replicas over the values of a label.
type spread struct {
	axis
	weight  int64
	skew    int32
	targets []*pb.SpreadTarget
}

// cohort is the nodes that are equally good.
type cohort struct {
	// Nil where there is only one cohort, which is all that the filter lets pass.
	slots []int32
	nodes bitset
	// What does not depend on where replicas are.
	score int64
	// The value for each spread and each topology; -1 where the label is missing.
	values []int32
	// What speaks for it, in the words of an explanation.
	praise string
}

// layoutOf finds or makes the layout for what a placement prefers. The caller
// owns one use of it.
func (p *Picture) layoutOf(f *filter, placement *pb.Placement) *layout {
	l := &layout{filter: f, uses: 1}
	key := append([]byte(f.key), 0, 0, 0)
	for _, a := range placement.GetAffinities() {
		weight := int64(defaultWeight)
		if a.Weight != nil {
			weight = int64(*a.Weight)
		}
		c := &pb.Constraint{Label: a.Label, Operator: a.Operator, Values: a.Values}
		l.affinities = append(l.affinities, affinity{constraint: compile(c), weight: weight})
		key = appendConstraint(strconv.AppendInt(key, weight, 10), c)
	}
	for _, s := range placement.GetSpread() {
		weight := int64(cmp.Or(s.Weight, defaultWeight))
		l.spreads = append(l.spreads, spread{axis: axis{label: s.Label}, weight: weight, skew: s.MaxSkew, targets: s.Targets})
		key = strconv.AppendQuote(append(key, 0, 1), s.Label)
		key = strconv.AppendInt(strconv.AppendInt(key, weight, 10), int64(-s.MaxSkew), 10)
		for _, t := range s.Targets {
			key = strconv.AppendInt(strconv.AppendQuote(key, t.Value), int64(t.Percent), 10)
		}
	}
	for _, a := range placement.GetWorkloadAffinities() {
		if a.Weight != 0 {
			l.topologies = append(l.topologies, axis{label: a.Topology})
			key = strconv.AppendQuote(append(key, 0, 2), a.Topology)
		}
	}
	if known := p.layouts[string(key)]; known != nil {
		known.uses++
		return known
	}
	l.key = string(key)
	p.layouts[l.key] = l
	return l
}

func (p *Picture) dropLayout(l *layout) {
	if l.uses--; l.uses == 0 {
		delete(p.layouts, l.key)
	}
}

// plain reports whether all nodes that match are equally good.
func (l *layout) plain() bool { return len(l.affinities)+len(l.spreads)+len(l.topologies) == 0 }

// prepareLayout brings the cohorts up to date with the nodes.
func (p *Picture) prepareLayout(l *layout) {
	p.prepare(l.filter)
	if l.epoch == p.index.epoch && l.attributes == p.attributes {
		return
	}
	l.epoch, l.attributes = p.index.epoch, p.attributes
	for i := range l.affinities {
		l.affinities[i].idle = true
	}
	for i := range l.spreads {
		l.spreads[i].values, l.spreads[i].cohorts = map[string]int32{}, nil
	}
	perNode := false
	for i := range l.topologies {
		l.topologies[i].values, l.topologies[i].cohorts = map[string]int32{}, nil
		perNode = perNode || l.topologies[i].label == ""
	}
	l.cohorts, l.of = l.cohorts[:0], nil
	if l.plain() && p.unloved == 0 {
		l.cohorts = append(l.cohorts, cohort{})
		return
	}
	l.of = make([]int32, len(p.index.slots))
	known := map[string]int32{}
	p.stamp++
	for slot, n := range p.index.slots {
		l.of[slot] = -1
		if !l.filter.eligible.has(slot) {
			continue
		}
		c := n.class
		if c.stamp != p.stamp || perNode {
			c.stamp, c.cohort = p.stamp, l.cohortOf(n, known)
		}
		l.of[slot] = c.cohort
		l.cohorts[c.cohort].slots = append(l.cohorts[c.cohort].slots, int32(slot))
	}
	words := len(l.filter.eligible)
	for i := range l.cohorts {
		if c := &l.cohorts[i]; len(c.slots) > words {
			c.nodes = make(bitset, words)
			for _, slot := range c.slots {
				c.nodes.set(int(slot))
			}
		}
	}
}

// cohortOf finds or makes the cohort that a node belongs to, and with it its
// class unless nodes are told apart.
func (l *layout) cohortOf(n *node, known map[string]int32) int32 {
	c := n.class
	out := cohort{values: make([]int32, 0, len(l.spreads)+len(l.topologies))}
	var key, praise []byte
	for i := range l.affinities {
		a := &l.affinities[i]
		if !a.holds(c.labels) {
			key = append(key, '-')
			continue
		}
		key = append(key, '+')
		a.idle = false
		out.score += a.weight * weightScale
		if a.weight > 0 {
			praise = append(append(praise, "; prefers "...), a.text...)
		} else {
			praise = append(append(praise, "; despite "...), a.text...)
		}
	}
	for _, t := range c.taints {
		if t.Effect == pb.TaintEffect_PREFER_NO_SCHEDULE && !l.filter.tolerates(t) {
			key = append(key, '~')
			out.score -= taintPenalty
			praise = append(append(praise, "; despite taint "...), t.Key...)
		}
	}
	l.eachAxis(func(x *axis) {
		v := x.take(n)
		out.values = append(out.values, v)
		key = strconv.AppendInt(append(key, '='), int64(v), 10)
	})
	at, ok := known[string(key)]
	if ok {
		return at
	}
	at = int32(len(l.cohorts))
	known[string(key)] = at
	var labels []string
	i := 0
	l.eachAxis(func(x *axis) {
		if v := out.values[i]; v >= 0 {
			x.cohorts[v] = append(x.cohorts[v], at)
			if i < len(l.spreads) {
				labels = append(labels, x.label)
			}
		}
		i++
	})
	if len(labels) > 0 {
		out.praise = "; spread over " + strings.Join(labels, ", ")
	}
	out.praise += string(praise)
	l.cohorts = append(l.cohorts, out)
	return at
}

func (l *layout) eachAxis(do func(*axis)) {
	for i := range l.spreads {
		do(&l.spreads[i].axis)
	}
	for i := range l.topologies {
		do(&l.topologies[i])
	}
}

// take is the value of a node that lies in a cohort; -1 where it has none.
func (x *axis) take(n *node) int32 {
	value, there := x.of(n)
	if !there {
		return -1
	}
	v, ok := x.values[value]
	if !ok {
		v = int32(len(x.cohorts))
		x.values[value], x.cohorts = v, append(x.cohorts, nil)
	}
	return v
}

func (x *axis) of(n *node) (string, bool) {
	if x.label == "" {
		return n.id, true
	}
	if n.class == nil {
		return "", false
	}
	value, there := n.class.labels[x.label]
	return value, there
}

// tallySpread is where replicas of a workload are, by the values of a label.
type tallySpread struct {
	// By value: replicas there; a hundredth of how many it should have; whether
	// there is a node that takes new work.
	counts []int32
	shares []int64
	live   []bool
	// For a bound on the skew, those of counts that stay whatever becomes of the
	// plan: what is about to leave counts where it is, but not as being there.
	sure []int32
	// The smallest sure count of a live value, and how many have it.
	least   int32
	atLeast int
}

func (t *tallySpread) reset(s *spread, replicas int32) {
	n := len(s.cohorts)
	t.counts = append(t.counts[:0], make([]int32, n)...)
	t.live = append(t.live[:0], make([]bool, n)...)
	t.sure = append(t.sure[:0], make([]int32, n)...)
	t.shares = t.shares[:0]
	// Less than one replica for each value is no share to fall short of.
	even := max(100, int64(replicas)*100/int64(max(n, 1)))
	if len(s.targets) > 0 {
		others, rest := n, int64(100)
		for _, target := range s.targets {
			rest -= int64(target.Percent)
			if _, there := s.values[target.Value]; there {
				others--
			}
		}
		even = rest * int64(replicas) / int64(max(others, 1))
	}
	for range n {
		t.shares = append(t.shares, even)
	}
	for _, target := range s.targets {
		if v, there := s.values[target.Value]; there {
			t.shares[v] = int64(target.Percent) * int64(replicas)
		}
	}
}

// findLeast is for a label with a bound on the skew.
func (t *tallySpread) findLeast() {
	t.least, t.atLeast = 0, 0
	for v, n := range t.sure {
		switch {
		case !t.live[v]:
		case t.atLeast == 0 || n < t.least:
			t.least, t.atLeast = n, 1
		case n == t.least:
			t.atLeast++
		}
	}
}

// score is how good one more replica is for a value: its whole weight where the
// value has nothing of its share, nothing where it has it.
func (t *tallySpread) score(s *spread, v int32) int64 {
	weight := s.weight * weightScale
	if v < 0 {
		return -weight
	}
	// To be compared is the middle of the next replica, so that shares are
	// rounded to the nearest.
	middle := int64(2*t.counts[v] + 1)
	if t.shares[v] == 0 {
		return -weight * middle
	}
	return weight - weight*50*middle/t.shares[v]
}

// skewed reports whether one more replica for the value is more than the bound
// on the skew allows.
func (t *tallySpread) skewed(s *spread, v int32) bool {
	return s.skew > 0 && (v < 0 || t.counts[v]+1-t.least > s.skew)
}

// valueOf is the value of a node that may lie in no cohort.
func (x *axis) valueOf(n *node) int32 {
	value, there := x.of(n)
	if v, known := x.values[value]; there && known {
		return v
	}
	return -1
}

// berth is how a cohort stands in a run.
type berth struct {
	score int64
	// Nodes that hold more of the workload's replicas than depth are masked.
	depth int
	crowd []*node
	state berthState
	// Where it is in the queue or in the tier.
	at int32
	// Why a replica goes there.
	reason string
}

type berthState uint8

const (
	// No node of it is left.
	berthSpent berthState = iota
	// A hard condition keeps replicas away for now.
	berthBarred
	berthQueued
	// It is one of the best, which are searched together.
	berthTier
)

// ahead reports whether cohort a is to be searched before cohort b: by score, then
// by how many replicas its nodes hold.
func (s *run) ahead(a, b int32) int {
	x, y := &s.berths[a], &s.berths[b]
	if c := cmp.Compare(y.score, x.score); c != 0 {
		return c
	}
	return cmp.Compare(x.depth, y.depth)
}

// start makes all that depends on where replicas are: counts, berths, masks and
// the first tier.
func (s *run) start() {
	p, l := s.d.p, s.layout
	s.masked = s.masked.sized(len(p.index.slots))
	copy(s.masked, s.w.want.shape.full)
	if cap(s.berths) < len(l.cohorts) {
		s.berths = make([]berth, len(l.cohorts))
	}
	s.berths = s.berths[:len(l.cohorts)]
	for i := range s.berths {
		b := &s.berths[i]
		*b = berth{crowd: b.crowd[:0]}
	}
	s.bar()
	s.count()
	s.countNear()
	for _, n := range s.crowd {
		if n.mod == 0 || n.runCount == 0 {
			continue
		}
		if c := s.cohortOf(n); c >= 0 {
			s.berths[c].crowd = append(s.berths[c].crowd, n)
		}
		s.masked.set(n.slot)
	}
	s.queue, s.tierCohorts, s.tierSize = s.queue[:0], s.tierCohorts[:0], 0
	if l.of != nil {
		s.own = s.own.sized(len(p.index.slots))
	}
	best, alike := int32(-1), 0
	for i := range s.berths {
		c := int32(i)
		s.berths[i].score, s.berths[i].state = s.score(c)
		if s.berths[i].state == berthBarred {
			continue
		}
		switch {
		case best < 0 || s.ahead(c, best) < 0:
			best, alike = c, 1
		case s.ahead(c, best) == 0:
			alike++
		}
	}
	if alike == len(l.cohorts) && l.of != nil {
		s.enterAll()
		return
	}
	for i := range s.berths {
		switch c := int32(i); {
		case s.berths[i].state != berthQueued:
		case s.ahead(c, best) == 0:
			s.enter(c)
		default:
			s.push(c)
		}
	}
}

// count takes stock of the values where replicas are.
func (s *run) count() {
	l := s.layout
	for len(s.tallies) < len(l.spreads) {
		s.tallies = append(s.tallies, tallySpread{})
	}
	for i := range l.spreads {
		sp, t := &l.spreads[i], &s.tallies[i]
		t.reset(sp, s.w.want.replicas)
		for _, n := range s.crowd {
			if v := sp.valueOf(n); v >= 0 {
				t.counts[v] += int32(n.runCount)
			}
		}
		for _, n := range s.d.departed[s.d.earlier:] {
			if v := sp.valueOf(n); v >= 0 {
				t.counts[v]--
			}
		}
		if sp.skew == 0 {
			continue
		}
		for v, cohorts := range sp.cohorts {
			t.live[v] = slices.ContainsFunc(cohorts, func(c int32) bool {
				return slices.ContainsFunc(l.cohorts[c].slots, func(slot int32) bool { return s.d.p.index.slots[slot].open() })
			})
		}
		s.eachSure(func(n *node, d int32) {
			if v := sp.valueOf(n); v >= 0 {
				t.sure[v] += d
			}
		})
		t.findLeast()
	}
}

// eachSure calls do for the nodes where replicas of the workload will be when
// all is done that was decided.
func (s *run) eachSure(do func(n *node, d int32)) {
	for _, r := range s.w.replicas {
		switch n := r.assignment.node; {
		case r == s.lifted || s.d.victims[r] != nil:
		case r.next != nil && r.next.gone:
		case r.next != nil && r.next.node != nil:
			do(r.next.node, 1)
		case n != nil:
			do(n, 1)
		}
	}
	for _, n := range s.d.planned {
		do(n, 1)
	}
	for _, n := range s.d.departed {
		do(n, -1)
	}
}

// depart notes that a replica of the workload goes from n. For later steps it counts
// there, for they may be carried out though this one is refused.
func (s *run) depart(n *node) {
	s.d.departed = append(s.d.departed, n)
	if !s.ready {
		return
	}
	for i := range s.layout.spreads {
		sp, t := &s.layout.spreads[i], &s.tallies[i]
		v := sp.valueOf(n)
		if v < 0 {
			continue
		}
		t.counts[v]--
		if sp.skew == 0 {
			for _, c := range sp.cohorts[v] {
				s.rescore(c)
			}
			continue
		}
		t.sure[v]--
		t.findLeast()
		for c := range s.berths {
			s.rescore(int32(c))
		}
	}
}

// cohortOf is the cohort that a node lies in, or -1.
func (s *run) cohortOf(n *node) int32 {
	if s.layout.of == nil {
		return 0
	}
	return s.layout.of[n.slot]
}

// score is how good the nodes of a cohort are, as things stand.
func (s *run) score(c int32) (int64, berthState) {
	from := &s.layout.cohorts[c]
	total := from.score
	for i := range s.layout.spreads {
		sp, t := &s.layout.spreads[i], &s.tallies[i]
		if t.skewed(sp, from.values[i]) {
			return 0, berthBarred
		}
		total += t.score(sp, from.values[i])
	}
	s.eachNear(c, func(h *wish) {
		if h.anti {
			total -= h.weight * weightScale
		} else {
			total += h.weight * weightScale
		}
	})
	return total, berthQueued
}

// recount takes one more replica on n into the scores.
func (s *run) recount(n *node) {
	for i := range s.layout.spreads {
		sp, t := &s.layout.spreads[i], &s.tallies[i]
		v := sp.valueOf(n)
		if v < 0 {
			continue
		}
		t.counts[v]++
		t.sure[v]++
		if sp.skew > 0 && t.live[v] && t.sure[v] == t.least+1 {
			if t.atLeast--; t.atLeast == 0 {
				t.findLeast()
				for c := range s.berths {
					s.rescore(int32(c))
				}
				continue
			}
		}
		for _, c := range sp.cohorts[v] {
			s.rescore(c)
		}
	}
}

// rescore moves a cohort to where its score says.
func (s *run) rescore(c int32) {
	b := &s.berths[c]
	b.reason = ""
	if b.state == berthSpent {
		return
	}
	score, state := s.score(c)
	switch {
	case state == berthBarred && b.state == berthBarred:
	case state == berthBarred:
		s.withdraw(c)
		b.state = berthBarred
	case b.state == berthBarred:
		b.score = score
		s.push(c)
	case score != b.score:
		s.withdraw(c)
		b.score = score
		s.push(c)
	}
}

// withdraw takes a cohort out of the queue or the tier.
func (s *run) withdraw(c int32) {
	b := &s.berths[c]
	switch b.state {
	case berthQueued:
		last := int32(len(s.queue) - 1)
		at := b.at
		s.swap(at, last)
		s.queue = s.queue[:last]
		if at < last {
			s.sink(at)
			s.rise(at)
		}
	case berthTier:
		last := len(s.tierCohorts) - 1
		moved := s.tierCohorts[last]
		s.tierCohorts[b.at], s.berths[moved].at = moved, b.at
		s.tierCohorts = s.tierCohorts[:last]
		s.cover(c, false)
	}
	b.state = berthSpent
}

// enter makes a cohort part of the tier.
func (s *run) enter(c int32) {
	b := &s.berths[c]
	b.state, b.at = berthTier, int32(len(s.tierCohorts))
	s.tierCohorts = append(s.tierCohorts, c)
	s.cover(c, true)
}

// enterAll makes all cohorts the tier, which is what the filter lets pass.
func (s *run) enterAll() {
	for i := range s.berths {
		s.berths[i].state, s.berths[i].at = berthTier, int32(i)
		s.tierCohorts = append(s.tierCohorts, int32(i))
	}
	copy(s.own, s.layout.filter.eligible)
	s.tier, s.tierSize = s.own, s.layout.filter.matching
}

// cover adds the nodes of a cohort to the tier's, or takes them away. One cohort
// that is everything is not copied.
func (s *run) cover(c int32, add bool) {
	from := &s.layout.cohorts[c]
	if from.slots == nil {
		s.tier, s.tierSize = s.layout.filter.eligible, len(s.layout.filter.eligible)*64
		return
	}
	s.tier = s.own
	switch {
	case add && from.nodes != nil:
		for i, w := range from.nodes {
			s.own[i] |= w
		}
	case add:
		for _, slot := range from.slots {
			s.own.set(int(slot))
		}
	case from.nodes != nil:
		for i, w := range from.nodes {
			s.own[i] &^= w
		}
	default:
		for _, slot := range from.slots {
			s.own.clear(int(slot))
		}
	}
	if add {
		s.tierSize += len(from.slots)
	} else {
		s.tierSize -= len(from.slots)
	}
}

// fill makes the tier that of the best cohorts; false where no cohort is left.
func (s *run) fill() bool {
	for len(s.queue) > 0 {
		top := s.queue[0]
		if len(s.tierCohorts) > 0 {
			switch c := s.ahead(top, s.tierCohorts[0]); {
			case c > 0:
				return true
			case c < 0:
				for len(s.tierCohorts) > 0 {
					worse := s.tierCohorts[0]
					s.withdraw(worse)
					s.push(worse)
				}
			}
		}
		s.withdraw(top)
		s.enter(top)
	}
	return len(s.tierCohorts) > 0
}

// exhaust deals with a tier in which nothing was found: its cohorts admit nodes
// that hold more replicas, or are spent.
func (s *run) exhaust() {
	for len(s.tierCohorts) > 0 {
		c := s.tierCohorts[0]
		s.withdraw(c)
		if s.deepen(&s.berths[c]) {
			s.push(c)
		}
	}
}

// deepen admits the nodes of a cohort that hold the next higher number of
// replicas.
func (s *run) deepen(b *berth) bool {
	most := int(s.w.want.maxPerNode)
	next := 0
	for _, n := range b.crowd {
		if n.runCount > b.depth && (most == 0 || n.runCount < most) && s.admits(n.slot) && (next == 0 || n.runCount < next) {
			next = n.runCount
		}
	}
	if next == 0 {
		return false
	}
	b.depth = next
	for _, n := range b.crowd {
		if n.runCount <= next && s.admits(n.slot) {
			s.masked.clear(n.slot)
		}
	}
	return true
}

// The queue is a heap.

func (s *run) push(c int32) {
	s.berths[c].state, s.berths[c].at = berthQueued, int32(len(s.queue))
	s.queue = append(s.queue, c)
	s.rise(s.berths[c].at)
}

func (s *run) swap(i, j int32) {
	s.queue[i], s.queue[j] = s.queue[j], s.queue[i]
	s.berths[s.queue[i]].at, s.berths[s.queue[j]].at = i, j
}

func (s *run) rise(i int32) {
	for i > 0 {
		up := (i - 1) / 2
		if s.ahead(s.queue[i], s.queue[up]) >= 0 {
			return
		}
		s.swap(i, up)
		i = up
	}
}

func (s *run) sink(i int32) {
	for {
		down := 2*i + 1
		if down >= int32(len(s.queue)) {
			return
		}
		if down+1 < int32(len(s.queue)) && s.ahead(s.queue[down+1], s.queue[down]) < 0 {
			down++
		}
		if s.ahead(s.queue[i], s.queue[down]) <= 0 {
			return
		}
		s.swap(i, down)
		i = down
	}
}
