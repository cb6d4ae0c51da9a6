package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
)

const patience = 30 * time.Second

// replica is a store with an etcd listener on loopback, both real.
type replica struct {
	t        testing.TB
	name     string
	dir      string
	raft     string // address
	control  string // address of the Consensus service
	endpoint string // of etcd's API
	change   func(*Config)

	store *raftstore.Store
	etcd  *Server
	stop  func()
}

// cluster is made of voters s1, s2, … on loopback, without TLS.
type cluster struct {
	t        testing.TB
	replicas []*replica

	mu    sync.Mutex // for conns, and for replicas and their addresses when one starts
	conns map[string]*grpc.ClientConn
}

// newCluster starts so many replicas. change may adapt each configuration.
func newCluster(t testing.TB, voters int, change func(*Config)) *cluster {
	t.Helper()
	c := &cluster{t: t, conns: map[string]*grpc.ClientConn{}}
	for i := range voters {
		r := &replica{t: t, name: fmt.Sprintf("s%d", i+1), change: change}
		r.dir = filepath.Join(t.TempDir(), r.name)
		c.mu.Lock()
		c.replicas = append(c.replicas, r)
		c.mu.Unlock()
		r.start(c, i == 0)
		t.Cleanup(r.kill)
		if i > 0 {
			c.join(r)
		} else {
			eventually(t, "the first leads", func() error {
				if !r.store.IsLeader() {
					return raftstore.ErrNoLeader
				}
				return nil
			})
		}
	}
	return c
}

func (c *cluster) join(r *replica) {
	c.t.Helper()
	ctx := within(c.t, patience)
	eventually(c.t, "added", func() error { return c.leader().store.AddNonvoter(ctx, r.name, r.raft) })
	eventually(c.t, "promoted", func() error { return c.leader().store.Promote(ctx, r.name) })
}

// leader waits for the replica that leads.
func (c *cluster) leader() *replica {
	c.t.Helper()
	var leader *replica
	eventually(c.t, "a leader", func() error {
		for _, r := range c.replicas {
			if r.stop != nil && r.store.IsLeader() {
				leader = r
				return nil
			}
		}
		return raftstore.ErrNoLeader
	})
	return leader
}

func (c *cluster) follower() *replica {
	c.t.Helper()
	leader := c.leader()
	for _, r := range c.replicas {
		if r != leader && r.stop != nil {
			return r
		}
	}
	c.t.Fatal("no follower runs")
	return nil
}

func (c *cluster) endpoints() []string {
	var all []string
	for _, r := range c.replicas {
		all = append(all, r.endpoint)
	}
	return all
}

// client is etcd's own, for the given endpoints or all.
func (c *cluster) client(endpoints ...string) *clientv3.Client {
	c.t.Helper()
	if len(endpoints) == 0 {
		endpoints = c.endpoints()
	}
	return newClient(c.t, clientv3.Config{Endpoints: endpoints})
}

func newClient(t testing.TB, cfg clientv3.Config) *clientv3.Client {
	t.Helper()
	cfg.DialTimeout = patience
	client, err := clientv3.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// stream is raft's stream layer: plain TCP.
type stream struct{ net.Listener }

func (stream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", string(address), timeout)
}

// start starts the replica, at the addresses it had before if it had any.
func (r *replica) start(c *cluster, bootstrap bool) {
	r.t.Helper()
	c.mu.Lock()
	raftListener, control, client := r.listen(&r.raft), r.listen(&r.control), r.listen(&r.endpoint)
	c.mu.Unlock()
	var err error
	r.store, err = raftstore.Open(raftstore.Config{
		Dir: r.dir, ID: r.name, Address: r.raft, Stream: stream{raftListener},
		Dial:     func(_ context.Context, address string) (pb.ConsensusClient, error) { return c.dial(address) },
		EpochKey: model.EpochKey, Logger: testLogger(r.t, r.name),
		Timing: raftstore.Timing{Heartbeat: 300 * time.Millisecond},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	if bootstrap {
		if err := r.store.Bootstrap(); err != nil {
			r.t.Fatal(err)
		}
	}
	cfg := Config{Store: testStore{r.store}, Control: testControl{c, r}, Cluster: 1, Member: ID(r.name), Logger: testLogger(r.t, r.name)}
	if r.change != nil {
		r.change(&cfg)
	}
	r.etcd = New(cfg)
	consensus := grpc.NewServer()
	pb.RegisterConsensusServer(consensus, r.store.Service())
	api := grpc.NewServer(grpc.MaxConcurrentStreams(10_000))
	r.etcd.Register(api)
	go consensus.Serve(control)
	go api.Serve(client)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.store.Run(ctx, func(ctx context.Context, _ int64) error { <-ctx.Done(); return nil })
	}()
	r.stop = func() {
		api.Stop()
		consensus.Stop()
		cancel()
		<-done
	}
}

func (r *replica) listen(address *string) net.Listener {
	r.t.Helper()
	if *address == "" {
		*address = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", *address)
	if err != nil {
		r.t.Fatal(err)
	}
	*address = l.Addr().String()
	return l
}

// kill stops the replica; start brings it back.
func (r *replica) kill() {
	if r.stop != nil {
		r.stop()
		r.stop = nil
	}
}

// dial is the connection to the Consensus service of the replica with the raft address.
func (c *cluster) dial(address string) (pb.ConsensusClient, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.replicas {
		if r.raft != address {
			continue
		}
		conn := c.conns[r.control]
		if conn == nil {
			var err error
			conn, err = grpc.NewClient(r.control, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.6, MaxDelay: 100 * time.Millisecond}}))
			if err != nil {
				return nil, err
			}
			c.t.Cleanup(func() { conn.Close() })
			c.conns[r.control] = conn
		}
		return pb.NewConsensusClient(conn), nil
	}
	return nil, fmt.Errorf("no replica at %s", address)
}

// testStore gives a raftstore the types of this package.
type testStore struct{ *raftstore.Store }

func (s testStore) Watch(key, end []byte, after int64) Watcher {
	return s.Store.Watch(raftstore.WatchRange{Key: key, End: end, After: after})
}

func (s testStore) Term() uint64 { return s.Status().Term }

func testLogger(t testing.TB, name string) *slog.Logger {
	if os.Getenv("PERSYS_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("replica", name, "test", t.Name())
}

// eventually repeats until there is no error.
func eventually(t testing.TB, what string, try func() error) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
	}
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
