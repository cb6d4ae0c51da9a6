package etcd

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/proto/etcd/v3electionpb"
	"github.com/persys-dev/persys/proto/etcd/v3lockpb"
)

func newSession(t testing.TB, client *clientv3.Client, options ...concurrency.SessionOption) *concurrency.Session {
	t.Helper()
	session, err := concurrency.NewSession(client, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Orphan() })
	return session
}

func lockService(client *clientv3.Client) v3lockpb.LockClient {
	return v3lockpb.NewLockClient(client.ActiveConnection())
}

// awaitWaiters waits until so many keys are below a name.
func awaitWaiters(t testing.TB, ctx context.Context, client *clientv3.Client, name string, want int64) {
	t.Helper()
	eventually(t, fmt.Sprint(want, " in the queue of ", name), func() error {
		got, err := client.Get(ctx, name+"/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil || got.Count != want {
			return fmt.Errorf("%v, %v", got, err)
		}
		return nil
	})
}

// Ten clients at all replicas, half by themselves and half through the service: one
// at a time holds the lock, also while the leader is replaced.
func TestMutexExcludes(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, 2*patience)
	const clients, rounds = 10, 5
	var inside, entered atomic.Int32
	var g errgroup.Group
	for i := range clients {
		client := c.client()
		lock := lockByItself
		if i%2 == 1 {
			lock = lockByService
		}
		g.Go(func() error {
			for range rounds {
				lease, err := lock(ctx, client)
				if err != nil {
					return fmt.Errorf("client %d: lock: %w", i, err)
				}
				if n := inside.Add(1); n != 1 {
					return fmt.Errorf("client %d: %d hold the lock", i, n)
				}
				n := entered.Add(1)
				err = insist(ctx, func() error { return errOf(client.Put(ctx, "last", fmt.Sprint(n))) })
				inside.Add(-1)
				if err = errors.Join(err, giveBack(ctx, client, lease)); err != nil {
					return fmt.Errorf("client %d: %w", i, err)
				}
			}
			return nil
		})
	}
	eventually(t, "some have had the lock", func() error {
		if n := entered.Load(); n < clients {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	leader := c.leader()
	leader.kill()
	c.leader()
	leader.start(c, false)
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := entered.Load(); n != clients*rounds {
		t.Errorf("entered %d times, want %d", n, clients*rounds)
	}
}

// lockByItself takes the lock with a lease of its own, and with another one where it
// cannot know what became of a call.
func lockByItself(ctx context.Context, client *clientv3.Client) (lease clientv3.LeaseID, err error) {
	err = insist(ctx, func() error {
		session, err := concurrency.NewSession(client)
		if err != nil {
			return err
		}
		session.Orphan()
		lease = session.Lease()
		if err = concurrency.NewMutex(session, "lock").Lock(ctx); err != nil {
			return errors.Join(err, giveBack(ctx, client, lease))
		}
		return nil
	})
	return lease, err
}

// lockByService asks again when the replica that was asked is lost: with the same
// lease it is the same lock.
func lockByService(ctx context.Context, client *clientv3.Client) (lease clientv3.LeaseID, err error) {
	err = insist(ctx, func() error {
		granted, err := client.Grant(ctx, 60)
		if err == nil {
			lease = granted.ID
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return lease, insist(ctx, func() error {
		return errOf(lockService(client).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock"), Lease: int64(lease)}))
	})
}

// giveBack ends a lease, and with it the lock.
func giveBack(ctx context.Context, client *clientv3.Client, lease clientv3.LeaseID) error {
	err := insist(ctx, func() error { return errOf(client.Revoke(ctx, lease)) })
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return nil // as an earlier attempt did
	}
	return err
}

// insist tries again as long as replicas are lost.
func insist(ctx context.Context, try func() error) error {
	for {
		err := try()
		var known rpctypes.EtcdError
		lost := errors.As(err, &known) && known.Code() == codes.Unavailable || status.Code(err) == codes.Unavailable
		if !lost || ctx.Err() != nil {
			return err
		}
	}
}

func TestTryLock(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	client := c.client()
	one := concurrency.NewMutex(newSession(t, client), "lock")
	other := concurrency.NewMutex(newSession(t, client), "lock")
	if err := one.TryLock(ctx); err != nil {
		t.Fatal(err)
	}
	if err := other.TryLock(ctx); !errors.Is(err, concurrency.ErrLocked) {
		t.Errorf("a second lock: %v", err)
	}
	if err := one.TryLock(ctx); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if err := errors.Join(one.Unlock(ctx), other.TryLock(ctx)); err != nil {
		t.Errorf("after the unlock: %v", err)
	}
	// A lock of the service counts as well.
	if err := other.Unlock(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := lockService(client).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock")}); err != nil {
		t.Fatal(err)
	}
	if err := one.TryLock(ctx); !errors.Is(err, concurrency.ErrLocked) {
		t.Errorf("beside the service: %v", err)
	}
}

func TestLockService(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	leader, follower := c.client(c.leader().endpoint), c.client(c.follower().endpoint)
	session := newSession(t, leader)
	held, err := lockService(leader).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock"), Lease: int64(session.Lease())})
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("lock/%x", session.Lease()); string(held.Key) != want {
		t.Errorf("key %q, want %q", held.Key, want)
	}
	got, err := follower.Get(ctx, string(held.Key))
	if err != nil || len(got.Kvs) != 1 || got.Kvs[0].Lease != int64(session.Lease()) || got.Kvs[0].CreateRevision != held.Header.Revision {
		t.Errorf("key: %v, %v", got, err)
	}
	again, err := lockService(follower).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock"), Lease: int64(session.Lease())})
	if err != nil || string(again.Key) != string(held.Key) {
		t.Errorf("again: %v, %v", again, err)
	}
	// The next waits, here without a lease of its own.
	next := make(chan *v3lockpb.LockResponse, 1)
	go func() {
		answer, err := lockService(follower).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock")})
		if err != nil {
			t.Error(err)
		}
		next <- answer
	}()
	awaitWaiters(t, ctx, leader, "lock", 2)
	select {
	case answer := <-next:
		t.Fatalf("a second lock: %v", answer)
	default:
	}
	released, err := lockService(follower).Unlock(ctx, &v3lockpb.UnlockRequest{Key: held.Key})
	if err != nil {
		t.Fatal(err)
	}
	answer := <-next
	if answer.GetHeader().GetRevision() < released.Header.Revision {
		t.Errorf("unlocked at %v, locked at %v", released, answer)
	}
	if got, err := leader.Get(ctx, string(answer.GetKey())); err != nil || len(got.Kvs) != 1 {
		t.Errorf("the next key: %v, %v", got, err)
	} else if left, err := leader.TimeToLive(ctx, clientv3.LeaseID(got.Kvs[0].Lease)); err != nil || left.GrantedTTL != 60 {
		t.Errorf("its lease: %v, %v", left, err)
	}
	if _, err := lockService(leader).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock"), Lease: 4711}); status.Code(err) != codes.NotFound {
		t.Errorf("a lease that is not: %v", err)
	}
	for _, name := range []string{"/workloads", ""} {
		if _, err := lockService(leader).Lock(ctx, &v3lockpb.LockRequest{Name: []byte(name)}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("a lock among the system's keys: %v", err)
		}
	}
}

// A call that is given up leaves no key, and does not wake the next.
func TestLockThatIsGivenUp(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	client := c.client(c.follower().endpoint)
	held, err := lockService(client).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock")})
	if err != nil {
		t.Fatal(err)
	}
	given, giveUp := context.WithCancel(ctx)
	answers := make(chan error, 2)
	go func() {
		_, err := lockService(client).Lock(given, &v3lockpb.LockRequest{Name: []byte("lock")})
		answers <- err
	}()
	awaitWaiters(t, ctx, client, "lock", 2)
	go func() {
		_, err := lockService(client).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock")})
		answers <- err
	}()
	awaitWaiters(t, ctx, client, "lock", 3)
	giveUp()
	if err := <-answers; status.Code(err) != codes.Canceled {
		t.Errorf("given up: %v", err)
	}
	awaitWaiters(t, ctx, client, "lock", 2)
	select {
	case err := <-answers:
		t.Fatalf("the lock is held by two: %v", err)
	default:
	}
	if _, err := lockService(client).Unlock(ctx, &v3lockpb.UnlockRequest{Key: held.Key}); err != nil {
		t.Fatal(err)
	}
	if err := <-answers; err != nil {
		t.Error(err)
	}
}

// A client that tries again, with its lease, does not lose its place to the call that
// it gave up, which may end later.
func TestLockThatIsTriedAgain(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	client := c.client(c.follower().endpoint)
	held, err := lockService(client).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock")})
	if err != nil {
		t.Fatal(err)
	}
	session := newSession(t, client)
	request := &v3lockpb.LockRequest{Name: []byte("lock"), Lease: int64(session.Lease())}
	given, giveUp := context.WithCancel(ctx)
	first, second := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := lockService(client).Lock(given, request)
		first <- err
	}()
	awaitWaiters(t, ctx, client, "lock", 2)
	go func() {
		_, err := lockService(client).Lock(ctx, request)
		second <- err
	}()
	key := fmt.Sprintf("lock/%x", session.Lease())
	eventually(t, "the second call has come", func() error {
		if got, err := client.Get(ctx, key); err != nil || len(got.Kvs) != 1 || got.Kvs[0].Version != 2 {
			return fmt.Errorf("%v, %v", got, err)
		}
		return nil
	})
	giveUp()
	if err := <-first; status.Code(err) != codes.Canceled {
		t.Errorf("given up: %v", err)
	}
	if _, err := lockService(client).Unlock(ctx, &v3lockpb.UnlockRequest{Key: held.Key}); err != nil {
		t.Fatal(err)
	}
	if err := <-second; err != nil {
		t.Error(err)
	}
	if got, err := client.Get(ctx, key); err != nil || len(got.Kvs) != 1 {
		t.Errorf("the key: %v, %v", got, err)
	}
}

// Who waits with a lease that ends has not got the lock, and who holds it with one
// has lost it.
func TestLockEndsWithItsLease(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	client := c.client()
	holder, waiter := newSession(t, client), newSession(t, client)
	lock := func(s *concurrency.Session) error {
		_, err := lockService(client).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock"), Lease: int64(s.Lease())})
		return err
	}
	if err := lock(holder); err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	go func() { answer <- lock(waiter) }()
	awaitWaiters(t, ctx, client, "lock", 2)
	if _, err := client.Revoke(ctx, waiter.Lease()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Revoke(ctx, holder.Lease()); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; status.Code(err) != codes.Unknown || status.Convert(err).Message() != "mutex: session is expired" {
		t.Errorf("a lock with a lease that has ended: %v", err)
	}
	if err := lock(newSession(t, client)); err != nil {
		t.Errorf("the lock is free: %v", err)
	}
}

// A session ends with its lease, whoever ends that.
func TestSession(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	client := c.client()
	session := newSession(t, client, concurrency.WithTTL(2))
	if _, err := client.Revoke(ctx, session.Lease()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-session.Done():
	case <-ctx.Done():
		t.Error("the session does not learn of its end")
	}
	closed := newSession(t, client)
	if err := closed.Close(); err != nil {
		t.Error(err)
	}
	if left, err := client.TimeToLive(ctx, closed.Lease()); err != nil || left.TTL != -1 {
		t.Errorf("after Close: %v, %v", left, err)
	}
}

// Locks and elections are keys, so the permissions on keys hold for them.
func TestLockAndElectionOfUsers(t *testing.T) {
	c := newCluster(t, 1, quick)
	ctx := within(t, patience)
	nobody := c.client()
	addUser(t, nobody, "ann", "rw mine/ mine0")
	c.enableAuth(nobody)
	ann := c.as("ann")
	for _, test := range []struct {
		client *clientv3.Client
		name   string
		want   codes.Code
	}{
		{ann, "mine", codes.OK},
		{ann, "theirs", codes.PermissionDenied},
		{nobody, "mine", codes.InvalidArgument}, // no user name
	} {
		name := []byte(test.name)
		if _, err := lockService(test.client).Lock(ctx, &v3lockpb.LockRequest{Name: name}); status.Code(err) != test.want {
			t.Errorf("lock %s: %v", name, err)
		}
		vote := append(name, "/vote"...)
		if _, err := electionService(test.client).Campaign(ctx, &v3electionpb.CampaignRequest{Name: vote}); status.Code(err) != test.want {
			t.Errorf("campaign %s: %v", vote, err)
		}
		stream, err := electionService(test.client).Observe(ctx, &v3electionpb.LeaderRequest{Name: vote})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != test.want {
			t.Errorf("observe %s: %v", vote, err)
		}
	}
}
