package etcd

import (
	"context"
	"errors"
	"math"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// maxQueued bounds what waits to be sent on a stream, in bytes. The watcher whose
	// events are more than that falls behind, and takes them from the history.
	maxQueued = 4 << 20
	// maxRead bounds what is taken from the history at once for the watchers of a
	// stream, in bytes; a revision that is larger is taken alone.
	maxRead = 16 << 20
)

// delivery is something to be sent: a bundle for a watcher, or an answer.
type delivery struct {
	watcher *watcher
	bundle
	header *etcdpb.ResponseHeader

	response *etcdpb.WatchResponse
	answers  bool // a request
}

// cost is what it takes to keep it: events are shared, but all may wait for this
// stream alone.
func (d *delivery) cost() int { return d.size + overhead }

// push queues a delivery. Bundles are refused when there is no room, and so is news
// of progress; answers never are: requests are bounded.
func (st *watchStream) push(d delivery) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !d.answers && st.queued+d.cost() > maxQueued {
		return false
	}
	st.queue = append(st.queue, d)
	st.queued += d.cost()
	st.rouse()
	return true
}

// readFor leaves a watcher to the sender.
func (st *watchStream) readFor(w *watcher) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.behind = append(st.behind, w)
	st.rouse()
}

func (st *watchStream) rouse() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// take empties the queue, and tells who fell behind: what is queued for these was
// queued before.
func (st *watchStream) take() (queue []delivery, behind []*watcher) {
	st.mu.Lock()
	defer st.mu.Unlock()
	queue, behind = st.queue, st.behind
	st.queue, st.behind = nil, nil
	return queue, behind
}

// send is the sender: first what is queued, then what those need that are behind.
func (st *watchStream) send(ctx context.Context) error {
	var late spanIndex
	for {
		queue, behind := st.take()
		for i := range queue {
			if err := st.deliver(&queue[i]); err != nil {
				return err
			}
		}
		for _, w := range behind {
			late.add(w)
		}
		more, err := st.catchUp(ctx, &late)
		if err != nil {
			return err
		}
		if more || len(queue) > 0 {
			continue
		}
		select {
		case <-st.wake:
		case err := <-st.failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// deliver sends a delivery of the queue.
func (st *watchStream) deliver(d *delivery) error {
	st.mu.Lock()
	st.queued -= d.cost()
	st.mu.Unlock()
	if d.response == nil {
		return st.sendBundle(d)
	}
	if d.answers {
		<-st.requests
	}
	return st.Send(d.response)
}

// sendBundle sends events: in one response, unless they are too many for one.
func (st *watchStream) sendBundle(d *delivery) error {
	limit, w := st.server.config.MaxRequestBytes, d.watcher
	parts := []bundle{d.bundle}
	if d.size >= limit {
		parts = d.split(limit, w.fragment)
	}
	for i, part := range parts {
		if w.gone.Load() {
			return nil
		}
		header, last := d.header, i == len(parts)-1
		if !last && !w.fragment {
			header = st.server.header(part.revision())
		}
		err := st.Send(&etcdpb.WatchResponse{Header: header, WatchId: w.id, Events: part.events, Fragment: w.fragment && !last})
		if err != nil {
			return err
		}
	}
	return nil
}

// catchUp reads a part of the history for the watchers that are behind. It reports
// whether it had something to do.
func (st *watchStream) catchUp(ctx context.Context, late *spanIndex) (more bool, err error) {
	behind := present(late)
	if len(behind) == 0 {
		return false, nil
	}
	from := int64(math.MaxInt64)
	for _, w := range behind {
		from = min(from, w.from)
	}
	events, upTo, err := st.server.everything(from - 1).Next(ctx)
	var refused *fsm.Error
	if errors.As(err, &refused) && refused.Code == pb.TxnError_TXN_ERROR_COMPACTED {
		return true, st.cancelCompacted(late, behind)
	}
	if err != nil {
		return false, err
	}
	found, upTo := collect(late, events, upTo)
	header := st.server.header(upTo)
	for _, w := range behind {
		w.from = max(w.from, upTo+1)
	}
	// What the hub has for those that rejoin is queued, and sent after this.
	st.hub.rejoin(late, found)
	for i := range found {
		found[i].header = header
		if err := st.sendBundle(&found[i]); err != nil {
			return false, err
		}
	}
	return true, nil
}

// present takes those out of the index that are gone, and returns the others.
func present(late *spanIndex) []*watcher {
	all := late.all()
	kept := all[:0]
	for _, w := range all {
		if w.gone.Load() {
			late.remove(w)
		} else {
			kept = append(kept, w)
		}
	}
	return kept
}

// collect finds what the watchers of an index get of events up to a revision, and
// up to which revision that is all.
func collect(late *spanIndex, events []*pb.KeyEvent, upTo int64) ([]delivery, int64) {
	changes := changesOf(nil, events)
	touched, looked := match(late, changes, maxRead)
	if looked < len(changes) {
		upTo = changes[looked-1].revision()
	}
	var found []delivery
	for _, s := range touched {
		s.handOut(func(w *watcher, b bundle) { found = append(found, delivery{watcher: w, bundle: b}) })
	}
	return found, upTo
}

// cancelCompacted ends the watchers whose place is compacted.
func (st *watchStream) cancelCompacted(late *spanIndex, behind []*watcher) error {
	compacted := st.server.store.View().CompactRevision()
	for _, w := range behind {
		if w.from >= compacted {
			continue
		}
		late.remove(w)
		if !st.hub.cancel(w) {
			continue
		}
		// As etcd's, this header has no revision.
		err := st.Send(&etcdpb.WatchResponse{Header: st.server.header(0), WatchId: w.id, Canceled: true, CompactRevision: compacted})
		if err != nil {
			return err
		}
	}
	return nil
}
