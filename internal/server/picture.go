package server

import (
	"context"
	"time"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/scheduler"
)

// picture is the scheduler's picture, kept warm on every replica so that a new
// leader decides at once.
type picture struct {
	progress
	current *scheduler.Picture
	// Moved of each picture.
	tell func(node, workload string, replica int32, gone int64)
}

func newPicture() *picture {
	return &picture{progress: newProgress(), current: scheduler.NewPicture()}
}

func (p *picture) reset(v *fsm.View) error {
	fresh, err := scheduler.Build(v.Scan(""), v.Revision())
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.current, fresh.Moved = fresh, p.tell
	p.advance(v.Revision())
	return nil
}

func (p *picture) apply(events []*pb.KeyEvent, revision int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.current.Apply(events, revision); err != nil {
		return err
	}
	p.advance(revision)
	return nil
}

// decide makes a plan, keeps at most so many steps of it, and takes them as
// done. moved is closed when the picture changes after it.
func (p *picture) decide(now time.Time, options scheduler.Options, steps int) (*scheduler.Plan, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	plan := scheduler.Decide(p.current, now, options)
	if len(plan.Steps) > steps {
		plan.Steps, plan.More = plan.Steps[:steps], true
	}
	for _, s := range plan.Steps {
		p.current.Assume(s)
	}
	return plan, p.moved
}

// confirm ends the assumption of a step that was committed at revision.
func (p *picture) confirm(s scheduler.Step, revision int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.current.Confirm(s, revision)
}

// rollback ends the assumption of a step that was not.
func (p *picture) rollback(s scheduler.Step) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.current.Rollback(s)
}

// explain says why a workload is as it is.
func (p *picture) explain(id string) (*pb.Explanation, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current.Explain(id)
}

// recordedOn is what is recorded of a node, at a revision or later.
func (p *picture) recordedOn(ctx context.Context, node string, revision int64) ([]*pb.ReplicaKey, error) {
	if err := p.reached(ctx, revision); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current.RecordedOn(node), nil
}
