package server

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
)

// progress is how far something that follows the keyspace has come. mu guards
// that something, too.
type progress struct {
	mu       sync.Mutex
	revision int64
	moved    chan struct{} // closed when revision grows
}

func newProgress() progress { return progress{moved: make(chan struct{})} }

// advance is called with mu held.
func (p *progress) advance(revision int64) {
	p.revision = revision
	close(p.moved)
	p.moved = make(chan struct{})
}

// reached waits until everything up to revision has been taken in.
func (p *progress) reached(ctx context.Context, revision int64) error {
	for {
		p.mu.Lock()
		done, moved := p.revision >= revision, p.moved
		p.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// follow keeps the picture and the agents' desired sets up to date. A restored
// snapshot makes it begin again.
func (r *replica) follow(ctx context.Context) error {
	for {
		v := r.store.View()
		if err := r.picture.reset(v); err != nil {
			return fmt.Errorf("state at revision %d can't be read: %w", v.Revision(), err)
		}
		r.sessions.desired.reset(v.Revision())
		err := r.followFrom(ctx, v.Revision())
		var refused *fsm.Error
		if !errors.As(err, &refused) || refused.Code != pb.TxnError_TXN_ERROR_COMPACTED {
			return err
		}
		r.log.Info("state was replaced by a snapshot, reading it anew")
	}
}

func (r *replica) followFrom(ctx context.Context, after int64) error {
	w := r.store.Watch(raftstore.WatchRange{Key: []byte{0}, End: []byte{0}, After: after})
	for {
		events, revision, err := w.Next(ctx)
		if err != nil {
			return err
		}
		if err := r.picture.apply(events, revision); err != nil {
			return err
		}
		r.sessions.desired.advance(revision)
	}
}
