package scheduler

import (
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Plan is what to do now: data, with nothing left to decide.
type Plan struct {
	// The keyspace revision that it was decided on.
	Revision int64
	// To be proposed in this order. Whichever of them are refused, the others
	// leave no node over-committed: what a step frees, no other step of the plan
	// uses.
	Steps []Step
	// When to decide again though nothing has changed; zero: not at all.
	Wake time.Time
	// There is more to do than the options allow for one plan: decide again as
	// soon as the steps are assumed or committed.
	More bool
}

// Step is one transaction of a plan. It compares what the decision relied on,
// save the leader's epoch, which the proposer adds.
type Step struct {
	Workload string
	Txn      *pb.Txn
	Summary  string

	effects []effect
	// Status that it writes; nil for none.
	status *pb.WorkloadStatus
	// Likewise, the record of a rollout.
	rollout *pb.Rollout
	// It deletes the workload's record, or takes it back to an earlier revision, or
	// starts or deletes runs of it.
	leaves, rewrites, runs bool
	// With it, everything that is to be done about the workload now is done.
	last bool
}

// effect is what a step does to one replica.
type effect struct {
	// Empty: the step's own.
	workload string
	number   int32
	next     assumption
}

// confirmation is a step that is committed at a revision.
type confirmation struct {
	step     Step
	revision int64
}

// Assume makes the picture behave as if the step were committed, so that the
// next decision can be made while it is proposed: what it reserves is
// reserved, and what it touches is left alone until Confirm or Rollback. What it
// frees is not free yet.
func (p *Picture) Assume(s Step) {
	p.assumed++
	w := p.workloads[s.Workload]
	if w == nil {
		return
	}
	for _, e := range s.effects {
		of := p.workloadOf(e, w)
		if of == nil {
			continue
		}
		r := of.replica(e.number)
		next := e.next
		if r.assignment.reserves {
			p.countPresence(of, r.assignment.node, presence{settled: -r.settled()}, true)
		}
		r.next = &next
		if next.reserves {
			p.countPresence(of, next.node, presence{all: 1}, true)
			next.node.take(next.needs, next.ports)
			next.node.equip(next.equipment)
			p.index.update(next.node)
		}
	}
	if s.status != nil {
		w.assumed = s.status
	}
	if s.rollout != nil {
		w.assumedRollout = s.rollout
	}
	w.leaving, w.rewriting = w.leaving || s.leaves, w.rewriting || s.rewrites || s.runs
	if s.last {
		p.dirty.remove(w)
	}
}

// Confirm ends the assumption of a step that was committed at revision: from
// there on the picture shows it itself.
func (p *Picture) Confirm(s Step, revision int64) {
	p.assumed--
	p.confirmed = append(p.confirmed, confirmation{s, revision})
	p.settle()
}

// Rollback ends the assumption of a step that was refused.
func (p *Picture) Rollback(s Step) {
	p.assumed--
	p.unassume(s)
	p.thin()
}

// settle ends the assumptions of confirmed steps that the picture has reached.
func (p *Picture) settle() {
	later := p.confirmed[:0]
	for _, c := range p.confirmed {
		if c.revision <= p.revision {
			p.unassume(c.step)
		} else {
			later = append(later, c)
		}
	}
	clear(p.confirmed[len(later):])
	p.confirmed = later
	p.thin()
}

func (p *Picture) unassume(s Step) {
	w := p.workloads[s.Workload]
	for _, e := range s.effects {
		of := p.workloadOf(e, w)
		if of == nil {
			continue
		}
		if r := of.find(e.number); r != nil && r.next != nil && r.next.generation == e.next.generation {
			p.dropAssumed(r)
			r.next = nil
			if r.assignment.reserves {
				p.countPresence(of, r.assignment.node, presence{settled: 1}, true)
			}
			if r.assignment.reserves && r.over() {
				p.unreserve(r)
			}
			p.forgetReplica(r)
		}
		if of != w && p.workloads[of.id] == of {
			p.touch(of)
		}
	}
	if w == nil {
		return
	}
	if s.status != nil && w.assumed == s.status {
		w.assumed = nil
	}
	if s.rollout != nil && w.assumedRollout == s.rollout {
		w.assumedRollout = nil
	}
	if s.leaves {
		w.leaving = false
	}
	if s.rewrites || s.runs {
		w.rewriting = false
	}
	if p.workloads[s.Workload] == w {
		p.touch(w)
	}
}

// workloadOf is the workload that an effect of w's step is on.
func (p *Picture) workloadOf(e effect, w *workload) *workload {
	if e.workload == "" {
		return w
	}
	return p.workloads[e.workload]
}
