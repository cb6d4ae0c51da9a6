package scheduler

import (
	"flag"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

var update = flag.Bool("update", false, "write the answers that the scripts get into testdata")

// TestScripts plays testdata/*.txt: blocks of commands, each followed by "----"
// and what is decided on account of them, up to an empty line.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			s := &script{world: newWorld(t), specs: map[string]*pb.WorkloadSpec{}}
			var skipping bool
			for line := range strings.Lines(string(text)) {
				line = strings.TrimSuffix(line, "\n")
				switch {
				case line == "----":
					fmt.Fprintf(&got, "----\n%s", s.decide())
					skipping = true
				case skipping && line != "":
				case line == "" || strings.HasPrefix(line, "#"):
					skipping = false
					got.WriteString(line + "\n")
				default:
					got.WriteString(line + "\n")
					s.command(strings.Fields(line))
				}
			}
			if *update {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got.String() != string(text) {
				t.Errorf("answers differ; `go test -update` writes these:\n%s", diff(string(text), got.String()))
			}
		})
	}
}

func diff(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	var out strings.Builder
	for i := range max(len(w), len(g)) {
		var a, b string
		if i < len(w) {
			a = w[i]
		}
		if i < len(g) {
			b = g[i]
		}
		if a != b {
			fmt.Fprintf(&out, "line %d\n- %s\n+ %s\n", i+1, a, b)
		}
	}
	return out.String()
}

type script struct {
	*world
	specs map[string]*pb.WorkloadSpec
	// Whether records of rollouts are told.
	rollouts bool
	out      strings.Builder
}

// command carries out one line.
func (s *script) command(f []string) {
	verb, args := f[0], f[1:]
	switch verb {
	case "node":
		s.addNode(args)
	case "lose":
		s.lose(args[0])
	case "return":
		s.comeBack(args[0])
	case "suspect":
		s.remove(model.NodeLeaseKey(args[0]))
	case "forget":
		s.remove(model.NodeKey(args[0]))
	case "cordon", "uncordon":
		s.changeNode(args[0], func(n *pb.Node) {
			n.Unschedulable, n.Draining, n.State = verb == "cordon", false, pb.NodeState_READY
		})
	case "drain":
		s.changeNode(args[0], func(n *pb.Node) {
			n.Unschedulable, n.Draining, n.State = true, true, pb.NodeState_DRAINING
			if len(args) > 1 {
				n.DrainDeadline = timestamppb.New(s.now.Add(s.duration(args[1])))
			}
		})
	case "label":
		s.changeNode(args[0], func(n *pb.Node) {
			k, v, _ := strings.Cut(args[1], "=")
			n.UserLabels = map[string]string{k: v}
		})
	case "taint":
		s.changeNode(args[0], func(n *pb.Node) { n.UserTaints = s.taints(args[1:]) })
	case "pool":
		s.changeNode(args[0], func(n *pb.Node) { n.Pool = args[1] })
	case "unwell", "well":
		s.changeNode(args[0], func(n *pb.Node) { n.Runtimes[0].Healthy = verb == "well" })
	case "submit", "update":
		s.submitSpec(args)
	case "scale":
		s.changeWorkload(args[0], func(w *pb.Workload) { w.Spec.Replicas = proto.Int32(int32(s.number(args[1]))) })
	case "stop", "start", "delete":
		s.changeWorkload(args[0], func(w *pb.Workload) {
			w.Spec.DesiredState = map[string]pb.DesiredState{"stop": 1, "delete": 2}[verb]
		})
	case "restart":
		s.changeWorkload(args[0], func(w *pb.Workload) { w.RestartGeneration++ })
	case "retry":
		s.retry(args[0])
	case "undo":
		s.undo(args[0])
	case "promote":
		s.changeWorkload(args[0], func(w *pb.Workload) { w.PromotedRevision = w.Revision })
	case "leader":
		// Another one, which knows what is stored and nothing else.
		s.picture, s.unseen = s.rebuilt(), nil
	case "rollouts":
		s.rollouts = true
	case "scheduler":
		s.configure(args)
	case "agents":
		s.agents()
	case "agent":
		s.catchUp(args[0])
	case "report":
		s.reportLine(args)
	case "after":
		s.now = s.now.Add(s.duration(args[0]))
	case "preemption":
		s.put(model.SchedulerKey, &pb.SchedulerConfig{NoPreemption: args[0] == "off"})
	case "run":
		s.run(args[0])
	case "why":
		s.see()
		s.explain(args[0])
	case "whatif":
		s.whatIf(args)
	default:
		s.t.Fatalf("unknown command %q", verb)
	}
}

func (s *script) number(text string) int64 {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

func (s *script) duration(text string) time.Duration {
	d, err := time.ParseDuration(text)
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

func (s *script) addNode(args []string) {
	capacity := &pb.Resources{Cpu: "4", Memory: "8Gi", Disk: "100Gi"}
	labels := map[string]string{}
	runtime := pb.WorkloadType_CONTAINER
	var devices []*pb.Device
	var pools []*pb.StoragePool
	for _, a := range args[1:] {
		k, v, _ := strings.Cut(a, "=")
		switch k {
		case "cpu":
			capacity.Cpu = v
		case "memory":
			capacity.Memory = v
		case "disk":
			capacity.Disk = v
		case "device":
			// gpu:0,1,2 or gpu:0,1:memory=40
			name, rest, _ := strings.Cut(v, ":")
			ids, attribute, _ := strings.Cut(rest, ":")
			d := &pb.Device{Name: name, Ids: strings.Split(ids, ",")}
			for _, id := range d.Ids {
				d.Paths = append(d.Paths, "/dev/"+name+id)
			}
			if k, v, ok := strings.Cut(attribute, "="); ok {
				d.Attributes = map[string]string{k: v}
			}
			devices = append(devices, d)
		case "storage":
			// data:10Gi or data:10Gi:nfs
			parts := strings.Split(v+":local", ":")
			n, err := model.ParseBytes(parts[1])
			if err != nil {
				s.t.Fatal(err)
			}
			pools = append(pools, &pb.StoragePool{Name: parts[0], CapacityBytes: n, Driver: parts[2], Path: "/srv/" + parts[0]})
		case "runtime":
			runtime = pb.WorkloadType(pb.WorkloadType_value[strings.ToUpper(v)])
		default:
			labels[k] = v
		}
	}
	c, err := model.ParseResources(capacity)
	if err != nil {
		s.t.Fatal(err)
	}
	s.node(args[0], c.CpuMillis, c.MemoryBytes, c.DiskBytes, labels, runtime)
	s.changeNode(args[0], func(n *pb.Node) { n.Devices, n.StoragePools = devices, pools })
}

// configure reads "rebalance=true moves=2 interval=60s threshold=10".
func (s *script) configure(args []string) {
	config := &pb.SchedulerConfig{}
	for _, a := range args {
		k, v, _ := strings.Cut(a, "=")
		switch k {
		case "rebalance":
			config.Rebalance = v == "true"
		case "moves":
			config.RebalanceMoves = int32(s.number(v))
		case "interval":
			config.RebalanceIntervalSeconds = int32(s.duration(v) / time.Second)
		case "threshold":
			config.RebalanceThreshold = int32(s.number(v))
		case "no-preemption":
			config.NoPreemption = v == "true"
		default:
			s.t.Fatalf("unknown setting %q", k)
		}
	}
	s.put(model.SchedulerKey, config)
}

// submitSpec reads "web replicas=3 cpu=500m image=v1 …". What is not said stays
// as it was; the revision is the image and the resources.
func (s *script) submitSpec(args []string) {
	id := args[0]
	spec := s.specs[id]
	if spec == nil {
		spec = &pb.WorkloadSpec{Id: id, Resources: &pb.Resources{Cpu: "100m"}, Placement: &pb.Placement{}}
		// A replica is healthy as soon as it runs, and nothing has a deadline: scripts
		// that are about updates say otherwise.
		spec.Update = &pb.UpdateStrategy{MinHealthySeconds: proto.Int32(0), HealthyDeadlineSeconds: proto.Int32(0), ProgressDeadlineSeconds: proto.Int32(0)}
		spec.Spec = &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "v1"}}
		s.specs[id] = spec
	}
	container := spec.GetContainer()
	for _, a := range args[1:] {
		k, v, _ := strings.Cut(a, "=")
		switch k {
		case "replicas":
			spec.Replicas = proto.Int32(int32(s.number(v)))
		case "kind":
			spec.Kind = pb.WorkloadKind(pb.WorkloadKind_value[strings.ToUpper(v)])
		case "cpu":
			spec.Resources.Cpu = v
		case "memory":
			spec.Resources.Memory = v
		case "disk":
			spec.Resources.Disk = v
		case "image":
			container.Image = v
		case "parallel":
			spec.Update.MaxParallel = int32(s.number(v))
		case "min":
			spec.Update.MinHealthy = v
		case "surge":
			spec.Update.MaxSurge = int32(s.number(v))
		case "canary":
			spec.Update.Canary = int32(s.number(v))
		case "promote":
			spec.Update.AutoPromote = v == "auto"
		case "rollback":
			spec.Update.AutoRollback = v == "auto"
		case "healthy":
			spec.Update.MinHealthySeconds = proto.Int32(int32(s.duration(v).Seconds()))
		case "deadline":
			spec.Update.HealthyDeadlineSeconds = proto.Int32(int32(s.duration(v).Seconds()))
		case "progress":
			spec.Update.ProgressDeadlineSeconds = proto.Int32(int32(s.duration(v).Seconds()))
		case "priority":
			spec.Priority = proto.Int32(int32(s.number(v)))
		case "exclusive":
			spec.Exclusive = v == "yes"
		case "policy":
			spec.Placement.Policy = pb.PlacementPolicy(pb.PlacementPolicy_value[strings.ToUpper(v)])
		case "nodes":
			spec.Placement.Nodes = strings.Split(v, ",")
		case "port":
			host, inside, _ := strings.Cut(v, ":")
			container.Ports = append(container.Ports, &pb.Port{HostPort: int32(s.number(host)), ContainerPort: int32(s.number(inside))})
		case "preempts":
			spec.Preemption = &pb.Preemption{NeverPreempts: v == "no"}
		case "protected":
			spec.Preemption = &pb.Preemption{Protected: v == "yes"}
		case "cron", "zone", "concurrency", "within", "keep", "suspend":
			s.schedule(spec, k, v)
		case "where":
			spec.Placement.Constraints = append(spec.Placement.Constraints, parseConstraint(v))
		case "tolerate":
			spec.Placement.Tolerations = append(spec.Placement.Tolerations, parseToleration(v))
		case "pools":
			spec.Placement.Pools = strings.Split(v, ",")
		case "labels":
			name, value, _ := strings.Cut(v, "=")
			spec.Labels = map[string]string{name: value}
		case "near", "apart":
			spec.Placement.WorkloadAffinities = append(spec.Placement.WorkloadAffinities, s.parseWish(v, k == "apart"))
		case "device":
			// gpu, gpu:2 or gpu:2:memory>40
			parts := strings.SplitN(v, ":", 3)
			d := &pb.DeviceRequest{Name: parts[0]}
			if len(parts) > 1 {
				d.Count = int32(s.number(parts[1]))
			}
			if len(parts) > 2 {
				d.Constraints = append(d.Constraints, parseConstraint(parts[2]))
			}
			spec.Resources.Devices = append(spec.Resources.Devices, d)
		case "storage":
			// data:10Gi, or :10Gi:nfs for any of a driver
			parts := strings.Split(v+":", ":")
			spec.Resources.Storage = append(spec.Resources.Storage, &pb.StorageRequest{Pool: parts[0], Size: parts[1], Driver: parts[2]})
		case "max":
			spec.Placement.MaxPerNode = int32(s.number(v))
		case "spread":
			spec.Placement.Spread = append(spec.Placement.Spread, s.parseSpread(v))
		case "prefer":
			weight, condition, _ := strings.Cut(v, ":")
			c := parseConstraint(condition)
			spec.Placement.Affinities = append(spec.Placement.Affinities, &pb.Affinity{
				Label: c.Label, Operator: c.Operator, Values: c.Values, Weight: proto.Int32(int32(s.number(weight))),
			})
		default:
			s.t.Fatalf("unknown field %q", k)
		}
	}
	s.submit(proto.CloneOf(spec), container.Image+"/"+spec.Resources.Cpu)
}

func (s *script) taints(texts []string) []*pb.Taint {
	var taints []*pb.Taint
	for _, text := range texts {
		t, err := model.ParseTaint(text)
		if err != nil {
			s.t.Fatal(err)
		}
		taints = append(taints, t)
	}
	return taints
}

// parseToleration reads a taint, or its beginning: "gpu", "gpu=yes".
func parseToleration(text string) *pb.Toleration {
	if t, err := model.ParseTaint(text); err == nil {
		return &pb.Toleration{Key: t.Key, Value: &t.Value, Effect: &t.Effect}
	}
	key, value, given := strings.Cut(text, "=")
	if !given {
		return &pb.Toleration{Key: key}
	}
	return &pb.Toleration{Key: key, Value: &value}
}

// parseWish reads "db", "app=shop", "db@zone", "db@zone/50".
func (s *script) parseWish(text string, anti bool) *pb.WorkloadAffinity {
	out := &pb.WorkloadAffinity{Anti: anti}
	text, weight, soft := strings.Cut(text, "/")
	if soft {
		out.Weight = int32(s.number(weight))
	}
	who, topology, _ := strings.Cut(text, "@")
	out.Topology = topology
	if name, value, labels := strings.Cut(who, "="); labels {
		out.Labels = map[string]string{name: value}
	} else {
		out.Workload = who
	}
	return out
}

// parseSpread reads "zone/weight=80/skew=1/eu=70/us=30".
func (s *script) parseSpread(text string) *pb.Spread {
	parts := strings.Split(text, "/")
	out := &pb.Spread{Label: parts[0]}
	for _, part := range parts[1:] {
		k, v, _ := strings.Cut(part, "=")
		switch n := int32(s.number(v)); k {
		case "weight":
			out.Weight = n
		case "skew":
			out.MaxSkew = n
		default:
			out.Targets = append(out.Targets, &pb.SpreadTarget{Value: k, Percent: n})
		}
	}
	return out
}

// schedule sets a field of the schedule; the expression has _ for blanks.
func (s *script) schedule(spec *pb.WorkloadSpec, k, v string) {
	if spec.Schedule == nil {
		spec.Schedule = &pb.Schedule{StartDeadlineSeconds: proto.Int32(3600)}
	}
	sch := spec.Schedule
	switch k {
	case "cron":
		if v == "none" {
			spec.Schedule = nil
		}
		sch.Cron = strings.ReplaceAll(v, "_", " ")
	case "zone":
		sch.Timezone = v
	case "concurrency":
		sch.Concurrency = pb.Schedule_Concurrency(pb.Schedule_Concurrency_value[strings.ToUpper(v)])
	case "within":
		sch.StartDeadlineSeconds = proto.Int32(int32(s.duration(v).Seconds()))
	case "keep":
		sch.KeepCompleted, sch.KeepFailed = proto.Int32(int32(s.number(v))), proto.Int32(int32(s.number(v)))
	case "suspend":
		sch.Suspend = v == "yes"
	}
}

func parseConstraint(text string) *pb.Constraint {
	for _, form := range []struct {
		sign     string
		operator pb.Constraint_Operator
	}{
		{"!=", pb.Constraint_NOT_IN}, {"=", pb.Constraint_IN}, {">", pb.Constraint_GREATER}, {"<", pb.Constraint_LESS},
	} {
		if label, value, ok := strings.Cut(text, form.sign); ok {
			return &pb.Constraint{Label: label, Operator: form.operator, Values: strings.Split(value, ",")}
		}
	}
	if label, ok := strings.CutPrefix(text, "!"); ok {
		return &pb.Constraint{Label: label, Operator: pb.Constraint_NOT_EXISTS}
	}
	return &pb.Constraint{Label: text, Operator: pb.Constraint_EXISTS}
}

// reportLine reads "web/0 failed EXITED exit code 1", with EXITED! where it is not
// to run again, or "web running" for all replicas.
func (s *script) reportLine(args []string) {
	var reason *pb.Reason
	if len(args) > 2 {
		code, final := strings.CutSuffix(args[2], "!")
		reason = &pb.Reason{Code: pb.ReasonCode(pb.ReasonCode_value[code]), Message: strings.Join(args[3:], " "), Retryable: !final}
	}
	id, number, one := strings.Cut(args[0], "/")
	keys := []string{}
	for key := range s.scan(model.AssignmentsPrefix + id + "/") {
		keys = append(keys, strings.TrimPrefix(key, model.AssignmentsPrefix))
	}
	for key := range s.scan(model.ReplicasPrefix + id + "/") {
		if key = strings.TrimPrefix(key, model.ReplicasPrefix); !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
	}
	for _, key := range keys {
		if one && !strings.HasSuffix(key, fmt.Sprintf("/%06d", s.number(number))) {
			continue
		}
		if args[1] == "gone" {
			s.gone(key)
		} else if !s.report(key, pb.State(pb.State_value[strings.ToUpper(args[1])]), reason) {
			s.t.Fatalf("%s is not assigned", key)
		}
	}
}

// run does what admission does when a user wants a run now.
func (s *script) run(id string) {
	v := worldReader{s.world}
	txn, run, err := model.RunWorkload(v, &pb.WorkloadRequest{Id: id}, model.Meta{Now: s.now, NewID: fmt.Sprintf("new-%d", s.revision)})
	if err != nil {
		fmt.Fprintf(&s.out, "refused: %v\n", err)
		return
	}
	fmt.Fprintf(&s.out, "%s is made\n", run.Spec.Id)
	if !s.apply(txn) {
		s.t.Fatalf("not carried out: %v", txn)
	}
}

func (s *script) explain(id string) {
	e, ok := s.picture.Explain(id)
	if !ok {
		s.t.Fatalf("%s: no explanation", id)
	}
	fmt.Fprintf(&s.out, "why %s: %s\n", id, e.State)
	for _, line := range e.Lines {
		fmt.Fprintf(&s.out, "  %s\n", line)
	}
	for _, r := range e.Replicas {
		fmt.Fprintf(&s.out, "  replica %d %s", r.Replica, r.State)
		if r.NodeId != "" {
			fmt.Fprintf(&s.out, " on %s", r.NodeId)
		}
		if r.Message != "" {
			fmt.Fprintf(&s.out, ": %s", r.Message)
		}
		if r.Reason != nil {
			fmt.Fprintf(&s.out, " [%s]", said(r.Reason))
		}
		s.out.WriteString("\n")
	}
}

// decide lets the scheduler work until it rests, and tells what it did.
func (s *script) decide() string {
	plan := s.settle(func(p *Plan) {
		for _, step := range p.Steps {
			for _, op := range step.Txn.Success {
				s.tell(op)
			}
		}
	})
	if s.out.Len() == 0 {
		s.out.WriteString("nothing to do\n")
	}
	if !plan.Wake.IsZero() {
		fmt.Fprintf(&s.out, "decides again in %s\n", plan.Wake.Sub(s.now))
	}
	out := s.out.String()
	s.out.Reset()
	return out
}

func (s *script) tell(op *pb.RequestOp) {
	if d := op.GetRequestDeleteRange(); d != nil {
		s.tellDelete(string(d.Key))
		return
	}
	key, value := string(op.GetRequestPut().Key), op.GetRequestPut().Value
	kv := &pb.KeyValue{Key: []byte(key), Value: value}
	read := func(m proto.Message) {
		if err := model.Parse(kv, m); err != nil {
			s.t.Fatal(err)
		}
	}
	switch {
	case strings.HasPrefix(key, model.AssignmentsPrefix):
		a := &pb.Assignment{}
		read(a)
		fmt.Fprintf(&s.out, "%s/%d on %s, %s", a.WorkloadId, a.Replica, a.NodeId, a.Revision)
		for _, p := range a.Ports {
			fmt.Fprintf(&s.out, ", port %d", p.HostPort)
		}
		for _, d := range a.Devices {
			fmt.Fprintf(&s.out, ", %s %s", d.Name, strings.Join(d.Ids, "+"))
		}
		for _, p := range a.Storage {
			fmt.Fprintf(&s.out, ", %s in %s", model.FormatBytes(p.Bytes), p.Path)
		}
		if a.DesiredState != pb.DesiredState_DESIRED_RUNNING {
			s.out.WriteString(", stopped")
		}
		fmt.Fprintf(&s.out, " (%s)\n", a.Explanation)
	case strings.HasPrefix(key, model.ReplicasPrefix):
		r := &pb.Replica{}
		read(r)
		fmt.Fprintf(&s.out, "%s/%d may still run on %s\n", r.WorkloadId, r.Replica, r.NodeId)
	case strings.HasPrefix(key, model.RetriesPrefix):
		r := &pb.Retry{}
		read(r)
		fmt.Fprintf(&s.out, "%s/%d %d of %d attempts", r.WorkloadId, r.Replica, r.Attempts, r.MaxAttempts)
		if r.NextRetryAt != nil {
			fmt.Fprintf(&s.out, ", next in %s", r.NextRetryAt.AsTime().Sub(s.now))
		}
		if r.Exhausted {
			s.out.WriteString(", exhausted")
		}
		if len(r.FailedNodes) > 0 {
			fmt.Fprintf(&s.out, ", avoids %s", strings.Join(r.FailedNodes, " "))
		}
		s.out.WriteString("\n")
	case strings.HasPrefix(key, model.EventsPrefix):
		e := &pb.Event{}
		read(e)
		fmt.Fprintf(&s.out, "event %s %s: %s\n", e.Type, e.WorkloadId, e.Message)
	case strings.HasPrefix(key, model.RevisionsPrefix):
	case strings.HasSuffix(key, "/rollout"):
		r := &pb.Rollout{}
		read(r)
		s.tellRollout(key, r)
	case !strings.HasSuffix(key, "/status"):
		w := &pb.Workload{}
		read(w)
		switch {
		case w.Parent == "":
			fmt.Fprintf(&s.out, "%s is to be %s, %d replicas\n", w.Spec.Id, w.Revision, w.Spec.GetReplicas())
		case w.Spec.DesiredState == pb.DesiredState_DESIRED_DELETED:
			fmt.Fprintf(&s.out, "%s is to be deleted\n", w.Spec.Id)
		default:
			fmt.Fprintf(&s.out, "%s is made, a run of %s at %s\n", w.Spec.Id, w.Parent, w.ScheduledTime.AsTime().Format("2006-01-02 15:04"))
		}
	default:
		st := &pb.WorkloadStatus{}
		read(st)
		id, _, _ := model.SplitKey(model.WorkloadsPrefix, key)
		fmt.Fprintf(&s.out, "%s is %s, %d of %d running", id, st.State, st.Running, st.Desired)
		if st.Updated != st.Running {
			fmt.Fprintf(&s.out, ", %d updated", st.Updated)
		}
		if st.Completed > 0 {
			fmt.Fprintf(&s.out, ", %d completed", st.Completed)
		}
		if st.Failed > 0 {
			fmt.Fprintf(&s.out, ", %d failed", st.Failed)
		}
		if st.ActiveRuns > 0 {
			fmt.Fprintf(&s.out, ", %d active", st.ActiveRuns)
		}
		if st.LastRun != nil {
			fmt.Fprintf(&s.out, ", last run %s", st.LastRun.AsTime().Format("15:04"))
		}
		if st.NextRun != nil {
			fmt.Fprintf(&s.out, ", next run %s", st.NextRun.AsTime().Format("15:04"))
		}
		if st.Reason != nil {
			fmt.Fprintf(&s.out, ": %s %s", st.Reason.Code, st.Reason.Message)
		}
		s.out.WriteString("\n")
	}
}

func (s *script) tellRollout(key string, r *pb.Rollout) {
	if !s.rollouts {
		return
	}
	id, _, _ := model.SplitKey(model.WorkloadsPrefix, key)
	state := strings.ToLower(strings.TrimPrefix(r.State.String(), "ROLLOUT_"))
	if r.EndTime == nil != goesOn(r) {
		state += " in full"
	}
	fmt.Fprintf(&s.out, "rollout of %s %s: %s, %d of %d updated, %d healthy", id, r.Revision, state, r.Updated, r.Desired, r.Healthy)
	if r.Canaries > 0 {
		fmt.Fprintf(&s.out, ", %d canaries", r.Canaries)
	}
	if r.Previous != "" {
		fmt.Fprintf(&s.out, ", before it %s", r.Previous)
	}
	if r.FailedRevision != "" {
		fmt.Fprintf(&s.out, ", not %s", r.FailedRevision)
	}
	s.out.WriteString("\n")
}

// undo does what admission does when a user asks for it.
func (s *script) undo(id string) {
	v := reader{s.world}
	txn, w, err := model.RollbackWorkload(v, &pb.RollbackWorkloadRequest{Id: id}, model.Meta{Now: s.now, NewID: fmt.Sprint(s.revision)})
	if err != nil {
		s.t.Fatal(err)
	}
	s.apply(txn)
	s.specs[id] = proto.CloneOf(w.Spec)
}

// reader is a world as admission sees it.
type reader struct{ *world }

func (r reader) Get(key string) (*pb.KeyValue, bool) {
	kv, ok := r.kvs[key]
	return kv, ok
}

func (r reader) Scan(prefix string) iter.Seq[*pb.KeyValue] {
	return func(yield func(*pb.KeyValue) bool) {
		for _, kv := range r.scan(prefix) {
			if !yield(kv) {
				return
			}
		}
	}
}

func (s *script) tellDelete(key string) {
	name := strings.ReplaceAll(key, "/00000", "/")
	switch {
	case strings.HasPrefix(key, model.AssignmentsPrefix):
		fmt.Fprintf(&s.out, "%s is taken away\n", strings.TrimPrefix(name, model.AssignmentsPrefix))
	case strings.HasPrefix(key, model.ReplicasPrefix):
		fmt.Fprintf(&s.out, "%s is known to be gone\n", strings.TrimPrefix(name, model.ReplicasPrefix))
	case strings.HasPrefix(key, model.RetriesPrefix) && !strings.HasSuffix(key, "/"):
		fmt.Fprintf(&s.out, "%s begins anew\n", strings.TrimPrefix(name, model.RetriesPrefix))
	case strings.HasPrefix(key, model.RevisionsPrefix) && !strings.HasSuffix(key, "/"):
		fmt.Fprintf(&s.out, "revision %s is forgotten\n", strings.TrimPrefix(name, model.RevisionsPrefix))
	case strings.HasPrefix(key, model.WorkloadsPrefix) && !strings.HasSuffix(key, "/"):
		fmt.Fprintf(&s.out, "%s is deleted\n", strings.TrimPrefix(name, model.WorkloadsPrefix))
	}
}
