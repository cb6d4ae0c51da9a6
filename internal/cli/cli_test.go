package cli

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// recent makes timestamps whose age does not change while a test runs.
func recent(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(-d)) }

func TestCommands(t *testing.T) {
	x := newTrust(t)
	f := &fakeCluster{workloads: map[string]*pb.Workload{}, tolerance: 1}
	for _, w := range sampleWorkloads() {
		w.CreateTime = recent(3*time.Hour + time.Minute)
		f.workloads[w.Spec.Id] = w
	}
	f.nodes = sampleNodes()[:2]
	for _, n := range f.nodes {
		n.CreateTime, n.LastHeartbeat = recent(5*time.Hour+time.Minute), nil
	}
	f.members = []*pb.Member{{Name: "s1", GrpcAddress: "127.0.0.11:7481", Leader: true, Voter: true, Reachable: true, JoinTime: recent(3*time.Hour + time.Minute)}}
	f.tokens = []*pb.Token{{Id: "t1", Role: pb.Role_ROLE_AGENT, UsesLeft: 3, ExpireTime: recent(-3*time.Hour - time.Minute)}}
	u := newUser(t).knows(x, x.serve(f))
	u.in = "id: other\nprocess: {command: sleep}\n---\nid: web\nprocess: {command: sleep}\n"
	var b strings.Builder
	for _, line := range []string{
		"get workloads", "list workloads -o name", "workload list -o name", "get workload web new", "get workload web --spec", "workload get batch -o json",
		"get nodes", "node ls -o name", "get node n1 n9", "node get n2 -o yaml", "node label n1 zone=us old-", "node label n1 zone", "node drain n9", "node drain n2 --deadline -1s",
		"node drain n2 --deadline 10m --wait", "scheduler get", "scheduler set rebalance=true rebalance-interval=10m rebalance_moves=2", "scheduler set rebalance-moves=default -o json",
		"scheduler set", "scheduler set speed=9", "scheduler set rebalance=often", "scheduler set rebalance-threshold=-3", "scheduler set rebalance-interval=7", "scheduler set rebalance", "scheduler set rebalance=",
		"member ls", "get members -o name", "member rm s3", "token ls", "token create --role agent", "token create --role server -o name", "token create --role admin",
		"cluster info", "cluster list -o name", "why web", "why web -o name", "why node/n1", "why node/n2", "why node/n9", "scale web 3", "scale web -1", "scale web", "restart web batch",
		"workload restart nothing", "describe disk x", "apply -f -", "apply -f - --create-only", "apply -f - --dry-run", "apply", "apply web.yaml", "apply -f /nowhere",
		"delete new -o name", "get workload nothing", "logs nothing", "member", "member remove x", "frobnicate", "get", "get wrkloads", "get nodes -o xml", "get nodes --output",
		"events -w --limit -1", "logs web --since yesterday", "run --process --print -e A=1 -p 8080 --cpu 500m --node-label zone=eu sleep 60",
		"run --print --name web -p 8080:80/udp -p 127.0.0.1:81:81 -v /srv:/data:ro --replicas 2 --restart on-failure 127.0.0.1:5000/demo-web:1 -v", "run --job --print a/b/Some_Tool@sha256:0",
		"run --process --print --schedule @daily --timezone Europe/Berlin --priority 70 backup", "run --kind global --print x", "run --kind often x", "run --kind service --schedule @daily x", "run --timezone UTC x",
		"run --kind global --replicas 2 x", "run --schedule nightly x", "job run batch nothing", "job run batch -o name", "job",
		"run", "run --process -v /a:/b sleep", "run -p x web", "run -v a:/b web", "run --restart sometimes web", "run --global --job web", "run -e =1 web", "run ::", "run --name web web", "join", "join garbage",
	} {
		r := u.types(strings.Fields(line)...)
		b.WriteString("$ persys " + line + "\n" + r.out)
		if r.errors != "" {
			b.WriteString("! " + strings.ReplaceAll(strings.TrimSuffix(r.errors, "\n"), "\n", "\n! ") + "\n")
		}
		if r.code != 0 {
			b.WriteString("exit code " + string(rune('0'+r.code)) + "\n")
		}
		b.WriteString("\n")
	}
	times := regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`)
	golden(t, "commands.txt", times.ReplaceAllString(b.String(), "TIME"))
	if r := u.types("version"); r.code != exitOK || !strings.HasPrefix(r.out, "persys v0 go") {
		t.Errorf("%+v", r)
	}
}

// TestPlans asks what would be, before and after anything is there.
func TestPlans(t *testing.T) {
	x := newTrust(t)
	web := &pb.WorkloadSpec{Id: "web", Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "nginx:1"}}}
	f := &fakeCluster{workloads: map[string]*pb.Workload{"web": {Spec: web}}}
	u := newUser(t).knows(x, x.serve(f))
	var b strings.Builder
	for _, input := range []string{
		"{id: web, container: {image: 'nginx:1'}}", "{id: web, container: {image: 'nginx:2'}}", "{id: new, container: {image: 'nginx:2'}}",
		"[{id: web, container: {image: 'nginx:1'}}, {id: new, container: {image: 'nginx:2'}}]", "{id: web}",
	} {
		u.in = input
		b.WriteString("# " + input + "\n\n")
		for _, line := range []string{
			"apply -f - --dry-run", "apply -f - --dry-run -o json", "apply -f - --dry-run -o name", "apply -f - --dry-run=client", "apply -f - --dry-run --create-only",
			"diff -f -", "diff -f - -o yaml", "diff -f - -o name",
		} {
			r := u.types(strings.Fields(line)...)
			b.WriteString("$ persys " + line + "\n" + r.out)
			if r.errors != "" {
				b.WriteString("! " + strings.ReplaceAll(strings.TrimSuffix(r.errors, "\n"), "\n", "\n! ") + "\n")
			}
			if r.code != 0 {
				b.WriteString("exit code " + string(rune('0'+r.code)) + "\n")
			}
			b.WriteString("\n")
		}
	}
	golden(t, "plans.txt", b.String())
	if f.called("ApplyWorkload") > 0 || len(f.workloads) != 1 {
		t.Error("a plan was carried out")
	}
	if r := u.types("apply", "-f", "-", "--dry-run=perhaps"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
	if r := u.types("diff", "web.yaml"); r.code != exitUsage || !strings.Contains(r.errors, "persys diff -f web.yaml") {
		t.Errorf("%+v", r)
	}
	u.in = "{id: web, container: {image: 'nginx:1'}}"
	f.fail = status.Error(codes.Internal, "broken")
	if r := u.types("diff", "-f", "-"); r.code <= exitDiffers {
		t.Errorf("%+v", r)
	}
}

func TestExitCodesOfTheServer(t *testing.T) {
	for code, want := range map[codes.Code]int{
		codes.NotFound: exitNotFound, codes.AlreadyExists: exitConflict, codes.Aborted: exitConflict, codes.FailedPrecondition: exitConflict,
		codes.InvalidArgument: exitUsage, codes.PermissionDenied: exitDenied, codes.Unauthenticated: exitDenied, codes.Internal: exitFailure,
	} {
		x := newTrust(t)
		u := newUser(t).knows(x, x.serve(&fakeCluster{fail: status.Error(code, "so it is")}))
		if r := u.types("get", "nodes"); r.code != want || r.errors != "persys: so it is\n" {
			t.Errorf("%s: %+v", code, r)
		}
	}
}

func TestInterrupted(t *testing.T) {
	x := newTrust(t)
	u := newUser(t).knows(x, x.serve(&fakeCluster{}))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if r := u.typesUntil(ctx, "get", "nodes"); r.code != exitInterrupted || r.errors != "" {
		t.Errorf("%+v", r)
	}
}

func TestTimeout(t *testing.T) {
	x := newTrust(t)
	u := newUser(t).knows(x, frozenAddress(t))
	begin := time.Now()
	u.env["PERSYS_TIMEOUT"] = "300ms"
	r := u.types("get", "nodes")
	if r.code != exitUnavailable || time.Since(begin) > 5*time.Second {
		t.Errorf("%+v after %s", r, time.Since(begin))
	}
	u.env["PERSYS_TIMEOUT"] = "soon"
	if r := u.types("get", "nodes"); r.code != exitUsage || !strings.Contains(r.errors, `PERSYS_TIMEOUT: "soon"`) {
		t.Errorf("%+v", r)
	}
}

func TestUserDefaults(t *testing.T) {
	x := newTrust(t)
	u := newUser(t).knows(x, x.serve(&fakeCluster{nodes: sampleNodes()}))
	if err := updateUserConfig(u.config(), func(c *userConfig) error { c.Output, c.Timeout = "name", "9s"; return nil }); err != nil {
		t.Fatal(err)
	}
	if r := u.types("get", "nodes"); r.out != "n1\nn2\nn3\nn4\n" {
		t.Errorf("%+v", r)
	}
	if r := u.types("get", "nodes", "-o", "table"); !strings.HasPrefix(r.out, "ID ") {
		t.Errorf("%+v", r)
	}
	u.env["PERSYS_OUTPUT"] = "yaml"
	if r := u.types("get", "nodes"); !strings.HasPrefix(r.out, "nodes:\n") {
		t.Errorf("%+v", r)
	}
}

func TestApplyFiles(t *testing.T) {
	x := newTrust(t)
	f := &fakeCluster{}
	u := newUser(t).knows(x, x.serve(f))
	dir := t.TempDir()
	for name, text := range map[string]string{
		"a.yaml": "id: a\nprocess: {command: x}\n---\nid: b\nprocess: {command: x}\n", "b.json": `{"id":"c","process":{"command":"x"}}`,
		"sub/d.yml": "id: d\nprocess: {command: x}\n", "readme.txt": "no",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if r := u.types("apply", "-f", dir); r.code != exitOK || r.out != "workload/a created\nworkload/b created\nworkload/c created\n" {
		t.Errorf("%+v", r)
	}
	if r := u.types("apply", "-f", dir, "-R", "-o", "name"); r.code != exitOK || r.out != "a\nb\nc\nd\n" {
		t.Errorf("%+v", r)
	}
	if key := lastRequest[*pb.ApplyWorkloadRequest](t, f).IdempotencyKey; key == "" {
		t.Error("no idempotency key: a repeated request would be carried out twice")
	}
	sent := f.called(pb.Workloads_ApplyWorkload_FullMethodName)
	for text, want := range map[string]string{
		"id: a\nprocess: {command: x}\n---\nid: A_b\nprocess: {command: x}\n": `A_b`,
		"id: a\nprocess: {command: x}\nreplcas: 2\n":                          `did you mean "replicas"?`,
		"id: a\nprocess: {command: x}\n---\nid: a\nprocess: {command: y}\n":   `workload "a" is given twice`,
		"\n": "no workload in",
	} {
		u.in = text
		if r := u.types("apply", "-f", "-"); r.code != exitUsage || !strings.Contains(r.errors, want) {
			t.Errorf("%q: %+v", text, r)
		}
	}
	if got := f.called(pb.Workloads_ApplyWorkload_FullMethodName); got != sent {
		t.Errorf("%d requests were sent from bad input", got-sent)
	}
	u.in = "id: d\nprocess: {command: x}\n"
	if r := u.types("apply", "-f", filepath.Join(dir, "sub"), "-f", "-"); r.code != exitUsage || !strings.Contains(r.errors, `standard input: workload "d" is in `+dir+`/sub/d.yml already`) {
		t.Errorf("%+v", r)
	}
	if r := u.types("apply", "-f", t.TempDir()); r.code != exitUsage || !strings.Contains(r.errors, "no .yaml") {
		t.Errorf("%+v", r)
	}
	if r := u.types("apply", "-f", filepath.Join(dir, "none")); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
	if r := u.types("apply", "-f", dir, "--if-version", "3"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
}

func TestLogs(t *testing.T) {
	x := newTrust(t)
	at := func(s int64) *timestamppb.Timestamp { return &timestamppb.Timestamp{Seconds: s} }
	web := &pb.Workload{Spec: &pb.WorkloadSpec{Id: "web"}, Replicas: []*pb.Replica{{}, {Replica: 1}}}
	lines := []*pb.LogChunk{{Line: []byte("one"), Time: at(1)}, {Replica: 1, Line: []byte("two"), Time: at(2), Stderr: true}, {Line: []byte("three"), Time: at(3)}}
	breaking := &fakeCluster{workloads: map[string]*pb.Workload{"web": web}, logs: lines[:2], breaks: true}
	steady := &fakeCluster{workloads: map[string]*pb.Workload{"web": web}, logs: lines}
	u := newUser(t).knows(x, x.serve(breaking), x.serve(steady))
	r := u.types("logs", "web", "-f")
	if r.code != exitOK || r.out != "web/0 | one\nweb/0 | three\n" || r.errors != "web/1 | two\n" {
		t.Errorf("%+v", r)
	}
	r = u.types("logs", "web", "-t", "--replica", "0", "--tail", "5", "--since", "10m", "--endpoint", u.endpoint(1))
	if r.code != exitOK || r.out != "" {
		t.Errorf("%+v", r)
	}
	if q := breaking.called(pb.Workloads_WorkloadLogs_FullMethodName); q != 1 {
		t.Errorf("called %d times", q)
	}
	if r := u.types("logs", "web", "-o", "json", "--endpoint", u.endpoint(1)); !strings.HasPrefix(r.out, `{"replica":0,"node_id":"","stderr":false,"line":"one","time":"1970-01-01T00:00:01Z"}`) {
		t.Errorf("%+v", r)
	}
}

// endpoint is one of the current context's.
func (u *user) endpoint(i int) string {
	u.t.Helper()
	c, err := loadUserConfig(u.config())
	if err != nil {
		u.t.Fatal(err)
	}
	return c.Contexts["test"].Endpoints[i]
}

func TestEventsAreFollowedWithoutRepetition(t *testing.T) {
	x := newTrust(t)
	breaking := &fakeCluster{events: sampleEvents()[:2], breaks: true}
	steady := &fakeCluster{events: sampleEvents()}
	u := newUser(t).knows(x, x.serve(breaking), x.serve(steady))
	if r := u.types("events", "-w", "-o", "name"); r.code != exitOK || r.out != "1\n2\n3\n" {
		t.Errorf("%+v", r)
	}
}

func TestCompletionAsksTheServer(t *testing.T) {
	x := newTrust(t)
	f := &fakeCluster{workloads: map[string]*pb.Workload{"web": {Spec: &pb.WorkloadSpec{Id: "web"}}}, nodes: sampleNodes(), members: []*pb.Member{{Name: "s1"}}, tokens: []*pb.Token{{Id: "t1"}}}
	u := newUser(t).knows(x, x.serve(f))
	for line, want := range map[string]string{
		"delete ": "web", "node drain n": "n1\nn2\nn3\nn4", "member rm ": "s1", "token revoke ": "t1", "context use ": "test", "get nodes -o ": "table\nwide\njson\nyaml\nname",
	} {
		r := u.types(append([]string{"__complete"}, strings.Split(line, " ")...)...)
		if got, _, _ := strings.Cut(r.out, "\n:"); got != want {
			t.Errorf("%q: %+v", line, r)
		}
	}
	// Where nobody answers, nothing is proposed and nothing is said.
	u = newUser(t)
	if r := u.types("__complete", "delete", ""); r.code != exitOK || !strings.HasPrefix(r.out, ":") {
		t.Errorf("%+v", r)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := u.types("completion", shell); r.code != exitOK || len(r.out) < 1000 {
			t.Errorf("%s: %d, %d bytes", shell, r.code, len(r.out))
		}
	}
}

// What examples/ holds is what users try first.
func TestExamplesAreValid(t *testing.T) {
	r := newUser(t).types("apply", "--dry-run=client", "-f", "../../examples")
	if r.code != exitOK || strings.Count(r.errors, "is valid") < 4 {
		t.Errorf("%+v", r)
	}
}
