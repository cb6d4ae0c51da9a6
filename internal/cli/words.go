package cli

import (
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// camel writes an enum's name as people say it: RETRY_PENDING is RetryPending.
func camel(enum string) string {
	var b strings.Builder
	for _, word := range strings.Split(enum, "_") {
		if word != "" {
			b.WriteString(word[:1] + strings.ToLower(word[1:]))
		}
	}
	return b.String()
}

func stateName(s pb.State) string {
	if s == pb.State_STATE_UNSPECIFIED {
		return camel(pb.State_PENDING.String())
	}
	return camel(s.String())
}

func typeName(t pb.WorkloadType) string {
	if t == pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED {
		return "-"
	}
	return strings.ToLower(t.String())
}

func eventName(t pb.EventType) string {
	return camel(strings.TrimSuffix(t.String(), "_EVENT"))
}

// nodeState is the state with what an operator did to the node.
func nodeState(n *pb.Node) string {
	state := camel(n.State.String())
	if n.State == pb.NodeState_NODE_STATE_UNSPECIFIED {
		state = camel(pb.State_UNKNOWN.String())
	}
	switch {
	case n.Draining && n.State != pb.NodeState_DRAINING:
		state += ",Draining"
	case n.Unschedulable && !n.Draining && n.State != pb.NodeState_DRAINING:
		state += ",Cordoned"
	}
	return state
}

// age is how long ago t was, in one unit that suits it.
func age(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return "-"
	}
	return span(now.Sub(t.AsTime()))
}

func span(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// counted is a number of things: "1 replica", "2 replicas".
func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// clock is the local time of day for today, else with its date.
func clock(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return "-"
	}
	at := t.AsTime().In(now.Location())
	if at.Format(time.DateOnly) == now.Format(time.DateOnly) {
		return at.Format(time.TimeOnly)
	}
	return at.Format(time.DateTime)
}

// reason is a reason in one line.
func reason(r *pb.Reason) string {
	switch {
	case r == nil:
		return ""
	case r.Code == pb.ReasonCode_REASON_UNSPECIFIED:
		return r.Message
	case r.Message == "":
		return r.Code.String()
	}
	return r.Code.String() + ": " + r.Message
}

const shortText = 60

func short(s string) string {
	if r := []rune(s); len(r) > shortText {
		return string(r[:shortText-1]) + "…"
	}
	return s
}

// bytesText is an amount for people: three digits and a unit, not exact.
func bytesText(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return strconv.FormatInt(n, 10)
	}
	v, i := float64(n), -1
	for v >= 1024 && i < len(units)-1 {
		v /= 1024
		i++
	}
	if v < 10 {
		return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") + units[i:i+1] + "i"
	}
	return strconv.FormatFloat(v, 'f', 0, 64) + units[i:i+1] + "i"
}

// shares is what is reserved of what there is.
func cpuShare(reserved, capacity *pb.NodeCapacity) string {
	return cores(reserved.GetCpuMillis()) + "/" + cores(capacity.GetCpuMillis())
}

func cores(millis int64) string { return strconv.FormatFloat(float64(millis)/1000, 'f', -1, 64) }

func memoryShare(reserved, capacity *pb.NodeCapacity) string {
	return bytesText(reserved.GetMemoryBytes()) + "/" + bytesText(capacity.GetMemoryBytes())
}

func diskShare(reserved, capacity *pb.NodeCapacity) string {
	return bytesText(reserved.GetDiskBytes()) + "/" + bytesText(capacity.GetDiskBytes())
}

// labelsVar defines a flag for labels; the package's own help would show "[]" as
// the default.
func labelsVar(f *pflag.FlagSet, p *map[string]string, name, short, usage string) {
	f.StringToStringVarP(p, name, short, nil, usage)
	f.Lookup(name).DefValue = ""
}

// labelText is k=v,k=v in order.
func labelText(labels map[string]string) string {
	pairs := make([]string, 0, len(labels))
	for k, v := range labels {
		pairs = append(pairs, k+"="+v)
	}
	sort.Strings(pairs)
	return strings.Join(pairs, ",")
}

// nodeLabels are the labels that count: those set by users win.
func nodeLabels(n *pb.Node) map[string]string {
	all := map[string]string{}
	for k, v := range n.Labels {
		all[k] = v
	}
	for k, v := range n.UserLabels {
		all[k] = v
	}
	return all
}

func taintsText(n *pb.Node) string {
	var texts []string
	for _, t := range model.TaintsOf(n) {
		texts = append(texts, model.FormatTaint(t))
	}
	return strings.Join(texts, ",")
}

func runtimeText(runtimes []*pb.RuntimeInfo) string {
	var names []string
	for _, r := range runtimes {
		name := r.Name
		switch {
		case name == "":
			name = typeName(r.Type) + "(unknown)" // it was not asked yet
		case !r.Healthy:
			name += "(down)"
		}
		names = append(names, name)
	}
	sort.Strings(names)
	return strings.Join(slices.Compact(names), ",")
}

// portText is one published port: where it listens, and what it leads to.
func portText(address string, p *pb.Port) string {
	if p.HostIp != "" && p.HostIp != "0.0.0.0" && p.HostIp != "::" {
		address = p.HostIp
	}
	text := fmt.Sprintf("%s:%d", address, p.HostPort)
	if p.ContainerPort != 0 && p.ContainerPort != p.HostPort {
		text += fmt.Sprintf("->%d", p.ContainerPort)
	}
	if p.Protocol != "" && p.Protocol != "tcp" {
		text += "/" + p.Protocol
	}
	return text
}

func portsText(address string, ports []*pb.Port) string {
	texts := make([]string, len(ports))
	for i, p := range ports {
		texts[i] = portText(address, p)
	}
	return strings.Join(texts, ",")
}

// tolerance is what every member command ends with.
func tolerance(n int32) string {
	switch {
	case n <= 0:
		return "you can lose 0 more servers: with the next one lost, nothing can be changed until it is back"
	case n == 1:
		return "you can lose 1 more server"
	}
	return fmt.Sprintf("you can lose %d more servers", n)
}
