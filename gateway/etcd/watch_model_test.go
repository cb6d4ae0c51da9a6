package etcd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// lone is a Store on a keyspace of its own, and remembers everything that happened.
type lone struct {
	Store
	fsm *fsm.Store

	mu        sync.Mutex
	index     uint64
	changed   chan struct{}
	events    []*pb.KeyEvent
	compacted int64
	broken    error
}

func newLone() *lone { return &lone{fsm: fsm.New(), changed: make(chan struct{})} }

func (l *lone) apply(ops ...*pb.RequestOp) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.index++
	_, events, err := l.fsm.Apply(l.index, &pb.Entry{FeatureLevel: fsm.FeatureLevel, Txns: []*pb.Txn{{Success: ops}}})
	if err != nil {
		panic(err)
	}
	l.events = append(l.events, events...)
	l.compacted = l.fsm.Position().CompactRevision
	close(l.changed)
	l.changed = make(chan struct{})
	return l.fsm.Position().Revision
}

func (l *lone) View() *fsm.View                                 { return l.fsm.View() }
func (l *lone) Linearizable(context.Context) (*fsm.View, error) { return l.fsm.View(), nil }
func (l *lone) Leader() (id, address string, ok bool)           { return "lone", "", true }
func (l *lone) LeaderChanged() <-chan struct{}                  { return nil }
func (l *lone) Term() uint64                                    { return 1 }
func (l *lone) Watch(_, _ []byte, after int64) Watcher          { return &loneWatcher{l, after} }

// loneWatcher watches everything.
type loneWatcher struct {
	*lone
	after int64
}

func (w *loneWatcher) Next(ctx context.Context) ([]*pb.KeyEvent, int64, error) {
	for {
		w.mu.Lock()
		changed, broken := w.changed, w.broken
		w.mu.Unlock()
		if broken != nil {
			return nil, 0, broken
		}
		events, upTo, err := w.fsm.Events(w.after, 5)
		if err != nil {
			return nil, 0, err
		}
		if upTo > w.after {
			w.after = upTo
			return events, upTo, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

// pipe is a Watch stream without a network. Its client may stop reading.
type pipe struct {
	etcdpb.Watch_WatchServer
	ctx      context.Context
	close    context.CancelFunc
	requests chan *etcdpb.WatchRequest
	ended    chan struct{}
	err      error // with which it has ended

	mu      sync.Mutex
	news    *sync.Cond
	paused  bool
	sending bool
	answers []*etcdpb.WatchResponse
}

func openPipe(t interface{ Cleanup(func()) }, s *Server) *pipe {
	p := &pipe{requests: make(chan *etcdpb.WatchRequest), ended: make(chan struct{})}
	p.news = sync.NewCond(&p.mu)
	p.ctx, p.close = context.WithCancel(context.Background())
	context.AfterFunc(p.ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.news.Broadcast()
	})
	go func() {
		defer close(p.ended)
		p.err = s.Watch(p)
	}()
	t.Cleanup(func() { p.close(); <-p.ended })
	return p
}

func (p *pipe) Context() context.Context { return p.ctx }

func (p *pipe) Recv() (*etcdpb.WatchRequest, error) {
	select {
	case r := <-p.requests:
		return r, nil
	case <-p.ctx.Done():
		return nil, io.ErrUnexpectedEOF
	}
}

func (p *pipe) Send(r *etcdpb.WatchResponse) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sending = true
	for p.paused && p.ctx.Err() == nil {
		p.news.Wait()
	}
	p.sending = false
	p.answers = append(p.answers, r)
	p.news.Broadcast()
	return p.ctx.Err()
}

func (p *pipe) pause(paused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = paused
	p.news.Broadcast()
}

// until waits for an answer, which is at or after a place in the list of them.
func (p *pipe) until(from int, which func(*etcdpb.WatchResponse) bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for i := from; i < len(p.answers); i++ {
			if which(p.answers[i]) {
				return i
			}
		}
		from = len(p.answers)
		p.news.Wait()
	}
}

// asked is a watcher as the client knows it.
type asked struct {
	request   *etcdpb.WatchCreateRequest
	since     int64 // revision of the first event that it may get
	got       []*mvccpb.Event
	cancelled bool // by the client
	ended     *etcdpb.WatchResponse
}

// expects is what the watcher is to get.
func (a *asked) expects(l *lone) (all []*mvccpb.Event) {
	for _, e := range l.events {
		r, key := a.request, string(e.Kv.Key)
		in := key == string(r.Key)
		if len(r.RangeEnd) > 0 {
			in = key >= string(r.Key) && (string(r.RangeEnd) == "\x00" || key < string(r.RangeEnd))
		}
		if !in || e.Kv.ModRevision < a.since ||
			slices.Contains(r.Filters, etcdpb.WatchCreateRequest_FilterType(e.Type)) {
			continue
		}
		event := &mvccpb.Event{Type: mvccpb.Event_EventType(e.Type), Kv: keyValue(e.Kv)}
		if r.PrevKv {
			event.PrevKv = keyValue(e.PrevKv)
		}
		all = append(all, event)
	}
	return all
}

// follow tells from the answers what each watcher got. Ids are not used twice.
func follow(t *rapid.T, l *lone, answers []*etcdpb.WatchResponse, watchers map[int64]*asked) {
	told := map[int64]int64{} // progress
	for _, r := range answers {
		a := watchers[r.WatchId]
		switch {
		case r.WatchId == allWatchers:
			for id := range watchers {
				told[id] = r.Header.Revision
			}
		case a == nil:
			t.Fatalf("answer for nobody: %v", r)
		case r.Created:
			if a.since = a.request.StartRevision; a.since == 0 {
				a.since = r.Header.Revision + 1
			}
			delete(told, r.WatchId)
		case a.ended != nil:
			t.Fatalf("watcher %d has ended, and gets %v", r.WatchId, r)
		case r.Canceled:
			a.ended = r
		default:
			if len(r.Events) == 0 {
				t.Fatalf("an empty answer: %v", r)
			}
			first, last := r.Events[0].Kv.ModRevision, r.Events[len(r.Events)-1].Kv.ModRevision
			if n := len(a.got); n > 0 && a.got[n-1].Kv.ModRevision >= first {
				t.Fatalf("watcher %d: revision %d was split or came twice", r.WatchId, first)
			}
			if r.Header.Revision < last || first <= told[r.WatchId] {
				t.Fatalf("watcher %d: revisions %d to %d in an answer at %d, after progress to %d", r.WatchId, first, last, r.Header.Revision, told[r.WatchId])
			}
			a.got = append(a.got, r.Events...)
		}
	}
}

func (a *asked) check(t *rapid.T, id int64, l *lone) {
	want := a.expects(l)
	switch {
	case a.ended == nil:
	case len(a.got) > len(want):
	case a.ended.CompactRevision == 0:
		if !a.cancelled {
			t.Fatalf("watcher %d was cancelled without being asked to: %v", id, a.ended)
		}
		want = want[:len(a.got)]
	default:
		// What comes next for it is before what is kept.
		place := a.since
		if n := len(a.got); n > 0 {
			place = a.got[n-1].Kv.ModRevision + 1
		}
		if place >= a.ended.CompactRevision {
			t.Fatalf("watcher %d at %d was cancelled as compacted at %d", id, place, a.ended.CompactRevision)
		}
		want = want[:len(a.got)]
	}
	if len(want) != len(a.got) {
		t.Fatalf("watcher %d from %d of %q-%q got %d events, want %d", id, a.since, a.request.Key, a.request.RangeEnd, len(a.got), len(want))
	}
	for i, e := range a.got {
		if e.PrevKv == nil && e.Kv.ModRevision <= l.compacted {
			want[i].PrevKv = nil // it may have been forgotten before it was sent
		}
		if !proto.Equal(e, want[i]) {
			t.Fatalf("watcher %d, event %d: %v, want %v", id, i, told([]*mvccpb.Event{e}), told(want[i:i+1]))
		}
	}
}

var (
	modelKeys = []string{"a", "b", "b1", "b2", "c", "d"}
	// Five of the large ones are more than a stream's queue takes.
	modelValues = []string{"", "small", string(make([]byte, maxQueued/4))}
)

func drawWrite(t *rapid.T) (ops []*pb.RequestOp) {
	keys := rapid.SliceOfNDistinct(rapid.SampledFrom(modelKeys), 1, 3, rapid.ID[string]).Draw(t, "keys")
	for _, key := range keys {
		if rapid.IntRange(0, 3).Draw(t, "delete") == 0 {
			ops = append(ops, deleting(key))
		} else {
			ops = append(ops, putting(key, rapid.SampledFrom(modelValues).Draw(t, "value")))
		}
	}
	return ops
}

func drawWatch(t *rapid.T, id, now int64) *etcdpb.WatchCreateRequest {
	r := &etcdpb.WatchCreateRequest{WatchId: id, Key: []byte(rapid.SampledFrom(modelKeys).Draw(t, "key"))}
	r.RangeEnd = []byte(rapid.SampledFrom([]string{"", "", "\x00", "c", "e"}).Draw(t, "end"))
	if end := string(r.RangeEnd); end > "\x00" && string(r.Key) >= end {
		r.RangeEnd = nil
	}
	if rapid.Bool().Draw(t, "from") {
		r.StartRevision = rapid.Int64Range(1, now+3).Draw(t, "start")
	}
	r.PrevKv = rapid.Bool().Draw(t, "prev")
	r.Filters = rapid.SliceOfNDistinct(rapid.SampledFrom([]etcdpb.WatchCreateRequest_FilterType{0, 1}), 0, 1,
		func(f etcdpb.WatchCreateRequest_FilterType) int { return int(f) }).Draw(t, "filters")
	return r
}

// Whatever happens, each watcher gets what the history says, once and in order.
func TestWatchersGetTheHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := newLone()
		s := New(Config{Store: l, MaxRequestBytes: maxQueued / 2})
		pipes := []*pipe{openPipe(t, s), openPipe(t, s), openPipe(t, s)}
		watchers := []map[int64]*asked{{}, {}, {}}
		progress := make([]int, len(pipes))
		next := int64(1)
		request := func(i int, r *etcdpb.WatchRequest) { pipes[i].requests <- r }
		stream := rapid.IntRange(0, len(pipes)-1)
		write := func(t *rapid.T) { l.apply(drawWrite(t)...) }
		create := func(t *rapid.T) {
			i, r := stream.Draw(t, "stream"), drawWatch(t, next, l.fsm.Position().Revision)
			next++
			watchers[i][r.WatchId] = &asked{request: proto.Clone(r).(*etcdpb.WatchCreateRequest)}
			request(i, creating(r))
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": write, "write more": write, "write much": write, "create": create, "create more": create,
			"compact": func(t *rapid.T) {
				at := rapid.Int64Range(max(0, l.compacted), l.fsm.Position().Revision).Draw(t, "at")
				if at > l.compacted {
					l.apply(compacting(at))
				}
			},
			"cancel": func(t *rapid.T) {
				i := stream.Draw(t, "stream")
				id := rapid.Int64Range(1, next).Draw(t, "id")
				if a := watchers[i][id]; a != nil {
					a.cancelled = true
				}
				request(i, cancelling(id))
			},
			"pause":  func(t *rapid.T) { pipes[stream.Draw(t, "stream")].pause(rapid.Bool().Draw(t, "paused")) },
			"settle": func(t *rapid.T) { settle(s, l) },
			"progress": func(t *rapid.T) {
				i := stream.Draw(t, "stream")
				progress[i]++
				request(i, asksProgress)
			},
		})
		for i, p := range pipes {
			p.pause(false)
			// A watcher from now on: once it has an event all has been sent.
			request(i, creating(&etcdpb.WatchCreateRequest{WatchId: 1 << 40, Key: []byte("end")}))
			watchers[i][1<<40] = &asked{request: &etcdpb.WatchCreateRequest{WatchId: 1 << 40, Key: []byte("end")}}
			p.until(0, func(r *etcdpb.WatchResponse) bool { return r.Created && r.WatchId == 1<<40 })
		}
		// Up to where the last watcher may have asked to begin: before that there is no
		// answer to a request for progress.
		last := l.apply(putting("end", ""))
		for range 3 {
			last = l.apply(putting("end", ""))
		}
		for i, p := range pipes {
			request(i, asksProgress)
			p.until(0, func(r *etcdpb.WatchResponse) bool { return r.WatchId == allWatchers && r.Header.Revision >= last })
			p.close()
			<-p.ended
			follow(t, l, p.answers, watchers[i])
			for id, a := range watchers[i] {
				a.check(t, id, l)
			}
		}
		if s.hub != nil {
			t.Error("the hub runs without streams")
		}
	})
}

// settle waits until the hub has handed out everything.
func settle(s *Server, l *lone) {
	s.watching.Lock()
	h := s.hub
	s.watching.Unlock()
	for h != nil {
		h.mu.Lock()
		at := h.revision
		h.mu.Unlock()
		if at >= l.fsm.Position().Revision {
			return
		}
		runtime.Gosched()
	}
}

// A client that does not read costs a bounded amount, and nobody else waits for it.
func TestSlowWatcherIsBounded(t *testing.T) {
	l := newLone()
	s := New(Config{Store: l})
	slow, fast := openPipe(t, s), openPipe(t, s)
	for _, p := range []*pipe{slow, fast} {
		for id := int64(1); id <= 3; id++ {
			p.requests <- creating(&etcdpb.WatchCreateRequest{WatchId: id, Key: []byte("k"), RangeEnd: []byte("l")})
		}
		p.until(0, func(r *etcdpb.WatchResponse) bool { return r.Created && r.WatchId == 3 })
	}
	slow.pause(true)
	var st *watchStream
	for of := range s.hub.streams {
		if of.Watch_WatchServer == slow {
			st = of
		}
	}
	value, seen := string(make([]byte, maxQueued/10)), 0
	for i := range 100 {
		revision := l.apply(putting(fmt.Sprint("k", i%7), value))
		for id := int64(1); id <= 3; id++ {
			at := fast.until(seen, func(r *etcdpb.WatchResponse) bool {
				return r.WatchId == id && len(r.Events) > 0 && r.Events[len(r.Events)-1].Kv.ModRevision == revision
			})
			if id == 3 {
				seen = min(seen, at)
			}
		}
		st.mu.Lock()
		queued, length, behind := st.queued, len(st.queue), len(st.behind)
		st.mu.Unlock()
		if queued > maxQueued || length > 30 || behind > 3 {
			t.Fatalf("%d bytes in %d deliveries wait for a client that does not read", queued, length)
		}
	}
	slow.pause(false)
	last := l.apply(putting("k", "last"))
	for id := int64(1); id <= 3; id++ {
		slow.until(0, func(r *etcdpb.WatchResponse) bool {
			return r.WatchId == id && len(r.Events) > 0 && r.Events[len(r.Events)-1].Kv.ModRevision == last
		})
	}
	got := map[int64]int{}
	for _, r := range slow.answers {
		got[r.WatchId] += len(r.Events)
	}
	if got[1] != 101 || got[2] != 101 || got[3] != 101 {
		t.Errorf("the slow ones got %v events", got)
	}
}

// Where the store ends its streams end, so that clients go elsewhere.
func TestWatchEndsWithTheStore(t *testing.T) {
	l := newLone()
	s := New(Config{Store: l})
	p := openPipe(t, s)
	p.requests <- creating(&etcdpb.WatchCreateRequest{Key: []byte("k")})
	p.until(0, func(r *etcdpb.WatchResponse) bool { return r.Created })
	l.mu.Lock()
	l.broken = errors.New("the store is closed")
	close(l.changed)
	l.mu.Unlock()
	<-p.ended
	if status.Code(p.err) != codes.Unavailable {
		t.Errorf("the stream ended with %v", p.err)
	}
	again := openPipe(t, s)
	<-again.ended
	if status.Code(again.err) != codes.Unavailable {
		t.Errorf("the next stream ended with %v", again.err)
	}
}

func TestSpanIndex(t *testing.T) {
	bound := rapid.StringMatching(`[a-c]{1,3}`)
	rapid.Check(t, func(t *rapid.T) {
		var x spanIndex
		var all []*watcher
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				w := &watcher{key: []byte(bound.Draw(t, "key"))}
				switch end := bound.Draw(t, "end"); {
				case end > string(w.key):
					w.end = []byte(end)
				case end[0] == 'a':
					w.end = []byte(toEnd)
				}
				x.add(w)
				all = append(all, w)
			},
			"remove": func(t *rapid.T) {
				if len(all) > 0 {
					i := rapid.IntRange(0, len(all)-1).Draw(t, "which")
					x.remove(all[i])
					all = slices.Delete(all, i, i+1)
				}
			},
			"": func(t *rapid.T) {
				key := bound.Draw(t, "of")
				found := map[*watcher]bool{}
				x.at([]byte(key), func(s *span) {
					for _, w := range s.watchers {
						if found[w] {
							t.Fatal("found twice")
						}
						found[w] = true
					}
				})
				for _, w := range all {
					in := string(w.key) == key
					if len(w.end) > 0 {
						in = string(w.key) <= key && before([]byte(key), w.end)
					}
					if in != found[w] {
						t.Fatalf("%q: %q-%q found: %v", key, w.key, w.end, found[w])
					}
				}
				if x.size != len(all) || len(x.all()) != len(all) {
					t.Fatalf("%d watchers, of %d", x.size, len(all))
				}
			},
		})
	})
}
