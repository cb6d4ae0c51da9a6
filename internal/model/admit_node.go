package model

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The functions below change a node. A nil transaction means that it is as
// asked for already. The node is as it will be; its resource_version is the one
// that was read.

// maxNodeLabels bounds what users put on one node.
const maxNodeLabels = 256

// nodeEdit is what users have done to a node, and how events say it.
type nodeEdit struct {
	message string
	edit    func(*pb.Node)
}

var (
	cordonEdit   = nodeEdit{"cordoned", func(n *pb.Node) { n.Unschedulable = true }}
	uncordonEdit = nodeEdit{"uncordoned", func(n *pb.Node) {
		n.Unschedulable, n.Draining, n.DrainDeadline = false, false, nil
		if n.State == pb.NodeState_DRAINING {
			n.State = pb.NodeState_READY
		}
	}}
)

// maxDrainDeadline bounds how long a drain may be put off.
const maxDrainDeadline = 365 * 24 * time.Hour

// drainEdit has the node emptied by a time; nil: in its own time.
func drainEdit(deadline *timestamppb.Timestamp) nodeEdit {
	message := "drain asked for"
	if deadline != nil {
		message += ", by " + deadline.AsTime().UTC().Format(time.RFC3339)
	}
	return nodeEdit{message, func(n *pb.Node) {
		n.Unschedulable, n.Draining, n.DrainDeadline = true, true, deadline
		if n.State == pb.NodeState_READY {
			n.State = pb.NodeState_DRAINING
		}
	}}
}

// CordonNode keeps new work away; what runs stays.
func CordonNode(v Reader, req *pb.NodeRequest, m Meta) (*pb.Txn, *pb.Node, error) {
	return editNode(v, req.Id, m, cordonEdit.message, cordonEdit.edit)
}

// UncordonNode undoes cordon and drain.
func UncordonNode(v Reader, req *pb.NodeRequest, m Meta) (*pb.Txn, *pb.Node, error) {
	return editNode(v, req.Id, m, uncordonEdit.message, uncordonEdit.edit)
}

// DrainNode cordons and has the work moved elsewhere. A drain that is under way
// gets another deadline, or none.
func DrainNode(v Reader, req *pb.DrainNodeRequest, m Meta) (*pb.Txn, *pb.Node, error) {
	var deadline *timestamppb.Timestamp
	if req.Deadline != nil {
		d := req.Deadline.AsDuration()
		if req.Deadline.CheckValid() != nil || d < 0 || d > maxDrainDeadline {
			return nil, nil, invalid("deadline", "is not allowed; allowed: 0s, which is at once, to %d days, or leave it out for none", int(maxDrainDeadline.Hours()/24))
		}
		deadline = timestamppb.New(m.Now.Add(d))
	}
	edit := drainEdit(deadline)
	return editNode(v, req.Id, m, edit.message, edit.edit)
}

// LabelNode sets and removes labels that users gave; those of the agent's own
// configuration can be covered but not removed.
func LabelNode(v Reader, req *pb.LabelNodeRequest, m Meta) (*pb.Txn, *pb.Node, error) {
	var errs FieldErrors
	if len(req.Set)+len(req.Remove) == 0 {
		errs.add("set", "missing; allowed: labels to set, or names in remove")
	}
	checkLabels(&errs, "set", req.Set)
	for i, k := range req.Remove {
		at := fmt.Sprintf("remove[%d]", i)
		if !isLabelKey(k) {
			errs.add(at, "%q is not allowed; allowed: %s", clip(k), labelKeyAllowed)
		}
		if _, both := req.Set[k]; both {
			errs.add(at, "%q is to be set too; allowed: one of them", clip(k))
		}
	}
	if err := errs.err(); err != nil {
		return nil, nil, err
	}
	n, err := loadNode(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	for _, k := range req.Remove {
		_, own := n.Labels[k]
		_, users := n.UserLabels[k]
		if own && !users {
			return nil, nil, refuse(codes.FailedPrecondition, "label %q of node %q is in its agent's configuration; change it there, or set another value here", k, req.Id)
		}
	}
	edit := labelEdit(req)
	return editNode(v, req.Id, m, edit.message, edit.edit)
}

// TaintNode sets and removes taints that users gave; those of the agent's own
// configuration can be covered but not removed.
func TaintNode(v Reader, req *pb.TaintNodeRequest, m Meta) (*pb.Txn, *pb.Node, error) {
	var errs FieldErrors
	if len(req.Set)+len(req.Remove) == 0 {
		errs.add("set", "missing; allowed: taints to set, or keys in remove")
	}
	checkTaints(&errs, "set", req.Set)
	for i, key := range req.Remove {
		at := fmt.Sprintf("remove[%d]", i)
		if !isLabelKey(key) {
			errs.add(at, "%q is not allowed; allowed: %s", clip(key), labelKeyAllowed)
		}
		if slices.ContainsFunc(req.Set, func(t *pb.Taint) bool { return t.GetKey() == key }) {
			errs.add(at, "%q is to be set too; allowed: one of them", clip(key))
		}
	}
	if err := errs.err(); err != nil {
		return nil, nil, err
	}
	n, err := loadNode(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	for _, key := range req.Remove {
		has := func(t *pb.Taint) bool { return t.GetKey() == key }
		if slices.ContainsFunc(n.Taints, has) && !slices.ContainsFunc(n.UserTaints, has) {
			return nil, nil, refuse(codes.FailedPrecondition, "taint %q of node %q is in its agent's configuration; change it there", key, req.Id)
		}
	}
	edit := taintEdit(req)
	return editNode(v, req.Id, m, edit.message, edit.edit)
}

func taintEdit(req *pb.TaintNodeRequest) nodeEdit {
	var parts []string
	for _, t := range req.Set {
		parts = append(parts, FormatTaint(t))
	}
	for _, key := range req.Remove {
		parts = append(parts, key+"-")
	}
	slices.Sort(parts)
	return nodeEdit{"taints changed: " + strings.Join(parts, " "), func(n *pb.Node) {
		// The first of two counts.
		kept := slices.DeleteFunc(slices.Clone(n.UserTaints), func(t *pb.Taint) bool { return slices.Contains(req.Remove, t.GetKey()) })
		all := slices.Concat(req.Set, kept)
		slices.SortStableFunc(all, compareTaints)
		n.UserTaints = slices.CompactFunc(all, func(a, b *pb.Taint) bool { return compareTaints(a, b) == 0 })
	}}
}

func labelEdit(req *pb.LabelNodeRequest) nodeEdit {
	return nodeEdit{"labels changed: " + labelChange(req), func(n *pb.Node) {
		if n.UserLabels == nil {
			n.UserLabels = map[string]string{}
		}
		maps.Copy(n.UserLabels, req.Set)
		for _, k := range req.Remove {
			delete(n.UserLabels, k)
		}
	}}
}

func labelChange(req *pb.LabelNodeRequest) string {
	var parts []string
	for _, k := range sortedKeys(req.Set) {
		parts = append(parts, k+"="+req.Set[k])
	}
	for _, k := range slices.Sorted(slices.Values(req.Remove)) {
		parts = append(parts, k+"-")
	}
	return strings.Join(parts, " ")
}

// RemoveNode forgets a node that is gone. A node that holds a lease is refused:
// it would be back with its next word.
func RemoveNode(v Reader, req *pb.NodeRequest, m Meta) (*pb.Txn, *pb.Node, error) {
	n, err := loadNode(v, req.Id)
	if err != nil {
		return nil, nil, err
	}
	_, leased := v.Get(NodeLeaseKey(req.Id))
	if leased || n.State == pb.NodeState_READY || n.State == pb.NodeState_DRAINING {
		return nil, nil, refuse(codes.FailedPrecondition, "node %q is running; drain it, stop its agent and wait until it is not ready", req.Id)
	}
	key := NodeKey(req.Id)
	return &pb.Txn{
		Compare: []*pb.Compare{Unchanged(key, n.ResourceVersion), Missing(NodeLeaseKey(req.Id))},
		Success: []*pb.RequestOp{
			Delete(key),
			m.event(&pb.Event{Type: pb.EventType_NODE_CHANGED, NodeId: req.Id, Message: "node removed"}),
		},
	}, n, nil
}

func loadNode(v Reader, id string) (*pb.Node, error) {
	var errs FieldErrors
	if checkID(&errs, "id", id); len(errs) > 0 {
		return nil, errs
	}
	n := &pb.Node{}
	mod, ok, err := Load(v, NodeKey(id), n)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, refuse(codes.NotFound, "there is no node %q", id)
	}
	n.ResourceVersion = mod
	return n, nil
}

func editNode(v Reader, id string, m Meta, message string, edit func(*pb.Node)) (*pb.Txn, *pb.Node, error) {
	n, err := loadNode(v, id)
	if err != nil {
		return nil, nil, err
	}
	next := proto.CloneOf(n)
	edit(next)
	if proto.Equal(n, next) {
		return nil, n, nil
	}
	if len(next.UserLabels) > maxNodeLabels {
		return nil, nil, refuse(codes.FailedPrecondition, "node %q would have %d labels; allowed: %d", id, len(next.UserLabels), maxNodeLabels)
	}
	if len(next.UserTaints) > maxTaints {
		return nil, nil, refuse(codes.FailedPrecondition, "node %q would have %d taints; allowed: %d", id, len(next.UserTaints), maxTaints)
	}
	if next.State != n.State {
		next.LastTransition = timestamppb.New(m.Now)
	}
	key, stored := NodeKey(id), proto.CloneOf(next)
	stored.ResourceVersion = 0
	return &pb.Txn{
		Compare: []*pb.Compare{Unchanged(key, n.ResourceVersion)},
		Success: []*pb.RequestOp{
			Put(key, stored, 0),
			m.event(&pb.Event{Type: pb.EventType_NODE_CHANGED, NodeId: id, Message: message}),
		},
	}, next, nil
}
