package docker

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Exit codes that an engine gives a container whose program could not be started.
const (
	notExecutable = 126
	notFound      = 127
)

// Apply creates the assignment's container and starts it; one that is there is
// only started.
func (r *Runtime) Apply(ctx context.Context, w agent.Work) (agent.Instance, error) {
	if w.Item.GetSpec().GetContainer() == nil {
		return agent.Instance{}, agent.Refuse(pb.ReasonCode_INVALID_SPEC, "%s is no container", w.Key())
	}
	labels := agent.LabelsOf(r.cfg.ClusterID, r.cfg.NodeID, w)
	name := r.name(labels)
	found, err := r.api.ContainerInspect(ctx, name, client.ContainerInspectOptions{})
	created := false
	switch {
	case errdefs.IsNotFound(err):
		if err := r.create(ctx, w, labels, name); err != nil {
			return agent.Instance{}, err
		}
		created = true
	case err != nil:
		return agent.Instance{}, classify(ctx, "inspect", err)
	case !ours(found.Container, labels):
		return agent.Instance{}, &agent.Error{
			Code: pb.ReasonCode_RUNTIME_ERROR, Err: fmt.Errorf("the name %s is taken by a container that is not ours", name),
		}
	}
	if _, err := r.api.ContainerStart(ctx, name, client.ContainerStartOptions{}); err != nil {
		return agent.Instance{}, r.notStarted(ctx, name, created, err)
	}
	found, err = r.api.ContainerInspect(ctx, name, client.ContainerInspectOptions{})
	if err != nil {
		return agent.Instance{}, classify(ctx, "inspect", err)
	}
	r.cache.forget(found.Container.ID)
	return instance(found.Container)
}

func ours(c container.InspectResponse, want agent.Labels) bool {
	has, err := agent.ParseLabels(c.Config.Labels)
	return err == nil && maps.Equal(has.Map(), want.Map())
}

func (r *Runtime) create(ctx context.Context, w agent.Work, labels agent.Labels, name string) error {
	image := w.Item.GetSpec().GetContainer().GetImage()
	digest, err := r.digest(ctx, image)
	if errdefs.IsNotFound(err) {
		if err := r.Prepare(ctx, w); err != nil {
			return err
		}
		digest, err = r.digest(ctx, image)
	}
	if err != nil {
		return classify(ctx, "image "+image, err)
	}
	config, host, err := r.configure(w, labels, digest)
	if err != nil {
		return err
	}
	_, err = r.api.ContainerCreate(ctx, client.ContainerCreateOptions{Name: name, Config: config, HostConfig: host})
	switch {
	case errdefs.IsConflict(err):
		return nil // created by a call whose answer was lost: start it
	case errdefs.IsNotFound(err):
		return &agent.Error{Code: pb.ReasonCode_IMAGE_NOT_FOUND, Retryable: true, Err: fmt.Errorf("create: %w", err)}
	case err != nil:
		return classify(ctx, "create", err)
	}
	return nil
}

// notStarted gives a failed start its reason, and takes away what was created
// for it. A container that has run before is kept.
func (r *Runtime) notStarted(ctx context.Context, name string, created bool, err error) *agent.Error {
	reason := classify(ctx, "start", err)
	if ctx.Err() != nil || !created {
		return reason
	}
	found, inspectErr := r.api.ContainerInspect(ctx, name, client.ContainerInspectOptions{})
	if inspectErr == nil && reason.Code != pb.ReasonCode_PORT_BIND_CONFLICT &&
		slices.Contains([]int{notExecutable, notFound}, found.Container.State.ExitCode) {
		reason.Code, reason.Retryable = pb.ReasonCode_BAD_COMMAND, false
	}
	if _, err := r.api.ContainerRemove(ctx, name, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true}); err != nil && !errdefs.IsNotFound(err) {
		r.log.Warn("a container that could not be started can't be removed either", "container", name, "error", err)
	}
	return reason
}

// Stop signals, and kills what still runs after grace. An engine counts the grace
// in seconds: less than one is none.
func (r *Runtime) Stop(ctx context.Context, in agent.Instance, grace time.Duration) error {
	defer r.cache.forget(in.ID)
	if grace < time.Second {
		_, err := r.api.ContainerKill(ctx, in.ID, client.ContainerKillOptions{Signal: "KILL"})
		switch {
		case errdefs.IsNotFound(err), errdefs.IsConflict(err): // gone, or not running
			return nil
		case err != nil:
			return classify(ctx, "kill", err)
		}
		return r.wait(ctx, in.ID, container.WaitConditionNotRunning)
	}
	seconds := int((grace + time.Second - 1) / time.Second)
	if _, err := r.api.ContainerStop(ctx, in.ID, client.ContainerStopOptions{Timeout: &seconds}); err != nil && !errdefs.IsNotFound(err) {
		return classify(ctx, "stop", err)
	}
	return nil
}

// Remove stops the container and takes it away with the volumes that have no name:
// those are its own. Volumes with a name and mounted directories stay.
func (r *Runtime) Remove(ctx context.Context, in agent.Instance, grace time.Duration) error {
	if err := r.Stop(ctx, in, grace); err != nil {
		return err
	}
	_, err := r.api.ContainerRemove(ctx, in.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case errdefs.IsConflict(err): // being removed
		return r.wait(ctx, in.ID, container.WaitConditionRemoved)
	case err != nil:
		return classify(ctx, "remove", err)
	}
	return nil
}

func (r *Runtime) wait(ctx context.Context, id string, condition container.WaitCondition) error {
	waiting := r.api.ContainerWait(ctx, id, client.ContainerWaitOptions{Condition: condition})
	select {
	case <-waiting.Result:
		return nil
	case err := <-waiting.Error:
		if errdefs.IsNotFound(err) {
			return nil
		}
		return classify(ctx, "wait", err)
	}
}
