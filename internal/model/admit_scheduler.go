package model

import (
	"cmp"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What a scheduler's configuration means where it says nothing.
const (
	defaultRebalanceMoves     = 5
	defaultRebalanceInterval  = 300
	defaultRebalanceThreshold = 20

	maxRebalanceMoves    = 10_000
	minRebalanceInterval = 10
	maxRebalanceInterval = 7 * 24 * 3600
)

// EffectiveSchedulerConfig is c, which may be nil, with the defaults filled in.
func EffectiveSchedulerConfig(c *pb.SchedulerConfig) *pb.SchedulerConfig {
	out := &pb.SchedulerConfig{}
	if c != nil {
		out = proto.CloneOf(c)
	}
	out.RebalanceMoves = cmp.Or(out.RebalanceMoves, defaultRebalanceMoves)
	out.RebalanceIntervalSeconds = cmp.Or(out.RebalanceIntervalSeconds, defaultRebalanceInterval)
	out.RebalanceThreshold = cmp.Or(out.RebalanceThreshold, defaultRebalanceThreshold)
	return out
}

// LoadSchedulerConfig is the configuration in force.
func LoadSchedulerConfig(v Reader) (*pb.SchedulerConfig, error) {
	stored := &pb.SchedulerConfig{}
	mod, _, err := Load(v, SchedulerKey, stored)
	if err != nil {
		return nil, err
	}
	out := EffectiveSchedulerConfig(stored)
	out.ResourceVersion = mod
	return out, nil
}

// SetSchedulerConfig replaces the configuration; with a resource_version, only that
// one. A nil transaction means that it is so already.
func SetSchedulerConfig(v Reader, req *pb.SchedulerConfig, m Meta) (*pb.Txn, *pb.SchedulerConfig, error) {
	var errs FieldErrors
	within := func(field string, n, least, most int32) {
		if n != 0 && (n < least || n > most) {
			errs.add(field, "%d is not allowed; allowed: %d to %d, or 0 for the default", n, least, most)
		}
	}
	within("rebalance_moves", req.RebalanceMoves, 1, maxRebalanceMoves)
	within("rebalance_interval_seconds", req.RebalanceIntervalSeconds, minRebalanceInterval, maxRebalanceInterval)
	within("rebalance_threshold", req.RebalanceThreshold, 1, 100)
	if req.ResourceVersion < 0 {
		errs.add("resource_version", "%d is negative; allowed: the version that was read, or 0 for any", req.ResourceVersion)
	}
	if err := errs.err(); err != nil {
		return nil, nil, err
	}
	old, err := LoadSchedulerConfig(v)
	if err != nil {
		return nil, nil, err
	}
	if req.ResourceVersion != 0 && req.ResourceVersion != old.ResourceVersion {
		return nil, nil, refuse(codes.Aborted, "the scheduler's configuration is at version %d, not %d: somebody changed it; read it again", old.ResourceVersion, req.ResourceVersion)
	}
	next := EffectiveSchedulerConfig(req)
	next.ResourceVersion = old.ResourceVersion
	if proto.Equal(old, next) {
		return nil, old, nil
	}
	stored := proto.CloneOf(req)
	stored.ResourceVersion = 0
	return &pb.Txn{
		Compare: []*pb.Compare{Unchanged(SchedulerKey, old.ResourceVersion)},
		Success: []*pb.RequestOp{
			Put(SchedulerKey, stored, 0),
			m.event(&pb.Event{Type: pb.EventType_SCHEDULER_CHANGED, Message: "scheduler: " + schedulerChange(old, next)}),
		},
	}, next, nil
}

// ResetSchedulerConfig brings the defaults back.
func ResetSchedulerConfig(v Reader, m Meta) (*pb.Txn, error) {
	old, err := LoadSchedulerConfig(v)
	if err != nil || old.ResourceVersion == 0 {
		return nil, err
	}
	message := "scheduler: set back to the defaults"
	if change := schedulerChange(old, EffectiveSchedulerConfig(nil)); change != "" {
		message += ": " + change
	}
	return &pb.Txn{
		Compare: []*pb.Compare{Unchanged(SchedulerKey, old.ResourceVersion)},
		Success: []*pb.RequestOp{Delete(SchedulerKey), m.event(&pb.Event{Type: pb.EventType_SCHEDULER_CHANGED, Message: message})},
	}, nil
}

// schedulerChange says what is different, in the words of `persys scheduler set`.
func schedulerChange(old, next *pb.SchedulerConfig) string {
	var parts []string
	add := func(name string, was, is any) {
		if was != is {
			parts = append(parts, fmt.Sprintf("%s=%v", name, is))
		}
	}
	add("rebalance", old.Rebalance, next.Rebalance)
	add("rebalance-moves", old.RebalanceMoves, next.RebalanceMoves)
	add("rebalance-interval", old.RebalanceIntervalSeconds, next.RebalanceIntervalSeconds)
	add("rebalance-threshold", old.RebalanceThreshold, next.RebalanceThreshold)
	add("no-preemption", old.NoPreemption, next.NoPreemption)
	return strings.Join(parts, " ")
}

// PutSchedulerConfig is SetSchedulerConfig of a document.
func PutSchedulerConfig(v Reader, document []byte, m Meta) (*pb.Txn, error) {
	given, d := &pb.SchedulerConfig{}, &decoder{}
	doc, err := oneDocument(document)
	if err != nil {
		return nil, err
	}
	if d.message(doc, given.ProtoReflect(), "", 0); len(d.problems) > 0 {
		return nil, d.problems
	}
	txn, _, err := SetSchedulerConfig(v, given, m)
	return txn, err
}
