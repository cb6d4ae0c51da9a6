package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// leaseFile lets a restarted agent, and the guard, know what is left of the lease: the machine's
// boot, the time since boot when the last acknowledged heartbeat was sent, and
// the time to live, both in nanoseconds. It is only written while there is
// exclusive work, and not synced: it is worthless after a reboot.
const leaseFile = "lease"

// nodeLease is this node's own view of its lease. The servers count from when a
// heartbeat reaches the leader; here it counts from when that heartbeat was
// sent, which is earlier, so it ends here first.
type nodeLease struct {
	mu   sync.Mutex
	sent time.Time
	ttl  time.Duration
	// keep: write it down.
	keep    atomic.Bool
	changed chan struct{}
	// saving is held while it is written.
	saving sync.Mutex
}

func newNodeLease() *nodeLease { return &nodeLease{changed: make(chan struct{}, 1)} }

// renew notes that a heartbeat sent at that time was acknowledged.
func (l *nodeLease) renew(sent time.Time, ttl time.Duration) {
	l.mu.Lock()
	if sent.After(l.sent) {
		l.sent, l.ttl = sent, ttl
	}
	l.mu.Unlock()
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// lapsed reports whether the lease ended before it was renewed by a heartbeat sent
// at that time. Then the work may have been given to another node meanwhile.
func (l *nodeLease) lapsed(sent time.Time) bool { return sent.After(l.end()) }

// end is when exclusive work has to be down: a quarter of the lease is left to
// do it in. Zero: there never was a lease.
func (l *nodeLease) end() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sent.IsZero() {
		return time.Time{}
	}
	return l.sent.Add(l.ttl - l.ttl/4)
}

// guarded is when the guard stops exclusive work that still runs: a moment after
// end, which is the agent's own time to do so.
func (l *nodeLease) guarded() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent.Add(l.ttl - l.ttl/4 + l.ttl/guardLag)
}

// lastSent is when the newest acknowledged heartbeat was sent.
func (l *nodeLease) lastSent() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent
}

// save writes the lease down where that is asked for.
func (l *nodeLease) save(dir string, now time.Time) error {
	if !l.keep.Load() {
		return nil
	}
	l.saving.Lock()
	defer l.saving.Unlock()
	boot, since, err := sinceBoot()
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	l.mu.Lock()
	sent, ttl := since-now.Sub(l.sent), l.ttl
	l.mu.Unlock()
	path := filepath.Join(dir, leaseFile)
	if err := os.WriteFile(path+".new", fmt.Appendf(nil, "%s %d %d\n", boot, sent, ttl), 0o600); err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	return nil
}

// load takes over what an earlier run of the agent wrote in this boot.
func (l *nodeLease) load(dir string, now time.Time) error {
	data, err := os.ReadFile(filepath.Join(dir, leaseFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	var wrote string
	var sent, ttl time.Duration
	if _, err := fmt.Sscanf(string(data), "%s %d %d\n", &wrote, &sent, &ttl); err != nil {
		return nil // damaged: as good as none
	}
	boot, since, err := sinceBoot()
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	if wrote == boot && sent <= since && ttl > 0 && ttl <= time.Hour {
		l.renew(now.Add(sent-since), ttl)
	}
	return nil
}
