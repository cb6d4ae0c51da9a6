package etcd

import (
	"context"
	"encoding/base64"
	"runtime"
	"sync/atomic"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"golang.org/x/crypto/bcrypt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxBcryptWaiting bounds those who wait for their password to be looked at, which
// takes some 50 ms of a core: beyond it they are told to come back.
const maxBcryptWaiting = 1024

// bcryptQueue leaves half of the cores to others.
type bcryptQueue struct {
	slots   chan struct{}
	waiting *atomic.Int32
}

func newBcryptQueue() bcryptQueue {
	return bcryptQueue{slots: make(chan struct{}, (runtime.GOMAXPROCS(0)+1)/2), waiting: &atomic.Int32{}}
}

// enter waits for a turn; leave ends it.
func (q bcryptQueue) enter(ctx context.Context) error {
	defer q.waiting.Add(-1)
	if q.waiting.Add(1) > maxBcryptWaiting {
		return rpctypes.ErrGRPCRequestTooManyRequests
	}
	select {
	case q.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return statusOf(ctx.Err())
	}
}

func (q bcryptQueue) leave() { <-q.slots }

// hash is what is kept of a password: bcrypt's hash of it or, where only that is
// given, a hash in base64.
func (a *auth) hash(ctx context.Context, password, hashed string) ([]byte, error) {
	if password == "" && hashed != "" {
		given, err := base64.StdEncoding.DecodeString(hashed)
		if err == nil {
			_, err = bcrypt.Cost(given)
		}
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, "etcdserver: hashedPassword is not a bcrypt hash in base64")
		}
		return given, nil
	}
	if err := a.bcrypt.enter(ctx); err != nil {
		return nil, err
	}
	defer a.bcrypt.leave()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), a.config.BcryptCost)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return hash, nil
}

// matches reports whether the password is the one that was hashed.
func (a *auth) matches(ctx context.Context, hash []byte, password string) (bool, error) {
	if err := a.bcrypt.enter(ctx); err != nil {
		return false, err
	}
	defer a.bcrypt.leave()
	return bcrypt.CompareHashAndPassword(hash, []byte(password)) == nil, nil
}
