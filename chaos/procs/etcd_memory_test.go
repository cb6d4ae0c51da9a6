package procs

import (
	"context"
	"fmt"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	memoryKeys     = 1_000_000
	memoryWatchers = 10_000
	mebibyte       = 1 << 20
)

// TestMemoryBesideEtcd measures what watchers that wait and keys that lie there take
// in three of our servers and three of etcd's. It is skipped without -round, as
// TestBesideEtcd is.
func TestMemoryBesideEtcd(t *testing.T) {
	if *round == 0 {
		t.Skip("-round is not given")
	}
	for _, start := range []func(testing.TB) *rival{etcdRival, persysRival} {
		measureMemory(t, start(t))
	}
}

func measureMemory(t *testing.T, r *rival) {
	conns := connections(t, r.endpoints, 1000)
	if err := fill(t.Context(), conns, "load/", 100); err != nil {
		t.Fatalf("%s: %v", r.name, err)
	}
	before := r.resident()
	stop := watchIdly(t, connections(t, r.endpoints[:1], 20*clientsPerConn), memoryWatchers)
	watching := r.resident()
	stop()
	if err := fill(t.Context(), conns, "load/", memoryKeys); err != nil {
		t.Fatalf("%s: %v", r.name, err)
	}
	fmt.Printf("%s: %d watchers of other keys at one server: %d MiB; %d keys of %d bytes: %d MiB resident in the largest server\n",
		r.name, memoryWatchers, (watching-before)/mebibyte, memoryKeys, loadValue, r.resident()/mebibyte)
}

// watchIdly returns when all watchers are in place.
func watchIdly(t *testing.T, conns []*clientv3.Client, watchers int) context.CancelFunc {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	created := make(chan error, watchers)
	for i := range watchers {
		changes := conns[i%len(conns)].Watch(ctx, fmt.Sprintf("idle/%d", i), clientv3.WithCreatedNotify())
		go func() {
			r := <-changes
			created <- r.Err()
			<-changes // ends with the watch
		}()
	}
	for range watchers {
		if err := <-created; err != nil {
			cancel()
			t.Fatal(err)
		}
	}
	return cancel
}
