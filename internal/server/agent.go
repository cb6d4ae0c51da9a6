package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/persys-dev/persys/agent"
	"github.com/persys-dev/persys/agent/docker"
	"github.com/persys-dev/persys/agent/process"
	"github.com/persys-dev/persys/internal/gossip"
	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// runAgent runs a machine that is an agent and nothing else: it learns of the
// servers by gossip.
func runAgent(ctx context.Context, c Config, id *identity, log *slog.Logger) error {
	if err := c.gossipPortFree(); err != nil {
		return err
	}
	g, err := gossip.New(gossip.Config{
		Cluster: id.ClusterID, Name: c.Name, Role: pb.Role_ROLE_AGENT, BindAddr: hostPort(c.Bind, c.GossipPort), Advertise: c.gossipAddress(),
		Key: id.GossipKey, Peers: id.GossipPeers, Logger: log.With("part", "gossip"),
	})
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.Run(ctx) })
	group.Go(func() error { return rememberServers(ctx, c.DataDir, id, g) })
	group.Go(func() error {
		return startAgent(ctx, c, id, log, newRegistry(), func() []string {
			return serversOf(g, id)
		})
	})
	if err := group.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// startAgent runs an agent that attaches to one of servers.
func startAgent(ctx context.Context, c Config, id *identity, log *slog.Logger, registry *prometheus.Registry, servers func() []string) error {
	own, err := pki.LoadCredentials(credentialsDir(c.DataDir, pb.Role_ROLE_AGENT))
	if err != nil {
		return err
	}
	if err := id.belongs(c.DataDir, own.Identity()); err != nil {
		return err
	}
	connections := NewAgentConnections(own)
	defer connections.Close()
	capacity, err := c.capacity()
	if err != nil {
		return err
	}
	dir := agentDir(c.DataDir)
	taints, err := c.taints()
	if err != nil {
		return err
	}
	devices, pools, err := c.gear()
	if err != nil {
		return err
	}
	runtimes, err := c.runtimes(id, dir, log)
	if err != nil {
		return err
	}
	guard, err := guardCommand(c)
	if err != nil {
		return err
	}
	a, err := agent.New(agent.Config{
		NodeID: c.Name, ClusterID: id.ClusterID, Incarnation: id.Incarnation, DataDir: dir, Version: Version,
		Labels: c.labels(id), Pool: c.Pool, Taints: taints, Devices: devices, StoragePools: pools, Address: c.Advertise, Capacity: capacity,
		Servers: servers, Dial: connections.Dial,
		Runtimes: runtimes, Guard: guard, AllowedBindRoots: c.AllowBindRoots, AllowPrivileged: c.AllowPrivileged,
		Logger: log, Registerer: registry,
	})
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// AgentConnections are an agent's to the servers. Its certificate says which node
// it speaks for, so no two agents share any.
type AgentConnections struct{ peers *peers }

// NewAgentConnections connects when it is asked to.
func NewAgentConnections(own *pki.Credentials, more ...grpc.DialOption) *AgentConnections {
	return &AgentConnections{newPeers(credentials.NewTLS(own.ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "h2")), more...)}
}

// Dial gives a client for a server.
func (c *AgentConnections) Dial(_ context.Context, address string) (pb.AgentsClient, error) {
	conn, err := c.peers.dial(address)
	if err != nil {
		return nil, err
	}
	return pb.NewAgentsClient(conn), nil
}

// Close ends all of them.
func (c *AgentConnections) Close() { c.peers.close() }

// capacity is what the configuration says the node offers; nil where it says
// nothing.
func (c Config) capacity() (*pb.NodeCapacity, error) {
	capacity := &pb.NodeCapacity{}
	for _, q := range []struct {
		field, text string
		parse       func(string) (int64, error)
		into        *int64
	}{
		{"cpu", c.CPU, model.ParseCPU, &capacity.CpuMillis},
		{"memory", c.Memory, model.ParseBytes, &capacity.MemoryBytes},
		{"disk", c.Disk, model.ParseBytes, &capacity.DiskBytes},
	} {
		if q.text == "" {
			continue
		}
		n, err := q.parse(q.text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", q.field, err)
		}
		if n <= 0 {
			return nil, fmt.Errorf("%s: %q offers nothing; allowed: more than 0, or leave it out", q.field, q.text)
		}
		*q.into = n
	}
	return capacity, nil
}

func (c Config) runtimes(id *identity, dir string, log *slog.Logger) ([]agent.Runtime, error) {
	processes, err := process.New(process.Config{ClusterID: id.ClusterID, NodeID: c.Name, Dir: filepath.Join(dir, "process"), Logger: log.With("runtime", "process")})
	if err != nil {
		return nil, err
	}
	if c.DockerHost == noDocker {
		return []agent.Runtime{processes}, nil
	}
	containers, err := docker.New(docker.Config{ClusterID: id.ClusterID, NodeID: c.Name, Host: c.DockerHost, PublishAddress: c.Bind, Logger: log.With("runtime", "docker")})
	if err != nil {
		return nil, fmt.Errorf("docker_host: %w", err)
	}
	return []agent.Runtime{processes, containers}, nil
}

func agentDir(dataDir string) string { return filepath.Join(dataDir, "agent") }

// labels of the node: the token's, and over them the configuration's.
func (c Config) labels(id *identity) map[string]string {
	labels := maps.Clone(id.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, c.Labels)
	return labels
}

func (c Config) taints() ([]*pb.Taint, error) {
	var taints []*pb.Taint
	for _, text := range c.Taints {
		t, err := model.ParseTaint(text)
		if err != nil {
			return nil, fmt.Errorf("taints: %w", err)
		}
		taints = append(taints, t)
	}
	return taints, model.ValidateTaints("taints", taints)
}

// gear is the devices and the storage pools of the configuration.
func (c Config) gear() (devices []*pb.Device, pools []*pb.StoragePool, err error) {
	for _, d := range c.Devices {
		devices = append(devices, &pb.Device{Name: d.Name, Ids: d.IDs, Paths: d.Paths, Attributes: d.Attributes})
	}
	for i, p := range c.StoragePools {
		capacity, err := model.ParseBytes(p.Capacity)
		if err != nil {
			return nil, nil, fmt.Errorf("storage_pools[%d].capacity: %w", i, err)
		}
		pools = append(pools, &pb.StoragePool{Name: p.Name, Driver: cmp.Or(p.Driver, "local"), CapacityBytes: capacity, Path: p.Path})
	}
	return devices, pools, model.ValidateGear(devices, pools)
}

// serversOf are the gRPC addresses that gossip hears of, and then those that the
// data directory remembers.
func serversOf(g *gossip.Gossip, id *identity) []string {
	var all []string
	for _, p := range g.Servers() {
		all = append(all, p.GRPCAddress)
	}
	for _, address := range id.servers() {
		if !slices.Contains(all, address) {
			all = append(all, address)
		}
	}
	return all
}

// rememberServers keeps the addresses in the data directory current, so that a
// restart finds the cluster even when the servers it joined through are gone.
func rememberServers(ctx context.Context, dir string, id *identity, g *gossip.Gossip) error {
	for {
		changed := g.Changed()
		if err := id.remember(dir, g.Servers()); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
