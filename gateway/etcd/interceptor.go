package etcd

import (
	"context"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// UnaryInterceptor refuses at once what is to be refused while there is no leader,
// which a client says in the metadata (clientv3.WithRequireLeader). Watches look at
// it themselves, for as long as they last.
func (s *Server) UnaryInterceptor(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if v := metadata.ValueFromIncomingContext(ctx, rpctypes.MetadataRequireLeaderKey); len(v) > 0 && v[0] == rpctypes.MetadataHasLeader {
		if _, _, ok := s.store.Leader(); !ok {
			return nil, rpctypes.ErrGRPCNoLeader
		}
	}
	return handler(ctx, request)
}
