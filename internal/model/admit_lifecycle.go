package model

import (
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The functions below change a workload that exists. A nil transaction means
// that it is as asked for already. The workload is as it will be; its
// resource_version is the one that was read, until the transaction has given it
// another.

// DeleteWorkload asks for deletion: the scheduler takes the replicas away, and
// the workload is gone when none is left. Asking again changes nothing.
func DeleteWorkload(v Reader, req *pb.DeleteWorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	w, mod, err := loadWorkload(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	if deleting(w) {
		return nil, w, nil
	}
	if req.IfVersion < 0 {
		return nil, nil, invalid("if_version", "%d is negative; allowed: a workload's resource_version, or 0 for any", req.IfVersion)
	}
	if err := checkVersion(req.Id, mod, req.IfVersion); err != nil {
		return nil, nil, err
	}
	w.Spec.DesiredState = pb.DesiredState_DESIRED_DELETED
	return changeWorkload(w, m, pb.EventType_WORKLOAD_DELETED, "deletion asked for"), w, nil
}

// ScaleWorkload sets the number of replicas.
func ScaleWorkload(v Reader, req *pb.ScaleWorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	if req.Replicas == nil {
		return nil, nil, invalid("replicas", "missing; allowed: 0 to %d", MaxReplicas)
	}
	var errs FieldErrors
	checkRange(&errs, "replicas", req.GetReplicas(), 0, MaxReplicas)
	if err := errs.err(); err != nil {
		return nil, nil, err
	}
	w, err := changeable(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	if w.Spec.Kind == pb.WorkloadKind_GLOBAL {
		return nil, nil, refuse(codes.FailedPrecondition, "workload %q is global: it has one replica on each matching node and cannot be scaled", req.Id)
	}
	before := w.Spec.GetReplicas()
	if w.Spec.Replicas != nil && before == req.GetReplicas() {
		return nil, w, nil
	}
	w.Spec.Replicas = proto.Int32(req.GetReplicas())
	if checkMinHealthy(&errs, w.Spec); len(errs) > 0 {
		return nil, nil, errs
	}
	return changeWorkload(w, m, pb.EventType_WORKLOAD_UPDATED, fmt.Sprintf("scaled from %d to %d replicas", before, req.GetReplicas())), w, nil
}

// StartWorkload makes a stopped workload run.
func StartWorkload(v Reader, req *pb.WorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	return desire(v, req.Id, pb.DesiredState_DESIRED_RUNNING, "start asked for", m)
}

// StopWorkload ends its replicas and keeps their places.
func StopWorkload(v Reader, req *pb.WorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	return desire(v, req.Id, pb.DesiredState_DESIRED_STOPPED, "stop asked for", m)
}

func desire(v Reader, id string, state pb.DesiredState, message string, m Meta) (*pb.Txn, *pb.Workload, error) {
	w, err := changeable(v, id)
	if err != nil {
		return nil, nil, err
	}
	if w.Spec.DesiredState == state {
		return nil, w, nil
	}
	w.Spec.DesiredState = state
	return changeWorkload(w, m, pb.EventType_WORKLOAD_UPDATED, message), w, nil
}

// RestartWorkload replaces every replica. Each call counts: it always changes
// something.
func RestartWorkload(v Reader, req *pb.WorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	w, err := changeable(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	if w.Spec.DesiredState == pb.DesiredState_DESIRED_STOPPED {
		return nil, nil, refuse(codes.FailedPrecondition, "workload %q is stopped; start it instead", req.Id)
	}
	if w.Spec.Schedule != nil {
		return nil, nil, refuse(codes.FailedPrecondition, "workload %q runs by its schedule and has no replicas; persys job run %s starts a run now", req.Id, req.Id)
	}
	w.RestartGeneration++
	return changeWorkload(w, m, pb.EventType_WORKLOAD_UPDATED, "restart asked for"), w, nil
}

// RetryWorkload forgets failed attempts, so that the next ones are made at once.
// The records stay, with nothing but that an attempt is due: work that is not to
// be restarted would be given up again without one.
func RetryWorkload(v Reader, req *pb.WorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	w, err := changeable(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	// Not its version: what is forgotten has nothing to do with the spec.
	txn := &pb.Txn{Compare: []*pb.Compare{Exists(WorkloadKey(req.Id))}}
	for kv := range v.Scan(RetriesPrefix + req.Id + "/") {
		old := &pb.Retry{}
		if err := Parse(kv, old); err != nil {
			return nil, nil, err
		}
		key := string(kv.Key)
		txn.Compare = append(txn.Compare, Unchanged(key, kv.ModRevision))
		txn.Success = append(txn.Success, Put(key, &pb.Retry{
			WorkloadId: old.WorkloadId, Replica: old.Replica, Revision: old.Revision, Reason: old.Reason, NextRetryAt: timestamppb.New(m.Now),
		}, 0))
	}
	failed := len(txn.Success)
	if failed == 0 {
		return nil, w, nil
	}
	what := "retry asked for"
	if failed > 1 {
		what = fmt.Sprintf("retry of %d failed replicas asked for", failed)
	}
	txn.Success = append(txn.Success, m.event(&pb.Event{Type: pb.EventType_RETRY_TRIGGERED, WorkloadId: req.Id, Message: what}))
	return txn, w, nil
}

func loadWorkload(v Reader, id string) (*pb.Workload, int64, error) {
	var errs FieldErrors
	if checkID(&errs, "id", id); len(errs) > 0 {
		return nil, 0, errs
	}
	w := &pb.Workload{}
	mod, ok, err := Load(v, WorkloadKey(id), w)
	if err != nil {
		return nil, 0, err
	}
	if !ok {
		return nil, 0, refuse(codes.NotFound, "there is no workload %q", id)
	}
	w.ResourceVersion = mod
	return w, mod, nil
}

func changeable(v Reader, id string) (*pb.Workload, error) {
	w, _, err := loadWorkload(v, id)
	if err != nil {
		return nil, err
	}
	if deleting(w) {
		return nil, refuse(codes.FailedPrecondition, "workload %q is being deleted and cannot be changed", id)
	}
	return w, nil
}

// changeWorkload stores w if it is still as it was read.
func changeWorkload(w *pb.Workload, m Meta, kind pb.EventType, message string) *pb.Txn {
	key, read := WorkloadKey(w.Spec.Id), w.ResourceVersion
	w.UpdateTime = timestamppb.New(m.Now)
	stored := proto.CloneOf(w)
	stored.ResourceVersion = 0
	return &pb.Txn{
		Compare: []*pb.Compare{Unchanged(key, read)},
		Success: []*pb.RequestOp{
			Put(key, stored, 0),
			m.event(&pb.Event{Type: kind, WorkloadId: w.Spec.Id, Message: message}),
		},
	}
}
