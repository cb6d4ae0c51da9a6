package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// page is a description of one thing: lines of name and value, then tables.
type page struct {
	b     strings.Builder
	color bool
	wide  bool
}

// field adds a line unless there is nothing to say.
func (p *page) field(name, value string) {
	if value != "" {
		fmt.Fprintf(&p.b, "%-12s%s\n", name+":", oneLine(value))
	}
}

func (p *page) section(title string, t table) {
	if len(t.rows) == 0 {
		return
	}
	fmt.Fprintf(&p.b, "\n%s:\n", title)
	var inner strings.Builder
	_ = t.write(&inner, p.wide, p.color) // a strings.Builder takes everything
	for _, line := range strings.SplitAfter(strings.TrimSuffix(inner.String(), "\n"), "\n") {
		p.b.WriteString("  " + line)
	}
	p.b.WriteByte('\n')
}

func (p *page) write(w io.Writer) error {
	_, err := io.WriteString(w, p.b.String())
	return err
}

func (p *page) workload(w *pb.Workload, runs []*pb.Workload, events []*pb.Event, now time.Time) {
	s, st := w.GetSpec(), w.GetStatus()
	p.field("ID", s.GetId())
	p.field("Type", strings.TrimSuffix(typeName(typeOf(s))+", "+strings.ToLower(s.GetKind().String()), ", service"))
	state := stateName(st.GetState())
	if want := s.GetDesiredState(); want != pb.DesiredState_DESIRED_RUNNING {
		state += " (wanted: " + strings.ToLower(strings.TrimPrefix(want.String(), "DESIRED_")) + ")"
	}
	p.field("State", state)
	p.field("Reason", reason(st.GetReason()))
	if at := st.GetReason().GetNextRetryAt(); at != nil {
		p.field("Next try", clock(at, now))
	}
	switch {
	case s.GetSchedule() != nil:
		last, next := lastAndNext(w, now)
		p.field("Schedule", scheduleText(s.Schedule))
		p.field("Last run", last)
		p.field("Next run", next)
	case s.GetKind() == pb.WorkloadKind_JOB:
		p.field("Replicas", fmt.Sprintf("%s completed, %d running", completed(w), st.GetRunning()))
		if w.Parent != "" {
			p.field("Run of", w.Parent+", due "+clock(w.ScheduledTime, now))
		}
	default:
		p.field("Replicas", fmt.Sprintf("%s running, %d at the current revision", running(w), st.GetUpdated()))
	}
	p.field("Rollout", rolloutText(w))
	p.field("Runs", whatRuns(s))
	p.field("Resources", resourcesText(s.GetResources()))
	p.field("Placement", placementText(s.GetPlacement()))
	p.field("Labels", labelText(s.GetLabels()))
	p.field("Revision", w.Revision)
	p.field("Created", clock(w.CreateTime, now)+" ("+age(w.CreateTime, now)+" ago)")
	if w.UpdateTime != nil {
		p.field("Updated", clock(w.UpdateTime, now)+" ("+age(w.UpdateTime, now)+" ago)")
	}
	p.section("Runs", runTable(runs, now))
	p.section("Replicas", replicaTable(w.Replicas, now))
	p.section("Events", eventTable(events, now))
}

// whatRuns is the image or the command line.
func whatRuns(s *pb.WorkloadSpec) string {
	switch x := s.GetSpec().(type) {
	case *pb.WorkloadSpec_Container:
		return strings.Join(append(append([]string{x.Container.Image}, x.Container.Command...), x.Container.Args...), " ")
	case *pb.WorkloadSpec_Process:
		return strings.Join(append([]string{x.Process.Command}, x.Process.Args...), " ")
	case *pb.WorkloadSpec_Compose:
		if x.Compose.GitRepo != "" {
			return strings.TrimSuffix(x.Compose.GitRepo+" "+x.Compose.GitRef, " ")
		}
		return "compose file in the spec"
	case *pb.WorkloadSpec_Vm:
		return x.Vm.OsImage
	}
	return ""
}

func resourcesText(r *pb.Resources) string {
	var parts []string
	for _, x := range []struct{ name, value string }{{"cpu", r.GetCpu()}, {"memory", r.GetMemory()}, {"disk", r.GetDisk()}} {
		if x.value != "" {
			parts = append(parts, x.name+" "+x.value)
		}
	}
	for _, d := range r.GetDevices() {
		text := fmt.Sprintf("%d %s", max(1, d.Count), d.Name)
		for _, c := range d.Constraints {
			text += " with " + conditionText(c.Label, c.Operator, c.Values)
		}
		parts = append(parts, text)
	}
	for _, s := range r.GetStorage() {
		text := s.Size + " of storage"
		if s.Pool != "" {
			text += " in " + s.Pool
		}
		if s.Driver != "" {
			text += " by " + s.Driver
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, ", ")
}

func placementText(pl *pb.Placement) string {
	if pl == nil {
		return ""
	}
	parts := []string{strings.ToLower(strings.ReplaceAll(pl.Policy.String(), "_", " "))}
	if len(pl.Nodes) > 0 {
		parts = append(parts, "nodes "+strings.Join(pl.Nodes, ","))
	}
	if len(pl.NodeLabels) > 0 {
		parts = append(parts, labelText(pl.NodeLabels))
	}
	for _, c := range pl.Constraints {
		parts = append(parts, conditionText(c.Label, c.Operator, c.Values))
	}
	for _, x := range pl.Affinities {
		parts = append(parts, fmt.Sprintf("prefers %s (%d)", conditionText(x.Label, x.Operator, x.Values), x.GetWeight()))
	}
	for _, x := range pl.Spread {
		text := "spread over " + x.Label
		if x.MaxSkew > 0 {
			text += fmt.Sprintf(" (max_skew %d)", x.MaxSkew)
		}
		parts = append(parts, text)
	}
	for _, x := range pl.WorkloadAffinities {
		parts = append(parts, wishText(x))
	}
	if pl.MaxPerNode > 0 {
		parts = append(parts, fmt.Sprintf("at most %d on a node", pl.MaxPerNode))
	}
	if len(pl.Pools) > 0 {
		parts = append(parts, "pools "+strings.Join(pl.Pools, ","))
	}
	for _, t := range pl.Tolerations {
		parts = append(parts, tolerationText(t))
	}
	return strings.Join(parts, "; ")
}

// tolerationText is a toleration as taints are written; what it leaves out is *.
func tolerationText(t *pb.Toleration) string {
	key, value, effect := t.Key, "*", "*"
	if key == "" {
		key = "*"
	}
	if t.Value != nil {
		value = *t.Value
	}
	if t.Effect != nil {
		effect = camel(t.Effect.String())
	}
	return "tolerates " + key + "=" + value + ":" + effect
}

func wishText(a *pb.WorkloadAffinity) string {
	text := "near "
	if a.Anti {
		text = "away from "
	}
	text += a.Workload + labelText(a.Labels)
	if a.Topology != "" {
		text += " by " + a.Topology
	}
	if a.Weight > 0 {
		text += fmt.Sprintf(" (%d)", a.Weight)
	}
	return text
}

func conditionText(label string, operator pb.Constraint_Operator, values []string) string {
	name := strings.ToLower(strings.ReplaceAll(operator.String(), "_", " "))
	return strings.TrimSpace(label + " " + name + " " + strings.Join(values, ","))
}

func (p *page) node(n *pb.Node, events []*pb.Event, now time.Time) {
	p.field("ID", n.Id)
	p.field("State", nodeState(n))
	if n.Draining && n.DrainDeadline != nil {
		p.field("Drained by", n.DrainDeadline.AsTime().Format(time.RFC3339))
	}
	p.field("Reason", reason(n.Reason))
	p.field("Address", n.Address)
	p.field("Reserved", fmt.Sprintf("cpu %s, memory %s, disk %s", cpuShare(n.Reserved, n.Capacity), memoryShare(n.Reserved, n.Capacity), diskShare(n.Reserved, n.Capacity)))
	if u := n.Usage; u != nil {
		p.field("Used", fmt.Sprintf("cpu %.0f%%, memory %s, disk %s (%s ago)", u.CpuPercent, bytesText(u.MemoryBytes), bytesText(u.DiskBytes), age(u.CollectedAt, now)))
	}
	p.field("Workloads", fmt.Sprint(n.Assignments))
	p.field("Heartbeat", ago(age(n.LastHeartbeat, now)))
	p.field("Pool", model.PoolOf(n))
	p.field("Labels", labelText(nodeLabels(n)))
	p.field("Taints", taintsText(n))
	p.field("Platform", strings.TrimSpace(strings.Trim(n.Os+"/"+n.Arch, "/")+" "+n.Kernel))
	p.field("Version", n.Version)
	p.field("Joined", ago(age(n.CreateTime, now)))
	runtimes := table{head: []string{"RUNTIME", "FOR", "VERSION", "STATE", "MESSAGE"}}
	for _, r := range n.Runtimes {
		state := "Ready"
		if !r.Healthy {
			state = "NotReady"
		}
		runtimes.add(r.Name, typeName(r.Type), r.Version, state, r.Message)
	}
	p.section("Runtimes", runtimes)
	devices := table{head: []string{"DEVICE", "IDS", "ATTRIBUTES"}}
	for _, d := range n.Devices {
		devices.add(d.Name, strings.Join(d.Ids, ","), labelText(d.Attributes))
	}
	p.section("Devices", devices)
	pools := table{head: []string{"POOL", "DRIVER", "CAPACITY", "PATH"}}
	for _, s := range n.StoragePools {
		pools.add(s.Name, s.Driver, bytesText(s.CapacityBytes), s.Path)
	}
	p.section("Storage pools", pools)
	p.section("Events", eventTable(events, now))
}

func ago(age string) string {
	if age == "-" {
		return ""
	}
	return age + " ago"
}

func (p *page) cluster(s *pb.ClusterSummary, now time.Time) {
	p.field("Cluster", strings.TrimSpace(s.GetCluster().GetName()+" "+s.GetCluster().GetId()))
	p.field("Created", ago(age(s.GetCluster().GetCreateTime(), now)))
	p.field("Leader", fmt.Sprintf("%s (epoch %d)", s.Leader, s.Epoch))
	p.field("Servers", fmt.Sprintf("%d voting; %s", s.Voters, tolerance(s.FailureTolerance)))
	p.field("Nodes", fmt.Sprintf("%d of %d ready", s.NodesReady, s.Nodes))
	p.field("Reserved", fmt.Sprintf("cpu %s, memory %s, disk %s", cpuShare(s.Reserved, s.Capacity), memoryShare(s.Reserved, s.Capacity), diskShare(s.Reserved, s.Capacity)))
	p.field("Workloads", workloadCounts(s.WorkloadsByState))
	p.field("Revision", fmt.Sprint(s.Revision))
	p.field("Version", s.Version)
}

// workloadCounts is how many workloads there are in each state, in the order
// of the states.
func workloadCounts(counts map[string]int32) string {
	byName := map[string]int32{}
	for name, n := range counts {
		if value, ok := pb.State_value[name]; ok {
			name = stateName(pb.State(value))
		}
		byName[name] += n
	}
	var parts []string
	for value := range int32(len(pb.State_name)) {
		name := camel(pb.State(value).String())
		if n := byName[name]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, name))
		}
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}
