package model

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// keptRevisions is how many revisions of a workload history keeps, the
	// present one included; those that assignments run are kept beside them.
	keptRevisions = 10

	maxIdempotencyKey = 255
)

// ApplyWorkload is admission of a new or changed workload. A nil transaction
// means that nothing changes. The workload is as it will be stored; its
// resource_version is the revision of the transaction.
//
// With an idempotency key the transaction carries a request id and reads back
// what it wrote, so that a repeated call gets the first answer: see Applied. A
// conflict is then no answer but a refusal, FUTURE_REVISION, for an answer
// would be remembered and the call could never be tried again.
func ApplyWorkload(v Reader, req *pb.ApplyWorkloadRequest, m Meta) (*pb.Txn, pb.ApplyWorkloadResponse_Outcome, *pb.Workload, error) {
	unchanged := pb.ApplyWorkloadResponse_UNCHANGED
	spec, err := admitSpec(req)
	if err != nil {
		return nil, unchanged, nil, err
	}
	key, stored := WorkloadKey(spec.Id), &pb.Workload{}
	mod, exists, err := Load(v, key, stored)
	if err != nil {
		return nil, unchanged, nil, err
	}
	if err := checkExisting(req, spec, stored, mod); err != nil {
		return nil, unchanged, nil, err
	}
	if exists && proto.Equal(Normalize(stored.Spec), spec) {
		stored.ResourceVersion = mod
		return nil, unchanged, stored, nil
	}

	now := timestamppb.New(m.Now)
	next := proto.CloneOf(stored)
	next.Spec, next.Revision, next.UpdateTime = spec, Revision(spec), now
	outcome, event := pb.ApplyWorkloadResponse_UPDATED, &pb.Event{
		Type: pb.EventType_WORKLOAD_UPDATED, WorkloadId: spec.Id, Message: "spec changed, replicas keep running at revision " + next.Revision,
	}
	if next.Revision != stored.Revision {
		next.PromotedRevision = ""
	}
	switch {
	case !exists:
		next.Uid, next.CreateTime = m.NewID, now
		outcome, event.Type, event.Message = pb.ApplyWorkloadResponse_CREATED, pb.EventType_WORKLOAD_SUBMITTED, "submitted at revision "+next.Revision
	case next.Revision != stored.Revision:
		event.Message = fmt.Sprintf("spec changed, revision %s replaces %s", next.Revision, stored.Revision)
	}
	txn := &pb.Txn{Compare: []*pb.Compare{Unchanged(key, mod)}, Success: []*pb.RequestOp{Put(key, next, 0)}}
	if next.Revision != stored.Revision {
		history, err := newestRevision(v, next)
		if err != nil {
			return nil, unchanged, nil, err
		}
		txn.Success = append(txn.Success, history...)
	}
	txn.Success = append(txn.Success, m.event(event))
	if req.IdempotencyKey != "" {
		txn.RequestId = ApplyRequestID(req, m)
		txn.Success = append(txn.Success, get(key))
		txn.Failure = []*pb.RequestOp{refusedOp()}
	}
	return txn, outcome, next, nil
}

// ApplyRequestID is the request id that follows from the idempotency key.
func ApplyRequestID(req *pb.ApplyWorkloadRequest, m Meta) []byte {
	return RequestID(m.Actor, "ApplyWorkload", req.IdempotencyKey)
}

// Applied reads the answer to a transaction of ApplyWorkload that had a request
// id: what the first call with the idempotency key wrote. Another request under
// the same key is refused.
func Applied(req *pb.ApplyWorkloadRequest, answer *pb.TxnResponse) (pb.ApplyWorkloadResponse_Outcome, *pb.Workload, error) {
	spec, err := admitSpec(req)
	if err != nil {
		return 0, nil, err
	}
	for _, r := range answer.GetResponses() {
		kvs := r.GetResponseRange().GetKvs()
		if len(kvs) == 0 {
			continue
		}
		w := &pb.Workload{}
		if err := Parse(kvs[0], w); err != nil {
			return 0, nil, err
		}
		if !proto.Equal(Normalize(w.Spec), spec) {
			break
		}
		w.ResourceVersion = kvs[0].ModRevision
		if kvs[0].Version == 1 {
			return pb.ApplyWorkloadResponse_CREATED, w, nil
		}
		return pb.ApplyWorkloadResponse_UPDATED, w, nil
	}
	return 0, nil, invalid("idempotency_key", "was used before, for another request; allowed: a new key for each request")
}

func admitSpec(req *pb.ApplyWorkloadRequest) (*pb.WorkloadSpec, error) {
	var errs FieldErrors
	if req.IfVersion < 0 {
		errs.add("if_version", "%d is negative; allowed: a workload's resource_version, or 0 for any", req.IfVersion)
	}
	if req.CreateOnly && req.IfVersion != 0 {
		errs.add("if_version", "contradicts create_only; allowed: one of them")
	}
	if len(req.IdempotencyKey) > maxIdempotencyKey {
		errs.add("idempotency_key", "has %d bytes; allowed: %d", len(req.IdempotencyKey), maxIdempotencyKey)
	}
	if err := errs.err(); err != nil {
		return nil, err
	}
	if err := Validate(req.Spec); err != nil {
		return nil, err
	}
	return Normalize(req.Spec), nil
}

func checkExisting(req *pb.ApplyWorkloadRequest, spec *pb.WorkloadSpec, stored *pb.Workload, mod int64) error {
	exists := mod != 0
	switch {
	case req.IfVersion != 0 && !exists:
		return refuse(codes.Aborted, "workload %q does not exist, and if_version asks for version %d of it", spec.Id, req.IfVersion)
	case !exists:
		return nil
	case deleting(stored):
		return refuse(codes.FailedPrecondition, "workload %q is being deleted; apply it again when it is gone", spec.Id)
	case stored.Parent != "" && spec.Schedule != nil:
		return refuse(codes.FailedPrecondition, "workload %q is a run of %q and can have no schedule of its own", spec.Id, stored.Parent)
	case req.CreateOnly:
		return refuse(codes.AlreadyExists, "workload %q exists already", spec.Id)
	case stored.Spec.GetKind() != spec.Kind:
		return refuse(codes.FailedPrecondition, "workload %q is of kind %s and cannot become %s; delete it first, or use another id",
			spec.Id, strings.ToLower(stored.Spec.GetKind().String()), strings.ToLower(spec.Kind.String()))
	}
	return checkVersion(spec.Id, mod, req.IfVersion)
}

func checkVersion(id string, mod, want int64) error {
	if want != 0 && want != mod {
		return refuse(codes.Aborted, "workload %q is at version %d, not %d: somebody changed it; read it again", id, mod, want)
	}
	return nil
}

func deleting(w *pb.Workload) bool {
	return w.GetSpec().GetDesiredState() == pb.DesiredState_DESIRED_DELETED
}

// newestRevision stores the workload's revision as the newest of its history and
// deletes the oldest beyond those that are kept.
func newestRevision(v Reader, next *pb.Workload) ([]*pb.RequestOp, error) {
	ops := []*pb.RequestOp{Put(RevisionKey(next.Spec.Id, next.Revision), &pb.Revision{
		Spec: next.Spec, Revision: next.Revision, CreateTime: next.UpdateTime, Uid: next.Uid,
	}, 0)}
	all, err := revisions(v, next.Spec.Id)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(r *pb.Revision) bool { return r.Revision == next.Revision })
	if len(all) < keptRevisions {
		return ops, nil
	}
	rollout := &pb.Rollout{}
	if _, _, err := Load(v, RolloutKey(next.Spec.Id), rollout); err != nil {
		return nil, err
	}
	// What an update may have to be taken back to is in use, too.
	used := map[string]bool{rollout.Previous: true}
	if rollout.State == pb.RolloutState_ROLLOUT_COMPLETED {
		used[rollout.Revision] = true
	}
	for kv := range v.Scan(AssignmentsPrefix + next.Spec.Id + "/") {
		a := &pb.Assignment{}
		if err := Parse(kv, a); err != nil {
			return nil, err
		}
		used[a.Revision] = true
	}
	for _, r := range all[keptRevisions-1:] {
		if !used[r.Revision] {
			ops = append(ops, Delete(RevisionKey(next.Spec.Id, r.Revision)))
		}
	}
	return ops, nil
}

// revisions are those that are kept of a workload, the newest first.
func revisions(v Reader, id string) ([]*pb.Revision, error) {
	var all []*pb.Revision
	for kv := range v.Scan(RevisionKey(id, "")) {
		r := &pb.Revision{}
		if err := Parse(kv, r); err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(x, y *pb.Revision) int {
		return cmp.Or(y.CreateTime.AsTime().Compare(x.CreateTime.AsTime()), strings.Compare(x.Revision, y.Revision))
	})
	return all, nil
}
