package etcd

import (
	"context"
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// boundedStore answers within a time also those who would wait for ever. The store
// itself does not where what it has proposed, or an entry that it knows of, comes
// only when it is no longer cut off from the others.
type boundedStore struct {
	Store
	most time.Duration
}

func (s boundedStore) Propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error) {
	return bounded(ctx, s.most, func(ctx context.Context) (*pb.TxnResponse, error) { return s.Store.Propose(ctx, txn) })
}

func (s boundedStore) Linearizable(ctx context.Context) (*fsm.View, error) {
	return bounded(ctx, s.most, s.Store.Linearizable)
}

func (s boundedStore) KeepAlive(ctx context.Context, ids ...int64) ([]int64, error) {
	return bounded(ctx, s.most, func(ctx context.Context) ([]int64, error) { return s.Store.KeepAlive(ctx, ids...) })
}

func (s boundedStore) LeaseTimes(ctx context.Context, ids ...int64) ([]time.Duration, error) {
	return bounded(ctx, s.most, func(ctx context.Context) ([]time.Duration, error) { return s.Store.LeaseTimes(ctx, ids...) })
}

// bounded has the call end within a time. As in etcd, what becomes of a write that
// timed out is not known.
func bounded[T any](ctx context.Context, most time.Duration, call func(context.Context) (T, error)) (T, error) {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= most {
		return call(ctx)
	}
	limited, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	answer, err := call(limited)
	if errors.Is(err, context.DeadlineExceeded) && limited.Err() != nil && ctx.Err() == nil {
		err = rpctypes.ErrGRPCTimeout
	}
	return answer, err
}
