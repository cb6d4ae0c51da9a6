package scheduler

import (
	"slices"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What is reserved and limited: thousandths of a core, bytes, bytes.
const (
	cpu = iota
	memory
	disk
	dimensions
)

var dimensionNames = [dimensions]string{"cpu", "memory", "disk"}

type amounts [dimensions]int64

// lacking names the first dimension in which free is less than a. A dimension
// of which nothing is wanted never lacks, even where the node has shrunk below
// what it runs.
func (a *amounts) lacking(free *amounts) (int, bool) {
	for d := range a {
		if a[d] > 0 && a[d] > free[d] {
			return d, true
		}
	}
	return 0, false
}

// beyond is what a has more than b.
func (a amounts) beyond(b amounts) amounts {
	for d := range a {
		a[d] = max(0, a[d]-b[d])
	}
	return a
}

// node is a node as placement sees it. One that is only named by an assignment
// or a replica has no record (mod is 0).
type node struct {
	free     amounts
	capacity amounts
	// Assignments that reserve, in the store or assumed.
	reserving int
	slot      int
	level     int
	// Whether it is in a level of the index now.
	indexed bool

	id   string
	key  []byte
	hash uint64
	mod  int64
	// Revision of /nodes/<id>/lease; 0 where there is none.
	lease         int64
	state         pb.NodeState
	unschedulable bool
	draining      bool
	drainDeadline int64
	transition    int64
	class         *class
	ports         portSet
	gear          *gear

	assigned []*replica
	observed []*replica
	// Counts changes of what is assigned and reserves; what follows from that is
	// worked out when it is asked for.
	version uint64
	claims  *claims
	// Room was made on it since waiting workloads were last asked.
	freed bool

	// Scratch of a decision, valid where the stamp is the decision's own.
	runStamp   uint64
	runCount   int
	stepStamp  uint64
	coverStamp uint64
	undoStamp  uint64
}

// open reports whether it may be given new work. A node without a lease that
// is not declared lost yet is a suspect: it keeps its work and gets no more.
func (n *node) open() bool {
	return n.mod != 0 && n.state == pb.NodeState_READY && n.lease != 0 && !n.unschedulable && !n.draining
}

// lost reports whether its work has to go elsewhere because it does not answer.
func (n *node) lost() bool {
	return n.mod == 0 || n.state == pb.NodeState_NOT_READY || n.state == pb.NodeState_NODE_STATE_UNSPECIFIED
}

func (n *node) drains() bool {
	return n.mod != 0 && (n.draining || n.state == pb.NodeState_DRAINING)
}

// closedBecause says why a node that is not open is not.
func (n *node) closedBecause() string {
	switch {
	case n.lost():
		return "not ready"
	case n.drains():
		return "draining"
	case n.unschedulable:
		return "cordoned"
	default:
		return "suspect"
	}
}

// share is how full it would be with extra on it, in parts of scale, by its
// scarcest dimension.
func (n *node) share(extra *amounts, scale int64) int64 {
	var most int64
	for d := range n.capacity {
		used := n.capacity[d] - n.free[d] + extra[d]
		switch {
		case used <= 0:
		case n.capacity[d] <= 0 || used >= n.capacity[d]:
			return scale
		default:
			// In floating point, since bytes times scale may pass 63 bits.
			most = max(most, int64(float64(used)/float64(n.capacity[d])*float64(scale)))
		}
	}
	return most
}

// shareOf is how much of a capacity it is, in the scarcest dimension.
func (a *amounts) shareOf(capacity *amounts) int64 {
	var most int64
	for d := range a {
		if capacity[d] > 0 {
			most = max(most, int64(float64(a[d])/float64(capacity[d])*fine))
		}
	}
	return most
}

func (n *node) take(a amounts, ports []portUse) {
	n.reserving++
	for d := range a {
		n.free[d] -= a[d]
	}
	for _, u := range ports {
		n.ports.add(u)
	}
}

func (n *node) give(a amounts, ports []portUse) {
	n.reserving--
	for d := range a {
		n.free[d] += a[d]
	}
	for _, u := range ports {
		n.ports.remove(u)
	}
}

// class is what nodes with equal labels, runtimes, taints, pool and gear have in
// common: what depends on these alone is decided once for all of them.
type class struct {
	key    string
	labels map[string]string
	pool   string
	taints []*pb.Taint
	// As of any of its nodes; only the ids and paths differ.
	devices  []*pb.Device
	pools    []*pb.StoragePool
	runtimes uint32
	nodes    int
	// Its number among the classes of one computation of a filter.
	stamp   uint64
	verdict verdict
	cohort  int32
}

func (c *class) has(t pb.WorkloadType) bool { return c.runtimes&(1<<uint(t)) != 0 }

// classOf finds or makes the class of a node with this record.
func (p *Picture) classOf(rec *pb.Node) *class {
	names := make([]string, 0, len(rec.Labels)+len(rec.UserLabels))
	labels := make(map[string]string, len(rec.Labels)+len(rec.UserLabels))
	for _, set := range []map[string]string{rec.Labels, rec.UserLabels} {
		for _, name := range sortedKeys(set) {
			if _, ok := labels[name]; !ok {
				names = append(names, name)
			}
			labels[name] = set[name]
		}
	}
	slices.Sort(names)
	var runtimes uint32
	for _, r := range rec.Runtimes {
		if r.Healthy {
			runtimes |= 1 << uint(r.Type)
		}
	}
	var key strings.Builder
	key.WriteString(strconv.FormatUint(uint64(runtimes), 16))
	for _, name := range names {
		key.WriteByte(0)
		key.WriteString(name)
		key.WriteByte('=')
		key.WriteString(labels[name])
	}
	pool, taints := model.PoolOf(rec), model.TaintsOf(rec)
	key.WriteString("\x00\x00" + pool)
	for _, t := range taints {
		key.WriteString("\x00" + model.FormatTaint(t))
	}
	key.Write(appendGearOf(nil, rec))
	c := p.classes[key.String()]
	if c == nil {
		c = &class{key: key.String(), labels: labels, runtimes: runtimes, pool: pool, taints: taints, devices: rec.Devices, pools: rec.StoragePools}
		p.classes[c.key] = c
		p.unloved += c.unloved()
	}
	return c
}

// unloved is 1 where the class has a taint that makes it a last resort.
func (c *class) unloved() int {
	if slices.ContainsFunc(c.taints, func(t *pb.Taint) bool { return t.Effect == pb.TaintEffect_PREFER_NO_SCHEDULE }) {
		return 1
	}
	return 0
}

func (p *Picture) nodeNamed(id string) *node {
	n := p.nodes[id]
	if n == nil {
		n = &node{id: id, key: []byte(model.NodeKey(id)), hash: xxhash.Sum64String(id)}
		p.nodes[id] = n
	}
	return n
}

// forgetNode drops a node that nothing speaks of any more.
func (p *Picture) forgetNode(n *node) {
	if n.mod == 0 && n.lease == 0 && n.reserving == 0 && len(n.assigned) == 0 && len(n.observed) == 0 {
		delete(p.nodes, n.id)
	}
}

// putNode takes in a node's record; rec nil means that it was deleted.
func (p *Picture) putNode(id string, mod int64, rec *pb.Node) {
	n := p.nodeNamed(id)
	before := *n
	if (n.mod == 0) != (rec == nil) {
		p.index.stale = true
	}
	if n.class != nil {
		if n.class.nodes--; n.class.nodes == 0 {
			delete(p.classes, n.class.key)
			p.unloved -= n.class.unloved()
		}
		n.class = nil
	}
	if n.regear(rec.GetDevices(), rec.GetStoragePools()) {
		// What was full may not be any more, and the class need not have changed.
		p.madeRoom(n)
	}
	n.mod = mod
	if rec == nil {
		n.state, n.unschedulable, n.draining, n.drainDeadline, n.transition = 0, false, false, 0, 0
		n.resize(amounts{})
	} else {
		n.state, n.unschedulable, n.draining = rec.State, rec.Unschedulable, rec.Draining
		n.drainDeadline, n.transition = unixNano(rec.DrainDeadline), unixNano(rec.LastTransition)
		n.resize(amounts{rec.GetCapacity().GetCpuMillis(), rec.GetCapacity().GetMemoryBytes(), rec.GetCapacity().GetDiskBytes()})
		n.class = p.classOf(rec)
		n.class.nodes++
	}
	if n.class != before.class {
		p.attributes++
	}
	p.nodeChanged(n, &before)
}

// putLease takes in a node's lease; mod 0 means that it is gone.
func (p *Picture) putLease(id string, mod int64) {
	n := p.nodeNamed(id)
	before := *n
	n.lease = mod
	if (before.lease == 0) != (mod == 0) {
		p.nodeChanged(n, &before)
	}
}

func (n *node) resize(capacity amounts) {
	for d := range capacity {
		n.free[d] += capacity[d] - n.capacity[d]
	}
	n.capacity = capacity
}

// nodeChanged wakes what a change of the node may concern: the workloads on it
// when it comes or goes, everything that waits for a place, and workloads of
// kind global.
func (p *Picture) nodeChanged(n, before *node) {
	p.index.update(n)
	p.growth++
	p.uneven = true
	moved := n.lost() != before.lost() || n.drains() != before.drains() || n.open() != before.open() || n.class != before.class ||
		n.drainDeadline != before.drainDeadline || n.transition != before.transition
	if moved {
		for _, r := range n.assigned {
			p.touch(r.w)
		}
		for _, r := range n.observed {
			p.touch(r.w)
		}
		for _, w := range p.globals.list {
			p.touch(w)
		}
	}
	if moved || n.capacity != before.capacity {
		for _, w := range p.waiting.list {
			p.touch(w)
		}
	}
	p.forgetNode(n)
}
