package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// measuring bounds how many containers are measured at once.
const measuring = 8

type sample struct {
	at  time.Time
	cpu uint64 // nanoseconds
}

// Stats measures each container; 100 percent is one core, since the measurement
// before.
func (r *Runtime) Stats(ctx context.Context, ins []agent.Instance) []*pb.ReplicaUsage {
	slots := make(chan struct{}, measuring)
	results := make([]*pb.ReplicaUsage, len(ins))
	samples := map[string]sample{}
	var mu sync.Mutex
	var running sync.WaitGroup
	for i, in := range ins {
		running.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			stats, err := r.stats(ctx, in.ID)
			if err != nil {
				r.log.Debug("container can't be measured", "container", in.ID, "error", err)
				return
			}
			now := sample{at: stats.Read, cpu: stats.CPUStats.CPUUsage.TotalUsage}
			r.mu.Lock()
			before, ok := r.samples[in.ID]
			r.mu.Unlock()
			u := usage(in.Key, stats)
			if ok && now.cpu >= before.cpu && now.at.After(before.at) {
				u.CpuPercent = 100 * float64(now.cpu-before.cpu) / float64(now.at.Sub(before.at))
			}
			results[i] = u
			mu.Lock()
			samples[in.ID] = now
			mu.Unlock()
		})
	}
	running.Wait()
	r.mu.Lock()
	r.samples = samples
	r.mu.Unlock()
	measured := results[:0]
	for _, u := range results {
		if u != nil {
			measured = append(measured, u)
		}
	}
	return measured
}

func (r *Runtime) stats(ctx context.Context, id string) (*container.StatsResponse, error) {
	answer, err := r.api.ContainerStats(ctx, id, client.ContainerStatsOptions{})
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	stats := &container.StatsResponse{}
	if err := json.NewDecoder(answer.Body).Decode(stats); err != nil {
		return nil, fmt.Errorf("stats: %w", err)
	}
	return stats, nil
}

func usage(key agent.Key, s *container.StatsResponse) *pb.ReplicaUsage {
	u := &pb.ReplicaUsage{WorkloadId: key.Workload, Replica: key.Replica}
	// Memory without the page cache that can be given back at any time; the two
	// versions of cgroups have different names for it.
	cache := s.MemoryStats.Stats["inactive_file"]
	if v, ok := s.MemoryStats.Stats["total_inactive_file"]; ok {
		cache = v
	}
	u.MemoryBytes = int64(s.MemoryStats.Usage - min(cache, s.MemoryStats.Usage))
	for _, e := range s.BlkioStats.IoServiceBytesRecursive {
		switch strings.ToLower(e.Op) {
		case "read":
			u.DiskReadBytes += int64(e.Value)
		case "write":
			u.DiskWriteBytes += int64(e.Value)
		}
	}
	for _, n := range s.Networks {
		u.NetworkRxBytes += int64(n.RxBytes)
		u.NetworkTxBytes += int64(n.TxBytes)
	}
	return u
}
