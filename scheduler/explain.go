package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// cause is why a number of nodes can't take a replica.
type cause struct {
	text  string
	nodes int
}

// causes says why each node can't take another replica, the most frequent cause
// first. A node is counted once, under the first thing that speaks against it;
// nodes that could take it are not counted.
func (p *Picture) causes(r *run) []cause {
	s := r.w.want.shape
	counts := map[string]int{}
	refusals := map[*class]string{}
	var order []string
	count := func(text string) {
		if counts[text]++; counts[text] == 1 {
			order = append(order, text)
		}
	}
	for _, n := range p.index.slots {
		if !n.open() {
			count(n.closedBecause())
			continue
		}
		// Which nodes are named is the node's own affair, the rest its class's.
		refusal, known := refusals[n.class]
		if !known || len(s.filter.nodes) > 0 {
			refusal, _ = s.filter.refusal(n)
			refusals[n.class] = refusal
		}
		if refusal != "" {
			count(refusal)
		} else if d, lacks := s.needs.lacking(&n.free); lacks {
			count(dimensionNames[d])
		} else if _, lack := s.filter.equip(n.gear, nil, nil); lack != "" {
			count(lack)
		} else if port, ok := portsFit(n, s.ports, nil); !ok {
			count(fmt.Sprintf("port %d", port))
		} else if _, ok := choosePorts(n, s.ports, nil, nil, 0); !ok {
			count("ports to choose from")
		} else if why := r.refusal(n); why != "" {
			count(why)
		}
	}
	out := make([]cause, len(order))
	for i, text := range order {
		out[i] = cause{text, counts[text]}
	}
	slices.SortFunc(out, func(a, b cause) int {
		if c := cmp.Compare(b.nodes, a.nodes); c != 0 {
			return c
		}
		return cmp.Compare(a.text, b.text)
	})
	return out
}

// sentence is causes in one line: "cpu (41 nodes), label zone=eu (9)".
func sentence(causes []cause) string {
	if len(causes) == 0 {
		return "no node has joined"
	}
	var b strings.Builder
	for i, c := range causes {
		switch {
		case i == 0 && c.nodes == 1:
			fmt.Fprintf(&b, "%s (1 node)", c.text)
		case i == 0:
			fmt.Fprintf(&b, "%s (%d nodes)", c.text, c.nodes)
		default:
			fmt.Fprintf(&b, ", %s (%d)", c.text, c.nodes)
		}
	}
	return b.String()
}

// Explain says why a workload is as it is: why it is pending, why its replicas
// are where they are, why they failed. It is false where there is no such
// workload.
func (p *Picture) Explain(id string) (*pb.Explanation, bool) {
	w := p.workloads[id]
	if w == nil || w.want == nil {
		return nil, false
	}
	e := &pb.Explanation{Id: id, State: w.status.GetState()}
	if e.State == pb.State_STATE_UNSPECIFIED {
		e.State = pb.State_PENDING
	}
	waiting := 0
	if w.want.kind != pb.WorkloadKind_GLOBAL && w.want.schedule == nil && w.want.desired == pb.DesiredState_DESIRED_RUNNING {
		waiting = int(w.want.replicas)
	}
	for _, r := range w.replicas {
		e.Replicas = append(e.Replicas, p.explainReplica(r))
		if waiting > 0 && r.number < w.want.replicas && (r.assignment.mod != 0 || r.retry != nil) {
			waiting--
		}
	}
	e.Lines = p.explainLines(w, waiting)
	return e, true
}

func (p *Picture) explainLines(w *workload, waiting int) []string {
	var lines []string
	if w.want.invalid != "" {
		return []string{"the spec can't be carried out: " + w.want.invalid}
	}
	if w.want.schedule != nil {
		lines = p.explainSchedule(w)
	}
	if waiting > 0 {
		lines = append(lines, fmt.Sprintf("%s without a place", counted(waiting, "replica is", "replicas are")))
	}
	r := &run{d: &decider{p: p}, w: w}
	r.prepare()
	if w.want.kind == pb.WorkloadKind_GLOBAL && p.waiting.has(w) {
		lines = p.explainGlobal(r)
	} else if waiting > 0 || p.waiting.has(w) {
		lines = append(lines, p.explainStranded(w)...)
		causes := p.causes(r)
		var refusing int
		for _, c := range causes {
			refusing += c.nodes
		}
		if free := len(p.index.slots) - refusing; free > 0 {
			lines = append(lines, counted(free, "node has room for one", "nodes have room for one"))
		} else if len(causes) == 0 {
			lines = append(lines, sentence(causes))
		}
		for _, c := range causes {
			lines = append(lines, fmt.Sprintf("%s: %s", counted(c.nodes, "node", "nodes"), p.explainCause(c.text, w.want.shape)))
		}
		lines = append(lines, p.explainPreemption(w)...)
	}
	lines = append(lines, explainRollout(w)...)
	if reason := w.status.GetReason(); reason != nil && reason.Code != pb.ReasonCode_NO_PLACEMENT {
		line := said(reason)
		if reason.NextRetryAt != nil {
			line += "; next attempt at " + clock(unixNano(reason.NextRetryAt))
		}
		lines = append(lines, line)
	}
	if slices.ContainsFunc(w.replicas, func(r *replica) bool { return r.retry != nil && r.retry.exhausted }) {
		lines = append(lines, "persys retry "+w.id+" tries again what was given up")
	}
	if len(lines) == 0 {
		lines = append(lines, p.explainState(w, w.status.GetState()))
	}
	return append(lines, r.idle()...)
}

// refusal says what keeps another replica of the workload away from n on
// account of where replicas are.
func (s *run) refusal(n *node) string {
	if most := int(s.w.want.maxPerNode); most > 0 && n.runStamp == s.d.runStamp && n.runCount >= most {
		return "max_per_node"
	}
	if s.barred.has(n.slot) {
		return s.barredBecause(n)
	}
	c := s.cohortOf(n)
	if s.layout.plain() || c < 0 {
		return ""
	}
	for i := range s.layout.spreads {
		sp, v := &s.layout.spreads[i], s.layout.cohorts[c].values[i]
		switch {
		case !s.tallies[i].skewed(sp, v):
		case v < 0:
			return "label " + sp.label
		default:
			return "max_skew of " + sp.label
		}
	}
	return ""
}

// idle says which preferences no node that matches can meet.
func (s *run) idle() []string {
	var lines []string
	if s.layout.filter.matching == 0 {
		return nil
	}
	for _, h := range s.w.want.wishes {
		if h.weight == 0 && !h.anti && !h.selects(s.w) && h.targets.total.settled == 0 {
			lines = append(lines, "affinity to "+h.text()+": no replica of it has a place")
		}
	}
	for i := range s.layout.affinities {
		if a := &s.layout.affinities[i]; a.idle {
			lines = append(lines, "affinity to "+a.text+": of no effect, no node that matches is so")
		}
	}
	for i := range s.layout.spreads {
		sp := &s.layout.spreads[i]
		effect := "of no effect"
		if sp.skew > 0 {
			effect = "can't be met"
		}
		if len(sp.values) == 0 {
			lines = append(lines, "spread over "+sp.label+": "+effect+", no node that matches has this label")
		}
	}
	return lines
}

// explainCause puts a short cause into words.
func (p *Picture) explainCause(text string, s *shape) string {
	for d, name := range dimensionNames {
		if text != name {
			continue
		}
		var most int64
		for _, n := range p.index.slots {
			if n.open() && s.filter.accepts(n) {
				most = max(most, n.free[d])
			}
		}
		return fmt.Sprintf("%s: %s wanted, %s free at most", name, quantity(d, s.needs[d]), quantity(d, most))
	}
	return text
}

func (p *Picture) explainReplica(r *replica) *pb.ReplicaExplanation {
	e := &pb.ReplicaExplanation{Replica: r.number, State: pb.State_PENDING}
	if a := &r.assignment; a.mod != 0 {
		e.NodeId, e.State, e.Message = a.node.id, r.reported(), a.explanation
		if e.State != pb.State_RUNNING {
			e.Reason = r.observed.reason
		}
		if a.node.lost() {
			e.State = pb.State_UNKNOWN
			e.Reason = &pb.Reason{Code: pb.ReasonCode_NODE_LOST, Message: "node " + a.node.id + " does not answer"}
		}
	} else if n := r.observed.node; n != nil {
		e.NodeId, e.State, e.Message = n.id, pb.State_DELETING, "its agent has not said yet that it is gone"
	}
	if t := r.retry; t != nil {
		switch {
		case t.exhausted:
			e.State = pb.State_FAILED
			e.Message = givenUp(t.attempts)
			e.Reason = t.reason
		case t.next != 0:
			e.State = pb.State_RETRY_PENDING
			e.Message = fmt.Sprintf("attempt %d of %d at %s", t.attempts+1, maxAttempts, clock(t.next))
			e.Reason = t.reason
		case r.assignment.mod == 0:
			e.Reason = t.reason
		}
	}
	return e
}

// quantity is an amount of a dimension as people write it.
func quantity(d int, n int64) string {
	if d == cpu {
		return model.FormatCPU(n)
	}
	return model.FormatBytes(n)
}

func clock(nanos int64) string { return time.Unix(0, nanos).UTC().Format(time.RFC3339) }

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
