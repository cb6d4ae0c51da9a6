package raftstore

import (
	"sync"
	"time"
)

// watchdog notices writes to the disk that do not come back. Raft's main loop
// waits in such a write while its heartbeats go on from goroutines of their own,
// so that a leader whose disk hangs would lead for ever and commit nothing.
type watchdog struct {
	limit time.Duration
	// Called with true when a write has been in flight for longer than limit, and
	// with false when no such write is left.
	changed func(stalled bool)

	mu      sync.Mutex
	overdue int
	stalled bool
}

// guard carries out one write under the clock.
func (w *watchdog) guard(write func() error) error {
	timer := time.AfterFunc(w.limit, func() { w.add(1) })
	defer func() {
		if !timer.Stop() {
			w.add(-1)
		}
	}()
	return write()
}

// add is called with -1 once for each 1, possibly before it.
func (w *watchdog) add(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.overdue += n
	if stalled := w.overdue > 0; stalled != w.stalled {
		w.stalled = stalled
		w.changed(stalled)
	}
}

func (w *watchdog) isStalled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stalled
}
