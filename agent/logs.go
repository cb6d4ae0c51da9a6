package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// maxTunnels bounds how many streams of bulk data may be open at once.
const maxTunnels = 64

// view is what is shown to readers beside the reconciler; it is never changed.
type view struct {
	instances map[Key][]Instance
	// wanted are the replicas of the desired set.
	wanted map[Key]bool
}

// tunnels serves what a server asks for through streams of its own.
type tunnels struct {
	ctx      context.Context
	node     string
	runtimes map[pb.WorkloadType]Runtime
	view     func() view
	shown    *broadcast
	slots    chan struct{}
	running  sync.WaitGroup
	log      *slog.Logger
}

// open begins to serve; its error says why that can't be.
func (t *tunnels) open(o *pb.OpenTunnel, client pb.AgentsClient) error {
	logs := o.GetLogs()
	if logs == nil {
		return errors.New("this agent does not know what was asked for")
	}
	select {
	case t.slots <- struct{}{}:
	default:
		return fmt.Errorf("%d streams are open already", maxTunnels)
	}
	t.running.Go(func() {
		defer func() { <-t.slots }()
		if err := t.serve(o.GetStreamId(), logs, client); err != nil && t.ctx.Err() == nil {
			t.log.Debug("log stream ended", "workload", logs.GetId(), "error", err)
		}
	})
	return nil
}

func (t *tunnels) serve(id string, req *pb.WorkloadLogsRequest, client pb.AgentsClient) error {
	ctx, cancel := context.WithCancel(t.ctx)
	defer cancel()
	stream, err := client.Tunnel(ctx)
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	if err := stream.Send(&pb.TunnelFrame{StreamId: id}); err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	closed := make(chan struct{})
	go func() { // ends with ctx, as the stream does
		defer close(closed)
		for {
			if frame, err := stream.Recv(); err != nil || frame.GetEnd() {
				cancel()
				return
			}
		}
	}()
	var mu sync.Mutex
	send := func(chunk *pb.LogChunk) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(&pb.TunnelFrame{Log: chunk})
	}
	end := &pb.TunnelFrame{End: true}
	if err := t.logs(ctx, req, send); err != nil {
		end.Error = err.Error()
	}
	if err := stream.Send(end); err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	if err := stream.CloseSend(); err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	// What was sent has arrived when the server ends its direction.
	select {
	case <-closed:
	case <-time.After(welcomeTimeout):
	}
	return nil
}

// logs sends the output of the replicas asked for, each in order.
func (t *tunnels) logs(ctx context.Context, req *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error {
	v := t.view()
	var keys []Key
	for key := range v.instances {
		if key.Workload == req.GetId() && (req.Replica == nil || key.Replica == req.GetReplica()) {
			keys = append(keys, key)
		}
	}
	for key := range v.wanted {
		if key.Workload == req.GetId() && (req.Replica == nil || key.Replica == req.GetReplica()) && v.instances[key] == nil && req.GetFollow() {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return fmt.Errorf("nothing of %s is on node %s", req.GetId(), t.node)
	}
	slices.SortFunc(keys, Key.compare)
	group, ctx := errgroup.WithContext(ctx)
	for _, key := range keys {
		group.Go(func() error { return t.replicaLogs(ctx, key, req, send) })
	}
	return group.Wait()
}

// replicaLogs sends the output of one replica's newest instance, and with follow
// that of its next runs and of the instances that replace it.
func (t *tunnels) replicaLogs(ctx context.Context, key Key, req *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error {
	req = proto.CloneOf(req)
	var seen Instance
	last := time.Time{}
	for ctx.Err() == nil {
		next := t.shown.next()
		v := t.view()
		in := latestOf(v.instances[key])
		switch {
		case in == nil && !v.wanted[key]:
			return nil
		case in == nil || in.ID == seen.ID && (in.Phase != Running || in.Started.Equal(seen.Started)):
			select {
			case <-next:
			case <-ctx.Done():
			}
			continue
		}
		seen = *in
		source, ok := t.runtimes[in.Type].(LogSource)
		if !ok {
			return fmt.Errorf("the runtime of %s keeps no logs", key)
		}
		err := source.Logs(ctx, *in, req, func(chunk *pb.LogChunk) error {
			at := chunk.GetTime().AsTime()
			if !last.IsZero() && !at.After(last) {
				return nil // sent already, before it was started again
			}
			chunk.Replica, chunk.NodeId = key.Replica, t.node
			if err := send(chunk); err != nil {
				return err
			}
			if req.GetFollow() && at.After(last) {
				req.Since = timestamppb.New(at)
			}
			return nil
		})
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("logs of %s: %w", key, err)
		}
		if !req.GetFollow() {
			return nil
		}
		if last = req.GetSince().AsTime(); req.Since == nil {
			last = time.Time{}
		}
		req.Tail = 0
	}
	return nil
}

// latestOf is the newest generation, and of that what started last.
func latestOf(all []Instance) *Instance {
	var latest *Instance
	for i := range all {
		if latest == nil || all[i].Generation > latest.Generation ||
			all[i].Generation == latest.Generation && all[i].Started.After(latest.Started) {
			latest = &all[i]
		}
	}
	return latest
}

// viewOf copies what readers may look at.
func viewOf(actual map[Key][]Instance, d desired) view {
	v := view{instances: maps.Clone(actual), wanted: make(map[Key]bool, len(d.items))}
	for key := range d.items {
		v.wanted[key] = true
	}
	return v
}
