package raftstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	testEpochKey = "/system/epoch"
	patience     = 30 * time.Second
)

// network connects the replicas of a test, can cut any of them off, and can lose
// answers.
type network struct {
	mu      sync.Mutex
	stores  map[string]*Store // by address
	cut     map[string]bool   // addresses that are cut off
	conns   map[string][]net.Conn
	changed broadcast
	// Called with each Propose answer before it is delivered; true loses it.
	lose func(from, to string) bool
}

func newNetwork() *network {
	return &network{stores: map[string]*Store{}, cut: map[string]bool{}, conns: map[string][]net.Conn{}}
}

func (n *network) reaches(a, b string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.cut[a] && !n.cut[b]
}

// isolate cuts an address off: connections break, as when its machine is reset.
func (n *network) isolate(address string) {
	n.mu.Lock()
	n.cut[address] = true
	for _, c := range n.conns[address] {
		c.Close()
	}
	n.conns[address] = nil
	n.mu.Unlock()
	n.changed.fire()
}

func (n *network) heal(address string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.cut, address)
}

// stream is raft's stream layer of one replica: plain TCP on loopback.
type stream struct {
	net.Listener
	n    *network
	self string
}

func (s *stream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	to := string(address)
	if !s.n.reaches(s.self, to) {
		return nil, errors.New("no route")
	}
	c, err := net.DialTimeout("tcp", to, timeout)
	if err != nil {
		return nil, err
	}
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	if s.n.cut[s.self] || s.n.cut[to] {
		c.Close()
		return nil, errors.New("no route")
	}
	s.n.conns[s.self] = append(s.n.conns[s.self], c)
	s.n.conns[to] = append(s.n.conns[to], c)
	return c, nil
}

// client is a Consensus client without a wire: it copies messages as one would.
type client struct {
	pb.ConsensusClient
	n        *network
	from, to string
}

func (n *network) dial(from string) func(context.Context, string) (pb.ConsensusClient, error) {
	return func(_ context.Context, to string) (pb.ConsensusClient, error) {
		return &client{n: n, from: from, to: to}, nil
	}
}

func through[Q, A proto.Message](c *client, ctx context.Context, q Q, call func(pb.ConsensusServer, context.Context, Q) (A, error)) (A, error) {
	var none A
	lost := status.Error(codes.Unavailable, "connection lost")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.n.mu.Lock()
	store := c.n.stores[c.to]
	c.n.mu.Unlock()
	if store == nil || !c.n.reaches(c.from, c.to) {
		return none, lost
	}
	type answer struct {
		a   A
		err error
	}
	done := make(chan answer, 1)
	go func() {
		a, err := call(store.Service(), ctx, proto.Clone(q).(Q))
		done <- answer{a, err}
	}()
	for {
		changed := c.n.changed.next()
		if !c.n.reaches(c.from, c.to) {
			return none, lost
		}
		select {
		case r := <-done:
			if r.err != nil {
				return none, r.err
			}
			return proto.Clone(r.a).(A), nil
		case <-ctx.Done():
			return none, status.FromContextError(ctx.Err()).Err()
		case <-changed:
		}
	}
}

func (c *client) Propose(ctx context.Context, q *pb.ProposeRequest, _ ...grpc.CallOption) (*pb.ProposeResponse, error) {
	a, err := through(c, ctx, q, pb.ConsensusServer.Propose)
	c.n.mu.Lock()
	lose := c.n.lose
	c.n.mu.Unlock()
	if err == nil && lose != nil && lose(c.from, c.to) {
		return nil, status.Error(codes.Unavailable, "the answer was lost")
	}
	return a, err
}

func (c *client) ReadIndex(ctx context.Context, q *pb.ReadIndexRequest, _ ...grpc.CallOption) (*pb.ReadIndexResponse, error) {
	return through(c, ctx, q, pb.ConsensusServer.ReadIndex)
}

func (c *client) KeepAlive(ctx context.Context, q *pb.KeepAliveRequest, _ ...grpc.CallOption) (*pb.KeepAliveResponse, error) {
	return through(c, ctx, q, pb.ConsensusServer.KeepAlive)
}

func (c *client) LeaseTimes(ctx context.Context, q *pb.LeaseTimesRequest, _ ...grpc.CallOption) (*pb.LeaseTimesResponse, error) {
	return through(c, ctx, q, pb.ConsensusServer.LeaseTimes)
}

func (c *client) ReplicaStatus(ctx context.Context, q *pb.ReplicaStatusRequest, _ ...grpc.CallOption) (*pb.ReplicaStatusResponse, error) {
	return through(c, ctx, q, pb.ConsensusServer.ReplicaStatus)
}

// replica is one store of a test, which can be stopped and started again.
type replica struct {
	t       testing.TB
	n       *network
	name    string
	address string
	dir     string
	change  func(*Config)
	lead    func(ctx context.Context, epoch int64) error

	*Store
	stop context.CancelFunc
	done chan error
}

// cluster is made of replicas s1, s2, … of which the first was bootstrapped.
type cluster struct {
	t        testing.TB
	n        *network
	replicas []*replica
}

func testLogger(t testing.TB, name string) *slog.Logger {
	if os.Getenv("RAFTSTORE_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("replica", name, "test", t.Name())
}

// newCluster starts so many voters. change may adapt each configuration.
func newCluster(t testing.TB, voters int, change func(*Config)) *cluster {
	t.Helper()
	c := &cluster{t: t, n: newNetwork()}
	first := c.add(change)
	first.open()
	if err := first.Bootstrap(); err != nil {
		t.Fatal(err)
	}
	first.run()
	first.awaitLeading()
	for len(c.replicas) < voters {
		c.join(change)
	}
	return c
}

// add prepares another replica.
func (c *cluster) add(change func(*Config)) *replica {
	c.t.Helper()
	r := &replica{t: c.t, n: c.n, name: fmt.Sprintf("s%d", len(c.replicas)+1), change: change}
	r.dir = filepath.Join(c.t.TempDir(), r.name)
	r.lead = func(ctx context.Context, _ int64) error { <-ctx.Done(); return nil }
	c.replicas = append(c.replicas, r)
	c.t.Cleanup(func() { r.shut() })
	return r
}

// join starts another replica and makes it a voter.
func (c *cluster) join(change func(*Config)) *replica {
	c.t.Helper()
	r := c.add(change)
	r.open()
	r.run()
	c.promote(r)
	return r
}

func (c *cluster) promote(r *replica) {
	c.t.Helper()
	ctx := within(c.t, patience)
	eventually(c.t, "added", func() error { return c.leader().AddNonvoter(ctx, r.id(), r.address) })
	eventually(c.t, "promoted", func() error { return c.leader().Promote(ctx, r.id()) })
}

func (r *replica) id() string { return r.name + ".i1" }

// open opens the store, at the address it had before.
func (r *replica) open() {
	r.t.Helper()
	address := r.address
	if address == "" {
		address = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		r.t.Fatal(err)
	}
	r.address = l.Addr().String()
	cfg := Config{
		Dir: r.dir, ID: r.id(), Address: r.address,
		Stream:   &stream{l, r.n, r.address},
		Dial:     r.n.dial(r.address),
		EpochKey: testEpochKey,
		Logger:   testLogger(r.t, r.name),
		Timing:   Timing{Heartbeat: 200 * time.Millisecond},
	}
	if r.change != nil {
		r.change(&cfg)
	}
	if r.Store, err = Open(cfg); err != nil {
		l.Close()
		r.t.Fatal(err)
	}
	r.n.mu.Lock()
	r.n.stores[r.address] = r.Store
	r.n.mu.Unlock()
}

func (r *replica) run() {
	ctx, cancel := context.WithCancel(context.Background())
	store, done := r.Store, make(chan error, 1)
	r.stop, r.done = cancel, done
	go func() {
		done <- store.Run(ctx, func(ctx context.Context, epoch int64) error { return r.lead(ctx, epoch) })
	}()
	<-store.started
}

// shut stops the replica in order.
func (r *replica) shut() {
	r.t.Helper()
	if r.stop == nil {
		return
	}
	r.stop()
	r.stop = nil
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("%s: Run: %v", r.name, err)
		}
	case <-time.After(patience):
		r.t.Errorf("%s did not stop", r.name)
	}
}

// kill takes the replica away without a word to the others.
func (r *replica) kill() {
	r.t.Helper()
	r.n.isolate(r.address)
	r.shut()
}

func (r *replica) restart() {
	r.t.Helper()
	r.n.heal(r.address)
	r.open()
	r.run()
}

func (r *replica) awaitLeading() {
	r.t.Helper()
	await1(r.t, r.name+" leads", r.LeaderChanged, r.IsLeader)
}

// leader waits for the one replica that leads and is connected.
func (c *cluster) leader() *replica {
	c.t.Helper()
	var leader *replica
	eventually(c.t, "a leader", func() error {
		for _, r := range c.replicas {
			if r.Store != nil && r.stop != nil && r.IsLeader() && c.n.reaches(r.address, r.address) {
				leader = r
				return nil
			}
		}
		return ErrNoLeader
	})
	return leader
}

// asLeader has the leader do something, and again where it lost leadership over it:
// on a busy machine there are elections at any time.
func (c *cluster) asLeader(do func(leader *replica) error) error {
	c.t.Helper()
	var err error
	eventually(c.t, "done by a leader", func() error {
		if err = do(c.leader()); errors.Is(err, ErrNotLeader) {
			return err
		}
		return nil
	})
	return err
}

func (c *cluster) followers() []*replica {
	c.t.Helper()
	leader := c.leader()
	var rest []*replica
	for _, r := range c.replicas {
		if r != leader && r.stop != nil {
			rest = append(rest, r)
		}
	}
	return rest
}

// await1 waits until the condition holds, looking again at each change.
func await1(t testing.TB, what string, changed func() <-chan struct{}, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		ch := changed()
		if cond() {
			return
		}
		select {
		case <-ch:
		case <-deadline.C:
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
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

func put(key, value string) *pb.Txn {
	return &pb.Txn{Success: []*pb.RequestOp{putOp(key, value, 0)}}
}

func putOp(key, value string, lease int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
		RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value), Lease: lease},
	}}
}

func grantOp(id, ttl int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: id, TtlSeconds: ttl}}}
}

func (r *replica) mustPropose(txn *pb.Txn) *pb.TxnResponse {
	r.t.Helper()
	resp, err := r.Propose(within(r.t, patience), txn)
	if err != nil {
		r.t.Fatalf("%s: propose: %v", r.name, err)
	}
	return resp
}

// get reads the replica's own state.
func (r *replica) get(key string) string {
	kv, ok := r.View().Get(key)
	if !ok {
		return ""
	}
	return string(kv.Value)
}

// sameState waits until all running replicas have applied the same and have equal
// hashes.
func (c *cluster) sameState() {
	c.t.Helper()
	eventually(c.t, "equal state", func() error {
		var index, hash uint64
		for i, r := range c.replicas {
			if r.stop == nil {
				continue
			}
			v := r.View()
			if index == 0 {
				index, hash = v.Index(), v.Hash()
			}
			if v.Index() != index || v.Hash() != hash {
				return fmt.Errorf("replica %d is at %d with %016x, another at %d with %016x", i+1, v.Index(), v.Hash(), index, hash)
			}
		}
		return nil
	})
}
