package docker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// maxLine is where a line is cut in two.
const maxLine = 256 << 10

// Logs reads what the engine has kept.
func (r *Runtime) Logs(ctx context.Context, in agent.Instance, req *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error {
	opts := client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true, Timestamps: true, Follow: req.GetFollow()}
	if req.GetTail() > 0 {
		opts.Tail = strconv.FormatInt(req.GetTail(), 10)
	}
	if req.Since != nil {
		opts.Since = fmt.Sprintf("%d.%09d", req.GetSince().GetSeconds(), req.GetSince().GetNanos())
	}
	stream, err := r.api.ContainerLogs(ctx, in.ID, opts)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return classify(ctx, "logs", err)
	}
	defer stream.Close()
	stdout, stderr := &lines{send: send}, &lines{send: send, stderr: true}
	_, err = stdcopy.StdCopy(stdout, stderr, stream)
	if err == nil || errors.Is(err, io.EOF) {
		err = errors.Join(stdout.flush(), stderr.flush())
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("logs of %s: %w", in.ID, err)
	}
	return nil
}

// lines cuts a stream of "<time> <text>" lines into chunks.
type lines struct {
	send   func(*pb.LogChunk) error
	stderr bool
	rest   []byte
}

func (l *lines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		i := bytes.IndexByte(l.rest, '\n')
		if i < 0 && len(l.rest) < maxLine {
			return len(p), nil
		}
		end := i + 1
		if i < 0 {
			i, end = maxLine, maxLine
		}
		if err := l.line(l.rest[:i]); err != nil {
			return 0, err
		}
		l.rest = append(l.rest[:0], l.rest[end:]...)
	}
}

func (l *lines) flush() error {
	if len(l.rest) == 0 {
		return nil
	}
	return l.line(l.rest)
}

func (l *lines) line(text []byte) error {
	chunk := &pb.LogChunk{Stderr: l.stderr, Line: bytes.Clone(text)}
	if stamp, rest, ok := bytes.Cut(text, []byte(" ")); ok {
		if t, err := time.Parse(time.RFC3339Nano, string(stamp)); err == nil {
			chunk.Time, chunk.Line = timestamppb.New(t), bytes.Clone(rest)
		}
	}
	chunk.Line = bytes.TrimSuffix(chunk.Line, []byte("\r"))
	return l.send(chunk)
}
