package server

import (
	"context"
	"time"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/scheduler"
)

// Plan says what would become of replicas if txn, which is about a workload, were
// carried out; nil stands for no change. It is worked out on a picture of its own,
// beside the one that decides, for which nobody waits: on a large cluster that
// takes a good part of a second and of a gigabyte, so it is done one at a time.
func (r *replica) Plan(ctx context.Context, v *fsm.View, id string, txn *pb.Txn) (*pb.WorkloadPlan, error) {
	select {
	case r.planning <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-r.planning }()
	trial, err := scheduler.NewTrial(v, v.Revision(), time.Now(), scheduler.Options{Lease: r.config.LeaseTTL})
	if err != nil {
		return nil, err
	}
	trial.Ask(id)
	trial.Commit(txn)
	out, err := trial.Outcome()
	if err != nil {
		return nil, err
	}
	return out.Plan(id), nil
}
