package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// talk is one raw Watch stream.
type talk struct {
	t testing.TB
	etcdpb.Watch_WatchClient
}

func talkTo(t testing.TB, ctx context.Context, conn *grpc.ClientConn) *talk {
	t.Helper()
	st, err := etcdpb.NewWatchClient(conn).Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return &talk{t, st}
}

func (w *talk) send(r *etcdpb.WatchRequest) {
	w.t.Helper()
	if err := w.Send(r); err != nil {
		w.t.Fatal(err)
	}
}

func (w *talk) recv() *etcdpb.WatchResponse {
	w.t.Helper()
	r, err := w.Recv()
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func creating(r *etcdpb.WatchCreateRequest) *etcdpb.WatchRequest {
	return &etcdpb.WatchRequest{RequestUnion: &etcdpb.WatchRequest_CreateRequest{CreateRequest: r}}
}

func cancelling(id int64) *etcdpb.WatchRequest {
	return &etcdpb.WatchRequest{RequestUnion: &etcdpb.WatchRequest_CancelRequest{CancelRequest: &etcdpb.WatchCancelRequest{WatchId: id}}}
}

var asksProgress = &etcdpb.WatchRequest{RequestUnion: &etcdpb.WatchRequest_ProgressRequest{ProgressRequest: &etcdpb.WatchProgressRequest{}}}

// create asks for a watcher and expects to get it.
func (w *talk) create(r *etcdpb.WatchCreateRequest) *etcdpb.WatchResponse {
	w.t.Helper()
	w.send(creating(r))
	answer := w.recv()
	if !answer.Created || answer.Canceled {
		w.t.Fatalf("created: %v", answer)
	}
	return answer
}

// events are the next n of any watcher, in order.
func (w *talk) events(n int) (all []*mvccpb.Event) {
	w.t.Helper()
	for len(all) < n {
		all = append(all, w.recv().Events...)
	}
	if len(all) > n {
		w.t.Fatalf("%d events instead of %d: %s", len(all), n, told(all))
	}
	return all
}

// told writes events down: type, key, value, create/mod/version and what was before.
func told(events []*mvccpb.Event) string {
	var all []string
	for _, e := range events {
		line := fmt.Sprintf("%s %s=%s %d/%d/%d", e.Type, e.Kv.Key, e.Kv.Value, e.Kv.CreateRevision, e.Kv.ModRevision, e.Kv.Version)
		if e.PrevKv != nil {
			line += fmt.Sprintf(" was %s %d/%d/%d", e.PrevKv.Value, e.PrevKv.CreateRevision, e.PrevKv.ModRevision, e.PrevKv.Version)
		}
		all = append(all, line)
	}
	return strings.Join(all, "; ")
}

// write proposes operations in one revision and returns it.
func (r *replica) write(ops ...*pb.RequestOp) int64 {
	r.t.Helper()
	answer, err := r.store.Propose(within(r.t, patience), &pb.Txn{Success: ops})
	if err != nil {
		r.t.Fatal(err)
	}
	return answer.Revision
}

func putting(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func deleting(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)}}}
}

func compacting(revision int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: revision}}}
}

func TestWatchRanges(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	first := r.write(putting("a", "1"), putting("b", "1"), putting("b/x", "1"))
	r.write(putting("c", "2"))
	r.write(putting("b", "3"))
	r.write(deleting("b"))
	for _, w := range []struct{ key, end, want string }{
		{"b", "", "b b b"},
		{"b", "c", "b b/x b b"},
		{"b", "\x00", "b b/x c b b"},
		{"a", "b", "a"},
		{"", "\x00", "a b b/x c b b"},
		{"\x00", "\x00", "a b b/x c b b"},
		{"bb", "\x00", "c"},
	} {
		st := talkTo(t, within(t, patience), dial(t, r.endpoint))
		st.create(&etcdpb.WatchCreateRequest{Key: []byte(w.key), RangeEnd: []byte(w.end), StartRevision: first})
		var got []string
		for _, e := range st.events(len(strings.Fields(w.want))) {
			got = append(got, string(e.Kv.Key))
		}
		if strings.Join(got, " ") != w.want {
			t.Errorf("%q to %q: %v, want %s", w.key, w.end, got, w.want)
		}
	}
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	for _, w := range [][2]string{{"b", "b"}, {"b", "a"}, {"", "\x00"[:0] + "\x00"}} {
		st.send(creating(&etcdpb.WatchCreateRequest{Key: []byte(w[0]), RangeEnd: []byte(w[1])}))
		answer := st.recv()
		if empty := w[0] != ""; answer.Canceled != empty || !answer.Created || empty && (answer.WatchId != -1 || answer.CancelReason != reasonEmptyRange) {
			t.Errorf("range %q: %v", w, answer)
		}
	}
}

func TestWatchEventsCarryVersions(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), PrevKv: true, WatchId: 7})
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), WatchId: 8})
	n := r.write(putting("k", "one"))
	r.write(putting("k", "two"))
	r.write(deleting("k"))
	r.write(putting("k", "three"))
	got := map[int64][]*mvccpb.Event{}
	for len(got[7])+len(got[8]) < 8 {
		answer := st.recv()
		if last := answer.Events[len(answer.Events)-1].Kv.ModRevision; answer.Header.Revision < last {
			t.Errorf("header at %d, event at %d", answer.Header.Revision, last)
		}
		got[answer.WatchId] = append(got[answer.WatchId], answer.Events...)
	}
	want := fmt.Sprintf("PUT k=one %[1]d/%[1]d/1; PUT k=two %[1]d/%[2]d/2 was one %[1]d/%[1]d/1; "+
		"DELETE k= 0/%[3]d/0 was two %[1]d/%[2]d/2; PUT k=three %[4]d/%[4]d/1", n, n+1, n+2, n+3)
	if told(got[7]) != want {
		t.Errorf("with prev_kv:\n%s\nwant\n%s", told(got[7]), want)
	}
	want = fmt.Sprintf("PUT k=one %[1]d/%[1]d/1; PUT k=two %[1]d/%[2]d/2; DELETE k= 0/%[3]d/0; PUT k=three %[4]d/%[4]d/1", n, n+1, n+2, n+3)
	if told(got[8]) != want {
		t.Errorf("without:\n%s\nwant\n%s", told(got[8]), want)
	}
}

func TestWatchStartRevisions(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	n := r.write(putting("k", "1"))
	r.write(putting("k", "2"))
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	for id, start := range map[int64]int64{1: n, 2: n + 1, 3: n + 2, 4: n + 3, 5: 0} {
		answer := st.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: start, WatchId: id})
		if answer.Header.Revision != n+1 || answer.WatchId != id || answer.Header.MemberId == 0 || answer.Header.RaftTerm == 0 {
			t.Errorf("created: %v", answer)
		}
		if id > 2 {
			continue
		}
		if want := int(n + 2 - start); len(st.events(want)) != want {
			t.Error(id)
		}
	}
	r.write(putting("k", "3"))
	r.write(putting("k", "4"))
	got := map[int64]string{}
	for missing := 2 + 2 + 2 + 1 + 2; missing > 0; {
		answer := st.recv()
		for _, e := range answer.Events {
			got[answer.WatchId] += string(e.Kv.Value)
			missing--
		}
	}
	for id, want := range map[int64]string{1: "34", 2: "34", 3: "34", 4: "4", 5: "34"} {
		if got[id] != want {
			t.Errorf("watcher %d got %s, want %s", id, got[id], want)
		}
	}
	st.send(creating(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: -1}))
	if answer := st.recv(); answer.WatchId != -1 || !answer.Created || !answer.Canceled || answer.CancelReason != rpctypes.ErrCompacted.Error() {
		t.Errorf("from revision -1: %v", answer)
	}
}

func TestWatchIDs(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	for _, w := range []struct{ ask, want int64 }{{0, 0}, {2, 2}, {0, 1}, {0, 3}, {1 << 40, 1 << 40}, {2, -1}, {0, 4}, {3, -1}} {
		st.send(creating(&etcdpb.WatchCreateRequest{Key: []byte("k"), WatchId: w.ask}))
		answer := st.recv()
		refused := w.want == -1
		if answer.WatchId != w.want || !answer.Created || answer.Canceled != refused || refused != (answer.CancelReason == reasonDuplicateID) {
			t.Errorf("asked for id %d: %v, want %d", w.ask, answer, w.want)
		}
	}
	st.send(cancelling(99)) // no answer
	st.send(cancelling(2))
	if answer := st.recv(); answer.WatchId != 2 || !answer.Canceled || answer.Created || answer.CancelReason != "" {
		t.Errorf("cancelled: %v", answer)
	}
	n := st.create(&etcdpb.WatchCreateRequest{Key: []byte("other"), WatchId: 2}).Header.Revision
	r.write(putting("other", "x"))
	if answer := st.recv(); answer.WatchId != 2 || len(answer.Events) != 1 || answer.Header.Revision != n+1 {
		t.Errorf("an id was used again: %v", answer)
	}
}

func TestWatchFilters(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	const noPut, noDelete = etcdpb.WatchCreateRequest_NOPUT, etcdpb.WatchCreateRequest_NODELETE
	filters := map[int64][]etcdpb.WatchCreateRequest_FilterType{1: {noPut}, 2: {noDelete}, 3: {noPut, noDelete}, 4: nil}
	before := r.write(putting("k", "0"))
	live, past := talkTo(t, within(t, patience), dial(t, r.endpoint)), talkTo(t, within(t, patience), dial(t, r.endpoint))
	for id, f := range filters {
		live.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), Filters: f, WatchId: id})
	}
	r.write(putting("k", "1"))
	r.write(deleting("k"))
	r.write(putting("k", "2"))
	for id, f := range filters {
		past.send(creating(&etcdpb.WatchCreateRequest{Key: []byte("k"), Filters: f, WatchId: id, StartRevision: before + 1}))
	}
	for _, st := range []*talk{live, past} {
		got := map[int64]string{}
		for len(got[1])+len(got[2])+len(got[4]) < 6 {
			answer := st.recv()
			for _, e := range answer.Events {
				got[answer.WatchId] += e.Type.String()[:1]
			}
		}
		if got[1] != "D" || got[2] != "PP" || got[3] != "" || got[4] != "PDP" {
			t.Errorf("filtered: %v", got)
		}
	}
}

func TestWatchCompacted(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	n := r.write(putting("k", "1"))
	r.write(deleting("k"))
	last := r.write(putting("k", "2"))
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), WatchId: 9})
	r.write(compacting(last - 1))
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: n, WatchId: 5})
	answer := st.recv()
	if answer.WatchId != 5 || !answer.Canceled || answer.Created || answer.CompactRevision != last-1 || len(answer.Events) > 0 {
		t.Errorf("from what is compacted: %v", answer)
	}
	// The id is free again, and the compacted revision itself can be watched.
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: last - 1, WatchId: 5, PrevKv: true})
	want := fmt.Sprintf("DELETE k= 0/%d/0; PUT k=2 %d/%d/1", last-1, last, last)
	if got := told(st.events(2)); got != want {
		t.Errorf("from the compacted revision on: %s, want %s", got, want)
	}
	r.write(compacting(r.write(putting("k", "3"))))
	got := map[int64]string{}
	for range 2 {
		answer := st.recv()
		got[answer.WatchId] = told(answer.Events)
	}
	if got[5] == "" || got[9] == "" {
		t.Errorf("those who keep up were cut off: %v", got)
	}
	// The same through etcd's client.
	answers := c.client().Watch(within(t, patience), "k", clientv3.WithRev(n))
	if answer := <-answers; answer.CompactRevision != last+1 || !errors.Is(answer.Err(), rpctypes.ErrCompacted) {
		t.Errorf("client: %v, %v", answer, answer.Err())
	}
}

func TestWatchProgress(t *testing.T) {
	c := newCluster(t, 1, func(c *Config) { c.WatchProgress = 100 * time.Millisecond })
	r := c.replicas[0]
	client := c.client()
	ctx := within(t, patience)
	st := talkTo(t, ctx, dial(t, r.endpoint))
	st.send(asksProgress)
	if answer := st.recv(); answer.WatchId != -1 || answer.Header.Revision == 0 {
		t.Errorf("progress of nobody: %v", answer)
	}
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("quiet"), ProgressNotify: true, WatchId: 3})
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), WatchId: 4})
	n := r.write(putting("k", "1"))
	for told := false; !told; {
		switch answer := st.recv(); {
		case answer.WatchId == 4:
		case answer.WatchId != 3 || len(answer.Events) > 0 || answer.Created || answer.Canceled:
			t.Fatalf("progress: %v", answer)
		default:
			told = answer.Header.Revision >= n
		}
	}
	// On request, at once and for all.
	last := r.write(putting("other", "1"))
	st.send(asksProgress)
	for {
		answer := st.recv()
		if answer.WatchId == 3 {
			continue
		}
		if answer.WatchId != -1 || answer.Header.Revision < last || len(answer.Events) > 0 {
			t.Errorf("progress of all: %v", answer)
		}
		break
	}
	// The same through etcd's client.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	notes := client.Watch(ctx, "quiet", clientv3.WithCreatedNotify())
	if first := <-notes; !first.Created {
		t.Fatalf("created: %v", first)
	}
	if err := client.RequestProgress(ctx); err != nil {
		t.Fatal(err)
	}
	if note := <-notes; !note.IsProgressNotify() || note.Header.Revision < last {
		t.Errorf("client: %v", note)
	}
}

// A watcher from a revision to come is not told of progress before it: its client
// knows of what was before from another replica.
func TestWatchProgressDoesNotGoBack(t *testing.T) {
	c := newCluster(t, 1, func(c *Config) { c.WatchProgress = 20 * time.Millisecond })
	r := c.replicas[0]
	start := r.write(putting("k", "0")) + 5
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("quiet"), StartRevision: start, ProgressNotify: true, WatchId: 3})
	st.send(asksProgress)
	st.send(creating(&etcdpb.WatchCreateRequest{Key: []byte("other"), WatchId: 4}))
	if answer := st.recv(); !answer.Created {
		t.Fatalf("progress to before %d: %v", start, answer)
	}
	for r.store.View().Revision() < start-1 {
		r.write(putting("k", "x"))
	}
	for asked, told := false, false; !asked || !told; {
		answer := st.recv()
		if answer.Header.Revision != start-1 {
			t.Fatalf("progress to before %d: %v", start, answer)
		}
		asked, told = asked || answer.WatchId == -1, told || answer.WatchId == 3
	}
}

// What was asked while a watcher is behind is answered when it is not, after its events.
func TestWatchProgressComesAfterWhatIsOwed(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	first := r.write(putting("k", "0"))
	for range 3000 {
		r.write(putting("k", "x"))
	}
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	st.send(creating(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: first}))
	st.send(asksProgress)
	events := 0
	for {
		answer := st.recv()
		if answer.WatchId == -1 {
			if events != 3001 || answer.Header.Revision < first+3000 {
				t.Errorf("progress to %d after %d events", answer.Header.Revision, events)
			}
			return
		}
		events += len(answer.Events)
	}
}

func TestWatchFragments(t *testing.T) {
	c := newCluster(t, 1, func(c *Config) { c.MaxRequestBytes = 100 << 10 })
	r := c.replicas[0]
	value := strings.Repeat("v", 30<<10)
	var ops []*pb.RequestOp
	for i := range 10 {
		ops = append(ops, putting(fmt.Sprint("k", i), value))
	}
	past, live := talkTo(t, within(t, patience), dial(t, r.endpoint)), talkTo(t, within(t, patience), dial(t, r.endpoint))
	live.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("l"), Fragment: true})
	first := r.write(ops...)
	r.write(ops[:2]...)
	r.write(ops[:2]...)
	past.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("l"), StartRevision: first, Fragment: true})
	for name, st := range map[string]*talk{"live": live, "past": past} {
		for n, total := 0, 0; total < 14; n++ {
			answer := st.recv()
			total += len(answer.Events)
			if len(answer.Events) == 0 || len(answer.Events) > 3 || !answer.Fragment && total < 10 || answer.Fragment && total == 14 {
				t.Errorf("%s: part %d has %d events, fragment %v, total %d", name, n, len(answer.Events), answer.Fragment, total)
			}
		}
	}
	// Who has not asked gets revisions in one piece each, and in one response as long
	// as they fit.
	whole := talkTo(t, within(t, patience), dial(t, r.endpoint))
	whole.create(&etcdpb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("l"), StartRevision: first})
	for _, want := range []int{10, 2, 2} {
		if answer := whole.recv(); len(answer.Events) != want || answer.Fragment {
			t.Errorf("%d events, fragment %v; want %d", len(answer.Events), answer.Fragment, want)
		}
	}
	// etcd's client puts them together.
	answer := <-c.client().Watch(within(t, patience), "k", clientv3.WithPrefix(), clientv3.WithRev(first), clientv3.WithFragment())
	if len(answer.Events) != 14 || answer.Err() != nil {
		t.Errorf("client: %d events, %v", len(answer.Events), answer.Err())
	}
}

// A client that says it has no more requests still gets its events.
func TestWatchGoesOnAfterTheLastRequest(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("k")})
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	r.write(putting("k", "1"))
	st.events(1)
}

func TestWatchLeaseExpiry(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	r.write(&pb.RequestOp{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: 7, TtlSeconds: 1}}})
	put := putting("leased", "x")
	put.GetRequestPut().Lease = 7
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("leased"), PrevKv: true})
	n := r.write(put, putting("other", ""))
	events := st.events(2)
	if got, want := told(events), fmt.Sprintf("PUT leased=x %[1]d/%[1]d/1; DELETE leased= 0/%[2]d/0 was x %[1]d/%[1]d/1", n, events[1].Kv.ModRevision); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if events[0].Kv.Lease != 7 || events[1].PrevKv.Lease != 7 || events[1].Kv.Lease != 0 {
		t.Errorf("leases: %v", events)
	}
}

func TestWatchThatNeedsALeaderEndsWithoutOne(t *testing.T) {
	c := newCluster(t, 3, nil)
	follower := c.follower()
	ctx := within(t, patience)
	led := talkTo(t, metadata.AppendToOutgoingContext(ctx, rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader), dial(t, follower.endpoint))
	led.create(&etcdpb.WatchCreateRequest{Key: []byte("k")})
	free := talkTo(t, ctx, dial(t, follower.endpoint))
	free.create(&etcdpb.WatchCreateRequest{Key: []byte("k")})
	for _, r := range c.replicas {
		if r != follower {
			r.kill()
		}
	}
	if _, err := led.Recv(); !errors.Is(rpctypes.Error(err), rpctypes.ErrNoLeader) {
		t.Errorf("without a leader: %v", err)
	}
	again := talkTo(t, metadata.AppendToOutgoingContext(ctx, rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader), dial(t, follower.endpoint))
	if _, err := again.Recv(); !errors.Is(rpctypes.Error(err), rpctypes.ErrNoLeader) {
		t.Errorf("a new one without a leader: %v", err)
	}
	free.create(&etcdpb.WatchCreateRequest{Key: []byte("k")})
}

func TestWatchEndsWithTheReplica(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	st := talkTo(t, within(t, patience), dial(t, r.endpoint))
	st.create(&etcdpb.WatchCreateRequest{Key: []byte("k")})
	hub := r.etcd.hub
	st.CloseSend()
	r.kill()
	if _, err := st.Recv(); err == nil {
		t.Error("the stream goes on")
	}
	eventually(t, "the hub has ended", func() error {
		r.etcd.watching.Lock()
		defer r.etcd.watching.Unlock()
		if r.etcd.hub != nil {
			return errors.New("it runs")
		}
		return nil
	})
	if hub.synced.size != 0 || hub.ctx.Err() == nil {
		t.Errorf("%d watchers are left", hub.synced.size)
	}
}

func TestSplitBundle(t *testing.T) {
	var b bundle
	for _, e := range []struct {
		revision int64
		size     int
	}{{1, 10}, {1, 10}, {2, 10}, {2, 400}, {3, 10}, {4, 10}, {4, 10}} {
		event := &mvccpb.Event{Kv: &mvccpb.KeyValue{ModRevision: e.revision, Value: bytes.Repeat([]byte("v"), e.size)}}
		b.events = append(b.events, event)
		b.size += sizeOf(event)
	}
	for _, c := range []struct {
		limit    int
		fragment bool
		want     string
	}{
		{1, false, "[2 2 1 2]"}, {1, true, "[1 1 1 1 1 1 1]"}, {1 << 20, false, "[7]"}, {1 << 20, true, "[7]"},
		{300, false, "[2 2 3]"}, {300, true, "[3 1 3]"},
	} {
		var got []int
		for _, part := range b.split(c.limit, c.fragment) {
			got = append(got, len(part.events))
		}
		if fmt.Sprint(got) != c.want {
			t.Errorf("limit %d, fragment %v: %v, want %s", c.limit, c.fragment, got, c.want)
		}
	}
}
