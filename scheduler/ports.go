package scheduler

import (
	"cmp"
	"slices"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Host ports that nobody asked for by number come from this range, both ends
// included. It lies below the range from which Linux takes local ports.
const (
	firstChosenPort = 20000
	lastChosenPort  = 32000
	chosenPorts     = lastChosenPort - firstChosenPort + 1
)

// portUse is a host port that is taken on a node.
type portUse struct {
	port int32
	udp  bool
	// Empty: every address of the node.
	ip string
}

func usedPort(p *pb.Port) portUse {
	u := portUse{port: p.HostPort, udp: p.Protocol == "udp", ip: p.HostIp}
	if u.ip == "0.0.0.0" || u.ip == "::" {
		u.ip = ""
	}
	return u
}

func (a portUse) compare(b portUse) int {
	if c := cmp.Compare(a.port, b.port); c != 0 {
		return c
	}
	if a.udp != b.udp {
		if b.udp {
			return -1
		}
		return 1
	}
	return cmp.Compare(a.ip, b.ip)
}

func (a portUse) conflicts(b portUse) bool {
	return a.port == b.port && a.udp == b.udp && (a.ip == b.ip || a.ip == "" || b.ip == "")
}

// portSet is sorted. The same use may be in it more than once: a plan that was
// assumed and the assignment that it became overlap for a moment.
type portSet []portUse

func (s portSet) conflicts(u portUse) bool {
	i, _ := slices.BinarySearchFunc(s, u.port, func(a portUse, port int32) int { return cmp.Compare(a.port, port) })
	for ; i < len(s) && s[i].port == u.port; i++ {
		if s[i].conflicts(u) {
			return true
		}
	}
	return false
}

func (s *portSet) add(u portUse) {
	i, _ := slices.BinarySearchFunc(*s, u, portUse.compare)
	*s = slices.Insert(*s, i, u)
}

func (s *portSet) remove(u portUse) {
	if i, ok := slices.BinarySearchFunc(*s, u, portUse.compare); ok {
		*s = slices.Delete(*s, i, i+1)
	}
}

// usedPorts are the host ports of an assignment.
func usedPorts(ports []*pb.Port) []portUse {
	if len(ports) == 0 {
		return nil
	}
	out := make([]portUse, 0, len(ports))
	for _, p := range ports {
		if p.HostPort != 0 {
			out = append(out, usedPort(p))
		}
	}
	return out
}

// portsFit reports whether the fixed ports among wishes are free on n, apart
// from those in own, and which one is not.
func portsFit(n *node, wishes []*pb.Port, own []portUse) (int32, bool) {
	for _, w := range wishes {
		if w.HostPort == 0 {
			continue
		}
		u := usedPort(w)
		if n.ports.conflicts(u) && !slices.Contains(own, u) {
			return w.HostPort, false
		}
	}
	return 0, true
}

// choosePorts answers with wishes in which every host port is filled in, or
// with false where the range is used up on n. The search begins at a place that
// seed decides, so that two nodes, or two attempts, do not begin alike. What
// kept has for the same container port is chosen again where it can be; own are
// the ports on n that the caller gives back in the same step.
func choosePorts(n *node, wishes, kept []*pb.Port, own []portUse, seed uint64) ([]*pb.Port, bool) {
	if len(wishes) == 0 {
		return nil, true
	}
	out := make([]*pb.Port, len(wishes))
	taken := make([]portUse, 0, len(wishes))
	for i, w := range wishes {
		if w.HostPort != 0 {
			out[i] = w
			taken = append(taken, usedPort(w))
		}
	}
	free := func(u portUse) bool {
		return !slices.ContainsFunc(taken, u.conflicts) && (!n.ports.conflicts(u) || slices.Contains(own, u))
	}
	for i, w := range wishes {
		if out[i] != nil {
			continue
		}
		p := &pb.Port{ContainerPort: w.ContainerPort, Protocol: w.Protocol, HostIp: w.HostIp}
		if i < len(kept) && kept[i].ContainerPort == w.ContainerPort && kept[i].HostPort >= firstChosenPort && kept[i].HostPort <= lastChosenPort {
			p.HostPort = kept[i].HostPort
			if !free(usedPort(p)) {
				p.HostPort = 0
			}
		}
		for k := uint64(0); p.HostPort == 0 && k < chosenPorts; k++ {
			p.HostPort = firstChosenPort + int32((seed+uint64(i)+k)%chosenPorts)
			if !free(usedPort(p)) {
				p.HostPort = 0
			}
		}
		if p.HostPort == 0 {
			return nil, false
		}
		out[i] = p
		taken = append(taken, usedPort(p))
	}
	return out, true
}
