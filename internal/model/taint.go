package model

import (
	"fmt"
	"slices"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// DefaultPool is the pool of nodes whose configuration names none, and of
	// workloads that ask for none.
	DefaultPool = "default"
	// AnyPool stands for all pools in a placement.
	AnyPool = "*"

	maxTaints     = 64
	taintAllowed  = "KEY=VALUE:EFFECT or KEY:EFFECT, where EFFECT is NoSchedule, PreferNoSchedule or NoExecute"
	noExecute     = "NoExecute"
	noSchedule    = "NoSchedule"
	preferNoSched = "PreferNoSchedule"
)

// PoolOf is the pool that a node is in.
func PoolOf(n *pb.Node) string {
	if n.GetPool() == "" {
		return DefaultPool
	}
	return n.GetPool()
}

// TaintsOf are the taints of a node, in order: those of its agent's
// configuration, and over them those that users set for the same key and effect.
func TaintsOf(n *pb.Node) []*pb.Taint {
	all := slices.Concat(n.GetUserTaints(), n.GetTaints())
	slices.SortStableFunc(all, compareTaints)
	return slices.CompactFunc(all, func(a, b *pb.Taint) bool { return compareTaints(a, b) == 0 })
}

// compareTaints is by what there can be one taint of.
func compareTaints(a, b *pb.Taint) int {
	if c := strings.Compare(a.GetKey(), b.GetKey()); c != 0 {
		return c
	}
	return int(a.GetEffect()) - int(b.GetEffect())
}

// FormatTaint is the inverse of ParseTaint.
func FormatTaint(t *pb.Taint) string {
	text := t.GetKey()
	if t.GetValue() != "" {
		text += "=" + t.GetValue()
	}
	effect := t.GetEffect().String()
	switch t.GetEffect() {
	case pb.TaintEffect_NO_SCHEDULE:
		effect = noSchedule
	case pb.TaintEffect_PREFER_NO_SCHEDULE:
		effect = preferNoSched
	case pb.TaintEffect_NO_EXECUTE:
		effect = noExecute
	}
	return text + ":" + effect
}

// ParseTaint reads "key=value:NoSchedule" and "key:NoExecute"; effects also in
// other spellings of their names.
func ParseTaint(text string) (*pb.Taint, error) {
	at := strings.LastIndexByte(text, ':')
	if at < 0 {
		return nil, fmt.Errorf("taint %q: no effect is given; allowed: %s", clip(text), taintAllowed)
	}
	effect, err := parseEnum(pb.TaintEffect(0).Descriptor(), text[at+1:])
	if err != nil {
		return nil, fmt.Errorf("taint %q: effect %w", clip(text), err)
	}
	key, value, _ := strings.Cut(text[:at], "=")
	t := &pb.Taint{Key: key, Value: value, Effect: pb.TaintEffect(effect)}
	return t, ValidateTaints("taint", []*pb.Taint{t})
}

// ValidateTaints says what is wrong with the taints of a node, as FieldErrors.
func ValidateTaints(path string, taints []*pb.Taint) error {
	var errs FieldErrors
	checkTaints(&errs, path, taints)
	return errs.err()
}

func checkTaints(errs *FieldErrors, path string, taints []*pb.Taint) {
	if len(taints) > maxTaints {
		errs.add(path, "has %d entries; allowed: %d", len(taints), maxTaints)
	}
	for i, t := range taints {
		at := fmt.Sprintf("%s[%d]", path, i)
		if !isLabelKey(t.GetKey()) {
			errs.add(at+".key", "%q is not allowed; allowed: %s", clip(t.GetKey()), labelKeyAllowed)
		}
		checkLabelValue(errs, at+".value", t.GetValue())
		if pb.TaintEffect_name[int32(t.GetEffect())] == "" {
			errs.add(at+".effect", "value %d is unknown to this version; allowed: %s", t.GetEffect(), strings.Join(enumNames(t.GetEffect().Descriptor()), ", "))
		}
		if slices.ContainsFunc(taints[:i], func(o *pb.Taint) bool { return compareTaints(o, t) == 0 }) {
			errs.add(at, "%q is listed twice", clip(FormatTaint(t)))
		}
	}
}

// ValidatePool says what is wrong with the name of a node's pool; none is the
// default one.
func ValidatePool(path, pool string) error {
	var errs FieldErrors
	if pool != "" {
		checkID(&errs, path, pool)
	}
	return errs.err()
}
