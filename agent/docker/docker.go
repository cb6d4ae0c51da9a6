// Package docker runs containers on a Docker Engine.
//
// It owns what an assignment of type container means in the engine's terms, and
// recognises its containers by their labels only. It never touches a container
// without them, never asks a registry for an image that may be taken from the
// node, and never leaves restarting to the engine: the restart policy of every
// container is "no". Containers belong to the engine, so they outlive the agent
// anyway; and after a reboot or a partition an engine that restarts by itself
// would bring back work that the cluster has long moved elsewhere, exclusive
// work included. The agent restarts what crashed.
package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/moby/moby/client"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Config of a Runtime.
type Config struct {
	ClusterID string
	NodeID    string
	// Host is the engine's address, as in DOCKER_HOST. Empty: DOCKER_HOST and its
	// companions, or the default socket.
	Host string
	// PublishAddress is the address on which ports are published that name none.
	// Empty: all addresses of the node.
	PublishAddress string
	// Logger may be nil.
	Logger *slog.Logger
}

// Runtime is a Docker Engine; it implements agent.Runtime.
type Runtime struct {
	cfg   Config
	api   *client.Client
	log   *slog.Logger
	cache cache

	mu sync.Mutex
	// engine is what was found out about the engine; nil until it answered, and
	// again after it was away.
	engine *engine
	// samples are the processor times measured last, by container.
	samples map[string]sample
}

// engine is what does not change while an engine runs.
type engine struct {
	version string
	// message says what this engine can't do.
	message string
}

// New makes a Runtime. It does not connect: an engine that is down is reported
// as such by Info, and used when it comes up.
func New(cfg Config) (*Runtime, error) {
	if cfg.ClusterID == "" || cfg.NodeID == "" {
		return nil, errors.New("docker: ClusterID and NodeID are needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	opts := []client.Opt{client.FromEnv}
	if cfg.Host != "" {
		opts = append(opts, client.WithHost(cfg.Host))
	}
	api, err := client.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	return &Runtime{cfg: cfg, api: api, log: cfg.Logger.With("runtime", "docker"), samples: map[string]sample{}}, nil
}

// CheckHost refuses what New would not take for an engine's address.
func CheckHost(host string) error {
	if _, err := client.ParseHostURL(host); err != nil {
		return fmt.Errorf("%q is not an engine's address; allowed: such as unix:///var/run/docker.sock", host)
	}
	return nil
}

// Close releases idle connections.
func (r *Runtime) Close() error { return r.api.Close() }

// Type of work that it runs.
func (r *Runtime) Type() pb.WorkloadType { return pb.WorkloadType_CONTAINER }

// Info asks the engine whether it answers.
func (r *Runtime) Info(ctx context.Context) *pb.RuntimeInfo {
	info := &pb.RuntimeInfo{Type: r.Type(), Name: "docker"}
	e, err := r.probe(ctx)
	if err != nil {
		info.Message = classify(ctx, "docker", err).Error()
		return info
	}
	info.Healthy, info.Version, info.Message = true, e.version, e.message
	return info
}

func (r *Runtime) probe(ctx context.Context) (*engine, error) {
	if _, err := r.api.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		r.setEngine(nil)
		return nil, err
	}
	r.mu.Lock()
	known := r.engine
	r.mu.Unlock()
	if known != nil {
		return known, nil
	}
	result, err := r.api.Info(ctx, client.InfoOptions{})
	if err != nil {
		return nil, err
	}
	e := &engine{version: result.Info.ServerVersion}
	var cannot []string
	for _, ability := range []struct {
		has  bool
		name string
	}{
		{result.Info.CPUCfsQuota, "cpu"}, {result.Info.MemoryLimit, "memory"}, {result.Info.SwapLimit, "swap"}, {result.Info.PidsLimit, "pids"},
	} {
		if !ability.has {
			cannot = append(cannot, ability.name)
		}
	}
	if len(cannot) > 0 {
		e.message = "limits can't be enforced on this node: " + strings.Join(cannot, ", ")
	}
	r.setEngine(e)
	return e, nil
}

func (r *Runtime) setEngine(e *engine) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.engine = e
}

var (
	_ agent.Runtime     = (*Runtime)(nil)
	_ agent.Preparer    = (*Runtime)(nil)
	_ agent.LogSource   = (*Runtime)(nil)
	_ agent.StatsSource = (*Runtime)(nil)
)
