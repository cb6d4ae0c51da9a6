package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestHostPath(t *testing.T) {
	dir := t.TempDir()
	allowed, outside := filepath.Join(dir, "allowed"), filepath.Join(dir, "outside")
	for _, d := range []string{filepath.Join(allowed, "data"), outside, allowed + "-not"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range map[string]string{
		filepath.Join(allowed, "out"): outside, filepath.Join(outside, "in"): filepath.Join(allowed, "data"), filepath.Join(dir, "root"): allowed,
	} {
		if err := os.Symlink(to, from); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name, path string
		roots      []string
		want       string
		code       pb.ReasonCode
	}{
		{name: "below a root", path: filepath.Join(allowed, "data"), roots: []string{allowed}, want: filepath.Join(allowed, "data")},
		{name: "the root", path: allowed, roots: []string{allowed}, want: allowed},
		{name: "a root behind a link", path: filepath.Join(allowed, "data"), roots: []string{filepath.Join(dir, "root")}, want: filepath.Join(allowed, "data")},
		{name: "a link that leads in", path: filepath.Join(outside, "in"), roots: []string{allowed}, want: filepath.Join(allowed, "data")},
		{name: "a link that leads out", path: filepath.Join(allowed, "out"), roots: []string{allowed}, code: pb.ReasonCode_INVALID_SPEC},
		{name: "up and out", path: filepath.Join(allowed, "data") + "/../../outside", roots: []string{allowed}, code: pb.ReasonCode_INVALID_SPEC},
		{name: "a name that begins alike", path: allowed + "-not", roots: []string{allowed}, code: pb.ReasonCode_INVALID_SPEC},
		{name: "everything else", path: "/etc", roots: []string{allowed}, code: pb.ReasonCode_INVALID_SPEC},
		{name: "no roots", path: filepath.Join(allowed, "data"), code: pb.ReasonCode_INVALID_SPEC},
		{name: "a root that is not there", path: filepath.Join(allowed, "data"), roots: []string{"/nowhere"}, code: pb.ReasonCode_INVALID_SPEC},
		{name: "relative", path: "data", roots: []string{allowed}, code: pb.ReasonCode_INVALID_SPEC},
		{name: "not there", path: filepath.Join(allowed, "nothing"), roots: []string{allowed}, code: pb.ReasonCode_STORAGE_ATTACH_FAILED},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := Policy{BindRoots: test.roots}.HostPath(test.path)
			if test.code != 0 {
				if err == nil || asError(err).Code != test.code {
					t.Errorf("%q, %v; want %s", got, err, test.code)
				}
			} else if err != nil || got != test.want {
				t.Errorf("%q, %v; want %q", got, err, test.want)
			}
		})
	}
}

func TestLabelsComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		word := rapid.StringMatching(`[a-z0-9-]{1,20}`)
		l := Labels{
			Cluster: word.Draw(t, "cluster"), Node: word.Draw(t, "node"), UID: word.Draw(t, "uid"), Revision: word.Draw(t, "revision"),
			Key:        Key{word.Draw(t, "workload"), rapid.Int32Min(0).Draw(t, "replica")},
			Generation: rapid.Int64().Draw(t, "generation"), RestartGeneration: rapid.Int64().Draw(t, "restart"),
			Exclusive: rapid.Bool().Draw(t, "exclusive"), Grace: time.Duration(rapid.Int64Min(0).Draw(t, "grace")),
		}
		for range rapid.IntRange(0, 3).Draw(t, "ports") {
			l.Ports = append(l.Ports, &pb.Port{
				HostPort: rapid.Int32Range(0, 65535).Draw(t, "host"), ContainerPort: rapid.Int32Range(0, 65535).Draw(t, "container"),
				Protocol: rapid.SampledFrom([]string{"tcp", "udp"}).Draw(t, "protocol"), HostIp: rapid.SampledFrom([]string{"", "127.0.0.1", "::1"}).Draw(t, "ip"),
			})
		}
		back, err := ParseLabels(l.Map())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.EqualFunc(l.Ports, back.Ports, func(a, b *pb.Port) bool { return proto.Equal(a, b) }) {
			t.Fatalf("ports %v came back as %v", l.Ports, back.Ports)
		}
		back.Ports = l.Ports
		if !reflect.DeepEqual(l, back) {
			t.Fatalf("%+v came back as %+v", l, back)
		}
	})
}

func FuzzParseLabels(f *testing.F) {
	f.Add("0", "7", "true", "10s", "[::1]8080:80/tcp,1:2/udp")
	f.Add("-1", "", "yes", "", "1:2")
	f.Fuzz(func(t *testing.T, replica, generation, exclusive, grace, ports string) {
		m := map[string]string{
			LabelCluster: "c", LabelNode: "n", LabelWorkload: "w", LabelReplica: replica, LabelGeneration: generation, LabelExclusive: exclusive,
			LabelGrace: grace, LabelPorts: ports,
		}
		l, err := ParseLabels(m)
		if err != nil {
			return
		}
		again, err := ParseLabels(l.Map())
		if err != nil || fmt.Sprint(again.Map()) != fmt.Sprint(l.Map()) {
			t.Fatalf("%v came back as %v, %v", l.Map(), again.Map(), err)
		}
	})
}

func TestEnvironment(t *testing.T) {
	w := Work{Item: &pb.DesiredItem{
		Assignment: &pb.Assignment{
			WorkloadId: "web", Replica: 3, Generation: 12, Epoch: 5,
			Ports:   []*pb.Port{{HostPort: 31000, ContainerPort: 80}, {HostPort: 31001, ContainerPort: 443}},
			Devices: []*pb.AssignedDevice{{Name: "nvidia/a100", Ids: []string{"GPU-1", "GPU-3"}}},
			Storage: []*pb.AssignedStorage{{Pool: "fast-1", Bytes: 5, Path: "/srv/fast"}},
		},
		Spec: &pb.WorkloadSpec{
			Env:  map[string]string{"A": "workload", "B": "workload", "PERSYS_NODE": "forged"},
			Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Env: map[string]string{"B": "container"}}},
		},
	}}
	want := []string{
		"A=workload", "B=container", "PERSYS_DEVICES_NVIDIA_A100=GPU-1,GPU-3", "PERSYS_EPOCH=5.12", "PERSYS_HOST_PORT_0=31000", "PERSYS_HOST_PORT_1=31001", "PERSYS_NODE=n1",
		"PERSYS_PORT_0=80", "PERSYS_PORT_1=443", "PERSYS_REPLICA=3", "PERSYS_STORAGE_FAST_1=/srv/fast", "PERSYS_WORKLOAD=web", "PORT=80",
	}
	if got := Environment(w, "n1", (*pb.Port).GetContainerPort); !slices.Equal(got, want) {
		t.Errorf("inside a container: %q, want %q", got, want)
	}
	w.Item.Spec.Env["PORT"] = "9"
	if got := Environment(w, "n1", (*pb.Port).GetHostPort); !slices.Contains(got, "PORT=9") || !slices.Contains(got, "PERSYS_PORT_1=31001") {
		t.Errorf("as a process: %q", got)
	}
}

func TestLimitsAreWhatWasAskedFor(t *testing.T) {
	w := Work{Item: &pb.DesiredItem{Assignment: &pb.Assignment{CpuMillis: 100, MemoryBytes: 1 << 20}, Spec: &pb.WorkloadSpec{}}}
	if w.CPULimit() != 0 || w.MemoryLimit() != 0 {
		t.Error("what is only reserved became a limit")
	}
	w.Item.Spec.Resources = &pb.Resources{Cpu: "100m", Memory: "1Mi"}
	if w.CPULimit() != 100 || w.MemoryLimit() != 1<<20 {
		t.Errorf("limits are %d and %d", w.CPULimit(), w.MemoryLimit())
	}
}

func TestDesiredSetOnDisk(t *testing.T) {
	dir := t.TempDir()
	d := desired{revision: 9, items: map[Key]*pb.DesiredItem{{"web", 0}: container("web", 7), {"db", 0}: container("db", 8)}}
	if err := saveDesired(dir, "c", "n1", d, time.Now()); err != nil {
		t.Fatal(err)
	}
	back, damaged, err := loadDesired(dir, "c", "n1")
	if err != nil || damaged != nil || back.revision != 9 || len(back.items) != 2 || !proto.Equal(back.items[web], d.items[web]) {
		t.Fatalf("%+v, %v, %v", back, damaged, err)
	}
	// What a crash leaves beside it does not matter.
	if err := os.WriteFile(filepath.Join(dir, stateFile+".new"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if back, _, err = loadDesired(dir, "c", "n1"); err != nil || back.revision != 9 {
		t.Fatalf("%+v, %v", back, err)
	}
	// A file that can't be replaced is an error, and the old one stays.
	if err := os.Remove(filepath.Join(dir, stateFile+".new")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, stateFile+".new"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := saveDesired(dir, "c", "n1", desired{revision: 10}, time.Now()); err == nil {
		t.Error("it was not saved, and nobody was told")
	}
	if back, _, err = loadDesired(dir, "c", "n1"); err != nil || back.revision != 9 {
		t.Fatalf("%+v, %v", back, err)
	}
}

func FuzzLoadDesired(f *testing.F) {
	state, err := proto.Marshal(&pb.AgentState{ClusterId: "c", NodeId: "n1", Revision: 3, Items: []*pb.DesiredItem{container("web", 7)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(state)
	f.Add(state[:len(state)/2])
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, stateFile), data, 0o600); err != nil {
			t.Fatal(err)
		}
		d, damaged, err := loadDesired(dir, "c", "n1")
		if damaged != nil && (err != nil || d.revision != 0 || len(d.items) != 0) {
			t.Fatalf("damaged, and yet %+v, %v", d, err)
		}
	})
}

// Whatever servers send, and in whatever order: revisions never go back, nor do
// generations of one and the same workload.
func TestMergeNeverGoesBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		held := desired{items: map[Key]*pb.DesiredItem{}}
		for range rapid.IntRange(1, 20).Draw(t, "sets") {
			set := &pb.DesiredSet{Complete: rapid.Bool().Draw(t, "complete"), Revision: rapid.Int64Range(0, 30).Draw(t, "revision")}
			for range rapid.IntRange(0, 4).Draw(t, "items") {
				id := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "id")
				set.Items = append(set.Items, container(id, rapid.Int64Range(1, 30).Draw(t, "generation"), func(i *pb.DesiredItem) {
					i.Assignment.WorkloadUid = rapid.SampledFrom([]string{"u1", "u1", "u1", "u2"}).Draw(t, "uid")
				}))
			}
			if rapid.Bool().Draw(t, "removes") {
				set.Removed = append(set.Removed, &pb.ReplicaKey{WorkloadId: "a"})
			}
			m, err := merge(held, set)
			if err != nil {
				if set.GetRevision() >= held.revision {
					t.Fatalf("refused: %v", err)
				}
				continue
			}
			for key, old := range held.items {
				was := old.GetAssignment()
				next, ok := m.next.items[key]
				is := next.GetAssignment()
				_, told := m.dropped[key]
				if ok == told {
					t.Fatalf("%s: in the set %t, dropped %t", key, ok, told)
				}
				if ok && is.GetWorkloadUid() == was.GetWorkloadUid() && is.GetGeneration() < was.GetGeneration() {
					t.Fatalf("%s went from %d to %d", key, was.GetGeneration(), is.GetGeneration())
				}
			}
			held = m.next
		}
	})
}

func TestOrderSpreadsAgents(t *testing.T) {
	first := map[string]int{}
	for n := range 300 {
		all := order(fmt.Sprintf("node-%d", n), []string{"a:1", "b:1"}, []string{"c:1", "a:1"})
		if len(all) != 3 {
			t.Fatalf("order: %v", all)
		}
		first[all[0]]++
	}
	for address, n := range first {
		if n < 60 {
			t.Errorf("%s is the first choice of %d of 300: %v", address, n, first)
		}
	}
	if a, b := order("n", []string{"a:1", "b:1", "c:1"}), order("n", []string{"c:1", "a:1", "b:1"}); !slices.Equal(a, b) {
		t.Errorf("%v, and then %v", a, b)
	}
}

func TestRetryDelay(t *testing.T) {
	for failures := range 100 {
		low, high := retryDelay(failures, 0), retryDelay(failures, 0.999)
		if low < retryFirst/2 || high > retryMost || low > high {
			t.Errorf("after %d failures between %s and %s", failures, low, high)
		}
	}
	if retryDelay(50, 0) != retryMost/2 {
		t.Error("it does not grow to the most")
	}
}

func TestLeaseOutlivesTheAgent(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	l := newNodeLease()
	if !l.end().IsZero() {
		t.Error("a lease that nobody gave")
	}
	l.renew(now.Add(-time.Second), 8*time.Second)
	if got := l.end(); !got.Equal(now.Add(5 * time.Second)) {
		t.Errorf("it ends in %s, want 5s", got.Sub(now))
	}
	l.renew(now.Add(-2*time.Second), 8*time.Second) // acknowledged out of order
	if got := l.end(); !got.Equal(now.Add(5 * time.Second)) {
		t.Errorf("it ends in %s, want 5s", got.Sub(now))
	}
	if err := l.save(dir, now); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, leaseFile)); err == nil {
		t.Error("written though nothing exclusive is there")
	}
	l.keep.Store(true)
	if err := l.save(dir, now); err != nil {
		t.Fatal(err)
	}
	next := newNodeLease()
	if err := next.load(dir, time.Now()); err != nil {
		t.Fatal(err)
	}
	if off := next.end().Sub(l.end()).Abs(); off > 100*time.Millisecond {
		t.Errorf("taken over with an error of %s", off)
	}
	for name, content := range map[string]string{"another boot": "0000 5000 8000000000\n", "damaged": "x"} {
		if err := os.WriteFile(filepath.Join(dir, leaseFile), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		other := newNodeLease()
		if err := other.load(dir, now); err != nil || !other.end().IsZero() {
			t.Errorf("%s: %s, %v", name, other.end(), err)
		}
	}
}

func TestCapacity(t *testing.T) {
	dir := t.TempDir()
	all, err := detectCapacity(dir, nil, nil)
	if err != nil || all.GetCpuMillis() < 1000 || all.GetMemoryBytes() < 64<<20 || all.GetDiskBytes() <= 0 {
		t.Fatalf("%v, %v", all, err)
	}
	less, err := detectCapacity(dir, &pb.NodeCapacity{CpuMillis: 250, MemoryBytes: 1 << 20}, &pb.NodeCapacity{DiskBytes: 5})
	if err != nil || less.GetCpuMillis() != all.GetCpuMillis()-250 || less.GetMemoryBytes() != all.GetMemoryBytes()-1<<20 || less.GetDiskBytes() != 5 {
		t.Errorf("%v, %v", less, err)
	}
	if _, err := detectCapacity(dir, &pb.NodeCapacity{CpuMillis: 1e9}, nil); err == nil || !strings.Contains(err.Error(), "nothing is left of cpu") {
		t.Errorf("a reserve larger than the machine: %v", err)
	}
	memory, err := parseMeminfo([]byte("MemTotal:  100 kB\nMemFree: 10 kB\nMemAvailable:   40 kB\n"))
	if err != nil || memory != (amount{total: 100 << 10, used: 60 << 10}) {
		t.Errorf("%+v, %v", memory, err)
	}
	busy, ticks, err := parseStat([]byte("cpu  10 1 5 80 4 0 0 0 7 0\ncpu0 …\n"))
	if err != nil || busy != 16 || ticks != 100 {
		t.Errorf("%d of %d, %v", busy, ticks, err)
	}
	for _, bad := range []string{"", "intr 5", "cpu a b c d e f"} {
		if _, _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q is taken for processor times", bad)
		}
	}
}

func TestOutbox(t *testing.T) {
	o := newOutbox()
	running := func(n int64) *pb.Replica {
		return &pb.Replica{WorkloadId: "web", Generation: n, State: pb.State_RUNNING}
	}
	if o.next() != nil || !o.put(web, running(1)) || o.put(web, running(1)) {
		t.Fatal("what is no news is reported")
	}
	first := o.next()
	if len(first.GetReplicas()) != 1 || first.GetFull() {
		t.Fatalf("%v", first)
	}
	o.put(web, running(2))
	o.put(Key{"db", 0}, &pb.Replica{WorkloadId: "db", Generation: 5})
	o.gone(Key{"db", 0}, 5)
	if o.next() != nil || o.again() != first {
		t.Error("two reports under way")
	}
	o.acknowledged(first.GetSeq() + 1)
	if o.again() == nil {
		t.Error("acknowledged by another number")
	}
	o.acknowledged(first.GetSeq())
	second := o.next()
	if len(second.GetReplicas()) != 1 || second.GetReplicas()[0].GetGeneration() != 2 || len(second.GetRemoved()) != 1 || second.GetRemoved()[0].GetGeneration() != 5 {
		t.Errorf("%v", second)
	}
	// It comes and goes again before the report is acknowledged.
	o.gone(Key{"db", 0}, 6)
	o.acknowledged(second.GetSeq())
	if third := o.next(); len(third.GetRemoved()) != 1 || third.GetRemoved()[0].GetGeneration() != 6 {
		t.Errorf("%v", third)
	}
	// Not every runtime has answered: then nothing claims to be full, until it is.
	o.stand(8, false, true)
	if part := o.full(); part.GetFull() || len(part.GetReplicas()) != 1 || len(part.GetRemoved()) != 1 {
		t.Errorf("%v", part)
	}
	o.acknowledged(o.again().GetSeq())
	if o.next() != nil {
		t.Error("a full report was made before all is known")
	}
	o.stand(9, true, false)
	if full := o.next(); !full.GetFull() || full.GetDesiredRevision() != 9 || len(full.GetReplicas()) != 1 {
		t.Errorf("%v", full)
	}
	o.acknowledged(o.again().GetSeq())
	if o.next() != nil {
		t.Error("a full report was made twice")
	}
}

func TestNewRefuses(t *testing.T) {
	f := newFixture(t)
	for name, change := range map[string]func(*Config){
		"NodeID is empty":            func(c *Config) { c.NodeID = "" },
		"ClusterID is empty":         func(c *Config) { c.ClusterID = "" },
		"Servers and Dial":           func(c *Config) { c.Dial = nil },
		"two runtimes for CONTAINER": func(c *Config) { c.Runtimes = append(c.Runtimes, newFakeRuntime()) },
		"data directory":             func(c *Config) { c.DataDir = "/proc/nothing/here" },
	} {
		cfg := f.config()
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Only device files of the node's own configuration get into work.
func TestDevicePaths(t *testing.T) {
	p := Policy{Devices: []*pb.Device{{Name: "gpu", Ids: []string{"0"}, Paths: []string{"/dev/nvidia0"}}}}
	if err := p.DevicePath("gpu", "/dev/nvidia0"); err != nil {
		t.Error(err)
	}
	for name, path := range map[string]string{"gpu": "/dev/mem", "fpga": "/dev/nvidia0"} {
		if err := p.DevicePath(name, path); err == nil {
			t.Errorf("%s of %s was let in", path, name)
		}
	}
}
