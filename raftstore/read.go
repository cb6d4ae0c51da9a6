package raftstore

import (
	"context"
	"runtime"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// reads shares one question to the cluster among all readers who ask at the same
// time. Who comes while a question is under way waits for the next: its answer
// might be older than a write that the reader already knows of.
type reads struct {
	mu      sync.Mutex
	waiting []chan<- readIndex
	running bool
}

type readIndex struct {
	index uint64
	err   error
}

// Linearizable returns a view that shows everything that was acknowledged anywhere
// before the call.
func (s *Store) Linearizable(ctx context.Context) (*fsm.View, error) {
	index, err := s.sharedReadIndex(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.machine.wait(ctx, index); err != nil {
		return nil, err
	}
	s.metrics.reads.Inc()
	return s.View(), nil
}

// sharedReadIndex is readIndex, asked once for all who wait.
func (s *Store) sharedReadIndex(ctx context.Context) (uint64, error) {
	if err := s.awaitStart(ctx); err != nil {
		return 0, err
	}
	answer := make(chan readIndex, 1)
	r := &s.reads
	r.mu.Lock()
	if !r.running {
		if !s.spawn(s.answerReads) {
			r.mu.Unlock()
			return 0, s.closedError()
		}
		r.running = true
	}
	r.waiting = append(r.waiting, answer)
	r.mu.Unlock()
	select {
	case a := <-answer:
		return a.index, a.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// answerReads runs as long as somebody waits.
func (s *Store) answerReads() {
	for {
		s.reads.gather()
		s.reads.mu.Lock()
		waiting := s.reads.waiting
		s.reads.waiting = nil
		if len(waiting) == 0 {
			s.reads.running = false
			s.reads.mu.Unlock()
			return
		}
		s.reads.mu.Unlock()

		s.metrics.readRounds.Inc()
		var a readIndex
		a.index, a.err = s.readIndex(context.Background())
		for _, w := range waiting {
			w <- a
		}
	}
}

// gather lets go of the processor for as long as readers come by that: those of the
// round before have just been woken and are about to ask again.
func (r *reads) gather() {
	for n := -1; ; {
		r.mu.Lock()
		now := len(r.waiting)
		r.mu.Unlock()
		if now == n {
			return
		}
		n = now
		runtime.Gosched()
	}
}

// readIndex returns the index up to which must be applied what is read now.
func (s *Store) readIndex(ctx context.Context) (uint64, error) {
	return onLeader(s, ctx, s.confirmedCommit, func(ctx context.Context, c pb.ConsensusClient) (uint64, error) {
		r, err := c.ReadIndex(ctx, &pb.ReadIndexRequest{MemberId: s.cfg.ID, Term: s.raft.CurrentTerm()})
		return r.GetIndex(), err
	})
}

// confirmedCommit is the commit index, and this replica led at a time after it was
// read. Since the takeover wrote an entry that was applied, every entry up to it is
// one that machine counts, but for barriers, which only a takeover makes.
func (s *Store) confirmedCommit(ctx context.Context, l *leadership) (uint64, error) {
	commit := s.raft.CommitIndex()
	if err := s.confirm(ctx, l, time.Now()); err != nil {
		return 0, err
	}
	return commit, nil
}

// announce has the followers apply, and their watchers and callers see, what is
// committed at the same time as this replica, if it leads.
func (s *Store) announce(index uint64) {
	if s.isStarted() && s.leads() {
		s.link.spread(s.servers(), index)
	}
}

// confirmedBy reports whether a question from another replica confirms by itself that
// this one leads. The caller was in the leader's term after the reads were asked for,
// and this server is still: neither had voted for a newer leader by then. If the two
// are a majority there was none, and nothing that the reads must show is missing here.
func (s *Store) confirmedBy(l *leadership, req *pb.ReadIndexRequest) bool {
	confirmed, voters := 0, 0
	for _, server := range s.servers() {
		if server.Suffrage != raft.Voter {
			continue
		}
		voters++
		if id := string(server.ID); id == s.cfg.ID || id == req.MemberId {
			confirmed++
		}
	}
	return req.Term == l.term && confirmed > voters/2 && confirmed == 2
}

// confirm returns when a majority of the voters has followed this leader in
// messages that were sent after since.
func (s *Store) confirm(ctx context.Context, l *leadership, since time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timing.Peer)
	defer cancel()
	for {
		followed := s.link.followed.next()
		servers := s.servers()
		if n, voters := s.link.followedSince(servers, l.term, since); n > voters/2 {
			return nil
		}
		s.link.beat(servers, l.term, since)
		// A heartbeat may fail: it is sent again after a while.
		again := time.NewTimer(s.cfg.Timing.Heartbeat / 2)
		select {
		case <-followed:
		case <-again.C:
		case <-l.ctx.Done():
			again.Stop()
			return ErrNotLeader
		case <-ctx.Done():
			again.Stop()
			return ctx.Err()
		}
		again.Stop()
	}
}

// leadsFor makes sure that this replica leads: it is enough that a majority
// followed within the last Timing.LeaderLease, since none of those votes for
// another one before Timing.Heartbeat is over; unless this one has told them to.
func (s *Store) leadsFor(ctx context.Context, l *leadership, now time.Time) error {
	since := now.Add(-s.cfg.Timing.LeaderLease)
	if n, voters := s.link.followedSince(s.servers(), l.term, since); n > voters/2 && s.offeredIn.Load() != l.term {
		return nil
	}
	return s.confirm(ctx, l, now)
}
