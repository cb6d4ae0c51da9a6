package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// settledFor is longer than any listing that is under way can be old.
const settledFor = 5 * time.Minute

// A pass over everything is followed by a rest, restTimes as long and at most
// restMost, in which what comes is gathered: where hundreds of actions end one
// after the other, a pass for each would cost the square of their number.
const (
	restTimes = 4
	restMost  = 20 * time.Millisecond
)

// stopping is how long actions under way may go on when the agent ends.
const stopping = 5 * time.Second

// message is what a session says to the reconciler.
type message struct {
	// session numbers grow; what comes from an earlier one is too late.
	session int
	// begun and set are the two things to be said.
	begun bool
	set   *pb.DesiredSet
	// ended: the session is over.
	ended bool
	reply chan error
}

// operation is an action under way.
type operation struct {
	action action
	cancel context.CancelCauseFunc
}

// errUnwanted ends a start that nobody wants any more, up to the moment when the
// runtime is told to make something.
var errUnwanted = errors.New("not wanted any more")

// reconciler owns the picture. One goroutine (run) reads and changes it; all
// that takes time happens elsewhere and comes back as a message.
type reconciler struct {
	cfg      Config
	log      *slog.Logger
	outbox   *outbox
	lease    *nodeLease
	guard    *guard
	metrics  *metrics
	executor *executor
	saver    *saver
	watchers map[pb.WorkloadType]*watcher

	messages chan message
	listings chan listing
	outcomes chan outcome
	// listed is closed when every runtime was asked once.
	listed     chan struct{}
	listedOnce sync.Once
	// over is closed when run has returned.
	over chan struct{}
	// seen is what readers see; shown signals that it changed.
	seen  atomic.Pointer[view]
	shown *broadcast
	// stale: seen is older than the picture.
	stale bool

	session int
	current bool
	// tellAll: the servers need a full report once everything is known.
	tellAll   bool
	desired   desired
	dropped   map[Key]dropped
	actual    map[Key][]Instance
	histories map[Key]history
	orphans   map[string]time.Time
	busy      map[Key]*operation
	// unsure are replicas for which only a listing begun later counts.
	unsure map[Key]time.Time
	// met are the instances that were there when last decided.
	met map[string]bool
	// settled is when the last action for a replica ended: older listings say
	// nothing about it.
	settled map[Key]time.Time
	// silent is since when a runtime has not answered.
	silent map[pb.WorkloadType]time.Time
	// drifts are when each was told last.
	drifts map[driftID]time.Time
	// refusals already logged.
	refusals map[string]bool
}

func newReconciler(a *Agent, s *saver) *reconciler {
	policy := Policy{BindRoots: a.cfg.AllowedBindRoots, Privileged: a.cfg.AllowPrivileged, Devices: a.cfg.Devices}
	r := &reconciler{
		cfg: a.cfg, log: a.log, outbox: a.outbox, lease: a.lease, guard: a.guard, metrics: a.metrics, saver: s,
		executor: newExecutor(a, policy), watchers: map[pb.WorkloadType]*watcher{},
		messages: make(chan message), listings: make(chan listing), outcomes: make(chan outcome),
		listed: make(chan struct{}), over: make(chan struct{}), shown: newBroadcast(),
		desired: a.desired, histories: a.histories, dropped: map[Key]dropped{}, actual: map[Key][]Instance{},
		orphans: map[string]time.Time{}, busy: map[Key]*operation{}, unsure: map[Key]time.Time{},
		settled: map[Key]time.Time{}, silent: map[pb.WorkloadType]time.Time{}, drifts: map[driftID]time.Time{}, refusals: map[string]bool{},
	}
	v := viewOf(r.actual, r.desired)
	r.seen.Store(&v)
	return r
}

func (r *reconciler) run(ctx context.Context) error {
	// Actions outlive ctx for a moment, so that none is cut off half done without need.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var running sync.WaitGroup
	timer := time.NewTimer(0)
	defer timer.Stop()
	defer close(r.over)
	var rested time.Time
	for {
		select {
		case <-ctx.Done():
			r.drain(&running, cancel)
			return nil
		case m := <-r.messages:
			r.hear(m)
		case l := <-r.listings:
			r.see(l)
		case o := <-r.outcomes:
			r.finish(o)
		case <-r.lease.changed:
		case <-timer.C:
		}
		r.more(ctx, time.Until(rested))
		now := time.Now()
		r.keepGuard()
		d := r.decide(now)
		for _, act := range d.actions {
			r.begin(work, &running, act)
		}
		r.show() // first: who is told of a replica may ask for its logs at once
		r.report(now, d)
		timer.Reset(r.pause(now, d))
		rested = time.Now().Add(min(restTimes*time.Since(now), restMost))
	}
}

// more takes what else comes during the rest, and what has come meanwhile, so
// that a burst is decided on once.
func (r *reconciler) more(ctx context.Context, rest time.Duration) {
	if rest > 0 {
		over := time.NewTimer(rest)
		defer over.Stop()
		for resting := true; resting; {
			select {
			case m := <-r.messages:
				r.hear(m)
			case l := <-r.listings:
				r.see(l)
			case o := <-r.outcomes:
				r.finish(o)
			case <-over.C:
				resting = false
			case <-ctx.Done():
				resting = false
			}
		}
	}
	for {
		select {
		case m := <-r.messages:
			r.hear(m)
		case l := <-r.listings:
			r.see(l)
		case o := <-r.outcomes:
			r.finish(o)
		default:
			return
		}
	}
}

// drain waits for what is under way, and cuts off what takes too long. Either
// way the next run of the agent finds out what became of it.
func (r *reconciler) drain(running *sync.WaitGroup, cancel context.CancelFunc) {
	done := make(chan struct{})
	go func() {
		running.Wait()
		close(done)
	}()
	limit := time.NewTimer(stopping)
	defer limit.Stop()
	for {
		select {
		case <-done:
			return
		case o := <-r.outcomes:
			r.finish(o)
		case <-limit.C:
			cancel()
		}
	}
}

// show lets readers see what the picture is now.
func (r *reconciler) show() {
	if !r.stale {
		return
	}
	v := viewOf(r.actual, r.desired)
	r.seen.Store(&v)
	r.stale = false
	r.shown.signal()
}

// pause is how long nothing needs to be decided as far as is known now.
func (r *reconciler) pause(now time.Time, d decision) time.Duration {
	wake := d.wake
	for _, since := range r.silent {
		if due := since.Add(silenceTolerated); due.After(now) && (wake.IsZero() || due.Before(wake)) {
			wake = due
		}
	}
	if wake.IsZero() {
		return time.Hour
	}
	return max(wake.Sub(now), time.Millisecond)
}

// hear takes what a session says.
func (r *reconciler) hear(m message) {
	switch {
	case m.session < r.session:
		m.reply <- errors.New("the session is over")
		return
	case m.begun, m.ended:
		r.session, r.current = m.session, false
	case !m.set.GetComplete() && !r.current:
		m.reply <- errors.New("a change of the desired set came before the set")
		return
	default:
		if err := r.accept(m.set); err != nil {
			m.reply <- err
			return
		}
	}
	m.reply <- nil
}

func (r *reconciler) accept(set *pb.DesiredSet) error {
	found, err := merge(r.desired, set)
	if err != nil {
		r.metrics.refused.Inc()
		return err
	}
	for _, why := range found.refused {
		r.metrics.refused.Inc()
		if !r.refusals[why] {
			r.refusals[why] = true
			r.log.Warn("assignment refused", "why", why)
		}
	}
	for key, generation := range found.dropped {
		r.dropped[key] = dropped{generation: generation, kind: r.desired.items[key].GetAssignment().GetType()}
	}
	for key := range found.next.items {
		delete(r.dropped, key)
	}
	r.desired, r.current = found.next, true
	r.tellAll = r.tellAll || set.GetComplete()
	for key, item := range r.desired.items {
		r.histories[key] = r.histories[key].of(item.GetAssignment().GetGeneration())
	}
	for key, op := range r.busy {
		if op.action.verb != start {
			continue
		}
		a := r.desired.items[key].GetAssignment()
		if a.GetGeneration() != op.action.item.GetAssignment().GetGeneration() || a.GetDesiredState() != pb.DesiredState_DESIRED_RUNNING {
			op.cancel(errUnwanted)
		}
	}
	r.saver.save(r.desired)
	r.stale = true
	return nil
}

// see takes a runtime's answer.
func (r *reconciler) see(l listing) {
	if l.err != nil {
		if since, ok := r.silent[l.kind]; !ok || since.IsZero() {
			r.silent[l.kind] = l.began
			r.log.Warn("runtime does not answer: its work is left as it is", "runtime", l.kind.String(), "error", l.err)
		}
		r.checkListed()
		return
	}
	if since, ok := r.silent[l.kind]; ok {
		delete(r.silent, l.kind)
		if !since.IsZero() {
			r.log.Info("runtime answers", "runtime", l.kind.String(), "instances", len(l.instances))
		}
		r.unblock(l.kind)
	}
	fresh := map[Key][]Instance{}
	for _, in := range l.instances {
		fresh[in.Key] = append(fresh[in.Key], in)
	}
	keys := map[Key]bool{}
	for key := range fresh {
		keys[key] = true
	}
	for key := range r.actual {
		keys[key] = true
	}
	for key := range keys {
		if r.busy[key] != nil || r.settled[key].After(l.began) {
			continue
		}
		r.replace(key, l.kind, fresh[key])
		delete(r.unsure, key)
	}
	for key, at := range r.unsure {
		if r.busy[key] == nil && !at.After(l.began) && !keys[key] {
			delete(r.unsure, key)
		}
	}
	maps.DeleteFunc(r.settled, func(_ Key, at time.Time) bool { return l.began.Sub(at) > settledFor })
	maps.DeleteFunc(r.dropped, func(_ Key, d dropped) bool { return !d.gone.IsZero() && l.began.Sub(d.gone) > settledFor })
	r.stale = true
	r.checkListed()
}

// checkListed closes listed once there is no runtime left that was never asked.
func (r *reconciler) checkListed() {
	for _, since := range r.silent {
		if since.IsZero() {
			return
		}
	}
	r.listedOnce.Do(func() { close(r.listed) })
}

// unblock lets what failed only because the runtime was away be tried at once.
func (r *reconciler) unblock(kind pb.WorkloadType) {
	for key, h := range r.histories {
		if h.failure != nil && !h.retryAt.IsZero() && r.desired.items[key].GetAssignment().GetType() == kind {
			h.failure, h.retryAt = nil, time.Time{}
			r.histories[key] = h
		}
	}
}

// replace puts what a runtime shows of a replica in the place of what it showed
// before, and leaves what other runtimes show.
func (r *reconciler) replace(key Key, kind pb.WorkloadType, ins []Instance) {
	kept := slices.DeleteFunc(slices.Clone(r.actual[key]), func(in Instance) bool { return in.Type == kind })
	if kept = append(kept, ins...); len(kept) == 0 {
		delete(r.actual, key)
		return
	}
	r.actual[key] = kept
}

// decide brings what depends on time and instances up to date, and compares.
func (r *reconciler) decide(now time.Time) decision {
	known := map[string]bool{}
	for key, all := range r.actual {
		for _, in := range all {
			known[in.ID] = true
			if _, told := r.dropped[key]; r.desired.items[key] == nil && !told && r.current {
				if _, ok := r.orphans[in.ID]; !ok {
					r.orphans[in.ID] = now
					r.drift(now, key, finding{pb.DriftKind_ORPHAN_ON_AGENT, "is in nobody's desired set; it is removed in " + r.cfg.OrphanGrace.String()})
				}
			}
		}
	}
	for key := range r.desired.items {
		r.compare(now, key)
	}
	r.met = known
	maps.DeleteFunc(r.orphans, func(id string, _ time.Time) bool { return !known[id] })

	p := picture{
		now: now, desired: r.desired, actual: r.actual, answers: map[pb.WorkloadType]bool{}, busy: map[Key]bool{},
		history: r.histories, dropped: r.dropped, current: r.current, orphans: r.orphans, orphanGrace: r.cfg.OrphanGrace,
		leaseEnd: r.lease.end(),
	}
	for kind := range r.watchers {
		_, silent := r.silent[kind]
		p.answers[kind] = !silent
	}
	for key := range r.unsure {
		p.busy[key] = true
	}
	guarded := false
	for key, op := range r.busy {
		p.busy[key] = true
		if op.action.fence || !guards(op.action) {
			continue
		}
		guarded = true
		if !p.leaseEnd.After(now) {
			op.cancel(nil) // the fence must not wait for it
		}
	}
	d := diff(p)
	if guarded && p.leaseEnd.After(now) {
		d.wakeAt(p.leaseEnd)
	}
	return d
}

// compare notes what has become of a replica since it was looked at last: that it
// ended, and what was done to it by nobody's order. What is not known now is left
// for later.
func (r *reconciler) compare(now time.Time, key Key) {
	item, all := r.desired.items[key], r.actual[key]
	a := item.GetAssignment()
	_, unsure := r.unsure[key]
	if r.busy[key] != nil || unsure || a.GetDesiredState() == pb.DesiredState_DESIRED_DELETED || !r.answering(a.GetType(), all) {
		return
	}
	found, h := drifted(a, all, r.histories[key].of(a.GetGeneration()), func(id string) bool { return r.met[id] })
	if a.GetDesiredState() == pb.DesiredState_DESIRED_RUNNING {
		if in, _ := split(a, all); in != nil {
			if after := h.afterEnd(*in, item.GetSpec(), now); after != h {
				h = after
				r.ended(key, *in)
				if interfered(*in) {
					found = append(found, finding{pb.DriftKind_STATE_MISMATCH, "was stopped and is to run"})
				}
			}
		}
	}
	r.histories[key] = h
	for _, f := range found {
		r.drift(now, key, f)
	}
}

// answering reports whether all runtimes that may have something of a replica
// answer.
func (r *reconciler) answering(kind pb.WorkloadType, all []Instance) bool {
	if _, silent := r.silent[kind]; silent {
		return false
	}
	return !slices.ContainsFunc(all, func(in Instance) bool {
		_, silent := r.silent[in.Type]
		return silent
	})
}

// keepGuard has the lease written down, and a guard, for as long as there is
// anything exclusive.
func (r *reconciler) keepGuard() {
	keep := false
	for _, item := range r.desired.items {
		keep = keep || item.GetAssignment().GetExclusive()
	}
	for _, all := range r.actual {
		keep = keep || slices.ContainsFunc(all, func(in Instance) bool { return in.Exclusive })
	}
	for _, op := range r.busy {
		keep = keep || guards(op.action)
	}
	if r.lease.keep.Swap(keep) && !keep {
		r.guard.release()
	}
}

// guards tells actions that concern exclusive work.
func guards(act action) bool {
	return act.item.GetAssignment().GetExclusive() ||
		slices.ContainsFunc(act.instances, func(in Instance) bool { return in.Exclusive })
}

func (r *reconciler) ended(key Key, in Instance) {
	r.log.Info("work ended", "replica", key.String(), "instance", in.ID, "exit_code", in.ExitCode, "out_of_memory", in.OutOfMemory)
	switch {
	case in.OutOfMemory:
		r.metrics.failures.WithLabelValues(pb.ReasonCode_OUT_OF_MEMORY.String()).Inc()
	case in.ExitCode != 0:
		r.metrics.failures.WithLabelValues(pb.ReasonCode_EXITED.String()).Inc()
	}
}

func (r *reconciler) begin(ctx context.Context, running *sync.WaitGroup, act action) {
	ctx, cancel := context.WithCancelCause(ctx)
	r.busy[act.key] = &operation{action: act, cancel: cancel}
	r.log.Info("work "+string(act.verb), "replica", act.key.String(), "why", act.why, "generation", act.item.GetAssignment().GetGeneration())
	if act.fence {
		r.metrics.fenced.Inc()
	}
	running.Go(func() {
		defer cancel(nil)
		r.outcomes <- r.executor.run(ctx, act)
	})
}

// finish takes what became of an action.
func (r *reconciler) finish(o outcome) {
	act, key := o.action, o.action.key
	r.busy[key].cancel(nil)
	delete(r.busy, key)
	r.settled[key] = o.ended
	all := slices.Clone(r.actual[key])
	all = slices.DeleteFunc(all, func(in Instance) bool { return slices.Contains(o.removed, in.ID) })
	for i := range all {
		if slices.Contains(o.stopped, all[i].ID) {
			all[i].Phase, all[i].Finished = Exited, o.ended
		}
	}
	h := r.histories[key]
	if act.item != nil {
		h = h.of(act.item.GetAssignment().GetGeneration())
	}
	if o.started != nil {
		all = slices.DeleteFunc(all, func(in Instance) bool { return in.ID == o.started.ID })
		all = append(all, *o.started)
		if act.again && !h.stopped {
			r.metrics.restarts.Inc()
		}
		h = h.afterStart(act.again)
		h.instance = o.started.ID
	}
	if act.verb == stop && o.err == nil {
		h.stopped = true
	}
	if o.err != nil || slices.Contains(o.removed, h.instance) {
		h.instance = "" // what is missing now was taken away by this agent, or may have been
	}
	if r.actual[key] = all; len(all) == 0 {
		delete(r.actual, key)
	}
	if o.err != nil {
		h = r.failed(o, h)
		r.unsure[key] = o.ended
	}
	r.histories[key] = h
	for kind, w := range r.watchers {
		if o.err != nil || kind == act.item.GetAssignment().GetType() {
			w.changed()
		}
	}
	r.stale = true
}

// failed notes why an action was not carried out. Stops and removals are
// simply tried again: their cause is still there.
func (r *reconciler) failed(o outcome, h history) history {
	if errors.Is(o.err, context.Canceled) {
		return h
	}
	e := asError(o.err)
	r.metrics.failures.WithLabelValues(e.Code.String()).Inc()
	r.log.Warn("work "+string(o.action.verb)+" failed", "replica", o.action.key.String(), "reason", e.Code.String(), "error", o.err)
	if o.action.verb != start {
		return h
	}
	return h.afterFailure(e, o.ended)
}

// report brings the outbox up to date.
func (r *reconciler) report(now time.Time, d decision) {
	keys := map[Key]bool{}
	for key := range r.desired.items {
		keys[key] = true
	}
	for key := range r.actual {
		keys[key] = true
	}
	for key := range r.dropped {
		keys[key] = true
	}
	for _, key := range r.outbox.keys() {
		keys[key] = true
	}
	changed := false
	for key := range keys {
		changed = r.reportOne(now, key, d.waiting[key]) || changed
	}
	if changed {
		r.saver.report(r.outbox.all)
	}
	r.outbox.stand(r.desired.revision, len(r.silent) == 0 && len(r.unsure) == 0, r.tellAll)
	r.tellAll = false
}

func (r *reconciler) reportOne(now time.Time, key Key, waiting string) bool {
	item, previous := r.desired.items[key], r.outbox.get(key)
	told, isTold := r.dropped[key]
	o := observation{
		now: now, node: r.cfg.NodeID, address: r.cfg.Address, key: key, item: item, told: isTold, actual: r.actual[key],
		history: r.histories[key], waiting: waiting, previous: previous,
	}
	if op := r.busy[key]; op != nil {
		o.doing = &op.action
	}
	kinds := map[pb.WorkloadType]bool{}
	for _, in := range o.actual {
		kinds[in.Type] = true
	}
	switch {
	case item != nil:
		kinds[item.GetAssignment().GetType()] = true
		_, ok := r.watchers[item.GetAssignment().GetType()]
		o.missing = !ok
	case isTold:
		kinds[told.kind] = true
	}
	for kind := range kinds {
		if since, ok := r.silent[kind]; ok {
			if o.silent = since; since.IsZero() {
				return false // not asked yet: nothing is known
			}
		}
	}
	if _, unsure := r.unsure[key]; unsure && item == nil {
		return false // an action was cut off: only a new listing tells what is left of it
	}
	if item == nil && len(o.actual) == 0 && o.silent.IsZero() && r.busy[key] == nil {
		delete(r.histories, key)
		if isTold {
			if !told.gone.IsZero() && previous == nil {
				return false // said already
			}
			// Remembered for a while: what a runtime shows of it later is no orphan.
			told.gone = now
			r.dropped[key] = told
		}
		r.outbox.gone(key, max(told.generation, previous.GetGeneration()))
		return true
	}
	if s := describe(o); s != nil {
		return r.outbox.put(key, s)
	}
	return false
}
