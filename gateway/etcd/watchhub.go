package etcd

import (
	"context"
	"errors"
	"sync"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// leaderGrace is for how long a replica may know of no leader before the watches
// that asked for one are ended: three election time-outs of etcd's.
const leaderGrace = 3 * time.Second

// watchHub reads the history once for all watchers that keep up with it, and hands
// each the part that is its own. It never waits for one of them: whoever can't take
// more falls behind, and its stream reads the history for it until it has caught up.
//
// It runs as long as there are streams; the last one that leaves waits for its end.
type watchHub struct {
	server  *Server
	ctx     context.Context
	stop    context.CancelFunc
	running sync.WaitGroup

	// mu also guards what of streams and watchers says so. It is taken before that of
	// a stream.
	mu sync.Mutex
	// All changes up to revision were handed out.
	revision int64
	synced   spanIndex
	streams  map[*watchStream]struct{}
	owing    map[*watchStream]struct{} // an answer to a request for progress
	failed   error
	changes  []change // of one batch
}

// everything is all keys.
func (s *Server) everything(after int64) Watcher {
	return s.store.Watch([]byte(toEnd), []byte(toEnd), after)
}

// enter adds a stream to the hub that runs, or starts one.
func (s *Server) enter(st *watchStream) {
	s.watching.Lock()
	defer s.watching.Unlock()
	if s.hub == nil {
		h := &watchHub{server: s, revision: s.store.View().Revision(), streams: map[*watchStream]struct{}{}, owing: map[*watchStream]struct{}{}}
		h.ctx, h.stop = context.WithCancel(context.Background())
		h.running.Go(h.run)
		h.running.Go(h.followLeader)
		s.hub = h
	}
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	st.hub = h
	h.streams[st] = struct{}{}
	if h.failed != nil {
		st.fail(h.failed)
	}
}

// leave ends the stream's watchers, and the hub with the last stream.
func (h *watchHub) leave(st *watchStream) {
	if h.drop(st) {
		h.stop()
		h.running.Wait()
	}
}

func (h *watchHub) drop(st *watchStream) (last bool) {
	h.server.watching.Lock()
	defer h.server.watching.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	st.closed = true
	for _, w := range st.watchers {
		h.end(w)
	}
	if st.ticker != nil {
		st.ticker.Stop()
	}
	delete(h.streams, st)
	delete(h.owing, st)
	if last = len(h.streams) == 0; last {
		h.server.hub = nil
	}
	return last
}

// end takes a watcher out. h.mu is held.
func (h *watchHub) end(w *watcher) {
	st := w.stream
	w.gone.Store(true)
	delete(st.watchers, w.id)
	if w.synced {
		h.synced.remove(w)
	} else {
		st.lagging--
	}
	h.settle(st)
}

// settle answers a request for progress as soon as that can be done: when all that
// had happened by then was handed out, and nobody lags or is ahead. h.mu is held.
func (h *watchHub) settle(st *watchStream) {
	if st.owed == 0 || st.lagging > 0 || h.revision < st.owed {
		return
	}
	for _, w := range st.watchers {
		if h.isBehind(w) {
			return
		}
	}
	st.owed = 0
	delete(h.owing, st)
	st.push(h.progress(allWatchers, true))
}

func (h *watchHub) run() {
	history := h.server.everything(h.revision)
	for {
		events, upTo, err := history.Next(h.ctx)
		var refused *fsm.Error
		switch {
		case err == nil:
			h.advance(func() { h.dispatch(events, upTo) })
		case h.ctx.Err() != nil:
			return
		case errors.As(err, &refused) && refused.Code == pb.TxnError_TXN_ERROR_COMPACTED:
			h.advance(h.skip)
			history = h.server.everything(h.revision)
		default:
			h.fail(statusOf(err))
			return
		}
	}
}

// advance moves the hub's place, which nobody but run does.
func (h *watchHub) advance(step func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	step()
	for st := range h.owing {
		h.settle(st)
	}
}

// skip goes on at the present where the history does not reach back to the hub's
// place, as after a snapshot came instead of the log. Each watcher finds out
// whether it reaches back to its own. h.mu is held.
func (h *watchHub) skip() {
	next := h.revision + 1
	h.revision = max(h.revision, h.server.store.View().Revision())
	for _, w := range h.synced.all() {
		if max(w.from, next) <= h.revision {
			h.fallBehind(w, next)
		}
	}
}

// fail ends all streams, and those to come before the last of these has left.
func (h *watchHub) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failed = err
	for st := range h.streams {
		st.fail(err)
	}
}

// failLeaderless ends the streams that asked for a leader.
func (h *watchHub) failLeaderless() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for st := range h.streams {
		if st.needsLeader {
			st.fail(rpctypes.ErrGRPCNoLeader)
		}
	}
}

// followLeader ends the streams that asked for a leader when there has been none
// for a while.
func (h *watchHub) followLeader() {
	var since *time.Timer
	var grace <-chan time.Time
	for {
		changed := h.server.store.LeaderChanged()
		if _, _, ok := h.server.store.Leader(); ok {
			since, grace = nil, nil
		} else if since == nil {
			since = time.NewTimer(leaderGrace)
			grace = since.C
		}
		select {
		case <-changed:
		case <-grace:
			h.failLeaderless()
		case <-h.ctx.Done():
			return
		}
	}
}

// dispatch hands out the changes up to a revision. h.mu is held.
func (h *watchHub) dispatch(events []*pb.KeyEvent, upTo int64) {
	h.changes = changesOf(h.changes[:0], events)
	touched, _ := match(&h.synced, h.changes, 0)
	var header headers
	for _, s := range touched {
		s.handOut(func(w *watcher, b bundle) {
			w.quiet = false
			d := delivery{watcher: w, bundle: b, header: header.at(h.server, b.revision())}
			if !w.stream.push(d) {
				h.fallBehind(w, h.revision+1)
			}
		})
	}
	clear(h.changes)
	h.revision = upTo
}

// fallBehind leaves a watcher to its stream, which reads for it from a revision on.
// h.mu is held.
func (h *watchHub) fallBehind(w *watcher, from int64) {
	h.synced.remove(w)
	w.synced = false
	w.from = max(w.from, from)
	w.stream.lagging++
	w.stream.readFor(w)
}

// cancel takes a watcher out, unless the client has done so before.
func (h *watchHub) cancel(w *watcher) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w.gone.Load() {
		return false
	}
	h.end(w)
	return true
}

// rejoin takes back those who have seen everything that was handed out, when what
// was found for them is sent.
func (h *watchHub) rejoin(late *spanIndex, found []delivery) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range found {
		found[i].watcher.quiet = false
	}
	for _, w := range late.all() {
		if gone := w.gone.Load(); gone || w.from > h.revision {
			late.remove(w)
			if !gone {
				h.synced.add(w)
				w.synced = true
				w.stream.lagging--
				h.settle(w.stream)
			}
		}
	}
}

// isBehind reports whether the client of a watcher knows more than the hub, as one
// does that comes from another replica. h.mu is held.
func (h *watchHub) isBehind(w *watcher) bool { return h.revision < w.from-1 }

// progress is the news that everything up to the hub's revision was sent to a
// watcher, or to all of the stream. h.mu is held.
func (h *watchHub) progress(id int64, answers bool) delivery {
	return delivery{response: &etcdpb.WatchResponse{Header: h.server.header(h.revision), WatchId: id}, answers: answers}
}
