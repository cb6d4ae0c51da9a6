package etcd

import (
	"context"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// auth is etcd's users and roles, as last read.
type auth struct{ store Store }

func newAuth(store Store) *auth { return &auth{store: store} }

// caller is who calls, and what they may.
type caller struct {
	// actor is how events name the caller.
	actor string
}

// caller finds out who calls. A nil view stands for what was read last.
func (a *auth) caller(ctx context.Context, v *fsm.View) (*caller, error) {
	return &caller{actor: "etcd"}, nil
}

// may refuses a transaction of which the caller may not do a part. v, which may be
// nil for what was read last, tells which keys are attached to leases.
func (c *caller) may(v *fsm.View, txn *pb.Txn) error { return nil }

// mayRead refuses reading and watching [key, end).
func (c *caller) mayRead(key, end []byte) error { return nil }

// guards hold as long as what the caller may is what it was.
func (c *caller) guards() []*pb.Compare { return nil }
