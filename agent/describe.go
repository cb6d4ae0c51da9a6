package agent

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// silenceTolerated is how long a runtime may give no answer before its work is
// reported as unknown: a daemon that is restarted takes seconds, and what it
// runs may well live on.
const silenceTolerated = 10 * time.Second

// fencedCode is the reason of exclusive work that the node stopped for its lease.
const fencedCode = pb.ReasonCode_NODE_LOST

// observation is what the state of one replica is told from.
type observation struct {
	now  time.Time
	node string
	// address of the node.
	address string
	key     Key
	item    *pb.DesiredItem
	// told: a server took it out of the set.
	told    bool
	actual  []Instance
	history history
	// doing is what is under way; waiting is what a start waits for.
	doing   *action
	waiting string
	// silent is since when its runtime has not answered; zero: it answers.
	// missing: this node has no such runtime.
	silent  time.Time
	missing bool
	// previous is what was said last.
	previous *pb.Replica
}

// describe gives the replica's state as it is reported; nil is "as before, or
// nothing to say". It is pure.
func describe(o observation) *pb.Replica {
	a := o.item.GetAssignment()
	r := &pb.Replica{WorkloadId: o.key.Workload, Replica: o.key.Replica, NodeId: o.node}
	var in *Instance
	if o.item != nil {
		r.Generation, r.Revision, r.Ports, r.Address = a.GetGeneration(), a.GetRevision(), a.GetPorts(), o.address
		in, _ = split(a, o.actual)
	} else if newest := newestOf(o.actual); newest != nil {
		in = newest
		r.Generation, r.Revision, r.Ports, r.Address = in.Generation, in.Revision, in.Ports, o.address
	} else {
		return nil
	}
	h := o.history.of(r.Generation)
	r.Restarts = h.restarts
	if in != nil {
		o.instance(r, in)
	}
	switch {
	case o.missing && o.item != nil:
		o.say(r, pb.State_FAILED, pb.ReasonCode_RUNTIME_RESOURCE_MISSING, fmt.Sprintf("node %s has no runtime for %s", o.node, a.GetType()), true)
	case !o.silent.IsZero():
		if o.now.Sub(o.silent) < silenceTolerated {
			return nil
		}
		o.say(r, pb.State_UNKNOWN, pb.ReasonCode_RUNTIME_UNAVAILABLE, "the runtime does not answer", true)
	case o.item == nil && !o.told:
		r.State = phaseState(in.Phase)
	case o.item == nil || a.GetDesiredState() == pb.DesiredState_DESIRED_DELETED:
		r.State = pb.State_DELETING
		if len(o.actual) == 0 {
			r.State = pb.State_DELETED
		}
	case a.GetDesiredState() == pb.DesiredState_DESIRED_STOPPED:
		r.State = pb.State_STOPPED
		if len(runningOf(o.actual)) > 0 {
			r.State = pb.State_RUNNING
		}
	default:
		o.wanted(r, in, h)
	}
	if r.Reason != nil {
		r.Reason.LastTransition = timestamppb.New(o.now)
		if p := o.previous.GetReason(); p.GetCode() == r.Reason.Code && o.previous.GetState() == r.State && o.previous.GetGeneration() == r.Generation {
			r.Reason.LastTransition = p.GetLastTransition()
		}
	}
	r.LastTransition = timestamppb.New(o.now)
	if o.previous.GetState() == r.State && o.previous.GetGeneration() == r.Generation {
		r.LastTransition = o.previous.GetLastTransition()
	}
	return r
}

// wanted describes what is to run.
func (o observation) wanted(r *pb.Replica, in *Instance, h history) {
	switch {
	case h.failure != nil:
		r.State = pb.State_FAILED
		if !h.retryAt.IsZero() {
			r.State = pb.State_RETRY_PENDING
		}
		r.Reason = &pb.Reason{Code: h.failure.Code, Message: h.failure.Error(), Retryable: h.failure.Retryable}
		if !h.retryAt.IsZero() {
			r.Reason.NextRetryAt = timestamppb.New(h.retryAt)
		}
		if len(runningOf(o.actual)) > 0 {
			r.Reason.Message += "; what ran before still runs"
		}
	case o.doing != nil && o.doing.verb == start:
		r.State = pb.State_SCHEDULED
		if len(o.doing.instances) > 0 {
			r.State = pb.State_UPDATING
		}
		if o.doing.again {
			r.State = pb.State_RETRY_PENDING
			r.Reason = proto.CloneOf(o.previous.GetReason())
		}
	case in == nil || in.Phase == Created:
		o.say(r, pb.State_SCHEDULED, pb.ReasonCode_REASON_UNSPECIFIED, o.waiting, true)
	case in.Phase == Running:
		r.State = pb.State_RUNNING
	case h.stopped && o.waiting != "":
		o.say(r, pb.State_RETRY_PENDING, fencedCode, "stopped by this node: "+o.waiting, true)
	case h.stopped:
		r.State = pb.State_SCHEDULED
	default:
		o.ended(r, in, h)
	}
}

// ended describes a run that is over.
func (o observation) ended(r *pb.Replica, in *Instance, h history) {
	code, message := pb.ReasonCode_EXITED, fmt.Sprintf("exited with code %d", in.ExitCode)
	switch {
	case in.OutOfMemory:
		code, message = pb.ReasonCode_OUT_OF_MEMORY, "killed for going over its memory limit"
	case in.StartError != "":
		code, message = pb.ReasonCode_RUNTIME_ERROR, in.StartError
	}
	switch endingOf(*in, o.item.GetSpec(), h) {
	case completed:
		r.State = pb.State_COMPLETED
	case failedForGood:
		never := o.item.GetSpec().GetRestart().GetCondition() == pb.RestartPolicy_NEVER
		if !never {
			message += fmt.Sprintf("; %d attempts were made", h.crashes)
		}
		o.say(r, pb.State_FAILED, code, message, !never)
	case restarts:
		o.say(r, pb.State_RETRY_PENDING, code, message, true)
		if o.waiting != "" {
			r.Reason.Message += "; " + o.waiting
		} else if !h.retryAt.IsZero() {
			r.Reason.NextRetryAt = timestamppb.New(h.retryAt)
		}
	}
}

// instance fills in what the runtime shows.
func (o observation) instance(r *pb.Replica, in *Instance) {
	r.RuntimeId, r.ImageDigest = in.ID, in.ImageDigest
	if in.Address != "" {
		r.Address = in.Address
	}
	if !in.Started.IsZero() {
		r.StartTime = timestamppb.New(in.Started)
	}
	if in.Phase == Exited {
		r.ExitCode = &in.ExitCode
	}
}

// say sets state and reason; no reason where there is neither code nor message.
func (o observation) say(r *pb.Replica, state pb.State, code pb.ReasonCode, message string, retryable bool) {
	r.State = state
	if code != pb.ReasonCode_REASON_UNSPECIFIED || message != "" {
		r.Reason = &pb.Reason{Code: code, Message: message, Retryable: retryable}
	}
}

func newestOf(all []Instance) *Instance {
	var newest *Instance
	for i := range all {
		if newest == nil || all[i].Generation > newest.Generation {
			newest = &all[i]
		}
	}
	return newest
}

func phaseState(p Phase) pb.State {
	if p == Running {
		return pb.State_RUNNING
	}
	return pb.State_STOPPED
}
