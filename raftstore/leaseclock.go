package raftstore

import (
	"container/heap"
	"sync"
	"time"

	"github.com/persys-dev/persys/fsm"
)

// leaseClock is the leader's memory of when each lease runs out. That leases exist
// is replicated state, how long they still last is not: keeping a lease alive
// writes nothing. The zero value is not ready; see newLeaseClock.
type leaseClock struct {
	mu     sync.Mutex
	leases map[int64]*lease
	queue  leaseQueue
	// Fires when the next deadline may have come nearer.
	changed broadcast
}

type lease struct {
	id       int64
	ttl      time.Duration
	deadline time.Time
	// Where it stands in the queue; pulled forward only when it comes up, so that
	// keeping alive costs no reordering.
	queued time.Time
	// Its end has been proposed: it cannot be kept alive any more.
	ending bool
}

// newLeaseClock gives every lease one fresh time to live.
func newLeaseClock() *leaseClock { return &leaseClock{leases: map[int64]*lease{}} }

// fill starts the clock with all leases of the state. Changes that are applied
// meanwhile come by update and find the lock taken, or are in the view.
func (c *leaseClock) fill(view func() *fsm.View, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for l := range view().Leases() {
		c.set(l.Id, l.TtlSeconds, now)
	}
}

// update brings the given leases to what the view says of them.
func (c *leaseClock) update(v *fsm.View, ids []int64, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range ids {
		if l, ok := v.Lease(id); ok {
			c.set(id, l.TtlSeconds, now)
		} else {
			delete(c.leases, id)
		}
	}
	c.changed.fire()
}

// set begins the clock of a lease that has none yet. c.mu is held.
func (c *leaseClock) set(id, ttlSeconds int64, now time.Time) {
	if c.leases[id] != nil {
		return
	}
	ttl := time.Duration(ttlSeconds) * time.Second
	l := &lease{id: id, ttl: ttl, deadline: now.Add(ttl), queued: now.Add(ttl)}
	c.leases[id] = l
	heap.Push(&c.queue, l)
}

// keepAlive gives the lease its whole time again, and returns it in seconds; 0
// where there is no such lease.
func (c *leaseClock) keepAlive(id int64, now time.Time) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.leases[id]
	if l == nil || l.ending {
		return 0
	}
	l.deadline = now.Add(l.ttl)
	return int64(l.ttl / time.Second)
}

// remaining is how long the lease still lasts; false where there is none.
func (c *leaseClock) remaining(id int64, now time.Time) (time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.leases[id]
	if l == nil {
		return 0, false
	}
	return max(0, l.deadline.Sub(now)), true
}

// due returns the leases that have run out, and marks them as ending. next is when
// to ask again, zero when there is nothing to wait for.
func (c *leaseClock) due(now time.Time) (ids []int64, next time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) > 0 {
		l := c.queue[0]
		switch {
		case c.leases[l.id] != l || l.ending:
			heap.Pop(&c.queue)
		case l.queued.After(now):
			return ids, l.queued
		case l.deadline.After(l.queued):
			l.queued = l.deadline
			heap.Fix(&c.queue, 0)
		default:
			heap.Pop(&c.queue)
			l.ending = true
			ids = append(ids, l.id)
		}
	}
	return ids, time.Time{}
}

// retry puts a lease back whose end could not be proposed.
func (c *leaseClock) retry(id int64, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.leases[id]; l != nil && l.ending {
		l.ending, l.deadline, l.queued = false, at, at
		heap.Push(&c.queue, l)
	}
}

// drop forgets a lease that the state does not have.
func (c *leaseClock) drop(id int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.leases, id)
}

// shift moves all deadlines: for so long nothing could be heard here.
func (c *leaseClock) shift(by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.leases {
		l.deadline = l.deadline.Add(by)
	}
}

func (c *leaseClock) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.leases)
}

// leaseQueue is a heap by the time queued.
type leaseQueue []*lease

func (q leaseQueue) Len() int           { return len(q) }
func (q leaseQueue) Less(i, j int) bool { return q[i].queued.Before(q[j].queued) }
func (q leaseQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *leaseQueue) Push(x any)        { *q = append(*q, x.(*lease)) }
func (q *leaseQueue) Pop() any {
	old := *q
	l := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return l
}
