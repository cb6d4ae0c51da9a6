package sim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"

	"github.com/persys-dev/persys/agent"
	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// Agents that come from one address: servers bound what one may open.
	agentsPerAddress = 200
	racks, zones     = 25, 3
	// What a node offers, unless the replicas need more.
	nodeCPU, nodeMemory, nodeDisk = 32_000, 64 << 30, 1 << 40
	attachTimeout                 = 5 * time.Minute
	certificateTTL                = 24 * time.Hour
	// Of a connection, in place of 32 KiB: thousands of them are in one process.
	bufferSize = 4 << 10
	// How long a server may leave a connection without an answer. A real agent takes
	// 3 s for a sign that the other end is gone; here thousands share the processors
	// with the servers, and reconnecting would make that worse.
	patience = time.Minute
)

// fleet is the agents, and what they are told to run.
type fleet struct {
	Config
	servers  *servers
	dir      string
	capacity *pb.NodeCapacity
	agents   []*member
	running  sync.WaitGroup

	mu sync.Mutex
	// When each workload was submitted.
	sent map[string]time.Time
	// Where each replica was last started, and how long after its submission
	// first.
	at    map[agent.Key]*member
	first []time.Duration
	// Replicas that were on lost agents and are not started elsewhere yet, and how
	// long after the loss the others were.
	missing map[agent.Key]bool
	lostAt  time.Time
	moved   []time.Duration
	done    chan struct{}
}

// member is one agent.
type member struct {
	name     string
	cluster  string
	agent    *agent.Agent
	stop     context.CancelFunc
	attached chan struct{}
	once     sync.Once
	lost     bool
}

func newFleet(c Config, s *servers) (*fleet, error) {
	dir, err := os.MkdirTemp(sharedMemory(c.Dir), "persys-sim-agents-")
	if err != nil {
		return nil, fmt.Errorf("directory for the agents: %w", err)
	}
	f := &fleet{Config: c, servers: s, dir: dir, sent: map[string]time.Time{}, at: map[agent.Key]*member{}, done: make(chan struct{})}
	if f.capacity, err = c.nodeCapacity(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return f, nil
}

// start attaches all agents, some at a time.
func (f *fleet) start(ctx context.Context) error {
	authority, err := f.servers.authority()
	if err != nil {
		return err
	}
	// The key is the dear part, and nothing here depends on who else has it.
	key, csr, err := pki.NewKeyAndCSR("simulated")
	if err != nil {
		return err
	}
	f.agents = make([]*member, f.Nodes)
	group, starting := errgroup.WithContext(ctx)
	group.SetLimit(parallel())
	for i := range f.agents {
		m := &member{name: nodeName(i), cluster: authority.ClusterID(), attached: make(chan struct{})}
		f.agents[i] = m
		group.Go(func() error {
			if starting.Err() != nil {
				return nil // another one has failed
			}
			chain, _, _, err := authority.Issue(csr, pki.Identity{Cluster: authority.ClusterID(), Role: pb.Role_ROLE_AGENT, Name: m.name}, nil, certificateTTL)
			if err != nil {
				return err
			}
			own, err := pki.NewCredentials(key, chain, authority.Roots())
			if err != nil {
				return err
			}
			return f.attach(starting, ctx, m, i, own)
		})
	}
	return group.Wait()
}

// attach runs the agent until it is lost or the fleet is closed, and returns when
// a server has welcomed it.
func (f *fleet) attach(starting, ctx context.Context, m *member, i int, own *pki.Credentials) error {
	source := &net.TCPAddr{IP: net.ParseIP(f.servers.address(1+i/agentsPerAddress, 1+i%agentsPerAddress))}
	dialer := &net.Dialer{LocalAddr: source}
	connections := server.NewAgentConnections(own, grpc.WithReadBufferSize(bufferSize), grpc.WithWriteBufferSize(bufferSize),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: patience, Timeout: patience, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: patience}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", address)
		}))
	dial := func(ctx context.Context, address string) (pb.AgentsClient, error) {
		client, err := connections.Dial(ctx, address)
		return watched{client, m}, err
	}
	var err error
	m.agent, err = agent.New(agent.Config{
		NodeID: m.name, ClusterID: own.Identity().Cluster, Incarnation: m.name, DataDir: agentDir(f.dir, i), Version: server.Version,
		Labels:  map[string]string{"rack": fmt.Sprintf("r%02d", i%racks), "zone": fmt.Sprintf("z%d", i%zones)},
		Address: source.IP.String(), Capacity: f.capacity,
		Servers: f.servers.addresses, Dial: dial,
		Runtimes: []agent.Runtime{newRuntime(f, m)},
	})
	if err != nil {
		return err
	}
	ctx, m.stop = context.WithCancel(ctx)
	f.running.Go(func() {
		defer connections.Close()
		_ = m.agent.Run(ctx) // ends with ctx
	})
	timeout := time.NewTimer(attachTimeout)
	defer timeout.Stop()
	select {
	case <-m.attached:
		return nil
	case <-timeout.C:
		return fmt.Errorf("agent %s was not welcomed within %s; this machine may be too small for so many agents, or for leases as short as this", m.name, attachTimeout)
	case <-starting.Done():
		return starting.Err()
	}
}

// close ends all agents and removes their data.
func (f *fleet) close() {
	for _, m := range f.agents {
		if m != nil && m.stop != nil {
			m.stop()
		}
	}
	f.running.Wait()
	_ = os.RemoveAll(f.dir) // it is in memory, and named as ours
}

// submitted notes when a workload was.
func (f *fleet) submitted(id string, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sent[id] = at
}

// started notes that an agent starts a replica.
func (f *fleet) started(m *member, key agent.Key) {
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if m.lost {
		return
	}
	if f.at[key] == nil {
		f.first = append(f.first, now.Sub(f.sent[key.Workload]))
	}
	f.at[key] = m
	if f.missing[key] {
		delete(f.missing, key)
		f.moved = append(f.moved, now.Sub(f.lostAt))
		if len(f.missing) == 0 {
			close(f.done)
		}
	}
}

// latencies are from a workload's submission to the first start of each of its
// replicas.
func (f *fleet) latencies() []time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.first)
}

// choose picks the agents that run most, and says how many replicas they run.
func (f *fleet) choose(n int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	load := map[*member]int{}
	for _, m := range f.at {
		load[m]++
	}
	byLoad := slices.Clone(f.agents)
	slices.SortStableFunc(byLoad, func(a, b *member) int { return load[b] - load[a] })
	f.missing = map[agent.Key]bool{}
	for _, m := range byLoad[:n] {
		m.lost = true
	}
	for key, m := range f.at {
		if m.lost {
			f.missing[key] = true
		}
	}
	if len(f.missing) == 0 {
		close(f.done)
	}
	return len(f.missing)
}

// lose ends the chosen agents as a machine ends that is switched off: what they
// ran is gone with them.
func (f *fleet) lose(at time.Time) {
	f.mu.Lock()
	f.lostAt = at
	f.mu.Unlock()
	for _, m := range f.agents {
		if m.lost {
			m.stop()
		}
	}
}

// awaitMoved waits until all that was lost is started elsewhere.
func (f *fleet) awaitMoved(ctx context.Context) ([]time.Duration, error) {
	select {
	case <-f.done:
	case <-ctx.Done():
		f.mu.Lock()
		defer f.mu.Unlock()
		return nil, fmt.Errorf("%d replicas of lost agents are not started elsewhere: %w", len(f.missing), ctx.Err())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.moved), nil
}

// watched is a client that sees when its agent is welcomed.
type watched struct {
	pb.AgentsClient
	m *member
}

func (w watched) Session(ctx context.Context, options ...grpc.CallOption) (grpc.BidiStreamingClient[pb.AgentMessage, pb.ServerMessage], error) {
	stream, err := w.AgentsClient.Session(ctx, options...)
	return watchedStream{stream, w.m}, err
}

type watchedStream struct {
	grpc.BidiStreamingClient[pb.AgentMessage, pb.ServerMessage]
	m *member
}

func (s watchedStream) Recv() (*pb.ServerMessage, error) {
	message, err := s.BidiStreamingClient.Recv()
	if err == nil {
		s.m.once.Do(func() { close(s.m.attached) })
	}
	return message, err
}
