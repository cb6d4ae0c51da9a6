package docker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// phrases are what engines say where they give no type: a failed start is
// always "internal", a failed fetch comes as text in its progress.
var phrases = []struct {
	text      string
	code      pb.ReasonCode
	retryable bool
}{
	{"port is already allocated", pb.ReasonCode_PORT_BIND_CONFLICT, true},
	{"address already in use", pb.ReasonCode_PORT_BIND_CONFLICT, true},
	{"no space left on device", pb.ReasonCode_STORAGE_FULL, true},
	{"disk quota exceeded", pb.ReasonCode_STORAGE_FULL, true},
	{"executable file not found", pb.ReasonCode_BAD_COMMAND, false},
	{"unable to find user", pb.ReasonCode_INVALID_SPEC, false},
	{"unable to find group", pb.ReasonCode_INVALID_SPEC, false},
	{"manifest unknown", pb.ReasonCode_IMAGE_NOT_FOUND, true},
	{"name unknown", pb.ReasonCode_IMAGE_NOT_FOUND, true},
	{"no matching manifest", pb.ReasonCode_INVALID_IMAGE, false},
	{"unauthorized", pb.ReasonCode_IMAGE_PULL_AUTH_FAILED, true},
	{"no basic auth credentials", pb.ReasonCode_IMAGE_PULL_AUTH_FAILED, true},
	{"no such host", pb.ReasonCode_DNS_RESOLUTION_FAILED, true},
	{"server misbehaving", pb.ReasonCode_DNS_RESOLUTION_FAILED, true},
	{"temporary failure in name resolution", pb.ReasonCode_DNS_RESOLUTION_FAILED, true},
	{"tls handshake timeout", pb.ReasonCode_IMAGE_PULL_TIMEOUT, true},
	{"i/o timeout", pb.ReasonCode_IMAGE_PULL_TIMEOUT, true},
	{"deadline exceeded", pb.ReasonCode_IMAGE_PULL_TIMEOUT, true},
	{"awaiting headers", pb.ReasonCode_IMAGE_PULL_TIMEOUT, true},
	{"connection refused", pb.ReasonCode_NETWORK_ERROR, true},
	{"network is unreachable", pb.ReasonCode_NETWORK_ERROR, true},
	{"failed to create endpoint", pb.ReasonCode_NETWORK_ATTACH_FAILED, true},
}

// classify gives a failure of the engine its reason: by type, and only where
// there is none by what the engine says.
func classify(ctx context.Context, what string, err error) *agent.Error {
	var known *agent.Error
	if errors.As(err, &known) {
		return known
	}
	e := &agent.Error{Code: pb.ReasonCode_RUNTIME_ERROR, Retryable: true, Err: fmt.Errorf("%s: %w", what, err)}
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		e.Err = fmt.Errorf("%s: %w", what, context.Canceled)
		return e
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.Err = fmt.Errorf("%s: no answer in time: %w", what, err)
		return e
	case client.IsErrConnectionFailed(err), broken(err):
		e.Code = pb.ReasonCode_RUNTIME_UNAVAILABLE
		return e
	}
	text := strings.ToLower(err.Error())
	for _, p := range phrases {
		if strings.Contains(text, p.text) {
			e.Code, e.Retryable = p.code, p.retryable
			return e
		}
	}
	if errdefs.IsInvalidArgument(err) {
		e.Code, e.Retryable = pb.ReasonCode_INVALID_SPEC, false
	}
	return e
}

// broken reports whether the connection was lost in the middle of a call.
func broken(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNREFUSED)
}

// classifyImage is classify for what concerns fetching an image.
func classifyImage(ctx context.Context, image string, err error) *agent.Error {
	what := "image " + image
	if ctx.Err() == nil && !client.IsErrConnectionFailed(err) && !broken(err) {
		code := pb.ReasonCode_REASON_UNSPECIFIED
		switch {
		case errdefs.IsNotFound(err):
			code = pb.ReasonCode_IMAGE_NOT_FOUND
		case errdefs.IsUnauthorized(err), errdefs.IsPermissionDenied(err):
			code = pb.ReasonCode_IMAGE_PULL_AUTH_FAILED
		}
		if code != pb.ReasonCode_REASON_UNSPECIFIED {
			return &agent.Error{Code: code, Retryable: true, Err: fmt.Errorf("%s: %w", what, err)}
		}
	}
	e := classify(ctx, what, err)
	switch {
	case e.Code == pb.ReasonCode_INVALID_SPEC:
		e.Code = pb.ReasonCode_INVALID_IMAGE
	case e.Code == pb.ReasonCode_RUNTIME_ERROR && errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.Code = pb.ReasonCode_IMAGE_PULL_TIMEOUT
	case e.Code == pb.ReasonCode_RUNTIME_ERROR:
		e.Code = pb.ReasonCode_IMAGE_PULL_FAILED
	}
	return e
}
