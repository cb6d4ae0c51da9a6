package raftstore

import (
	"context"
	"runtime"
	"sync"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// call is what one caller waits for: a transaction of its own, or the batch that
// another replica has forwarded.
type call struct {
	// A call whose caller has gone before it was proposed is dropped.
	ctx  context.Context
	txns []*pb.Txn
	// The transactions encoded for an entry; made when it is known that the entry
	// is made here.
	encoded []byte
	size    int
	// Only this replica may propose it, and only as the leader.
	here bool
	// When it was queued first.
	since time.Time
	// It was sent to another replica, when machine.remembered was this; see
	// Store.repeatable.
	sent       bool
	remembered uint64

	done chan outcome // takes one, never blocks
}

type outcome struct {
	results []*pb.TxnResult
	index   uint64 // of the log entry
	err     error
}

func newCall(ctx context.Context, txns ...*pb.Txn) *call {
	return &call{ctx: ctx, txns: txns, since: time.Now(), done: make(chan outcome, 1)}
}

func (c *call) fail(err error) { c.done <- outcome{err: err} }

// encode makes c.encoded.
func (c *call) encode() error {
	if c.encoded != nil {
		return nil
	}
	var b []byte
	for _, t := range c.txns {
		var err error
		if b, err = appendTxn(b, t); err != nil {
			return err
		}
	}
	c.encoded, c.size = b, len(b)
	return nil
}

// hasIDs reports whether all transactions carry request ids.
func (c *call) hasIDs() bool {
	for _, t := range c.txns {
		if len(t.RequestId) == 0 {
			return false
		}
	}
	return true
}

// queue holds the calls that wait to be proposed, oldest first.
type queue struct {
	wake chan struct{}

	mu     sync.Mutex
	calls  []*call
	closed error
}

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1)} }

func (q *queue) push(calls ...*call) {
	q.mu.Lock()
	if err := q.closed; err != nil {
		q.mu.Unlock()
		for _, c := range calls {
			c.fail(err)
		}
		return
	}
	q.calls = append(q.calls, calls...)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *queue) empty() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.calls) == 0
}

// gather lets go of the processor for as long as the queue grows by that. The
// callers of the entry before have just been woken and are about to come again;
// without it half of them would miss this entry, and all would wait for two.
func (q *queue) gather() {
	for n := -1; ; {
		q.mu.Lock()
		now := len(q.calls)
		q.mu.Unlock()
		if now == n || now >= maxEntryTxns {
			return
		}
		n = now
		runtime.Gosched()
	}
}

// take removes calls from the front: at least one, and more as long as they hold
// no more than the given transactions and bytes together. Calls that nobody waits
// for any more are dropped.
func (q *queue) take(maxTxns, maxBytes int) []*call {
	q.mu.Lock()
	defer q.mu.Unlock()
	var taken []*call
	n, txns, bytes := 0, 0, 0
	for ; n < len(q.calls); n++ {
		c := q.calls[n]
		if c.ctx.Err() != nil {
			c.fail(c.ctx.Err())
			continue
		}
		if len(taken) > 0 && (txns+len(c.txns) > maxTxns || bytes+c.size > maxBytes) {
			break
		}
		taken = append(taken, c)
		txns += len(c.txns)
		bytes += c.size
	}
	clear(q.calls[:n])
	q.calls = q.calls[n:]
	if len(q.calls) == 0 {
		q.calls = nil
	}
	return taken
}

// remove takes out the calls that satisfy the condition.
func (q *queue) remove(cond func(*call) bool) []*call {
	q.mu.Lock()
	defer q.mu.Unlock()
	var out []*call
	kept := q.calls[:0]
	for _, c := range q.calls {
		if cond(c) {
			out = append(out, c)
		} else {
			kept = append(kept, c)
		}
	}
	clear(q.calls[len(kept):])
	q.calls = kept
	return out
}

// close fails what waits and what comes.
func (q *queue) close(err error) {
	q.mu.Lock()
	calls := q.calls
	q.calls, q.closed = nil, err
	q.mu.Unlock()
	for _, c := range calls {
		c.fail(err)
	}
}
