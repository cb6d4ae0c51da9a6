package procs

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// loadKeys is how many keys the load touches; each has a value of loadValue bytes.
const (
	loadKeys  = 10_000
	loadValue = 256
	// Clients that share a connection, beyond the first few.
	clientsPerConn = 25
)

func loadKey(n uint64) string { return fmt.Sprintf("load/%08d", n%loadKeys) }

// measured is one load on one cluster, over one or several rounds.
type measured struct {
	took    time.Duration
	delays  []time.Duration
	cpu     time.Duration // of all servers
	own     time.Duration // of the load itself
	failure error
}

// add joins the rounds of the same load.
func (m *measured) add(o measured) {
	m.took += o.took
	m.delays = append(m.delays, o.delays...)
	m.cpu += o.cpu
	m.own += o.own
	if m.failure == nil {
		m.failure = o.failure
	}
}

func (m *measured) rate() float64 { return float64(len(m.delays)) / m.took.Seconds() }

// quantile is of the delays, which it sorts.
func (m *measured) quantile(q float64) time.Duration {
	if len(m.delays) == 0 {
		return 0
	}
	slices.Sort(m.delays)
	return m.delays[min(len(m.delays)-1, int(q*float64(len(m.delays))))]
}

// operation is what a client of a load does again and again; n is another number
// each time.
type operation func(ctx context.Context, c *clientv3.Client, n uint64) error

// hammer has so many callers repeat the operation for as long as it takes.
func hammer(ctx context.Context, conns []*clientv3.Client, callers int, length time.Duration, op operation) measured {
	ctx, cancel := context.WithTimeout(ctx, length+soon)
	defer cancel()
	var (
		count   atomic.Uint64
		group   sync.WaitGroup
		mu      sync.Mutex
		m       measured
		started = time.Now()
	)
	count.Store(uint64(started.UnixNano()))
	for i := range callers {
		conn := conns[i%len(conns)]
		group.Go(func() {
			delays := make([]time.Duration, 0, 1024)
			var failure error
			for time.Since(started) < length && failure == nil {
				begun := time.Now()
				failure = op(ctx, conn, mix(count.Add(1)))
				delays = append(delays, time.Since(begun))
			}
			mu.Lock()
			defer mu.Unlock()
			m.add(measured{delays: delays, failure: failure})
		})
	}
	group.Wait()
	m.took = time.Since(started)
	return m
}

// mix spreads numbers over the keys, the same for every cluster.
func mix(n uint64) uint64 {
	n *= 0x9e3779b97f4a7c15
	return n ^ n>>32
}

// connections are so many for that many callers, spread over the endpoints.
func connections(t testing.TB, endpoints []string, callers int) []*clientv3.Client {
	t.Helper()
	conns := make([]*clientv3.Client, min(callers, max(len(endpoints), callers/clientsPerConn)))
	for i := range conns {
		conns[i] = connect(t, endpoints[i%len(endpoints)])
	}
	return conns
}

func connect(t testing.TB, endpoint string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: soon})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func value(n uint64) string { return fmt.Sprintf("%0*d", loadValue, n) }

func put(ctx context.Context, c *clientv3.Client, n uint64) error {
	_, err := c.Put(ctx, loadKey(n), value(n))
	return err
}

func linearizable(ctx context.Context, c *clientv3.Client, n uint64) error {
	return found(c.Get(ctx, loadKey(n)))
}

func serializable(ctx context.Context, c *clientv3.Client, n uint64) error {
	return found(c.Get(ctx, loadKey(n), clientv3.WithSerializable()))
}

func found(r *clientv3.GetResponse, err error) error {
	if err == nil && (len(r.Kvs) != 1 || len(r.Kvs[0].Value) != loadValue) {
		return fmt.Errorf("the answer has %d keys", len(r.Kvs))
	}
	return err
}

// txn replaces a value if there is one, and reads it.
func txn(ctx context.Context, c *clientv3.Client, n uint64) error {
	key := loadKey(n)
	r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.Version(key), ">", 0)).
		Then(clientv3.OpPut(key, value(n)), clientv3.OpGet(key)).Commit()
	if err == nil && !r.Succeeded {
		return fmt.Errorf("%s is not there", key)
	}
	return err
}

// keepAlive is one of a stream's of its own, as the client offers it.
func keepAlive(leases []clientv3.LeaseID) operation {
	return func(ctx context.Context, c *clientv3.Client, n uint64) error {
		_, err := c.KeepAliveOnce(ctx, leases[n%uint64(len(leases))])
		return err
	}
}

// fill writes n keys with the prefix in transactions of a hundred.
func fill(ctx context.Context, conns []*clientv3.Client, prefix string, n int) error {
	const page = 100
	ctx, cancel := context.WithTimeout(ctx, 10*soon)
	defer cancel()
	var (
		next   atomic.Int64
		group  sync.WaitGroup
		failed atomic.Pointer[error]
	)
	for i := range 4 * len(conns) {
		group.Go(func() {
			for failed.Load() == nil {
				from := int(next.Add(page)) - page
				if from >= n {
					return
				}
				var ops []clientv3.Op
				for k := from; k < min(n, from+page); k++ {
					ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s%08d", prefix, k), value(uint64(k))))
				}
				if _, err := conns[i%len(conns)].Txn(ctx).Then(ops...).Commit(); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	group.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// delivery has watchers wait for one put after the other; the delays are from the
// put's call to each watcher's event.
func delivery(ctx context.Context, conns []*clientv3.Client, watchers int, length time.Duration) measured {
	ctx, cancel := context.WithTimeout(ctx, length+soon)
	defer cancel()
	type arrival struct {
		at  time.Time
		err error
	}
	arrivals := make(chan arrival, watchers)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	for i := range watchers {
		changes := conns[i%len(conns)].Watch(ctx, "delivery", clientv3.WithCreatedNotify())
		group.Go(func() {
			for r := range changes {
				at := time.Now()
				for range max(1, len(r.Events)) { // the first says that it is created
					select {
					case arrivals <- arrival{at, r.Err()}:
					case <-ctx.Done():
						return
					}
				}
			}
		})
	}
	var m measured
	all := func(from time.Time) (delays []time.Duration) {
		for range watchers {
			select {
			case a := <-arrivals:
				if a.err != nil {
					m.failure = a.err
					return nil
				}
				delays = append(delays, a.at.Sub(from))
			case <-ctx.Done():
				m.failure = fmt.Errorf("a watcher got nothing within %s", length+soon)
				return nil
			}
		}
		return delays
	}
	all(time.Now())
	started := time.Now()
	for n := uint64(0); time.Since(started) < length && m.failure == nil; n++ {
		begun := time.Now()
		if _, err := conns[0].Put(ctx, "delivery", value(n)); err != nil {
			m.failure = err
			return m
		}
		m.delays = append(m.delays, all(begun)...)
	}
	m.took = time.Since(started)
	return m
}
