// Package process runs plain programs of the node, without any daemon.
//
// Each instance is a directory and a supervisor: a re-execution of this very
// program (ShimMain) in a session of its own, which starts the program, keeps
// its output, and writes down how it ended. So neither the end of the agent nor
// its restart touches what runs, and no exit code is lost meanwhile. Where
// cgroups can be used, cpu and memory are hard limits; where they can't, Info
// says so.
//
// It never takes a process id at its word: a process is recognised by id, start
// time and boot, and a supervisor by the lock that it holds.
package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Config of a Runtime.
type Config struct {
	ClusterID string
	NodeID    string
	// Dir holds a directory for each instance; it is created.
	Dir string
	// Shim is the command line that ends up in ShimMain with what is appended to
	// it. Default: this executable with the argument "process-shim".
	Shim []string
	// LogBytes is the size at which an instance's log file is rotated, LogFiles
	// how many are kept. Defaults: 10 MiB and 3.
	LogBytes int64
	LogFiles int
	// CgroupRoot is where cgroup file systems are mounted. Default
	// /sys/fs/cgroup; "none" turns cgroups off.
	CgroupRoot string
	// Logger may be nil.
	Logger *slog.Logger
}

// Runtime supervises processes; it implements agent.Runtime.
type Runtime struct {
	cfg     Config
	log     *slog.Logger
	cgroups *cgroups
	boot    string
	kernel  string

	// settling is held while a run without a supervisor is given its end.
	settling sync.Mutex

	mu sync.Mutex
	// started wakes Watch.
	started chan struct{}
	// samples are the processor times measured last, by instance.
	samples map[string]sample
}

// New makes a Runtime. It starts nothing.
func New(cfg Config) (*Runtime, error) {
	if cfg.ClusterID == "" || cfg.NodeID == "" || cfg.Dir == "" {
		return nil, errors.New("process: ClusterID, NodeID and Dir are needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.LogBytes <= 0 {
		cfg.LogBytes = 10 << 20
	}
	if cfg.LogFiles <= 0 {
		cfg.LogFiles = 3
	}
	if len(cfg.Shim) == 0 {
		exe, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("process: %w", err)
		}
		cfg.Shim = []string{exe, "process-shim"}
	}
	if cfg.CgroupRoot == "" {
		cfg.CgroupRoot = "/sys/fs/cgroup"
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	boot, err := bootID()
	if err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, fmt.Errorf("process: uname: %w", err)
	}
	return &Runtime{
		cfg: cfg, log: cfg.Logger.With("runtime", "process"), cgroups: findCgroups(cfg.CgroupRoot, cfg.ClusterID, cfg.NodeID),
		boot: boot, kernel: unix.ByteSliceToString(name.Release[:]), started: make(chan struct{}, 1), samples: map[string]sample{},
	}, nil
}

// Type of work that it runs.
func (r *Runtime) Type() pb.WorkloadType { return pb.WorkloadType_PROCESS }

// Info is always healthy: there is no daemon that could be down.
func (r *Runtime) Info(context.Context) *pb.RuntimeInfo {
	info := &pb.RuntimeInfo{Type: r.Type(), Name: "process", Version: r.kernel, Healthy: true}
	if r.cgroups.cannot != "" {
		info.Message = "cpu and memory limits can't be enforced on this node: " + r.cgroups.cannot
	}
	return info
}

var (
	_ agent.Runtime     = (*Runtime)(nil)
	_ agent.LogSource   = (*Runtime)(nil)
	_ agent.StatsSource = (*Runtime)(nil)
)
