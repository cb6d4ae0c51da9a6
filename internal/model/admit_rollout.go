package model

import (
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// ListRevisions is what is kept of a workload's history.
func ListRevisions(v Reader, req *pb.WorkloadRequest) (*pb.ListRevisionsResponse, error) {
	w, _, err := loadWorkload(v, req.Id)
	if err != nil {
		return nil, err
	}
	all, err := revisions(v, req.Id)
	return &pb.ListRevisionsResponse{Revisions: all, Current: w.Revision}, err
}

// RollbackWorkload goes back to an earlier revision, which becomes the newest one
// of the history. It is not asked for canaries: they have been accepted before.
func RollbackWorkload(v Reader, req *pb.RollbackWorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	w, err := changeable(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	all, err := revisions(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	rollout := &pb.Rollout{}
	if _, _, err := Load(v, RolloutKey(req.Id), rollout); err != nil {
		return nil, nil, err
	}
	to, err := rollbackTarget(w, all, rollout, req.Revision)
	if err != nil {
		return nil, nil, err
	}
	if to.Revision == w.Revision {
		return nil, w, nil
	}
	from := w.Revision
	w = Restored(w, to)
	if err := Validate(w.Spec); err != nil {
		return nil, nil, refuse(codes.FailedPrecondition, "workload %q as it is now cannot go back to revision %s: %v", req.Id, to.Revision, err)
	}
	txn := changeWorkload(w, m, pb.EventType_WORKLOAD_UPDATED, fmt.Sprintf("taken back on request, revision %s replaces %s", to.Revision, from))
	history, err := newestRevision(v, w)
	if err != nil {
		return nil, nil, err
	}
	txn.Success = append(txn.Success, history...)
	return txn, w, nil
}

// rollbackTarget is the revision that is named, or the one before the present one:
// that which was rolled out in full before it, if there is one, and not one that
// failed in between.
func rollbackTarget(w *pb.Workload, all []*pb.Revision, rollout *pb.Rollout, name string) (*pb.Revision, error) {
	id := w.Spec.Id
	find := func(name string) int {
		return slices.IndexFunc(all, func(r *pb.Revision) bool { return r.Revision == name })
	}
	if name != "" {
		at := find(name)
		if at < 0 {
			return nil, refuse(codes.NotFound, "workload %q has no revision %q in its history", id, clip(name))
		}
		return all[at], nil
	}
	if at := find(rollout.Previous); at >= 0 && rollout.Revision == w.Revision && rollout.Previous != w.Revision {
		return all[at], nil
	}
	at := find(w.Revision)
	if at < 0 || at+1 == len(all) {
		return nil, refuse(codes.FailedPrecondition, "workload %q has no revision before the present one", id)
	}
	return all[at+1], nil
}

// PromoteWorkload accepts the canaries of the present revision.
func PromoteWorkload(v Reader, req *pb.WorkloadRequest, m Meta) (*pb.Txn, *pb.Workload, error) {
	w, err := changeable(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	rollout := &pb.Rollout{}
	if _, _, err := Load(v, RolloutKey(req.Id), rollout); err != nil {
		return nil, nil, err
	}
	switch {
	case w.PromotedRevision == w.Revision:
		return nil, w, nil
	case rollout.State != pb.RolloutState_ROLLOUT_AWAITING_PROMOTION || rollout.Revision != w.Revision:
		return nil, nil, refuse(codes.FailedPrecondition, "workload %q has no update that awaits promotion", req.Id)
	}
	w.PromotedRevision = w.Revision
	return changeWorkload(w, m, pb.EventType_ROLLOUT_CHANGED, "canaries of revision "+w.Revision+" accepted"), w, nil
}
