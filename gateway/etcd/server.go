// Package etcd speaks etcd's v3 API over the replicated keyspace, so that etcd's
// clients work unchanged against any replica. It owns the protocol: translation,
// limits, errors, watches, leases, etcd's own users and roles, and how the
// system's keys are shown and accepted. It keeps no state that another replica
// would miss, and depends on nothing of etcd but its published API.
//
// Source: the etcd API, go.etcd.io/etcd/api/v3 and https://etcd.io/docs/.
package etcd

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/crypto/bcrypt"
	"google.golang.org/grpc"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/proto/etcd/v3electionpb"
	"github.com/persys-dev/persys/proto/etcd/v3lockpb"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Store is the replicated keyspace, as one replica has it. Its errors are
// *fsm.Error for what was refused, gRPC statuses of etcd's rpctypes where it can't
// be reached, and those of the context.
type Store interface {
	// Propose returns when the transaction is applied here: View shows it.
	Propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error)
	View() *fsm.View
	// Linearizable is a view that shows everything acknowledged before the call.
	Linearizable(ctx context.Context) (*fsm.View, error)
	// Watch gives the changes of the keys in [key, end) after a revision.
	Watch(key, end []byte, after int64) Watcher
	// KeepAlive gives leases their whole time again; for each the seconds granted,
	// 0 where there is no such lease.
	KeepAlive(ctx context.Context, ids ...int64) ([]int64, error)
	// LeaseTimes is how long each lease still lasts; -1 where there is none.
	LeaseTimes(ctx context.Context, ids ...int64) ([]time.Duration, error)
	// Leader is the replica that leads, as far as is known here; LeaderChanged is
	// closed when it may answer otherwise.
	Leader() (id, address string, ok bool)
	LeaderChanged() <-chan struct{}
	// Term is raft's, as known here. It is called for each answer.
	Term() uint64
}

// Watcher is pulled: it holds nothing that must be closed.
type Watcher interface {
	// Next waits for changes, whole revisions in order, up to revision.
	Next(ctx context.Context) (events []*pb.KeyEvent, revision int64, err error)
}

// Config is what a Server is made of.
type Config struct {
	Store   Store
	Control Control
	// Cluster and Member are the ids that answers carry.
	Cluster, Member uint64
	// MaxRequestBytes bounds a request; default 1.5 MiB.
	MaxRequestBytes int
	// MaxTxnOps bounds each list of a transaction's compares and operations;
	// default 128.
	MaxTxnOps int
	// QuotaBytes bounds the keys and values that are kept, all versions together;
	// default 8 GiB, negative for no bound.
	QuotaBytes int64
	// Identity is who a certificate of the Persys cluster says calls; nil, or not
	// ok, where there is none.
	Identity func(ctx context.Context) (actor string, role pb.Role, ok bool)
	// CertUser is the etcd user that a client certificate stands for; nil where
	// certificates do not name users, "" where there is none.
	CertUser func(ctx context.Context) string
	// RequestTimeout bounds how long a call waits for the store; default 15 s, which is
	// longer than the store looks for a leader.
	RequestTimeout time.Duration
	// WatchProgress is how often watchers that asked for it, and have no events, are
	// told how far they are; default 10 min.
	WatchProgress time.Duration
	// MinLeaseTTL is the least that a lease is granted, in whole seconds, rounded up.
	// It should be 3/2 of what an election may take, as in etcd; default 2 s, which is
	// etcd's.
	MinLeaseTTL time.Duration
	// TokenTTL is how long an etcd token lasts after its last use; default 5 min.
	TokenTTL time.Duration
	// BcryptCost is that of new passwords; default 10.
	BcryptCost int
	Logger     *slog.Logger
}

// Server answers etcd clients.
type Server struct {
	etcdpb.UnimplementedKVServer
	etcdpb.UnimplementedWatchServer
	etcdpb.UnimplementedLeaseServer
	etcdpb.UnimplementedAuthServer
	etcdpb.UnimplementedClusterServer
	etcdpb.UnimplementedMaintenanceServer

	store  Store
	config Config
	log    *slog.Logger
	auth   *auth
	quota  *quota
	// underWay is the bytes of the transactions that are being carried out.
	underWay atomic.Int64

	watching sync.Mutex
	hub      *watchHub // nil while nobody watches
}

// New makes a server; nothing runs until it is called.
func New(c Config) *Server {
	if c.MaxRequestBytes == 0 {
		c.MaxRequestBytes = 1.5 * 1024 * 1024
	}
	if c.MaxTxnOps == 0 {
		c.MaxTxnOps = 128
	}
	if c.QuotaBytes == 0 {
		c.QuotaBytes = defaultQuotaBytes
	}
	if c.RequestTimeout == 0 {
		c.RequestTimeout = 15 * time.Second
	}
	if c.WatchProgress == 0 {
		c.WatchProgress = 10 * time.Minute
	}
	if c.MinLeaseTTL == 0 {
		c.MinLeaseTTL = 2 * time.Second
	}
	if c.TokenTTL == 0 {
		c.TokenTTL = 5 * time.Minute
	}
	if c.BcryptCost == 0 {
		c.BcryptCost = bcrypt.DefaultCost
	}
	c.Store = boundedStore{c.Store, c.RequestTimeout}
	return &Server{store: c.Store, config: c, log: c.Logger, auth: newAuth(c), quota: newQuota(c.QuotaBytes)}
}

// Register adds the services to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	etcdpb.RegisterKVServer(r, s)
	etcdpb.RegisterWatchServer(r, s)
	etcdpb.RegisterLeaseServer(r, s)
	v3lockpb.RegisterLockServer(r, locks{server: s})
	v3electionpb.RegisterElectionServer(r, elections{server: s})
	etcdpb.RegisterAuthServer(r, s)
	etcdpb.RegisterClusterServer(r, s)
	etcdpb.RegisterMaintenanceServer(r, s)
}

// header is that of an answer that was true at the revision.
func (s *Server) header(revision int64) *etcdpb.ResponseHeader {
	return &etcdpb.ResponseHeader{
		ClusterId: s.config.Cluster, MemberId: s.config.Member, Revision: revision, RaftTerm: s.store.Term(),
	}
}
