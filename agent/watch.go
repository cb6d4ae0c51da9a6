package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// listEvery is how often a runtime is asked though it announced nothing,
	// listAgain how soon after it did not answer.
	listEvery   = 15 * time.Second
	listAgain   = time.Second
	listTimeout = 15 * time.Second
	// listGap is the least time from one list to the next: a burst of
	// announcements does not become a burst of lists.
	listGap = 50 * time.Millisecond
)

// listing is an answer of a runtime, or its absence.
type listing struct {
	kind      pb.WorkloadType
	began     time.Time
	instances []Instance
	err       error
}

// watcher asks one runtime what it runs: at once when it announces a change,
// and now and then. Each runtime has its own, so that one that hangs delays no
// other.
type watcher struct {
	runtime Runtime
	info    *infos
	wake    chan struct{}
	results chan<- listing
}

func (w *watcher) changed() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := w.runtime.Watch(ctx, w.changed); err != nil && ctx.Err() == nil {
			return fmt.Errorf("watch %s: %w", w.runtime.Type(), err)
		}
		return nil
	})
	group.Go(func() error {
		for ctx.Err() == nil {
			began := time.Now()
			pause := w.list(ctx)
			timer := time.NewTimer(pause)
			select {
			case <-ctx.Done():
			case <-timer.C:
			case <-w.wake:
				sleep(ctx, listGap-time.Since(began))
			}
			timer.Stop()
		}
		return nil
	})
	return group.Wait()
}

// list asks once and returns how long to wait before it is asked again.
func (w *watcher) list(ctx context.Context) time.Duration {
	result := listing{kind: w.runtime.Type(), began: time.Now()}
	call, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	result.instances, result.err = w.runtime.List(call)
	if ctx.Err() != nil {
		return 0
	}
	info := w.runtime.Info(call)
	if result.err != nil {
		info = proto.CloneOf(info)
		info.Healthy = false
		if info.Message == "" {
			info.Message = result.err.Error()
		}
	}
	w.info.set(info)
	select {
	case w.results <- result:
	case <-ctx.Done():
	}
	if result.err != nil {
		return listAgain
	}
	return listEvery
}

// infos is what runtimes said of themselves last.
type infos struct {
	mu      sync.Mutex
	order   []pb.WorkloadType
	byType  map[pb.WorkloadType]*pb.RuntimeInfo
	version int
	metrics *metrics
}

func newInfos(runtimes []Runtime, m *metrics) *infos {
	i := &infos{byType: map[pb.WorkloadType]*pb.RuntimeInfo{}, metrics: m}
	for _, r := range runtimes {
		i.order = append(i.order, r.Type())
		i.byType[r.Type()] = &pb.RuntimeInfo{Type: r.Type(), Message: "not asked yet"}
	}
	return i
}

func (i *infos) set(info *pb.RuntimeInfo) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if proto.Equal(i.byType[info.GetType()], info) {
		return
	}
	i.byType[info.GetType()] = info
	i.version++
	healthy := 0.0
	if info.GetHealthy() {
		healthy = 1
	}
	i.metrics.healthy.WithLabelValues(info.GetType().String()).Set(healthy)
}

// get gives them with a number that grows with each change.
func (i *infos) get() ([]*pb.RuntimeInfo, int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	all := make([]*pb.RuntimeInfo, len(i.order))
	for n, t := range i.order {
		all[n] = i.byType[t]
	}
	return all, i.version
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
