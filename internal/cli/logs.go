package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func (a *app) logsCommand() *cobra.Command {
	var (
		request    pb.WorkloadLogsRequest
		replica    int32
		since      string
		timestamps bool
	)
	c := &cobra.Command{
		Use: "logs ID", Short: "Show what a workload writes", Args: takes("ID"), ValidArgsFunction: a.completeWorkloads,
		Example: "  persys logs web -f --tail 100\n  persys logs web --replica 1 --since 10m",
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Id, request.Timestamps = args[0], timestamps
			if cmd.Flags().Changed("replica") {
				request.Replica = &replica
			}
			if request.Tail < 0 {
				return usageErrorf("--tail must not be negative")
			}
			if since != "" {
				at, err := parseSince(since, time.Now())
				if err != nil {
					return err
				}
				request.Since = timestamppb.New(at)
			}
			return a.withClient(cmd, func(ctx context.Context, c *client) error {
				return a.logs(ctx, c, &request)
			})
		},
	}
	flags := c.Flags()
	flags.BoolVarP(&request.Follow, "follow", "f", false, "go on with what is written from now on")
	flags.Int64VarP(&request.Tail, "tail", "n", 0, "only the last so many lines; 0: all that are kept")
	flags.Int32Var(&replica, "replica", 0, "only this replica")
	flags.StringVar(&since, "since", "", "only from this `time` on: 10m, or 2026-01-02T15:04:05Z")
	flags.BoolVarP(&timestamps, "timestamps", "t", false, "begin each line with its time")
	return c
}

// parseSince reads a duration before now, or a time.
func parseSince(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return at, usageErrorf("--since %q: must be how long ago (10m) or a time (2026-01-02T15:04:05Z)", text)
	}
	return at, nil
}

// logs prints lines as they come. Where several replicas write, each line says
// which one it is from.
func (a *app) logs(ctx context.Context, c *client, request *pb.WorkloadLogsRequest) error {
	w, err := c.workloads.GetWorkload(ctx, &pb.GetWorkloadRequest{Id: request.Id})
	if err != nil {
		return about("workload", request.Id, err)
	}
	l := &logPrinter{
		out: bufio.NewWriter(a.Stdout), errs: bufio.NewWriter(a.Stderr), printer: a.out, timestamps: request.Timestamps,
		prefix: request.Replica == nil && (len(w.Replicas) > 1 || w.GetStatus().GetDesired() > 1), id: request.Id, seen: map[int32]time.Time{},
	}
	err = follow(ctx, c.pool, func(ctx context.Context) (grpc.ServerStreamingClient[pb.LogChunk], error) {
		l.resume(request)
		return c.workloads.WorkloadLogs(ctx, request)
	}, func(chunk *pb.LogChunk) (bool, error) { return false, l.write(chunk) })
	if err != nil {
		return fmt.Errorf("logs of %q: %w", request.Id, err)
	}
	return nil
}

type logPrinter struct {
	out, errs  *bufio.Writer
	printer    *printer
	prefix     bool
	timestamps bool
	id         string
	// Time of the last line of each replica, and of the last of all: where to
	// go on on another server.
	seen map[int32]time.Time
	last time.Time
	// Up to when lines of a replica are known already.
	known map[int32]time.Time
}

// resume changes the request so that it goes on after what was printed.
func (l *logPrinter) resume(request *pb.WorkloadLogsRequest) {
	if l.last.IsZero() {
		return
	}
	oldest := l.last
	l.known = map[int32]time.Time{}
	for replica, at := range l.seen {
		l.known[replica] = at
		if at.Before(oldest) {
			oldest = at
		}
	}
	request.Since, request.Tail = timestamppb.New(oldest), 0
}

func (l *logPrinter) write(chunk *pb.LogChunk) error {
	if chunk.Time != nil {
		at := chunk.Time.AsTime()
		if known, ok := l.known[chunk.Replica]; ok && !at.After(known) {
			return nil
		}
		l.seen[chunk.Replica], l.last = at, at
	}
	if l.printer.format == "json" || l.printer.format == "yaml" {
		return l.printer.streamed(logDocument(chunk))
	}
	w := l.out
	if chunk.Stderr {
		w = l.errs
	}
	if l.timestamps && chunk.Time != nil {
		fmt.Fprintf(w, "%s ", chunk.Time.AsTime().UTC().Format("2006-01-02T15:04:05.000Z"))
	}
	if l.prefix {
		fmt.Fprintf(w, "%s/%d | ", l.id, chunk.Replica)
	}
	_, _ = w.Write(chunk.Line) // bufio keeps the error for Flush
	_, _ = io.WriteString(w, "\n")
	return w.Flush()
}

// logDocument has the line as text: protojson makes base64 of bytes.
func logDocument(chunk *pb.LogChunk) ([]byte, error) {
	line := struct {
		Replica int32      `json:"replica"`
		Node    string     `json:"node_id"`
		Stderr  bool       `json:"stderr"`
		Line    string     `json:"line"`
		Time    *time.Time `json:"time,omitempty"`
	}{chunk.Replica, chunk.NodeId, chunk.Stderr, string(chunk.Line), nil}
	if chunk.Time != nil {
		at := chunk.Time.AsTime()
		line.Time = &at
	}
	return json.Marshal(line)
}
