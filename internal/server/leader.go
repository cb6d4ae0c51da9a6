package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
	"github.com/persys-dev/persys/scheduler"
)

const (
	// Steps that are proposed and not yet committed, at most.
	planSteps = 256
	// Placements decided in one plan, so that the first ones are committed while
	// the next are decided.
	planPlacements = 2000
	// A decision that took longer is followed by as long a rest, at most so long:
	// what changes meanwhile, the status of thousands of replicas perhaps, is
	// looked at together.
	restAfter, restMost = time.Millisecond, 50 * time.Millisecond

	malformedPause = 5 * time.Second

	// The newest keepEvents events are kept; they are trimmed when there are
	// trimSlack more.
	keepEvents = 5000
	trimSlack  = 500
	trimEvery  = 15 * time.Second
)

// lead is everything that only the leader does. Its context ends with the
// leadership; what it proposed late is refused by its epoch.
func (r *replica) lead(ctx context.Context, epoch int64) error {
	l := newLeading(r.store, r.picture, epoch, r.config.LeaseTTL)
	if err := r.found(ctx, l); err != nil {
		return err
	}
	r.leading.Store(l)
	defer r.leading.Store(nil)

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return r.schedule(ctx, l) })
	group.Go(func() error { return r.promote(ctx) })
	group.Go(func() error { return r.trim(ctx, l) })
	return group.Wait()
}

// found writes what the first leader of a cluster finds missing: the cluster's
// record and its own as a member.
func (r *replica) found(ctx context.Context, l *leading) error {
	return l.propose(ctx, func(v *fsm.View) (*pb.Txn, error) {
		txn := &pb.Txn{}
		if _, ok := v.Get(model.ClusterKey); !ok {
			txn.Compare = append(txn.Compare, model.Missing(model.ClusterKey))
			txn.Success = append(txn.Success, model.Put(model.ClusterKey, &pb.ClusterInfo{Id: r.id.ClusterID, CreateTime: timestamppb.Now()}, 0))
		}
		key := model.MemberKey(r.memberID)
		if _, ok := v.Get(key); !ok {
			own := r.member()
			own.JoinTime = timestamppb.Now()
			txn.Compare = append(txn.Compare, model.Missing(key))
			txn.Success = append(txn.Success, model.Put(key, own, 0))
		}
		if len(txn.Success) == 0 {
			return nil, nil
		}
		return txn, nil
	})
}

// schedule decides where work runs, whenever something has changed or a
// decision falls due. The picture takes each step of a plan as done and the
// next plan is decided while it is committed; a step that was refused, because
// something had changed, is taken back and decided anew.
func (r *replica) schedule(ctx context.Context, l *leading) error {
	options := scheduler.Options{Epoch: l.epoch, MaxPlacements: planPlacements, Lease: r.config.LeaseTTL}
	outcomes := make(chan outcome, planSteps)
	pending := 0
	defer func() {
		// Whatever became of them, the events will tell.
		for ; pending > 0; pending-- {
			r.picture.rollback((<-outcomes).step)
		}
	}()
	var rest <-chan time.Time
	for {
		var due <-chan time.Time
		var moved <-chan struct{}
		if rest == nil && pending < planSteps/2 {
			started := time.Now()
			var plan *scheduler.Plan
			plan, moved = r.picture.decide(started, options, planSteps-pending)
			if len(plan.Steps) > 0 {
				r.metrics.decided(len(plan.Steps), time.Since(started))
			}
			for _, step := range plan.Steps {
				pending++
				go func() { outcomes <- r.carryOut(ctx, l, step) }()
			}
			if plan.More && len(plan.Steps) > 0 {
				continue
			}
			if took := time.Since(started); took > restAfter {
				rest, moved = time.After(min(took, restMost)), nil
			}
			if !plan.Wake.IsZero() {
				due = time.After(max(time.Until(plan.Wake), time.Millisecond))
			}
		}
		select {
		case o := <-outcomes:
			pending--
			if err := r.settle(ctx, o); err != nil {
				return err
			}
		case <-moved:
		case <-due:
		case <-rest:
			rest = nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// outcome is what became of a step.
type outcome struct {
	step     scheduler.Step
	response *pb.TxnResponse
	err      error
}

func (r *replica) carryOut(ctx context.Context, l *leading, step scheduler.Step) outcome {
	response, err := r.store.ProposeAsLeader(ctx, l.epoch, step.Txn)
	return outcome{step, response, err}
}

func (r *replica) settle(ctx context.Context, o outcome) error {
	var malformed *fsm.Error
	switch {
	case errors.As(o.err, &malformed):
		// Giving up the leadership would not help: the next leader decides the same.
		r.log.Error("a decision can't be carried out; scheduling pauses", "step", o.step.Summary, "error", o.err)
		r.picture.rollback(o.step)
		select {
		case <-time.After(malformedPause):
		case <-ctx.Done():
		}
	case o.err != nil:
		r.picture.rollback(o.step)
		return fmt.Errorf("plan step %q: %w", o.step.Summary, o.err)
	case !o.response.Succeeded:
		r.metrics.planConflicts.Inc()
		r.log.Debug("plan step refused, something changed meanwhile", "step", o.step.Summary)
		r.picture.rollback(o.step)
	default:
		r.log.Debug("plan step", "step", o.step.Summary)
		r.picture.confirm(o.step, o.response.Revision)
	}
	return nil
}

// trim keeps the events bounded and forgets tokens that have expired.
func (r *replica) trim(ctx context.Context, l *leading) error {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		err := l.propose(ctx, func(v *fsm.View) (*pb.Txn, error) { return trimTxn(v, time.Now()) })
		if errors.Is(err, raftstore.ErrNotLeader) {
			return err
		}
		if err != nil {
			r.log.Warn("trimming failed", "error", err)
		}
	}
}

func trimTxn(v *fsm.View, now time.Time) (*pb.Txn, error) {
	txn := &pb.Txn{}
	events := &pb.RangeRequest{Key: []byte(model.EventsPrefix), RangeEnd: model.PrefixEnd(model.EventsPrefix), KeysOnly: true, CountOnly: true}
	counted, err := v.Range(events)
	if err != nil {
		return nil, err
	}
	if excess := counted.Count - keepEvents; excess > trimSlack {
		events.CountOnly, events.Limit = false, excess+1
		oldest, err := v.Range(events)
		if err != nil {
			return nil, err
		}
		txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{
			Key: []byte(model.EventsPrefix), RangeEnd: oldest.Kvs[len(oldest.Kvs)-1].Key,
		}}})
	}
	for kv := range v.Scan(model.TokensPrefix) {
		t := &pb.Token{}
		if err := model.Parse(kv, t); err != nil {
			return nil, err
		}
		if now.After(t.ExpireTime.AsTime().Add(24 * time.Hour)) {
			txn.Success = append(txn.Success, model.Delete(string(kv.Key)))
		}
	}
	if len(txn.Success) == 0 {
		return nil, nil
	}
	return txn, nil
}
