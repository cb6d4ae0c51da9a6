package procs

import (
	"fmt"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Leases of etcd's clients while processes are stopped and go on: a deposed leader
// ends none when it wakes, and time in which nobody could keep one alive does not
// count.
func TestLeasesWhileServersAreStopped(t *testing.T) {
	c, servers := etcdServers(t)
	ctx := t.Context()
	const ttl = 4
	clients := map[string]*clientv3.Client{}
	for name, s := range servers {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{s.IP + ":" + etcdPort}, DialTimeout: soon})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		clients[name] = client
	}
	first := c.leading(clients)
	var follower *clientv3.Client
	for name, client := range clients {
		if name != first {
			follower = client
		}
	}
	put := func(key string) clientv3.LeaseID {
		granted, err := follower.Grant(ctx, ttl)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := follower.Put(ctx, key, "v", clientv3.WithLease(granted.ID)); err != nil {
			t.Fatal(err)
		}
		return granted.ID
	}
	kept := put("kept")
	alive, err := follower.KeepAlive(ctx, kept)
	if err != nil {
		t.Fatal(err)
	}
	put("left")

	// The leader is stopped for longer than any lease lasts.
	servers[first].Pause()
	c.Eventually("the successor ends what nobody keeps alive", soon, func() error {
		got, err := follower.Get(ctx, "left")
		if err != nil || len(got.Kvs) > 0 {
			return fmt.Errorf("%v, %v", got, err)
		}
		return nil
	})
	servers[first].Resume()
	for name, client := range clients {
		left, err := client.TimeToLive(ctx, kept, clientv3.WithAttachedKeys())
		if err != nil || left.TTL < 0 || len(left.Keys) != 1 {
			t.Errorf("at %s: %v, %v", name, left, err)
		}
	}
	if answer, ok := <-alive; !ok || answer.TTL != ttl {
		t.Errorf("the lease was lost: %v", answer)
	}

	// All are stopped. Its time is over before they go on.
	for _, s := range servers {
		s.Pause()
	}
	<-time.After((ttl + 2) * time.Second)
	for _, s := range servers {
		s.Resume()
	}
	left, err := follower.TimeToLive(ctx, kept, clientv3.WithAttachedKeys())
	if err != nil || left.TTL < 0 || len(left.Keys) != 1 {
		t.Errorf("after all were stopped: %v, %v", left, err)
	}
	if _, err := follower.KeepAliveOnce(ctx, kept); err != nil {
		t.Errorf("after all were stopped: %v", err)
	}
}
