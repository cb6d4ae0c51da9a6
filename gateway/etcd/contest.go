package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What the Lock and Election services share: a queue of keys `<name>/<lease in
// hexadecimal>`, in the order in which they were created, of which the first has
// won. Whatever client writes such keys takes part.
//
// Source: client/v3/concurrency of etcd, which its own services are made of.

const (
	// sessionTTL in seconds is for contestants who bring no lease.
	sessionTTL = 60
	// settlePatience bounds how long a call whose caller has gone is carried on with, so
	// that it leaves no key behind. The key goes with its lease anyway.
	settlePatience = 10 * time.Second
)

// contest is the queue of a name.
type contest struct {
	*Server
	prefix, end []byte
}

// contest refuses a name below which are keys of the system: those were contestants.
func (s *Server) contest(name []byte) (contest, error) {
	bare := name[:len(name):len(name)]
	c := contest{s, append(bare, '/'), append(bare, '/'+1)}
	if touches(c.prefix, c.end) {
		return c, status.Errorf(codes.PermissionDenied, "%q cannot be the name of a lock or an election: below it are keys of the system", name)
	}
	return c, nil
}

// place is one in the queue.
type place struct {
	key            []byte
	lease, created int64
	// As the place was taken. Nobody else has written the key since, as long as this
	// is when it was modified.
	header *etcdpb.ResponseHeader
	// first: it had won when it was taken.
	first bool
}

// session is the lease, or a new one that nobody keeps alive.
func (s *Server) session(ctx context.Context, lease int64) (int64, error) {
	if lease != 0 {
		return lease, nil
	}
	granted, err := s.LeaseGrant(ctx, &etcdpb.LeaseGrantRequest{TTL: sessionTTL})
	return granted.GetID(), err
}

// enter takes a place with a lease, or the one that it has already, which it writes
// again: a client that tries again must not lose what it gets to the call that it
// gave up. It goes on when the caller has gone, to know what there is to take back.
func (c contest) enter(ctx context.Context, lease int64, value []byte) (*place, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settlePatience)
	defer cancel()
	lease, err := c.session(ctx, lease)
	if err != nil {
		return nil, err
	}
	p := &place{key: fmt.Appendf(c.prefix[:len(c.prefix):len(c.prefix)], "%x", lease), lease: lease}
	take := putValue(p.key, value, lease)
	take.GetRequestPut().PrevKv = true
	answer, err := c.Txn(ctx, &etcdpb.TxnRequest{Success: []*etcdpb.RequestOp{
		take, {Request: &etcdpb.RequestOp_RequestRange{RequestRange: c.winner()}},
	}})
	if err != nil {
		return nil, err
	}
	p.header, p.created = answer.Header, answer.Header.Revision
	if had := answer.Responses[0].GetResponsePut().PrevKv; had != nil {
		p.created = had.CreateRevision
	}
	winner := answer.Responses[1].GetResponseRange().Kvs
	p.first = len(winner) == 0 || winner[0].CreateRevision == p.created
	return p, nil
}

// winner reads the first key of the queue.
func (c contest) winner() *etcdpb.RangeRequest {
	return &etcdpb.RangeRequest{
		Key: c.prefix, RangeEnd: c.end, Limit: 1,
		SortTarget: etcdpb.RangeRequest_CREATE, SortOrder: etcdpb.RangeRequest_ASCEND,
	}
}

// win waits until nobody is before the place. It returns the header of the answer
// that shows it still held; none where it is not. Who waits looks only at the one
// before, so that a place that is left wakes one.
func (c contest) win(ctx context.Context, p *place) (*etcdpb.ResponseHeader, error) {
	if p.first {
		return p.header, statusOf(ctx.Err())
	}
	for {
		before, err := c.Range(ctx, &etcdpb.RangeRequest{
			Key: c.prefix, RangeEnd: c.end, Limit: 1, MaxCreateRevision: p.created - 1,
			SortTarget: etcdpb.RangeRequest_CREATE, SortOrder: etcdpb.RangeRequest_DESCEND,
		})
		if err != nil {
			return nil, err
		}
		if len(before.Kvs) == 0 {
			break
		}
		gone := func(e *pb.KeyEvent) bool { return e.Type == pb.KeyEvent_DELETE }
		if err := c.await(ctx, before.Kvs[0].Key, nil, before.Header.Revision, gone); err != nil {
			return nil, err
		}
	}
	own, err := c.Range(ctx, &etcdpb.RangeRequest{Key: p.key})
	if err != nil || len(own.Kvs) == 0 || own.Kvs[0].CreateRevision != p.created {
		return nil, err
	}
	return own.Header, nil
}

// await returns when seen does for a change after a revision, or when changes may
// have been missed.
func (c contest) await(ctx context.Context, key, end []byte, after int64, seen func(*pb.KeyEvent) bool) error {
	w := c.store.Watch(key, end, after)
	for {
		events, _, err := w.Next(ctx)
		var refused *fsm.Error
		if errors.As(err, &refused) && refused.Code == pb.TxnError_TXN_ERROR_COMPACTED {
			return nil
		}
		if err != nil {
			return statusOf(err)
		}
		for _, e := range events {
			if seen(e) {
				return nil
			}
		}
	}
}

// withdraw gives the place up for a caller who has gone.
func (c contest) withdraw(ctx context.Context, p *place) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settlePatience)
	defer cancel()
	_, err := c.leave(ctx, p.key, &etcdpb.Compare{
		Key: p.key, Target: etcdpb.Compare_MOD, Result: etcdpb.Compare_EQUAL,
		TargetUnion: &etcdpb.Compare_ModRevision{ModRevision: p.header.Revision},
	})
	if err != nil {
		c.log.Warn("the key of a contestant who has gone stays until its lease ends", "key", string(p.key), "error", err)
	}
}

// leave deletes a key if it is what the compare says.
func (s *Server) leave(ctx context.Context, key []byte, is *etcdpb.Compare) (*etcdpb.TxnResponse, error) {
	return s.Txn(ctx, &etcdpb.TxnRequest{
		Compare: []*etcdpb.Compare{is},
		Success: []*etcdpb.RequestOp{{Request: &etcdpb.RequestOp_RequestDeleteRange{
			RequestDeleteRange: &etcdpb.DeleteRangeRequest{Key: key},
		}}},
	})
}

func createdAt(key []byte, revision int64) *etcdpb.Compare {
	return &etcdpb.Compare{
		Key: key, Target: etcdpb.Compare_CREATE, Result: etcdpb.Compare_EQUAL,
		TargetUnion: &etcdpb.Compare_CreateRevision{CreateRevision: revision},
	}
}

func putValue(key, value []byte, lease int64) *etcdpb.RequestOp {
	return &etcdpb.RequestOp{Request: &etcdpb.RequestOp_RequestPut{
		RequestPut: &etcdpb.PutRequest{Key: key, Value: value, Lease: lease},
	}}
}
