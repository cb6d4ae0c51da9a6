package etcd

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Whether something counts that a leader has proposed and nobody else has heard of,
// turns out when it meets the others again. Nobody waits that long.
func TestUndecidedWriteIsAnswered(t *testing.T) {
	c := newCluster(t, 3, func(c *Config) { c.RequestTimeout = time.Second })
	leader := c.leader()
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := leader.etcd.Put(context.Background(), &etcdpb.PutRequest{Key: []byte("a")}); err != nil {
				ended <- err
				return
			}
		}
	}()
	for _, r := range c.replicas {
		if r != leader {
			r.kill()
		}
	}
	select {
	case err := <-ended:
		wants(t, "a write", err, rpctypes.ErrGRPCTimeout)
	case <-time.After(patience):
		t.Fatal("a write waits for servers that do not come back")
	}
	_, err := leader.etcd.Range(context.Background(), &etcdpb.RangeRequest{Key: []byte("a")})
	wants(t, "a read", err, rpctypes.ErrGRPCTimeout)
}

func TestBounded(t *testing.T) {
	wait := func(ctx context.Context) (int, error) {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	_, err := bounded(context.Background(), time.Millisecond, wait)
	wants(t, "a caller without patience of its own", err, rpctypes.ErrGRPCTimeout)
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	_, err = bounded(ctx, time.Minute, wait)
	wants(t, "a caller's deadline", err, context.DeadlineExceeded)
	ctx, cancel = context.WithCancel(context.Background())
	cancel()
	_, err = bounded(ctx, time.Minute, wait)
	wants(t, "a caller who has gone", err, context.Canceled)
	own := errors.New("own")
	_, err = bounded(context.Background(), time.Minute, func(context.Context) (int, error) { return 0, own })
	wants(t, "an error of the store", err, own)
}

// slowStore answers writes when it may.
type slowStore struct {
	Store
	may chan struct{}
}

func (s slowStore) Propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error) {
	select {
	case <-s.may:
		return nil, rpctypes.ErrGRPCStopped
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Clients that do not wait for answers do not fill the memory.
func TestWritesUnderWayAreBounded(t *testing.T) {
	may := make(chan struct{})
	c := newCluster(t, 1, func(c *Config) {
		c.Store = slowStore{c.Store, may}
		c.MaxRequestBytes = 8 << 20
	})
	server, ctx := c.leader().etcd, within(t, patience)
	large := make([]byte, 7<<20)
	put := func() error {
		return errOf(server.Put(ctx, &etcdpb.PutRequest{Key: []byte("a"), Value: large}))
	}
	const fit = maxUnderWay / (7 << 20) // transactions
	ended := make(chan error, fit)
	for range fit {
		go func() { ended <- put() }()
	}
	eventually(t, "all are under way", func() error {
		if n := server.underWay.Load(); n < fit*int64(len(large)) {
			return fmt.Errorf("%d bytes", n)
		}
		return nil
	})
	wants(t, "one more", put(), rpctypes.ErrGRPCRequestTooManyRequests)
	close(may)
	for range fit {
		wants(t, "a write", <-ended, rpctypes.ErrGRPCStopped)
	}
	wants(t, "a later one", put(), rpctypes.ErrGRPCStopped)
	if n := server.underWay.Load(); n != 0 {
		t.Errorf("%d bytes are left", n)
	}
}
