package etcd

import (
	"context"
	"fmt"
	"strings"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

// watchScript is one conversation, from the revision on at which it begins. It is
// held with etcd and with us, and written down.
type watchScript struct {
	*talk
	kv   etcdpb.KVClient
	base int64
	said []string
}

func newWatchScript(t *testing.T, conn *grpc.ClientConn) *watchScript {
	ctx := within(t, patience)
	s := &watchScript{talk: talkTo(t, ctx, conn), kv: etcdpb.NewKVClient(conn)}
	all, err := s.kv.DeleteRange(ctx, &etcdpb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		t.Fatal(err)
	}
	s.base = all.Header.Revision
	return s
}

// at makes a revision of the script one of the server.
func (s *watchScript) at(revision int64) int64 { return s.base + revision }

func (s *watchScript) put(key, value string) {
	s.t.Helper()
	if _, err := s.kv.Put(context.Background(), &etcdpb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *watchScript) delete(key, end string) {
	s.t.Helper()
	if _, err := s.kv.DeleteRange(context.Background(), &etcdpb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *watchScript) compact(revision int64) {
	s.t.Helper()
	if _, err := s.kv.Compact(context.Background(), &etcdpb.CompactionRequest{Revision: s.at(revision), Physical: true}); err != nil {
		s.t.Fatal(err)
	}
}

// hear writes down the next answers until they hold so many events, or one answer
// where it is none.
func (s *watchScript) hear(events int) {
	s.t.Helper()
	for first := true; first || events > 0; first = false {
		r := s.recv()
		events -= len(r.Events)
		s.said = append(s.said, s.describe(r))
	}
}

func (s *watchScript) relative(revision int64) string {
	if revision <= 0 {
		return fmt.Sprint(revision)
	}
	return fmt.Sprintf("+%d", revision-s.base)
}

func (s *watchScript) describe(r *etcdpb.WatchResponse) string {
	line := fmt.Sprintf("watcher %d at %s", r.WatchId, s.relative(r.Header.Revision))
	if r.Created {
		line += " created"
	}
	if r.Fragment {
		line += " fragment"
	}
	if r.Canceled {
		line += fmt.Sprintf(" canceled %q compacted %s", r.CancelReason, s.relative(r.CompactRevision))
	}
	for _, e := range r.Events {
		kv := e.Kv
		line += fmt.Sprintf("; %s %s=%.10s(%d) %s/%s/%d", e.Type, kv.Key, kv.Value, len(kv.Value), s.relative(kv.CreateRevision), s.relative(kv.ModRevision), kv.Version)
		if p := e.PrevKv; p != nil {
			line += fmt.Sprintf(" was %.10s(%d) %s/%s/%d", p.Value, len(p.Value), s.relative(p.CreateRevision), s.relative(p.ModRevision), p.Version)
		}
	}
	return line
}

// watch sends a request to create a watcher and writes the answer down.
func (s *watchScript) watch(r *etcdpb.WatchCreateRequest) {
	s.t.Helper()
	s.send(creating(r))
	s.hear(0)
}

var watchScripts = map[string]func(s *watchScript){
	"ids": func(s *watchScript) {
		for _, id := range []int64{0, 0, 5, 5, 1, 0, 2, 0, -7, -7} {
			s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), WatchId: id})
		}
		s.send(cancelling(99))
		s.send(cancelling(5))
		s.hear(0)
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("j"), WatchId: 5})
		s.put("j", "1")
		s.hear(1)
	},
	"ranges": func(s *watchScript) {
		for _, r := range [][2]string{{"b", "b"}, {"b", "a"}, {"b", "\x00"}, {"", ""}, {"", "\x00"}, {"\x00", "\x00"}, {"\x00", ""}, {"", "b"}, {"\x00\x00", "\x00"}} {
			s.watch(&etcdpb.WatchCreateRequest{Key: []byte(r[0]), RangeEnd: []byte(r[1])})
		}
	},
	"empty requests": func(s *watchScript) {
		s.send(&etcdpb.WatchRequest{})
		s.send(&etcdpb.WatchRequest{RequestUnion: &etcdpb.WatchRequest_CreateRequest{CreateRequest: &etcdpb.WatchCreateRequest{}}})
		s.hear(0)
		s.send(cancelling(0))
		s.hear(0)
		s.send(cancelling(0))
		s.send(asksProgress)
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), Filters: []etcdpb.WatchCreateRequest_FilterType{7}})
		s.put("k", "1")
		s.hear(1)
	},
	"past": func(s *watchScript) {
		s.put("k", "1")
		s.put("k", "2")
		s.delete("k", "")
		s.put("l", "3")
		s.put("k", "4")
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: s.at(1), PrevKv: true})
		s.hear(4)
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("m"), StartRevision: s.at(3)})
		s.hear(3)
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: s.at(1), Filters: []etcdpb.WatchCreateRequest_FilterType{etcdpb.WatchCreateRequest_NOPUT}})
		s.hear(1)
		s.send(cancelling(0))
		s.hear(0)
		s.send(cancelling(1))
		s.hear(0)
		s.delete("k", "m")
		s.hear(1)
	},
	"present": func(s *watchScript) {
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("m"), PrevKv: true})
		s.put("k", "1")
		s.hear(1)
		s.put("l", "1")
		s.hear(1)
		s.put("z", "1")
		s.put("k", "2")
		s.hear(1)
		s.delete("k", "\x00")
		s.hear(2)
		s.delete("k", "\x00")
		s.put("k", "3")
		s.hear(1)
	},
	"future": func(s *watchScript) {
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: s.at(3)})
		for i := range 4 {
			s.put("k", fmt.Sprint(i))
		}
		s.hear(2)
	},
	"compacted": func(s *watchScript) {
		for i := range 4 {
			s.put("k", fmt.Sprint(i))
		}
		s.compact(3)
		for start := int64(1); start < 3; start++ {
			s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: s.at(start), WatchId: 100 + start})
			s.hear(0)
		}
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), StartRevision: s.at(3), PrevKv: true})
		s.hear(2)
		s.send(cancelling(101)) // has ended
	},
	"fragments": func(s *watchScript) {
		for range 3 {
			for i := range 3 {
				s.put(fmt.Sprint("k", i), strings.Repeat("v", 900<<10))
			}
		}
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("l"), StartRevision: s.at(1), Fragment: true})
		var n int
		for n < 9 {
			n += len(s.recv().Events)
		}
		s.said = append(s.said, fmt.Sprint(n))
	},
	"progress": func(s *watchScript) {
		s.watch(&etcdpb.WatchCreateRequest{Key: []byte("k")})
		s.put("other", "1")
		s.send(asksProgress)
		s.hear(0)
	},
}

// The same conversations with Debian's etcd and with us.
func TestWatchConversationsAreThoseOfEtcd(t *testing.T) {
	reference := dial(t, startEtcd(t))
	ours := dial(t, newCluster(t, 1, nil).replicas[0].endpoint)
	for name, script := range watchScripts {
		t.Run(name, func(t *testing.T) {
			var said [2]string
			for i, conn := range []*grpc.ClientConn{reference, ours} {
				s := newWatchScript(t, conn)
				script(s)
				said[i] = strings.Join(s.said, "\n")
			}
			if said[0] != said[1] {
				t.Errorf("etcd:\n%s\nhere:\n%s", said[0], said[1])
			}
		})
	}
}
