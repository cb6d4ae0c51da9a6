package raftstore

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// entriesInFlight of this replica are with raft at once: one that is written
	// here while another is written by the followers. More makes batches smaller,
	// and with them more syncs for the same work.
	entriesInFlight = 2
	// forwardsInFlight batches are on their way to the leader at once.
	forwardsInFlight = 2
	// retryPause is waited before a call is proposed again, unless the leader
	// changes earlier.
	retryPause = 20 * time.Millisecond
)

// flight is a batch that raft has.
type flight struct {
	future raft.ApplyFuture
	batch  *batch
}

// route is where calls go at the moment.
type route struct {
	here    bool
	address string // of the leader; empty when none is known, or here
}

// leads reports whether raft accepts proposals here.
func (s *Store) leads() bool { return s.raft.State() == raft.Leader && !s.link.silent.Load() }

func (s *Store) route() route {
	if s.leads() {
		return route{here: true}
	}
	if id, address, ok := s.Leader(); ok && id != s.cfg.ID {
		return route{address: address}
	}
	return route{}
}

// dispatch takes what has queued up and proposes it, here or through the leader.
// Nothing is waited for: a batch is what has come while there was no slot.
func (s *Store) dispatch(ctx context.Context) {
	for {
		if s.queue.empty() {
			select {
			case <-ctx.Done():
				return
			case <-s.queue.wake:
			}
			continue
		}
		changed := s.leaderChanged.next()
		r := s.route()
		switch {
		case r.here:
			// Who is told by changed that this replica leads no more must not wait for
			// slots that a hanging disk holds.
			select {
			case s.entrySlots <- struct{}{}:
				s.queue.gather()
				s.proposeBatch()
			case <-changed:
			case <-ctx.Done():
				return
			}
		case r.address != "":
			s.refuse(func(c *call) bool { return c.here })
			if s.queue.empty() {
				continue
			}
			select {
			case s.forwardSlots <- struct{}{}:
				s.queue.gather()
				s.forwardBatch(ctx, r.address)
			case <-changed:
			case <-ctx.Done():
				return
			}
		default:
			s.refuse(func(c *call) bool { return c.here || time.Since(c.since) > s.cfg.Timing.NoLeader })
			timer := time.NewTimer(retryPause)
			select {
			case <-ctx.Done():
			case <-changed:
			case <-timer.C:
			}
			timer.Stop()
			if ctx.Err() != nil {
				return
			}
		}
	}
}

// refuse fails the queued calls that satisfy the condition: there is no leader for
// them.
func (s *Store) refuse(cond func(*call) bool) {
	for _, c := range s.queue.remove(cond) {
		c.fail(s.reason(c, &notProposed{ErrNotLeader}))
	}
}

// neededByFollowers reports whether no entry of these is committed before a follower
// has answered that it has it. Changes of membership are not among them: what they
// make of the majority is not known here. Raft calls it when it stores entries.
func (s *Store) neededByFollowers(logs []*raft.Log) bool {
	for _, l := range logs {
		if l.Type != raft.LogCommand {
			return false
		}
	}
	return s.isStarted() && s.raft.State() == raft.Leader && s.voters() > 1
}

// proposeBatch makes one log entry of what waits. The caller has taken a slot,
// which is given back when raft has answered.
func (s *Store) proposeBatch() {
	b := &batch{tag: tag{s.session, s.seq.Add(1)}}
	size, txns := 0, 0
	for _, c := range s.queue.take(maxEntryTxns, maxEntryBytes) {
		if err := c.encode(); err != nil {
			c.fail(err)
			continue
		}
		b.calls = append(b.calls, c)
		size += len(c.encoded)
		txns += len(c.txns)
	}
	if len(b.calls) == 0 {
		<-s.entrySlots
		return
	}
	data := entryHeader(time.Now().UnixNano(), size)
	for _, c := range b.calls {
		data = append(data, c.encoded...)
	}
	s.metrics.batchTxns.Observe(float64(txns))
	s.metrics.batchBytes.Observe(float64(len(data)))
	s.machine.expect(b)
	// Raft's queue has room for more entries than there are slots.
	s.flights <- flight{s.raft.ApplyLog(raft.Log{Data: data, Extensions: b.tag.seal(data)}, 0), b}
}

// complete routes raft's answers, in the order of the entries. It ends when no
// entry is in flight and none will come.
func (s *Store) complete() {
	for f := range s.flights {
		err := f.future.Error()
		var index uint64
		// The future of an entry that never reached raft's queue has no index.
		if !errors.Is(err, raft.ErrRaftShutdown) {
			index = f.future.Index()
		}
		<-s.entrySlots
		s.machine.settle(f.batch, index, err)
	}
}

// forwardBatch sends what waits to the leader. The caller has taken a slot, which
// is given back when the leader has answered.
func (s *Store) forwardBatch(ctx context.Context, address string) {
	calls := s.queue.take(maxEntryTxns, maxEntryBytes)
	if len(calls) == 0 {
		<-s.forwardSlots
		return
	}
	req := &pb.ProposeRequest{}
	for _, c := range calls {
		s.identify(c)
		req.Txns = append(req.Txns, c.txns...)
	}
	s.metrics.forwarded.Add(float64(len(req.Txns)))
	s.spawn(func() {
		resp, err := s.forward(ctx, address, req)
		<-s.forwardSlots
		if err == nil {
			err = s.machine.wait(ctx, resp.Index)
			if err != nil && ctx.Err() != nil {
				err = ErrClosed
			}
		}
		b := &batch{calls: calls}
		if err != nil {
			s.lost(b, err)
			return
		}
		b.results, b.index = resp.Results, resp.Index
		b.deliver()
	})
}

// identify gives each transaction of a call a request id, so that the call can be
// sent again. The caller's transaction stays as it is.
func (s *Store) identify(c *call) {
	if c.sent {
		return
	}
	c.sent, c.remembered = true, s.machine.remembered.Load()
	for i, t := range c.txns {
		if len(t.RequestId) == 0 {
			c.txns[i] = &pb.Txn{Compare: t.Compare, Success: t.Success, Failure: t.Failure, RequestId: s.requestID()}
		}
	}
	c.encoded = nil
	c.size = 0
	for _, t := range c.txns {
		c.size += proto.Size(t)
	}
}
