package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Config of an Agent. Fields without a comment that says otherwise are needed.
type Config struct {
	NodeID    string
	ClusterID string
	// Incarnation is new for each empty data directory.
	Incarnation string
	// DataDir is the agent's own; it is created.
	DataDir string
	// Version of the program; may be empty.
	Version string
	// Labels of the node; may be empty.
	Labels map[string]string
	// Pool and Taints of the node; may be empty.
	Pool   string
	Taints []*pb.Taint
	// Devices and StoragePools that work may be given; may be empty.
	Devices      []*pb.Device
	StoragePools []*pb.StoragePool
	// Address by which users reach ports of work here; may be empty.
	Address string
	// Capacity replaces what is detected where a field is not 0. May be nil.
	Capacity *pb.NodeCapacity
	// Reserve is kept back from what is detected, for the system. May be nil.
	Reserve *pb.NodeCapacity

	// Servers are the gRPC addresses of replicas as far as known now; called
	// before each attempt to connect.
	Servers func() []string
	// Dial gives a client for a replica. The agent does not close it: the caller
	// keeps and shares connections.
	Dial func(ctx context.Context, address string) (pb.AgentsClient, error)

	// Runtimes, at most one for each type of work.
	Runtimes []Runtime

	// AllowedBindRoots and AllowPrivileged are the node's policy; nothing is
	// allowed by default.
	AllowedBindRoots []string
	AllowPrivileged  bool

	// OrphanGrace is how long an instance that carries our labels and is in
	// nobody's desired set is left alone. Default 1 minute.
	OrphanGrace time.Duration

	// Guard is the command line of a process that calls the function Guard with
	// this DataDir and runtimes, with its standard input as Owner. It is started
	// before anything exclusive is. Empty: nothing stops exclusive work when the
	// agent can't.
	Guard []string

	// Logger and Registerer may be nil.
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Agent runs one node.
type Agent struct {
	cfg      Config
	log      *slog.Logger
	capacity *pb.NodeCapacity
	runtimes map[pb.WorkloadType]Runtime

	desired   desired
	histories map[Key]history
	lease     *nodeLease
	guard     *guard
	outbox    *outbox
	metrics   *metrics
}

// New checks the configuration and reads what an earlier run left in DataDir. It
// touches no work.
func New(cfg Config) (*Agent, error) {
	for _, field := range []struct{ name, value string }{
		{"NodeID", cfg.NodeID}, {"ClusterID", cfg.ClusterID}, {"Incarnation", cfg.Incarnation}, {"DataDir", cfg.DataDir},
	} {
		if field.value == "" {
			return nil, fmt.Errorf("agent: %s is empty", field.name)
		}
	}
	if cfg.Servers == nil || cfg.Dial == nil {
		return nil, errors.New("agent: Servers and Dial are needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.OrphanGrace <= 0 {
		cfg.OrphanGrace = time.Minute
	}
	a := &Agent{
		cfg: cfg, log: cfg.Logger.With("node", cfg.NodeID), runtimes: map[pb.WorkloadType]Runtime{},
		lease: newNodeLease(), guard: &guard{command: guardCommand(cfg.Guard)}, outbox: newOutbox(),
	}
	for _, r := range cfg.Runtimes {
		if a.runtimes[r.Type()] != nil {
			return nil, fmt.Errorf("agent: two runtimes for %s", r.Type())
		}
		a.runtimes[r.Type()] = r
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("agent: data directory: %w", err)
	}
	if err := a.load(); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a.metrics = newMetrics(cfg.Registerer, a.outbox)
	return a, nil
}

func (a *Agent) load() error {
	var damaged, err error
	if a.desired, damaged, err = loadDesired(a.cfg.DataDir, a.cfg.ClusterID, a.cfg.NodeID); err != nil {
		return err
	}
	if damaged != nil {
		a.log.Error("work goes on as it is until a server tells what is wanted", "error", damaged)
	}
	if a.histories, err = loadHistories(a.cfg.DataDir); err != nil {
		return err
	}
	if err := a.lease.load(a.cfg.DataDir, time.Now()); err != nil {
		return err
	}
	a.capacity, err = detectCapacity(a.cfg.DataDir, a.cfg.Reserve, a.cfg.Capacity)
	return err
}

// Capacity is what the node offers.
func (a *Agent) Capacity() *pb.NodeCapacity { return a.capacity }

// Run works until ctx ends, and leaves all work running. An Agent runs once.
func (a *Agent) Run(ctx context.Context) error {
	infos := newInfos(a.cfg.Runtimes, a.metrics)
	saver := newSaver(a.cfg, a.log)
	r := newReconciler(a, saver)
	view := func() view { return *r.seen.Load() }
	usage := &usage{dir: a.cfg.DataDir, runtimes: a.cfg.Runtimes, view: view, log: a.log}

	group, ctx := errgroup.WithContext(ctx)
	for kind, runtime := range a.runtimes {
		w := &watcher{runtime: runtime, info: infos, wake: make(chan struct{}, 1), results: r.listings}
		r.watchers[kind] = w
		r.silent[kind] = time.Time{}
		group.Go(func() error { return w.run(ctx) })
	}
	if len(a.runtimes) == 0 {
		r.checkListed()
	}
	tunnels := &tunnels{
		ctx: ctx, node: a.cfg.NodeID, runtimes: a.runtimes, view: view, shown: r.shown,
		slots: make(chan struct{}, maxTunnels), log: a.log,
	}
	s := &sessions{
		cfg: a.cfg, log: a.log, reconciler: r, outbox: a.outbox, lease: a.lease, guard: a.guard, infos: infos, usage: usage,
		metrics: a.metrics, tunnels: tunnels, capacity: a.capacity,
	}
	group.Go(func() error { return r.run(ctx) })
	group.Go(func() error { return usage.run(ctx) })
	group.Go(func() error { return s.run(ctx) })

	// The saver ends last: it writes what the others have left.
	saving, stop := context.WithCancel(context.WithoutCancel(ctx))
	saved := make(chan struct{})
	go func() {
		defer close(saved)
		saver.run(saving)
	}()
	err := group.Wait()
	tunnels.running.Wait()
	stop()
	<-saved
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	return nil
}
