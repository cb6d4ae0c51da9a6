package scheduler

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// term is workloads that affinities speak of, what counts as one place, and
// where replicas are. Affinities that say the same share one. It is kept up to
// date with each assignment; where there are no terms, that costs nothing.
type term struct {
	key  string
	uses int
	// The one workload, or all that have these labels ("k=v", sorted).
	workload string
	labels   []string
	// A node's label; empty: each node is a place of its own.
	topology string

	// Replicas of the workloads that it speaks of, and replicas of those that
	// keep these away by a hard condition.
	targets, repellers census
	// Somewhere the first replica came or the last one went.
	changed bool
}

// wish is a workload's affinity; with weight 0 it is a hard condition.
type wish struct {
	*term
	anti   bool
	weight int64
}

func (t *term) text() string {
	if t.workload != "" {
		return t.workload
	}
	return strings.Join(t.labels, ",")
}

func (t *term) selects(w *workload) bool {
	if t.workload != "" {
		return t.workload == w.id
	}
	return !slices.ContainsFunc(t.labels, func(l string) bool {
		_, has := slices.BinarySearch(w.labels, l)
		return !has
	})
}

// place is what of the topology n is: its label, or itself.
func (t *term) place(n *node) (string, bool) {
	if t.topology == "" {
		return n.id, n.mod != 0
	}
	if n.class == nil {
		return "", false
	}
	value, there := n.class.labels[t.topology]
	return value, there
}

// presence is how many replicas are somewhere. Settled are those whose
// assignment is stored and not about to change.
type presence struct{ all, settled int32 }

func (p *presence) add(q presence) {
	p.all += q.all
	p.settled += q.settled
}

// census is where replicas are: by node, and by place, which is computed anew
// where nodes' labels have changed.
type census struct {
	total presence
	nodes []censusEntry
	at    map[*node]int32

	places     map[string]presence
	attributes uint64
}

type censusEntry struct {
	node *node
	presence
}

// add reports whether n has its first replica with it, or has lost its last one.
func (c *census) add(p *Picture, t *term, n *node, d presence) bool {
	c.total.add(d)
	i, known := c.at[n]
	if !known {
		if c.at == nil {
			c.at = map[*node]int32{}
		}
		i = int32(len(c.nodes))
		c.nodes, c.at[n] = append(c.nodes, censusEntry{node: n}), i
	}
	e := &c.nodes[i]
	before := e.presence
	e.add(d)
	after := e.presence
	if place, ok := t.place(n); ok && c.attributes == p.attributes && c.places != nil {
		there := c.places[place]
		if there.add(d); there == (presence{}) {
			delete(c.places, place)
		} else {
			c.places[place] = there
		}
	}
	if after == (presence{}) {
		last := c.nodes[len(c.nodes)-1]
		c.nodes[i], c.at[last.node] = last, i
		c.nodes = c.nodes[:len(c.nodes)-1]
		delete(c.at, n)
	}
	return (before.all == 0) != (after.all == 0) || (before.settled == 0) != (after.settled == 0)
}

// near is how many are in the place that n belongs to.
func (c *census) near(p *Picture, t *term, n *node) presence {
	if c.places == nil || c.attributes != p.attributes {
		c.places, c.attributes = map[string]presence{}, p.attributes
		for i := range c.nodes {
			if place, ok := t.place(c.nodes[i].node); ok {
				there := c.places[place]
				there.add(c.nodes[i].presence)
				c.places[place] = there
			}
		}
	}
	place, ok := t.place(n)
	if !ok {
		return presence{}
	}
	return c.places[place]
}

// wishesOf are the affinities of a placement to workloads. The caller owns a
// use of each term.
func (p *Picture) wishesOf(placement *pb.Placement) []wish {
	var out []wish
	for _, a := range placement.GetWorkloadAffinities() {
		out = append(out, wish{term: p.termOf(a), anti: a.Anti, weight: int64(a.Weight)})
	}
	return out
}

func (p *Picture) termOf(a *pb.WorkloadAffinity) *term {
	t := &term{workload: a.Workload, labels: labelPairs(a.Labels), topology: a.Topology, uses: 1}
	key := strconv.AppendQuote(strconv.AppendQuote(nil, t.workload), t.topology)
	for _, l := range t.labels {
		key = strconv.AppendQuote(key, l)
	}
	t.key = string(key)
	if known := p.terms[t.key]; known != nil {
		known.uses++
		return known
	}
	p.terms[t.key] = t
	p.selectors[t.selector()] = append(p.selectors[t.selector()], t)
	if t.workload != "" {
		if w := p.workloads[t.workload]; w != nil {
			p.relate(w)
		}
		return t
	}
	for _, w := range p.labelled[t.labels[0]] {
		p.relate(w)
	}
	return t
}

func (p *Picture) dropTerm(t *term) {
	if t.uses--; t.uses > 0 {
		return
	}
	delete(p.terms, t.key)
	s := t.selector()
	if p.selectors[s] = slices.DeleteFunc(p.selectors[s], func(o *term) bool { return o == t }); len(p.selectors[s]) == 0 {
		delete(p.selectors, s)
	}
	forget := func(w *workload) {
		w.matches = slices.DeleteFunc(w.matches, func(o *term) bool { return o == t })
		if p.waiting.has(w) {
			// It may have been kept away by who does not mind any more.
			p.touch(w)
		}
	}
	if t.workload != "" {
		if w := p.workloads[t.workload]; w != nil {
			forget(w)
		}
		return
	}
	for _, w := range p.labelled[t.labels[0]] {
		forget(w)
	}
}

// selector is by what workloads find the terms that may select them: an id, or
// one label, in which no "=" can be missing.
func (t *term) selector() string {
	if t.workload != "" {
		return t.workload
	}
	return t.labels[0]
}

func labelPairs(labels map[string]string) []string {
	if len(labels) == 0 {
		return nil
	}
	pairs := make([]string, 0, len(labels))
	for _, k := range sortedKeys(labels) {
		pairs = append(pairs, k+"="+labels[k])
	}
	slices.Sort(pairs)
	return pairs
}

// relabel takes in the labels that a workload has now.
func (p *Picture) relabel(w *workload, labels []string) {
	if slices.Equal(w.labels, labels) {
		return
	}
	for i, l := range w.labels {
		list := p.labelled[l]
		last := list[len(list)-1]
		j, _ := slices.BinarySearch(last.labels, l)
		list[w.labelledAt[i]], last.labelledAt[j] = last, w.labelledAt[i]
		list[len(list)-1] = nil
		if p.labelled[l] = list[:len(list)-1]; len(list) == 1 {
			delete(p.labelled, l)
		}
	}
	w.labels, w.labelledAt = labels, make([]int32, len(labels))
	for i, l := range labels {
		w.labelledAt[i] = int32(len(p.labelled[l]))
		p.labelled[l] = append(p.labelled[l], w)
	}
}

// relate finds the terms that a workload matters to, and counts its replicas
// with them.
func (p *Picture) relate(w *workload) {
	var matches, repels []*term
	if len(p.terms) > 0 {
		matches = slices.Concat(nil, p.selectors[w.id])
		for _, l := range w.labels {
			for _, t := range p.selectors[l] {
				if t.selects(w) {
					matches = append(matches, t)
				}
			}
		}
	}
	if w.want != nil {
		for _, h := range w.want.wishes {
			if h.anti && h.weight == 0 && !slices.Contains(repels, h.term) {
				repels = append(repels, h.term)
			}
		}
	}
	if len(w.matches)+len(w.repels)+len(matches)+len(repels) == 0 {
		return
	}
	p.countAll(w, -1)
	w.matches, w.repels = matches, repels
	p.countAll(w, 1)
}

func (p *Picture) countAll(w *workload, sign int32) {
	for _, r := range w.replicas {
		if r.assignment.reserves {
			p.countPresence(w, r.assignment.node, presence{sign, sign * r.settled()}, true)
		}
		if r.next != nil && r.next.reserves {
			p.countPresence(w, r.next.node, presence{all: sign}, true)
		}
	}
}

// settled is 1 where nothing that is assumed is about to change the assignment.
func (r *replica) settled() int32 {
	if r.next == nil {
		return 1
	}
	return 0
}

// countPresence counts replicas of w on n with the terms that they matter to.
// What waits is woken where it may matter to that, if told.
func (p *Picture) countPresence(w *workload, n *node, d presence, tell bool) {
	note := func(t *term, changed bool) {
		if changed && tell && !t.changed {
			t.changed = true
			p.changedTerms = append(p.changedTerms, t)
		}
	}
	for _, t := range w.matches {
		note(t, t.targets.add(p, t, n, d))
	}
	for _, t := range w.repels {
		note(t, t.repellers.add(p, t, n, d))
	}
}

// wakeForAffinity wakes the waiting workloads that look at where replicas are
// that came or went.
func (p *Picture) wakeForAffinity() {
	if len(p.changedTerms) == 0 {
		return
	}
	changed := func(t *term) bool { return t.changed }
	for _, w := range p.waiting.list {
		if slices.ContainsFunc(w.matches, changed) || w.want != nil && slices.ContainsFunc(w.want.wishes, func(h wish) bool { return h.changed }) {
			p.touch(w)
		}
	}
	for _, t := range p.changedTerms {
		t.changed = false
	}
	clear(p.changedTerms)
	p.changedTerms = p.changedTerms[:0]
}

// slotsBy are the slots of nodes by the values of a label.
type slotsBy struct {
	epoch, attributes uint64
	values            map[string][]int32
}

func (p *Picture) slotsOf(label, value string) []int32 {
	by := p.groups[label]
	if by == nil {
		by = &slotsBy{}
		p.groups[label] = by
	}
	if by.epoch != p.index.epoch || by.attributes != p.attributes {
		*by = slotsBy{epoch: p.index.epoch, attributes: p.attributes, values: map[string][]int32{}}
		for slot, n := range p.index.slots {
			if v, there := n.class.labels[label]; there {
				by.values[v] = append(by.values[v], int32(slot))
			}
		}
	}
	return by.values[value]
}

// each calls do for the slots that are one place with n.
func (t *term) each(p *Picture, n *node, do func(slot int)) {
	place, ok := t.place(n)
	switch {
	case !ok:
	case t.topology == "":
		do(n.slot)
	default:
		for _, slot := range p.slotsOf(t.topology, place) {
			do(int(slot))
		}
	}
}

// places calls do for all slots of places where the census has replicas that
// count.
func (t *term) places(p *Picture, c *census, counts func(*censusEntry) bool, do func(slot int)) {
	seen := map[string]bool{}
	for i := range c.nodes {
		e := &c.nodes[i]
		if place, ok := t.place(e.node); ok && !seen[place] && counts(e) {
			seen[place] = true
			t.each(p, e.node, do)
		}
	}
}

func anyone(e *censusEntry) bool { return e.all > 0 }

// stays leaves out replicas that have to leave their node: they are nothing to
// be near to.
func stays(e *censusEntry) bool { return e.all > 0 && !e.node.lost() && !e.node.drains() }

func staysSettled(e *censusEntry) bool { return e.settled > 0 && stays(e) }

// begun reports whether there is a replica that stays where it is.
func (t *term) begun() bool {
	return slices.ContainsFunc(t.targets.nodes, func(e censusEntry) bool { return stays(&e) })
}

// relates reports whether it matters to the workload where others are.
func (s *run) relates() bool {
	return len(s.w.want.wishes) > 0 || slices.ContainsFunc(s.w.matches, func(t *term) bool { return t.repellers.total.all > 0 })
}

// bar finds the slots that hard conditions on other workloads keep replicas
// away from. To be with others, only those count that are settled; a workload
// that its own condition speaks of counts itself, and its first replica may go
// anywhere.
func (s *run) bar() {
	p := s.d.p
	s.barred = s.barred.sized(len(p.index.slots))
	if !s.relates() {
		return
	}
	set := func(slot int) { s.barred.set(slot) }
	s.allowed = make([]bitset, len(s.w.want.wishes))
	for i, h := range s.w.want.wishes {
		switch {
		case h.weight != 0:
		case h.anti:
			h.places(p, &h.targets, anyone, set)
		default:
			s.allowed[i] = s.nearby(h)
			for k, w := range s.layout.filter.eligible {
				s.barred[k] |= w &^ s.allowed[i][k]
			}
		}
	}
	for _, t := range s.w.matches {
		t.places(p, &t.repellers, anyone, set)
	}
	for i, w := range s.barred {
		s.masked[i] |= w
	}
}

// nearby are the slots where a condition to be near others is fulfilled.
func (s *run) nearby(h wish) bitset {
	p := s.d.p
	allowed := make(bitset, len(s.barred))
	allow := func(slot int) { allowed.set(slot) }
	switch {
	case !h.selects(s.w):
		h.places(p, &h.targets, staysSettled, allow)
	case h.begun():
		h.places(p, &h.targets, stays, allow)
	default:
		for slot, n := range p.index.slots {
			if _, ok := h.place(n); ok {
				allowed.set(slot)
			}
		}
	}
	return allowed
}

// barAfter brings the conditions up to date with a replica that was placed on n.
func (s *run) barAfter(n *node) {
	for _, h := range s.w.want.wishes {
		switch {
		case h.weight != 0 || !h.selects(s.w):
		case h.anti:
			h.each(s.d.p, n, func(slot int) {
				s.barred.set(slot)
				s.masked.set(slot)
			})
		case !s.gathered:
			s.gathered = true
			s.bar()
		}
	}
}

// barredBecause says which condition on other workloads n fails.
func (s *run) barredBecause(n *node) string {
	p := s.d.p
	for i, h := range s.w.want.wishes {
		_, placed := h.place(n)
		switch {
		case h.weight != 0:
		case h.anti && h.targets.near(p, h.term, n).all > 0:
			return "anti-affinity to " + h.text()
		case h.anti:
		case !placed:
			return "label " + h.topology
		case !s.allowed[i].has(n.slot):
			return "affinity to " + h.text()
		}
	}
	return "anti-affinity of another workload"
}

// witnesses are replicas that have to be where they are for one to go to n: of
// many that would do, the first by name.
func (s *run) witnesses(n *node) []*replica {
	var out []*replica
	for i, h := range s.w.want.wishes {
		if h.weight != 0 || h.anti || h.selects(s.w) {
			continue
		}
		here, _ := h.place(n)
		key := strconv.Itoa(i) + "/" + here
		known := s.known[key]
		if known == nil || s.d.changing[known] {
			known = h.first(here, s.d.changing)
			if s.known == nil {
				s.known = map[string]*replica{}
			}
			s.known[key] = known
		}
		if known != nil {
			out = append(out, known)
		}
	}
	return out
}

// first is the first settled replica, by name, in a place that has one.
func (t *term) first(place string, changing map[*replica]bool) *replica {
	var best *replica
	for i := range t.targets.nodes {
		e := &t.targets.nodes[i]
		if there, ok := t.place(e.node); !ok || there != place || !staysSettled(e) {
			continue
		}
		for _, r := range e.node.assigned {
			if r.assignment.reserves && r.next == nil && slices.Contains(r.w.matches, t) && !changing[r] && (best == nil || r.before(best)) {
				best = r
			}
		}
	}
	return best
}

func (r *replica) before(o *replica) bool {
	return cmp.Or(cmp.Compare(r.w.id, o.w.id), cmp.Compare(r.number, o.number)) < 0
}

// relyOnOthers compares the assignments without which a replica could not go to
// n.
func (b *builder) relyOnOthers(n *node) {
	for _, r := range b.run.witnesses(n) {
		if !slices.Contains(b.witnesses, r) {
			b.witnesses = append(b.witnesses, r)
			b.compare([]byte(model.AssignmentKey(r.w.id, r.number)), r.assignment.mod)
		}
	}
}

// countNear finds, for each preference for other workloads, at which values of
// its topology they are.
func (s *run) countNear() {
	l := s.layout
	s.near = s.near[:0]
	for _, h := range s.w.want.wishes {
		if h.weight == 0 {
			continue
		}
		axis := &l.topologies[len(s.near)]
		near := make(bitset, (len(axis.cohorts)+63)/64)
		for i := range h.targets.nodes {
			if v := axis.valueOf(h.targets.nodes[i].node); v >= 0 && h.targets.nodes[i].all > 0 {
				near.set(int(v))
			}
		}
		s.near = append(s.near, near)
	}
}

// eachNear calls do for the preferences for other workloads that count in a
// cohort.
func (s *run) eachNear(c int32, do func(h *wish)) {
	at := 0
	for i := range s.w.want.wishes {
		h := &s.w.want.wishes[i]
		if h.weight == 0 {
			continue
		}
		v := s.layout.cohorts[c].values[len(s.layout.spreads)+at]
		if v >= 0 && s.near[at].has(int(v)) {
			do(h)
		}
		at++
	}
}

// nearAfter takes a replica on n into what prefers or avoids its own workload.
func (s *run) nearAfter(n *node) {
	at := 0
	for _, h := range s.w.want.wishes {
		if h.weight == 0 {
			continue
		}
		axis := &s.layout.topologies[at]
		if v := axis.valueOf(n); v >= 0 && h.selects(s.w) && !s.near[at].has(int(v)) {
			s.near[at].set(int(v))
			for _, c := range axis.cohorts[v] {
				s.rescore(c)
			}
		}
		at++
	}
}

// admits reports whether a slot is neither full nor barred.
func (s *run) admits(slot int) bool {
	return !s.w.want.shape.full.has(slot) && !s.barred.has(slot)
}
