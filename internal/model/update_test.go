package model

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestValidateUpdate(t *testing.T) {
	const run = ", container: {image: nginx}}"
	for in, want := range map[string]string{
		"{id: web, update: {max_surge: -1}" + run:                                                        "update.max_surge: -1 is out of range; allowed: 0 to 10000",
		"{id: web, update: {canary: -1}" + run:                                                           "update.canary: -1 is out of range",
		"{id: web, update: {auto_promote: true}" + run:                                                   "update.auto_promote: there is no canary that could be promoted",
		"{id: web, update: {min_healthy: most}" + run:                                                    `update.min_healthy: "most" is neither a number of replicas nor a percentage; allowed: 0 to 10000, 0% to 100%`,
		"{id: web, update: {min_healthy: 101%}" + run:                                                    `update.min_healthy: "101%" is neither`,
		"{id: web, update: {min_healthy: -1}" + run:                                                      `update.min_healthy: "-1" is neither`,
		"{id: web, replicas: 4, update: {min_healthy: 100%}" + run:                                       "update.min_healthy: 100% with max_surge 0 lets no replica be replaced; allowed: less, or max_surge 1 or more",
		"{id: web, replicas: 4, update: {min_healthy: 4}" + run:                                          "update.min_healthy: 4 of 4 replicas with max_surge 0 lets none be replaced; allowed: at most 3, or max_surge 1 or more",
		"{id: web, replicas: 4, update: {min_healthy: 5, max_surge: 2}" + run:                            "update.min_healthy: 5 is more than the 4 replicas that there are",
		"{id: web, update: {min_healthy: 1}" + run:                                                       "update.min_healthy: 1 of 1 replicas",
		"{id: web, kind: global, update: {min_healthy: 100%}" + run:                                      "update.min_healthy: 100% with max_surge 0",
		"{id: web, update: {min_healthy_seconds: -1}" + run:                                              "update.min_healthy_seconds: -1 is out of range",
		"{id: web, update: {healthy_deadline_seconds: 0}" + run:                                          "update.healthy_deadline_seconds: 0 is out of range; allowed: 1 to 86400",
		"{id: web, update: {healthy_deadline_seconds: 10}" + run:                                         "update.healthy_deadline_seconds: 10 is not after min_healthy_seconds 10, so no replica could be healthy in time; allowed: more than 10",
		"{id: web, update: {progress_deadline_seconds: 5}" + run:                                         "update.progress_deadline_seconds: 5 is not after min_healthy_seconds 10, so no replica could be healthy in time; allowed: more than 10, or 0 for none",
		"{id: web, update: {min_healthy_seconds: 400}" + run:                                             "update.healthy_deadline_seconds: 300, the default, is not after min_healthy_seconds 400",
		"{id: web, kind: global, update: {canary: 1}" + run:                                              "update.canary: not with kind global",
		"{id: web, kind: global, update: {max_surge: 1}" + run:                                           "update.max_surge: not with kind global",
		"{id: web, kind: job, update: {canary: 1, auto_promote: true}" + run:                             "update.canary: not with kind job",
		"{id: web, kind: job, update: {min_healthy: 50%}" + run:                                          "update.min_healthy: not with kind job",
		"{id: web, kind: job, update: {auto_rollback: true}" + run:                                       "update.auto_rollback: not with kind job",
		"{id: web, kind: job, update: {progress_deadline_seconds: 60}" + run:                             "update.progress_deadline_seconds: not with kind job",
		"{id: web, kind: job, update: {healthy_deadline_seconds: 60}" + run:                              "update.healthy_deadline_seconds: not with kind job",
		"{id: web, kind: job, update: {min_healthy_seconds: 20}" + run:                                   "update.min_healthy_seconds: not with kind job",
		"{id: web, update: {min_healthy_seconds: 86401}" + run:                                           "update.min_healthy_seconds: 86401 is out of range",
		"{id: web, update: {progress_deadline_seconds: 604801}" + run:                                    "update.progress_deadline_seconds: 604801 is out of range",
		"{id: web, replicas: 10, update: {min_healthy: 75%, max_parallel: 4}" + run:                      "",
		"{id: web, replicas: 0, update: {min_healthy: 3}" + run:                                          "",
		"{id: web, replicas: 1, update: {min_healthy: 75%}" + run:                                        "",
		"{id: web, replicas: 2, update: {min_healthy: 2, max_surge: 1}" + run:                            "",
		"{id: web, update: {progress_deadline_seconds: 0, min_healthy_seconds: 0}" + run:                 "",
		"{id: web, replicas: 3, update: {canary: 1, auto_promote: true, auto_rollback: true}" + run:      "",
		"{id: web, kind: global, update: {min_healthy: 50%, auto_rollback: true, max_parallel: 3}" + run: "",
		"{id: web, kind: job, update: {max_parallel: 3}" + run:                                           "",
	} {
		err := Validate(decodeOne(t, in))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}

func TestNormalizeUpdate(t *testing.T) {
	const run = ", container: {image: nginx}}"
	short, long := "{id: web, update: {min_healthy: 75%}"+run, "{id: web, update: {max_parallel: 1, min_healthy: '075%', min_healthy_seconds: 10, healthy_deadline_seconds: 300, progress_deadline_seconds: 600}"+run
	if a, b := Normalize(decodeOne(t, short)), Normalize(decodeOne(t, long)); !proto.Equal(a, b) {
		t.Errorf("%v\n%v", a, b)
	}
	if Revision(decodeOne(t, "{id: web, update: {canary: 2, max_surge: 1}"+run)) != Revision(decodeOne(t, short)) {
		t.Error("the update strategy is part of the revision")
	}
}

func TestMinHealthy(t *testing.T) {
	for _, x := range []struct {
		text                  string
		surge, replicas, want int32
	}{
		{"", 0, 4, 0}, {"3", 0, 4, 3}, {"75%", 0, 4, 3}, {"75%", 0, 5, 4}, {"75%", 0, 3, 2}, {"75%", 0, 1, 0}, {"75%", 1, 1, 1}, {"75%", 1, 3, 3},
		{"100%", 1, 4, 4}, {"4", 1, 4, 4}, {"4", 0, 2, 1}, {"50%", 0, 0, 0}, {"1%", 0, 10_000, 100}, {"nonsense", 0, 4, 0},
	} {
		if got := MinHealthy(x.text, x.surge, x.replicas); got != x.want {
			t.Errorf("%+v: %d", x, got)
		}
	}
}

func TestScaleKeepsMinHealthy(t *testing.T) {
	w := newWorld(t)
	w.apply("{id: web, replicas: 4, update: {min_healthy: 3}, container: {image: nginx}}")
	_, _, err := ScaleWorkload(w.view(), &pb.ScaleWorkloadRequest{Id: "web", Replicas: proto.Int32(3)}, w.meta())
	wantCode(t, err, codes.InvalidArgument, "update.min_healthy: 3 of 3 replicas with max_surge 0 lets none be replaced")
	for _, n := range []int32{0, 5} {
		if _, _, err := ScaleWorkload(w.view(), &pb.ScaleWorkloadRequest{Id: "web", Replicas: proto.Int32(n)}, w.meta()); err != nil {
			t.Error(err)
		}
	}
}

func spec(image, more string) string {
	return "{id: web, replicas: 3" + more + ", container: {image: 'nginx:" + image + "'}}"
}

func (w *world) rollback(to string) (*pb.Workload, error) {
	w.t.Helper()
	txn, wl, err := RollbackWorkload(w.view(), &pb.RollbackWorkloadRequest{Id: "web", Revision: to}, w.meta())
	if err == nil && txn != nil {
		w.do(txn)
	}
	return wl, err
}

func (w *world) history() (images []string, current string) {
	w.t.Helper()
	list, err := ListRevisions(w.view(), &pb.WorkloadRequest{Id: "web"})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range list.Revisions {
		images = append(images, strings.TrimPrefix(r.Spec.GetContainer().Image, "nginx:"))
	}
	return images, list.Current
}

func TestRollbackWorkload(t *testing.T) {
	w := newWorld(t)
	_, err := w.rollback("")
	wantCode(t, err, codes.NotFound, `there is no workload "web"`)
	first := w.apply(spec("1", ""))
	_, err = w.rollback("")
	wantCode(t, err, codes.FailedPrecondition, `workload "web" has no revision before the present one`)
	_, err = w.rollback("feed")
	wantCode(t, err, codes.NotFound, `workload "web" has no revision "feed" in its history`)
	w.apply(spec("2", ""))
	third := w.apply("{id: web, replicas: 5, priority: 70, labels: {a: b}, update: {max_parallel: 2}, placement: {policy: bin_pack}, env: {A: x}, container: {image: 'nginx:3'}}")

	// What makes a replica what it is goes back, and nothing else.
	back, err := w.rollback(first.Revision)
	want := Normalize(decodeOne(t, "{id: web, replicas: 5, priority: 70, labels: {a: b}, update: {max_parallel: 2}, placement: {policy: bin_pack}, container: {image: 'nginx:1'}}"))
	if err != nil || back.Revision != first.Revision || back.PromotedRevision != first.Revision || !proto.Equal(back.Spec, want) || Revision(back.Spec) != back.Revision {
		t.Fatalf("%v, %v", back, err)
	}
	if images, current := w.history(); strings.Join(images, " ") != "1 3 2" || current != first.Revision {
		t.Errorf("history %v, %s", images, current)
	}
	// There and back again.
	if back, err = w.rollback(""); err != nil || back.Revision != third.Revision || back.Spec.Env["A"] != "x" {
		t.Errorf("%v, %v", back, err)
	}
	if txn, _, err := RollbackWorkload(w.view(), &pb.RollbackWorkloadRequest{Id: "web", Revision: third.Revision}, w.meta()); txn != nil || err != nil {
		t.Errorf("to where it is: %v, %v", txn, err)
	}
	// Not to one that failed in between, where it is known what ran before.
	w.put(RolloutKey("web"), &pb.Rollout{State: pb.RolloutState_ROLLOUT_COMPLETED, Revision: third.Revision, Previous: Revision(decodeOne(t, spec("2", "")))})
	if back, err = w.rollback(""); err != nil || back.Spec.GetContainer().Image != "nginx:2" {
		t.Errorf("%v, %v", back, err)
	}
	got := w.events()
	if last := got[len(got)-1]; !strings.Contains(last, "WORKLOAD_UPDATED web by admin/ann: taken back on request, revision "+back.Revision+" replaces "+third.Revision) {
		t.Errorf("event: %s", last)
	}
}

func TestHistoryKeepsTheWayBack(t *testing.T) {
	w := newWorld(t)
	good := w.apply(spec("good", ""))
	w.put(RolloutKey("web"), &pb.Rollout{State: pb.RolloutState_ROLLOUT_COMPLETED, Revision: good.Revision})
	for _, image := range strings.Fields("a b c d e f g h i j k l") {
		w.apply(spec(image, ""))
		w.put(RolloutKey("web"), &pb.Rollout{State: pb.RolloutState_ROLLOUT_PROGRESSING, Revision: "any", Previous: good.Revision})
	}
	images, _ := w.history()
	if got := strings.Join(images, " "); got != "l k j i h g f e d c good" {
		t.Errorf("history %s", got)
	}
}

func TestPromoteWorkload(t *testing.T) {
	w := newWorld(t)
	promote := func() (*pb.Txn, *pb.Workload, error) {
		return PromoteWorkload(w.view(), &pb.WorkloadRequest{Id: "web"}, w.meta())
	}
	_, _, err := promote()
	wantCode(t, err, codes.NotFound, "")
	w.apply(spec("1", ", update: {canary: 1}"))
	_, _, err = promote()
	wantCode(t, err, codes.FailedPrecondition, `workload "web" has no update that awaits promotion`)
	second := w.apply(spec("2", ", update: {canary: 1}"))
	w.put(RolloutKey("web"), &pb.Rollout{State: pb.RolloutState_ROLLOUT_AWAITING_PROMOTION, Revision: "another"})
	_, _, err = promote()
	wantCode(t, err, codes.FailedPrecondition, "has no update that awaits promotion")
	w.put(RolloutKey("web"), &pb.Rollout{State: pb.RolloutState_ROLLOUT_AWAITING_PROMOTION, Revision: second.Revision})
	txn, promoted, err := promote()
	if err != nil || promoted.PromotedRevision != second.Revision {
		t.Fatalf("%v, %v", promoted, err)
	}
	w.do(txn)
	if txn, _, err := promote(); txn != nil || err != nil {
		t.Errorf("again: %v, %v", txn, err)
	}
	// It holds for that revision, as long as it is the present one.
	if scaled := w.apply("{id: web, replicas: 7, update: {canary: 1}, container: {image: 'nginx:2'}}"); scaled.PromotedRevision != second.Revision {
		t.Errorf("scaled: %v", scaled)
	}
	w.apply(spec("3", ", update: {canary: 1}"))
	if again := w.apply(spec("2", ", update: {canary: 1}")); again.PromotedRevision != "" {
		t.Errorf("again: %v", again)
	}
}
