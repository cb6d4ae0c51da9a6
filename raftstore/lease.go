package raftstore

import (
	"context"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// KeepAlive gives leases their whole time again, in the leader's memory. For each
// it returns the seconds granted, 0 where there is no such lease (any more).
func (s *Store) KeepAlive(ctx context.Context, ids ...int64) ([]int64, error) {
	return onLeader(s, ctx,
		func(ctx context.Context, l *leadership) ([]int64, error) { return s.keepAlive(ctx, l, ids) },
		func(ctx context.Context, c pb.ConsensusClient) ([]int64, error) {
			r, err := c.KeepAlive(ctx, &pb.KeepAliveRequest{Ids: ids})
			return r.GetTtlSeconds(), err
		})
}

// keepAlive answers only where this replica leads beyond doubt: what a deposed
// leader granted, its successor would not know of.
func (s *Store) keepAlive(ctx context.Context, l *leadership, ids []int64) ([]int64, error) {
	now := time.Now()
	if err := s.leadsFor(ctx, l, now); err != nil {
		return nil, err
	}
	ttls := make([]int64, len(ids))
	for i, id := range ids {
		ttls[i] = l.clock.keepAlive(id, now)
	}
	return ttls, nil
}

// LeaseTimes returns how long each lease still lasts if it is not kept alive, -1
// where there is no such lease.
func (s *Store) LeaseTimes(ctx context.Context, ids ...int64) ([]time.Duration, error) {
	return onLeader(s, ctx,
		func(ctx context.Context, l *leadership) ([]time.Duration, error) { return s.leaseTimes(ctx, l, ids) },
		func(ctx context.Context, c pb.ConsensusClient) ([]time.Duration, error) {
			r, err := c.LeaseTimes(ctx, &pb.LeaseTimesRequest{Ids: ids})
			if err != nil {
				return nil, err
			}
			left := make([]time.Duration, len(r.RemainingMs))
			for i, ms := range r.RemainingMs {
				left[i] = -1
				if ms >= 0 {
					left[i] = time.Duration(ms) * time.Millisecond
				}
			}
			return left, nil
		})
}

func (s *Store) leaseTimes(ctx context.Context, l *leadership, ids []int64) ([]time.Duration, error) {
	now := time.Now()
	if err := s.leadsFor(ctx, l, now); err != nil {
		return nil, err
	}
	left := make([]time.Duration, len(ids))
	for i, id := range ids {
		d, ok := l.clock.remaining(id, now)
		if !ok {
			d = -1
		}
		left[i] = d
	}
	return left, nil
}
