package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"time"
)

const (
	// guardPoll is how often a guard looks while the lease is over: an agent that
	// wakes may just have been about to start something.
	guardPoll = 500 * time.Millisecond
	// guardLag is the part of the lease that an agent which works has to itself,
	// to stop exclusive work, before the guard does.
	guardLag = 10
	// guardCall bounds a question to a runtime.
	guardCall = 5 * time.Second
)

// guard is the agent's hold on the process that stops exclusive work when the
// agent can't: it may be dead, stopped, or starved while what it has started
// runs on. The process ends some time after the agent, or release, has let go
// of it; see Guard. With no command there is none, as in tests of one process.
type guard struct {
	command func() *exec.Cmd

	mu sync.Mutex
	// owner is what the guard reads its owner's end from; nil: none stands.
	owner  io.Closer
	exited chan struct{}
}

// stand sees to it that the guard is there.
func (g *guard) stand() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.command == nil {
		return nil
	}
	if g.owner != nil {
		select {
		case <-g.exited:
			g.owner.Close()
			g.owner = nil
		default:
			return nil
		}
	}
	cmd := g.command()
	owner, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("guard: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return errors.Join(fmt.Errorf("guard: %w", err), owner.Close())
	}
	exited := make(chan struct{})
	go func() { // ends with the guard, which may outlive the agent
		defer close(exited)
		_ = cmd.Wait()
	}()
	g.owner, g.exited = owner, exited
	return nil
}

// release lets the guard end when the lease that it knows of is over.
func (g *guard) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.owner != nil {
		g.owner.Close()
		g.owner = nil
	}
}

// GuardConfig is what Guard works with.
type GuardConfig struct {
	// DataDir is that of the agent: there it writes its lease down.
	DataDir  string
	Runtimes []Runtime
	// Owner is read until it ends, with the agent that started the guard.
	Owner  io.Reader
	Logger *slog.Logger
}

// Guard stops what is exclusive whenever the lease on disk is over, by the time
// of this machine, and has no other duty. It returns when its agent is gone and
// either nothing exclusive runs any more or another agent renews the lease: that
// one has a guard of its own.
func Guard(ctx context.Context, cfg GuardConfig) error {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = io.Copy(io.Discard, cfg.Owner)
	}()
	lease := newNodeLease()
	var inherited time.Time // sent of the lease when the agent was gone
	owned := true
	for ctx.Err() == nil {
		if err := lease.load(cfg.DataDir, time.Now()); err != nil {
			cfg.Logger.Warn("guard: the lease can't be read", "error", err)
		}
		select {
		case <-gone:
			if owned {
				owned, inherited = false, lease.lastSent()
			}
		default:
		}
		if !owned && lease.lastSent().After(inherited.Add(clockSlack)) {
			return nil
		}
		if left := time.Until(lease.guarded()); left > 0 {
			ended := gone
			if !owned {
				ended = nil
			}
			waitFor(ctx, left, ended)
			continue
		}
		running, err := stopExclusive(ctx, cfg, lease)
		if err != nil {
			cfg.Logger.Error("guard: exclusive work could not be stopped; trying again", "error", err)
		} else if !owned && running == 0 {
			return nil
		}
		waitFor(ctx, guardPoll, nil)
	}
	return nil
}

// clockSlack is by how much the same moment may differ when it is computed from
// two clocks at two times.
const clockSlack = 100 * time.Millisecond

func waitFor(ctx context.Context, d time.Duration, early <-chan struct{}) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-early:
	case <-timer.C:
	}
}

// stopExclusive stops all exclusive work that runs, and returns how much of it
// there was.
func stopExclusive(ctx context.Context, cfg GuardConfig, lease *nodeLease) (int, error) {
	var (
		mu      sync.Mutex
		running int
		errs    []error
		all     sync.WaitGroup
	)
	note := func(n int, err error) {
		mu.Lock()
		defer mu.Unlock()
		running += n
		if err != nil {
			errs = append(errs, err)
		}
	}
	for _, r := range cfg.Runtimes {
		all.Go(func() {
			call, cancel := context.WithTimeout(ctx, guardCall)
			defer cancel()
			found, err := r.List(call)
			if err != nil {
				note(0, fmt.Errorf("%s: %w", r.Type(), err))
				return
			}
			// What was renewed meanwhile may be why it runs.
			if err := lease.load(cfg.DataDir, time.Now()); err != nil || time.Until(lease.guarded()) > 0 {
				note(0, err)
				return
			}
			for _, in := range found {
				if in.Exclusive && in.Phase == Running {
					all.Go(func() {
						cfg.Logger.Warn("guard: the node's lease is over and its agent does not act: exclusive work is stopped", "replica", in.Key.String(), "instance", in.ID)
						call, cancel := context.WithTimeout(ctx, fenceGrace+guardCall)
						defer cancel()
						note(1, r.Stop(call, in, fenceGrace))
					})
				}
			}
		})
	}
	all.Wait()
	return running, errors.Join(errs...)
}

// guardCommand makes the guard's process one of its own session, so that what
// ends the agent's does not end it.
func guardCommand(argv []string) func() *exec.Cmd {
	if len(argv) == 0 {
		return nil
	}
	return func() *exec.Cmd {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = ownSession()
		return cmd
	}
}
