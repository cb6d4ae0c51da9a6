package agent

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Names of the labels by which work is recognised.
const (
	LabelPrefix     = "persys."
	LabelCluster    = LabelPrefix + "cluster"
	LabelNode       = LabelPrefix + "node"
	LabelWorkload   = LabelPrefix + "workload"
	LabelReplica    = LabelPrefix + "replica"
	LabelUID        = LabelPrefix + "uid"
	LabelRevision   = LabelPrefix + "revision"
	LabelGeneration = LabelPrefix + "generation"
	LabelRestart    = LabelPrefix + "restart-generation"
	LabelExclusive  = LabelPrefix + "exclusive"
	LabelGrace      = LabelPrefix + "stop-grace"
	LabelPorts      = LabelPrefix + "ports"
)

// Labels are written on every real object, and say what it was made for.
type Labels struct {
	Cluster           string
	Node              string
	Key               Key
	UID               string
	Revision          string
	Generation        int64
	RestartGeneration int64
	Exclusive         bool
	// Grace is how long it may take to stop.
	Grace time.Duration
	// Ports with every host port chosen.
	Ports []*pb.Port
}

// LabelsOf are the labels for work of this cluster and node.
func LabelsOf(cluster, node string, w Work) Labels {
	a := w.Item.GetAssignment()
	return Labels{
		Cluster: cluster, Node: node, Key: keyOf(a), UID: a.GetWorkloadUid(),
		Revision: a.GetRevision(), Generation: a.GetGeneration(), RestartGeneration: a.GetRestartGeneration(),
		Exclusive: a.GetExclusive(), Grace: w.Grace(), Ports: a.GetPorts(),
	}
}

// Map is the form in which they are stored.
func (l Labels) Map() map[string]string {
	return map[string]string{
		LabelCluster:    l.Cluster,
		LabelNode:       l.Node,
		LabelWorkload:   l.Key.Workload,
		LabelReplica:    strconv.FormatInt(int64(l.Key.Replica), 10),
		LabelUID:        l.UID,
		LabelRevision:   l.Revision,
		LabelGeneration: strconv.FormatInt(l.Generation, 10),
		LabelRestart:    strconv.FormatInt(l.RestartGeneration, 10),
		LabelExclusive:  strconv.FormatBool(l.Exclusive),
		LabelGrace:      l.Grace.String(),
		LabelPorts:      formatPorts(l.Ports),
	}
}

// ParseLabels reads what Map wrote. Missing optional labels (all but cluster,
// node, workload, replica and generation) are zero.
func ParseLabels(m map[string]string) (Labels, error) {
	l := Labels{Cluster: m[LabelCluster], Node: m[LabelNode], UID: m[LabelUID], Revision: m[LabelRevision]}
	l.Key.Workload = m[LabelWorkload]
	if l.Cluster == "" || l.Node == "" || l.Key.Workload == "" {
		return Labels{}, fmt.Errorf("labels %s, %s and %s are needed", LabelCluster, LabelNode, LabelWorkload)
	}
	replica, err := strconv.ParseInt(m[LabelReplica], 10, 32)
	if err != nil {
		return Labels{}, fmt.Errorf("label %s: %w", LabelReplica, err)
	}
	l.Key.Replica = int32(replica)
	if l.Generation, err = strconv.ParseInt(m[LabelGeneration], 10, 64); err != nil {
		return Labels{}, fmt.Errorf("label %s: %w", LabelGeneration, err)
	}
	if s := m[LabelRestart]; s != "" {
		if l.RestartGeneration, err = strconv.ParseInt(s, 10, 64); err != nil {
			return Labels{}, fmt.Errorf("label %s: %w", LabelRestart, err)
		}
	}
	if s := m[LabelExclusive]; s != "" {
		if l.Exclusive, err = strconv.ParseBool(s); err != nil {
			return Labels{}, fmt.Errorf("label %s: %w", LabelExclusive, err)
		}
	}
	l.Grace = DefaultGrace
	if s := m[LabelGrace]; s != "" {
		if l.Grace, err = time.ParseDuration(s); err != nil {
			return Labels{}, fmt.Errorf("label %s: %w", LabelGrace, err)
		}
	}
	if l.Ports, err = parsePorts(m[LabelPorts]); err != nil {
		return Labels{}, fmt.Errorf("label %s: %w", LabelPorts, err)
	}
	return l, nil
}

// Ports are written as [address]host:container/protocol, separated by commas; the
// brackets are left out where no address is given.
func formatPorts(ports []*pb.Port) string {
	parts := make([]string, len(ports))
	for i, p := range ports {
		if p.GetHostIp() != "" {
			parts[i] = "[" + p.GetHostIp() + "]"
		}
		parts[i] += fmt.Sprintf("%d:%d/%s", p.GetHostPort(), p.GetContainerPort(), protocolOf(p))
	}
	return strings.Join(parts, ",")
}

func parsePorts(s string) ([]*pb.Port, error) {
	if s == "" {
		return nil, nil
	}
	var ports []*pb.Port
	for part := range strings.SplitSeq(s, ",") {
		p := &pb.Port{}
		rest := part
		if after, ok := strings.CutPrefix(part, "["); ok {
			if p.HostIp, rest, ok = strings.Cut(after, "]"); !ok {
				return nil, fmt.Errorf("port %q has no closing bracket", part)
			}
		}
		rest, protocol, ok := strings.Cut(rest, "/")
		host, container, ok2 := strings.Cut(rest, ":")
		if !ok || !ok2 {
			return nil, fmt.Errorf("port %q is not host:container/protocol", part)
		}
		p.Protocol = protocol
		for _, number := range []struct {
			text string
			into *int32
		}{{host, &p.HostPort}, {container, &p.ContainerPort}} {
			n, err := strconv.ParseUint(number.text, 10, 16)
			if err != nil {
				return nil, fmt.Errorf("port %q: %w", part, err)
			}
			*number.into = int32(n)
		}
		ports = append(ports, p)
	}
	return ports, nil
}

func protocolOf(p *pb.Port) string {
	if p.GetProtocol() == "" {
		return "tcp"
	}
	return strings.ToLower(p.GetProtocol())
}
