package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// More nodes than this are not named one by one.
const namedNodes = 10

// explainState says how a workload is that waits for nothing that has a reason.
func (p *Picture) explainState(w *workload, state pb.State) string {
	var stopped, completed, running int
	var leaving []string
	for _, r := range w.replicas {
		if n := r.observed.node; r.assignment.mod == 0 && n != nil && !slices.Contains(leaving, n.id) {
			leaving = append(leaving, n.id)
		}
		if r.assignment.mod == 0 {
			continue
		}
		switch r.reported() {
		case pb.State_STOPPED:
			stopped++
		case pb.State_COMPLETED:
			completed++
		case pb.State_RUNNING:
			running++
		}
	}
	word := strings.ToLower(state.String())
	switch desired := w.want.desired; {
	case desired == pb.DesiredState_DESIRED_DELETED && len(leaving) > 0:
		return "it is deleted once nothing of it is left on " + named(leaving)
	case desired == pb.DesiredState_DESIRED_DELETED:
		return "it is about to be deleted"
	case desired == pb.DesiredState_DESIRED_STOPPED:
		return fmt.Sprintf("it is to be stopped: %d of %d have stopped", stopped+completed, len(w.replicas))
	case w.want.kind == pb.WorkloadKind_JOB:
		return fmt.Sprintf("%s: %d of %d ran to their end, %d running", word, completed, w.want.replicas, running)
	case w.status == nil:
		return "nobody has looked at it yet"
	}
	return fmt.Sprintf("%s: %d of %d running", word, w.status.Running, w.status.Desired)
}

// explainStranded says how many replicas have to leave their nodes and wait for a
// place elsewhere.
func (p *Picture) explainStranded(w *workload) []string {
	f := w.want.shape.filter
	p.prepare(f)
	stranded := 0
	var nodes []string
	for _, r := range w.replicas {
		n := r.assignment.node
		if r.assignment.mod == 0 || r.reported() == pb.State_COMPLETED || !n.lost() && !n.drains() && f.allows(n) {
			continue
		}
		stranded++
		if !slices.Contains(nodes, n.id) {
			nodes = append(nodes, n.id)
		}
	}
	if stranded == 0 {
		return nil
	}
	return []string{fmt.Sprintf("%s to leave %s; there is no other place", counted(stranded, "replica has", "replicas have"), named(nodes))}
}

// named lists ids, sorted, as far as anybody would read.
func named(ids []string) string {
	slices.Sort(ids)
	if more := len(ids) - namedNodes; more > 0 {
		return strings.Join(ids[:namedNodes], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(ids, ", ")
}

// explainGlobal says of each node that lacks a replica of a global workload why it
// does.
func (p *Picture) explainGlobal(s *run) []string {
	w := s.w
	f := w.want.shape.filter
	var short, all []*node
	for _, n := range p.index.slots {
		if !slices.ContainsFunc(w.replicas, func(r *replica) bool { return r.assignment.node == n || r.next != nil && r.next.node == n }) {
			all = append(all, n)
			if n.open() && f.accepts(n) {
				short = append(short, n)
			}
		}
	}
	slices.SortFunc(short, func(a, b *node) int { return cmp.Compare(a.id, b.id) })
	var lines []string
	for _, n := range short[:min(len(short), namedNodes)] {
		lines = append(lines, "node "+n.id+": "+s.shortage(n))
	}
	if more := len(short) - namedNodes; more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more that match and lack one", more))
	}
	counts := map[string]int{}
	for _, n := range all {
		if refusal, refused := f.refusal(n); refused {
			counts[refusal]++
		} else if !n.open() {
			counts[n.closedBecause()]++
		}
	}
	for _, text := range sortedKeys(counts) {
		lines = append(lines, counted(counts[text], "node", "nodes")+": "+text)
	}
	return lines
}

// shortage is what a node that matches lacks for a replica.
func (r *run) shortage(n *node) string {
	s := r.w.want.shape
	if d, lacks := s.needs.lacking(&n.free); lacks {
		return fmt.Sprintf("%s: %s wanted, %s free", dimensionNames[d], quantity(d, s.needs[d]), quantity(d, max(0, n.free[d])))
	}
	if port, ok := portsFit(n, s.ports, nil); !ok {
		return fmt.Sprintf("port %d is taken", port)
	}
	if _, lack := s.filter.equip(n.gear, nil, nil); lack != "" {
		return lack + " is taken"
	}
	if why := r.refusal(n); why != "" {
		return why
	}
	return "about to be placed there, or no room"
}
