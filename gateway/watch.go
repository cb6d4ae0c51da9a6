package gateway

import (
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// WatchWorkloads answers headers as soon as the watch stands, and then only
// changes. The watch of one workload carries its replicas and tells changes of
// them too; that of all carries specs and status.
func (g *Gateway) WatchWorkloads(req *pb.WatchWorkloadsRequest, stream grpc.ServerStreamingServer[pb.WorkloadChange]) error {
	ctx := stream.Context()
	if req.Id != "" && !model.IsDNSLabel(req.Id) {
		return notThere("workload", req.Id)
	}
	v, err := g.view(ctx)
	if err != nil {
		return statusOf(err)
	}
	if err := checkFrom(v, req.FromRevision); err != nil {
		return err
	}
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	watch := workloadWatch{g: g, id: req.Id, send: stream.Send}
	after := req.FromRevision
	if after == 0 {
		if err := watch.present(v); err != nil {
			return statusOf(err)
		}
		after = v.Revision()
	}
	key, end := []byte(model.WorkloadsPrefix), model.PrefixEnd(model.WorkloadsPrefix)
	if req.Id != "" {
		// From its replicas to its status; what else lies between is passed over.
		key, end = []byte(model.ReplicasPrefix+req.Id+"/"), []byte(model.WorkloadStatusKey(req.Id)+"\x00")
	}
	watcher := g.store.Watch(key, end, after)
	for {
		events, revision, err := watcher.Next(ctx)
		if err != nil {
			return watchStatus(err)
		}
		if err := watch.changes(events, revision); err != nil {
			return statusOf(err)
		}
	}
}

// checkFrom refuses a place in history that does not exist: the watch would be
// silent or have a gap.
func checkFrom(v *fsm.View, from int64) error {
	switch {
	case from < 0 || from > v.Revision():
		return badField("from_revision", "%d is out of range; allowed: 1 to %d, the newest, or 0 to begin with what is there", from, v.Revision())
	case from > 0:
		if _, _, err := v.Events(from, 1); err != nil {
			return watchStatus(err)
		}
	}
	return nil
}

func watchStatus(err error) error {
	var refused *fsm.Error
	if errors.As(err, &refused) && refused.Code == pb.TxnError_TXN_ERROR_COMPACTED {
		return status.Errorf(codes.OutOfRange, "compacted: %s; read the list again and watch from its revision", refused.Message)
	}
	return statusOf(storeError(err))
}

type workloadWatch struct {
	g    *Gateway
	id   string // empty: all
	send func(*pb.WorkloadChange) error
}

// present tells what there is; of one workload also that it is not there, for
// whoever waits for its end must not miss that it has been.
func (w *workloadWatch) present(v *fsm.View) error {
	if w.id != "" {
		_, ok, err := workload(v, w.id)
		if err != nil {
			return err
		}
		if !ok {
			return w.gone(w.id, v.Revision())
		}
		return w.tell(v, w.id, v.Revision())
	}
	for kv := range v.Scan(model.WorkloadsPrefix) {
		if id, sub, _ := model.SplitKey(model.WorkloadsPrefix, string(kv.Key)); sub == "" {
			if err := w.tell(v, id, v.Revision()); err != nil {
				return err
			}
		}
	}
	return nil
}

// changes tells each workload that changed once, as it is now, and each end of
// one: what lies between two calls of Next is what a slow reader skips.
func (w *workloadWatch) changes(events []*pb.KeyEvent, revision int64) error {
	v := w.g.store.View()
	told := map[string]bool{}
	for _, e := range events {
		id, object := w.about(string(e.Kv.GetKey()))
		if id == "" {
			continue
		}
		if object && e.Type == pb.KeyEvent_DELETE {
			if err := w.gone(id, e.Kv.GetModRevision()); err != nil {
				return err
			}
			// One of the same id that comes after it is to be told again.
			delete(told, id)
			continue
		}
		if told[id] {
			continue
		}
		told[id] = true
		if err := w.tell(v, id, revision); err != nil {
			return err
		}
	}
	return nil
}

// about is the workload that a key belongs to; object: it is the workload itself.
func (w *workloadWatch) about(key string) (id string, object bool) {
	id, sub, ok := model.SplitKey(model.WorkloadsPrefix, key)
	if !ok {
		id, _, ok = model.SplitReplicaKey(model.ReplicasPrefix, key)
		sub = "replica"
	}
	if !ok || w.id != "" && id != w.id {
		return "", false
	}
	return id, sub == ""
}

func (w *workloadWatch) gone(id string, revision int64) error {
	return w.send(&pb.WorkloadChange{Workload: &pb.Workload{Spec: &pb.WorkloadSpec{Id: id}}, Deleted: true, Revision: revision})
}

func (w *workloadWatch) tell(v *fsm.View, id string, revision int64) error {
	found, ok, err := workload(v, id)
	if err != nil || !ok {
		return err
	}
	if w.id != "" {
		if found.Replicas, err = replicas(v, id); err != nil {
			return err
		}
	}
	return w.send(&pb.WorkloadChange{Workload: found, Revision: revision})
}

// eventOf reads an event that is stored; nil where it is not about what is asked.
func eventOf(kv *pb.KeyValue, workload, node string) (*pb.Event, error) {
	e := &pb.Event{}
	if err := model.Parse(kv, e); err != nil {
		return nil, err
	}
	if workload != "" && e.WorkloadId != workload || node != "" && e.NodeId != node {
		return nil, nil
	}
	e.Id, _, _ = model.SplitKey(model.EventsPrefix, string(kv.Key))
	return e, nil
}

const (
	defaultEvents = 100
	maxEvents     = 10_000
)

func checkEventFilter(workload, node string) error {
	for field, id := range map[string]string{"workload_id": workload, "node_id": node} {
		if id != "" && !model.IsDNSLabel(id) {
			return badField(field, "%.100q is not allowed; allowed: an id, or nothing for all", id)
		}
	}
	return nil
}

// newestEvents are the newest n that match, oldest first.
func newestEvents(v *fsm.View, workload, node string, n int) ([]*pb.Event, error) {
	ring := make([]*pb.Event, 0, min(n, defaultEvents))
	next := 0
	for kv := range v.Scan(model.EventsPrefix) {
		e, err := eventOf(kv, workload, node)
		if err != nil {
			return nil, fmt.Errorf("event: %w", err)
		}
		switch {
		case e == nil:
		case len(ring) < n:
			ring = append(ring, e)
		default:
			ring[next] = e
			next = (next + 1) % n
		}
	}
	return append(ring[next:len(ring):len(ring)], ring[:next]...), nil
}

func (g *Gateway) WatchEvents(req *pb.WatchEventsRequest, stream grpc.ServerStreamingServer[pb.Event]) error {
	ctx := stream.Context()
	if req.Tail < 0 || req.Tail > maxEvents {
		return badField("tail", "%d is out of range; allowed: 0 to %d", req.Tail, maxEvents)
	}
	if err := checkEventFilter(req.WorkloadId, req.NodeId); err != nil {
		return err
	}
	v, err := g.view(ctx)
	if err != nil {
		return statusOf(err)
	}
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	if req.Tail > 0 {
		newest, err := newestEvents(v, req.WorkloadId, req.NodeId, int(req.Tail))
		if err != nil {
			return statusOf(err)
		}
		for _, e := range newest {
			if err := stream.Send(e); err != nil {
				return err
			}
		}
	}
	watcher := g.store.Watch([]byte(model.EventsPrefix), model.PrefixEnd(model.EventsPrefix), v.Revision())
	for {
		events, _, err := watcher.Next(ctx)
		if err != nil {
			return watchStatus(err)
		}
		for _, change := range events {
			if change.Type != pb.KeyEvent_PUT {
				continue
			}
			e, err := eventOf(change.Kv, req.WorkloadId, req.NodeId)
			if err != nil {
				return statusOf(err)
			}
			if e != nil {
				if err := stream.Send(e); err != nil {
					return err
				}
			}
		}
	}
}
