package agent

import (
	"fmt"
	"slices"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// maxDrifts is how many findings wait to be told at most; what is more is counted
	// and not told.
	maxDrifts = 64
	// driftAgain is how long the same finding about a replica is not told again.
	driftAgain = time.Minute
)

// finding is something that is otherwise than wanted, by nobody's order.
type finding struct {
	kind    pb.DriftKind
	message string
}

// drifted compares what there is of a replica with what it was when all was well,
// which h remembers. It is pure; h afterwards remembers what it has found, so that
// it finds it once. known are instances that were there before.
func drifted(a *pb.Assignment, all []Instance, h history, known func(id string) bool) ([]finding, history) {
	var found []finding
	if a.GetDesiredState() == pb.DesiredState_DESIRED_STOPPED {
		running := runningOf(all)
		if len(running) > 0 && h.stopped {
			found = append(found, finding{pb.DriftKind_STATE_MISMATCH, "runs and is to be stopped; it is stopped again"})
		}
		h.stopped = len(running) == 0
		return found, h
	}
	current, stale := split(a, all)
	if h.instance != "" {
		if !slices.ContainsFunc(all, func(in Instance) bool { return in.ID == h.instance }) {
			found = append(found, finding{pb.DriftKind_MISSING_ON_AGENT, "is not there any more; it is made anew"})
			h.instance = ""
		}
		for _, in := range runningOf(stale) {
			switch {
			case known(in.ID):
			case in.Revision != a.GetRevision():
				found = append(found, finding{
					pb.DriftKind_REVISION_MISMATCH, fmt.Sprintf("one of revision %s runs, wanted is %s; it is removed", in.Revision, a.GetRevision()),
				})
			default:
				found = append(found, finding{pb.DriftKind_ORPHAN_ON_AGENT, "a second one runs; it is removed"})
			}
		}
	}
	if current != nil {
		h.instance = current.ID
	}
	return found, h
}

// Signals by which people end what runs: interrupt, kill, terminate.
var endedByHand = []int32{128 + 2, 128 + 9, 128 + 15}

// interfered reports whether somebody ended what was to go on running.
func interfered(in Instance) bool {
	return in.Stopped || !in.OutOfMemory && slices.Contains(endedByHand, in.ExitCode)
}

// drift counts and tells a finding.
func (r *reconciler) drift(now time.Time, key Key, f finding) {
	r.metrics.drifts.WithLabelValues(f.kind.String()).Inc()
	r.log.Warn("drift found", "replica", key.String(), "kind", f.kind.String(), "message", f.message)
	id := driftID{key, f.kind}
	if last, ok := r.drifts[id]; ok && now.Sub(last) < driftAgain {
		return
	}
	for old, at := range r.drifts {
		if now.Sub(at) >= driftAgain {
			delete(r.drifts, old)
		}
	}
	r.drifts[id] = now
	r.outbox.drift(&pb.Drift{WorkloadId: key.Workload, Replica: key.Replica, Kind: f.kind, Message: f.message})
}

type driftID struct {
	key  Key
	kind pb.DriftKind
}
