package raftstore

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	leaseRetry = 500 * time.Millisecond
	// Ends of leases that are proposed at once. What has run out beyond that waits
	// its turn, and can be kept alive until then.
	leasesAtOnce = 256
)

// expireLeases proposes the end of leases that have run out. A leader that was
// stopped and deposed meanwhile proposes them too, and the compare of the epoch
// refuses it.
func (s *Store) expireLeases(ctx context.Context, l *leadership) error {
	for {
		changed := l.clock.changed.next()
		ids, next := l.clock.due(time.Now(), leasesAtOnce)
		if len(ids) > 0 {
			if err := s.endLeases(ctx, l, ids); err != nil {
				return err
			}
			continue
		}
		var timer *time.Timer
		var wake <-chan time.Time
		if !next.IsZero() {
			timer = time.NewTimer(time.Until(next))
			wake = timer.C
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-wake:
		}
		if timer != nil {
			timer.Stop()
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

func (s *Store) endLeases(ctx context.Context, l *leadership, ids []int64) error {
	g, ctx := errgroup.WithContext(ctx)
	v := s.View()
	for _, id := range ids {
		record, ok := v.Lease(id)
		if !ok {
			continue // revoked meanwhile, of which the clock is told
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
	var refused *fsm.Error
	switch {
	case err == nil, ctx.Err() != nil, errors.Is(err, ErrNotLeader):
	case errors.As(err, &refused) && refused.Code == pb.TxnError_TXN_ERROR_COMPACTED:
		// A client was faster, and went further.
	default:
		s.log.Warn("upkeep of the history failed", "error", err)
	}
	return nil
}

// samplesPerAge bounds what is remembered to tell how old a revision is.
const samplesPerAge = 256

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
	if n := len(h.samples); n == 0 || now.Sub(h.samples[n-1].at) >= h.keep.Age/samplesPerAge {
		h.samples = append(h.samples, sample{now, revision})
	}
	aged := int64(0) // newest revision that is older than Age
	for len(h.samples) > 0 && now.Sub(h.samples[0].at) >= h.keep.Age {
		aged = h.samples[0].revision
		if len(h.samples) > 1 && now.Sub(h.samples[1].at) < h.keep.Age {
			break
		}
		h.samples = h.samples[1:]
	}
	to := max(min(revision-h.keep.Revisions, aged), revision-h.keep.MaxRevisions)
	if to < 1 || to <= compacted || to-compacted < h.keep.Revisions/2 {
		return 0, false
	}
	return to, true
}
