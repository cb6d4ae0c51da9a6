package gateway

import (
	"context"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// PlanWorkload admits the request as ApplyWorkload does, with the same errors, and
// asks what would follow.
func (g *Gateway) PlanWorkload(ctx context.Context, req *pb.ApplyWorkloadRequest) (*pb.WorkloadPlan, error) {
	if req.IdempotencyKey != "" {
		return nil, badField("idempotency_key", "has no meaning for a plan, which changes nothing; allowed: leave it out")
	}
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	txn, outcome, next, err := model.ApplyWorkload(v, req, meta(ctx))
	if err != nil {
		return nil, specStatus(err)
	}
	plan, err := g.control.Plan(ctx, v, next.Spec.Id, txn)
	if err != nil {
		return nil, statusOf(err)
	}
	plan.Outcome, plan.Revision = outcome, next.Revision
	if txn == nil {
		return plan, nil
	}
	stored := &pb.Workload{}
	if _, _, err := model.Load(v, model.WorkloadKey(next.Spec.Id), stored); err != nil {
		return nil, statusOf(err)
	}
	plan.Changes = model.Diff(stored.Spec, next.Spec)
	return plan, nil
}
