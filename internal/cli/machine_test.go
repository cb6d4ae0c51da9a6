package cli

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// freePorts are flags that put a machine on ports of 127.0.0.1 that were free
// a moment ago.
func freePorts(t *testing.T) []string {
	t.Helper()
	flags := []string{"--bind", "127.0.0.1"}
	for _, name := range []string{"--https-port", "--grpc-port", "--gossip-port"} {
		_, port, err := net.SplitHostPort(deadAddress(t))
		if err != nil {
			t.Fatal(err)
		}
		flags = append(flags, name, port)
	}
	return flags
}

// started runs a command line in the background until what it prints has text
// in it, then stops it.
func (u *user) started(text string, args ...string) typed {
	u.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	seen := &watchedOutput{text: text, found: cancel}
	code := Main(ctx, args, Env{
		Stdin: strings.NewReader(u.in), Stdout: seen, Stderr: seen,
		LookupEnv: func(k string) (string, bool) { v, ok := u.env[k]; return v, ok },
		ConfigDir: func() (string, error) { return u.home, nil }, Node: u.node,
	})
	return typed{code: code, out: seen.String()}
}

type watchedOutput struct {
	syncBuffer
	text  string
	found func()
}

func (w *watchedOutput) Write(p []byte) (int, error) {
	n, err := w.syncBuffer.Write(p)
	if strings.Contains(w.String(), w.text) {
		w.found()
	}
	return n, err
}

func TestInit(t *testing.T) {
	x := newTrust(t)
	var made server.Config
	u := newUser(t)
	u.node = nodeOf(x, &fakeCluster{}, &made)
	dir := t.TempDir()
	line := append([]string{"init", "--name", "s1", "--data-dir", dir, "--label", "zone=eu"}, freePorts(t)...)
	r := u.started("makes more", line...)
	if r.code != exitOK {
		t.Fatalf("%+v", r)
	}
	for _, want := range []string{"The cluster is up; this is server s1.", "persys join persys1-role_server\n", "persys join persys1-role_agent\n", "https://127.0.0.1:", u.config()} {
		if !strings.Contains(r.out, want) {
			t.Errorf("no %q in:\n%s", want, r.out)
		}
	}
	if made.Name != "s1" || made.DataDir != dir || made.Advertise != "127.0.0.1" || made.Labels["zone"] != "eu" || made.Agent {
		t.Errorf("got %+v", made)
	}
	c, err := loadUserConfig(u.config())
	if err != nil || c.CurrentContext != "default" || c.Contexts["default"] == nil {
		t.Fatalf("%+v, %v", c, err)
	}
	if want := hostPort("127.0.0.1", made.GRPCPort); c.Contexts["default"].Endpoints[0] != want {
		t.Errorf("got %+v", c.Contexts["default"])
	}
	// The context of the first must not be lost to a second.
	calls := 0
	u.node.Init = func(context.Context, server.Config) error { calls++; return nil }
	if r := u.types(line...); r.code != exitConflict || !strings.Contains(r.errors, `context "default"`) || calls != 0 {
		t.Errorf("%+v, %d calls", r, calls)
	}
	if r := u.types(append(line, "--context", "second", "--no-start")...); r.code != exitOK || !strings.Contains(r.errors, "persys server --data-dir "+dir) {
		t.Errorf("%+v", r)
	}
}

func TestInitRefused(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	_, port, err := net.SplitHostPort(busy.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	u := newUser(t)
	u.node.Init = func(context.Context, server.Config) error { return errors.New("belongs to a cluster already") }
	dir := t.TempDir()
	for want, args := range map[string][]string{
		"port " + port + "/tcp on 127.0.0.1 can't be used: address already in use; choose another with --grpc-port": {"--grpc-port", port},
		"belongs to a cluster already":              nil,
		`name: "S_1" is not a DNS label`:            {"--name", "S_1"},
		`bind: "here" is not an IP`:                 {"--bind", "here"},
		"takes no arguments":                        {"now"},
		"configuration: open /nowhere":              {"-c", "/nowhere"},
		`--grpc-port: "x" is not a whole`:           {"--grpc-port", "x"},
		"etcd_listen: 0.0.0.0:2379 is not loopback": {"--etcd-listen", "0.0.0.0:2379"},
		busy.Addr().String() + " can't be used for etcd's clients: address already in use; choose another with --etcd-listen": {"--etcd-listen", busy.Addr().String()},
		"lease_ttl: 1ms":                  {"--lease-ttl", "1ms"},
		"grpc_port: 70000 is not a port":  {"--grpc-port", "70000"},
		"unknown flag: --deta-dir":        {"--deta-dir", "x"},
		"environment variable PERSYS_AGE": {"env"},
	} {
		line := append(append([]string{"init", "--data-dir", dir, "--name", "s1"}, freePorts(t)...), args...)
		delete(u.env, "PERSYS_AGENT")
		if len(args) == 1 && args[0] == "env" {
			line = line[:len(line)-1]
			u.env["PERSYS_AGENT"] = "perhaps"
		}
		if r := u.types(line...); r.code == exitOK || !strings.Contains(r.errors, want) || strings.Count(r.errors, "\n") != 1 {
			t.Errorf("%v: %+v", args, r)
		}
	}
	if c, err := loadUserConfig(u.config()); err != nil || len(c.Contexts) != 0 {
		t.Errorf("a context was left behind: %+v, %v", c, err)
	}
}

// A server that can't start ends the command with its error.
func TestInitStartFails(t *testing.T) {
	x := newTrust(t)
	var made server.Config
	u := newUser(t)
	u.node = nodeOf(x, &fakeCluster{}, &made)
	u.node.Run = func(context.Context, server.Config) error { return errors.New("disk is full") }
	r := u.types(append([]string{"init", "--data-dir", t.TempDir(), "--name", "s1"}, freePorts(t)...)...)
	if r.code != exitFailure || r.errors != "persys: disk is full\n" {
		t.Errorf("%+v", r)
	}
}

func testToken(t *testing.T) string {
	t.Helper()
	id, secret, err := pki.NewTokenSecret()
	if err != nil {
		t.Fatal(err)
	}
	x := newTrust(t)
	text, err := pki.JoinToken{
		Cluster: "test", Role: pb.Role_ROLE_AGENT, Servers: []string{"127.0.0.1:1"}, Pins: x.authority.Pins(), Expiry: time.Now().Add(time.Hour), ID: id, Secret: secret,
	}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestJoin(t *testing.T) {
	x := newTrust(t)
	var made server.Config
	u := newUser(t)
	u.node = nodeOf(x, &fakeCluster{}, &made)
	var redeemed string
	u.node.Join = func(_ context.Context, _ server.Config, token string) (pb.Role, error) {
		redeemed = token
		return pb.Role_ROLE_AGENT, nil
	}
	token := testToken(t)
	file := writeFile(t, token+"\n")
	common := append([]string{"--name", "n1", "--data-dir", t.TempDir()}, freePorts(t)...)
	for name, line := range map[string][]string{"argument": {"join", token}, "file": {"join", "--token-file", file}, "stdin": {"join", "--token-file", "-"}, "environment": {"join"}} {
		redeemed, u.in = "", token
		delete(u.env, "PERSYS_TOKEN")
		if name == "environment" {
			u.env["PERSYS_TOKEN"] = token
		}
		r := u.started("is an agent", append(line, common...)...)
		if r.code != exitOK || redeemed != token || strings.Contains(r.out, token) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	r := u.types(append([]string{"join", token, "--no-start"}, common...)...)
	if r.code != exitOK || r.errors != "n1 is an agent of cluster test\nstart it with: persys agent --data-dir "+common[3]+" --name n1\n" {
		t.Errorf("%+v", r)
	}
	redeemed = ""
	if r := u.types(append([]string{"join", token, "--etcd-listen", "127.0.0.1:2379"}, common...)...); r.code != exitUsage || !strings.Contains(r.errors, "only servers speak etcd") || redeemed != "" {
		t.Errorf("%+v, redeemed %q", r, redeemed)
	}
	u.node.Join = func(context.Context, server.Config, string) (pb.Role, error) {
		return 0, errors.New("the token has been used")
	}
	if r := u.types(append([]string{"join", token}, common...)...); r.code != exitFailure || r.errors != "persys: the token has been used\n" {
		t.Errorf("%+v", r)
	}
	if r := u.types("join", token, "--token-file", file); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
}

func TestServerReadsItsFile(t *testing.T) {
	x := newTrust(t)
	var made server.Config
	u := newUser(t)
	u.node = nodeOf(x, &fakeCluster{}, &made)
	u.node.Run = func(_ context.Context, c server.Config) error { made = c; return nil }
	file := writeFile(t, "name: from-file\ndata_dir: "+t.TempDir()+"\nadvertise: 127.0.0.9\nallow_bind_roots: [/srv]\nlabels: {zone: eu}\nlog_level: debug\n")
	u.env["PERSYS_LOG_LEVEL"] = "warn"
	// A deadline for requests is none for a server.
	u.env["PERSYS_TIMEOUT"] = "1ns"
	for _, command := range []string{"server", "agent"} {
		r := u.types(command, "-c", file, "--name", "from-flag")
		if r.code != exitOK || made.Name != "from-flag" || made.Advertise != "127.0.0.9" || made.LogLevel != "warn" || made.AllowBindRoots[0] != "/srv" || made.Labels["zone"] != "eu" {
			t.Errorf("%s: %+v %+v", command, r, made)
		}
	}
	made = server.Config{}
	u.env["PERSYS_ETCD_LISTEN"] = "127.0.0.1:2379"
	if r := u.types("server", "-c", file, "--etcd-max-txn-ops", "500"); r.code != exitOK || made.Etcd.Listen != "127.0.0.1:2379" || made.Etcd.MaxTxnOps != 500 {
		t.Errorf("%+v %+v", r, made)
	}
	if r := u.types("agent", "-c", file); r.code != exitUsage || !strings.Contains(r.errors, "only servers speak etcd") {
		t.Errorf("%+v", r)
	}
	delete(u.env, "PERSYS_ETCD_LISTEN")
	bad := writeFile(t, "name: s1\nport: 1\n")
	if r := u.types("server", "-c", bad); r.code != exitUsage || !strings.Contains(r.errors, bad+`:2: unknown key "port"`) {
		t.Errorf("%+v", r)
	}
	// The user's own file has no say in it.
	if err := os.MkdirAll(filepath.Dir(u.config()), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(u.config(), []byte("broken: [\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := u.types("server", "-c", file); r.code != exitOK {
		t.Errorf("%+v", r)
	}
}

func TestDev(t *testing.T) {
	x := newTrust(t)
	var made server.Config
	web := &pb.Workload{Spec: &pb.WorkloadSpec{Id: "web"}}
	f := &fakeCluster{nodes: []*pb.Node{{Id: "dev", State: pb.NodeState_READY}}, workloads: map[string]*pb.Workload{"web": web}}
	u := newUser(t)
	u.node = nodeOf(x, f, &made)
	etcd := deadAddress(t)
	r := u.started("get workloads\n", append([]string{"dev", "--etcd-listen", etcd}, freePorts(t)...)...)
	if !strings.Contains(r.out, "etcd              "+etcd+"\n") {
		t.Errorf("%+v", r)
	}
	if r.code != exitOK || !strings.Contains(r.out, "gRPC              127.0.0.1:"+strconv.Itoa(made.GRPCPort)) || !strings.Contains(r.out, "  persys get workloads\n") {
		t.Errorf("%+v", r)
	}
	if !made.Agent || made.Name != "dev" || made.DataDir == "" {
		t.Errorf("got %+v", made)
	}
	if _, err := os.Stat(made.DataDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the temporary data is left behind: %v", err)
	}
	if len(f.workloads) != 0 {
		t.Error("workloads are left running")
	}
	if c, err := loadUserConfig(u.config()); err != nil || len(c.Contexts) != 0 || c.CurrentContext != "" {
		t.Errorf("the context is left behind: %+v, %v", c, err)
	}
	// Somebody's real cluster stays the current one.
	u.knows(x, "127.0.0.1:1")
	r = u.started("get workloads\n", append([]string{"dev"}, freePorts(t)...)...)
	if r.code != exitOK || !strings.Contains(r.out, "  persys --context dev get workloads\n") {
		t.Errorf("%+v", r)
	}
	if c, err := loadUserConfig(u.config()); err != nil || c.CurrentContext != "test" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestContextAdd(t *testing.T) {
	x := newTrust(t)
	var made server.Config
	u := newUser(t)
	u.node = nodeOf(x, &fakeCluster{}, &made)
	if r := u.types("context", "add", "home"); r.code != exitUsage || !strings.Contains(r.errors, "--endpoint") {
		t.Errorf("%+v", r)
	}
	if r := u.types("context", "add", "home", "--endpoint", "s1,s2:99"); r.code != exitOK {
		t.Errorf("%+v", r)
	}
	c, err := loadUserConfig(u.config())
	if err != nil || c.CurrentContext != "home" || strings.Join(c.Contexts["home"].Endpoints, " ") != "s1:7481 s2:99" {
		t.Errorf("%+v, %v", c, err)
	}
}
