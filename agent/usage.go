package agent

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// usageEvery is how often the node and its work are measured.
const usageEvery = 10 * time.Second

// usage measures beside everything else, since a runtime may take its time.
type usage struct {
	dir      string
	runtimes []Runtime
	view     func() view
	latest   atomic.Pointer[pb.NodeUsage]
	log      *slog.Logger

	busy, all int64
}

func (u *usage) get() *pb.NodeUsage { return u.latest.Load() }

func (u *usage) run(ctx context.Context) error {
	for ctx.Err() == nil {
		measured, err := u.measure(ctx)
		if err != nil {
			u.log.Debug("usage can't be measured", "error", err)
		} else {
			u.latest.Store(measured)
		}
		sleep(ctx, usageEvery)
	}
	return nil
}

func (u *usage) measure(ctx context.Context) (*pb.NodeUsage, error) {
	memory, err := readMemory()
	if err != nil {
		return nil, err
	}
	disk, err := readDisk(u.dir)
	if err != nil {
		return nil, err
	}
	busy, all, err := readCPU()
	if err != nil {
		return nil, err
	}
	n := &pb.NodeUsage{MemoryBytes: memory.used, DiskBytes: disk.used, CollectedAt: timestamppb.Now()}
	if u.all > 0 && all > u.all {
		n.CpuPercent = 100 * float64(busy-u.busy) / float64(all-u.all)
	}
	u.busy, u.all = busy, all
	n.Replicas = u.replicas(ctx)
	return n, nil
}

// replicas asks all runtimes at once; one that does not answer in time is left
// out.
func (u *usage) replicas(ctx context.Context) []*pb.ReplicaUsage {
	ctx, cancel := context.WithTimeout(ctx, usageEvery)
	defer cancel()
	v := u.view()
	var mu sync.Mutex
	var all []*pb.ReplicaUsage
	var asking sync.WaitGroup
	for _, r := range u.runtimes {
		source, ok := r.(StatsSource)
		if !ok {
			continue
		}
		var running []Instance
		for _, ins := range v.instances {
			for _, in := range ins {
				if in.Type == r.Type() && in.Phase == Running {
					running = append(running, in)
				}
			}
		}
		if len(running) == 0 {
			continue
		}
		asking.Go(func() {
			measured := source.Stats(ctx, running)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, measured...)
		})
	}
	asking.Wait()
	slices.SortFunc(all, func(a, b *pb.ReplicaUsage) int {
		return Key{a.GetWorkloadId(), a.GetReplica()}.compare(Key{b.GetWorkloadId(), b.GetReplica()})
	})
	return all
}
