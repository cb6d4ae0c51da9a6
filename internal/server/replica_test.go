package server

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/persys-dev/persys/gateway"
	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const patience = 30 * time.Second

var networks atomic.Int32

// testCluster is a cluster of servers and agents in this process, each at a
// loopback address of its own.
type testCluster struct {
	t       testing.TB
	lease   time.Duration
	quiet   bool // no log
	network int32
	hosts   int
	first   *testHost
}

type testHost struct {
	config  Config
	cancel  context.CancelFunc
	done    chan error
	replica atomic.Pointer[replica]
}

func newTestCluster(t testing.TB) *testCluster {
	return &testCluster{t: t, lease: 2 * time.Second, network: networks.Add(1)}
}

func (c *testCluster) config(name string) Config {
	c.t.Helper()
	c.hosts++
	config, err := Config{
		Name: name, DataDir: filepath.Join(c.t.TempDir(), name), Advertise: fmt.Sprintf("127.%d.%d.%d", 20+os.Getpid()%70, c.network, c.hosts),
		LeaseTTL: c.lease, DockerHost: "none",
	}.WithDefaults()
	if err != nil {
		c.t.Fatal(err)
	}
	return config
}

func (c *testCluster) init(name string) *testHost {
	c.t.Helper()
	h := &testHost{config: c.config(name)}
	if err := Init(c.t.Context(), h.config); err != nil {
		c.t.Fatal(err)
	}
	c.first = h
	c.start(h)
	return h
}

// join writes the data directory that redeeming a token would give.
func (c *testCluster) join(role pb.Role, name string) *testHost {
	c.t.Helper()
	h := &testHost{config: c.config(name)}
	founder, err := loadIdentity(c.first.config.DataDir)
	if err != nil {
		c.t.Fatal(err)
	}
	authority, err := pki.LoadAuthority(caDir(c.first.config.DataDir))
	if err != nil {
		c.t.Fatal(err)
	}
	id := &identity{
		ClusterID: founder.ClusterID, Name: name, Incarnation: uuid.NewString(), Role: role,
		Servers: founder.Servers, GossipPeers: founder.GossipPeers, GossipKey: founder.GossipKey,
	}
	if err := authority.Save(caDir(h.config.DataDir)); err != nil {
		c.t.Fatal(err)
	}
	if err := issueOwn(h.config, authority, id, role, name); err != nil {
		c.t.Fatal(err)
	}
	if err := id.save(h.config.DataDir); err != nil {
		c.t.Fatal(err)
	}
	c.start(h)
	return h
}

// start runs what the host's data directory holds until stop or the test's end.
func (c *testCluster) start(h *testHost) {
	c.t.Helper()
	id, err := loadIdentity(h.config.DataDir)
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel, h.done = cancel, make(chan error, 1)
	log := slog.New(slog.NewTextHandler(testWriter{c.t}, &slog.HandlerOptions{Level: slog.LevelDebug})).With("name", h.config.Name)
	if c.quiet {
		log = slog.New(slog.DiscardHandler)
	}
	go func() {
		if id.Role == pb.Role_ROLE_AGENT {
			h.done <- runAgent(ctx, h.config, id, log)
			return
		}
		h.done <- runReplica(ctx, h.config, id, log, func(ctx context.Context, r *replica) error {
			h.replica.Store(r)
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	c.t.Cleanup(func() { c.stop(h) })
}

func (c *testCluster) stop(h *testHost) {
	if h.cancel == nil {
		return
	}
	h.cancel()
	h.cancel = nil
	select {
	case err := <-h.done:
		if err != nil {
			c.t.Errorf("%s: %v", h.config.Name, err)
		}
	case <-time.After(patience):
		c.t.Errorf("%s did not stop", h.config.Name)
	}
	h.replica.Store(nil)
}

func (c *testCluster) eventually(what string, check func() error) {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// voters waits until the host knows of n voters.
func (c *testCluster) voters(h *testHost, n int) {
	c.t.Helper()
	c.eventually(fmt.Sprintf("%d voters", n), func() error {
		r := h.replica.Load()
		if r == nil {
			return fmt.Errorf("%s is not up", h.config.Name)
		}
		got := 0
		for _, s := range r.raftServers() {
			if s.voter {
				got++
			}
		}
		if got != n {
			return fmt.Errorf("%d voters", got)
		}
		return nil
	})
}

func (c *testCluster) node(h *testHost, name string) (*pb.Node, error) {
	r := h.replica.Load()
	if r == nil {
		return nil, fmt.Errorf("%s is not up", h.config.Name)
	}
	n := &pb.Node{}
	_, ok, err := model.Load(r.store.View(), model.NodeKey(name), n)
	if err == nil && !ok {
		err = fmt.Errorf("node %s is unknown", name)
	}
	return n, err
}

func (c *testCluster) nodeState(h *testHost, name string, want pb.NodeState) {
	c.t.Helper()
	c.eventually(fmt.Sprintf("node %s is %s", name, want), func() error {
		n, err := c.node(h, name)
		if err == nil && n.State != want {
			err = fmt.Errorf("it is %s", n.State)
		}
		return err
	})
}

type testWriter struct{ t testing.TB }

// After a test has ended its log must not be used any more.
var writerLock sync.Mutex

func (w testWriter) Write(p []byte) (int, error) {
	writerLock.Lock()
	defer writerLock.Unlock()
	if w.t.Context().Err() == nil {
		w.t.Logf("%s", p)
	}
	return len(p), nil
}

func TestServersAndAgentsFormACluster(t *testing.T) {
	c := newTestCluster(t)
	s1 := c.init("s1")
	c.voters(s1, 1)
	s2, s3 := c.join(pb.Role_ROLE_SERVER, "s2"), c.join(pb.Role_ROLE_SERVER, "s3")
	c.voters(s1, 3)
	c.voters(s3, 3)
	c.join(pb.Role_ROLE_AGENT, "a1")
	a2 := c.join(pb.Role_ROLE_AGENT, "a2")
	for _, s := range []*testHost{s1, s2, s3} {
		c.nodeState(s, "a1", pb.NodeState_READY)
		c.nodeState(s, "a2", pb.NodeState_READY)
	}

	t.Log("an agent that vanishes is lost when its lease ends, and returns")
	c.stop(a2)
	c.nodeState(s2, "a2", pb.NodeState_NOT_READY)
	c.start(a2)
	c.nodeState(s2, "a2", pb.NodeState_READY)

	t.Log("the leader leaves; nobody is lost")
	before, err := c.node(s2, "a1")
	if err != nil {
		t.Fatal(err)
	}
	c.stop(s1)
	c.eventually("another leader", func() error {
		if s2.replica.Load().leading.Load() == nil && s3.replica.Load().leading.Load() == nil {
			return fmt.Errorf("none")
		}
		return nil
	})
	c.eventually("agents are heard of again", func() error {
		for _, s := range []*testHost{s2, s3} {
			if l := s.replica.Load().leading.Load(); l != nil && len(l.usage().Nodes) == 2 {
				return nil
			}
		}
		return fmt.Errorf("not yet")
	})
	after, err := c.node(s2, "a1")
	if err != nil {
		t.Fatal(err)
	}
	if !after.LastTransition.AsTime().Equal(before.LastTransition.AsTime()) {
		t.Errorf("node a1 changed its state although it was there all the time: %v, then %v", before, after)
	}
	c.start(s1)
	c.voters(s1, 3)
}

// The line that a machine joined with serves it again when its certificate has
// run out meanwhile, with a token that is still good.
func TestJoinAfterTheCertificateHasRunOut(t *testing.T) {
	c := newTestCluster(t)
	s1 := c.init("s1")
	c.voters(s1, 1)
	c.eventually("s1 leads", func() error {
		if s1.replica.Load().leading.Load() == nil {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	host := c.config("a1")
	admin := gateway.WithIdentity(t.Context(), pki.Identity{Cluster: s1.replica.Load().id.ClusterID, Role: pb.Role_ROLE_ADMIN, Name: "admin"})
	token, err := s1.replica.Load().gateway.CreateToken(admin, &pb.CreateTokenRequest{Role: pb.Role_ROLE_AGENT, Uses: 2})
	if err != nil {
		t.Fatal(err)
	}
	join := func() *pki.Credentials {
		t.Helper()
		if role, err := Join(t.Context(), host, token.Secret); err != nil || role != pb.Role_ROLE_AGENT {
			t.Fatalf("join: %v, %v", role, err)
		}
		credentials, err := pki.LoadCredentials(credentialsDir(host.DataDir, pb.Role_ROLE_AGENT))
		if err != nil {
			t.Fatal(err)
		}
		return credentials
	}
	first := join()
	before, err := loadIdentity(host.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	if again := join(); !again.NotAfter().Equal(first.NotAfter()) {
		t.Error("a certificate that is good was replaced")
	}

	key, csr, err := pki.NewKeyAndCSR("a1")
	if err != nil {
		t.Fatal(err)
	}
	authority := s1.replica.Load().authority
	chain, _, notAfter, err := authority.Issue(csr, first.Identity(), nil, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	old, err := pki.NewCredentials(key, chain, authority.Roots())
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Save(credentialsDir(host.DataDir, pb.Role_ROLE_AGENT)); err != nil {
		t.Fatal(err)
	}
	c.eventually("the certificate has run out", func() error {
		if !time.Now().After(notAfter) {
			return fmt.Errorf("good until %s", notAfter)
		}
		return nil
	})
	if renewed := join(); !renewed.NotAfter().After(time.Now()) {
		t.Error("the certificate is still the old one")
	}
	after, err := loadIdentity(host.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	if after.Incarnation != before.Incarnation {
		t.Error("the machine became another one")
	}
}
