package raftstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Propose carries a transaction out, through whichever replica leads, and returns
// when it has been applied here, so that View shows it. A refusal is a *fsm.Error.
// After ErrNoLeader nothing was changed; after ErrOutcomeUnknown, ErrClosed or the
// error of ctx that is not known. The transaction must not be changed any more.
func (s *Store) Propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error) {
	if err := fsm.ValidateTxn(txn); err != nil {
		return nil, err
	}
	return s.submitOne(ctx, newCall(ctx, txn))
}

// ProposeAsLeader carries a transaction out only if this replica still leads in the
// epoch at the moment when it is applied; otherwise it fails with ErrNotLeader.
// After that error nothing was changed, unless it says that the outcome is unknown.
func (s *Store) ProposeAsLeader(ctx context.Context, epoch int64, txn *pb.Txn) (*pb.TxnResponse, error) {
	if err := fsm.ValidateTxn(txn); err != nil {
		return nil, err
	}
	l := s.reigning()
	if l == nil || l.epoch != epoch {
		return nil, ErrNotLeader
	}
	c := newCall(ctx, fence(l.guard, txn))
	c.here = true
	r, err := s.submitOne(ctx, c)
	switch {
	case err != nil:
		return nil, err
	case len(txn.Compare) == 0:
		if !r.Succeeded {
			return nil, ErrNotLeader
		}
		return r, nil
	}
	if !r.Succeeded {
		return nil, ErrNotLeader
	}
	inner := r.Responses[0].GetResponseTxn()
	return &pb.TxnResponse{Revision: r.Revision, Succeeded: inner.GetSucceeded(), Responses: inner.GetResponses()}, nil
}

// fence adds the compare of the epoch. Where the transaction compares something
// itself it is wrapped, so that a failed compare tells which of the two it was.
func fence(guard *pb.Compare, txn *pb.Txn) *pb.Txn {
	if len(txn.Compare) == 0 {
		return &pb.Txn{Compare: []*pb.Compare{guard}, Success: txn.Success, RequestId: txn.RequestId}
	}
	return &pb.Txn{
		Compare: []*pb.Compare{guard},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.Txn{
			Compare: txn.Compare, Success: txn.Success, Failure: txn.Failure,
		}}}},
		RequestId: txn.RequestId,
	}
}

// submitOne is submit for a single transaction.
func (s *Store) submitOne(ctx context.Context, c *call) (*pb.TxnResponse, error) {
	o, err := s.submit(ctx, c)
	if err != nil {
		var not *notProposed
		if c.here && errors.As(err, &not) {
			return nil, ErrNotLeader
		}
		return nil, err
	}
	r := o.results[0]
	if r.Error != pb.TxnError_TXN_ERROR_NONE {
		return nil, &fsm.Error{Code: r.Error, Message: r.Message}
	}
	if r.Partial {
		return nil, fmt.Errorf("%w: it was carried out, but its answer was lost", ErrOutcomeUnknown)
	}
	return r.Response, nil
}

// submit queues a call and waits for its outcome.
func (s *Store) submit(ctx context.Context, c *call) (outcome, error) {
	if err := ctx.Err(); err != nil {
		return outcome{}, err
	}
	// Encoding is work for the many callers; the dispatcher is one.
	if s.isStarted() && s.leads() {
		if err := c.encode(); err != nil {
			return outcome{}, err
		}
	}
	s.metrics.proposals.Add(float64(len(c.txns)))
	s.queue.push(c)
	select {
	case o := <-c.done:
		return o, o.err
	case <-ctx.Done():
		return outcome{}, ctx.Err()
	}
}

// lost takes the calls of a batch back that was not applied, or of which that is
// not known. What can be repeated is queued again.
func (s *Store) lost(b *batch, err error) {
	var again []*call
	for _, c := range b.calls {
		if s.repeatable(c, err) {
			again = append(again, c)
			continue
		}
		c.fail(s.reason(c, err))
	}
	s.requeue(again)
}

// reason is what the caller is told.
func (s *Store) reason(c *call, err error) error {
	var not *notProposed
	switch {
	case !errors.As(err, &not) || c.here:
		return err
	case c.sent:
		return ErrOutcomeUnknown
	default:
		return fmt.Errorf("%w for %s", ErrNoLeader, s.cfg.Timing.NoLeader)
	}
}

// repeatWindow is how much of the fsm's memory of request ids may have been used
// between the first sending of a transaction and a repetition, in the unit of
// machine.remembered: a fraction, since the leader is ahead of what was applied here.
const repeatWindow = fsm.MaxRequests / 8

// repeatable reports whether a call may be proposed again after the error.
func (s *Store) repeatable(c *call, err error) bool {
	var not *notProposed
	proposed := !errors.As(err, &not)
	switch {
	case c.here, c.ctx.Err() != nil, time.Since(c.since) > s.cfg.Timing.NoLeader:
		return false
	case proposed && !c.hasIDs():
		return false
	case c.sent && s.machine.remembered.Load()-c.remembered > repeatWindow:
		return false
	case errors.Is(err, ErrClosed), s.machine.haltCause() != nil:
		return false
	}
	return true
}

// requeue proposes the calls again, once there may be another leader.
func (s *Store) requeue(calls []*call) {
	if len(calls) == 0 {
		return
	}
	s.metrics.retries.Add(float64(len(calls)))
	changed := s.leaderChanged.next()
	again := func() {
		timer := time.NewTimer(retryPause)
		defer timer.Stop()
		select {
		case <-changed:
		case <-timer.C:
		case <-s.ended:
		}
		s.queue.push(calls...)
	}
	if !s.spawn(again) {
		s.queue.push(calls...) // it is closed and fails them
	}
}

// requestID is unique among all replicas and starts.
func (s *Store) requestID() []byte {
	b := make([]byte, 0, 16)
	b = binary.BigEndian.AppendUint64(b, s.session)
	return binary.BigEndian.AppendUint64(b, s.seq.Add(1))
}
