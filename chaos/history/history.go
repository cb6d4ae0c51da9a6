// Package history records what clients of etcd's API asked and what they were
// told, so that it can be checked whether one order of it all explains every
// answer. It owns the recorder, the model of the keyspace that histories are
// checked against, and the check; who asks what, and what is broken meanwhile, is
// the test's.
package history

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
)

// Recorder collects the operations of any number of clients.
type Recorder struct {
	began time.Time

	mu         sync.Mutex
	clients    int
	operations []porcupine.Operation
	last       int64
}

// New is an empty recorder.
func New() *Recorder { return &Recorder{began: time.Now()} }

// Client is a client whose operations are recorded. It is for one goroutine.
type Client struct {
	r  *Recorder
	id int
	kv clientv3.KV
}

// Client records what is asked through it of kv.
func (r *Recorder) Client(kv clientv3.KV) *Client {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clients++
	return &Client{r: r, id: r.clients - 1, kv: kv}
}

// Len is how many operations have ended so far.
func (r *Recorder) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.operations)
}

// Operations is the history. What has an unknown outcome may have taken effect at
// any time after it was asked for, and ends after all else.
func (r *Recorder) Operations() []porcupine.Operation {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := slices.Clone(r.operations)
	for i := range all {
		if all[i].Output.(Output).Unknown {
			all[i].Return = r.last + 1
		}
	}
	return all
}

// Put writes a key.
func (c *Client) Put(ctx context.Context, key, value string) error {
	return c.record(Input{Kind: Put, Key: key, Value: value}, func() (Output, error) {
		answer, err := c.kv.Put(ctx, key, value)
		if err != nil {
			return Output{}, err
		}
		return Output{Revision: answer.Header.Revision}, nil
	})
}

// Delete deletes a key.
func (c *Client) Delete(ctx context.Context, key string) error {
	return c.record(Input{Kind: Delete, Key: key}, func() (Output, error) {
		answer, err := c.kv.Delete(ctx, key)
		if err != nil {
			return Output{}, err
		}
		return Output{Revision: answer.Header.Revision, OK: answer.Deleted == 1}, nil
	})
}

// Get reads a key, linearizably. found is its value and revision; revision 0 says
// that there is no such key.
func (c *Client) Get(ctx context.Context, key string) (found Found, err error) {
	err = c.record(Input{Kind: Get, Key: key}, func() (Output, error) {
		answer, err := c.kv.Get(ctx, key)
		if err != nil {
			return Output{}, err
		}
		if len(answer.Kvs) > 0 {
			found = Found{Value: string(answer.Kvs[0].Value), Revision: answer.Kvs[0].ModRevision}
		}
		return Output{Revision: answer.Header.Revision, Found: found}, nil
	})
	return found, err
}

// Swap writes a key if it was last changed at a revision, 0 for a key that must not
// exist; otherwise it reads it.
func (c *Client) Swap(ctx context.Context, key string, revision int64, value string) (swapped bool, err error) {
	err = c.record(Input{Kind: Swap, Key: key, Value: value, If: revision}, func() (Output, error) {
		answer, err := c.kv.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
			Then(clientv3.OpPut(key, value)).Else(clientv3.OpGet(key)).Commit()
		if err != nil {
			return Output{}, err
		}
		swapped = answer.Succeeded
		out := Output{Revision: answer.Header.Revision, OK: swapped}
		if !swapped {
			for _, kv := range answer.Responses[0].GetResponseRange().Kvs {
				out.Found = Found{Value: string(kv.Value), Revision: kv.ModRevision}
			}
		}
		return out, nil
	})
	return swapped, err
}

func (c *Client) record(in Input, ask func() (Output, error)) error {
	called := time.Since(c.r.began).Nanoseconds()
	out, err := ask()
	returned := time.Since(c.r.began).Nanoseconds()
	if err != nil {
		if in.Kind == Get || refused(err) {
			return err // it says nothing
		}
		out = Output{Unknown: true}
	}
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.r.last = max(c.r.last, returned)
	c.r.operations = append(c.r.operations, porcupine.Operation{
		ClientId: c.id, Input: in, Call: called, Output: out, Return: returned,
	})
	return err
}

// refused reports whether the error says that nothing was changed.
func refused(err error) bool {
	known, ok := err.(rpctypes.EtcdError)
	if !ok {
		return false
	}
	switch known.Code() {
	case codes.InvalidArgument, codes.NotFound, codes.OutOfRange, codes.FailedPrecondition, codes.PermissionDenied:
		return true
	}
	return false
}
