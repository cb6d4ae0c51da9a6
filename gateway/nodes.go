package gateway

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// usageWait bounds how long an answer waits for what only the leader's memory
// has; without it the answer is complete but for usage and last_heartbeat.
const usageWait = 2 * time.Second

func (g *Gateway) ListNodes(ctx context.Context, _ *pb.ListNodesRequest) (*pb.ListNodesResponse, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	out := &pb.ListNodesResponse{Revision: v.Revision()}
	for n, err := range nodes(v) {
		if err != nil {
			return nil, statusOf(err)
		}
		out.Nodes = append(out.Nodes, n)
	}
	return out, statusOf(g.addObserved(ctx, v, out.Nodes...))
}

func (g *Gateway) GetNode(ctx context.Context, req *pb.NodeRequest) (*pb.Node, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	n := &pb.Node{}
	mod, ok, err := model.Load(v, model.NodeKey(req.Id), n)
	if err != nil {
		return nil, statusOf(err)
	}
	if !ok || !model.IsDNSLabel(req.Id) {
		return nil, statusOf(notThere("node", req.Id))
	}
	n.ResourceVersion = mod
	return n, statusOf(g.addObserved(ctx, v, n))
}

// addObserved fills in what is in answers only.
func (g *Gateway) addObserved(ctx context.Context, v *fsm.View, all ...*pb.Node) error {
	d, err := demandOf(v)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, usageWait)
	defer cancel()
	heard := map[string]*pb.Node{}
	usage, err := g.control.Usage(ctx)
	if err != nil {
		g.log.Debug("usage of nodes is not known now", "error", err)
	}
	for _, n := range usage {
		heard[n.Id] = n
	}
	for _, n := range all {
		n.Reserved, n.Assignments = d.reserved[n.Id], d.count[n.Id]
		if n.Reserved == nil {
			n.Reserved = &pb.NodeCapacity{}
		}
		n.Usage, n.LastHeartbeat = heard[n.Id].GetUsage(), heard[n.Id].GetLastHeartbeat()
	}
	return nil
}

func (g *Gateway) CordonNode(ctx context.Context, req *pb.NodeRequest) (*pb.Node, error) {
	return editNode(ctx, g, req, model.CordonNode)
}

func (g *Gateway) UncordonNode(ctx context.Context, req *pb.NodeRequest) (*pb.Node, error) {
	return editNode(ctx, g, req, model.UncordonNode)
}

func (g *Gateway) DrainNode(ctx context.Context, req *pb.DrainNodeRequest) (*pb.Node, error) {
	return editNode(ctx, g, req, model.DrainNode)
}

func (g *Gateway) LabelNode(ctx context.Context, req *pb.LabelNodeRequest) (*pb.Node, error) {
	return editNode(ctx, g, req, model.LabelNode)
}

func (g *Gateway) TaintNode(ctx context.Context, req *pb.TaintNodeRequest) (*pb.Node, error) {
	return editNode(ctx, g, req, model.TaintNode)
}

func (g *Gateway) RemoveNode(ctx context.Context, req *pb.NodeRequest) (*pb.RemoveNodeResponse, error) {
	_, err := g.change(ctx, meta(ctx), func(v *fsm.View, m model.Meta) (*pb.Txn, error) {
		txn, _, err := model.RemoveNode(v, req, m)
		return txn, err
	})
	if err != nil {
		return nil, statusOf(err)
	}
	return &pb.RemoveNodeResponse{}, nil
}

func editNode[R proto.Message](ctx context.Context, g *Gateway, req R, admit func(model.Reader, R, model.Meta) (*pb.Txn, *pb.Node, error)) (*pb.Node, error) {
	var n *pb.Node
	answer, err := g.change(ctx, meta(ctx), func(v *fsm.View, m model.Meta) (txn *pb.Txn, err error) {
		txn, n, err = admit(v, req, m)
		return txn, err
	})
	if err != nil {
		return nil, statusOf(err)
	}
	if answer != nil {
		n.ResourceVersion = answer.Revision
	}
	return n, statusOf(g.addObserved(ctx, g.store.View(), n))
}
