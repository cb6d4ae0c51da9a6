package agent

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

var update = flag.Bool("update", false, "rewrite the recorded answers")

// A script is a picture in words, "----", and what is decided and reported for it.
// Pictures build on the one before, unless they begin with "new".
//
//	new [revision=N] [current] [lease=10s] [silent=DURATION]
//	at DURATION                          the time, from the beginning
//	want W/N gen= [rev= uid= stopped deleted exclusive port= restart= job policy= max=]
//	unwant W/N                           taken out of the set by a server
//	has W/N id= gen= [rev= uid= running exited created code= oom exclusive port= restart= ran= ended=]
//	gone W/N
//	busy W/N
//	history W/N gen= [crashes= stopped failed=CODE retry=DURATION]
//	orphan id= since=
func TestDiff(t *testing.T) {
	files, err := filepath.Glob("testdata/diff/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			w := &world{t: t}
			for i, part := range strings.Split(strings.TrimSpace(string(data)), "\n\n") {
				commands, _, _ := strings.Cut(part, "\n----\n")
				if i > 0 {
					got.WriteString("\n")
				}
				got.WriteString(commands + "\n----\n" + w.run(commands))
			}
			if *update {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got.String() != string(data) {
				t.Errorf("answers differ from %s; with -update they are rewritten:\n%s", file, got.String())
			}
		})
	}
}

var begin = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

type world struct {
	t      *testing.T
	p      picture
	silent time.Duration
}

// arguments of a command: words, and name=value pairs.
type arguments map[string]string

func (a arguments) has(name string) bool { _, ok := a[name]; return ok }

func (w *world) number(a arguments, name string) int64 {
	if !a.has(name) {
		return 0
	}
	n, err := strconv.ParseInt(a[name], 10, 64)
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

func (w *world) duration(text string) time.Duration {
	d, err := time.ParseDuration(text)
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (a arguments) or(name, otherwise string) string {
	if a.has(name) {
		return a[name]
	}
	return otherwise
}

func (a arguments) ports() []*pb.Port {
	var ports []*pb.Port
	if a.has("port") {
		n, _ := strconv.Atoi(a["port"])
		ports = append(ports, &pb.Port{HostPort: int32(n), ContainerPort: 80})
	}
	return ports
}

func (w *world) run(commands string) string {
	for line := range strings.SplitSeq(commands, "\n") {
		if strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Fields(line)
		a := arguments{}
		var key Key
		for i, field := range fields[1:] {
			name, value, _ := strings.Cut(field, "=")
			a[name] = value
			if workload, replica, ok := strings.Cut(field, "/"); ok && i == 0 {
				n, err := strconv.Atoi(replica)
				if err != nil {
					w.t.Fatal(err)
				}
				key = Key{workload, int32(n)}
			}
		}
		w.command(fields[0], key, a)
	}
	return w.answer()
}

func (w *world) command(name string, key Key, a arguments) {
	p := &w.p
	switch name {
	case "new":
		*p = picture{
			now: begin, desired: desired{revision: w.number(a, "revision"), items: map[Key]*pb.DesiredItem{}}, actual: map[Key][]Instance{},
			answers: map[pb.WorkloadType]bool{pb.WorkloadType_CONTAINER: true, pb.WorkloadType_PROCESS: true}, busy: map[Key]bool{},
			history: map[Key]history{}, dropped: map[Key]dropped{}, current: a.has("current"), orphans: map[string]time.Time{}, orphanGrace: time.Minute,
		}
		w.silent = 0
		if a.has("lease") {
			p.leaseEnd = begin.Add(w.duration(a["lease"]))
		}
		if a.has("silent") {
			w.silent = w.duration(a["silent"])
			p.answers[pb.WorkloadType_CONTAINER] = false
		}
	case "set":
		p.desired.revision, p.current = max(p.desired.revision, w.number(a, "revision")), p.current || a.has("current")
	case "answers":
		p.answers[pb.WorkloadType_CONTAINER], w.silent = true, 0
	case "at":
		for d := range a {
			p.now = begin.Add(w.duration(d))
		}
	case "want":
		spec := &pb.WorkloadSpec{Id: key.Workload, Restart: &pb.RestartPolicy{MaxAttempts: int32(w.number(a, "max"))}}
		if a.has("job") {
			spec.Kind = pb.WorkloadKind_JOB
		}
		if a.has("policy") {
			spec.Restart.Condition = pb.RestartPolicy_Condition(pb.RestartPolicy_Condition_value[a["policy"]])
		}
		item := &pb.DesiredItem{Spec: spec, Assignment: &pb.Assignment{
			WorkloadId: key.Workload, Replica: key.Replica, NodeId: "n1", Generation: w.number(a, "gen"), Revision: a.or("rev", "r1"),
			WorkloadUid: a.or("uid", "u1"), Type: pb.WorkloadType_CONTAINER, Exclusive: a.has("exclusive"), Ports: a.ports(),
			RestartGeneration: w.number(a, "restart"),
		}}
		switch {
		case a.has("stopped"):
			item.Assignment.DesiredState = pb.DesiredState_DESIRED_STOPPED
		case a.has("deleted"):
			item.Assignment.DesiredState = pb.DesiredState_DESIRED_DELETED
		case a.has("vm"):
			item.Assignment.Type = pb.WorkloadType_VM
		}
		p.desired.items[key] = item
	case "unwant":
		p.dropped[key] = dropped{generation: p.desired.items[key].GetAssignment().GetGeneration(), kind: pb.WorkloadType_CONTAINER}
		delete(p.desired.items, key)
	case "has":
		in := Instance{
			Labels: Labels{Key: key, UID: a.or("uid", "u1"), Revision: a.or("rev", "r1"), Generation: w.number(a, "gen"), Exclusive: a.has("exclusive"),
				Ports: a.ports(), Grace: DefaultGrace, RestartGeneration: w.number(a, "restart")},
			ID: a["id"], Type: pb.WorkloadType_CONTAINER, Phase: Created, OutOfMemory: a.has("oom"), ExitCode: int32(w.number(a, "code")),
		}
		switch {
		case a.has("running"):
			in.Phase, in.Started = Running, p.now
		case a.has("exited"):
			in.Phase, in.Finished = Exited, p.now
			in.Started = in.Finished.Add(-w.duration(a.or("ran", "1s")))
		}
		p.actual[key] = append(slices.DeleteFunc(slices.Clone(p.actual[key]), func(o Instance) bool { return o.ID == in.ID }), in)
	case "gone":
		delete(p.actual, key)
	case "busy":
		p.busy[key] = true
	case "history":
		h := history{generation: w.number(a, "gen"), crashes: int(w.number(a, "crashes")), stopped: a.has("stopped"), restarts: int32(w.number(a, "restarts"))}
		if a.has("failed") {
			h.failure = &Error{Code: pb.ReasonCode(pb.ReasonCode_value[a["failed"]]), Message: "as scripted", Retryable: true}
		}
		if a.has("retry") {
			h.retryAt = begin.Add(w.duration(a["retry"]))
		}
		p.history[key] = h
	case "orphan":
		p.orphans[a["id"]] = begin.Add(w.duration(a["since"]))
	default:
		w.t.Fatalf("unknown command %q", name)
	}
}

func (w *world) answer() string {
	p := w.p
	for key, item := range p.desired.items {
		h := p.history[key].of(item.GetAssignment().GetGeneration())
		if in, _ := split(item.GetAssignment(), p.actual[key]); in != nil {
			h = h.afterEnd(*in, item.GetSpec(), p.now)
		}
		p.history[key] = h
	}
	d := diff(p)
	var out strings.Builder
	for _, act := range d.actions {
		fmt.Fprintln(&out, act)
	}
	keys := map[Key]bool{}
	for key := range p.desired.items {
		keys[key] = true
	}
	for key := range p.actual {
		keys[key] = true
	}
	for _, key := range slices.SortedFunc(maps.Keys(keys), Key.compare) {
		_, told := p.dropped[key]
		o := observation{
			now: p.now, node: "n1", key: key, item: p.desired.items[key], told: told, actual: p.actual[key], history: p.history[key], waiting: d.waiting[key],
			missing: p.desired.items[key].GetAssignment().GetType() == pb.WorkloadType_VM,
		}
		if w.silent > 0 {
			o.silent = p.now.Add(-w.silent)
		}
		r := describe(o)
		if r == nil {
			fmt.Fprintf(&out, "%s as before\n", key)
			continue
		}
		fmt.Fprintf(&out, "%s is %s gen=%d", key, r.GetState(), r.GetGeneration())
		if r.ExitCode != nil {
			fmt.Fprintf(&out, " code=%d", r.GetExitCode())
		}
		if reason := r.GetReason(); reason != nil {
			fmt.Fprintf(&out, " %s %q retryable=%t", reason.GetCode(), reason.GetMessage(), reason.GetRetryable())
			if reason.GetNextRetryAt() != nil {
				fmt.Fprintf(&out, " next=%s", reason.GetNextRetryAt().AsTime().Sub(begin))
			}
		}
		out.WriteString("\n")
	}
	if !d.wake.IsZero() {
		fmt.Fprintf(&out, "wake at %s\n", d.wake.Sub(begin))
	}
	return out.String()
}
