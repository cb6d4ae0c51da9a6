package procs

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/persys-dev/persys/chaos/history"
)

var faults = flag.Int("faults", 5, "how many times servers are broken while etcd's clients are recorded")

const (
	historyPrefix = "history/"
	// Each fault has keys of its own: what has an unknown outcome makes a history
	// hard to check.
	historyKeys = 4
	// What must be done while all run and while some are broken.
	historyPhase = 200
)

// recording is clients at work on all servers and a watcher of what they do.
type recording struct {
	c        *Cluster
	servers  map[string]*Process
	clients  map[string]*clientv3.Client // one for each server
	recorder *history.Recorder
	round    atomic.Int64
	marks    int
}

// TestEtcdHistoryUnderFaults: whatever is done to the servers, one order explains
// what clients were told, and a watcher sees every change once and in that order.
func TestEtcdHistoryUnderFaults(t *testing.T) {
	t.Setenv("ETCD_CLIENT_DEBUG", "error") // or each fault is a warning
	c, servers := etcdServers(t)
	r := &recording{c: c, servers: servers, clients: map[string]*clientv3.Client{}, recorder: history.New()}
	for name, s := range servers {
		r.clients[name] = connect(t, net.JoinHostPort(s.IP, etcdPort))
	}
	events := r.watch(t)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var running sync.WaitGroup
	for i := range 2 * len(servers) {
		server := servers[fmt.Sprintf("s%d", i%len(servers)+1)]
		client := r.recorder.Client(connect(t, net.JoinHostPort(server.IP, etcdPort)))
		draw := rand.New(rand.NewPCG(rand.Uint64(), uint64(i)))
		running.Go(func() { r.work(ctx, client, draw, i) })
	}
	breaks := []func() string{
		r.leaderKilled, r.leaderStopped, r.leaderRemembers, r.followerRemembers, r.allKilled, r.followerStopped, r.followerKilled,
	}
	for n := range *faults {
		r.round.Store(int64(n))
		r.progress("all run")
		started := time.Now()
		t.Logf("%s, %s", breaks[n%len(breaks)](), time.Since(started).Round(time.Millisecond))
	}
	r.progress("all run")
	stop()
	running.Wait()

	r.mark()
	seen := events()
	all := r.recorder.Operations()
	t.Logf("%d operations, %d changes", len(all), len(seen))
	if err := history.Check(all, time.Minute); err != nil {
		t.Error(err)
	}
	if err := history.CheckWatch(all, seen); err != nil {
		t.Error(err)
	}
	r.holds(t, history.Latest(seen))
}

func (r *recording) key(n int) string {
	return fmt.Sprintf("%s%d/%d", historyPrefix, r.round.Load(), n)
}

// work asks through one server until ctx ends. Each value is written once.
func (r *recording) work(ctx context.Context, client *history.Client, draw *rand.Rand, id int) {
	revisions := map[string]int64{}
	for n := 0; ctx.Err() == nil; n++ {
		key := r.key(draw.IntN(historyKeys))
		value := fmt.Sprintf("%d.%d", id, n)
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), short)
		var err error
		switch draw.IntN(8) {
		case 0, 1:
			err = client.Put(limited, key, value)
		case 2:
			err = client.Delete(limited, key)
		case 3, 4:
			_, err = client.Swap(limited, key, revisions[key], value)
		default:
			var found history.Found
			if found, err = client.Get(limited, key); err == nil {
				revisions[key] = found.Revision
			}
		}
		cancel()
		if err != nil { // its server is away, perhaps
			select {
			case <-ctx.Done():
			case <-time.After(pollEvery):
			}
		}
	}
}

// watch collects all changes. The result gives them up to the newest mark.
func (r *recording) watch(t *testing.T) (end func() []*clientv3.Event) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints(r.servers, etcdPort), DialTimeout: soon, DialKeepAliveTime: short, DialKeepAliveTimeout: short,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	watch := client.Watch(ctx, historyPrefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created := <-watch; !created.Created {
		t.Fatalf("%+v", created)
	}
	var (
		mu     sync.Mutex
		events []*clientv3.Event
		marked string
		ended  error
	)
	go func() {
		for answer := range watch {
			mu.Lock()
			for _, e := range answer.Events {
				if string(e.Kv.Key) == historyPrefix+"mark" {
					marked = string(e.Kv.Value)
				} else {
					events = append(events, e)
				}
			}
			ended = answer.Err()
			mu.Unlock()
		}
	}()
	return func() []*clientv3.Event {
		t.Helper()
		r.c.Eventually("the watcher sees the last mark", soon, func() error {
			mu.Lock()
			defer mu.Unlock()
			if want := fmt.Sprint(r.marks); marked != want {
				return fmt.Errorf("it saw mark %q of %s, %d events, %v", marked, want, len(events), ended)
			}
			return nil
		})
		mu.Lock()
		defer mu.Unlock()
		return events
	}
}

// progress waits until much was done.
func (r *recording) progress(while string) {
	r.c.t.Helper()
	goal := r.recorder.Len() + historyPhase
	r.c.Eventually("clients get answers while "+while, soon, func() error {
		if n := r.recorder.Len(); n < goal {
			return fmt.Errorf("%d of %d", n, goal)
		}
		return nil
	})
}

// mark writes through one server what each server then must have applied.
func (r *recording) mark() {
	r.c.t.Helper()
	r.marks++
	value := fmt.Sprint(r.marks)
	r.c.Eventually("a mark is put", soon, func() error {
		ctx, cancel := context.WithTimeout(r.c.t.Context(), short)
		defer cancel()
		_, err := r.clients["s1"].Put(ctx, historyPrefix+"mark", value)
		return err
	})
	for name, client := range r.clients {
		r.c.Eventually(name+" has caught up", soon, func() error {
			ctx, cancel := context.WithTimeout(r.c.t.Context(), short)
			defer cancel()
			found, err := client.Get(ctx, historyPrefix+"mark", clientv3.WithSerializable())
			if err == nil && (len(found.Kvs) == 0 || string(found.Kvs[0].Value) != value) {
				err = errors.New("the mark is not there")
			}
			return err
		})
	}
}

// holds demands that every server has these keys, and no others.
func (r *recording) holds(t *testing.T, want map[string]*mvccpb.KeyValue) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	for name, client := range r.clients {
		found, err := client.Get(ctx, historyPrefix, clientv3.WithPrefix(), clientv3.WithSerializable())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, kv := range found.Kvs {
			key := string(kv.Key)
			if key != historyPrefix+"mark" && !proto.Equal(kv, want[key]) {
				t.Errorf("%s has %v, the watch gave %v last", name, kv, want[key])
			}
		}
		if len(found.Kvs) != len(want)+1 {
			t.Errorf("%s has %d keys, the watch gave %d", name, len(found.Kvs)-1, len(want))
		}
	}
}

func (r *recording) leaderKilled() string {
	return "killed the leader, " + r.kill(r.c.leading(r.clients))
}

func (r *recording) leaderStopped() string {
	return "stopped the leader, " + r.pause(r.c.leading(r.clients))
}

func (r *recording) followerKilled() string { return "killed a follower, " + r.kill(r.follower()) }

func (r *recording) followerStopped() string { return "stopped a follower, " + r.pause(r.follower()) }

func (r *recording) allKilled() string {
	for _, s := range r.servers {
		s.Kill()
	}
	for _, s := range r.servers {
		s.Start()
	}
	r.mark()
	return "killed all"
}

func (r *recording) leaderRemembers() string {
	leader := r.c.leading(r.clients)
	return "killed all, and lost but for the leader what was written last: " + r.remembers(leader, leader)
}

func (r *recording) followerRemembers() string {
	leader := r.c.leading(r.clients)
	return "killed all, and lost but for a follower what was written last: " + r.remembers(leader, other(r.servers, r.servers[leader]).Name)
}

// remembers has the leader and one follower write, kills all and starts again one of
// these two and the server that was stopped meanwhile: it must have all on disk.
func (r *recording) remembers(leader, one string) string {
	var stopped, lost string
	for name := range r.servers {
		switch {
		case name == one:
		case name == leader || lost == "" && one == leader && stopped != "":
			lost = name
		default:
			stopped = name
		}
	}
	r.servers[stopped].Pause()
	r.progress(stopped + " is stopped")
	for _, name := range []string{lost, one, stopped} {
		r.servers[name].Kill()
	}
	r.servers[one].Start()
	r.servers[stopped].Start()
	r.progress(lost + " is lost")
	r.servers[lost].Start()
	r.mark()
	return one
}

func (r *recording) follower() string {
	return other(r.servers, r.servers[r.c.leading(r.clients)]).Name
}

func (r *recording) kill(name string) string {
	r.servers[name].Kill()
	r.progress(name + " is dead")
	r.servers[name].Start()
	r.mark()
	return name
}

func (r *recording) pause(name string) string {
	r.servers[name].Pause()
	r.progress(name + " is stopped")
	// What is asked now it answers when it wakes.
	var asked sync.WaitGroup
	for n := range 4 * historyKeys {
		client := r.recorder.Client(r.clients[name])
		asked.Go(func() {
			ctx, cancel := context.WithTimeout(r.c.t.Context(), soon)
			defer cancel()
			_, _ = client.Get(ctx, r.key(n%historyKeys))
		})
	}
	r.progress(name + " is stopped")
	r.servers[name].Resume()
	r.mark()
	asked.Wait()
	return name
}
