package agent

import (
	"context"
	"io"
	"log/slog"
	"os/exec"
	"testing"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const testTTL = time.Second

// leaseOnDisk writes a lease down that was renewed at that time.
func leaseOnDisk(t *testing.T, dir string, sent time.Time, ttl time.Duration) {
	t.Helper()
	l := newNodeLease()
	l.keep.Store(true)
	l.renew(sent, ttl)
	if err := l.save(dir, time.Now()); err != nil {
		t.Fatal(err)
	}
}

// shelf is a runtime in which only Stop does something.
type shelf struct {
	Runtime
	instances []Instance
	stopped   chan time.Time
}

func (s *shelf) Type() pb.WorkloadType { return pb.WorkloadType_PROCESS }

func (s *shelf) List(context.Context) ([]Instance, error) { return s.instances, nil }

func (s *shelf) Stop(_ context.Context, in Instance, grace time.Duration) error {
	if !in.Exclusive || in.Phase != Running || grace != fenceGrace {
		panic("stops what is not its business: " + in.ID)
	}
	s.instances = nil
	s.stopped <- time.Now()
	return nil
}

func stand(t *testing.T, dir string, r Runtime) (owner io.Closer, ended <-chan error) {
	t.Helper()
	read, write := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- Guard(t.Context(), GuardConfig{DataDir: dir, Runtimes: []Runtime{r}, Owner: read, Logger: slog.New(slog.DiscardHandler)})
	}()
	return write, done
}

func newShelf() *shelf {
	return &shelf{stopped: make(chan time.Time, 1), instances: []Instance{
		{Labels: Labels{Exclusive: true}, ID: "guarded", Type: pb.WorkloadType_PROCESS, Phase: Running},
		{Labels: Labels{Exclusive: true}, ID: "ended", Type: pb.WorkloadType_PROCESS, Phase: Exited},
		{ID: "other", Type: pb.WorkloadType_PROCESS, Phase: Running},
	}}
}

// The agent lives, and does not act: the guard does, once the lease is over.
func TestGuardStopsWhatTheAgentCannot(t *testing.T) {
	dir, r := t.TempDir(), newShelf()
	// Most of it is over, and what is left is long enough for a busy machine.
	const ttl = 20 * time.Second
	began := time.Now().Add(-ttl*3/4 + 500*time.Millisecond)
	leaseOnDisk(t, dir, began, ttl)
	owner, ended := stand(t, dir, r)
	if took := (<-r.stopped).Sub(began); took < ttl-ttl/4 || took > ttl {
		t.Errorf("stopped %s after the heartbeat of a lease of %s", took, ttl)
	}
	select {
	case err := <-ended:
		t.Fatalf("ended while its agent lives: %v", err)
	default:
	}
	owner.Close()
	if err := <-ended; err != nil || len(r.stopped) != 0 {
		t.Errorf("%v, stopped %d more", err, len(r.stopped))
	}
}

// The agent is dead: its guard keeps to the lease that it left, stops what is
// exclusive when that is over, though the runtime does not answer at once, and ends.
func TestGuardOutlivesItsAgent(t *testing.T) {
	dir, r := t.TempDir(), newShelf()
	const ttl = 20 * time.Second
	began := time.Now().Add(-ttl*3/4 + 500*time.Millisecond)
	leaseOnDisk(t, dir, began, ttl)
	silent := &silentAtFirst{shelf: r, left: 2}
	owner, ended := stand(t, dir, silent)
	owner.Close()
	select {
	case err := <-ended:
		t.Fatalf("ended with the agent: %v", err)
	case at := <-r.stopped:
		if took := at.Sub(began); took < ttl-ttl/4 || took > ttl || silent.left != 0 {
			t.Errorf("stopped %s after the last heartbeat; silent %d times more", took, silent.left)
		}
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// silentAtFirst does not answer when it is first asked.
type silentAtFirst struct {
	*shelf
	left int
}

func (s *silentAtFirst) List(ctx context.Context) ([]Instance, error) {
	if s.left > 0 {
		s.left--
		return nil, errDown
	}
	return s.shelf.List(ctx)
}

// Another agent has taken over: its guard goes on, this one ends and stops nothing.
func TestGuardEndsWhenAnotherAgentRenews(t *testing.T) {
	dir, r := t.TempDir(), newShelf()
	leaseOnDisk(t, dir, time.Now(), testTTL)
	owner, ended := stand(t, dir, r)
	owner.Close()
	for {
		leaseOnDisk(t, dir, time.Now(), testTTL)
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
			return
		case <-time.After(testTTL / 4):
		}
	}
}

// A guard that was killed is replaced, and one that stands is kept.
func TestGuardIsReplaced(t *testing.T) {
	started := 0
	g := &guard{command: func() *exec.Cmd {
		started++
		return exec.Command("cat")
	}}
	for range 2 {
		if err := g.stand(); err != nil {
			t.Fatal(err)
		}
	}
	g.release()
	<-g.exited
	if err := g.stand(); err != nil || started != 2 {
		t.Fatalf("%v, started %d", err, started)
	}
	g.owner.Close()
	<-g.exited
	if err := g.stand(); err != nil || started != 3 {
		t.Errorf("%v, started %d", err, started)
	}
	g.release()
}
