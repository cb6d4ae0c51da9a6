package raftstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"
)

// shutdownPatience bounds each step of an orderly stop.
const shutdownPatience = 5 * time.Second

// Run takes part in the cluster until ctx ends, the store is closed or the replica
// cannot go on; it returns nil only for the first. When leadership is gained it
// waits until everything before is applied, writes the next epoch, gives every
// lease its whole time and then calls lead, whose ctx ends with the leadership. It
// waits for lead to return. An orderly stop hands leadership over first.
func (s *Store) Run(ctx context.Context, lead func(ctx context.Context, epoch int64) error) error {
	if err := s.startRaft(); err != nil {
		s.end()
		return errors.Join(err, s.disk.close())
	}
	close(s.started)
	s.link.silent.Store(s.dog.isStalled())
	observer := raft.NewObserver(make(chan raft.Observation), false, func(o *raft.Observation) bool {
		if _, ok := o.Data.(raft.LeaderObservation); ok {
			s.metrics.leaderChanges.Inc()
			s.leaderChanged.fire()
		}
		return false
	})
	s.raft.RegisterObserver(observer)
	defer s.raft.DeregisterObserver(observer)
	s.leaderChanged.fire()

	// Proposals are served until leadership has been handed over, so the workers
	// end later than the leader.
	workers, stopWorkers := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWorkers()
	var g errgroup.Group
	g.Go(func() error { s.dispatch(workers); return nil })
	g.Go(func() error { s.snapshotWhenLarge(workers); return nil })
	if mark := s.disk.mark; mark != nil {
		g.Go(func() error {
			mark.run(workers, func(err error) { s.log.Warn("the watermark of the log was not written", "error", err) })
			return nil
		})
	}
	completed := make(chan struct{})
	go func() {
		defer close(completed)
		s.complete()
	}()

	err := s.followLeadership(ctx, lead)

	s.end()
	stopWorkers()
	return errors.Join(err, g.Wait(), s.stopRaft(completed))
}

func (s *Store) startRaft() error {
	t, err := s.transport()
	if err != nil {
		return err
	}
	s.link = newLink(t, s.cfg.ID, s.cfg.Address)
	s.link.leads = func(id raft.ServerID, term uint64) bool {
		if !s.isStarted() {
			return false
		}
		_, member := find(s.servers(), string(id))
		return member && s.raft.State() == raft.Leader && s.raft.CurrentTerm() == term
	}
	s.link.durable = s.logs.awaitDurable
	s.machine.committed = s.announce
	if err := s.logs.open(); err != nil {
		return errors.Join(err, s.link.Close())
	}
	if s.raft, err = s.newRaft(); err != nil {
		return errors.Join(err, s.link.Close())
	}
	return nil
}

// newRaft restores the newest snapshot that can be read and goes through the log
// behind it. Raft panics where an entry cannot be read: it is damaged, or a
// snapshot is and the log does not reach back to the one before.
func (s *Store) newRaft() (r *raft.Raft, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("raftstore: what is stored in %s is damaged (%v): empty the directory and join again", s.cfg.Dir, cause)
		}
	}()
	r, err = raft.NewRaft(s.cfg.raft(), s.machine, s.logs, stableStore{s.disk.stable, s.dog}, s.disk.snaps, s.link)
	if err != nil {
		return nil, fmt.Errorf("raftstore: start: %w", err)
	}
	return r, nil
}

func (s *Store) transport() (transport, error) {
	if s.cfg.transport != nil {
		return s.cfg.transport()
	}
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:          s.cfg.Stream,
		MaxPool:         4,
		MaxRPCsInFlight: 1,
		// Also for an append of 16 MiB to a follower far away.
		Timeout:                 2 * s.cfg.Timing.Peer,
		Logger:                  newLogger(s.log),
		MsgpackUseNewTimeFormat: true,
	}), nil
}

// stopRaft ends in order: raft answers what it was given, then stops, then the
// connections and files are closed. With a disk that does not answer it gives up
// after a while.
func (s *Store) stopRaft(completed <-chan struct{}) error {
	close(s.flights)
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.awaitOr(completed, shutdownPatience)
		stopped := s.raft.Shutdown().Error()
		s.logs.close()
		s.machine.abandon()
		s.work.wait()
		s.unregister()
		err = errors.Join(stopped, s.disk.close())
	}()
	if !s.awaitOr(done, 2*shutdownPatience) {
		return fmt.Errorf("raftstore: raft did not stop within %s: its disk does not answer", 2*shutdownPatience)
	}
	if err != nil {
		return fmt.Errorf("raftstore: stop: %w", err)
	}
	return nil
}

// awaitOr reports whether the channel was closed in time.
func (s *Store) awaitOr(done <-chan struct{}, patience time.Duration) bool {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}

// snapshotWhenLarge takes snapshots by size: raft counts entries, and ours are
// batches.
func (s *Store) snapshotWhenLarge(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.logs.snapshot:
		}
		if err := s.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
			s.log.Warn("snapshot failed", "error", err)
		}
	}
}

// Snapshot writes the state to disk now, and drops the log that led to it but for
// Retention.TrailingEntries. When ctx ends first it goes on all the same.
func (s *Store) Snapshot(ctx context.Context) error {
	if err := s.awaitStart(ctx); err != nil {
		return err
	}
	if err := await(ctx, s.raft.Snapshot()); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return fmt.Errorf("raftstore: snapshot: %w", err)
	}
	return nil
}

// stalled is called by the watchdog.
func (s *Store) stalled(stalled bool) {
	s.metrics.stalls.Set(b2f(stalled))
	if s.isStarted() {
		s.link.silent.Store(stalled)
	}
	if stalled {
		s.log.Error("the disk does not answer: giving leadership up", "after", s.cfg.Timing.DiskStall, "dir", s.cfg.Dir)
	} else {
		s.log.Warn("the disk answers again", "dir", s.cfg.Dir)
	}
	select {
	case s.stallChanged <- struct{}{}:
	default:
	}
	s.leaderChanged.fire()
}

func b2f(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
