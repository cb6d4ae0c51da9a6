package model

import (
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Defaults of an update strategy.
const (
	DefaultMinHealthySeconds       = 10
	DefaultHealthyDeadlineSeconds  = 300
	DefaultProgressDeadlineSeconds = 600

	maxHealthySeconds  = 24 * 3600
	maxProgressSeconds = 7 * 24 * 3600
)

// MinHealthy is how many of so many replicas have to serve while an update or a
// drain goes on. A percentage is rounded up; but where no surge replica can stand
// in, it leaves one that may be replaced, however few there are.
func MinHealthy(text string, surge, replicas int32) int32 {
	n, percent, err := parseMinHealthy(text)
	if err != nil {
		return 0
	}
	if percent {
		n = int32((int64(n)*int64(replicas) + 99) / 100)
	}
	n = min(n, replicas)
	if surge == 0 {
		n = min(n, replicas-1)
	}
	return max(0, n)
}

// parseMinHealthy reads a number or a percentage; nothing is 0.
func parseMinHealthy(s string) (n int32, percent bool, err error) {
	if s == "" {
		return 0, false, nil
	}
	digits, percent := strings.CutSuffix(s, "%")
	most := int64(MaxReplicas)
	if percent {
		most = 100
	}
	value, err := strconv.ParseUint(digits, 10, 31)
	if err != nil || int64(value) > most {
		return 0, false, fmt.Errorf("%q is neither a number of replicas nor a percentage; allowed: 0 to %d, 0%% to 100%%", clip(s), MaxReplicas)
	}
	return int32(value), percent, nil
}

// normalizeUpdate leaves out, rather than writes, the defaults that servers of
// the version before refuse.
func normalizeUpdate(u *pb.UpdateStrategy) {
	if u.MaxParallel == 0 {
		u.MaxParallel = defaultMaxParallel
	}
	if n, percent, err := parseMinHealthy(u.MinHealthy); err == nil {
		u.MinHealthy = ""
		if n > 0 {
			u.MinHealthy = strconv.Itoa(int(n))
			if percent {
				u.MinHealthy += "%"
			}
		}
	}
	for _, x := range []struct {
		field *(*int32)
		value int32
	}{
		{&u.MinHealthySeconds, DefaultMinHealthySeconds},
		{&u.HealthyDeadlineSeconds, DefaultHealthyDeadlineSeconds},
		{&u.ProgressDeadlineSeconds, DefaultProgressDeadlineSeconds},
	} {
		if *x.field != nil && **x.field == x.value {
			*x.field = nil
		}
	}
}

// orDefault is a value that may have been left out.
func orDefault(value *int32, otherwise int32) int32 {
	if value == nil {
		return otherwise
	}
	return *value
}

// HealthySeconds is how long a replica has to have run to count as healthy, and
// by when it has to be so.
func HealthySeconds(u *pb.UpdateStrategy) (least, deadline int32) {
	if u == nil {
		return DefaultMinHealthySeconds, DefaultHealthyDeadlineSeconds
	}
	return orDefault(u.MinHealthySeconds, DefaultMinHealthySeconds), orDefault(u.HealthyDeadlineSeconds, DefaultHealthyDeadlineSeconds)
}

// ProgressSeconds is after how long without progress an update has failed; 0:
// never.
func ProgressSeconds(u *pb.UpdateStrategy) int32 {
	if u == nil {
		return DefaultProgressDeadlineSeconds
	}
	return orDefault(u.ProgressDeadlineSeconds, DefaultProgressDeadlineSeconds)
}

// checkUpdate refuses what contradicts itself, and what could never get on.
func checkUpdate(errs *FieldErrors, spec *pb.WorkloadSpec) {
	u := spec.Update
	if n := u.GetMaxParallel(); n < 0 {
		errs.add("update.max_parallel", "%d is negative; allowed: 1 or more, 0 for the default of 1", n)
	}
	if u == nil {
		return
	}
	if spec.Kind != pb.WorkloadKind_SERVICE {
		checkUpdateOfKind(errs, spec)
	}
	checkRange(errs, "update.max_surge", u.MaxSurge, 0, MaxReplicas)
	checkRange(errs, "update.canary", u.Canary, 0, MaxReplicas)
	if u.AutoPromote && u.Canary == 0 {
		errs.add("update.auto_promote", "there is no canary that could be promoted; allowed: with update.canary 1 or more, or leave it out")
	}
	checkDeadlines(errs, u)
	if _, _, err := parseMinHealthy(u.MinHealthy); err != nil {
		errs.add("update.min_healthy", "%v", err)
		return
	}
	checkMinHealthy(errs, spec)
}

// checkUpdateOfKind refuses what is for services only.
func checkUpdateOfKind(errs *FieldErrors, spec *pb.WorkloadSpec) {
	u, kind := spec.Update, strings.ToLower(spec.Kind.String())
	refuse := func(field string, given bool) {
		if given {
			errs.add("update."+field, "not with kind %s; allowed: leave it out", kind)
		}
	}
	refuse("max_surge", u.MaxSurge != 0)
	refuse("canary", u.Canary != 0)
	if spec.Kind == pb.WorkloadKind_JOB {
		refuse("min_healthy", u.MinHealthy != "")
		refuse("min_healthy_seconds", u.MinHealthySeconds != nil)
		refuse("healthy_deadline_seconds", u.HealthyDeadlineSeconds != nil)
		refuse("progress_deadline_seconds", u.ProgressDeadlineSeconds != nil)
		refuse("auto_rollback", u.AutoRollback)
	}
}

func checkDeadlines(errs *FieldErrors, u *pb.UpdateStrategy) {
	least, deadline := HealthySeconds(u)
	progress := ProgressSeconds(u)
	before := len(*errs)
	checkRange(errs, "update.min_healthy_seconds", least, 0, maxHealthySeconds)
	checkRange(errs, "update.healthy_deadline_seconds", deadline, 1, maxHealthySeconds)
	checkRange(errs, "update.progress_deadline_seconds", progress, 0, maxProgressSeconds)
	if len(*errs) > before {
		return
	}
	for _, x := range []struct {
		field string
		given *int32
		value int32
		more  string
	}{
		{"healthy_deadline_seconds", u.HealthyDeadlineSeconds, deadline, ""},
		{"progress_deadline_seconds", u.ProgressDeadlineSeconds, progress, ", or 0 for none"},
	} {
		if x.value > least || x.more != "" && x.value == 0 {
			continue
		}
		what := strconv.Itoa(int(x.value))
		if x.given == nil {
			what += ", the default,"
		}
		errs.add("update."+x.field, "%s is not after min_healthy_seconds %d, so no replica could be healthy in time; allowed: more than %d%s", what, least, least, x.more)
	}
}

// checkMinHealthy refuses a bound that is never kept, or under which nothing could
// be replaced. With few replicas a percentage is no such bound: see MinHealthy.
func checkMinHealthy(errs *FieldErrors, spec *pb.WorkloadSpec) {
	u := spec.Update
	n, percent, err := parseMinHealthy(u.GetMinHealthy())
	replicas := orDefault(spec.Replicas, 1)
	switch {
	case err != nil || n == 0:
	case percent && n == 100 && u.MaxSurge == 0:
		errs.add("update.min_healthy", "100%% with max_surge 0 lets no replica be replaced; allowed: less, or max_surge 1 or more")
	case percent || spec.Kind == pb.WorkloadKind_GLOBAL || replicas == 0:
	case n > replicas:
		errs.add("update.min_healthy", "%d is more than the %d replicas that there are; allowed: at most %d", n, replicas, replicas)
	case n == replicas && u.MaxSurge == 0:
		errs.add("update.min_healthy", "%d of %d replicas with max_surge 0 lets none be replaced; allowed: at most %d, or max_surge 1 or more", n, replicas, replicas-1)
	}
}

// Restored is w with what makes a replica what it is as it was at revision r:
// replicas, placement, update, priority and labels stay. Canaries have had their
// say about r before.
func Restored(w *pb.Workload, r *pb.Revision) *pb.Workload {
	next, old := proto.CloneOf(w), proto.CloneOf(r.Spec)
	s := next.Spec
	s.Type, s.Resources, s.Restart, s.Exclusive, s.Env, s.Spec = old.Type, old.Resources, old.Restart, old.Exclusive, old.Env, old.Spec
	next.Revision, next.PromotedRevision = r.Revision, r.Revision
	return next
}
