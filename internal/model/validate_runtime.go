package model

import (
	"fmt"
	"net/netip"
	"path"
	"strings"

	"github.com/distribution/reference"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	maxPort = 65535
	// The kernel's own limit of process ids.
	maxPids = 4194304
)

func checkContainer(errs *FieldErrors, at string, c *pb.ContainerSpec) {
	if c.GetImage() == "" {
		errs.add(at+".image", `missing; allowed: an image reference such as "nginx:1.27"`)
	} else if _, err := reference.ParseNormalizedNamed(c.Image); err != nil {
		errs.add(at+".image", `%q: %v; allowed: an image reference such as "nginx:1.27" or "registry.example:5000/team/app@sha256:…"`, clip(c.Image), err)
	}
	checkEnv(errs, at+".env", c.GetEnv())
	for i, p := range c.GetPorts() {
		checkRange(errs, fmt.Sprintf("%s.ports[%d].container_port", at, i), p.ContainerPort, 1, maxPort)
	}
	checkPorts(errs, at+".ports", c.GetPorts())
	inside := map[string]int{}
	for i, m := range c.GetVolumes() {
		here := fmt.Sprintf("%s.volumes[%d]", at, i)
		checkAbsolute(errs, here+".host_path", m.HostPath)
		checkAbsolute(errs, here+".container_path", m.ContainerPath)
		if m.ContainerPath == "/" {
			errs.add(here+".container_path", "the root cannot be mounted over; allowed: a path below it")
		}
		if first, twice := inside[m.ContainerPath]; twice && m.ContainerPath != "" {
			errs.add(here+".container_path", "%q is mounted by volumes[%d] already", clip(m.ContainerPath), first)
		} else {
			inside[m.ContainerPath] = i
		}
	}
	if c.GetWorkingDir() != "" {
		checkAbsolute(errs, at+".working_dir", c.WorkingDir)
	}
	checkUser(errs, at+".user", c.GetUser(), true)
	if h := c.GetHostname(); h != "" && !IsDNSLabel(h) {
		errs.add(at+".hostname", "%q is not allowed; allowed: %s", clip(h), dnsLabelAllowed)
	}
	checkGrace(errs, at, c.StopGraceSeconds)
	checkSignal(errs, at+".stop_signal", c.GetStopSignal())
	checkRange(errs, at+".pids_limit", c.GetPidsLimit(), 0, maxPids)
}

func checkProcess(errs *FieldErrors, at string, p *pb.ProcessSpec) {
	switch cmd := p.GetCommand(); {
	case cmd == "":
		errs.add(at+".command", "missing; allowed: an absolute path, or a name that is found in PATH")
	case strings.Contains(cmd, "/") && !path.IsAbs(cmd):
		errs.add(at+".command", "%q is relative; allowed: an absolute path, or a name that is found in PATH", clip(cmd))
	}
	checkEnv(errs, at+".env", p.GetEnv())
	if p.GetWorkingDir() != "" {
		checkAbsolute(errs, at+".working_dir", p.WorkingDir)
	}
	checkUser(errs, at+".user", p.GetUser(), false)
	checkGrace(errs, at, p.StopGraceSeconds)
	for i, port := range p.GetPorts() {
		here := fmt.Sprintf("%s.ports[%d]", at, i)
		if port.ContainerPort != 0 {
			errs.add(here+".container_port", "a process has no ports of its own inside; allowed: leave it out, and host_port is the port that it listens on")
		}
		if port.HostIp != "" {
			errs.add(here+".host_ip", "a process chooses itself where it listens; allowed: leave it out")
		}
	}
	checkPorts(errs, at+".ports", p.GetPorts())
}

func checkGrace(errs *FieldErrors, at string, seconds *int32) {
	if seconds != nil {
		checkRange(errs, at+".stop_grace_seconds", *seconds, 0, maxGraceSeconds)
	}
}

// checkPorts refuses, among the rest, two ports of one replica that cannot both
// be had on a node. Replicas that want the same fixed port are spread over
// nodes by the scheduler.
func checkPorts(errs *FieldErrors, at string, ports []*pb.Port) {
	for i, p := range ports {
		here := fmt.Sprintf("%s[%d]", at, i)
		checkRange(errs, here+".host_port", p.HostPort, 0, maxPort)
		if proto := protocolOf(p); proto != "tcp" && proto != "udp" {
			errs.add(here+".protocol", "%q is unknown; allowed: tcp, udp", clip(p.Protocol))
		}
		checkHostIP(errs, here+".host_ip", p.HostIp)
		for j, q := range ports[:i] {
			if p.HostPort != 0 && p.HostPort == q.HostPort && protocolOf(p) == protocolOf(q) && overlap(p.HostIp, q.HostIp) {
				errs.add(here+".host_port", "%d is taken by ports[%d]; allowed: each host port once, or 0 for one that is chosen", p.HostPort, j)
				break
			}
		}
	}
}

func protocolOf(p *pb.Port) string {
	if p.Protocol == "" {
		return "tcp"
	}
	return strings.ToLower(p.Protocol)
}

// overlap reports whether two addresses to listen on have one in common; no
// address, 0.0.0.0 and :: stand for all.
func overlap(a, b string) bool {
	x, errX := netip.ParseAddr(a)
	y, errY := netip.ParseAddr(b)
	if errX != nil || errY != nil || x.IsUnspecified() || y.IsUnspecified() {
		return true
	}
	return x.Unmap() == y.Unmap()
}
