// Package gateway is the control API: the gRPC services Workloads, Nodes and
// Cluster, the same as REST on the HTTPS port, and who may call what. It reads
// a view of the keyspace, has model decide what a request changes, and proposes
// that. It never decides where work runs, never speaks to agents, and keeps no
// state of its own.
package gateway

import (
	"context"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Store is the replicated keyspace. Errors that are neither *fsm.Error nor those
// of the context mean that it cannot be reached now.
type Store interface {
	// Propose returns when the transaction is applied here: View shows it.
	Propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error)
	View() *fsm.View
	// Linearizable is a view that shows everything acknowledged before the call.
	Linearizable(ctx context.Context) (*fsm.View, error)
	// Watch gives the changes of the keys in [key, end) after a revision.
	Watch(key, end []byte, after int64) Watcher
}

// Watcher is pulled: it holds nothing that must be closed.
type Watcher interface {
	// Next waits for changes, whole revisions in order, up to revision.
	Next(ctx context.Context) (events []*pb.KeyEvent, revision int64, err error)
}

// Control is what only a whole server can do. Its errors are gRPC statuses.
type Control interface {
	// Members are all servers, as they are now, and how many may still be lost.
	Members(ctx context.Context) (*pb.ListMembersResponse, error)
	ChangeMember(ctx context.Context, change *pb.ChangeMemberRequest) error
	// Explain is why a workload is as it is.
	Explain(ctx context.Context, id string) (*pb.Explanation, error)
	// Plan is what would become of replicas if txn, which is about a workload, were
	// carried out on v; nil stands for no change. placements, pending and unchanged
	// are set.
	Plan(ctx context.Context, v *fsm.View, workload string, txn *pb.Txn) (*pb.WorkloadPlan, error)
	// Usage is what the leader heard of nodes: id, usage and last_heartbeat are set.
	Usage(ctx context.Context) ([]*pb.Node, error)
	// Logs are those of one replica, which req names, on a node.
	Logs(ctx context.Context, node string, req *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error
	// JoinToken writes a token as the one string that is handed to a machine.
	JoinToken(ctx context.Context, t *pb.Token, secret string) (string, error)
	// Issue signs a certificate for who comes with a token, and tells it what it
	// needs to know. The certificate's serial, identity and not_after are set. It
	// is not handed out unless the token could be used up.
	Issue(ctx context.Context, req *pb.JoinRequest, t *pb.Token) (*pb.JoinResponse, *pb.Certificate, error)
}

// Check is one condition of health.
type Check struct {
	Name string
	// Run says what is wrong; it must return soon.
	Run func(ctx context.Context) error
}

// Config is what a Gateway is made of; all of it but the checks is needed.
type Config struct {
	Store   Store
	Control Control
	// Live: restart the process if one fails. Ready: send it no requests.
	Live, Ready []Check
	Gatherer    prometheus.Gatherer
	// Etcd is etcd's JSON API, which asks AdmitLocally who may call what; nil where
	// there is none.
	Etcd    http.Handler
	Version string
	Logger  *slog.Logger
}

// Gateway serves the control API.
type Gateway struct {
	pb.UnimplementedWorkloadsServer
	pb.UnimplementedNodesServer
	pb.UnimplementedClusterServer

	store   Store
	control Control
	config  Config
	log     *slog.Logger
}

// New makes a gateway; nothing runs until it is called.
func New(c Config) *Gateway {
	return &Gateway{store: c.Store, control: c.Control, config: c, log: c.Logger}
}

// Register adds the services to a server, whose interceptors must be
// UnaryInterceptor and StreamInterceptor.
func (g *Gateway) Register(s grpc.ServiceRegistrar) {
	pb.RegisterWorkloadsServer(s, g)
	pb.RegisterNodesServer(s, g)
	pb.RegisterClusterServer(s, g)
}
