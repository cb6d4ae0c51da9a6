package etcd

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/persys-dev/persys/chaos/history"
)

// Clients of all replicas read, write, delete and swap a few keys, while the leader
// is killed and comes back. What they were told must be explained by one order.
func TestHistoryIsLinearizable(t *testing.T) {
	const keys, clients, phase = 6, 5, 400
	c := newCluster(t, 3, nil)
	recorder := history.New()
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for i := range clients {
		client := recorder.Client(c.client())
		running.Go(func() { work(ctx, client, rand.New(rand.NewPCG(1, uint64(i))), i, keys) })
	}
	until := func(what string) {
		t.Helper()
		goal := recorder.Len() + phase
		eventually(t, what, func() error {
			if n := recorder.Len(); n < goal {
				return fmt.Errorf("%d of %d operations", n, goal)
			}
			return nil
		})
	}
	until("work while all run")
	victim := c.leader()
	victim.kill()
	until("work while one is away")
	victim.start(c, false)
	until("work when it is back")
	stop()
	running.Wait()
	if err := history.Check(recorder.Operations(), patience); err != nil {
		t.Error(err)
	}
}

// work asks until ctx ends. Each value is written once.
func work(ctx context.Context, client *history.Client, draw *rand.Rand, id, keys int) {
	seen := map[string]int64{}
	for n := 0; ctx.Err() == nil; n++ {
		key, value := fmt.Sprintf("key%d", draw.IntN(keys)), fmt.Sprintf("%d.%d", id, n)
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		// Errors are recorded as what they say: nothing.
		switch draw.IntN(8) {
		case 0, 1:
			_ = client.Put(limited, key, value)
		case 2:
			_ = client.Delete(limited, key)
		case 3, 4:
			_, _ = client.Swap(limited, key, seen[key], value)
		default:
			if found, err := client.Get(limited, key); err == nil {
				seen[key] = found.Revision
			}
		}
		cancel()
	}
}
