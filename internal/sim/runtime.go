package sim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/persys-dev/persys/agent"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// pretended runs nothing and says that it does.
type pretended struct {
	fleet *fleet
	m     *member
	kind  pb.WorkloadType

	mu        sync.Mutex
	instances map[string]agent.Instance
	next      int
}

func newRuntime(f *fleet, m *member) *pretended {
	return &pretended{fleet: f, m: m, kind: model.TypeOf(f.Template), instances: map[string]agent.Instance{}}
}

var (
	_ agent.Runtime     = (*pretended)(nil)
	_ agent.StatsSource = (*pretended)(nil)
)

func (r *pretended) Type() pb.WorkloadType { return r.kind }

func (r *pretended) Info(context.Context) *pb.RuntimeInfo {
	return &pb.RuntimeInfo{Type: r.kind, Name: "simulated", Healthy: true}
}

func (r *pretended) List(context.Context) ([]agent.Instance, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Values(r.instances)), nil
}

func (r *pretended) Apply(ctx context.Context, w agent.Work) (agent.Instance, error) {
	r.fleet.started(r.m, w.Key())
	if delay := r.fleet.StartDelay; delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return agent.Instance{}, ctx.Err()
		}
	}
	labels := agent.LabelsOf(r.m.cluster, r.m.name, w)
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, in := range r.instances {
		if in.Key == labels.Key && in.Generation == labels.Generation && in.UID == labels.UID {
			if in.Phase != agent.Running {
				in.Phase, in.Started = agent.Running, time.Now()
				r.instances[id] = in
			}
			return in, nil
		}
	}
	r.next++
	in := agent.Instance{Labels: labels, ID: fmt.Sprintf("%s-%d", r.m.name, r.next), Type: r.kind, Phase: agent.Running, Started: time.Now()}
	r.instances[in.ID] = in
	return in, nil
}

func (r *pretended) Stop(_ context.Context, in agent.Instance, _ time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known, ok := r.instances[in.ID]; ok && known.Phase == agent.Running {
		known.Phase, known.Finished = agent.Exited, time.Now()
		r.instances[in.ID] = known
	}
	return nil
}

func (r *pretended) Remove(_ context.Context, in agent.Instance, _ time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.instances, in.ID)
	return nil
}

func (r *pretended) Watch(ctx context.Context, _ func()) error {
	<-ctx.Done() // nothing ever changes by itself
	return ctx.Err()
}

func (r *pretended) Stats(_ context.Context, running []agent.Instance) []*pb.ReplicaUsage {
	all := make([]*pb.ReplicaUsage, len(running))
	for i, in := range running {
		all[i] = &pb.ReplicaUsage{WorkloadId: in.Key.Workload, Replica: in.Key.Replica, CpuPercent: 1, MemoryBytes: 16 << 20}
	}
	return all
}

// nodeCapacity is what each node offers: twice what the replicas need, were they
// spread evenly, and no less than an ordinary machine has.
func (c Config) nodeCapacity() (*pb.NodeCapacity, error) {
	needs, err := model.ParseResources(c.Template.Resources)
	if err != nil {
		return nil, err
	}
	share := 2 * int64((c.Replicas+c.Nodes-1)/c.Nodes)
	return &pb.NodeCapacity{
		CpuMillis: max(nodeCPU, share*needs.CpuMillis), MemoryBytes: max(nodeMemory, share*needs.MemoryBytes), DiskBytes: max(nodeDisk, share*needs.DiskBytes),
	}, nil
}
