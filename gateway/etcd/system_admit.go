package etcd

import (
	"bytes"
	"errors"
	"math"
	"path"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// admitted is a client's transaction after admission.
type admitted struct {
	txn *pb.Txn
	// guards hold as long as admission would decide the same.
	guards []*pb.Compare
	// restore makes of the answer to txn the one that the client expects.
	restore func(*pb.TxnResponse) *pb.TxnResponse
	// partial: branches that write to the system and would not be taken were not
	// looked at, and have lookAgain in their place.
	partial bool
}

// outdated reports whether the transaction was refused because it took a branch
// that admission had not looked at.
func (a *admitted) outdated(err error) bool {
	var refused *fsm.Error
	return a.partial && errors.As(err, &refused) && refused.Code == pb.TxnError_TXN_ERROR_FUTURE_REVISION
}

// lookAgain makes a transaction fail as a whole: it reads the future.
func lookAgain() *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{
		Key: []byte(model.SystemPrefix), Revision: math.MaxInt64,
	}}}
}

// admit has model decide on what a client does to the system's keys.
func (s *Server) admit(v *fsm.View, who *caller, txn *pb.Txn) (*admitted, error) {
	a := &admission{v: v, actor: who.actor, shown: who.shown(), manages: who.manages, writes: anyOp(txn.Success, opWrites) || anyOp(txn.Failure, opWrites), removed: map[string]bool{}}
	out, restore, err := a.txn(txn, true)
	if err != nil {
		return nil, err
	}
	whole := &pb.Txn{Compare: a.guards, Success: []*pb.RequestOp{nested(out)}}
	if err := fsm.ValidateTxn(whole); err != nil {
		var refused *fsm.Error
		if errors.As(err, &refused) && refused.Code == pb.TxnError_TXN_ERROR_INVALID {
			return nil, status.Errorf(codes.InvalidArgument, "what this asks of the system is too much at once: %s", refused.Message)
		}
		return nil, err
	}
	return &admitted{txn: out, guards: a.guards, restore: restore, partial: a.partial}, nil
}

// admission rewrites a client's transaction, operation by operation: each becomes
// one operation, whose answer is turned into that of the client's.
type admission struct {
	v     *fsm.View
	actor string
	// shown is up to whose keys the caller is shown them.
	shown owner
	// manages: it may change what is for admins.
	manages bool
	// writes: there is something in it that may be refused.
	writes  bool
	partial bool
	guards  []*pb.Compare
	// removed are the objects that the transaction has removed so far.
	removed map[string]bool
	calls   int
}

// restore turns the answer to an operation into that of the client's; nil where it
// is that already.
type restore func(*pb.ResponseOp) *pb.ResponseOp

func (a *admission) guard(c ...*pb.Compare) { a.guards = append(a.guards, c...) }

// meta is that of one admission: times that tell the order, for events.
func (a *admission) meta() model.Meta {
	a.calls++
	return model.Meta{Now: time.Now().Add(time.Duration(a.calls)), Actor: a.actor, NewID: uuid.NewString()}
}

// txn rewrites a transaction. live: it is carried out if all is as in the view.
func (a *admission) txn(t *pb.Txn, live bool) (*pb.Txn, func(*pb.TxnResponse) *pb.TxnResponse, error) {
	out := &pb.Txn{}
	for _, c := range t.Compare {
		compares, err := a.compare(c)
		if err != nil {
			return nil, nil, err
		}
		out.Compare = append(out.Compare, compares...)
	}
	holds := false
	if a.writes && live {
		var err error
		if holds, err = a.holds(t.Compare); err != nil {
			return nil, nil, err
		}
	}
	var then, otherwise []restore
	var err error
	if out.Success, then, err = a.branch(t.Success, live && holds); err != nil {
		return nil, nil, err
	}
	if out.Failure, otherwise, err = a.branch(t.Failure, live && !holds); err != nil {
		return nil, nil, err
	}
	return out, func(answer *pb.TxnResponse) *pb.TxnResponse {
		back := otherwise
		if answer.Succeeded {
			back = then
		}
		restored := &pb.TxnResponse{Revision: answer.Revision, Succeeded: answer.Succeeded, Responses: make([]*pb.ResponseOp, len(answer.Responses))}
		for i, r := range answer.Responses {
			if restored.Responses[i] = r; back[i] != nil {
				restored.Responses[i] = back[i](r)
			}
		}
		return restored
	}, nil
}

func (a *admission) branch(ops []*pb.RequestOp, live bool) ([]*pb.RequestOp, []restore, error) {
	if !live && anyOp(ops, opWrites) {
		// A refusal in it would be one of something that does not happen.
		a.partial = true
		return []*pb.RequestOp{lookAgain()}, nil, nil
	}
	out, back := make([]*pb.RequestOp, len(ops)), make([]restore, len(ops))
	for i, op := range ops {
		var err error
		if out[i], back[i], err = a.op(op, live); err != nil {
			return nil, nil, err
		}
	}
	return out, back, nil
}

func (a *admission) op(op *pb.RequestOp, live bool) (*pb.RequestOp, restore, error) {
	if r := op.GetRequestRange(); r != nil && live && a.writes && r.Revision > a.v.Revision() {
		// Told apart here from lookAgain.
		return nil, nil, &fsm.Error{Code: pb.TxnError_TXN_ERROR_FUTURE_REVISION, Message: "revision is in the future"}
	}
	if !opTouches(op) {
		return op, nil, nil
	}
	switch r := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		out, back := readOp(r.RequestRange, a.shown)
		return out, back, nil
	case *pb.RequestOp_RequestPut:
		return a.put(r.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		return a.remove(r.RequestDeleteRange)
	case *pb.RequestOp_RequestTxn:
		out, back, err := a.txn(r.RequestTxn, live)
		if err != nil {
			return nil, nil, err
		}
		return nested(out), func(answer *pb.ResponseOp) *pb.ResponseOp {
			return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseTxn{ResponseTxn: back(answer.GetResponseTxn())}}
		}, nil
	case *pb.RequestOp_LeaseRevoke:
		if leaseOfSystem(a.v, r.LeaseRevoke.Id) {
			return nil, nil, status.Error(codes.PermissionDenied, "the lease is that of a node, which the leader ends when it is not heard of any more")
		}
	}
	return op, nil, nil
}

func nested(t *pb.Txn) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: t}}
}

func readOp(r *pb.RangeRequest, shown owner) (*pb.RequestOp, restore) {
	read := newReading(r, shown)
	ops := make([]*pb.RequestOp, len(read.parts))
	for i, part := range read.parts {
		ops[i] = &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: part}}
	}
	return nested(&pb.Txn{Success: ops}), func(answer *pb.ResponseOp) *pb.ResponseOp {
		var parts []*pb.RangeResponse
		for _, r := range answer.GetResponseTxn().Responses {
			parts = append(parts, r.GetResponseRange())
		}
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: read.answer(parts)}}
	}
}

func (a *admission) put(p *pb.PutRequest) (*pb.RequestOp, restore, error) {
	key := string(p.Key)
	k := kindOf(key)
	if k == nil || k.put == nil {
		return nil, nil, closed(key)
	}
	if k.admins && !a.manages {
		return nil, nil, forAdmins(key)
	}
	if p.Lease != 0 {
		return nil, nil, status.Errorf(codes.InvalidArgument, "%s: a key of the system cannot be attached to a lease", key)
	}
	before, exists := a.v.Get(key)
	if (p.IgnoreValue || p.IgnoreLease) && !exists {
		return nil, nil, rpctypes.ErrGRPCKeyNotFound
	}
	var change *pb.Txn
	if !p.IgnoreValue {
		var err error
		if change, err = k.put(a.v, idOf(key), p.Value, a.meta()); err != nil {
			return nil, nil, admissionError(key, err)
		}
	}
	answer := &pb.PutResponse{}
	if p.PrevKv {
		answer.PrevKv = show(before)
	}
	return nested(&pb.Txn{Success: a.take(change, key, before)}), func(*pb.ResponseOp) *pb.ResponseOp {
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: answer}}
	}, nil
}

// take makes guards of what a change of an object compares, which is at least the
// object; what is left is its operations. A nil change is none.
func (a *admission) take(change *pb.Txn, key string, read *pb.KeyValue) []*pb.RequestOp {
	if change == nil {
		a.guard(model.Unchanged(key, read.GetModRevision()))
		return nil
	}
	a.guard(change.Compare...)
	return change.Success
}

func forAdmins(key string) error {
	return status.Errorf(codes.PermissionDenied, "%s is changed by admins only", key)
}

// admissionError tells which key a refusal is about.
func admissionError(key string, err error) error {
	var (
		fields  model.FieldErrors
		refused *model.Refusal
	)
	switch {
	case errors.As(err, &fields):
		return status.Errorf(codes.InvalidArgument, "%s: %s", key, fields.Error())
	case errors.As(err, &refused):
		return status.Error(refused.Code, refused.Message)
	}
	return status.Errorf(codes.Internal, "%s: %v", key, err)
}

// removal is what becomes of one delete.
type removal struct {
	asked *pb.DeleteRangeRequest
	ops   []*pb.RequestOp
	// What each operation answers; nil where it is the store's to say.
	answers []*pb.DeleteRangeResponse
}

func (a *admission) remove(d *pb.DeleteRangeRequest) (*pb.RequestOp, restore, error) {
	r := &removal{asked: d}
	for _, part := range cut(d.Key, d.RangeEnd) {
		switch {
		case part.owner == users:
			own := &pb.DeleteRangeRequest{Key: part.from, RangeEnd: part.to, PrevKv: d.PrevKv}
			r.ops = append(r.ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: own}})
			r.answers = append(r.answers, nil)
		case !covers(d.Key, system, system):
		case part.owner == hidden:
			return nil, nil, closed(string(part.from))
		default:
			if err := a.removeObjects(r, part); err != nil {
				return nil, nil, err
			}
		}
	}
	return nested(&pb.Txn{Success: r.ops}), func(answer *pb.ResponseOp) *pb.ResponseOp {
		out := &pb.DeleteRangeResponse{}
		for i, part := range answer.GetResponseTxn().Responses {
			one := r.answers[i]
			if one == nil {
				one = part.GetResponseDeleteRange()
			}
			out.Deleted += one.Deleted
			out.PrevKvs = append(out.PrevKvs, one.PrevKvs...)
		}
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: out}}
	}, nil
}

// removeObjects admits the removal of what the system keeps in a part of the range.
func (a *admission) removeObjects(r *removal, part area) error {
	if len(r.asked.RangeEnd) == 0 {
		if k := kindOf(string(r.asked.Key)); k == nil || k.remove == nil {
			return closed(string(r.asked.Key))
		}
	}
	found, err := a.v.Range(&pb.RangeRequest{Key: part.from, RangeEnd: part.to})
	if err != nil {
		return err
	}
	for _, kv := range found.Kvs {
		key := string(kv.Key)
		k := kindOf(key)
		switch {
		case a.removed[key] || k != nil && k.part && takes(path.Dir(key), r.asked):
			continue
		case k == nil || k.remove == nil:
			return closed(key)
		case k.admins && !a.manages:
			return forAdmins(key)
		}
		change, err := k.remove(a.v, idOf(key), a.meta())
		if err != nil {
			return admissionError(key, err)
		}
		a.removed[key] = true
		answer := &pb.DeleteRangeResponse{Deleted: 1}
		if r.asked.PrevKv {
			answer.PrevKvs = []*pb.KeyValue{show(kv)}
		}
		r.ops = append(r.ops, nested(&pb.Txn{Success: a.take(change, key, kv)}))
		r.answers = append(r.answers, answer)
	}
	// Nothing has come since.
	a.guard(&pb.Compare{
		Target: pb.Compare_CREATE, Result: pb.Compare_LESS, Key: part.from, RangeEnd: part.to,
		TargetUnion: &pb.Compare_CreateRevision{CreateRevision: a.v.Revision() + 1},
	})
	return nil
}

// takes reports whether a delete takes the key along.
func takes(key string, d *pb.DeleteRangeRequest) bool {
	k := []byte(key)
	switch {
	case len(d.RangeEnd) == 0:
		return bytes.Equal(k, d.Key)
	case bytes.Compare(k, d.Key) < 0:
		return false
	}
	return endless(d.RangeEnd) || bytes.Compare(k, d.RangeEnd) < 0
}
