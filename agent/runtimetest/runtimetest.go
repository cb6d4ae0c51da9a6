// Package runtimetest is the conformance suite that every runtime of the agent
// passes. It belongs to tests only.
package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Names that runtimes under test are made with.
const (
	Cluster = "0c1d5f5e-test"
	Node    = "node-a"
	Other   = "node-b"
)

// Harness is what the suite needs of a runtime.
type Harness struct {
	// New makes the runtime of a node as an agent does when it starts; a second one
	// finds what the first has left.
	New func(t *testing.T, node string) agent.Runtime
	// Spec of a workload that runs the program (see Program) with arguments.
	Spec func(args ...string) *pb.WorkloadSpec
	// NoProgram is like Spec, for a program that does not exist.
	NoProgram func() *pb.WorkloadSpec
	// NoLimits says why this machine can't enforce limits; empty: it can.
	NoLimits string
}

// Program builds what workloads of the suite run: a static binary without
// dependencies. It returns its path.
func Program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	build := exec.Command("go", "build", "-o", path, "github.com/persys-dev/persys/agent/runtimetest/program")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the test program: %v\n%s", err, out)
	}
	return path
}

// suite is one test's view of a runtime.
type suite struct {
	t       *testing.T
	h       Harness
	runtime agent.Runtime
	changed chan struct{}
}

// Patience is how long anything awaited may take on a busy machine.
const Patience = 60 * time.Second

func (h Harness) start(t *testing.T) *suite {
	t.Helper()
	s := &suite{t: t, h: h, runtime: h.New(t, Node), changed: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.runtime.Watch(ctx, func() {
			select {
			case s.changed <- struct{}{}:
			default:
			}
		}); err != nil {
			t.Errorf("watch: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		s.clean()
	})
	return s
}

// clean takes away what a test has left.
func (s *suite) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	all, err := s.runtime.List(ctx)
	if err != nil {
		s.t.Errorf("list: %v", err)
	}
	for _, in := range all {
		if err := s.runtime.Remove(ctx, in, 0); err != nil {
			s.t.Errorf("remove %s: %v", in.ID, err)
		}
	}
}

// Item is an assignment of generation 7 for a spec.
func Item(id string, spec *pb.WorkloadSpec) *pb.DesiredItem {
	spec.Id = id
	a := &pb.Assignment{
		WorkloadId: id, Replica: 2, NodeId: Node, Generation: 7, Revision: "r1", WorkloadUid: "uid-" + id, Type: pb.WorkloadType_PROCESS,
		Epoch: 3, RestartGeneration: 1,
	}
	if spec.GetContainer() != nil {
		a.Type = pb.WorkloadType_CONTAINER
	}
	return &pb.DesiredItem{Assignment: a, Spec: spec}
}

func (s *suite) item(args ...string) *pb.DesiredItem {
	return Item("suite", s.h.Spec(args...))
}

func (s *suite) apply(item *pb.DesiredItem) agent.Instance {
	s.t.Helper()
	in, err := s.runtime.Apply(s.t.Context(), agent.Work{Item: item})
	if err != nil {
		s.t.Fatalf("apply: %v", err)
	}
	return in
}

func (s *suite) list() []agent.Instance {
	s.t.Helper()
	all, err := s.runtime.List(s.t.Context())
	if err != nil {
		s.t.Fatalf("list: %v", err)
	}
	return all
}

// only is the one instance there is.
func (s *suite) only() agent.Instance {
	s.t.Helper()
	all := s.list()
	if len(all) != 1 {
		s.t.Fatalf("there are %d instances, want one: %+v", len(all), all)
	}
	return all[0]
}

// ended waits, by what Watch announces, until the only instance has ended.
func (s *suite) ended() agent.Instance {
	s.t.Helper()
	limit := time.After(Patience)
	for {
		if in := s.only(); in.Phase == agent.Exited {
			return in
		}
		select {
		case <-s.changed:
		case <-limit:
			s.t.Fatalf("no end was announced: %+v", s.only())
		}
	}
}

// lines of the only instance's output.
func (s *suite) lines(req *pb.WorkloadLogsRequest) (texts []string, chunks []*pb.LogChunk) {
	s.t.Helper()
	err := s.runtime.(agent.LogSource).Logs(s.t.Context(), s.only(), req, func(c *pb.LogChunk) error {
		texts, chunks = append(texts, string(c.GetLine())), append(chunks, c)
		return nil
	})
	if err != nil {
		s.t.Fatalf("logs: %v", err)
	}
	return texts, chunks
}

// says waits until the output has a line.
func (s *suite) says(line string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), Patience)
	defer cancel()
	found := errors.New("found")
	err := s.runtime.(agent.LogSource).Logs(ctx, s.only(), &pb.WorkloadLogsRequest{Follow: true}, func(c *pb.LogChunk) error {
		if string(c.GetLine()) == line {
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		s.t.Fatalf("it never said %q: %v", line, err)
	}
}

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	for _, test := range []struct {
		name string
		run  func(*suite)
	}{
		{"what was applied runs, and is left alone by the next apply", applied},
		{"it is recognised by its labels", labelled},
		{"it is told who it is", environment},
		{"its end is announced, with the exit code", exits},
		{"what has ended is started again", again},
		{"stop keeps it, and it can be started again", stops},
		{"what does not stop is killed after the grace", stubborn},
		{"what is removed is gone", removes},
		{"a restarted agent finds it running", survives},
		{"its exit code is not lost while no agent runs", collected},
		{"another node's work is none of ours", foreign},
		{"a program that does not exist is a bad command", badCommand},
		{"going over the memory limit is reported as such", outOfMemory},
		{"more processor time than the limit can't be had", throttled},
		{"output is kept, oldest first", logs},
		{"output is followed to the end", follows},
		{"use is measured", stats},
		{"many at once", many},
		{"a call ends with its context", cancelled},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(h.start(t)) })
	}
}

func applied(s *suite) {
	first := s.apply(s.item("wait"))
	if first.Phase != agent.Running || first.ID == "" || first.Started.IsZero() {
		s.t.Fatalf("applied: %+v", first)
	}
	second := s.apply(s.item("wait"))
	if second.ID != first.ID || !second.Started.Equal(first.Started) {
		s.t.Errorf("the second apply made something else: %+v, then %+v", first, second)
	}
	if in := s.only(); in.ID != first.ID || in.Phase != agent.Running || !in.Started.Equal(first.Started) {
		s.t.Errorf("listed as %+v, applied as %+v", in, first)
	}
}

func labelled(s *suite) {
	item := s.item("wait")
	item.Assignment.Exclusive = true
	item.Assignment.Ports = []*pb.Port{{HostPort: 18491, ContainerPort: 80, Protocol: "tcp", HostIp: "127.0.0.1"}}
	s.apply(item)
	want := agent.LabelsOf(Cluster, Node, agent.Work{Item: item})
	if got := s.only().Labels; fmt.Sprint(got.Map()) != fmt.Sprint(want.Map()) {
		s.t.Errorf("labels are %v, want %v", got.Map(), want.Map())
	}
}

func environment(s *suite) {
	item := s.item("env")
	item.Spec.Env = map[string]string{"GREETING": "hello there", "PERSYS_EPOCH": "forged", "SHARED": "workload"}
	own := map[string]string{"SHARED": "own"}
	if c := item.Spec.GetContainer(); c != nil {
		c.Env = own
	} else {
		item.Spec.GetProcess().Env = own
	}
	s.apply(item)
	s.ended()
	env, _ := s.lines(&pb.WorkloadLogsRequest{})
	for _, want := range []string{
		"PERSYS_WORKLOAD=suite", "PERSYS_REPLICA=2", "PERSYS_NODE=" + Node, "PERSYS_EPOCH=3.7", "GREETING=hello there", "SHARED=own",
	} {
		if !slices.Contains(env, want) {
			s.t.Errorf("%s is not in its environment: %q", want, env)
		}
	}
}

func exits(s *suite) {
	s.apply(s.item("exit", "7"))
	in := s.ended()
	if in.ExitCode != 7 || in.OutOfMemory || in.Finished.Before(in.Started) || in.Started.IsZero() {
		s.t.Errorf("it ended as %+v", in)
	}
}

func again(s *suite) {
	s.apply(s.item("exit-after", "50", "3"))
	first := s.ended()
	second := s.apply(s.item("exit-after", "50", "3"))
	if second.Phase != agent.Running && second.Phase != agent.Exited || !second.Started.After(first.Started) {
		s.t.Fatalf("started again as %+v after %+v", second, first)
	}
	limit := time.Now().Add(Patience)
	for !s.ended().Finished.After(first.Finished) {
		if time.Now().After(limit) {
			s.t.Fatal("the second run never ended")
		}
	}
}

func stops(s *suite) {
	in := s.apply(s.item("wait"))
	s.says("ready")
	for range 2 {
		if err := s.runtime.Stop(s.t.Context(), in, Patience); err != nil {
			s.t.Fatalf("stop: %v", err)
		}
		if in := s.only(); in.Phase != agent.Exited || in.ExitCode != 0 {
			s.t.Fatalf("stopped: %+v", in)
		}
	}
	if in := s.apply(s.item("wait")); in.Phase != agent.Running {
		s.t.Errorf("started again: %+v", in)
	}
}

func stubborn(s *suite) {
	in := s.apply(s.item("stubborn"))
	s.says("ready")
	const grace = 2 * time.Second
	began := time.Now()
	if err := s.runtime.Stop(s.t.Context(), in, grace); err != nil {
		s.t.Fatalf("stop: %v", err)
	}
	if took := time.Since(began); took < grace {
		s.t.Errorf("it was killed after %s, before the grace of %s", took, grace)
	}
	if in := s.only(); in.Phase != agent.Exited || in.ExitCode != 137 {
		s.t.Errorf("stopped: %+v", in)
	}
	s.apply(s.item("stubborn"))
	began = time.Now()
	if err := s.runtime.Stop(s.t.Context(), in, 100*time.Millisecond); err != nil {
		s.t.Fatalf("stop: %v", err)
	}
	if took := time.Since(began); took > Patience/2 {
		s.t.Errorf("with hardly any grace it took %s", took)
	}
	if in := s.only(); in.Phase != agent.Exited {
		s.t.Errorf("stopped: %+v", in)
	}
}

func removes(s *suite) {
	in := s.apply(s.item("stubborn"))
	for range 2 {
		if err := s.runtime.Remove(s.t.Context(), in, 0); err != nil {
			s.t.Fatalf("remove: %v", err)
		}
		if all := s.list(); len(all) != 0 {
			s.t.Fatalf("left: %+v", all)
		}
	}
}

func survives(s *suite) {
	in := s.apply(s.item("wait"))
	s.says("ready")
	next := s.h.New(s.t, Node)
	found, err := next.List(s.t.Context())
	if err != nil || len(found) != 1 || found[0].ID != in.ID || found[0].Phase != agent.Running || !found[0].Started.Equal(in.Started) {
		s.t.Fatalf("another runtime of this node sees %+v, %v; want %+v", found, err, in)
	}
	same, err := next.Apply(s.t.Context(), agent.Work{Item: s.item("wait")})
	if err != nil || same.ID != in.ID || !same.Started.Equal(in.Started) {
		s.t.Fatalf("apply by another runtime: %+v, %v; want %+v", same, err, in)
	}
	if err := next.Stop(s.t.Context(), in, Patience); err != nil {
		s.t.Fatal(err)
	}
	if in := s.ended(); in.ExitCode != 0 {
		s.t.Errorf("ended as %+v", in)
	}
}

func collected(s *suite) {
	s.apply(s.item("exit-after", "300", "42"))
	next := &suite{t: s.t, h: s.h, runtime: s.h.New(s.t, Node), changed: s.changed}
	if in := next.ended(); in.ExitCode != 42 {
		s.t.Errorf("ended as %+v", in)
	}
}

func foreign(s *suite) {
	s.apply(s.item("wait"))
	other := s.h.New(s.t, Other)
	found, err := other.List(s.t.Context())
	if err != nil || len(found) != 0 {
		s.t.Errorf("node %s sees %+v, %v", Other, found, err)
	}
}

func badCommand(s *suite) {
	_, err := s.runtime.Apply(s.t.Context(), agent.Work{Item: Item("suite", s.h.NoProgram())})
	var reason *agent.Error
	if !errors.As(err, &reason) || reason.Code != pb.ReasonCode_BAD_COMMAND || reason.Retryable {
		s.t.Errorf("apply: %v (%+v)", err, reason)
	}
	if all := s.list(); len(all) != 0 {
		s.t.Errorf("left: %+v", all)
	}
}

func limited(item *pb.DesiredItem, cpuMillis, memory int64) *pb.DesiredItem {
	item.Spec.Resources = &pb.Resources{}
	if cpuMillis > 0 {
		item.Spec.Resources.Cpu, item.Assignment.CpuMillis = "set", cpuMillis
	}
	if memory > 0 {
		item.Spec.Resources.Memory, item.Assignment.MemoryBytes = "set", memory
	}
	return item
}

func outOfMemory(s *suite) {
	if s.h.NoLimits != "" {
		s.t.Skip(s.h.NoLimits)
	}
	s.apply(limited(s.item("eat", "256"), 0, 64<<20))
	if in := s.ended(); !in.OutOfMemory || in.ExitCode != 137 {
		s.t.Errorf("ended as %+v", in)
	}
	s.apply(limited(Item("suite-2", s.h.Spec("eat", "8")), 0, 64<<20))
	for _, in := range s.list() {
		if in.Key.Workload == "suite-2" && in.Phase != agent.Running {
			s.t.Errorf("within its limit it ended: %+v", in)
		}
	}
}

func throttled(s *suite) {
	if s.h.NoLimits != "" {
		s.t.Skip(s.h.NoLimits)
	}
	s.apply(limited(s.item("burn"), 200, 0))
	s.says("ready")
	source := s.runtime.(agent.StatsSource)
	source.Stats(s.t.Context(), s.list())
	<-time.After(2 * time.Second) // over which is measured
	measured := source.Stats(s.t.Context(), s.list())
	if len(measured) != 1 || measured[0].GetCpuPercent() > 40 || measured[0].GetCpuPercent() <= 0 {
		s.t.Errorf("limited to 20 percent of a core it had %v", measured)
	}
}

func logs(s *suite) {
	s.apply(s.item("lines", "20"))
	s.ended()
	_, chunks := s.lines(&pb.WorkloadLogsRequest{})
	if len(chunks) != 40 {
		s.t.Fatalf("%d lines, want 40", len(chunks))
	}
	n := map[bool]int{}
	for _, c := range chunks {
		want := fmt.Sprintf("out %d", n[false])
		if c.GetStderr() {
			want = fmt.Sprintf("err %d", n[true])
		}
		n[c.GetStderr()]++
		if string(c.GetLine()) != want || c.GetTime() == nil {
			s.t.Fatalf("line %v, want %q", c, want)
		}
	}
	if texts, _ := s.lines(&pb.WorkloadLogsRequest{Tail: 4}); len(texts) != 4 {
		s.t.Errorf("tail 4 gave %q", texts)
	}
	last := chunks[len(chunks)-1].GetTime().AsTime()
	if texts, _ := s.lines(&pb.WorkloadLogsRequest{Since: timestamppb.New(last.Add(time.Second))}); len(texts) != 0 {
		s.t.Errorf("since a second later: %q", texts)
	}
	if texts, _ := s.lines(&pb.WorkloadLogsRequest{Since: timestamppb.New(last.Add(-time.Hour))}); len(texts) != 40 {
		s.t.Errorf("since an hour ago: %d lines", len(texts))
	}
}

func follows(s *suite) {
	s.apply(s.item("drip", "30"))
	texts, _ := s.lines(&pb.WorkloadLogsRequest{Follow: true})
	if len(texts) != 30 || texts[0] != "drip 0" || texts[29] != "drip 29" {
		s.t.Errorf("followed: %q", texts)
	}
}

func stats(s *suite) {
	s.apply(s.item("eat", "16"))
	s.says("ready 16")
	measured := s.runtime.(agent.StatsSource).Stats(s.t.Context(), s.list())
	if len(measured) != 1 || measured[0].GetWorkloadId() != "suite" || measured[0].GetReplica() != 2 || measured[0].GetMemoryBytes() < 16<<20 {
		s.t.Errorf("measured: %v", measured)
	}
}

func many(s *suite) {
	const n = 8
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if _, err := s.runtime.Apply(s.t.Context(), agent.Work{Item: Item(fmt.Sprintf("many-%d", i), s.h.Spec("wait"))}); err != nil {
				s.t.Errorf("apply: %v", err)
			}
		})
	}
	for range 20 {
		s.list() // looking does not get in the way
	}
	wg.Wait()
	all := s.list()
	for _, in := range all {
		if in.Phase != agent.Running {
			s.t.Errorf("%+v", in)
		}
		wg.Go(func() {
			if err := s.runtime.Remove(s.t.Context(), in, 0); err != nil {
				s.t.Errorf("remove: %v", err)
			}
		})
	}
	wg.Wait()
	if left := s.list(); len(all) != n || len(left) != 0 {
		s.t.Errorf("%d were there, and %d are left", len(all), len(left))
	}
}

func cancelled(s *suite) {
	in := s.apply(s.item("stubborn"))
	s.says("ready")
	ctx, cancel := context.WithTimeout(s.t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := s.runtime.Stop(ctx, in, 2*Patience); err == nil {
		s.t.Error("a stop that was cut short reports success")
	}
	if took := time.Since(began); took > Patience/2 {
		s.t.Errorf("it went on for %s", took)
	}
	// A stop under way is overtaken by one with less patience: a fence.
	if err := s.runtime.Stop(s.t.Context(), in, 100*time.Millisecond); err != nil {
		s.t.Error(err)
	}
	if in := s.only(); in.Phase != agent.Exited {
		s.t.Errorf("%+v", in)
	}
}
