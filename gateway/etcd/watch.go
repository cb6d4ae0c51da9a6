package etcd

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/metadata"

	"github.com/persys-dev/persys/fsm"
)

// noWatcher in an answer means that there is no watcher to it, and allWatchers that
// it is for all of the stream; newWatcherID in a request leaves the choice to us.
const (
	noWatcher    = -1
	allWatchers  = -1
	newWatcherID = 0
)

// Why etcd refuses a watcher.
const (
	reasonEmptyRange  = "mvcc: watcher range is empty"
	reasonDuplicateID = "mvcc: duplicate watch ID provided on the WatchStream"
)

// maxRequests bounds the requests of a stream that were accepted and whose answers
// the client has not taken.
const maxRequests = 128

// watcher is one of a stream's.
type watcher struct {
	stream   *watchStream
	id       int64
	key, end []byte

	prev, fragment   bool
	noPut, noDelete  bool
	shown            owner // up to whose keys
	progress, synced bool
	// quiet: it had no event since it was last told of progress. Guarded by the hub, as
	// is synced: it is in the hub's index.
	quiet bool
	// gone: it was cancelled, and must not be sent anything any more.
	gone atomic.Bool
	// Events before this revision are not for it. The hub's while it is synced, else
	// the sender's.
	from int64

	// Its place in an index.
	span *span
	slot int
}

// wants reports whether the watcher is to get an event of its keys.
func (w *watcher) wants(c *change) bool {
	if c.revision() < w.from || !covers(w.key, ownerOf(c.event.Kv.Key), w.shown) {
		return false
	}
	if c.event.Type == 0 {
		return !w.noPut
	}
	return !w.noDelete
}

// watchStream is one call of Watch. One goroutine, the call's own, sends; another
// receives.
type watchStream struct {
	etcdpb.Watch_WatchServer
	server      *Server
	hub         *watchHub
	needsLeader bool

	// wake tells the sender that there is something to do; failed, to end.
	wake   chan struct{}
	failed chan error
	// requests holds one for each that is not answered.
	requests chan struct{}

	// Guarded by the hub: watchers by id, and how many of them are not in its index.
	watchers map[int64]*watcher
	lagging  int
	nextID   int64
	// A request for progress is to be answered when everything up to here was sent;
	// 0 for none.
	owed   int64
	closed bool
	ticker *time.Timer

	mu     sync.Mutex
	queue  []delivery
	queued int // bytes
	// For whom the sender is to read the history.
	behind []*watcher
}

// Watch sends what changes, and what has changed since a revision.
func (s *Server) Watch(g etcdpb.Watch_WatchServer) error {
	ctx := s.auth.pin(g.Context())
	st := &watchStream{
		Watch_WatchServer: g, server: s,
		wake: make(chan struct{}, 1), failed: make(chan error, 1), requests: make(chan struct{}, maxRequests),
		watchers: map[int64]*watcher{},
	}
	if v := metadata.ValueFromIncomingContext(ctx, rpctypes.MetadataRequireLeaderKey); len(v) > 0 {
		st.needsLeader = v[0] == rpctypes.MetadataHasLeader
	}
	if _, _, ok := s.store.Leader(); st.needsLeader && !ok {
		return rpctypes.ErrGRPCNoLeader
	}
	s.enter(st)
	defer st.hub.leave(st)
	// It ends with the stream, which it may outlive by a moment.
	go func() {
		if err := st.receive(ctx); err != nil {
			st.fail(err)
		}
	}()
	err := st.send(ctx)
	if errors.Is(err, context.Canceled) {
		return rpctypes.ErrGRPCWatchCanceled
	}
	return statusOf(err)
}

// fail ends the stream. Only the first error counts.
func (st *watchStream) fail(err error) {
	select {
	case st.failed <- err:
	default:
	}
}

// receive carries out requests. A client that has no more of them still gets its
// events.
func (st *watchStream) receive(ctx context.Context) error {
	for {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case st.requests <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		answer, err := st.request(ctx, r)
		if err != nil {
			return err
		}
		if !answer {
			<-st.requests
		}
	}
}

// request carries out one request and reports whether an answer is on its way. As
// with etcd an unknown kind of request does nothing.
func (st *watchStream) request(ctx context.Context, r *etcdpb.WatchRequest) (answer bool, err error) {
	switch u := r.RequestUnion.(type) {
	case *etcdpb.WatchRequest_CreateRequest:
		if u.CreateRequest != nil {
			return true, st.create(ctx, u.CreateRequest)
		}
	case *etcdpb.WatchRequest_CancelRequest:
		return st.cancel(u.CancelRequest.GetWatchId()), nil
	case *etcdpb.WatchRequest_ProgressRequest:
		return st.askProgress(), nil
	}
	return false, nil
}

// create adds a watcher. What is wrong with the request is an answer; an error is
// only that it can't be decided on.
func (st *watchStream) create(ctx context.Context, r *etcdpb.WatchCreateRequest) error {
	if len(r.Key) == 0 {
		r.Key = []byte{0}
	}
	v := st.server.store.View()
	who, refused := st.permit(ctx, v, r)
	if refused != nil {
		// Not before all that is known was looked at.
		var err error
		if v, err = st.server.store.Linearizable(ctx); err != nil {
			return err
		}
		who, refused = st.permit(ctx, v, r)
	}
	h := st.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	now := max(v.Revision(), h.revision)
	answer := &etcdpb.WatchResponse{Header: st.server.header(now), WatchId: noWatcher, Created: true, Canceled: true}
	switch {
	case st.closed:
		return nil
	case r.StartRevision < 0:
		answer.CancelReason = rpctypes.ErrCompacted.Error()
	case refused != nil:
		answer.CancelReason = statusOf(refused).Error()
	case len(r.RangeEnd) > 0 && string(r.RangeEnd) != toEnd && string(r.Key) >= string(r.RangeEnd):
		answer.CancelReason = reasonEmptyRange
	case st.watchers[r.WatchId] != nil && r.WatchId != newWatcherID:
		answer.CancelReason = reasonDuplicateID
	default:
		w := st.watcher(r, who.shown())
		answer.WatchId, answer.Canceled = w.id, false
		st.push(delivery{response: answer, answers: true})
		st.begin(w, now)
		return nil
	}
	st.push(delivery{response: answer, answers: true})
	return nil
}

func (st *watchStream) permit(ctx context.Context, v *fsm.View, r *etcdpb.WatchCreateRequest) (*caller, error) {
	who, err := st.server.auth.caller(ctx, v)
	if err != nil {
		return nil, err
	}
	return who, who.mayRead(r.Key, r.RangeEnd)
}

// watcher makes the watcher that is asked for. The hub is locked.
func (st *watchStream) watcher(r *etcdpb.WatchCreateRequest, shown owner) *watcher {
	w := &watcher{
		stream: st, id: r.WatchId, key: r.Key, end: r.RangeEnd, shown: shown, from: r.StartRevision,
		prev: r.PrevKv, fragment: r.Fragment, progress: r.ProgressNotify, quiet: true,
	}
	for _, f := range r.Filters {
		w.noPut = w.noPut || f == etcdpb.WatchCreateRequest_NOPUT
		w.noDelete = w.noDelete || f == etcdpb.WatchCreateRequest_NODELETE
	}
	if w.id == newWatcherID {
		for st.watchers[st.nextID] != nil {
			st.nextID++
		}
		w.id = st.nextID
		st.nextID++
	}
	st.watchers[w.id] = w
	if w.progress && st.ticker == nil {
		st.ticker = time.AfterFunc(st.interval(), st.tick)
	}
	return w
}

// begin has a watcher get events, as they come or from the history. The hub is
// locked; now is the newest revision.
func (st *watchStream) begin(w *watcher, now int64) {
	if w.from == 0 {
		w.from = now + 1
	}
	if w.from > st.hub.revision {
		w.synced = true
		st.hub.synced.add(w)
		return
	}
	st.lagging++
	st.readFor(w)
}

// cancel ends a watcher on the client's wish. For one that does not exist there is
// no answer.
func (st *watchStream) cancel(id int64) (answer bool) {
	h := st.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	w := st.watchers[id]
	if w == nil || st.closed {
		return false
	}
	h.end(w)
	now := max(h.revision, st.server.store.View().Revision())
	st.push(delivery{response: &etcdpb.WatchResponse{Header: st.server.header(now), WatchId: id, Canceled: true}, answers: true})
	return true
}

// askProgress has the client told that it has seen everything up to now, as soon
// as it has. There is one answer to all that is asked until then.
func (st *watchStream) askProgress() (answer bool) {
	h := st.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if st.closed {
		return false
	}
	answer = st.owed == 0
	st.owed = st.server.store.View().Revision()
	h.owing[st] = struct{}{}
	h.settle(st)
	return answer
}

// interval is how often watchers are told of progress, spread so that those that
// began together are not told together.
func (st *watchStream) interval() time.Duration {
	every := st.server.config.WatchProgress
	return every + rand.N(every/10+1)
}

// tick tells the watchers that asked for it, and had no event for as long, how far
// they are.
func (st *watchStream) tick() {
	h := st.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if st.closed {
		return
	}
	for _, w := range st.watchers {
		if w.progress && w.quiet && w.synced && !h.isBehind(w) {
			st.push(h.progress(w.id, false))
		}
		w.quiet = true
	}
	st.ticker.Reset(st.interval())
}
