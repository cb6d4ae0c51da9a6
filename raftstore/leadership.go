package raftstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// leadership is one time in which this replica leads; it is published only after
// the takeover is complete.
type leadership struct {
	ctx   context.Context // ends with it
	term  uint64
	epoch int64
	// What the epoch key holds as long as nobody else leads.
	guard *pb.Compare
	clock *leaseClock
}

// reign is a leadership from outside: the goroutine that carries it.
type reign struct {
	term   uint64
	cancel context.CancelFunc
	done   chan struct{}
}

// followLeadership starts and ends reigns as raft says, until ctx ends or the
// replica cannot go on.
func (s *Store) followLeadership(ctx context.Context, lead func(context.Context, int64) error) error {
	var current *reign
	end := func() {
		if current != nil {
			s.leading.Store(nil)
			current.cancel()
			s.leaderChanged.fire()
			<-current.done
			current = nil
		}
	}
	defer end()
	for {
		// What raft says is looked at afresh each time: its channel tells only that
		// something has changed, and not how often.
		term, leads := s.raft.CurrentTerm(), s.raft.State() == raft.Leader && !s.link.silent.Load()
		if current != nil && (!leads || current.term != term) {
			end()
			continue
		}
		if current == nil && leads {
			current = s.beginReign(term, lead)
		}
		var over chan struct{}
		if current != nil {
			over = current.done
		}
		select {
		case <-ctx.Done():
			s.handOver()
			return nil
		case <-s.machine.halted:
			s.handOver()
			return s.machine.haltCause()
		case <-s.raft.LeaderCh():
		case <-s.stallChanged:
		case <-over:
			// It ended by itself: the takeover failed, or lead did.
			end()
			s.afterReign(ctx)
		}
	}
}

func (s *Store) beginReign(term uint64, lead func(context.Context, int64) error) *reign {
	ctx, cancel := context.WithCancel(context.Background())
	r := &reign{term: term, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		defer cancel()
		err := s.reign(ctx, term, lead)
		s.leading.Store(nil)
		s.machine.clock.Store(nil)
		s.leaderChanged.fire()
		if err != nil && ctx.Err() == nil {
			s.log.Error("leading ended with an error", "term", term, "error", err)
		}
	}()
	return r
}

// afterReign is called when a reign ended while raft still leads. Another replica
// may do better, so leadership is offered; when it stays here it begins anew.
func (s *Store) afterReign(ctx context.Context) {
	if s.raft.State() == raft.Leader {
		s.handOver()
	}
	timer := time.NewTimer(s.cfg.Timing.Election)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-s.machine.halted:
	case <-timer.C:
	}
}

// handOver gives leadership to the follower that holds most of the log, where
// there is one.
func (s *Store) handOver() {
	if s.raft.State() != raft.Leader || s.voters() < 2 {
		return
	}
	s.offer()
	future := s.raft.LeadershipTransfer()
	done := make(chan error, 1)
	go func() { done <- future.Error() }()
	timer := time.NewTimer(shutdownPatience)
	defer timer.Stop()
	select {
	case err := <-done:
		if err != nil {
			s.log.Warn("leadership was not handed over", "error", err)
		}
	case <-timer.C:
		s.log.Warn("leadership was not handed over in time")
	}
}

// offer is called before raft is told to hand leadership over.
func (s *Store) offer() { s.offeredIn.Store(s.raft.CurrentTerm()) }

// reign takes over and carries out the leader's duties until ctx ends.
func (s *Store) reign(ctx context.Context, term uint64, lead func(context.Context, int64) error) error {
	s.link.begin(term)
	if err := s.barrier(ctx); err != nil {
		return err
	}
	epoch, guard, err := s.writeEpoch(ctx)
	if err != nil {
		return err
	}
	l := &leadership{ctx: ctx, term: term, epoch: epoch, guard: guard, clock: newLeaseClock(s.log)}
	s.machine.clock.Store(l.clock)
	// As long as the one before may think that it leads still, it may keep leases
	// alive. That time comes on top, so that none of them is cut short.
	l.clock.fill(s.View, time.Now().Add(s.cfg.Timing.LeaderLease))
	s.leading.Store(l)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s.leaderChanged.fire()
	s.log.Info("leading", "term", term, "epoch", epoch)

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.clock.run(gctx) })
	g.Go(func() error { return s.expireLeases(gctx, l) })
	g.Go(func() error { return s.keepHistory(gctx, l) })
	g.Go(func() error {
		if err := lead(gctx, epoch); err != nil {
			return err
		}
		<-gctx.Done()
		return nil
	})
	return g.Wait()
}

// barrier waits until everything that was committed before is applied.
func (s *Store) barrier(ctx context.Context) error {
	for {
		future := s.raft.Barrier(0)
		done := make(chan error, 1)
		go func() { done <- future.Error() }()
		var err error
		select {
		case err = <-done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !errors.Is(err, raft.ErrLeadershipTransferInProgress) {
			return err
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

// writeEpoch makes this replica the leader for everyone who compares the epoch.
func (s *Store) writeEpoch(ctx context.Context) (int64, *pb.Compare, error) {
	key := []byte(s.cfg.EpochKey)
	for {
		var was pb.LeaderEpoch
		var revision int64
		if kv, ok := s.View().Get(s.cfg.EpochKey); ok {
			if err := proto.Unmarshal(kv.Value, &was); err != nil {
				return 0, nil, fmt.Errorf("raftstore: decode %s: %w", s.cfg.EpochKey, err)
			}
			revision = kv.ModRevision
		}
		now := &pb.LeaderEpoch{Epoch: was.Epoch + 1, MemberId: s.cfg.ID}
		value, err := proto.MarshalOptions{Deterministic: true}.Marshal(now)
		if err != nil {
			return 0, nil, fmt.Errorf("raftstore: encode %s: %w", s.cfg.EpochKey, err)
		}
		c := newCall(ctx, &pb.Txn{
			Compare: []*pb.Compare{{
				Target: pb.Compare_MOD, Key: key, TargetUnion: &pb.Compare_ModRevision{ModRevision: revision},
			}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{
				RequestPut: &pb.PutRequest{Key: key, Value: value},
			}}},
		})
		c.here = true
		r, err := s.submitOne(ctx, c)
		if err != nil {
			return 0, nil, fmt.Errorf("raftstore: write %s: %w", s.cfg.EpochKey, err)
		}
		if r.Succeeded {
			return now.Epoch, &pb.Compare{
				Target: pb.Compare_VALUE, Key: key, TargetUnion: &pb.Compare_Value{Value: value},
			}, nil
		}
	}
}

// pause waits, unless ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
