package scheduler

import (
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// calmDown demands that in whatever state it is, a cluster in which nothing happens
// but what agents do at once comes to rest: nothing is decided any more, and nothing
// is to be looked at again.
func (m *machine) calmDown() {
	const patience = 400
	for range patience {
		plan := m.settle(nil)
		m.checkExclusive()
		before := m.revision
		m.agents()
		m.checkExclusive()
		switch {
		case m.revision != before:
		case plan.Wake.IsZero():
			// Nobody waits for nothing but to be looked at.
			p := m.rebuilt()
			p.evenSince = m.picture.evenSince
			if more := planText(m.world, Decide(p, m.now, m.opt)); more != "" {
				m.t.Fatalf("a picture that is built anew finds something to do:\n%s\n%s", more, dump(p))
			}
			return
		default:
			m.now = plan.Wake
		}
	}
	m.t.Fatalf("no calm:\n%s", dump(m.picture))
}

// goOn does what users do about updates that wait for them or have failed, and
// reports whether there were any.
func (m *machine) goOn() bool {
	any := false
	for _, id := range workloadNames {
		w, r := &pb.Workload{}, &pb.Rollout{}
		if !m.load(model.WorkloadKey(id), w) || !m.load(model.RolloutKey(id), r) || w.Spec.DesiredState != pb.DesiredState_DESIRED_RUNNING ||
			w.Spec.Kind == pb.WorkloadKind_JOB {
			continue
		}
		switch {
		case r.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION:
			m.changeWorkload(id, func(w *pb.Workload) { w.PromotedRevision = w.Revision })
		case r.State == pb.RolloutState_ROLLOUT_FAILED && len(w.Spec.GetContainer().Ports) == 0:
			m.changeWorkload(id, func(w *pb.Workload) { w.RestartGeneration++ })
		default:
			continue
		}
		any = true
	}
	return any
}
