package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/scheduler"
)

// questions are what persys plan is asked.
type questions struct {
	snapshot    string
	drain, lose []string
	add         int
	like        string
	files       []string
	recursive   bool
}

func (a *app) planCommand() *cobra.Command {
	var q questions
	c := &cobra.Command{
		Use: "plan", Short: "Answer what-if questions: nodes drained, lost or added, workloads applied", Args: takes(""),
		Long: `Says what would follow if nodes were drained, lost or added, or workloads applied,
all of it together: what would move where, what would have to wait and why, and how
full the nodes would be. Nothing is changed: it is worked out on this machine, from
a snapshot that the cluster sends (an administrator may have one) or from a file that
persys or ` + "`etcdctl snapshot save`" + ` wrote. All agents are taken to do at once what
they are told.`,
		Example: "  persys plan --drain n1 --drain n2\n  persys plan --snapshot cluster.snap --lose n1 -f web.yaml\n  persys plan --add-nodes 3 --like n1",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := q.check(); err != nil {
				return err
			}
			var specs []*pb.WorkloadSpec
			if len(q.files) > 0 {
				var err error
				if specs, err = readSpecs(q.files, q.recursive, a.Stdin); err != nil {
					return err
				}
			}
			v, err := a.snapshot(cmd, q.snapshot)
			if err != nil {
				return err
			}
			answer, err := q.answer(v, specs)
			if err != nil {
				return refused(err)
			}
			return a.printAnswer(answer)
		},
	}
	f := c.Flags()
	f.StringVar(&q.snapshot, "snapshot", "", "`file` with a snapshot; - is standard input (default: the cluster is asked for one)")
	f.StringArrayVar(&q.drain, "drain", nil, "`node` that is drained; may be repeated")
	f.StringArrayVar(&q.lose, "lose", nil, "`node` that does not answer any more; may be repeated")
	f.IntVar(&q.add, "add-nodes", 0, "`number` of nodes that are added")
	f.StringVar(&q.like, "like", "", "`node` that they are like")
	fileFlags(c, &q.files, &q.recursive)
	for _, flag := range []string{"drain", "lose", "like"} {
		must(c.RegisterFlagCompletionFunc(flag, a.completeNodes))
	}
	return c
}

func (q *questions) check() error {
	switch {
	case len(q.drain)+len(q.lose)+len(q.files)+q.add == 0:
		return usageErrorf("persys plan needs a question: --drain, --lose, --add-nodes or -f")
	case q.add < 0 || q.add > maxAdded:
		return usageErrorf("--add-nodes: %d; allowed: 1 to %d", q.add, maxAdded)
	case q.add > 0 && q.like == "":
		return usageErrorf("--add-nodes needs --like NODE, to know what they offer")
	case q.add == 0 && q.like != "":
		return usageErrorf("--like needs --add-nodes NUMBER")
	}
	return nil
}

const maxAdded = 100_000

// snapshot is the state of a cluster, from a file or from the cluster.
func (a *app) snapshot(cmd *cobra.Command, file string) (v *fsm.View, err error) {
	switch file {
	case "":
		err = a.withClient(cmd, func(ctx context.Context, c *client) error {
			v, err = receiveSnapshot(ctx, c)
			return err
		})
		return v, err
	case "-":
		v, err = restored("standard input", a.Stdin)
		return v, err
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, usageErrorf("%s: %w", file, causeOfPath(err))
	}
	defer f.Close()
	return restored(file, f)
}

// restored reads a snapshot to its end, and believes none that is not whole.
func restored(name string, r io.Reader) (*fsm.View, error) {
	store, err := fsm.Restore(r)
	if errors.Is(err, fsm.ErrSnapshot) {
		why := strings.TrimPrefix(err.Error(), fsm.ErrSnapshot.Error()+": ")
		return nil, usageErrorf("%s is not a whole snapshot of this program: %s", name, why)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return store.View(), nil
}

func receiveSnapshot(ctx context.Context, c *client) (*fsm.View, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := etcdpb.NewMaintenanceClient(c.pool).Snapshot(ctx, &etcdpb.SnapshotRequest{})
	if err != nil {
		return nil, err
	}
	pieces := &snapshotReader{stream: stream}
	v, err := restored("what the cluster sent", pieces)
	if pieces.err != nil {
		return nil, pieces.err
	}
	return v, err
}

// snapshotReader reads what is streamed, a piece at a time.
type snapshotReader struct {
	stream etcdpb.Maintenance_SnapshotClient
	rest   []byte
	err    error // but for the end
}

func (r *snapshotReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		piece, err := r.stream.Recv()
		if err != nil {
			if err != io.EOF {
				r.err = err
			}
			return 0, err
		}
		r.rest = piece.Blob
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// refused gives a refusal of admission the exit code that the server's would have.
func refused(err error) error {
	var fields model.FieldErrors
	var r *model.Refusal
	switch {
	case errors.As(err, &r):
		return &codedError{exitCode(status.Error(r.Code, r.Message)), err}
	case errors.As(err, &fields):
		return &codedError{exitUsage, err}
	}
	return err
}

// answer is what would follow.
type answer struct {
	Revision int64     `json:"revision"`
	Time     time.Time `json:"time"`
	// Of the workloads that are applied.
	Applied []appliedSpec `json:"applied"`
	// Of pb.PlannedChange.
	Changes   []json.RawMessage   `json:"changes"`
	Unchanged int                 `json:"unchanged"`
	Pending   []scheduler.Waiting `json:"pending"`
	// It was not followed to its end.
	Cut   bool         `json:"cut"`
	Nodes []nodeChange `json:"nodes"`

	changes []*pb.PlannedChange
}

type appliedSpec struct {
	ID      string `json:"id"`
	Outcome string `json:"outcome"`
}

// nodeChange is a node before and after.
type nodeChange struct {
	ID             string `json:"id"`
	State          string `json:"state"`
	New            bool   `json:"new"`
	ReplicasBefore int    `json:"replicas_before"`
	ReplicasAfter  int    `json:"replicas_after"`
	CPU            int64  `json:"cpu_millis"`
	CPUBefore      int64  `json:"cpu_millis_before"`
	CPUAfter       int64  `json:"cpu_millis_after"`
	Memory         int64  `json:"memory_bytes"`
	MemoryBefore   int64  `json:"memory_bytes_before"`
	MemoryAfter    int64  `json:"memory_bytes_after"`
	changed        bool
}

// answer asks all of it at once, at the time of the snapshot.
func (q *questions) answer(v *fsm.View, specs []*pb.WorkloadSpec) (*answer, error) {
	trial, err := scheduler.NewTrial(v, v.Revision(), v.Time(), scheduler.Options{})
	if err != nil {
		return nil, err
	}
	out := &answer{Revision: v.Revision(), Time: v.Time().UTC(), Applied: []appliedSpec{}, Changes: []json.RawMessage{}}
	before := trial.Nodes()
	if q.add > 0 {
		if err := trial.AddNodes(q.like, q.add); err != nil {
			return nil, err
		}
	}
	for _, s := range specs {
		outcome, err := trial.Apply(s)
		if err != nil {
			return nil, about("workload", s.Id, err)
		}
		out.Applied = append(out.Applied, appliedSpec{s.Id, outcome.String()})
	}
	for _, id := range q.drain {
		if err := trial.DrainNode(id); err != nil {
			return nil, about("node", id, err)
		}
	}
	for _, id := range q.lose {
		if err := trial.LoseNode(id); err != nil {
			return nil, about("node", id, err)
		}
	}
	found, err := trial.Outcome()
	if err != nil {
		return nil, err
	}
	out.changes, out.Unchanged, out.Cut = found.Changes, found.Unchanged, found.Cut
	out.Pending = append([]scheduler.Waiting{}, found.Pending...)
	for _, c := range found.Changes {
		data, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(c)
		if err != nil {
			return nil, err
		}
		out.Changes = append(out.Changes, data)
	}
	out.Nodes = nodeChanges(before, trial.Nodes())
	return out, nil
}

func nodeChanges(before, after []scheduler.NodeLoad) []nodeChange {
	was := map[string]scheduler.NodeLoad{}
	for _, n := range before {
		was[n.ID] = n
	}
	all := make([]nodeChange, 0, len(after))
	for _, n := range after {
		old, known := was[n.ID]
		c := nodeChange{
			ID: n.ID, State: n.State, New: !known, ReplicasBefore: old.Replicas, ReplicasAfter: n.Replicas,
			CPU: n.Capacity.CpuMillis, CPUBefore: old.Reserved.GetCpuMillis(), CPUAfter: n.Reserved.CpuMillis,
			Memory: n.Capacity.MemoryBytes, MemoryBefore: old.Reserved.GetMemoryBytes(), MemoryAfter: n.Reserved.MemoryBytes,
		}
		c.changed = !known || old.State != n.State || c.ReplicasBefore != c.ReplicasAfter || c.CPUBefore != c.CPUAfter || c.MemoryBefore != c.MemoryAfter
		all = append(all, c)
	}
	return all
}

func (a *app) printAnswer(x *answer) error {
	switch {
	case a.out.format == "name":
		for _, c := range x.changes {
			if _, err := fmt.Fprintf(a.Stdout, "%s/%d\n", c.WorkloadId, c.Replica); err != nil {
				return err
			}
		}
		return nil
	case !a.out.forPeople():
		return a.out.document(indented(x))
	}
	p := &page{color: a.out.color, wide: a.out.format == "wide"}
	fmt.Fprintf(&p.b, "At revision %d (%s):\n", x.Revision, x.Time.Format(time.RFC3339))
	for _, w := range x.Applied {
		fmt.Fprintf(&p.b, "workload/%s would be %s\n", w.ID, strings.ToLower(w.Outcome))
	}
	if len(x.changes) == 0 {
		p.b.WriteString("no replica would be moved, replaced or removed\n")
	}
	p.section("Replicas", planTable(x.changes))
	if x.Cut {
		p.b.WriteString("\nIt goes on in the same way; it was not followed to its end.\n")
	}
	if len(x.Pending) > 0 {
		p.b.WriteString("\nPending:\n")
		for _, w := range x.Pending {
			for _, line := range w.Lines {
				fmt.Fprintf(&p.b, "  %s: %s\n", w.Workload, oneLine(line))
			}
		}
	}
	p.section("Nodes", loadTable(x.Nodes, p.wide))
	return p.write(a.Stdout)
}

// loadTable shows the nodes that would change; wide: all.
func loadTable(nodes []nodeChange, all bool) table {
	t := table{head: []string{"NODE", "STATE", "REPLICAS", "CPU", "OF", "MEMORY", "OF"}}
	for _, n := range nodes {
		if !n.changed && !all {
			continue
		}
		name := n.ID
		if n.New {
			name += " (new)"
		}
		t.add(name, n.State, fromTo(fmt.Sprint(n.ReplicasBefore), fmt.Sprint(n.ReplicasAfter)), fromTo(cores(n.CPUBefore), cores(n.CPUAfter)), cores(n.CPU),
			fromTo(bytesText(n.MemoryBefore), bytesText(n.MemoryAfter)), bytesText(n.Memory))
	}
	return t
}

func fromTo(before, after string) string {
	if before == after {
		return before
	}
	return before + " → " + after
}
