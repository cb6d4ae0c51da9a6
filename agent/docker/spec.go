package docker

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"net/netip"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const labelDigest = agent.LabelPrefix + "image-digest"

// Output kept for each container: three files of ten megabytes.
var logConfig = container.LogConfig{Type: "json-file", Config: map[string]string{"max-size": "10m", "max-file": "3"}}

// name is the same for the same assignment, so that creating it twice does not
// make two: an engine may have done what its answer was lost for.
func (r *Runtime) name(l agent.Labels) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%s\x00%d", l.Cluster, l.Node, l.UID, l.Generation))
	return fmt.Sprintf("persys-%s-%d-%x", l.Key.Workload, l.Key.Replica, sum[:4])
}

// configure translates work into the engine's terms. Whatever the spec asks for
// is in the result, or refused.
func (r *Runtime) configure(w agent.Work, l agent.Labels, digest string) (*container.Config, *container.HostConfig, error) {
	spec := w.Item.GetSpec().GetContainer()
	labels := map[string]string{}
	for name, value := range w.Item.GetSpec().GetLabels() {
		if !strings.HasPrefix(name, agent.LabelPrefix) {
			labels[name] = value
		}
	}
	maps.Copy(labels, l.Map())
	labels[labelDigest] = digest
	config := &container.Config{
		Image: spec.GetImage(), Entrypoint: spec.GetCommand(), Cmd: spec.GetArgs(),
		Env:    agent.Environment(w, r.cfg.NodeID, func(p *pb.Port) int32 { return p.GetContainerPort() }),
		Labels: labels, WorkingDir: spec.GetWorkingDir(), User: spec.GetUser(), Hostname: spec.GetHostname(),
		StopSignal: spec.GetStopSignal(),
	}
	host := &container.HostConfig{
		RestartPolicy:  container.RestartPolicy{Name: container.RestartPolicyDisabled},
		ReadonlyRootfs: spec.GetReadOnlyRoot(),
		LogConfig:      logConfig,
		Privileged:     spec.GetPrivileged(),
		Resources: container.Resources{
			NanoCPUs: w.CPULimit() * 1e6,
			Memory:   w.MemoryLimit(),
			// Memory and swap together: as much as memory alone, so no swap.
			MemorySwap: w.MemoryLimit(),
		},
	}
	if spec.GetPrivileged() && !w.Policy.Privileged {
		return nil, nil, agent.Refuse(pb.ReasonCode_INVALID_SPEC, "privileged: node %s does not allow it", r.cfg.NodeID)
	}
	if spec.GetInit() {
		host.Init = &spec.Init
	}
	if spec.GetPidsLimit() > 0 {
		host.PidsLimit = &spec.PidsLimit
	}
	for _, v := range spec.GetVolumes() {
		path, err := w.Policy.HostPath(v.GetHostPath())
		if err != nil {
			return nil, nil, err
		}
		host.Mounts = append(host.Mounts, mount.Mount{Type: mount.TypeBind, Source: path, Target: v.GetContainerPath(), ReadOnly: v.GetReadOnly()})
	}
	for _, d := range w.Item.GetAssignment().GetDevices() {
		for _, path := range d.GetPaths() {
			if err := w.Policy.DevicePath(d.GetName(), path); err != nil {
				return nil, nil, err
			}
			host.Devices = append(host.Devices, container.DeviceMapping{PathOnHost: path, PathInContainer: path, CgroupPermissions: "rwm"})
		}
	}
	var err error
	config.ExposedPorts, host.PortBindings, err = r.ports(w.Item.GetAssignment().GetPorts())
	return config, host, err
}

func (r *Runtime) ports(ports []*pb.Port) (network.PortSet, network.PortMap, error) {
	set, bindings := network.PortSet{}, network.PortMap{}
	for _, p := range ports {
		protocol := network.IPProtocol(strings.ToLower(p.GetProtocol()))
		if protocol == "" {
			protocol = network.TCP
		}
		inside, ok := network.PortFrom(uint16(p.GetContainerPort()), protocol)
		if !ok || p.GetContainerPort() <= 0 || p.GetContainerPort() > 65535 || p.GetHostPort() <= 0 || p.GetHostPort() > 65535 {
			return nil, nil, agent.Refuse(pb.ReasonCode_INVALID_SPEC, "port %d:%d/%s is not one", p.GetHostPort(), p.GetContainerPort(), p.GetProtocol())
		}
		binding := network.PortBinding{HostPort: fmt.Sprint(p.GetHostPort())}
		address := p.GetHostIp()
		if address == "" {
			address = r.cfg.PublishAddress
		}
		if address != "" {
			ip, err := netip.ParseAddr(address)
			if err != nil {
				return nil, nil, agent.Refuse(pb.ReasonCode_INVALID_SPEC, "port %d: host_ip: %v", p.GetHostPort(), err)
			}
			binding.HostIP = ip
		}
		set[inside] = struct{}{}
		bindings[inside] = append(bindings[inside], binding)
	}
	return set, bindings, nil
}
