package raftstore

import (
	"container/heap"
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/persys-dev/persys/fsm"
)

const (
	// The clock of the leases looks so often, and takes this process for stopped
	// where it could not for that long.
	leaseTick = 100 * time.Millisecond
	pausedFor = 250 * time.Millisecond
	// A stop as long as this is worth a warning.
	pausedForLong = 2 * time.Second
)

// leaseClock is the leader's memory of when each lease runs out. That leases exist
// is replicated state, how long they still last is not: keeping a lease alive
// writes nothing.
//
// It stands still while this process does: a leader that was stopped heard nobody
// in that time, so it does not count.
type leaseClock struct {
	log *slog.Logger

	mu     sync.Mutex
	leases map[int64]*lease
	queue  leaseQueue
	// For how long this process was stopped, all in all, and when it was last seen
	// to run. Deadlines are times as if it had never been stopped.
	stopped time.Duration
	seen    time.Time
	// Fires when a deadline may have come nearer, and when the end of a lease is
	// decided.
	changed broadcast
}

type lease struct {
	id       int64
	ttl      time.Duration
	deadline time.Time
	// Where it stands in the queue; pulled forward only when it comes up, so that
	// keeping alive costs no reordering.
	queued time.Time
	// Its end is proposed: whether it can be kept alive will turn out.
	ending bool
}

func newLeaseClock(log *slog.Logger) *leaseClock {
	return &leaseClock{log: log, leases: map[int64]*lease{}}
}

// run notices until ctx ends when this process is stopped.
func (c *leaseClock) run(ctx context.Context) error {
	c.mu.Lock()
	c.seen = time.Now()
	c.mu.Unlock()
	ticker := time.NewTicker(leaseTick)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			c.mu.Lock()
			c.at(time.Now())
			c.mu.Unlock()
		}
	}
}

// at is a time as if this process had never been stopped. c.mu is held.
func (c *leaseClock) at(now time.Time) time.Time {
	if gap := now.Sub(c.seen); !c.seen.IsZero() && gap > 0 {
		if gap > pausedFor {
			level := slog.LevelDebug // as a busy machine does
			if gap > pausedForLong {
				level = slog.LevelWarn
			}
			c.log.Log(context.Background(), level, "this process was stopped; leases are given the time back", "for", gap)
			c.stopped += gap
		}
		c.seen = now
	}
	return now.Add(-c.stopped)
}

// fill starts the clock with all leases of the state, as if they had been granted
// at a time. Changes that are applied meanwhile come by update and find the lock
// taken, or are in the view.
func (c *leaseClock) fill(view func() *fsm.View, from time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for l := range view().Leases() {
		c.set(l.Id, l.TtlSeconds, from)
	}
}

// update follows what was granted and revoked, which the view shows. An id that is
// granted anew is another lease, also where both came at once.
func (c *leaseClock) update(v *fsm.View, effects []leaseEffect, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now = c.at(now)
	for _, e := range effects {
		if e.revoked {
			delete(c.leases, e.id)
		}
		if l, ok := v.Lease(e.id); ok {
			c.set(e.id, l.TtlSeconds, now)
		}
	}
	c.changed.fire()
}

// set begins the clock of a lease that has none yet. c.mu is held.
func (c *leaseClock) set(id, ttlSeconds int64, from time.Time) {
	if c.leases[id] != nil {
		return
	}
	ttl := time.Duration(ttlSeconds) * time.Second
	l := &lease{id: id, ttl: ttl, deadline: from.Add(ttl), queued: from.Add(ttl)}
	c.leases[id] = l
	heap.Push(&c.queue, l)
}

// kept is what became of an attempt to keep leases alive.
type kept struct {
	// The seconds granted, 0 where there is no such lease.
	ttls []int64
	// Whether one was missing, and whether the end of one is proposed: it is not
	// known yet whether it lives.
	missing, ending bool
}

// keepAlive gives the leases their whole time again.
func (c *leaseClock) keepAlive(ids []int64, now time.Time) kept {
	k := kept{ttls: make([]int64, len(ids))}
	c.mu.Lock()
	defer c.mu.Unlock()
	now = c.at(now)
	for i, id := range ids {
		switch l := c.leases[id]; {
		case l == nil:
			k.missing = true
		case l.ending:
			k.ending = true
		default:
			if d := now.Add(l.ttl); d.After(l.deadline) {
				l.deadline = d
			}
			k.ttls[i] = int64(l.ttl / time.Second)
		}
	}
	return k
}

// remaining is how long the leases still last, -1 where there is none.
func (c *leaseClock) remaining(ids []int64, now time.Time) (left []time.Duration, missing bool) {
	left = make([]time.Duration, len(ids))
	c.mu.Lock()
	defer c.mu.Unlock()
	now = c.at(now)
	for i, id := range ids {
		if l := c.leases[id]; l != nil {
			left[i] = max(0, l.deadline.Sub(now))
		} else {
			left[i], missing = -1, true
		}
	}
	return left, missing
}

// due returns some of the leases that have run out, and marks them as ending. next
// is when to ask again, zero when there is nothing to wait for.
func (c *leaseClock) due(now time.Time, most int) (ids []int64, next time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now = c.at(now)
	for len(c.queue) > 0 && len(ids) < most {
		l := c.queue[0]
		switch {
		case c.leases[l.id] != l || l.ending:
			heap.Pop(&c.queue)
		case l.queued.After(now):
			return ids, l.queued.Add(c.stopped)
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
		at = at.Add(-c.stopped)
		l.ending, l.deadline, l.queued = false, at, at
		heap.Push(&c.queue, l)
		c.changed.fire()
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
