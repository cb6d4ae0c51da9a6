package model

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	maxWeight = 100
	// Each multiplies the kinds of nodes that a placement tells apart.
	maxSpreads            = 8
	maxWorkloadAffinities = 16
)

func checkPlacement(errs *FieldErrors, spec *pb.WorkloadSpec) {
	p := spec.Placement
	if spec.Kind == pb.WorkloadKind_GLOBAL {
		checkPlacementOfGlobal(errs, p)
	}
	for i, c := range p.GetConstraints() {
		checkConstraint(errs, fmt.Sprintf("placement.constraints[%d]", i), c)
	}
	checkLabels(errs, "placement.node_labels", p.GetNodeLabels())
	checkRange(errs, "placement.max_per_node", p.GetMaxPerNode(), 0, MaxReplicas)
	for i, a := range p.GetAffinities() {
		at := fmt.Sprintf("placement.affinities[%d]", i)
		checkConstraint(errs, at, &pb.Constraint{Label: a.Label, Operator: a.Operator, Values: a.Values})
		if a.Weight != nil && (*a.Weight == 0 || *a.Weight < -maxWeight || *a.Weight > maxWeight) {
			errs.add(at+".weight", "%d is out of range; allowed: 1 to %d, or -1 to -%d for nodes to keep away from", *a.Weight, maxWeight, maxWeight)
		}
	}
	checkSpread(errs, p.GetSpread())
	for i, a := range p.GetWorkloadAffinities() {
		checkWorkloadAffinity(errs, fmt.Sprintf("placement.workload_affinities[%d]", i), a)
	}
	if n := len(p.GetWorkloadAffinities()); n > maxWorkloadAffinities {
		errs.add("placement.workload_affinities", "has %d entries; allowed: %d", n, maxWorkloadAffinities)
	}
	checkPools(errs, p.GetPools())
	for i, t := range p.GetTolerations() {
		at := fmt.Sprintf("placement.tolerations[%d]", i)
		if t.Key != "" && !isLabelKey(t.Key) {
			errs.add(at+".key", "%q is not allowed; allowed: %s, or nothing for all taints", clip(t.Key), labelKeyAllowed)
		}
		checkLabelValue(errs, at+".value", t.GetValue())
	}
	seen := map[string]bool{}
	for i, id := range p.GetNodes() {
		at := fmt.Sprintf("placement.nodes[%d]", i)
		checkID(errs, at, id)
		if seen[id] {
			errs.add(at, "%q is listed twice", clip(id))
		}
		seen[id] = true
	}
}

func checkConstraintLabel(errs *FieldErrors, at, label string) {
	switch {
	case label == "":
		errs.add(at, "missing; allowed: the name of a node's label")
	case !isLabelKey(label):
		errs.add(at, "%q is not allowed; allowed: %s", clip(label), labelKeyAllowed)
	}
}

func checkConstraint(errs *FieldErrors, at string, c *pb.Constraint) {
	checkConstraintLabel(errs, at+".label", c.Label)
	n := len(c.Values)
	switch c.Operator {
	case pb.Constraint_IN, pb.Constraint_NOT_IN:
		if n == 0 {
			errs.add(at+".values", "missing; allowed: one value or more for operator %s", strings.ToLower(c.Operator.String()))
		}
		for i, v := range c.Values {
			checkLabelValue(errs, fmt.Sprintf("%s.values[%d]", at, i), v)
		}
	case pb.Constraint_EXISTS, pb.Constraint_NOT_EXISTS:
		if n > 0 {
			errs.add(at+".values", "%d given; allowed: none for operator %s", n, strings.ToLower(c.Operator.String()))
		}
	case pb.Constraint_GREATER, pb.Constraint_LESS:
		if n != 1 {
			errs.add(at+".values", "%d given; allowed: exactly one for operator %s", n, strings.ToLower(c.Operator.String()))
			return
		}
		if v, err := strconv.ParseFloat(c.Values[0], 64); err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
			errs.add(at+".values[0]", "%q is not a number; allowed: a number for operator %s", clip(c.Values[0]), strings.ToLower(c.Operator.String()))
		}
	}
}

// checkPlacementOfGlobal refuses what chooses between nodes: a global workload
// runs on all that match.
func checkPlacementOfGlobal(errs *FieldErrors, p *pb.Placement) {
	for _, f := range []struct {
		name  string
		given bool
	}{
		{"max_per_node", p.GetMaxPerNode() != 0},
		{"spread", len(p.GetSpread()) > 0},
		{"affinities", len(p.GetAffinities()) > 0},
		{"workload_affinities", len(p.GetWorkloadAffinities()) > 0},
	} {
		if f.given {
			errs.add("placement."+f.name, "not with kind global, which runs one replica on each matching node; allowed: leave it out")
		}
	}
}

func checkWorkloadAffinity(errs *FieldErrors, at string, a *pb.WorkloadAffinity) {
	switch {
	case a.Workload == "" && len(a.Labels) == 0:
		errs.add(at, "says of no workload; allowed: workload, an id, or labels")
	case a.Workload != "" && len(a.Labels) > 0:
		errs.add(at+".labels", "not with workload; allowed: one of them")
	case a.Workload != "":
		checkID(errs, at+".workload", a.Workload)
	}
	checkLabels(errs, at+".labels", a.Labels)
	if a.Topology != "" {
		checkConstraintLabel(errs, at+".topology", a.Topology)
	}
	checkRange(errs, at+".weight", a.Weight, 0, maxWeight)
}

func checkPools(errs *FieldErrors, pools []string) {
	seen := map[string]bool{}
	for i, pool := range pools {
		at := fmt.Sprintf("placement.pools[%d]", i)
		switch {
		case pool == AnyPool && len(pools) > 1:
			errs.add(at, "%q is all pools; allowed: alone", AnyPool)
		case pool != AnyPool:
			checkID(errs, at, pool)
		}
		if seen[pool] {
			errs.add(at, "%q is listed twice", clip(pool))
		}
		seen[pool] = true
	}
}

func checkSpread(errs *FieldErrors, spread []*pb.Spread) {
	if len(spread) > maxSpreads {
		errs.add("placement.spread", "has %d entries; allowed: %d", len(spread), maxSpreads)
	}
	seen := map[string]bool{}
	for i, s := range spread {
		at := fmt.Sprintf("placement.spread[%d]", i)
		checkConstraintLabel(errs, at+".label", s.Label)
		if seen[s.Label] {
			errs.add(at+".label", "%q is listed twice", clip(s.Label))
		}
		seen[s.Label] = true
		if s.Weight < 0 || s.Weight > maxWeight {
			errs.add(at+".weight", "%d is out of range; allowed: 1 to %d, 0 for the default of %d", s.Weight, maxWeight, defaultWeight)
		}
		checkRange(errs, at+".max_skew", s.MaxSkew, 0, MaxReplicas)
		if s.MaxSkew > 0 && len(s.Targets) > 0 {
			errs.add(at+".max_skew", "contradicts targets, which are not even; allowed: one of them")
		}
		checkTargets(errs, at, s.Targets)
	}
}

func checkTargets(errs *FieldErrors, at string, targets []*pb.SpreadTarget) {
	seen := map[string]bool{}
	total := 0
	for i, t := range targets {
		here := fmt.Sprintf("%s.targets[%d]", at, i)
		checkLabelValue(errs, here+".value", t.Value)
		if seen[t.Value] {
			errs.add(here+".value", "%q is listed twice", clip(t.Value))
		}
		seen[t.Value] = true
		checkRange(errs, here+".percent", t.Percent, 0, 100)
		total += int(t.Percent)
	}
	if total > 100 {
		errs.add(at+".targets", "add up to %d percent; allowed: at most 100", total)
	}
}
