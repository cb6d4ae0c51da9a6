package etcd

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// inUse is heap and stacks, in bytes.
func inUse() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return float64(m.HeapInuse + m.StackInuse)
}

// BenchmarkIdleWatchers reports what a watcher takes that nothing happens to: on
// one stream, and on a stream of its own without and with gRPC, both ends of it.
func BenchmarkIdleWatchers(b *testing.B) {
	const watchers = 10_000
	key := func(i int) []byte { return fmt.Appendf(nil, "/registry/pods/default/pod-%05d", i) }
	created := func(r *etcdpb.WatchResponse) bool { return r.Created }
	for name, open := range map[string]func(b *testing.B) any{
		"one stream": func(b *testing.B) any {
			s := New(Config{Store: newLone()})
			p := openPipe(b, s)
			for i := range watchers {
				p.requests <- creating(&etcdpb.WatchCreateRequest{Key: key(i)})
			}
			p.until(0, func(r *etcdpb.WatchResponse) bool { return r.WatchId == watchers-1 })
			p.answers = nil
			return p
		},
		"streams": func(b *testing.B) any {
			s := New(Config{Store: newLone()})
			pipes := make([]*pipe, watchers)
			for i := range pipes {
				pipes[i] = openPipe(b, s)
				pipes[i].requests <- creating(&etcdpb.WatchCreateRequest{Key: key(i), RangeEnd: key(i + 1)})
				pipes[i].until(0, created)
				pipes[i].answers = nil
			}
			return pipes
		},
		"gRPC streams": func(b *testing.B) any {
			r := newCluster(b, 1, nil).replicas[0]
			talks := make([]*talk, watchers)
			conn := dial(b, r.endpoint)
			for i := range talks {
				talks[i] = talkTo(b, b.Context(), conn)
				talks[i].create(&etcdpb.WatchCreateRequest{Key: key(i)})
			}
			return talks
		},
	} {
		b.Run(name, func(b *testing.B) {
			var taken float64
			for b.Loop() {
				before := inUse()
				held := open(b)
				taken += inUse() - before
				runtime.KeepAlive(held)
			}
			b.ReportMetric(taken/float64(b.N)/watchers, "B/watcher")
			b.ReportMetric(taken/float64(b.N)/(1<<20), "MiB")
		})
	}
}

// BenchmarkDelivery is a put that 100 watchers wait for, each on a stream of its
// own, until the last of them has it.
func BenchmarkDelivery(b *testing.B) {
	const watchers = 100
	r := newCluster(b, 1, nil).replicas[0]
	conn := dial(b, r.endpoint)
	var all sync.WaitGroup
	var talks []*talk
	for range watchers {
		w := talkTo(b, b.Context(), conn)
		w.create(&etcdpb.WatchCreateRequest{Key: []byte("k")})
		talks = append(talks, w)
	}
	value := string(make([]byte, 256))
	var mu sync.Mutex
	var took []time.Duration
	for b.Loop() {
		all.Add(watchers)
		var applied time.Time
		start := make(chan struct{})
		for _, w := range talks {
			go func() {
				defer all.Done()
				w.recv()
				<-start
				mu.Lock()
				defer mu.Unlock()
				took = append(took, time.Since(applied))
			}()
		}
		r.write(putting("k", value))
		applied = time.Now()
		close(start)
		all.Wait()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "µs-p50")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "µs-p99")
}

// BenchmarkDispatch is what a put costs that concerns one of many watchers.
func BenchmarkDispatch(b *testing.B) {
	for _, kind := range []string{"keys", "prefixes"} {
		for _, n := range []int{100, 10_000} {
			b.Run(fmt.Sprintf("%s/%d", kind, n), func(b *testing.B) {
				l := newLone()
				h := &watchHub{server: New(Config{Store: l}), owing: map[*watchStream]struct{}{}}
				st := &watchStream{wake: make(chan struct{}, 1), hub: h}
				for i := range n {
					w := &watcher{stream: st, key: fmt.Appendf(nil, "k%06d", i), synced: true}
					if kind == "prefixes" {
						w.end = fmt.Appendf(nil, "k%06d", i+1)
					}
					h.synced.add(w)
				}
				l.apply(putting(fmt.Sprintf("k%06d", n/2), "value"))
				b.ReportAllocs()
				for b.Loop() {
					h.dispatch(l.events, 2)
					if queue, _ := st.take(); len(queue) != 1 {
						b.Fatal("nobody was told")
					}
					st.queued = 0
				}
			})
		}
	}
}
