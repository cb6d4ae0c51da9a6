package cli

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// goal is what --wait waits for.
type goal struct {
	id string
	// The workload is to be gone.
	deleted bool
	// The workload as the command left it; nothing older counts. 0: whatever
	// there is.
	version int64
	// Its revision then: if that is taken back, the command has failed.
	revision string
	// Another revision was there before, so every replica has to be healthy, also
	// where that one was not rolled out in full yet.
	replaces bool
	// The newest rollout itself is to be through, however it began.
	rollout bool
	// For restart: the generation of each replica before it, all of which must
	// be replaced.
	replaced map[int32]int64
}

// asLeft is the goal after a command that left the workload so. Its status is still
// what it was before the command.
func (g goal) asLeft(w *pb.Workload) goal {
	before := w.GetStatus().GetRevision()
	g.version, g.revision, g.replaces = w.GetResourceVersion(), w.GetRevision(), before != "" && before != w.GetRevision()
	return g
}

// progress is how far a workload is on the way to a goal.
type progress struct {
	done bool
	// It has failed, at the revision that is wanted; this may be from before
	// the command, and counts once it has stood for a while (settleTime).
	failed bool
	// It is to go on running, so that done counts once it has lasted for a while
	// (steadyTime) without a restart: most that is wrong ends at once.
	lasting  bool
	restarts int32
	text     string
	// What was wanted has been taken back, or is about to be: it fails for good when
	// that is through.
	takenBack, through bool
}

// progressOf judges one state of a workload. Pure.
func progressOf(w *pb.Workload, g goal) progress {
	st := w.GetStatus()
	p := progress{text: fmt.Sprintf("%s, %s running", stateName(st.GetState()), running(w))}
	if why := reason(st.GetReason()); why != "" {
		p.text += ": " + oneLine(why)
	}
	if follows(w, g) {
		p.text += "; " + rolloutCounts(w)
	}
	if g.deleted || w.ResourceVersion < g.version {
		return p
	}
	if p.takenBack = takenBack(w, g); p.takenBack {
		p.text = rolloutText(w)
		p.through = w.Rollout.EndTime != nil
		return p
	}
	if st.GetRevision() != w.Revision {
		return p
	}
	switch w.GetSpec().GetDesiredState() {
	case pb.DesiredState_DESIRED_STOPPED:
		p.done = st.GetState() == pb.State_STOPPED
	case pb.DesiredState_DESIRED_DELETED:
		p.failed, p.text = true, "it is being deleted"
	default:
		p.done = runsInFull(w, g) || awaitsUser(w, g)
		p.lasting = !awaitsUser(w, g) && w.GetSpec().GetKind() != pb.WorkloadKind_JOB && st.GetDesired() > 0
		for _, r := range w.Replicas {
			p.restarts += r.Restarts
		}
	}
	p.failed = p.failed || st.GetState() == pb.State_FAILED
	if r := w.Rollout; ofPresent(w) && r.State == pb.RolloutState_ROLLOUT_FAILED && st.GetState() != pb.State_STOPPED {
		p.failed, p.text = true, rolloutText(w)
	}
	return p
}

// ofPresent reports whether the rollout is that of what is wanted now, and not of
// what was wanted before.
func ofPresent(w *pb.Workload) bool {
	r := w.GetRollout()
	return r != nil && r.Revision == w.Revision && r.RestartGeneration == w.RestartGeneration
}

// follows reports whether there is an update under way; the first rollout of a
// workload replaces nothing, and is through when everything runs.
func follows(w *pb.Workload, g goal) bool {
	r := w.GetRollout()
	switch r.GetState() {
	case pb.RolloutState_ROLLOUT_AWAITING_PROMOTION:
		return ofPresent(w)
	case pb.RolloutState_ROLLOUT_PROGRESSING:
		return ofPresent(w) && (r.Previous != "" || g.replaces || len(g.replaced) > 0)
	case pb.RolloutState_ROLLOUT_ROLLED_BACK:
		return ofPresent(w) && r.EndTime == nil
	}
	return false
}

// awaitsUser reports whether all canaries are healthy, and somebody has to accept
// them.
func awaitsUser(w *pb.Workload, g goal) bool {
	u := w.GetSpec().GetUpdate()
	return follows(w, g) && w.Rollout.State == pb.RolloutState_ROLLOUT_AWAITING_PROMOTION && !u.GetAutoPromote() && w.Rollout.Canaries >= u.GetCanary() &&
		w.PromotedRevision != w.Revision
}

// takenBack reports whether what the command asked for is no longer wanted because
// it failed.
func takenBack(w *pb.Workload, g goal) bool {
	r := w.GetRollout()
	switch {
	case r.GetFailedRevision() == "" || !ofPresent(w):
		return false
	case g.rollout:
		return true
	}
	return r.FailedRevision == g.revision && w.Revision != g.revision
}

// runsInFull reports whether a workload that is to run does so in full; a job,
// whether it has done so to its end.
func runsInFull(w *pb.Workload, g goal) bool {
	st, spec := w.Status, w.Spec
	switch {
	case spec.Schedule != nil:
		return st.NextRun != nil || spec.Schedule.Suspend
	case spec.Kind == pb.WorkloadKind_JOB:
		return st.State == pb.State_COMPLETED
	}
	if st.State != pb.State_RUNNING || st.Running < st.Desired || st.Updated < st.Desired {
		return false
	}
	if follows(w, g) || g.rollout && w.Rollout.GetState() != pb.RolloutState_ROLLOUT_COMPLETED {
		return false
	}
	// The status may be older than the last change of the number.
	if spec.Kind == pb.WorkloadKind_SERVICE && spec.Replicas != nil && st.Desired != spec.GetReplicas() {
		return false
	}
	for _, r := range w.Replicas {
		if before, ok := g.replaced[r.Replica]; ok && r.Generation <= before {
			return false
		}
	}
	return true
}

const (
	// A failure counts once it has stood for this long, since it may be what the
	// command is about to heal.
	settleTime = 2 * time.Second
	steadyTime = time.Second
)

// await follows the workloads until each has reached its goal. A failure of one
// does not end the watch of the others.
func (a *app) await(ctx context.Context, c *client, goals []goal) error {
	var (
		group errgroup.Group
		mu    sync.Mutex // for the lines of progress
	)
	errs := make([]error, len(goals))
	group.SetLimit(16)
	for i, g := range goals {
		group.Go(func() error {
			errs[i] = awaitOne(ctx, c, g, func(text string) {
				mu.Lock()
				defer mu.Unlock()
				a.note("%s: %s", g.id, text)
			})
			return nil
		})
	}
	_ = group.Wait() // the errors are in errs, in the order of the goals
	var all []error
	for _, err := range errs {
		if err != nil {
			all = append(all, err)
		}
	}
	return several(all)
}

func awaitOne(ctx context.Context, c *client, g goal, say func(string)) error {
	changes := make(chan *pb.WorkloadChange)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { ended <- watchWorkload(ctx, c, g.id, changes) }()
	settled, steady := time.NewTimer(settleTime), time.NewTimer(steadyTime)
	settled.Stop()
	steady.Stop()
	last := progress{text: "nothing heard of it yet"}
	for {
		select {
		case change := <-changes:
			if change.Deleted {
				if g.deleted {
					return nil
				}
				return coded(exitNotFound, "workload %q was deleted meanwhile", g.id)
			}
			p := progressOf(change.Workload, g)
			if p.text != last.text {
				say(p.text)
			}
			switch {
			case p.through:
				return coded(exitRollout, "workload %q: %s; see `persys rollout status %s`", g.id, p.text, g.id)
			case p.done && !p.lasting:
				return nil
			case !p.done:
				steady.Stop()
			case !last.done || p.restarts != last.restarts:
				steady.Reset(steadyTime)
			}
			if p.failed && !last.failed {
				settled.Reset(settleTime)
			} else if !p.failed {
				settled.Stop()
			}
			last = p
		case <-steady.C:
			return nil
		case <-settled.C:
			return coded(exitRollout, "workload %q failed: %s; see `persys describe %s` and `persys logs %s`", g.id, last.text, g.id, g.id)
		case err := <-ended:
			return watchEnd(g, last, err)
		}
	}
}

// watchWorkload sends each change until ctx ends. A watch has no end of its own:
// one that ends without an error met a server that stops, or one whose clock saw
// the deadline a moment before ours.
func watchWorkload(ctx context.Context, c *client, id string, changes chan<- *pb.WorkloadChange) error {
	for {
		err := follow(ctx, c.pool, func(ctx context.Context) (grpc.ServerStreamingClient[pb.WorkloadChange], error) {
			return c.workloads.WatchWorkloads(ctx, &pb.WatchWorkloadsRequest{Id: id})
		}, func(change *pb.WorkloadChange) (bool, error) {
			select {
			case changes <- change:
				return false, nil
			case <-ctx.Done():
				return true, ctx.Err()
			}
		})
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(roundPause):
		}
	}
}

// watchEnd says what the end of the watch means.
func watchEnd(g goal, last progress, err error) error {
	switch {
	case codeOf(err) == codes.NotFound && g.deleted:
		return nil
	case last.takenBack && exitCode(err) == exitUnavailable:
		return coded(exitRollout, "timed out: workload %q: %s; see `persys rollout status %s`", g.id, last.text, g.id)
	case exitCode(err) == exitUnavailable && !strings.Contains(err.Error(), "no server answers"):
		what := "is not as wanted"
		if g.deleted {
			what = "is not gone"
		}
		return coded(exitUnavailable, "timed out: workload %q %s yet (%s); see `persys why %s`", g.id, what, last.text, g.id)
	}
	return about("workload", g.id, err)
}
