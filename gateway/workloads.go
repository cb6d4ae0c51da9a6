package gateway

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (g *Gateway) ApplyWorkload(ctx context.Context, req *pb.ApplyWorkloadRequest) (*pb.ApplyWorkloadResponse, error) {
	m := meta(ctx)
	out := &pb.ApplyWorkloadResponse{}
	answer, err := g.change(ctx, m, func(v *fsm.View, m model.Meta) (txn *pb.Txn, err error) {
		txn, out.Outcome, out.Workload, err = model.ApplyWorkload(v, req, m)
		return txn, err
	})
	if req.IdempotencyKey != "" && answer == nil && status.Code(statusOf(err)) != codes.InvalidArgument {
		// Refused or unchanged as things are now; but perhaps because this very
		// call was carried out before, and its answer lost.
		before, known, recallErr := g.recall(ctx, model.ApplyRequestID(req, m))
		switch {
		case recallErr != nil:
			return nil, statusOf(recallErr)
		case known:
			answer, err = before, nil
		}
	}
	if err != nil {
		return nil, specStatus(err)
	}
	switch {
	case answer != nil && req.IdempotencyKey != "":
		if out.Outcome, out.Workload, err = model.Applied(req, answer); err != nil {
			return nil, statusOf(err)
		}
	case answer != nil:
		out.Workload.ResourceVersion = answer.Revision
	}
	return out, statusOf(addStatus(g.store.View(), out.Workload))
}

func (g *Gateway) GetWorkload(ctx context.Context, req *pb.GetWorkloadRequest) (*pb.Workload, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	w, err := fullWorkload(v, req.Id)
	return w, statusOf(err)
}

func (g *Gateway) ListWorkloads(ctx context.Context, req *pb.ListWorkloadsRequest) (*pb.ListWorkloadsResponse, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	out, err := listWorkloads(v, req)
	return out, statusOf(err)
}

func (g *Gateway) DeleteWorkload(ctx context.Context, req *pb.DeleteWorkloadRequest) (*pb.Workload, error) {
	return editWorkload(ctx, g, req, model.DeleteWorkload)
}

func (g *Gateway) ScaleWorkload(ctx context.Context, req *pb.ScaleWorkloadRequest) (*pb.Workload, error) {
	return editWorkload(ctx, g, req, model.ScaleWorkload)
}

func (g *Gateway) StartWorkload(ctx context.Context, req *pb.WorkloadRequest) (*pb.Workload, error) {
	return editWorkload(ctx, g, req, model.StartWorkload)
}

func (g *Gateway) StopWorkload(ctx context.Context, req *pb.WorkloadRequest) (*pb.Workload, error) {
	return editWorkload(ctx, g, req, model.StopWorkload)
}

func (g *Gateway) RestartWorkload(ctx context.Context, req *pb.WorkloadRequest) (*pb.Workload, error) {
	return editWorkload(ctx, g, req, model.RestartWorkload)
}

// RunWorkload answers with the run.
func (g *Gateway) RunWorkload(ctx context.Context, req *pb.WorkloadRequest) (*pb.Workload, error) {
	return editWorkload(ctx, g, req, model.RunWorkload)
}

func (g *Gateway) RollbackWorkload(ctx context.Context, req *pb.RollbackWorkloadRequest) (*pb.Workload, error) {
	return editWorkload(ctx, g, req, model.RollbackWorkload)
}

func (g *Gateway) PromoteWorkload(ctx context.Context, req *pb.WorkloadRequest) (*pb.Workload, error) {
	return editWorkload(ctx, g, req, model.PromoteWorkload)
}

func (g *Gateway) ListRevisions(ctx context.Context, req *pb.WorkloadRequest) (*pb.ListRevisionsResponse, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	out, err := model.ListRevisions(v, req)
	return out, statusOf(err)
}

// RetryWorkload changes no key of the workload itself, so it keeps its version.
func (g *Gateway) RetryWorkload(ctx context.Context, req *pb.WorkloadRequest) (*pb.Workload, error) {
	var w *pb.Workload
	_, err := g.change(ctx, meta(ctx), func(v *fsm.View, m model.Meta) (txn *pb.Txn, err error) {
		txn, w, err = model.RetryWorkload(v, req, m)
		return txn, err
	})
	if err != nil {
		return nil, statusOf(err)
	}
	return w, statusOf(addStatus(g.store.View(), w))
}

// editWorkload carries out a change of a workload that exists.
func editWorkload[R proto.Message](ctx context.Context, g *Gateway, req R, admit func(model.Reader, R, model.Meta) (*pb.Txn, *pb.Workload, error)) (*pb.Workload, error) {
	var w *pb.Workload
	answer, err := g.change(ctx, meta(ctx), func(v *fsm.View, m model.Meta) (txn *pb.Txn, err error) {
		txn, w, err = admit(v, req, m)
		return txn, err
	})
	if err != nil {
		return nil, statusOf(err)
	}
	if answer != nil {
		w.ResourceVersion = answer.Revision
	}
	return w, statusOf(addStatus(g.store.View(), w))
}

func (g *Gateway) ExplainWorkload(ctx context.Context, req *pb.WorkloadRequest) (*pb.Explanation, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	if _, ok := v.Get(model.WorkloadKey(req.Id)); !ok || !model.IsDNSLabel(req.Id) {
		return nil, statusOf(notThere("workload", req.Id))
	}
	out, err := g.control.Explain(ctx, req.Id)
	return out, statusOf(err)
}

const (
	// maxLogReplicas bounds the streams that one call opens to agents.
	maxLogReplicas = 64
	maxTail        = 1_000_000
)

// WorkloadLogs merges the logs of the replicas, each in its own order.
func (g *Gateway) WorkloadLogs(req *pb.WorkloadLogsRequest, stream grpc.ServerStreamingServer[pb.LogChunk]) error {
	ctx := stream.Context()
	if req.Tail < 0 || req.Tail > maxTail {
		return badField("tail", "%d is out of range; allowed: 1 to %d, or 0 for all", req.Tail, maxTail)
	}
	if req.Since != nil && !req.Since.IsValid() {
		return badField("since", "is not a time; allowed: RFC 3339")
	}
	v, err := g.view(ctx)
	if err != nil {
		return statusOf(err)
	}
	w, err := fullWorkload(v, req.Id)
	if err != nil {
		return statusOf(err)
	}
	from, err := replicasOf(w, req.Replica)
	if err != nil {
		return err
	}
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	var sending sync.Mutex
	failures := make([]error, len(from))
	var group errgroup.Group
	for i, r := range from {
		one := proto.CloneOf(req)
		one.Replica = proto.Int32(r.Replica)
		group.Go(func() error {
			// One replica whose node is away does not end the others' logs.
			failures[i] = g.control.Logs(ctx, r.NodeId, one, func(c *pb.LogChunk) error {
				sending.Lock()
				defer sending.Unlock()
				return stream.Send(c)
			})
			return nil
		})
	}
	_ = group.Wait() // the errors are in failures
	for i, err := range failures {
		if err != nil && len(from) > 1 {
			failures[i] = fmt.Errorf("replica %d on %s: %w", from[i].Replica, from[i].NodeId, err)
		}
	}
	if len(from) == 1 {
		return statusOf(failures[0])
	}
	if err := errors.Join(failures...); err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	return nil
}

// replicasOf chooses those that have a node.
func replicasOf(w *pb.Workload, number *int32) ([]*pb.Replica, error) {
	var from []*pb.Replica
	for _, r := range w.Replicas {
		if r.NodeId != "" && (number == nil || r.Replica == *number) {
			from = append(from, r)
		}
	}
	id := w.Spec.GetId()
	switch {
	case len(from) == 0 && number != nil:
		return nil, status.Errorf(codes.NotFound, "workload %q has no replica %d on a node", id, *number)
	case len(from) == 0 && w.Spec.GetSchedule() != nil:
		return nil, status.Errorf(codes.FailedPrecondition, "workload %q runs by its schedule, and each run has logs of its own; persys describe %s lists the runs", id, id)
	case len(from) == 0:
		return nil, status.Errorf(codes.FailedPrecondition, "workload %q has no replica on a node yet; persys why %s says why", id, id)
	case len(from) > maxLogReplicas:
		return nil, badField("replica", "workload %q has %d replicas; allowed: one of them, where there are more than %d", id, len(from), maxLogReplicas)
	}
	return from, nil
}
