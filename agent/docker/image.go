package docker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/client"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// pullStall ends a fetch in which nothing has moved for so long.
const pullStall = 2 * time.Minute

var errStalled = errors.New("nothing has come from the registry for " + pullStall.String())

// Prepare sees to it that the image is on the node. With IF_NOT_PRESENT, the
// default, no registry is asked for an image that is there already: neither a
// registry that is down nor one that is slow keeps it from starting.
func (r *Runtime) Prepare(ctx context.Context, w agent.Work) error {
	spec := w.Item.GetSpec().GetContainer()
	image := spec.GetImage()
	if _, err := reference.ParseNormalizedNamed(image); err != nil {
		return agent.Refuse(pb.ReasonCode_INVALID_IMAGE, "image %q: %v", image, err)
	}
	if spec.GetPullPolicy() == pb.ContainerSpec_ALWAYS {
		return r.pull(ctx, image)
	}
	_, err := r.api.ImageInspect(ctx, image)
	switch {
	case err == nil:
		return nil
	case !errdefs.IsNotFound(err):
		return classify(ctx, "image "+image, err)
	case spec.GetPullPolicy() == pb.ContainerSpec_NEVER:
		return &agent.Error{
			Code: pb.ReasonCode_IMAGE_NOT_FOUND, Retryable: true,
			Err: fmt.Errorf("image %s is not on node %s, and its pull policy is NEVER", image, r.cfg.NodeID),
		}
	}
	return r.pull(ctx, image)
}

func (r *Runtime) pull(ctx context.Context, image string) error {
	r.log.Info("fetching image", "image", image)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(pullStall, func() { cancel(errStalled) })
	defer stalled.Stop()
	err := r.follow(ctx, image, stalled)
	switch {
	case err == nil:
		return nil
	case errors.Is(context.Cause(ctx), errStalled):
		return &agent.Error{Code: pb.ReasonCode_IMAGE_PULL_TIMEOUT, Retryable: true, Err: fmt.Errorf("image %s: %w", image, errStalled)}
	}
	return classifyImage(ctx, image, err)
}

func (r *Runtime) follow(ctx context.Context, image string, stalled *time.Timer) error {
	progress, err := r.api.ImagePull(ctx, image, client.ImagePullOptions{})
	if err != nil {
		return err
	}
	defer progress.Close()
	for message, err := range progress.JSONMessages(ctx) {
		if err != nil {
			return err
		}
		if message.Error != nil {
			return message.Error
		}
		stalled.Reset(pullStall)
	}
	return ctx.Err()
}

// digest names what an image is: the manifest's digest as the registry knows it,
// or the image's id where it never came from one.
func (r *Runtime) digest(ctx context.Context, image string) (string, error) {
	found, err := r.api.ImageInspect(ctx, image)
	if err != nil {
		return "", err
	}
	for _, repo := range found.RepoDigests {
		if _, digest, ok := strings.Cut(repo, "@"); ok {
			return digest, nil
		}
	}
	return found.ID, nil
}
