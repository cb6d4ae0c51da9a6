package scheduler

import (
	"slices"
	"strconv"
	"strings"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// filter is what a workload demands of a node for good: the runtime, the
// labels, the pool, the name, and which taints it does not mind. Workloads that demand the same share one filter, and nodes
// of one class get one answer.
type filter struct {
	key         string
	uses        int
	runtime     pb.WorkloadType
	constraints []constraint
	// Sorted node ids; empty means any.
	nodes []string
	// Sorted node pools; empty means any.
	pools       []string
	tolerations []*pb.Toleration
	devices     []deviceWish
	storage     []storageWish

	// For which slots and attributes of nodes the sets below were computed.
	epoch, attributes uint64
	// Slots where the work may be, and those where it may be placed: they have the
	// runtime, devices and storage too, and no taint that keeps new work away.
	allowed, eligible bitset
	matching          int
}

// verdict is the answer of a filter to a class.
type verdict struct {
	allowed, eligible bool
}

type constraint struct {
	*pb.Constraint
	number float64
	// The number could be read: GREATER and LESS hold for nothing otherwise.
	numeric bool
	text    string
}

func compile(c *pb.Constraint) constraint {
	out := constraint{Constraint: c}
	value := strings.Join(c.Values, ",")
	switch c.Operator {
	case pb.Constraint_IN:
		out.text = c.Label + "=" + value
		if len(c.Values) != 1 {
			out.text = c.Label + " in (" + value + ")"
		}
	case pb.Constraint_NOT_IN:
		out.text = c.Label + "!=" + value
		if len(c.Values) != 1 {
			out.text = c.Label + " not in (" + value + ")"
		}
	case pb.Constraint_EXISTS:
		out.text = c.Label
	case pb.Constraint_NOT_EXISTS:
		out.text = "!" + c.Label
	case pb.Constraint_GREATER, pb.Constraint_LESS:
		out.text = c.Label + ">" + value
		if c.Operator == pb.Constraint_LESS {
			out.text = c.Label + "<" + value
		}
		if len(c.Values) > 0 {
			n, err := strconv.ParseFloat(c.Values[0], 64)
			out.number, out.numeric = n, err == nil
		}
	}
	return out
}

// holds decides the constraint on labels. A label that is not there is in no
// set and is no number.
func (c *constraint) holds(labels map[string]string) bool {
	value, there := labels[c.Label]
	switch c.Operator {
	case pb.Constraint_IN:
		return there && slices.Contains(c.Values, value)
	case pb.Constraint_NOT_IN:
		return !there || !slices.Contains(c.Values, value)
	case pb.Constraint_EXISTS:
		return there
	case pb.Constraint_NOT_EXISTS:
		return !there
	case pb.Constraint_GREATER, pb.Constraint_LESS:
		n, err := strconv.ParseFloat(value, 64)
		if !there || err != nil || !c.numeric {
			return false
		}
		if c.Operator == pb.Constraint_GREATER {
			return n > c.number
		}
		return n < c.number
	default:
		return false
	}
}

// filterOf finds or makes the filter for a spec. The caller owns one use of it.
func (p *Picture) filterOf(runtime pb.WorkloadType, placement *pb.Placement, devices []deviceWish, storage []storageWish) *filter {
	f := &filter{
		devices: devices, storage: storage,
		runtime: runtime, nodes: sortedSet(placement.GetNodes()), pools: sortedSet(placement.GetPools()), tolerations: placement.GetTolerations(),
	}
	switch {
	case len(f.pools) == 0:
		f.pools = []string{model.DefaultPool}
	case slices.Contains(f.pools, model.AnyPool):
		f.pools = nil
	}
	for _, name := range sortedKeys(placement.GetNodeLabels()) {
		f.constraints = append(f.constraints, compile(&pb.Constraint{Label: name, Values: []string{placement.GetNodeLabels()[name]}}))
	}
	for _, c := range placement.GetConstraints() {
		f.constraints = append(f.constraints, compile(c))
	}
	key := strconv.AppendInt(nil, int64(runtime), 10)
	for _, c := range f.constraints {
		key = appendConstraint(key, c.Constraint)
	}
	for _, list := range [][]string{f.nodes, f.pools} {
		key = append(key, 0, 0)
		for _, id := range list {
			key = strconv.AppendQuote(key, id)
		}
	}
	for _, t := range f.tolerations {
		key = strconv.AppendQuote(append(key, 0), t.Key)
		if t.Value != nil {
			key = strconv.AppendQuote(key, *t.Value)
		}
		if t.Effect != nil {
			key = strconv.AppendInt(key, int64(*t.Effect), 10)
		}
	}
	key = f.appendGear(key)
	if known := p.filters[string(key)]; known != nil {
		known.uses++
		return known
	}
	f.key, f.uses = string(key), 1
	p.filters[f.key] = f
	return f
}

func appendConstraint(key []byte, c *pb.Constraint) []byte {
	key = strconv.AppendInt(append(key, 0), int64(c.Operator), 10)
	key = strconv.AppendQuote(key, c.Label)
	for _, v := range c.Values {
		key = strconv.AppendQuote(key, v)
	}
	return key
}

func (p *Picture) dropFilter(f *filter) {
	if f.uses--; f.uses == 0 {
		delete(p.filters, f.key)
	}
}

// prepare brings the filter's sets up to date with the nodes.
func (p *Picture) prepare(f *filter) {
	p.index.rebuild(p.nodes)
	if f.allowed != nil && f.epoch == p.index.epoch && f.attributes == p.attributes {
		return
	}
	f.epoch, f.attributes = p.index.epoch, p.attributes
	slots := p.index.slots
	f.allowed, f.eligible = f.allowed.sized(len(slots)), f.eligible.sized(len(slots))
	p.stamp++
	admit := func(n *node) {
		c := n.class
		if c.stamp != p.stamp {
			c.stamp = p.stamp
			_, refused := f.refusalOfClass(c, false)
			c.verdict.allowed = !refused
			_, refused = f.refusalOfClass(c, true)
			c.verdict.eligible = !refused
		}
		if c.verdict.allowed {
			f.allowed.set(n.slot)
		}
		if c.verdict.eligible {
			f.eligible.set(n.slot)
		}
	}
	if len(f.nodes) == 0 {
		for _, n := range slots {
			admit(n)
		}
	}
	for _, id := range f.nodes {
		if n := p.nodes[id]; n != nil && n.mod != 0 {
			admit(n)
		}
	}
	f.matching = f.eligible.count()
}

// allows reports whether work that runs on n may stay: also while the runtime is
// unwell for a while, or where a taint keeps new work away only.
func (f *filter) allows(n *node) bool { return n.mod != 0 && f.allowed.has(n.slot) }

func (f *filter) accepts(n *node) bool { return n.mod != 0 && f.eligible.has(n.slot) }

// refusal says what of the filter n fails, in the words of an explanation.
func (f *filter) refusal(n *node) (string, bool) {
	if len(f.nodes) > 0 {
		if _, ok := slices.BinarySearch(f.nodes, n.id); !ok {
			return "not in nodes", true
		}
	}
	return f.refusalOfClass(n.class, true)
}

// refusalOfClass says what of the filter all nodes of a class fail, for new
// work or for what runs there.
func (f *filter) refusalOfClass(c *class, fresh bool) (string, bool) {
	if len(f.pools) > 0 && !slices.Contains(f.pools, c.pool) {
		return "pool " + c.pool, true
	}
	for i := range f.constraints {
		if !f.constraints[i].holds(c.labels) {
			return "label " + f.constraints[i].text, true
		}
	}
	for _, t := range c.taints {
		repels := t.Effect == pb.TaintEffect_NO_EXECUTE || fresh && t.Effect == pb.TaintEffect_NO_SCHEDULE
		if repels && !f.tolerates(t) {
			return "taint " + model.FormatTaint(t), true
		}
	}
	if fresh && !c.has(f.runtime) {
		return "runtime " + strings.ToLower(f.runtime.String()), true
	}
	if fresh {
		return f.gearOfClass(c)
	}
	return "", false
}

func (f *filter) tolerates(t *pb.Taint) bool {
	return slices.ContainsFunc(f.tolerations, func(o *pb.Toleration) bool {
		return (o.Key == "" || o.Key == t.Key) && (o.Value == nil || *o.Value == t.Value) && (o.Effect == nil || *o.Effect == t.Effect)
	})
}

func sortedSet(list []string) []string { return slices.Compact(slices.Sorted(slices.Values(list))) }
