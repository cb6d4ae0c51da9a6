package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// applying bounds how many instances of one runtime are created and started
	// at once. Fetching images and waiting for work to stop are not bounded by
	// it, so a slow one never holds up another.
	applying = 16

	prepareTimeout = 30 * time.Minute
	applyTimeout   = 2 * time.Minute
	// removeTimeout is beside the grace.
	removeTimeout = time.Minute
)

// executor carries actions out.
type executor struct {
	runtimes map[pb.WorkloadType]Runtime
	slots    map[pb.WorkloadType]chan struct{}
	policy   Policy
	metrics  *metrics
	// What exclusive work is started under.
	lease *nodeLease
	guard *guard
	dir   string
}

func newExecutor(a *Agent, policy Policy) *executor {
	e := &executor{
		runtimes: a.runtimes, slots: map[pb.WorkloadType]chan struct{}{}, policy: policy, metrics: a.metrics,
		lease: a.lease, guard: a.guard, dir: a.cfg.DataDir,
	}
	for t := range e.runtimes {
		e.slots[t] = make(chan struct{}, applying)
	}
	return e
}

// outcome is what became of an action.
type outcome struct {
	action action
	// removed and stopped are IDs of instances for which that is certain.
	removed []string
	stopped []string
	// started is the instance that runs now; nil where none was started.
	started *Instance
	err     error
	ended   time.Time
}

// run carries one action out. It returns when that is done or ctx ends.
func (e *executor) run(ctx context.Context, act action) outcome {
	began := time.Now()
	out := outcome{action: act}
	switch act.verb {
	case start:
		out.err = e.start(ctx, act, &out)
		e.metrics.took(act.item.GetAssignment().GetType(), start, time.Since(began))
	case stop:
		out.err = e.each(ctx, act, stop, &out)
	case remove:
		out.err = e.each(ctx, act, remove, &out)
	}
	out.ended = time.Now()
	return out
}

func (e *executor) start(ctx context.Context, act action, out *outcome) error {
	kind := act.item.GetAssignment().GetType()
	work := Work{Item: act.item, Policy: e.policy}
	if p, ok := e.runtimes[kind].(Preparer); ok {
		ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
		err := p.Prepare(ctx, work)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: prepare: %w", act.key, err)
		}
	}
	if err := e.each(ctx, act, remove, out); err != nil {
		return err
	}
	select {
	case e.slots[kind] <- struct{}{}:
		defer func() { <-e.slots[kind] }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := uncut(ctx)
	defer cancel()
	if act.item.GetAssignment().GetExclusive() {
		if err := e.secure(); err != nil {
			return fmt.Errorf("%s: %w", act.key, err)
		}
	}
	in, err := e.runtimes[kind].Apply(ctx, work)
	if err != nil {
		return fmt.Errorf("%s: apply: %w", act.key, err)
	}
	out.started = &in
	return nil
}

// uncut is for telling a runtime to make something: that it is not wanted any
// more does not end it. A runtime may make what it was asked for long after the
// call was given up, and nobody would look for it.
func uncut(ctx context.Context) (context.Context, context.CancelFunc) {
	apply, cancel := context.WithTimeout(context.WithoutCancel(ctx), applyTimeout)
	stop := context.AfterFunc(ctx, func() {
		if !errors.Is(context.Cause(ctx), errUnwanted) {
			cancel()
		}
	})
	return apply, func() { stop(); cancel() }
}

// secure makes sure that what is exclusive ends with the lease, whatever becomes
// of the agent, before it is started.
func (e *executor) secure() error {
	if err := errors.Join(e.guard.stand(), e.lease.save(e.dir, time.Now())); err != nil {
		return &Error{Code: pb.ReasonCode_RUNTIME_ERROR, Retryable: true, Err: fmt.Errorf("exclusive work can't be guarded: %w", err)}
	}
	if !e.lease.end().After(time.Now()) {
		return context.Canceled // it ended while this was prepared: the same as being told
	}
	return nil
}

// each stops or removes the action's instances, one after another.
func (e *executor) each(ctx context.Context, act action, v verb, out *outcome) error {
	var errs []error
	for _, in := range act.instances {
		grace := in.Grace
		if act.grace > 0 {
			grace = min(grace, act.grace)
		}
		began := time.Now()
		ctx, cancel := context.WithTimeout(ctx, grace+removeTimeout)
		var err error
		if v == stop {
			err = e.runtimes[in.Type].Stop(ctx, in, grace)
		} else {
			err = e.runtimes[in.Type].Remove(ctx, in, grace)
		}
		cancel()
		e.metrics.took(in.Type, v, time.Since(began))
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %s %s: %w", act.key, v, in.ID, err))
		case v == stop:
			out.stopped = append(out.stopped, in.ID)
		default:
			out.removed = append(out.removed, in.ID)
		}
	}
	return errors.Join(errs...)
}
