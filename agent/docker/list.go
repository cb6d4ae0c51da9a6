package docker

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (r *Runtime) filters() client.Filters {
	return make(client.Filters).Add("label", agent.LabelCluster+"="+r.cfg.ClusterID, agent.LabelNode+"="+r.cfg.NodeID)
}

// List asks for our containers, and looks closer at those that may have changed.
func (r *Runtime) List(ctx context.Context) ([]agent.Instance, error) {
	listed, err := r.api.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: r.filters()})
	if err != nil {
		return nil, classify(ctx, "list", err)
	}
	all := make([]agent.Instance, 0, len(listed.Items))
	ids := make(map[string]bool, len(listed.Items))
	for _, item := range listed.Items {
		ids[item.ID] = true
		if in, ok := r.cache.get(item.ID, item.State); ok {
			all = append(all, in)
			continue
		}
		version := r.cache.version()
		found, err := r.api.ContainerInspect(ctx, item.ID, client.ContainerInspectOptions{})
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, classify(ctx, "inspect", err)
		}
		in, err := instance(found.Container)
		if err != nil {
			// Not made by us, whatever it says of itself: never touch it.
			r.log.Warn("a container has labels of this node that make no sense", "container", item.ID, "error", err)
			continue
		}
		in.Stopped = in.Phase == agent.Exited && r.cache.wasStopped(item.ID)
		r.cache.put(item.ID, found.Container.State.Status, in, version)
		all = append(all, in)
	}
	r.cache.keep(ids)
	return all, nil
}

func instance(c container.InspectResponse) (agent.Instance, error) {
	if c.Config == nil || c.State == nil {
		return agent.Instance{}, fmt.Errorf("container %s: the engine left out its configuration or state", c.ID)
	}
	labels, err := agent.ParseLabels(c.Config.Labels)
	if err != nil {
		return agent.Instance{}, fmt.Errorf("container %s: %w", c.ID, err)
	}
	in := agent.Instance{
		Labels: labels, ID: c.ID, Type: pb.WorkloadType_CONTAINER, Phase: agent.Exited,
		ExitCode: int32(c.State.ExitCode), OutOfMemory: c.State.OOMKilled, ImageDigest: c.Config.Labels[labelDigest],
		Started: parseTime(c.State.StartedAt), Finished: parseTime(c.State.FinishedAt),
	}
	switch {
	case c.State.Running:
		in.Phase, in.ExitCode, in.OutOfMemory = agent.Running, 0, false
	case in.Started.IsZero():
		in.Phase = agent.Created
	case in.Finished.Before(in.Started):
		// The engine notes the start when it has heard of it, which may be after
		// the end of what ends at once.
		in.Finished = in.Started
	}
	return in, nil
}

// parseTime reads an engine's time; year 1 means never.
func parseTime(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() <= 1 {
		return time.Time{}
	}
	return t
}

// Watch follows the engine's events, for as long as ctx. While it can't, List
// looks at every container.
func (r *Runtime) Watch(ctx context.Context, changed func()) error {
	const pause = time.Second
	for ctx.Err() == nil {
		r.watchOnce(ctx, changed)
		r.cache.watching(false)
		changed()
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
	return nil
}

// watchOnce follows one stream of events until it ends.
func (r *Runtime) watchOnce(ctx context.Context, changed func()) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := r.api.Events(ctx, client.EventsListOptions{Filters: r.filters().Add("type", string(events.ContainerEventType))})
	select {
	case err := <-stream.Err:
		r.log.Debug("no events from the engine", "error", err)
		return
	default:
	}
	r.cache.watching(true)
	changed() // what happened before is found by a list
	for {
		select {
		case e := <-stream.Messages:
			if strings.HasPrefix(string(e.Action), "exec_") {
				continue // health checks and people looking around
			}
			r.cache.forget(e.Actor.ID)
			switch e.Action {
			case events.ActionStop, events.ActionKill:
				r.cache.noteStop(e.Actor.ID, e.Actor.Attributes["signal"])
			case events.ActionStart:
				r.cache.noteStart(e.Actor.ID)
			}
			changed()
		case err := <-stream.Err:
			r.log.Debug("events ended", "error", err)
			return
		}
	}
}

// cache saves looking at containers of which no event has spoken. Without a
// stream of events it holds nothing.
type cache struct {
	mu      sync.Mutex
	on      bool
	entries map[string]cached
	changes int
	// stopped are containers that somebody had the engine stop or kill.
	stopped map[string]bool
}

type cached struct {
	state container.ContainerState
	in    agent.Instance
}

func (c *cache) watching(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on, c.entries, c.stopped = on, map[string]cached{}, map[string]bool{}
	c.changes++
}

func (c *cache) version() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changes
}

func (c *cache) get(id string, state container.ContainerState) (agent.Instance, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	entry, ok := c.entries[id]
	return entry.in, ok && entry.state == state
}

// put keeps what was seen unless something has changed since version.
func (c *cache) put(id string, state container.ContainerState, in agent.Instance, version int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.on && c.changes == version {
		c.entries[id] = cached{state: state, in: in}
	}
}

func (c *cache) forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.entries, id)
	c.changes++
}

func (c *cache) keep(ids map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.entries, func(id string, _ cached) bool { return !ids[id] })
	maps.DeleteFunc(c.stopped, func(id string, _ bool) bool { return !ids[id] })
}

// noteStop takes a signal, as a number, for an order to end where it is one by
// which people stop programs; none is the engine's own stop.
func (c *cache) noteStop(id, signal string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.Contains([]string{"", "2", "9", "15"}, signal) {
		c.stopped[id] = true
	}
}

func (c *cache) noteStart(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.stopped, id)
}

func (c *cache) wasStopped(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped[id]
}
