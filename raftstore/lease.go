package raftstore

import (
	"context"
	"fmt"
	"sync"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// maxKeepAlives is how many leases are kept alive by one message to the leader.
const maxKeepAlives = 16 << 10

// keepAlives shares one message to the leader among all who ask at the same time.
type keepAlives struct {
	mu      sync.Mutex
	waiting []*keepAliveCall
	running bool
}

type keepAliveCall struct {
	ids  []int64
	done chan struct{}
	// What was answered, from when done is closed.
	ttls []int64
	err  error
}

// KeepAlive gives leases their whole time again, in the leader's memory. For each
// it returns the seconds granted, 0 where there is no such lease (any more).
func (s *Store) KeepAlive(ctx context.Context, ids ...int64) ([]int64, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	if err := s.awaitStart(ctx); err != nil {
		return nil, err
	}
	if s.reigning() != nil {
		return s.askKeepAlive(ctx, ids)
	}
	call := &keepAliveCall{ids: ids, done: make(chan struct{})}
	k := &s.keepAlives
	k.mu.Lock()
	if !k.running {
		if !s.spawn(s.sendKeepAlives) {
			k.mu.Unlock()
			return nil, s.closedError()
		}
		k.running = true
	}
	k.waiting = append(k.waiting, call)
	k.mu.Unlock()
	select {
	case <-call.done:
		return call.ttls, call.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// sendKeepAlives runs as long as somebody waits.
func (s *Store) sendKeepAlives() {
	for {
		calls, ids := s.keepAlives.take()
		if len(calls) == 0 {
			return
		}
		ttls, err := s.askKeepAlive(context.Background(), ids)
		for _, c := range calls {
			if err == nil {
				c.ttls, ttls = ttls[:len(c.ids):len(c.ids)], ttls[len(c.ids):]
			}
			c.err = err
			close(c.done)
		}
	}
}

// take returns the oldest calls that one message can carry, with all their leases.
func (k *keepAlives) take() (calls []*keepAliveCall, ids []int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for n < len(k.waiting) && (n == 0 || len(ids)+len(k.waiting[n].ids) <= maxKeepAlives) {
		ids = append(ids, k.waiting[n].ids...)
		n++
	}
	calls, k.waiting = k.waiting[:n:n], k.waiting[n:]
	if n == 0 {
		k.waiting, k.running = nil, false
	}
	return calls, ids
}

func (s *Store) askKeepAlive(ctx context.Context, ids []int64) ([]int64, error) {
	return onLeader(s, ctx,
		func(ctx context.Context, l *leadership) ([]int64, error) { return s.keepAlive(ctx, l, ids) },
		func(ctx context.Context, c pb.ConsensusClient) ([]int64, error) {
			r, err := c.KeepAlive(ctx, &pb.KeepAliveRequest{Ids: ids})
			if err == nil && len(r.TtlSeconds) != len(ids) {
				err = fmt.Errorf("raftstore: the leader answered %d leases for %d", len(r.TtlSeconds), len(ids))
			}
			return r.GetTtlSeconds(), err
		})
}

// keepAlive answers only where this replica leads beyond doubt: what a deposed
// leader granted, its successor would not know of.
func (s *Store) keepAlive(ctx context.Context, l *leadership, ids []int64) ([]int64, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timing.Peer)
	defer cancel()
	caughtUp := false
	for {
		changed := l.clock.changed.next()
		now := time.Now()
		if err := s.leadsFor(ctx, l, now); err != nil {
			return nil, err
		}
		leads := time.Now()
		k := l.clock.keepAlive(ids, now)
		switch {
		case k.missing && !caughtUp:
			if err := s.catchUp(ctx); err != nil {
				return nil, err
			}
			caughtUp = true
		case k.ending:
			select {
			case <-changed:
			case <-l.ctx.Done():
				return nil, ErrNotLeader
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		case time.Since(leads) > s.cfg.Timing.LeaderLease:
			// This process was stopped, and somebody else may lead by now.
		default:
			return k.ttls, nil
		}
	}
}

// catchUp waits until everything that is committed is applied here: another replica
// may have applied it before, and its callers know of it.
func (s *Store) catchUp(ctx context.Context) error { return s.machine.wait(ctx, s.raft.CommitIndex()) }

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
			if len(r.RemainingMs) != len(ids) {
				return nil, fmt.Errorf("raftstore: the leader answered %d leases for %d", len(r.RemainingMs), len(ids))
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
	left, missing := l.clock.remaining(ids, now)
	if missing {
		if err := s.catchUp(ctx); err != nil {
			return nil, err
		}
		left, _ = l.clock.remaining(ids, now)
	}
	return left, nil
}
