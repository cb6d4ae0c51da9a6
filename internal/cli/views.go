package cli

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func workloadTable(workloads []*pb.Workload, now time.Time) table {
	t := table{head: []string{"ID", "TYPE", "STATE", "RUNNING", "AGE", "REASON", "+REVISION", "+NODES", "+PORTS", "+LABELS"}}
	// When jobs run is shown where there are any that run by a schedule.
	scheduled := slices.ContainsFunc(workloads, func(w *pb.Workload) bool { return w.GetSpec().GetSchedule() != nil })
	if scheduled {
		t.head = slices.Insert(t.head, 5, "LAST RUN", "NEXT RUN")
	}
	for _, w := range workloads {
		row := []string{
			w.GetSpec().GetId(), typeName(typeOf(w.Spec)), stateName(w.GetStatus().GetState()), running(w), age(w.CreateTime, now),
			short(reason(w.GetStatus().GetReason())), w.Revision, strings.Join(nodesOf(w), ","), workloadPorts(w), labelText(w.GetSpec().GetLabels()),
		}
		if scheduled {
			last, next := lastAndNext(w, now)
			row = slices.Insert(row, 5, last, next)
		}
		t.add(row...)
	}
	return t
}

// completed is how many replicas of a job have completed, of how many.
func completed(w *pb.Workload) string {
	return fmt.Sprintf("%d/%d", w.GetStatus().GetCompleted(), w.GetStatus().GetDesired())
}

// typeOf is the type that is written, or that of the spec that is there.
func typeOf(s *pb.WorkloadSpec) pb.WorkloadType {
	if s.GetType() != pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED {
		return s.GetType()
	}
	return model.TypeOf(s)
}

func running(w *pb.Workload) string {
	desired := w.GetStatus().GetDesired()
	if w.Status == nil {
		desired = 1
		if w.GetSpec().Replicas != nil {
			desired = w.Spec.GetReplicas()
		}
	}
	return fmt.Sprintf("%d/%d", w.GetStatus().GetRunning(), desired)
}

func nodesOf(w *pb.Workload) []string {
	var nodes []string
	for _, r := range w.Replicas {
		if r.NodeId != "" {
			nodes = append(nodes, r.NodeId)
		}
	}
	slices.Sort(nodes)
	return slices.Compact(nodes)
}

func workloadPorts(w *pb.Workload) string {
	var texts []string
	for _, r := range w.Replicas {
		if len(r.Ports) > 0 {
			texts = append(texts, portsText(r.Address, r.Ports))
		}
	}
	return strings.Join(texts, ",")
}

func nodeTable(nodes []*pb.Node, now time.Time) table {
	t := table{head: []string{"ID", "STATE", "CPU", "MEMORY", "WORKLOADS", "RUNTIMES", "AGE", "+DISK", "+ADDRESS", "+VERSION", "+HEARTBEAT", "+PLATFORM", "+POOL", "+LABELS", "+TAINTS", "+REASON"}}
	for _, n := range nodes {
		t.add(n.Id, nodeState(n), cpuShare(n.Reserved, n.Capacity), memoryShare(n.Reserved, n.Capacity), fmt.Sprint(n.Assignments),
			runtimeText(n.Runtimes), age(n.CreateTime, now), diskShare(n.Reserved, n.Capacity), n.Address, n.Version, age(n.LastHeartbeat, now),
			strings.Trim(n.Os+"/"+n.Arch, "/"), model.PoolOf(n), labelText(nodeLabels(n)), taintsText(n), reason(n.Reason))
	}
	return t
}

func memberTable(members []*pb.Member, now time.Time) table {
	t := table{head: []string{"NAME", "ROLE", "STATE", "ADDRESS", "AGE", "+APPLIED", "+HTTPS", "+VERSION", "+ID"}}
	for _, m := range members {
		if m.Removed {
			continue
		}
		t.add(m.Name, memberRole(m), memberState(m), m.GrpcAddress, age(m.JoinTime, now), fmt.Sprint(m.AppliedIndex), m.HttpsAddress, m.Version, m.Id)
	}
	return t
}

func memberRole(m *pb.Member) string {
	switch {
	case m.Leader:
		return "leader"
	case m.Voter:
		return "voter"
	case m.Demoted:
		return "non-voter (demoted)"
	}
	return "non-voter"
}

func memberState(m *pb.Member) string {
	if m.Reachable {
		return "reachable"
	}
	return "unreachable"
}

func tokenTable(tokens []*pb.Token, now time.Time) table {
	t := table{head: []string{"ID", "ROLE", "NAME", "USES LEFT", "EXPIRES", "+LABELS", "+CREATED BY", "+AGE"}}
	for _, k := range tokens {
		name := k.Node
		if name == "" {
			name = "any"
		}
		t.add(k.Id, roleText(k.Role), name, fmt.Sprint(k.UsesLeft), expiry(k, now), labelText(k.Labels), k.CreatedBy, age(k.CreateTime, now))
	}
	return t
}

func expiry(k *pb.Token, now time.Time) string {
	left := k.ExpireTime.AsTime().Sub(now)
	if left <= 0 {
		return "expired"
	}
	// What was just given an hour has one, not 59 minutes.
	return "in " + span(left.Round(time.Second))
}

func eventTable(events []*pb.Event, now time.Time) table {
	t := table{head: []string{"TIME", "EVENT", "WORKLOAD", "NODE", "MESSAGE", "+ACTOR", "+REASON"}}
	for _, e := range events {
		t.add(eventRow(e, now)...)
	}
	return t
}

func eventRow(e *pb.Event, now time.Time) []string {
	workload := e.WorkloadId
	if e.Replica != nil {
		workload += fmt.Sprintf("/%d", e.GetReplica())
	}
	text := e.Message
	if text == "" {
		text = reason(e.Reason)
	}
	if e.Drift != pb.DriftKind_DRIFT_KIND_UNSPECIFIED {
		text = e.Drift.String() + ": " + text
	}
	return []string{clock(e.Time, now), eventName(e.Type), workload, e.NodeId, text, e.Actor, reason(e.Reason)}
}

// eventLine is an event as it comes, when later ones and so the width of
// columns are not known.
func eventLine(e *pb.Event, now time.Time) string {
	row := eventRow(e, now)
	text := fmt.Sprintf("%-8s  %-18s", row[0], row[1])
	for _, cell := range row[2:5] {
		if cell != "" {
			text += "  " + oneLine(cell)
		}
	}
	return text
}

func replicaTable(replicas []*pb.Replica, now time.Time) table {
	t := table{head: []string{"REPLICA", "NODE", "STATE", "RESTARTS", "SINCE", "PORTS", "REASON", "+GENERATION", "+REVISION", "+RUNTIME ID"}}
	for _, r := range replicas {
		t.add(fmt.Sprint(r.Replica), r.NodeId, stateName(r.State), fmt.Sprint(r.Restarts), age(r.LastTransition, now), portsText(r.Address, r.Ports),
			replicaReason(r), fmt.Sprint(r.Generation), r.Revision, r.RuntimeId)
	}
	return t
}

// replicaReason adds the exit code, which most often says it all.
func replicaReason(r *pb.Replica) string {
	text := reason(r.Reason)
	if r.ExitCode != nil && r.State != pb.State_RUNNING && !strings.Contains(text, "exit") {
		text = strings.TrimPrefix(text+fmt.Sprintf("; exit code %d", r.GetExitCode()), "; ")
	}
	return text
}
