package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// reportsFile holds what was reported last (pb.StatusReport), so that a restarted
// agent knows how often it has restarted what crashes, and what it has stopped.
// It is a convenience: written at most every saveGap, and never synced.
const reportsFile = "reports.pb"

const saveGap = time.Second

// saver writes to the disk what must outlive the agent, beside the reconciler: a
// disk that hangs must not keep exclusive work from being stopped. What is
// decided meanwhile may be lost with the process; then the labels on what runs
// tell that the set on the disk is the older one.
type saver struct {
	dir, cluster, node string
	log                *slog.Logger
	wake               chan struct{}

	mu      sync.Mutex
	desired *desired
	reports func() []*pb.Replica
}

func newSaver(cfg Config, log *slog.Logger) *saver {
	return &saver{dir: cfg.DataDir, cluster: cfg.ClusterID, node: cfg.NodeID, log: log, wake: make(chan struct{}, 1)}
}

func (s *saver) save(d desired) {
	s.mu.Lock()
	s.desired = &d
	s.mu.Unlock()
	s.signal()
}

func (s *saver) report(reports func() []*pb.Replica) {
	s.mu.Lock()
	s.reports = reports
	s.mu.Unlock()
	s.signal()
}

func (s *saver) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run writes until ctx ends, and then once more.
func (s *saver) run(ctx context.Context) {
	var failing bool
	for done := false; !done; {
		select {
		case <-s.wake:
		case <-ctx.Done():
			done = true
		}
		err := s.flush(ctx, done)
		switch {
		case err != nil && !failing:
			s.log.Error("state can't be saved; trying again", "error", err)
		case err == nil && failing:
			s.log.Info("state is saved again")
		}
		if failing = err != nil; failing && !done {
			sleep(ctx, saveGap)
			s.signal()
		}
	}
}

func (s *saver) flush(ctx context.Context, last bool) error {
	s.mu.Lock()
	d, reports := s.desired, s.reports
	s.desired, s.reports = nil, nil
	s.mu.Unlock()
	if d != nil {
		if err := saveDesired(s.dir, s.cluster, s.node, *d, time.Now()); err != nil {
			s.mu.Lock()
			if s.desired == nil {
				s.desired = d
			}
			s.mu.Unlock()
			return err
		}
	}
	if reports == nil {
		return nil
	}
	if err := saveReports(s.dir, reports()); err != nil {
		return err
	}
	if !last {
		sleep(ctx, saveGap)
	}
	return nil
}

func saveReports(dir string, replicas []*pb.Replica) error {
	data, err := proto.Marshal(&pb.StatusReport{Full: true, Replicas: replicas})
	if err != nil {
		return fmt.Errorf("reports: %w", err)
	}
	path := filepath.Join(dir, reportsFile)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return fmt.Errorf("reports: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("reports: %w", err)
	}
	return nil
}

// loadHistories takes from an earlier run's reports what matters for restarts. A
// damaged file is as good as none.
func loadHistories(dir string) (map[Key]history, error) {
	histories := map[Key]history{}
	data, err := os.ReadFile(filepath.Join(dir, reportsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return histories, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reports: %w", err)
	}
	report := &pb.StatusReport{}
	if proto.Unmarshal(data, report) != nil {
		return histories, nil
	}
	for _, r := range report.GetReplicas() {
		histories[Key{r.GetWorkloadId(), r.GetReplica()}] = history{
			generation: r.GetGeneration(), restarts: r.GetRestarts(), crashes: int(r.GetRestarts()),
			instance: r.GetRuntimeId(),
			stopped:  r.GetState() == pb.State_STOPPED || r.GetReason().GetCode() == fencedCode,
		}
	}
	return histories, nil
}
