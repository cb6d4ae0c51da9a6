package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/persys-dev/persys/agent"
	"github.com/persys-dev/persys/agent/runtimetest"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// fixture is a runtime of its own; what runs in it is removed at the end.
type fixture struct {
	t       *testing.T
	program string
	runtime *Runtime
	changed chan struct{}
}

func newFixture(t *testing.T, change func(*Config)) *fixture {
	cfg := Config{ClusterID: runtimetest.Cluster, NodeID: runtimetest.Node, Dir: t.TempDir()}
	if change != nil {
		change(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, program: runtimetest.Program(t), runtime: r, changed: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	watched := make(chan error, 1)
	go func() {
		watched <- r.Watch(ctx, func() {
			select {
			case f.changed <- struct{}{}:
			default:
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-watched; err != nil {
			t.Error(err)
		}
		for _, in := range f.list() {
			if err := r.Remove(context.Background(), in, 0); err != nil {
				t.Error(err)
			}
		}
	})
	return f
}

func (f *fixture) list() []agent.Instance {
	f.t.Helper()
	all, err := f.runtime.List(context.Background())
	if err != nil {
		f.t.Fatal(err)
	}
	return all
}

func (f *fixture) item(args ...string) *pb.DesiredItem {
	return runtimetest.Item("proc", &pb.WorkloadSpec{Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: f.program, Args: args}}})
}

func (f *fixture) apply(item *pb.DesiredItem) agent.Instance {
	f.t.Helper()
	in, err := f.runtime.Apply(f.t.Context(), agent.Work{Item: item})
	if err != nil {
		f.t.Fatal(err)
	}
	return in
}

func (f *fixture) ended() agent.Instance {
	f.t.Helper()
	limit := time.After(runtimetest.Patience)
	for {
		all := f.list()
		if len(all) == 1 && all[0].Phase == agent.Exited {
			return all[0]
		}
		select {
		case <-f.changed:
		case <-limit:
			f.t.Fatalf("no end was announced: %+v", all)
		}
	}
}

func (f *fixture) output(in agent.Instance, follow bool, stop func(string) bool) []string {
	f.t.Helper()
	var lines []string
	enough := errors.New("enough")
	ctx, cancel := context.WithTimeout(f.t.Context(), runtimetest.Patience)
	defer cancel()
	err := f.runtime.Logs(ctx, in, &pb.WorkloadLogsRequest{Follow: follow}, func(c *pb.LogChunk) error {
		lines = append(lines, string(c.GetLine()))
		if stop != nil && stop(string(c.GetLine())) {
			return enough
		}
		return nil
	})
	if err != nil && !errors.Is(err, enough) {
		f.t.Fatal(err)
	}
	return lines
}

// child waits for the program to name the child that it has left behind.
func (f *fixture) child(in agent.Instance) identity {
	f.t.Helper()
	var pid int
	f.output(in, true, func(line string) bool {
		n, err := fmt.Sscanf(line, "child %d", &pid)
		return err == nil && n == 1
	})
	id, err := identify(pid)
	if err != nil {
		return identity{PID: pid}
	}
	return id
}

func (f *fixture) gone(id identity) {
	f.t.Helper()
	if s, err := statusOf(id.PID); err == nil && s.start == id.Start && s.state != 'Z' {
		f.t.Errorf("process %d is still there", id.PID)
	}
}

// Each way of finding what a program leaves behind, alone.
func eachWay(t *testing.T, test func(*fixture)) {
	t.Run("with cgroups", func(t *testing.T) {
		f := newFixture(t, nil)
		if f.runtime.cgroups.cannot != "" {
			t.Skip(f.runtime.cgroups.cannot)
		}
		test(f)
	})
	t.Run("without cgroups", func(t *testing.T) {
		f := newFixture(t, func(c *Config) { c.CgroupRoot = "none" })
		if info := f.runtime.Info(t.Context()); !strings.Contains(info.GetMessage(), "limits can't be enforced") || !info.GetHealthy() {
			t.Errorf("info: %v", info)
		}
		test(f)
	})
}

func TestNothingIsLeftBehind(t *testing.T) {
	eachWay(t, func(f *fixture) {
		in := f.apply(f.item("leave"))
		child := f.child(in)
		if err := f.runtime.Stop(f.t.Context(), in, runtimetest.Patience); err != nil {
			f.t.Fatal(err)
		}
		f.gone(child)
		if ended := f.ended(); ended.ExitCode != 0 {
			f.t.Errorf("%+v", ended)
		}
		// The program ends by itself, and its child would not.
		if err := f.runtime.Remove(f.t.Context(), in, 0); err != nil {
			f.t.Fatal(err)
		}
		in = f.apply(f.item("leave", "and go"))
		child = f.child(in)
		f.ended()
		f.gone(child)
	})
}

func (f *fixture) state(in agent.Instance) state {
	f.t.Helper()
	var st state
	if ok, err := readJSON(filepath.Join(f.runtime.dir(in.ID), stateFile), &st); err != nil || !ok {
		f.t.Fatal(ok, err)
	}
	return st
}

func TestSupervisorIsKilled(t *testing.T) {
	eachWay(t, func(f *fixture) {
		in := f.apply(f.item("stubborn"))
		st := f.state(in)
		if err := st.Shim.signal(unix.SIGKILL); err != nil {
			f.t.Fatal(err)
		}
		ended := f.ended()
		if ended.ExitCode != lost || !strings.Contains(ended.StartError, "supervisor") {
			f.t.Errorf("%+v", ended)
		}
		if err := st.Program.wait(f.t.Context()); err != nil {
			f.t.Error(err)
		}
		if again := f.list()[0]; !again.Finished.Equal(ended.Finished) {
			f.t.Errorf("the end moves from %s to %s", ended.Finished, again.Finished)
		}
		if in := f.apply(f.item("stubborn")); in.Phase != agent.Running {
			f.t.Errorf("%+v", in)
		}
	})
}

// The number of a supervisor that is long gone may be anybody's by now.
func TestOtherProcessWithTheSameNumber(t *testing.T) {
	f := newFixture(t, nil)
	in := f.apply(f.item("exit", "5"))
	f.ended()
	st := f.state(in)
	st.Finished = time.Time{}
	self, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	st.Shim, st.Program = identity{PID: self.PID, Start: self.Start + 1}, identity{PID: self.PID, Start: self.Start + 1}
	if err := writeJSON(filepath.Join(f.runtime.dir(in.ID), stateFile), st); err != nil {
		t.Fatal(err)
	}
	if in := f.list()[0]; in.Phase != agent.Exited || in.ExitCode != lost {
		t.Errorf("%+v", in)
	}
	if _, ok, err := st.Shim.open(); ok || err != nil {
		t.Errorf("taken for another: %t, %v", ok, err)
	}
	fd, ok, err := self.open()
	if !ok || err != nil {
		t.Fatalf("this very process is not found: %t, %v", ok, err)
	}
	unix.Close(fd)
}

func TestMachineWasStartedAgain(t *testing.T) {
	f := newFixture(t, nil)
	in := f.apply(f.item("exit", "5"))
	f.ended()
	st := f.state(in)
	st.Finished, st.Boot = time.Time{}, "another"
	path := filepath.Join(f.runtime.dir(in.ID), stateFile)
	if err := writeJSON(path, st); err != nil {
		t.Fatal(err)
	}
	if in := f.list()[0]; in.Phase != agent.Exited || in.StartError != "the machine was started again" {
		t.Errorf("%+v", in)
	}
	// A power cut may leave an empty file.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if in := f.list()[0]; in.Phase != agent.Exited {
		t.Errorf("%+v", in)
	}
	if err := os.WriteFile(filepath.Join(f.runtime.dir(in.ID), recordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if all := f.list(); len(all) != 0 {
		t.Errorf("%+v", all)
	}
	if in := f.apply(f.item("wait")); in.Phase != agent.Running {
		t.Errorf("%+v", in)
	}
}

func TestWhoAndWhere(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start programs as somebody else")
	}
	f := newFixture(t, nil)
	// For whom the program is: a place that everybody can reach.
	public, err := os.MkdirTemp("/tmp", "persys-agent-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(public) })
	data, err := os.ReadFile(f.program)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(public, "program")
	if err := errors.Join(os.Chmod(public, 0o755), os.WriteFile(program, data, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		user, dir, want string
		code            pb.ReasonCode
	}{
		{want: "0 0 /"},
		{user: "nobody", dir: "/tmp", want: "65534 65534 /tmp"},
		{user: "4711", want: "4711 4711 /"},
		{user: "no-such-user", code: pb.ReasonCode_INVALID_SPEC},
		{user: "-1", code: pb.ReasonCode_INVALID_SPEC},
		{dir: "/no/such/directory", code: pb.ReasonCode_BAD_COMMAND},
	} {
		t.Run(test.user+" in "+test.dir, func(t *testing.T) {
			item := f.item("where")
			p := item.Spec.GetProcess()
			p.Command, p.User, p.WorkingDir = program, test.user, test.dir
			in, err := f.runtime.Apply(t.Context(), agent.Work{Item: item})
			if test.code != 0 {
				var e *agent.Error
				if !errors.As(err, &e) || e.Code != test.code {
					t.Errorf("%v, want %s", err, test.code)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			f.ended()
			if got := f.output(in, false, nil); !slices.Equal(got, []string{test.want}) {
				t.Errorf("%q, want %q", got, test.want)
			}
			if err := f.runtime.Remove(t.Context(), in, 0); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCommands(t *testing.T) {
	f := newFixture(t, nil)
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"", "no-such-program", "/no/such/program", "/tmp", text} {
		item := f.item()
		item.Spec.GetProcess().Command = command
		_, err := f.runtime.Apply(t.Context(), agent.Work{Item: item})
		var e *agent.Error
		if !errors.As(err, &e) || e.Code != pb.ReasonCode_BAD_COMMAND && command != "" {
			t.Errorf("%q: %v", command, err)
		}
	}
	// By name, and in the PATH that the spec gives.
	item := f.item("exit", "6")
	item.Spec.GetProcess().Command = filepath.Base(f.program)
	item.Spec.Env = map[string]string{"PATH": filepath.Dir(f.program)}
	f.apply(item)
	if in := f.ended(); in.ExitCode != 6 {
		t.Errorf("%+v", in)
	}
}

func TestTheAgentsOwnSecretsAreNotHandedOn(t *testing.T) {
	t.Setenv("PERSYS_SECRET", "canary")
	t.Setenv("AWS_KEY", "canary")
	f := newFixture(t, nil)
	in := f.apply(f.item("env"))
	f.ended()
	if env := strings.Join(f.output(in, false, nil), "\n"); strings.Contains(env, "canary") || !strings.Contains(env, "PATH="+defaultPath) {
		t.Errorf("environment: %s", env)
	}
	err := filepath.WalkDir(f.runtime.cfg.Dir, func(path string, e os.DirEntry, err error) error {
		if info, statErr := e.Info(); statErr != nil || info.Mode().Perm()&0o077 != 0 && path != f.runtime.cfg.Dir {
			t.Errorf("%s can be read by others: %v, %v", path, info.Mode(), statErr)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestLogsAreRotated(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.LogBytes, c.LogFiles = 4<<10, 3 })
	in := f.apply(f.item("lines", "500"))
	f.ended()
	files, err := filepath.Glob(filepath.Join(f.runtime.dir(in.ID), outputFile+"*"))
	if err != nil || len(files) != 3 {
		t.Fatalf("%q, %v", files, err)
	}
	for _, file := range files {
		if info, err := os.Stat(file); err != nil || info.Size() > 8<<10 {
			t.Errorf("%s: %v, %v", file, info.Size(), err)
		}
	}
	lines := f.output(in, false, nil)
	if len(lines) < 100 || lines[len(lines)-1] != "out 499" && lines[len(lines)-1] != "err 499" {
		t.Errorf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
	next := map[string]int{}
	for _, line := range lines {
		stream, number, _ := strings.Cut(line, " ")
		n, err := strconv.Atoi(number)
		if want, ok := next[stream]; err != nil || ok && n != want {
			t.Fatalf("line %q, want number %d", line, want)
		}
		next[stream] = n + 1
	}
}

func TestLogsAreFollowedThroughRotation(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.LogBytes, c.LogFiles = 1<<10, 2 })
	in := f.apply(f.item("drip", "100"))
	lines := f.output(in, true, nil)
	if len(lines) != 100 || lines[99] != "drip 99" {
		t.Errorf("%d lines: %q", len(lines), lines)
	}
}

func TestLongLines(t *testing.T) {
	dir := t.TempDir()
	l, err := openLog(filepath.Join(dir, "log"), 1<<30, 1)
	if err != nil {
		t.Fatal(err)
	}
	text := bytes.Repeat([]byte("x"), 3*maxText+5)
	l.copyFrom(bytes.NewReader(append(append(bytes.Clone(text), '\n'), []byte("end")...)), 'o')
	if err := l.close(); err != nil {
		t.Fatal(err)
	}
	var back []byte
	var lines int
	r := &logReader{path: filepath.Join(dir, "log")}
	defer r.close()
	if err := r.read(func(c *pb.LogChunk) error {
		lines++
		back = append(back, c.GetLine()...)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if lines != 5 || string(back) != string(text)+"end" {
		t.Errorf("%d lines, %d bytes", lines, len(back))
	}
}

func FuzzParseLine(f *testing.F) {
	f.Add([]byte("2026-11-23T20:03:38.807734318Z o text with spaces\n"))
	f.Add([]byte("2026 o"))
	f.Fuzz(func(t *testing.T, line []byte) {
		if c, ok := parseLine(line); ok && c.GetTime() == nil {
			t.Error("a line without a time")
		}
	})
}

func TestParseStatus(t *testing.T) {
	line := "42 (a) b) c) S 1 42 43 0 -1 4194560 1 2 3 4 17 5 6 7 20 0 1 0 98765 1000 250 1844 0"
	s, err := parseStatus([]byte(line))
	if want := (status{state: 'S', parent: 1, session: 43, start: 98765, cpu: 22, pages: 250}); err != nil || s != want {
		t.Errorf("%+v, %v; want %+v", s, err, want)
	}
	for _, bad := range []string{"", "42 (x)", "42 (x) S 1", strings.Replace(line, "98765", "x", 1)} {
		if _, err := parseStatus([]byte(bad)); err == nil {
			t.Errorf("%q is taken for a status", bad)
		}
	}
}

// Where the kernel has version 2, its files are what limits are written to; the
// writes are the same on a directory that looks like it.
func TestLimitsOfBothVersions(t *testing.T) {
	for name, test := range map[string]struct {
		group cgroup
		want  []string
	}{
		"version 2": {cgroup{V2: "/g"}, []string{"/g/cpu.max=150000 100000", "/g/memory.max=1048576", "/g/memory.swap.max=0"}},
		"version 1": {cgroup{V1: map[string]string{"cpu": "/c", "memory": "/m"}}, []string{
			"/c/cpu.cfs_period_us=100000", "/c/cpu.cfs_quota_us=150000", "/m/memory.limit_in_bytes=1048576", "/m/memory.memsw.limit_in_bytes=1048576",
		}},
		"none": {cgroup{}, nil},
	} {
		var got []string
		for _, w := range test.group.limits(1500, 1<<20) {
			got = append(got, w.file+"="+w.value)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
		if writes := test.group.limits(0, 0); len(writes) != 0 {
			t.Errorf("%s: no limits, and yet %v", name, writes)
		}
	}
	if w := (cgroup{V2: "/g"}).limits(1, 0); w[0].value != "1000 100000" {
		t.Errorf("the least: %v", w)
	}
}

func TestCgroupsThatCannotBeUsed(t *testing.T) {
	for name, root := range map[string]string{"not there": "/no/such/directory", "not a cgroup file system": t.TempDir()} {
		f := newFixture(t, func(c *Config) { c.CgroupRoot = root })
		if f.runtime.cgroups.cannot == "" {
			t.Errorf("%s: limits are said to be enforced", name)
		}
		item := f.item("wait")
		item.Spec.Resources, item.Assignment.MemoryBytes = &pb.Resources{Memory: "1Gi"}, 1<<30
		in := f.apply(item)
		f.output(in, true, func(line string) bool { return line == "ready" })
		if measured := f.runtime.Stats(t.Context(), []agent.Instance{in}); len(measured) != 1 || measured[0].GetMemoryBytes() <= 0 {
			t.Errorf("%s: measured %v", name, measured)
		}
	}
}

func TestSupervisorAlone(t *testing.T) {
	quiet, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	stderr := os.Stderr
	os.Stderr = quiet
	defer func() { os.Stderr = stderr }()
	for _, args := range [][]string{nil, {"run"}, {"walk", "x"}} {
		if code := ShimMain(args); code != 2 {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
}
