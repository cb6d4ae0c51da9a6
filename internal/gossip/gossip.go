// Package gossip owns who is out there: every process of a cluster tells the
// others its name, role and addresses, and learns theirs. What it says is a
// hint and never the truth: a peer may be listed that has just died, and one
// that lives may be missing. It never writes anything, and nobody may take a
// peer's absence for its loss.
package gossip

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	keySize = 32 // AES-256
	// How long the others are told that we leave, before we just go.
	leaveTimeout = 2 * time.Second
	// How long an update of our own is waited for.
	updateTimeout = 2 * time.Second
	// How often peers that should be there and are not are called: quickly
	// while alone, now and then to mend a cluster that fell apart into halves
	// which have forgotten each other.
	aloneInterval = time.Second
	mendInterval  = 30 * time.Second
	// Of one connection: an address that does not answer, a peer that hangs.
	streamTimeout = 2 * time.Second
)

// Meta is what a process tells of itself beside name and role, and may change
// while it runs.
type Meta struct {
	MemberID     string // servers: name and incarnation, as raft knows it
	GRPCAddress  string // host:port
	HTTPSAddress string // host:port
}

// Config says who we are.
type Config struct {
	Cluster string
	// Unique among the live processes of a role. Where two have the same, the
	// one that started last is listed.
	Name string
	Role pb.Role
	// host:port to listen on, TCP and UDP.
	BindAddr string
	// host:port by which others reach us; empty: BindAddr, which then must not
	// be unspecified.
	Advertise string
	// 32 bytes, known to all of the cluster.
	Key  []byte
	Meta Meta
	// Gossip addresses, host:port, to begin with.
	Peers  []string
	Logger *slog.Logger
}

// Peer is another process, as it describes itself.
type Peer struct {
	Name          string
	Role          pb.Role
	MemberID      string
	GRPCAddress   string
	HTTPSAddress  string
	GossipAddress string
}

// Gossip takes part in the cluster's gossip from New on.
type Gossip struct {
	config  Config
	list    *memberlist.Memberlist
	roster  *roster
	started time.Time
	// Our record, as it is sent.
	description atomic.Pointer[[]byte]

	// Ends with Close.
	open  context.Context
	close context.CancelFunc
	// Held while leaving and while closing: one after the other.
	ending sync.Mutex
}

// New binds the port and begins to listen, so that a port that is taken shows
// at once. Use Run to join the others, or Close to give the port back.
func New(config Config) (*Gossip, error) {
	g, err := start(config)
	if err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	return g, nil
}

func start(config Config) (*Gossip, error) {
	if config.Cluster == "" || config.Name == "" || config.Role == pb.Role_ROLE_UNSPECIFIED {
		return nil, errors.New("cluster, name and role must be set")
	}
	if len(config.Key) != keySize {
		return nil, fmt.Errorf("key has %d bytes, must have %d", len(config.Key), keySize)
	}
	if config.Logger == nil {
		config.Logger = slog.Default()
	}
	config.Peers = slices.Clone(config.Peers)
	g := &Gossip{config: config, started: time.Now()}
	if err := g.describe(config.Meta); err != nil {
		return nil, err
	}
	// A name of its own for each start: a machine that comes back at another
	// address is then not mistaken for an impostor of the one that was.
	name := fmt.Sprintf("%s/%s/%s", config.Role, config.Name, rand.Text()[:8])
	g.roster = newRoster(config.Cluster, name)
	c, err := listConfig(config, name)
	if err != nil {
		return nil, err
	}
	c.Delegate = delegate{g}
	c.Events = g.roster
	c.Alive = g.roster
	c.Merge = g.roster
	if g.list, err = memberlist.Create(c); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", config.BindAddr, err)
	}
	g.open, g.close = context.WithCancel(context.Background())
	return g, nil
}

// listConfig is memberlist's LAN profile, made quicker: in a small cluster a
// dead peer is missed after two to four seconds.
func listConfig(config Config, name string) (*memberlist.Config, error) {
	bindHost, bindPort, err := splitAddress(config.BindAddr)
	if err != nil {
		return nil, fmt.Errorf("bind address: %w", err)
	}
	c := memberlist.DefaultLANConfig()
	c.Name = name
	c.BindAddr, c.BindPort = bindHost.String(), bindPort
	c.AdvertiseAddr, c.AdvertisePort = bindHost.String(), bindPort
	if config.Advertise != "" {
		host, port, err := splitAddress(config.Advertise)
		if err != nil {
			return nil, fmt.Errorf("advertised address: %w", err)
		}
		c.AdvertiseAddr, c.AdvertisePort = host.String(), port
	}
	if net.ParseIP(c.AdvertiseAddr).IsUnspecified() {
		return nil, fmt.Errorf("advertised address: others cannot reach %s, name one of this machine's addresses", c.AdvertiseAddr)
	}
	c.SecretKey = config.Key
	c.ProbeInterval = 500 * time.Millisecond
	c.ProbeTimeout = 250 * time.Millisecond
	c.SuspicionMult = 3
	// Where nobody else can confirm a suspicion, as in a small cluster that has
	// just lost half of its members, it waits this many times longer.
	c.SuspicionMaxTimeoutMult = 2
	c.PushPullInterval = 15 * time.Second
	c.GossipToTheDeadTime = 15 * time.Second
	c.TCPTimeout = streamTimeout
	// Packets are small; compressing them costs more than it saves.
	c.EnableCompression = false
	c.Logger = log.New(&logWriter{logger: config.Logger}, "", 0)
	return c, nil
}

// splitAddress takes host:port apart; a host name is looked up once, because
// others are told an IP address.
func splitAddress(address string) (net.IP, int, error) {
	host, portText, err := net.SplitHostPort(address)
	if err != nil {
		return nil, 0, err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, 0, fmt.Errorf("%q is not host:port", address)
	}
	if host == "" {
		return net.IPv4zero, int(port), nil
	}
	if ip := net.ParseIP(host); ip != nil {
		return ip, int(port), nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	ips, err := net.DefaultResolver.LookupIP(ctx, "ip", host)
	if err != nil {
		return nil, 0, err
	}
	return ips[0], int(port), nil
}

// Run joins the others, again and again while it is alone, until ctx ends; then
// it tells them that it leaves, for at most two seconds, and gives the port back.
func (g *Gossip) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(g.open, cancel)()
	g.keepJoined(ctx)
	g.leave()
	return g.Close()
}

func (g *Gossip) leave() {
	g.ending.Lock()
	defer g.ending.Unlock()
	if g.open.Err() != nil {
		return // memberlist panics when it is to leave after the end
	}
	if err := g.list.Leave(leaveTimeout); err != nil {
		// They find out by themselves.
		g.config.Logger.Info("gossip: left without the others' knowing", "error", err)
	}
}

// Close gives the port back without a word to the others, and ends Run where
// it runs.
func (g *Gossip) Close() error {
	g.close()
	g.ending.Lock()
	defer g.ending.Unlock()
	if err := g.list.Shutdown(); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	return nil
}

// keepJoined calls those that should be there and are not.
func (g *Gossip) keepJoined(ctx context.Context) {
	tick := time.NewTicker(aloneInterval)
	defer tick.Stop()
	var mended time.Time
	for {
		if alone := len(g.Peers()) == 0; alone || time.Since(mended) >= mendInterval {
			mended = time.Now()
			g.callMissing(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (g *Gossip) callMissing(ctx context.Context) {
	self := g.list.LocalNode().Address()
	for _, address := range g.roster.missing(g.config.Peers) {
		if ctx.Err() != nil {
			return
		}
		if address == self {
			continue
		}
		// memberlist takes no context: an address that does not answer holds
		// the end of Run up for streamTimeout at most.
		if _, err := g.list.Join([]string{address}); err != nil {
			g.config.Logger.Debug("gossip: cannot join", "peer", address, "error", err)
		}
	}
}

// Address is the gossip address (host:port) by which others reach this process.
func (g *Gossip) Address() string { return g.list.LocalNode().Address() }

// Peers are all others that seem to live, by role and name. An own instance is
// not among them.
func (g *Gossip) Peers() []Peer { return g.roster.peers() }

// Servers are the peers that are servers.
func (g *Gossip) Servers() []Peer {
	return slices.DeleteFunc(g.roster.peers(), func(p Peer) bool { return p.Role != pb.Role_ROLE_SERVER })
}

// Changed returns a channel that is closed by the next change of Peers. Take it
// before looking at them, and nothing is missed.
func (g *Gossip) Changed() <-chan struct{} { return g.roster.nextChange() }

// UpdateMeta tells the others of new addresses.
func (g *Gossip) UpdateMeta(meta Meta) error {
	if err := g.describe(meta); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	if err := g.list.UpdateNode(updateTimeout); err != nil {
		return fmt.Errorf("gossip: tell of new addresses: %w", err)
	}
	return nil
}
