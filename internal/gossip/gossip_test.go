package gossip

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	server = pb.Role_ROLE_SERVER
	agent  = pb.Role_ROLE_AGENT
	// patience is how long anything may take before a test gives up.
	patience = 30 * time.Second
)

var key = bytes.Repeat([]byte{7}, keySize)

// freePort is one that nobody listens on at the moment.
func freePort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}

func at(host, port int) string { return fmt.Sprintf("127.0.0.%d:%d", host, port) }

func config(role pb.Role, name, address string, peers ...string) Config {
	host, _, _ := net.SplitHostPort(address)
	c := Config{
		Cluster: "c1", Name: name, Role: role, BindAddr: address, Key: key, Peers: peers,
		Logger: slog.New(slog.DiscardHandler),
	}
	if role == server {
		c.Meta = Meta{MemberID: name + ".1", GRPCAddress: host + ":7481", HTTPSAddress: host + ":7480"}
	}
	return c
}

// run starts an instance; stop, or the end of the test, lets it leave in order,
// crash takes it away without a word to the others.
func run(t *testing.T, c Config) (g *Gossip, stop, crash func()) {
	t.Helper()
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	ended := false
	stop = func() {
		t.Helper()
		if ended {
			return
		}
		ended = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(leaveTimeout + streamTimeout + 5*time.Second):
			t.Error("Run does not end")
		}
	}
	crash = func() {
		t.Helper()
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return g, stop, crash
}

func text(peers []Peer) string {
	lines := make([]string, len(peers))
	for i, p := range peers {
		lines[i] = fmt.Sprintf("%s %s %s", p.Role, p.Name, p.GossipAddress)
	}
	return strings.Join(lines, "; ")
}

// waitFor waits until the peers are these: "role name address; ...".
func waitFor(t *testing.T, g *Gossip, want ...string) {
	t.Helper()
	deadline := time.After(patience)
	for {
		changed := g.Changed()
		got := text(g.Peers())
		if got == strings.Join(want, "; ") {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s sees %q, want %q", g.Address(), got, want)
		}
	}
}

func line(role pb.Role, name, address string) string {
	return fmt.Sprintf("%s %s %s", role, name, address)
}

func TestPeers(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	a1, a2, a3 := at(1, port), at(2, port), at(3, port)
	s1, _, _ := run(t, config(server, "s1", a1))
	s2, stopS2, _ := run(t, config(server, "s2", a2, a1))
	// One name in two roles, as on a machine that is both.
	n1, _, crashN1 := run(t, config(agent, "s1", a3, a1))

	one, two, three := line(server, "s1", a1), line(server, "s2", a2), line(agent, "s1", a3)
	waitFor(t, s1, two, three)
	waitFor(t, s2, one, three)
	waitFor(t, n1, one, two)
	want := []Peer{
		{"s1", server, "s1.1", "127.0.0.1:7481", "127.0.0.1:7480", a1},
		{"s2", server, "s2.1", "127.0.0.2:7481", "127.0.0.2:7480", a2},
	}
	if got := n1.Servers(); !slices.Equal(got, want) {
		t.Errorf("the agent sees servers %+v, want %+v", got, want)
	}

	// New addresses reach the others.
	changed := n1.Changed()
	if err := s2.UpdateMeta(Meta{MemberID: "s2.2", GRPCAddress: "127.0.0.2:9"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	case <-time.After(patience):
		t.Fatal("an update is not heard of")
	}
	if got := n1.Servers()[1]; got.MemberID != "s2.2" || got.GRPCAddress != "127.0.0.2:9" || got.HTTPSAddress != "" {
		t.Errorf("after the update: %+v", got)
	}

	begin := time.Now()
	stopS2()
	waitFor(t, s1, three)
	waitFor(t, n1, one)
	t.Logf("a server that left is gone after %s", time.Since(begin).Round(time.Millisecond))

	begin = time.Now()
	crashN1()
	waitFor(t, s1)
	t.Logf("an agent that crashed is gone after %s", time.Since(begin).Round(time.Millisecond))
}

// Who comes first waits for the others.
func TestRejoinsWhileAlone(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	a1, a2 := at(1, port), at(2, port)
	// Its own address among the peers does no harm.
	s1, _, _ := run(t, config(server, "s1", a1, a1, a2))
	s2, _, crashS2 := run(t, config(server, "s2", a2))
	waitFor(t, s1, line(server, "s2", a2))
	waitFor(t, s2, line(server, "s1", a1))

	crashS2()
	waitFor(t, s1)
	s2, _, _ = run(t, config(server, "s2", a2))
	waitFor(t, s1, line(server, "s2", a2))
	waitFor(t, s2, line(server, "s1", a1))
}

// A server that was lost is found again by who was never given its address.
func TestFindsLostServers(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	a1, a2 := at(1, port), at(2, port)
	s1, _, _ := run(t, config(server, "s1", a1))
	_, _, crashS2 := run(t, config(server, "s2", a2, a1))
	waitFor(t, s1, line(server, "s2", a2))
	crashS2()
	waitFor(t, s1)
	run(t, config(server, "s2", a2))
	waitFor(t, s1, line(server, "s2", a2))
}

// A machine that comes back at another address, or with an empty disk at the
// same, is taken at once for what it is, although the old one is still listed.
func TestSameNameTwice(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	a1, a2, a3 := at(1, port), at(2, port), at(3, port)
	s1, _, _ := run(t, config(server, "s1", a1))
	_, _, crash := run(t, config(server, "s2", a2, a1))
	waitFor(t, s1, line(server, "s2", a2))
	crash()
	moved, _, crash := run(t, config(server, "s2", a3, a1))
	begin := time.Now()
	waitFor(t, s1, line(server, "s2", a3))
	t.Logf("seen at its new address after %s", time.Since(begin).Round(time.Millisecond))
	waitFor(t, moved, line(server, "s1", a1))

	crash()
	c := config(server, "s2", a3, a1)
	c.Meta.MemberID = "s2.2"
	run(t, c)
	deadline := time.After(patience)
	for {
		changed := s1.Changed()
		if peers := s1.Peers(); len(peers) == 1 && peers[0].MemberID == "s2.2" {
			break
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("seen as %+v", s1.Peers())
		}
	}
}

// Neither another cluster with the same key nor one with another key gets in,
// and the own ones still find each other.
func TestOtherCluster(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	a1, a2, a3, a4 := at(1, port), at(2, port), at(3, port), at(4, port)
	other := config(server, "s2", a2, a1)
	other.Cluster = "c2"
	otherKey := config(server, "s3", a3, a1)
	otherKey.Key = bytes.Repeat([]byte{8}, keySize)
	s1, _, _ := run(t, config(server, "s1", a1, a2, a3))
	s2, _, _ := run(t, other)
	s3, _, _ := run(t, otherKey)
	for _, g := range []*Gossip{s1, s2, s3} {
		for _, address := range []string{a1, a2, a3} {
			if address == g.Address() {
				continue
			}
			if _, err := g.list.Join([]string{address}); err == nil {
				t.Errorf("%s joined %s", g.Address(), address)
			}
		}
	}
	_, err := s1.list.Join([]string{a2})
	if err == nil || !strings.Contains(err.Error(), `peer s2 at `+a2+` is of cluster "c2", this is cluster "c1"`) {
		t.Errorf("the refusal reads %v", err)
	}
	s4, _, _ := run(t, config(agent, "n4", a4, a1, a2, a3))
	waitFor(t, s1, line(agent, "n4", a4))
	waitFor(t, s4, line(server, "s1", a1))
	waitFor(t, s2)
	waitFor(t, s3)
}

func TestNewRefuses(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, test := range []struct {
		name   string
		change func(*Config)
		err    string
	}{
		{"nothing wrong", func(*Config) {}, ""},
		{"host name", func(c *Config) { c.BindAddr = "localhost:0" }, ""},
		{"advertised apart", func(c *Config) { c.BindAddr, c.Advertise = ":0", "127.0.0.1:7482" }, ""},
		{"no cluster", func(c *Config) { c.Cluster = "" }, "cluster, name and role must be set"},
		{"no name", func(c *Config) { c.Name = "" }, "cluster, name and role must be set"},
		{"no role", func(c *Config) { c.Role = 0 }, "cluster, name and role must be set"},
		{"no key", func(c *Config) { c.Key = nil }, "key has 0 bytes, must have 32"},
		{"short key", func(c *Config) { c.Key = c.Key[:16] }, "key has 16 bytes, must have 32"},
		{"no port", func(c *Config) { c.BindAddr = "127.0.0.1" }, "bind address"},
		{"port that is none", func(c *Config) { c.BindAddr = "127.0.0.1:99999" }, "bind address"},
		{"not to be reached", func(c *Config) { c.BindAddr = "0.0.0.0:0" }, "others cannot reach 0.0.0.0"},
		{"advertised nonsense", func(c *Config) { c.Advertise = "here" }, "advertised address"},
		{"taken", func(c *Config) { c.BindAddr = busy.Addr().String() }, "address already in use"},
		{"too much to say", func(c *Config) { c.Meta.GRPCAddress = strings.Repeat("a", 500) }, "at most 512 are allowed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := config(server, "s1", "127.0.0.1:0")
			test.change(&c)
			g, err := New(c)
			switch {
			case err == nil && test.err == "":
				if err := g.Close(); err != nil {
					t.Error(err)
				}
			case err == nil:
				g.Close()
				t.Fatalf("no error, want one with %q", test.err)
			case test.err == "" || !strings.Contains(err.Error(), test.err):
				t.Fatalf("error is %q, want %q", err, test.err)
			}
		})
	}
	g, err := New(config(server, "s1", "127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if err := g.UpdateMeta(Meta{GRPCAddress: strings.Repeat("a", 500)}); err == nil {
		t.Error("an update that does not fit is accepted")
	}
}

func node(name, address string, state memberlist.NodeStateType, meta string) *memberlist.Node {
	host, port, _ := net.SplitHostPort(address)
	n := &memberlist.Node{Name: name, Addr: net.ParseIP(host), Meta: []byte(meta), State: state}
	_, _ = fmt.Sscan(port, &n.Port)
	return n
}

func TestRosterMissing(t *testing.T) {
	r := newRoster("c1", "self")
	alive := func(name, address string, role pb.Role) *memberlist.Node {
		return node(name, address, memberlist.StateAlive, fmt.Sprintf(`{"c":"c1","n":%q,"r":%d}`, name, role))
	}
	gone := func(name string, state memberlist.NodeStateType) {
		n := node(name, "", state, "")
		r.NotifyLeave(n)
	}
	check := func(want ...string) {
		t.Helper()
		if got := r.missing([]string{"127.0.0.1:1", "127.0.0.2:1"}); !slices.Equal(got, want) {
			t.Errorf("missing %v, want %v", got, want)
		}
	}
	check("127.0.0.1:1", "127.0.0.2:1")
	r.NotifyJoin(alive("self", "127.0.0.1:1", server))
	check("127.0.0.1:1", "127.0.0.2:1")
	r.NotifyJoin(alive("a", "127.0.0.1:1", server))
	r.NotifyJoin(alive("b", "127.0.0.2:1", server))
	r.NotifyJoin(alive("c", "127.0.0.3:1", server))
	r.NotifyJoin(alive("d", "127.0.0.4:1", server))
	r.NotifyJoin(alive("e", "127.0.0.5:1", agent))
	check()
	gone("c", memberlist.StateDead) // a server that was lost
	gone("d", memberlist.StateLeft) // one that went away
	gone("e", memberlist.StateDead) // an agent
	gone("x", memberlist.StateDead) // never heard of
	check("127.0.0.3:1")
	r.NotifyJoin(alive("c2", "127.0.0.3:1", server)) // it is back
	check()
	r.NotifyJoin(alive("c3", "127.0.0.3:1", server)) // and back again
	gone("c2", memberlist.StateDead)                 // before the last was missed
	check()
	for i := range maxLost + 2 {
		name := fmt.Sprint("s", i)
		r.NotifyJoin(alive(name, fmt.Sprintf("127.0.1.%d:1", i), server))
		gone(name, memberlist.StateDead)
	}
	if got := r.missing(nil); len(got) != maxLost || got[0] != "127.0.1.2:1" {
		t.Errorf("remembered are %v", got)
	}
}

func TestRosterKeepsStrangersOut(t *testing.T) {
	r := newRoster("c1", "self")
	changed := r.nextChange()
	for name, meta := range map[string]string{
		"other cluster": `{"c":"c2","n":"s1","r":1}`, "not ours": "consul", "nothing": "", "other type": `{"c":1}`,
	} {
		n := node(name, "127.0.0.9:1", memberlist.StateAlive, meta)
		if r.NotifyAlive(n) == nil || r.NotifyMerge([]*memberlist.Node{n}) == nil {
			t.Errorf("%s: let in", name)
		}
		r.NotifyJoin(n)
		r.NotifyUpdate(n)
		r.NotifyLeave(n)
	}
	if len(r.peers()) != 0 {
		t.Errorf("peers are %v", r.peers())
	}
	select {
	case <-changed:
		t.Error("strangers count as a change")
	default:
	}
	known := node("a", "127.0.0.9:1", memberlist.StateAlive, `{"c":"c1","n":"s1","r":1,"future":[1]}`)
	if err := r.NotifyMerge([]*memberlist.Node{known}); err != nil {
		t.Errorf("a newer version is refused: %v", err)
	}
}

func TestLog(t *testing.T) {
	var out bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	w := &logWriter{logger: logger}
	for _, line := range []string{"[DEBUG] memberlist: one\n", "[ERR] memberlist: two", "[what] three", "four"} {
		if n, err := w.Write([]byte(line)); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	want := `level=DEBUG msg="gossip: one"
level=INFO msg="gossip: two"
level=INFO msg="gossip: [what] three"
level=INFO msg="gossip: four"
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}
