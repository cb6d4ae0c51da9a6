package etcd

import (
	"context"
	"math"
	"sync/atomic"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	defaultQuotaBytes = 8 << 30
	// A look at the keyspace is good for so long. Until then the replicas together
	// may exceed the quota by what they take in.
	quotaLook = 100 * time.Millisecond
	// leaseCost is what a lease counts for, as in etcd.
	leaseCost = 64
)

// quota refuses clients' transactions that make a full keyspace grow, and all of
// them while the alarm CORRUPT is raised. What it knows by itself only admits: a
// refusal is given on a linearizable view.
type quota struct {
	limit int64 // bytes; negative for none
	start time.Time
	// When what follows is too old, as a duration since start.
	until atomic.Int64
	// Bytes that may still be written until then.
	room atomic.Int64
	// No alarm forbids transactions that do not grow.
	open atomic.Bool
}

func newQuota(limit int64) *quota { return &quota{limit: limit, start: time.Now()} }

// admits reports whether the transaction may be carried out as far as is known. It
// is called for each one, and costs two atomic operations and a look at the clock.
func (q *quota) admits(cost int64) bool {
	now, until := int64(time.Since(q.start)), q.until.Load()
	if now >= until && q.until.CompareAndSwap(until, now+int64(quotaLook)) {
		return false // the one who looks; the others go on with what was seen
	}
	return q.open.Load() && (cost == 0 || q.room.Add(-cost) > 0)
}

// look takes in what v shows, and says whether it refuses the transaction.
func (q *quota) look(v *fsm.View, cost int64) error {
	room, open := int64(math.MaxInt64), true
	if q.limit >= 0 {
		room = q.limit - v.Bytes()
	}
	for _, a := range alarms(v) {
		switch a.Alarm {
		case etcdpb.AlarmType_NOSPACE:
			room = 0
		case etcdpb.AlarmType_CORRUPT:
			open = false
		}
	}
	q.room.Store(room - cost)
	q.open.Store(open)
	switch {
	case !open:
		return rpctypes.ErrGRPCCorrupt
	case cost > 0 && cost >= room:
		return rpctypes.ErrGRPCNoSpace
	}
	return nil
}

// forget makes the next transaction look.
func (q *quota) forget() { q.until.Store(0) }

// mayGrow refuses a transaction for which there is no room, and raises the alarm.
func (s *Server) mayGrow(ctx context.Context, txn *pb.Txn) error {
	cost := growth(txn)
	if s.quota.admits(cost) || s.quota.look(s.store.View(), cost) == nil {
		return nil
	}
	v, err := s.store.Linearizable(ctx)
	if err != nil {
		return statusOf(err)
	}
	refusal := s.quota.look(v, cost)
	if refusal != rpctypes.ErrGRPCNoSpace {
		return refusal
	}
	for _, a := range alarms(v) {
		if a.Alarm == etcdpb.AlarmType_NOSPACE {
			return refusal
		}
	}
	if _, err := s.setAlarm(ctx, &etcdpb.AlarmMember{MemberID: s.config.Member, Alarm: etcdpb.AlarmType_NOSPACE}, true); err != nil {
		return err
	}
	return refusal
}

// growth is how many bytes the branch of the transaction that writes more puts.
func growth(txn *pb.Txn) int64 {
	if len(txn.Failure) == 0 {
		return growthOf(txn.Success)
	}
	return max(growthOf(txn.Success), growthOf(txn.Failure))
}

func growthOf(ops []*pb.RequestOp) int64 {
	sum := int64(0)
	for _, op := range ops {
		switch r := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			sum += int64(len(r.RequestPut.GetKey()) + len(r.RequestPut.GetValue()))
		case *pb.RequestOp_LeaseGrant:
			sum += leaseCost
		case *pb.RequestOp_RequestTxn:
			sum += growth(r.RequestTxn)
		}
	}
	return sum
}
