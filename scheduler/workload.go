package scheduler

import (
	"cmp"
	"slices"
	"strconv"

	"github.com/cespare/xxhash/v2"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// workload is a workload as decisions see it, with everything that is stored
// under its id.
type workload struct {
	id   string
	hash uint64
	// Of /workloads/<id>; 0 where there is no such record.
	mod     int64
	created int64
	want    *want

	status    *pb.WorkloadStatus
	statusMod int64
	// A status that was assumed and is not confirmed; decisions compare with it.
	assumed *pb.WorkloadStatus
	// Deletion of the record itself was assumed, or that it goes back to an
	// earlier revision, or a change of the workload's runs: it is left alone until
	// that is known.
	leaving, rewriting bool
	// As it is stored, for going back; shared with the store.
	record []byte

	rollout    *pb.Rollout
	rolloutMod int64
	// One that was assumed and is not confirmed.
	assumedRollout *pb.Rollout

	// By number.
	replicas []*replica
	// Some of them are to be dropped.
	thins bool
	// By mod_revision, oldest first.
	revisions []storedRevision

	// When time alone changes what is to be done; 0: never.
	wake int64

	places [sets]int32

	// "k=v", sorted, and where it is in the picture's list for each.
	labels     []string
	labelledAt []int32
	// Terms that speak of it, and those of its own that keep others away.
	matches, repels []*term
}

type storedRevision struct {
	name string
	mod  int64
	// Shared with the store.
	value []byte
}

// want is what of a workload's spec decides.
type want struct {
	uid       string
	revision  string
	restart   int64
	kind      pb.WorkloadKind
	runtime   pb.WorkloadType
	desired   pb.DesiredState
	replicas  int32
	exclusive bool
	priority  int32
	// It takes the room of others, and they do not take its own.
	preempts, protected bool
	update              strategy
	// The revision whose canaries were accepted, and when users last changed
	// something.
	promoted string
	changed  int64
	policy   pb.PlacementPolicy
	shape    *shape
	layout   *layout
	// Of this workload's replicas; 0: no bound.
	maxPerNode int32
	wishes     []wish
	// Of a job that runs by a schedule, and of one of its runs.
	schedule *schedule
	run      *pb.Workload
	// Why nothing can be decided about it: admission lets no such spec pass.
	invalid string
}

// shape is what a replica needs of a node. Workloads that need the same share
// one, and with it the knowledge which nodes have no room for it.
type shape struct {
	key    string
	uses   int
	filter *filter
	needs  amounts
	ports  []*pb.Port

	// Slots where it does not fit, as long as no node has gained anything.
	full          bitset
	growth, epoch uint64

	// Why it fits nowhere, as of so many placements of a decision.
	why           string
	whyStamp      uint64
	whyPlacements int

	// No node can be made room on for it, by a decision, for work of this priority.
	hopelessStamp uint64
	hopelessFor   int32
}

func (p *Picture) workloadNamed(id string) *workload {
	w := p.workloads[id]
	if w == nil {
		w = &workload{id: id, hash: xxhash.Sum64String(id)}
		p.workloads[id] = w
	}
	return w
}

// forgetWorkload drops a workload that nothing is stored of any more.
func (p *Picture) forgetWorkload(w *workload) {
	if w.mod != 0 || w.statusMod != 0 || w.rolloutMod != 0 || len(w.replicas) > 0 || len(w.revisions) > 0 {
		return
	}
	p.dirty.remove(w)
	p.waiting.remove(w)
	p.globals.remove(w)
	p.rolling.remove(w)
	w.wake = 0
	delete(p.workloads, w.id)
}

func (p *Picture) putWorkload(id string, created, mod int64, rec *pb.Workload, value []byte) {
	w := p.workloadNamed(id)
	job, run, rank := w.job(), w.run(), w.standing()
	p.countPriority(w, -1)
	old := w.want
	w.mod, w.created, w.want, w.record = mod, created, nil, value
	if rec != nil {
		w.want = p.wantOf(rec)
	}
	p.relabel(w, labelPairs(rec.GetSpec().GetLabels()))
	p.relate(w)
	if old != nil {
		p.dropWant(old)
	}
	p.countPriority(w, 1)
	if w.standing() != rank {
		p.rankChanged(w)
	}
	if w.job() != job {
		// What counts against a node's capacity is another matter for jobs.
		for _, r := range w.replicas {
			held := p.unreserve(r) && r.next != nil
			p.reserve(r, held)
		}
	}
	if w.want != nil && w.want.kind == pb.WorkloadKind_GLOBAL {
		p.globals.add(w)
	} else {
		p.globals.remove(w)
	}
	w.leaving, w.rewriting = false, false
	p.touch(w)
	p.putRun(w, run)
	p.forgetWorkload(w)
}

func (w *workload) job() bool { return w.want != nil && w.want.kind == pb.WorkloadKind_JOB }

func (p *Picture) putStatus(id string, mod int64, s *pb.WorkloadStatus) {
	w := p.workloadNamed(id)
	p.touchParent(w.run())
	w.statusMod, w.status = mod, s
	w.assumed = nil
	p.touch(w)
	p.forgetWorkload(w)
}

func (p *Picture) putRollout(id string, mod int64, rec *pb.Rollout) {
	w := p.workloadNamed(id)
	w.rolloutMod, w.rollout = mod, rec
	if goesOn(rec) {
		p.rolling.add(w)
	} else {
		p.rolling.remove(w)
	}
	p.touch(w)
	p.forgetWorkload(w)
}

func (p *Picture) putRevision(id, name string, mod int64, value []byte) {
	w := p.workloadNamed(id)
	w.revisions = slices.DeleteFunc(w.revisions, func(r storedRevision) bool { return r.name == name })
	if mod != 0 {
		w.revisions = append(w.revisions, storedRevision{name, mod, value})
		slices.SortFunc(w.revisions, func(a, b storedRevision) int { return cmp.Compare(a.mod, b.mod) })
	}
	p.touch(w)
	p.forgetWorkload(w)
}

const (
	defaultPriority = 50
	bytesPerMB      = 1 << 20
	bytesPerGB      = 1 << 30
)

func (p *Picture) wantOf(rec *pb.Workload) *want {
	s := rec.GetSpec()
	out := &want{
		uid: rec.Uid, revision: rec.Revision, restart: rec.RestartGeneration,
		kind: s.GetKind(), runtime: typeOf(s), desired: s.GetDesiredState(), replicas: 1,
		priority: defaultPriority, update: strategyOf(s.GetUpdate()), policy: s.GetPlacement().GetPolicy(),
	}
	if out.kind != pb.WorkloadKind_SERVICE {
		out.update.surge, out.update.canary = 0, 0
	}
	out.promoted, out.changed = rec.PromotedRevision, unixNano(rec.UpdateTime)
	if s != nil && s.Replicas != nil {
		out.replicas = max(0, *s.Replicas)
	}
	if s != nil && s.Priority != nil {
		out.priority = min(max(*s.Priority, 0), model.MaxPriority)
	}
	out.preempts, out.protected = !s.GetPreemption().GetNeverPreempts(), s.GetPreemption().GetProtected()
	out.exclusive = s.GetExclusive() || out.runtime == pb.WorkloadType_VM
	needs, ports, err := needsOf(s)
	if err == nil {
		out.schedule, err = scheduleOf(rec)
	}
	if err != nil {
		out.invalid = err.Error()
	}
	if rec.Parent != "" {
		out.run = rec
	}
	devices, storage, err := wishesForGear(s.GetResources())
	if err != nil {
		out.invalid = err.Error()
	}
	out.shape = p.shapeOf(p.filterOf(out.runtime, s.GetPlacement(), devices, storage), needs, ports)
	out.layout = p.layoutOf(out.shape.filter, s.GetPlacement())
	out.wishes = p.wishesOf(s.GetPlacement())
	out.maxPerNode = s.GetPlacement().GetMaxPerNode()
	return out
}

func typeOf(s *pb.WorkloadSpec) pb.WorkloadType {
	if t := s.GetType(); t != pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED {
		return t
	}
	switch s.GetSpec().(type) {
	case *pb.WorkloadSpec_Container:
		return pb.WorkloadType_CONTAINER
	case *pb.WorkloadSpec_Compose:
		return pb.WorkloadType_COMPOSE
	case *pb.WorkloadSpec_Vm:
		return pb.WorkloadType_VM
	case *pb.WorkloadSpec_Process:
		return pb.WorkloadType_PROCESS
	}
	return pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED
}

// needsOf is what a replica reserves. What a VM is given counts where its
// resources do not say more.
func needsOf(s *pb.WorkloadSpec) (amounts, []*pb.Port, error) {
	c, err := model.ParseResources(s.GetResources())
	if err != nil {
		return amounts{}, nil, err
	}
	needs := amounts{c.CpuMillis, c.MemoryBytes, c.DiskBytes}
	if vm := s.GetVm(); vm != nil {
		needs[cpu] = max(needs[cpu], int64(vm.Vcpus)*1000)
		needs[memory] = max(needs[memory], vm.MemoryMb*bytesPerMB)
		var disks int64
		for _, d := range vm.Disks {
			disks += d.SizeGb * bytesPerGB
		}
		needs[disk] = max(needs[disk], disks)
	}
	ports := s.GetContainer().GetPorts()
	if s.GetProcess() != nil {
		ports = s.GetProcess().Ports
	}
	return needs, ports, nil
}

// shapeOf finds or makes the shape with a filter, whose use it takes over.
func (p *Picture) shapeOf(f *filter, needs amounts, ports []*pb.Port) *shape {
	key := []byte(f.key)
	for _, n := range needs {
		key = strconv.AppendInt(append(key, 0), n, 10)
	}
	for _, port := range ports {
		for _, n := range []int32{port.HostPort, port.ContainerPort} {
			key = strconv.AppendInt(append(key, 0), int64(n), 10)
		}
		key = strconv.AppendQuote(strconv.AppendQuote(key, port.Protocol), port.HostIp)
	}
	if known := p.shapes[string(key)]; known != nil {
		p.dropFilter(f)
		known.uses++
		return known
	}
	s := &shape{key: string(key), uses: 1, filter: f, needs: needs, ports: ports}
	p.shapes[s.key] = s
	return s
}

// dropWant gives back what a want shares with others.
func (p *Picture) dropWant(w *want) {
	for _, h := range w.wishes {
		p.dropTerm(h.term)
	}
	p.dropLayout(w.layout)
	p.dropShape(w.shape)
}

func (p *Picture) dropShape(s *shape) {
	if s.uses--; s.uses == 0 {
		p.dropFilter(s.filter)
		delete(p.shapes, s.key)
	}
}

// prepareShape brings what is known of the shape up to date with the nodes.
func (p *Picture) prepareShape(s *shape) {
	p.prepare(s.filter)
	if s.full == nil || s.growth != p.growth || s.epoch != p.index.epoch {
		s.full, s.growth, s.epoch = s.full.sized(len(p.index.slots)), p.growth, p.index.epoch
	}
}
