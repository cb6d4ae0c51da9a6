package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/gateway"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
)

// The replica is what the gateway asks for that only a whole server can do.
var _ gateway.Control = (*replica)(nil)

func (r *replica) gatewayConfig(etcdJSON http.Handler) gateway.Config {
	return gateway.Config{
		Store: gatewayStore{r.store}, Control: r, Version: Version, Gatherer: r.registry, Etcd: etcdJSON, Logger: r.log,
		Ready: []gateway.Check{
			{Name: "leader", Run: func(context.Context) error {
				if _, _, ok := r.store.Leader(); !ok {
					return errors.New("the cluster has no leader")
				}
				return nil
			}},
			{Name: "reads", Run: func(ctx context.Context) error {
				_, err := r.store.Linearizable(ctx)
				return err
			}},
			{Name: "disk", Run: func(context.Context) error {
				if r.store.Status().DiskStalled {
					return errors.New("a write to the log hangs")
				}
				return nil
			}},
			{Name: "member", Run: func(context.Context) error {
				if !r.enrolled(r.member()) {
					return errors.New("the cluster does not know this server yet")
				}
				return nil
			}},
		},
	}
}

// gatewayStore gives watches the gateway's type.
type gatewayStore struct{ *raftstore.Store }

func (s gatewayStore) Watch(key, end []byte, after int64) gateway.Watcher {
	return s.Store.Watch(raftstore.WatchRange{Key: key, End: end, After: after})
}

// Explain says why a workload is as it is.
func (r *replica) Explain(ctx context.Context, id string) (*pb.Explanation, error) {
	v, err := r.store.Linearizable(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "explain: %v", err)
	}
	if err := r.picture.reached(ctx, v.Revision()); err != nil {
		return nil, err
	}
	e, ok := r.picture.explain(id)
	if !ok {
		return nil, status.Errorf(codes.NotFound, "there is no workload %q", id)
	}
	return e, nil
}

// Usage is what the leader heard of the nodes.
func (r *replica) Usage(ctx context.Context) ([]*pb.Node, error) {
	var response *pb.ListUsageResponse
	err := r.onLeader(ctx, func(ctx context.Context, c pb.FleetClient) (err error) {
		response, err = c.ListUsage(ctx, &pb.ListUsageRequest{})
		return err
	})
	return response.GetNodes(), err
}

// JoinToken writes a token as the one string that is handed to a machine.
func (r *replica) JoinToken(_ context.Context, t *pb.Token, secret string) (string, error) {
	return pki.JoinToken{
		Cluster: r.id.ClusterID, Role: t.Role, Servers: r.serverAddresses(), Pins: r.authority.Pins(),
		Expiry: t.ExpireTime.AsTime(), ID: t.Id, Secret: secret,
	}.Encode()
}

// Issue signs a certificate for who comes with a token.
func (r *replica) Issue(_ context.Context, request *pb.JoinRequest, t *pb.Token) (*pb.JoinResponse, *pb.Certificate, error) {
	if request.ClusterId != r.id.ClusterID {
		return nil, nil, status.Errorf(codes.InvalidArgument, "the token is for cluster %s, this is cluster %s", request.ClusterId, r.id.ClusterID)
	}
	who := pki.Identity{Cluster: r.id.ClusterID, Role: t.Role, Name: request.Name}
	addresses := slices.Concat(request.Addresses, []string{request.Name, "localhost", "127.0.0.1"})
	chain, serial, notAfter, err := r.authority.Issue(request.Csr, who, addresses, certificateTTL)
	if err != nil {
		return nil, nil, status.Errorf(codes.InvalidArgument, "csr: %v", err)
	}
	response := &pb.JoinResponse{
		ClusterId: r.id.ClusterID, Name: request.Name, Role: t.Role, Certificate: chain, Roots: r.authority.Roots(),
		GossipKey: r.id.GossipKey, Servers: r.serverAddresses(), GossipPeers: r.gossipAddresses(), Labels: t.Labels,
	}
	if t.Role == pb.Role_ROLE_SERVER {
		if response.CaKey, err = r.authority.Key(); err != nil {
			return nil, nil, fmt.Errorf("issue: %w", err)
		}
	}
	return response, &pb.Certificate{Serial: serial, Identity: who.String(), NotAfter: timestamppb.New(notAfter), TokenId: t.Id}, nil
}

func (r *replica) gossipAddresses() []string {
	all := []string{r.config.gossipAddress()}
	for _, p := range r.gossip.Servers() {
		all = append(all, p.GossipAddress)
	}
	return all
}
