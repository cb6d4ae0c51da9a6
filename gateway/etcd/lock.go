package etcd

import (
	"context"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/proto/etcd/v3lockpb"
)

// locks serves etcd's Lock service.
type locks struct {
	v3lockpb.UnimplementedLockServer
	server *Server
}

// Lock waits until the lock is held by the lease. A call that is given up leaves
// the queue.
func (l locks) Lock(ctx context.Context, r *v3lockpb.LockRequest) (*v3lockpb.LockResponse, error) {
	ctx = l.server.auth.pin(ctx)
	c, err := l.server.contest(r.Name)
	if err != nil {
		return nil, err
	}
	p, err := c.enter(ctx, r.Lease, nil)
	if err != nil {
		return nil, err
	}
	header, err := c.win(ctx, p)
	switch {
	case err != nil:
		c.withdraw(ctx, p)
		return nil, err
	case header == nil:
		return nil, status.Error(codes.Unknown, "mutex: session is expired")
	}
	return &v3lockpb.LockResponse{Header: header, Key: p.key}, nil
}

// Unlock deletes the key of a lock.
func (l locks) Unlock(ctx context.Context, r *v3lockpb.UnlockRequest) (*v3lockpb.UnlockResponse, error) {
	answer, err := l.server.DeleteRange(ctx, &etcdpb.DeleteRangeRequest{Key: r.Key})
	if err != nil {
		return nil, err
	}
	return &v3lockpb.UnlockResponse{Header: answer.Header}, nil
}
