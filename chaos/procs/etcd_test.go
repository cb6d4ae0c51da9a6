package procs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/persys-dev/persys/fsm"
)

const (
	etcdPort = "2379"
	// What an etcdctl may take that waits for nothing.
	oneCall = 20 * time.Second
)

// listen is the flag that gives the cluster's next process a port for etcd's
// clients.
func (c *Cluster) listen() string {
	return fmt.Sprintf("--etcd-listen=127.%d.%d.%d:%s", 100+os.Getpid()%100, c.network, c.hosts+1, etcdPort)
}

// etcdServers starts three servers with ports for etcd's clients.
func etcdServers(t *testing.T) (*Cluster, map[string]*Process) {
	t.Helper()
	c := New(t, program)
	servers := map[string]*Process{"s1": c.Init("s1", c.listen())}
	for _, name := range []string{"s2", "s3"} {
		servers[name] = c.Join("server", name, c.listen())
	}
	c.Eventually("three voters", soon, func() error { return c.voters(3) })
	return c, servers
}

func endpoints(servers map[string]*Process, port string) []string {
	var all []string
	for _, name := range []string{"s1", "s2", "s3"} {
		all = append(all, net.JoinHostPort(servers[name].IP, port))
	}
	return all
}

// leading is the server that leads by what it says itself; the clients are one for
// each server.
func (c *Cluster) leading(clients map[string]*clientv3.Client) (name string) {
	c.t.Helper()
	c.Eventually("a leader", soon, func() error {
		term := uint64(0)
		for n, client := range clients {
			ctx, cancel := context.WithTimeout(c.t.Context(), short)
			status, err := client.Status(ctx, client.Endpoints()[0])
			cancel()
			if err == nil && status.Leader == status.Header.MemberId && status.RaftTerm > term {
				name, term = n, status.RaftTerm
			}
		}
		if term == 0 {
			return errors.New("nobody leads")
		}
		return nil
	})
	return name
}

// etcdctl is Debian's, with the flags of one way to connect.
type etcdctl struct {
	t       *testing.T
	c       *Cluster
	program string
	flags   []string
}

func newEtcdctl(t *testing.T, c *Cluster, flags ...string) *etcdctl {
	t.Helper()
	path, err := exec.LookPath("etcdctl")
	if err != nil {
		t.Skip("etcdctl is not installed: hack/setup.sh does it")
	}
	return &etcdctl{t, c, path, flags}
}

// with is the same with more flags.
func (e *etcdctl) with(flags ...string) *etcdctl {
	more := *e
	more.flags = append(more.flags[:len(more.flags):len(more.flags)], flags...)
	return &more
}

func (e *etcdctl) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, e.program, append(e.flags[:len(e.flags):len(e.flags)], args...)...)
	cmd.Env = []string{"ETCDCTL_API=3", "PATH=" + os.Getenv("PATH"), "HOME=" + e.c.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// try gives the standard output; the error holds the last line of the other.
func (e *etcdctl) try(input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), oneCall)
	defer cancel()
	cmd := e.command(ctx, args...)
	var out, diagnostics bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &diagnostics
	if err := cmd.Run(); err != nil {
		lines := strings.Split(strings.TrimSpace(diagnostics.String()), "\n")
		return out.String(), fmt.Errorf("etcdctl %s: %w: %s", strings.Join(args, " "), err, lines[len(lines)-1])
	}
	return strings.TrimSpace(out.String()), nil
}

// do is try where failure ends the test.
func (e *etcdctl) do(args ...string) string {
	e.t.Helper()
	out, err := e.try("", args...)
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

func (e *etcdctl) says(want string, args ...string) {
	e.t.Helper()
	if got := e.do(args...); got != want {
		e.t.Errorf("etcdctl %s\n got %q\nwant %q", strings.Join(args, " "), got, want)
	}
}

// finds is says for a part of the answer, which it returns.
func (e *etcdctl) finds(pattern string, args ...string) string {
	e.t.Helper()
	got := e.do(args...)
	m := regexp.MustCompile(pattern).FindStringSubmatch(got)
	if m == nil {
		e.t.Fatalf("etcdctl %s\n got %q\nwant %q", strings.Join(args, " "), got, pattern)
	}
	return m[len(m)-1]
}

func (e *etcdctl) fails(want string, args ...string) {
	e.t.Helper()
	if out, err := e.try("", args...); err == nil || !strings.Contains(err.Error(), want) {
		e.t.Errorf("etcdctl %s\n got %q, %v\nwant %q", strings.Join(args, " "), out, err, want)
	}
}

// running is an etcdctl that goes on until the test ends it.
type running struct {
	e     *etcdctl
	cmd   *exec.Cmd
	lines chan string
	stop  context.CancelFunc
}

func (e *etcdctl) start(args ...string) *running {
	e.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{e: e, cmd: e.command(ctx, args...), lines: make(chan string, 1000), stop: cancel}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(out); s.Scan(); {
			r.lines <- s.Text()
		}
	}()
	e.t.Cleanup(func() {
		cancel()
		<-read
		_ = r.cmd.Wait()
	})
	return r
}

// expect waits for these lines, and no others.
func (r *running) expect(lines ...string) {
	r.e.t.Helper()
	for _, want := range lines {
		if got := r.next(); got != want {
			r.e.t.Fatalf("%s: got %q, want %q", r.cmd, got, want)
		}
	}
}

func (r *running) next() string {
	r.e.t.Helper()
	select {
	case line := <-r.lines:
		return line
	case <-time.After(soon):
		r.e.t.Fatalf("%s: says nothing more", r.cmd)
		return ""
	}
}

// TestEtcdctl has Debian's etcdctl talk to the plain port, and to the gRPC port
// with certificates.
func TestEtcdctl(t *testing.T) {
	c, servers := etcdServers(t)
	plain := strings.Join(endpoints(servers, etcdPort), ",")
	secure := strings.Join(endpoints(servers, "7481"), ",")
	certificates := filepath.Join(c.dir, "certificates")
	c.Must("context", "export", certificates)
	for name, flags := range map[string][]string{
		"plain": {"--endpoints", plain},
		"mTLS": {
			"--endpoints", secure, "--cacert", filepath.Join(certificates, "ca.crt"),
			"--cert", filepath.Join(certificates, "client.crt"), "--key", filepath.Join(certificates, "client.key"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEtcdctl(t, c, flags...)
			e.keys(name + "/")
			e.watches(name + "/watch/")
			e.leases(name + "/lease/")
			e.contests(name + "/contest/")
			e.mirror(name+"/mirror/", strings.Split(plain, ",")[0])
			e.cluster()
			e.snapshot(name + "/snapshot")
		})
	}
	t.Run("auth", func(t *testing.T) {
		// The race detector makes passwords slow to check.
		newEtcdctl(t, c, "--endpoints", plain, "--dial-timeout=15s", "--command-timeout=15s").auth()
	})
}

func (e *etcdctl) keys(p string) {
	e.t.Helper()
	e.says("OK", "put", p+"a", "1")
	e.says("OK\n"+p+"a\n1", "put", p+"a", "2", "--prev-kv")
	e.says("OK", "put", p+"b", "3")
	e.says(p+"a\n2\n"+p+"b\n3", "get", "--prefix", p)
	e.says(p+"b\n3\n"+p+"a\n2", "get", "--prefix", p, "--sort-by=KEY", "--order=DESCEND")
	e.says(p+"a", "get", "--prefix", p, "--keys-only", "--limit", "1")
	revision := e.finds(`"revision":(\d+)`, "get", p+"a", "-w", "json")
	e.says("OK", "put", p+"a", "4")
	e.says(p+"a\n2", "get", p+"a", "--rev", revision)
	e.c.Eventually("any replica knows it", soon, func() error {
		if out := e.do("get", p+"a", "--consistency=s", "--print-value-only"); out != "4" {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
	out, err := e.try(fmt.Sprintf("value(%q) = \"4\"\n\nput %sc 5\nget %sb\n\nget %sa\n\n", p+"a", p, p, p), "txn")
	if err != nil || out != "SUCCESS\n\nOK\n\n"+p+"b\n3" {
		e.t.Errorf("txn: %q, %v", out, err)
	}
	e.says("1\n"+p+"c\n5", "del", p+"c", "--prev-kv")
	e.says("2", "del", "--prefix", p)
	e.says("", "get", "--prefix", p)
	e.says("compacted revision "+revision, "compaction", revision)
	e.fails("mvcc: required revision has been compacted", "get", p+"a", "--rev", "1")
	e.fails("mvcc: required revision has been compacted", "compaction", revision)
	e.fails("mvcc: required revision is a future revision", "get", p+"a", "--rev", "1000000")
	e.fails("requested lease not found", "put", p+"a", "1", "--lease", "1234")
}

func (e *etcdctl) watches(p string) {
	e.t.Helper()
	revision := e.finds(`"revision":(\d+)`, "put", p+"before", "0", "-w", "json")
	w := e.start("watch", "--prefix", p, "--rev", revision, "--prev-kv")
	w.expect("PUT", p+"before", "0")
	e.do("put", p+"x", "1")
	e.do("put", p+"x", "2")
	e.do("del", p+"x")
	w.expect("PUT", p+"x", "1", "PUT", p+"x", "1", p+"x", "2", "DELETE", p+"x", "2", p+"x", "")
	w.stop()
}

func (e *etcdctl) leases(p string) {
	e.t.Helper()
	id := e.finds(`^lease ([0-9a-f]{16}) granted with TTL\(300s\)$`, "lease", "grant", "300")
	e.says("OK", "put", p+"1", "x", "--lease", id)
	e.finds(id, "lease", "list")
	e.finds(`^lease `+id+` granted with TTL\(300s\), remaining\(\d+s\), attached keys\(\[`+p+`1\]\)$`, "lease", "timetolive", id, "--keys")
	e.finds(`^lease `+id+` keepalived with TTL\(300\)$`, "lease", "keep-alive", "--once", id)
	e.says("lease "+id+" revoked", "lease", "revoke", id)
	e.says("", "get", p+"1")
	e.says("lease "+id+" already expired", "lease", "timetolive", id)
	e.fails("requested lease not found", "lease", "revoke", id)

	short := e.finds(`^lease ([0-9a-f]{16}) `, "lease", "grant", "2")
	e.says("OK", "put", p+"2", "x", "--lease", short)
	kept := e.start("lease", "keep-alive", short)
	for range 3 {
		kept.expect("lease " + short + " keepalived with TTL(2)")
	}
	kept.stop()
	e.c.Eventually("the lease runs out", soon, func() error {
		if out := e.do("get", p+"2"); out != "" {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
}

// contests: who holds a lock or leads an election, the next one waits for.
func (e *etcdctl) contests(p string) {
	e.t.Helper()
	holder := e.start("lock", p+"lock")
	if key := holder.next(); !strings.HasPrefix(key, p+"lock/") {
		e.t.Fatalf("locked %q", key)
	}
	waiting := e.start("lock", p+"lock", "echo", "mine")
	e.c.Eventually("both stand in line", soon, func() error {
		if out := e.do("get", "--prefix", p+"lock", "--keys-only", "-w", "fields"); !strings.Contains(out, `"Count" : 2`) {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
	_ = holder.cmd.Process.Signal(syscall.SIGTERM) // it unlocks
	waiting.expect("mine")

	candidate := e.start("elect", p+"elect", "first")
	key := candidate.next()
	candidate.expect("first")
	e.start("elect", "-l", p+"elect").expect(key, "first")
}

func (e *etcdctl) mirror(p, destination string) {
	e.t.Helper()
	e.do("put", p+"from/1", "one")
	// The destination is the same cluster, by its plain port.
	m := e.start("make-mirror", "--prefix", p+"from/", "--dest-prefix", p+"to/", "--dest-insecure-transport", destination)
	e.c.Eventually("what was there is mirrored", soon, func() error { return e.has(p+"to/1", "one") })
	e.do("put", p+"from/2", "two")
	e.c.Eventually("what comes is mirrored", soon, func() error { return e.has(p+"to/2", "two") })
	m.stop()
}

func (e *etcdctl) has(key, value string) error {
	if out := e.do("get", key, "--print-value-only"); out != value {
		return fmt.Errorf("%s is %q", key, out)
	}
	return nil
}

func (e *etcdctl) cluster() {
	e.t.Helper()
	if out := e.do("member", "list"); strings.Count(out, ", started, s") != 3 || strings.Count(out, ", false") != 3 {
		e.t.Errorf("member list:\n%s", out)
	}
	if out := e.do("endpoint", "status", "--cluster"); strings.Count(out, "\n") != 2 || strings.Count(out, ", true, false, ") != 1 {
		e.t.Errorf("endpoint status:\n%s", out)
	}
	// It writes to standard error.
	if _, err := e.try("", "endpoint", "health", "--cluster"); err != nil {
		e.t.Error(err)
	}
	e.c.Eventually("the same hash everywhere", soon, func() error {
		hashes := map[string]bool{}
		out := e.do("endpoint", "hashkv", "--cluster")
		for line := range strings.Lines(out) {
			_, hash, _ := strings.Cut(line, ", ")
			hashes[strings.TrimSpace(hash)] = true
		}
		if strings.Count(out, "\n") != 2 || len(hashes) != 1 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	e.says("", "alarm", "list")
	e.finds("^Finished defragmenting", "defrag")
}

// snapshot: what etcdctl saves, our own restore accepts.
func (e *etcdctl) snapshot(key string) {
	e.t.Helper()
	e.do("put", key, "saved")
	file := filepath.Join(e.t.TempDir(), "snapshot")
	one := e.with()
	one.flags = slices.Clone(e.flags)
	one.flags[1], _, _ = strings.Cut(e.flags[1], ",") // it takes no more
	one.finds("^Snapshot saved at", "snapshot", "save", file)
	f, err := os.Open(file)
	if err != nil {
		e.t.Fatal(err)
	}
	defer f.Close()
	s, err := fsm.Restore(f)
	if err != nil {
		e.t.Fatal(err)
	}
	if kv, ok := s.View().Get(key); !ok || string(kv.Value) != "saved" {
		e.t.Errorf("restored %v", kv)
	}
}

func (e *etcdctl) auth() {
	e.t.Helper()
	e.says("Role reader created", "role", "add", "reader")
	e.says("Role reader updated", "role", "grant-permission", "reader", "read", "auth/", "auth0")
	e.says("User alice created", "user", "add", "alice:secret")
	e.says("Role reader is granted to user alice", "user", "grant-role", "alice", "reader")
	e.says("User root created", "user", "add", "root:pass")
	e.do("put", "auth/a", "1")
	e.says("Authentication Enabled", "auth", "enable")
	root, alice := e.with("--user", "root:pass"), e.with("--user", "alice:secret")
	defer func() {
		e.t.Helper()
		root.says("Authentication Disabled", "auth", "disable")
	}()
	e.fails("user name is empty", "get", "auth/a")
	e.with("--user", "alice:wrong").fails("authentication failed, invalid user ID or password", "get", "auth/a")
	alice.says("auth/a\n1", "get", "auth/a")
	alice.fails("permission denied", "put", "auth/a", "2")
	alice.fails("permission denied", "get", "other")
	alice.fails("permission denied", "user", "list")
	root.says("OK", "put", "auth/a", "2")
	root.says("alice\nroot", "user", "list")
	root.finds("KV Read:\n\t\\[auth/, auth0\\)", "role", "get", "reader")
	watch := alice.start("watch", "--prefix", "auth/")
	e.c.Eventually("alice sees what is written", soon, func() error {
		root.do("put", "auth/a", "3")
		select {
		case line := <-watch.lines:
			if line != "PUT" {
				e.t.Errorf("%q", line)
			}
			return nil
		default:
			return fmt.Errorf("nothing yet")
		}
	})
	root.says("Role reader is revoked from user alice", "user", "revoke-role", "alice", "reader")
	alice.fails("permission denied", "get", "auth/a")
}

// TestEtcdctlRunsWork: a put starts a process, whose document is there to get.
func TestEtcdctlRunsWork(t *testing.T) {
	c := New(t, program)
	s1 := c.Init("s1", c.listen())
	e := newEtcdctl(t, c, "--endpoints", net.JoinHostPort(s1.IP, etcdPort))
	c.Join("agent", "a1", "--docker-host", "none")
	c.clean()
	c.Eventually("a1 is ready", soon, func() error { return c.readyNodes(1) })
	e.says("OK", "put", "/workloads/web", `{"replicas":2,"process":{"command":"sleep","args":["1000"]}}`)
	c.Eventually("both run", soon, func() error {
		if out := e.do("get", "/workloads/web/status"); !strings.Contains(out, `"running":2`) {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
	if pids := c.replicas("web"); len(pids) != 2 {
		t.Errorf("%+v", pids)
	}
	e.finds(`"command":"sleep"`, "get", "/workloads/web", "--print-value-only")
	e.finds(`"state":"READY"`, "get", "/nodes/a1")
	e.fails("PermissionDenied", "put", "/assignments/web/0", "{}")
	e.fails("replicas: -1 is out of range", "put", "/workloads/bad", `{"replicas":-1}`)
	e.finds(`^\d+$`, "del", "--prefix", "/workloads/")
	c.Eventually("all is gone", soon, func() error {
		if out := e.do("get", "--prefix", "/workloads/", "--keys-only"); out != "" {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
}

// TestEtcdClientThroughKills: a client of all three servers loses each of them in
// turn, and none of its watch's events, nor its lease.
func TestEtcdClientThroughKills(t *testing.T) {
	c, servers := etcdServers(t)
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints(servers, etcdPort), DialTimeout: soon, DialKeepAliveTime: 2 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	lease, err := client.Grant(ctx, 10)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := client.KeepAlive(ctx, lease.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(ctx, "alive", "yes", clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	seen := make(chan string, 10_000)
	watch := client.Watch(clientv3.WithRequireLeader(ctx), "n/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created := <-watch; !created.Created {
		t.Fatalf("%+v", created)
	}
	go func() {
		for answer := range watch {
			for _, event := range answer.Events {
				seen <- string(event.Kv.Key)
			}
		}
		close(seen)
	}()

	var put []string
	write := func() {
		t.Helper()
		key := fmt.Sprintf("n/%05d", len(put))
		c.Eventually("put "+key, soon, func() error {
			ctx, cancel := context.WithTimeout(ctx, short)
			defer cancel()
			_, err := client.Put(ctx, key, "")
			return err
		})
		put = append(put, key)
	}
	for range 3 {
		leader := c.leader()
		for range 20 {
			write()
		}
		servers[leader].Kill()
		for range 20 {
			write()
		}
		servers[leader].Start()
		c.Eventually(leader+" is back", soon, func() error { return c.caughtUp(leader) })
	}
	// A put that was tried again may have been carried out twice: only then is a
	// key seen twice, in a row.
	next := 0
	for next < len(put) {
		select {
		case key, ok := <-seen:
			switch {
			case ok && key == put[next]:
				next++
			case ok && next > 0 && key == put[next-1]:
			default:
				t.Fatalf("the watch gave %q (%t) in place of %s", key, ok, put[next])
			}
		case <-time.After(soon):
			t.Fatalf("the watch did not give %s", put[next])
		}
	}
	answer, err := client.Get(ctx, "alive")
	if err != nil || len(answer.Kvs) != 1 {
		t.Errorf("what the lease holds: %v, %v", answer, err)
	}
	select {
	case _, ok := <-kept:
		if !ok {
			t.Error("the lease is not kept alive any more")
		}
	case <-time.After(soon):
		t.Error("the lease is not kept alive any more")
	}
}

// TestEtcdOverHTTP: JSON on both ports, as curl sends it.
func TestEtcdOverHTTP(t *testing.T) {
	c := New(t, program)
	s1 := c.Init("s1", c.listen())
	base := "http://" + net.JoinHostPort(s1.IP, etcdPort)
	post := func(path, body string) (int, string) {
		t.Helper()
		response, err := http.Post(base+path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		data, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, string(data)
	}
	for path, want := range map[string]string{"/version": `"etcdcluster":"3.`, "/health": `{"health":"true","reason":""}`, "/readyz": "ok", "/metrics": "persys_"} {
		response, err := http.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != http.StatusOK || !strings.Contains(string(data), want) {
			t.Errorf("%s: %d %.200s, %v", path, response.StatusCode, data, err)
		}
	}
	key := base64.StdEncoding.EncodeToString([]byte("json"))
	if code, body := post("/v3/kv/put", `{"key":"`+key+`","value":"`+key+`"}`); code != http.StatusOK || !strings.Contains(body, `"revision":"`) {
		t.Errorf("%d %s", code, body)
	}
	want := `"kvs":[{"key":"` + key + `",`
	if code, body := post("/v3/kv/range", `{"key":"`+key+`"}`); code != http.StatusOK || !strings.Contains(body, want) {
		t.Errorf("%d %s", code, body)
	}
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	if code, body, err := c.REST(ctx, s1, http.MethodPost, "/v3/kv/range", `{"key":"`+key+`"}`); err != nil || code != http.StatusOK || !strings.Contains(body, want) {
		t.Errorf("%d %s, %v", code, body, err)
	}
	if code, body, err := c.REST(ctx, s1, http.MethodPost, "/v3/cluster/member/list", `{}`); err != nil || !strings.Contains(body, `"clientURLs":["https://`+net.JoinHostPort(s1.IP, "7480")+`"]`) {
		t.Errorf("%d %s, %v", code, body, err)
	}
	if code, body := post("/v3/cluster/member/list", `{}`); !strings.Contains(body, `"clientURLs":["`+base+`"]`) {
		t.Errorf("%d %s", code, body)
	}
}
