package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/gateway"
	"github.com/persys-dev/persys/gateway/etcd"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
)

func (r *replica) etcdConfig() etcd.Config {
	c := r.config.Etcd
	return etcd.Config{
		Store: etcdStore{r.store}, Cluster: etcd.ID(r.id.ClusterID), Member: etcd.ID(r.memberID),
		Control: etcdControl{r}, MaxRequestBytes: c.MaxRequestBytes, MaxTxnOps: c.MaxTxnOps, QuotaBytes: c.QuotaBytes,
		WatchProgress: c.WatchProgress,
		Identity:      etcdIdentity, CertUser: c.certUser, Logger: r.log.With("part", "etcd"),
	}
}

// etcdIdentity is who calls with a certificate of the cluster.
func etcdIdentity(ctx context.Context) (actor string, role pb.Role, ok bool) {
	id, ok := gateway.IdentityFrom(ctx)
	return id.String(), id.Role, ok
}

// certUser is the user that a certificate from another authority names.
func (c EtcdConfig) certUser(ctx context.Context) string {
	if _, ours := gateway.IdentityFrom(ctx); ours || !c.ClientCertAuth {
		return ""
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return ""
	}
	return info.State.VerifiedChains[0][0].Subject.CommonName
}

// newEtcdPort opens the port for etcd's clients; nil where none is wanted.
func (r *replica) newEtcdPort() (*etcdPort, error) {
	c := r.config.Etcd
	if c.Listen == "" {
		return nil, nil
	}
	p := &etcdPort{log: r.log.With("part", "etcd"), anybody: c.TrustedCAFile == ""}
	var err error
	if p.tls, err = c.tls(); err != nil {
		return nil, err
	}
	if p.listener, err = net.Listen("tcp", c.Listen); err != nil {
		return nil, conflict("etcd_listen: %v; is an etcd running here? choose another port or address", err)
	}
	p.grpc = grpc.NewServer(append(c.grpcOptions(), grpc.UnaryInterceptor(r.etcd.UnaryInterceptor))...)
	r.registerEtcd(p.grpc)
	handler, err := r.etcd.Handler(admitAll, promhttp.HandlerFor(r.registry, promhttp.HandlerOpts{}))
	if err != nil {
		p.listener.Close()
		return nil, err
	}
	if p.tls == nil {
		handler = etcd.OnlyLocal(handler)
	}
	p.http = &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	return p, nil
}

// admitAll: on this port nobody has an identity of ours; etcd's auth decides.
func admitAll(ctx context.Context, _ string) (context.Context, error) { return ctx, nil }

// overHTTPS marks calls that came to the HTTPS port.
type overHTTPS struct{}

// etcdJSON is etcd's API on the HTTPS port.
func (r *replica) etcdJSON() (http.Handler, error) {
	calls, err := r.etcd.JSON(func(ctx context.Context, method string) (context.Context, error) {
		return gateway.AdmitLocally(context.WithValue(ctx, overHTTPS{}, true), method)
	})
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/", calls)
	mux.HandleFunc("GET /version", etcd.ServeVersion)
	return mux, nil
}

// registerEtcd adds what etcd's clients expect of a gRPC server.
func (r *replica) registerEtcd(s *grpc.Server) {
	r.etcd.Register(s)
	healthpb.RegisterHealthServer(s, health.NewServer())
	described := reflection.ServerOptions{Services: s, DescriptorResolver: etcd.Descriptors{}}
	reflectionpb.RegisterServerReflectionServer(s, reflection.NewServerV1(described))
	reflectionalphapb.RegisterServerReflectionServer(s, reflection.NewServer(described))
}

// etcdStore gives a raftstore the types and the errors of package etcd.
type etcdStore struct{ *raftstore.Store }

func (s etcdStore) Propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error) {
	answer, err := s.Store.Propose(ctx, txn)
	return answer, etcdError(err)
}

func (s etcdStore) Linearizable(ctx context.Context) (*fsm.View, error) {
	v, err := s.Store.Linearizable(ctx)
	return v, etcdError(err)
}

func (s etcdStore) Watch(key, end []byte, after int64) etcd.Watcher {
	return s.Store.Watch(raftstore.WatchRange{Key: key, End: end, After: after})
}

func (s etcdStore) KeepAlive(ctx context.Context, ids ...int64) ([]int64, error) {
	ttls, err := s.Store.KeepAlive(ctx, ids...)
	return ttls, etcdError(err)
}

func (s etcdStore) LeaseTimes(ctx context.Context, ids ...int64) ([]time.Duration, error) {
	left, err := s.Store.LeaseTimes(ctx, ids...)
	return left, etcdError(err)
}

// etcdError says in etcd's words why the store cannot be reached. Clients try a
// write again only where it surely was not carried out; of these none tells them
// to do it by themselves.
func etcdError(err error) error {
	switch {
	case errors.Is(err, raftstore.ErrNoLeader):
		return rpctypes.ErrGRPCNoLeader
	case errors.Is(err, raftstore.ErrOutcomeUnknown):
		return rpctypes.ErrGRPCTimeoutDueToLeaderFail
	case errors.Is(err, raftstore.ErrNotLeader):
		return rpctypes.ErrGRPCLeaderChanged
	case errors.Is(err, raftstore.ErrClosed):
		return rpctypes.ErrGRPCStopped
	}
	return err
}
