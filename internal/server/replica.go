// Package server puts a process together: a replica of the control plane, an
// agent, or both, on what the data directory says it is. It owns the leader's
// duties, the agents' sessions and the membership; it decides nothing that
// scheduler, model or raftstore can decide.
package server

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/gateway"
	"github.com/persys-dev/persys/gateway/etcd"
	"github.com/persys-dev/persys/internal/gossip"
	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
)

const (
	enrollEvery     = 500 * time.Millisecond
	shutdownTimeout = 5 * time.Second
)

// replica is a server: one copy of the cluster's state and all that is around it.
type replica struct {
	config   Config
	id       *identity
	memberID string
	log      *slog.Logger
	registry *prometheus.Registry
	metrics  *metrics

	credentials *pki.Credentials
	authority   *pki.Authority
	peers       *peers
	gossip      *gossip.Gossip
	store       *raftstore.Store
	picture     *picture
	sessions    *sessions
	gateway     *gateway.Gateway
	etcd        *etcd.Server

	// Held while a plan is made that nobody carries out.
	planning chan struct{}

	// Not nil while this replica leads.
	leading atomic.Pointer[leading]
}

// runReplica opens everything, serves until ctx ends, and closes it in reverse.
// also runs beside it, with the same end.
func runReplica(ctx context.Context, c Config, id *identity, log *slog.Logger, also ...func(context.Context, *replica) error) (err error) {
	r := &replica{config: c, id: id, memberID: id.memberID(), log: log, registry: newRegistry(), picture: newPicture(), planning: make(chan struct{}, 1)}
	r.metrics = newMetrics(r.registry)
	if r.credentials, err = pki.LoadCredentials(credentialsDir(c.DataDir, pb.Role_ROLE_SERVER)); err != nil {
		return err
	}
	if err := id.belongs(c.DataDir, r.credentials.Identity()); err != nil {
		return err
	}
	if r.authority, err = pki.LoadAuthority(caDir(c.DataDir)); err != nil {
		return err
	}
	r.peers = newPeers(credentials.NewTLS(r.credentials.ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "h2")))
	defer r.peers.close()

	grpcListener, err := listen(c.Bind, c.GRPCPort, "grpc_port")
	if err != nil {
		return err
	}
	defer grpcListener.Close()
	httpsListener, err := listen(c.Bind, c.HTTPSPort, "https_port")
	if err != nil {
		return err
	}
	defer httpsListener.Close()
	if err := c.gossipPortFree(); err != nil {
		return err
	}
	mux := pki.NewMux(grpcListener, r.credentials, pki.MuxOptions{Logger: log.With("part", "tls")})

	if r.store, err = r.openStore(mux); err != nil {
		return err
	}
	r.gossip, err = gossip.New(gossip.Config{
		Cluster: id.ClusterID, Name: c.Name, Role: pb.Role_ROLE_SERVER, BindAddr: hostPort(c.Bind, c.GossipPort), Advertise: c.gossipAddress(), Key: id.GossipKey,
		Meta:  gossip.Meta{MemberID: r.memberID, GRPCAddress: c.grpcAddress(), HTTPSAddress: c.httpsAddress()},
		Peers: id.GossipPeers, Logger: log.With("part", "gossip"),
	})
	if err != nil {
		return err
	}
	r.sessions = newSessions(log, newDesired(r.picture), r.store.View, r.store.Linearizable, r.welcome)
	r.etcd = etcd.New(r.etcdConfig())
	etcdJSON, err := r.etcdJSON()
	if err != nil {
		return err
	}
	r.gateway = gateway.New(r.gatewayConfig(etcdJSON))
	etcdPort, err := r.newEtcdPort()
	if err != nil {
		return err
	}

	grpcServer := r.grpcServer()
	httpServer := &http.Server{
		Handler: r.gateway.Handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(log.With("part", "https").Handler(), slog.LevelDebug),
	}
	// The store stops first, while everything else still serves: handing over the
	// leadership takes connections. Its end is the end of the rest.
	group, serving := errgroup.WithContext(context.WithoutCancel(ctx))
	stopping, stop := context.WithCancel(serving)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	var storeErr error
	group.Go(func() error {
		storeErr = r.store.Run(stopping, r.lead)
		return cmp.Or(storeErr, errStopped)
	})
	group.Go(func() error { return mux.Run(serving) })
	group.Go(func() error { return serveGRPC(serving, grpcServer, mux.GRPC()) })
	group.Go(func() error {
		return serveHTTP(serving, httpServer, tls.NewListener(httpsListener, r.credentials.ServerTLS("h2", "http/1.1")))
	})
	if etcdPort != nil {
		group.Go(func() error { return etcdPort.run(serving) })
	}
	group.Go(func() error { return r.gossip.Run(serving) })
	group.Go(func() error { return paceGC(serving) })
	group.Go(func() error { return r.follow(serving) })
	for kind := range lanes {
		group.Go(func() error { return r.sessions.relay(serving, kind, r.memberID, r.relayToLeader) })
	}
	group.Go(func() error { return r.stayEnrolled(serving) })
	group.Go(func() error { return rememberServers(serving, c.DataDir, id, r.gossip) })
	for _, run := range also {
		group.Go(func() error { return run(serving, r) })
	}
	log.Info("server is up", "cluster", id.ClusterID, "https", c.httpsAddress(), "grpc", c.grpcAddress(), "gossip", c.gossipAddress())
	etcdPort.announce()
	err = group.Wait()
	if ctx.Err() != nil {
		return storeErr // the others ended because it did
	}
	return err
}

var errStopped = errors.New("stopped as asked")

// listen names the setting when the port is taken.
func listen(ip string, port int, setting string) (net.Listener, error) {
	l, err := net.Listen("tcp", hostPort(ip, port))
	if err != nil {
		return nil, conflict("%s: %v; is another server running here? choose another port or address", setting, err)
	}
	return l, nil
}

// gossipPortFree asks before gossip does, whose errors tell of its insides.
func (c Config) gossipPortFree() error {
	l, err := listen(c.Bind, c.GossipPort, "gossip_port")
	if err != nil {
		return err
	}
	return l.Close()
}

func (r *replica) openStore(mux *pki.Mux) (*raftstore.Store, error) {
	keep, err := retention(r.config.Etcd.AutoCompactionMode, r.config.Etcd.AutoCompactionRetention)
	if err != nil {
		return nil, err
	}
	store, err := raftstore.Open(raftstore.Config{
		Dir: filepath.Join(r.config.DataDir, "raft"), ID: r.memberID, Address: r.config.grpcAddress(),
		Stream: pki.NewRaftStream(mux.Raft(), r.credentials, r.config.grpcAddress()),
		Dial: func(_ context.Context, address string) (pb.ConsensusClient, error) {
			conn, err := r.peers.dial(address)
			if err != nil {
				return nil, err
			}
			return pb.NewConsensusClient(conn), nil
		},
		ExpireLease: func(v *fsm.View, lease *pb.LeaseRecord) *pb.Txn { return r.expireLease(v, lease) },
		EpochKey:    model.EpochKey, Version: Version, Retention: keep, Logger: r.log.With("part", "raft"), Registerer: r.registry,
	})
	if err != nil {
		return nil, err
	}
	if !r.id.Bootstrap {
		return store, nil
	}
	has, err := store.HasState()
	if err != nil {
		return nil, err
	}
	if !has {
		if err := store.Bootstrap(); err != nil {
			return nil, err
		}
	}
	// From here on a log that is missing is a log that was lost: no second
	// cluster is founded in its place.
	r.id.Bootstrap = false
	return store, r.id.save(r.config.DataDir)
}

// expireLease is what the leader proposes when a lease has run out.
func (r *replica) expireLease(v *fsm.View, lease *pb.LeaseRecord) *pb.Txn {
	txn, err := model.LoseNode(v, lease.Id, v.LeaseKeys(lease.Id), time.Now())
	if err != nil {
		r.log.Error("node of an expired lease can't be read; its lease is revoked alone", "lease", lease.Id, "error", err)
	}
	if txn == nil {
		txn = &pb.Txn{Success: []*pb.RequestOp{{Request: &pb.RequestOp_LeaseRevoke{LeaseRevoke: &pb.LeaseRevoke{Id: lease.Id}}}}}
	}
	return txn
}

func (r *replica) grpcServer() *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(pki.TransportCredentials()),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(largestAnswer),
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow),
		grpc.MaxConcurrentStreams(10_000),
		grpc.ChainUnaryInterceptor(gateway.UnaryInterceptor, r.etcd.UnaryInterceptor),
		grpc.ChainStreamInterceptor(gateway.StreamInterceptor),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 15 * time.Second, Timeout: 5 * time.Second}),
	)
	pb.RegisterConsensusServer(s, r.store.Service())
	pb.RegisterFleetServer(s, &fleet{replica: r})
	pb.RegisterAgentsServer(s, r.sessions)
	r.gateway.Register(s)
	r.registerEtcd(s)
	return s
}

func serveGRPC(ctx context.Context, s *grpc.Server, l net.Listener) error {
	// Sessions and watches have no end of their own, so a graceful stop is not
	// waited for: callers go on at another replica.
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	if err := s.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("grpc: %w", err)
	}
	return ctx.Err()
}

func serveHTTP(ctx context.Context, s *http.Server, l net.Listener) error {
	s.BaseContext = func(net.Listener) context.Context { return ctx }
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		deadline, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if s.Shutdown(deadline) != nil {
			_ = s.Close()
		}
	})
	defer stop()
	if err := s.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("https: %w", err)
	}
	<-closed
	return ctx.Err()
}

// relayToLeader hands what agents said to the leader, here or elsewhere.
func (r *replica) relayToLeader(ctx context.Context, request *pb.RelayRequest) (*pb.RelayResponse, error) {
	if l := r.leading.Load(); l != nil {
		return l.relay(ctx, request)
	}
	_, address, ok := r.store.Leader()
	if !ok || address == r.config.grpcAddress() {
		return nil, errNoLeader
	}
	conn, err := r.peers.dial(address)
	if err != nil {
		return nil, err
	}
	return pb.NewFleetClient(conn).Relay(ctx, request)
}

func (r *replica) welcome() *pb.Welcome {
	return &pb.Welcome{
		ClusterId: r.id.ClusterID, MemberId: r.memberID,
		LeaseTtlSeconds: int64(r.config.LeaseTTL / time.Second), Servers: r.serverAddresses(),
	}
}

// member is this server as it introduces itself.
func (r *replica) member() *pb.Member {
	return &pb.Member{
		Id: r.memberID, Name: r.config.Name, GrpcAddress: r.config.grpcAddress(), HttpsAddress: r.config.httpsAddress(),
		GossipAddress: r.config.gossipAddress(), Version: Version, FeatureLevel: fsm.FeatureLevel, EtcdUrl: r.config.etcdURL(),
	}
}

// serverAddresses are the gRPC addresses of all servers, as far as known here:
// the keyspace's, what gossip hears of, and what the data directory remembers.
func (r *replica) serverAddresses() []string {
	var all []string
	add := func(address string) {
		if address != "" && !slices.Contains(all, address) {
			all = append(all, address)
		}
	}
	for _, m := range members(r.store.View()) {
		if !m.Removed {
			add(m.GrpcAddress)
		}
	}
	if len(all) == 0 {
		for _, p := range r.gossip.Servers() {
			add(p.GRPCAddress)
		}
		for _, address := range r.id.servers() {
			add(address)
		}
	}
	return all
}

// stayEnrolled introduces this server to the cluster until the cluster knows it
// at its present address.
func (r *replica) stayEnrolled(ctx context.Context) error {
	own := r.member()
	tick := time.NewTicker(enrollEvery)
	defer tick.Stop()
	for !r.enrolled(own) {
		for _, address := range r.enrollAt() {
			err := r.enrollWith(ctx, address, own)
			if err == nil {
				break
			}
			if isRefusal(err) {
				return fmt.Errorf("the cluster refuses this server: %w", err)
			}
			r.log.Debug("enroll failed", "server", address, "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// enrolled reports whether both raft and the keyspace know this server as it is.
func (r *replica) enrolled(own *pb.Member) bool {
	stored := &pb.Member{}
	_, ok, err := model.Load(r.store.View(), model.MemberKey(own.Id), stored)
	if err != nil || !ok || stored.GrpcAddress != own.GrpcAddress || stored.HttpsAddress != own.HttpsAddress ||
		stored.GossipAddress != own.GossipAddress || stored.Version != own.Version || stored.EtcdUrl != own.EtcdUrl {
		return false
	}
	return slices.ContainsFunc(r.raftServers(), func(s raftServer) bool { return s.id == own.Id && s.address == own.GrpcAddress })
}

// enrollAt is where the leader may be, best guess first.
func (r *replica) enrollAt() []string {
	all := r.serverAddresses()
	for _, p := range r.gossip.Servers() {
		if !slices.Contains(all, p.GRPCAddress) {
			all = append(all, p.GRPCAddress)
		}
	}
	if _, address, ok := r.store.Leader(); ok {
		all = slices.Insert(slices.DeleteFunc(all, func(a string) bool { return a == address }), 0, address)
	}
	return all
}

func (r *replica) enrollWith(ctx context.Context, address string, own *pb.Member) error {
	ctx, cancel := context.WithTimeout(ctx, leaderWait)
	defer cancel()
	conn, err := r.peers.dial(address)
	if err != nil {
		return err
	}
	_, err = pb.NewFleetClient(conn).Enroll(ctx, &pb.EnrollRequest{Member: own})
	return err
}

// Version is set by the build.
var Version = "dev"
