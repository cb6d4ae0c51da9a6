package process

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// tick is the unit of processor times in /proc, the same on every Linux that Go
// runs on.
const tick = uint64(time.Second / 100)

type sample struct {
	at  time.Time
	cpu uint64 // nanoseconds
}

// Stats measures by cgroup, and where there is none by the program's session; 100
// percent is one core, since the measurement before.
func (r *Runtime) Stats(ctx context.Context, ins []agent.Instance) []*pb.ReplicaUsage {
	samples := map[string]sample{}
	var measured []*pb.ReplicaUsage
	for _, in := range ins {
		if ctx.Err() != nil {
			break
		}
		u := &pb.ReplicaUsage{WorkloadId: in.Key.Workload, Replica: in.Key.Replica}
		cpu, ok := r.measure(in.ID, u)
		if !ok {
			continue
		}
		now := sample{at: time.Now(), cpu: cpu}
		r.mu.Lock()
		before, known := r.samples[in.ID]
		r.mu.Unlock()
		if known && now.cpu >= before.cpu && now.at.After(before.at) {
			u.CpuPercent = 100 * float64(now.cpu-before.cpu) / float64(now.at.Sub(before.at))
		}
		samples[in.ID] = now
		measured = append(measured, u)
	}
	r.mu.Lock()
	r.samples = samples
	r.mu.Unlock()
	return measured
}

func (r *Runtime) measure(id string, u *pb.ReplicaUsage) (cpu uint64, ok bool) {
	var rec record
	if ok, err := readJSON(filepath.Join(r.dir(id), recordFile), &rec); err != nil || !ok {
		return 0, false
	}
	cpu, u.MemoryBytes, u.DiskReadBytes, u.DiskWriteBytes, ok = rec.Cgroup.usage()
	if ok {
		return cpu, true
	}
	var st state
	if ok, err := readJSON(filepath.Join(r.dir(id), stateFile), &st); err != nil || !ok {
		return 0, false
	}
	return sessionUsage(st.Program, u)
}

// sessionUsage sums what the session's processes use; those that have ended are
// not counted any more.
func sessionUsage(program identity, u *pb.ReplicaUsage) (cpu uint64, ok bool) {
	entries, err := os.ReadDir("/proc")
	if err != nil || program.PID <= 0 {
		return 0, false
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		s, err := statusOf(pid)
		if err != nil || s.session != program.PID || s.start < program.Start {
			continue
		}
		ok = true
		cpu += s.cpu * tick
		u.MemoryBytes += s.pages * int64(os.Getpagesize())
	}
	return cpu, ok
}
