package raftstore

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// The clock of the leases looks at least so often, to notice when it was
	// stopped, and takes it for stopped when it wakes later than that.
	leaseTick  = time.Second
	pausedFor  = time.Second
	leaseRetry = 500 * time.Millisecond
	// Ends of leases that are proposed at once.
	leasesAtOnce = 256
)

// expireLeases proposes the end of leases that have run out. A leader that was
// stopped and deposed meanwhile proposes them too, and the compare of the epoch
// refuses it. One that was stopped and still leads heard nobody in that time, so
// it does not count.
func (s *Store) expireLeases(ctx context.Context, l *leadership) error {
	for {
		changed := l.clock.changed.next()
		now := time.Now()
		ids, next := l.clock.due(now)
		if len(ids) > 0 {
			if err := s.endLeases(ctx, l, ids); err != nil {
				return err
			}
			continue
		}
		if next.IsZero() {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
				continue
			}
		}
		wake := now.Add(min(leaseTick, next.Sub(now)))
		timer := time.NewTimer(time.Until(wake))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
		if late := time.Since(wake); late > pausedFor {
			s.log.Warn("this process was stopped; leases are given the time back", "for", late)
			l.clock.shift(late)
		}
	}
}

func (s *Store) endLeases(ctx context.Context, l *leadership, ids []int64) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(leasesAtOnce)
	v := s.View()
	for _, id := range ids {
		record, ok := v.Lease(id)
		if !ok {
			l.clock.drop(id)
			continue
		}
		g.Go(func() error {
			r, err := s.ProposeAsLeader(ctx, l.epoch, s.cfg.ExpireLease(v, record))
			switch {
			case errors.Is(err, ErrNotLeader), ctx.Err() != nil:
				return nil // the reign is over, or about to be
			case err != nil:
				s.log.Warn("ending a lease failed", "lease", id, "error", err)
			case r.Succeeded:
				s.metrics.expired.Inc()
				return nil
			}
			// A compare of the caller's did not hold, or it was refused: what it was
			// decided upon has changed.
			l.clock.retry(id, time.Now().Add(leaseRetry))
			return nil
		})
	}
	return g.Wait()
}

// keepHistory forgets old versions and compares state hashes. Both follow the
// number of changes, never the clock alone, so that an idle cluster writes nothing.
func (s *Store) keepHistory(ctx context.Context, l *leadership) error {
	h := newHistory(s.cfg.Retention)
	checked := s.machine.applied.Load()
	ticker := time.NewTicker(s.cfg.Retention.Check)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			if err := s.compact(ctx, l, h, now); err != nil {
				return err
			}
		}
		if applied := s.machine.applied.Load(); applied >= checked+s.cfg.Retention.CheckpointEntries {
			checked = applied
			v := s.View()
			if err := s.maintain(ctx, l, &pb.RequestOp{Request: &pb.RequestOp_Checkpoint{
				Checkpoint: &pb.Checkpoint{Index: v.Index(), Hash: v.Hash()},
			}}); err != nil {
				return err
			}
		}
	}
}

func (s *Store) compact(ctx context.Context, l *leadership, h *history, now time.Time) error {
	v := s.View()
	to, ok := h.target(now, v.Revision(), v.CompactRevision())
	if !ok {
		return nil
	}
	return s.maintain(ctx, l, &pb.RequestOp{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: to}}})
}

// maintain proposes one operation of upkeep; a refusal is not worth more than a
// line in the log.
func (s *Store) maintain(ctx context.Context, l *leadership, op *pb.RequestOp) error {
	_, err := s.ProposeAsLeader(ctx, l.epoch, &pb.Txn{Success: []*pb.RequestOp{op}})
	switch {
	case err == nil, ctx.Err() != nil, errors.Is(err, ErrNotLeader):
	default:
		s.log.Warn("upkeep of the history failed", "error", err)
	}
	return nil
}

// history decides up to where the past is forgotten. It has no clock.
type history struct {
	keep    Retention
	samples []sample // oldest first
}

// sample is the revision at a time.
type sample struct {
	at       time.Time
	revision int64
}

func newHistory(keep Retention) *history { return &history{keep: keep} }

// target returns the revision to compact to. It grows only with the number of
// revisions, and in steps that are worth a log entry.
func (h *history) target(now time.Time, revision, compacted int64) (int64, bool) {
	h.samples = append(h.samples, sample{now, revision})
	aged := int64(0) // newest revision that is older than Age
	for len(h.samples) > 0 && now.Sub(h.samples[0].at) >= h.keep.Age {
		aged = h.samples[0].revision
		if len(h.samples) > 1 && now.Sub(h.samples[1].at) < h.keep.Age {
			break
		}
		h.samples = h.samples[1:]
	}
	to := max(min(revision-h.keep.Revisions, aged), revision-h.keep.MaxRevisions)
	if to <= compacted || to-compacted < h.keep.Revisions/2 {
		return 0, false
	}
	return to, true
}
