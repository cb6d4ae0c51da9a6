package docker

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"github.com/persys-dev/persys/agent"
	"github.com/persys-dev/persys/agent/runtimetest"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// door is a socket in front of the engine's that a test may close: to the
// runtime, the engine is down then.
type door struct {
	t    *testing.T
	path string
	mu   sync.Mutex
	l    net.Listener
	open []net.Conn
}

func newDoor(t *testing.T) *door {
	d := &door{t: t, path: filepath.Join(t.TempDir(), "engine.sock")}
	d.start()
	t.Cleanup(d.close)
	return d
}

func (d *door) start() {
	l, err := net.Listen("unix", d.path)
	if err != nil {
		d.t.Fatal(err)
	}
	d.mu.Lock()
	d.l = l
	d.mu.Unlock()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			engine, err := net.Dial("unix", "/var/run/docker.sock")
			if err != nil {
				c.Close()
				continue
			}
			d.mu.Lock()
			d.open = append(d.open, c, engine)
			d.mu.Unlock()
			go func() { io.Copy(engine, c); engine.Close() }()
			go func() { io.Copy(c, engine); c.Close() }()
		}
	}()
}

func (d *door) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.l.Close()
	for _, c := range d.open {
		c.Close()
	}
	d.open = nil
}

// fixture is a runtime with the test image; its containers are removed at the end.
type fixture struct {
	t       *testing.T
	api     *client.Client
	runtime *Runtime
}

func newFixture(t *testing.T) *fixture {
	f := &fixture{t: t, api: engineInfo(t)}
	buildImage(t, f.api)
	f.runtime = open(t, runtimetest.Node)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		all, err := f.runtime.List(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, in := range all {
			if err := f.runtime.Remove(ctx, in, 0); err != nil {
				t.Error(err)
			}
		}
	})
	return f
}

func (f *fixture) apply(item *pb.DesiredItem, policy agent.Policy) (agent.Instance, error) {
	return f.runtime.Apply(f.t.Context(), agent.Work{Item: item, Policy: policy})
}

// ends waits until an instance has ended, and gives it with its output.
func (f *fixture) ends(in agent.Instance) (agent.Instance, []string) {
	f.t.Helper()
	var lines []string
	err := f.runtime.Logs(f.t.Context(), in, &pb.WorkloadLogsRequest{Follow: true}, func(c *pb.LogChunk) error {
		lines = append(lines, string(c.GetLine()))
		return nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.runtime.wait(f.t.Context(), in.ID, "not-running"); err != nil {
		f.t.Fatal(err)
	}
	found, err := f.api.ContainerInspect(f.t.Context(), in.ID, client.ContainerInspectOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	if in, err = instance(found.Container); err != nil {
		f.t.Fatal(err)
	}
	return in, lines
}

func reasonOf(t *testing.T, err error) *agent.Error {
	t.Helper()
	var e *agent.Error
	if !errors.As(err, &e) {
		t.Fatalf("%v has no reason", err)
	}
	return e
}

func TestImages(t *testing.T) {
	f := newFixture(t)
	absent := "127.0.0.1:1/no-such-image:1"
	for _, test := range []struct {
		name, image string
		policy      pb.ContainerSpec_PullPolicy
		code        pb.ReasonCode
	}{
		{name: "what is there starts without a registry", image: testImage},
		{name: "and by name only", image: strings.TrimSuffix(testImage, ":1"), policy: pb.ContainerSpec_NEVER, code: pb.ReasonCode_IMAGE_NOT_FOUND},
		{name: "never pulled, and there", image: testImage, policy: pb.ContainerSpec_NEVER},
		{name: "never pulled, and not there", image: absent, policy: pb.ContainerSpec_NEVER, code: pb.ReasonCode_IMAGE_NOT_FOUND},
		{name: "no registry answers", image: absent, code: pb.ReasonCode_NETWORK_ERROR},
		{name: "always pulled", image: testImage, policy: pb.ContainerSpec_ALWAYS, code: pb.ReasonCode_NETWORK_ERROR},
		{name: "not a name", image: "UPPER case", code: pb.ReasonCode_INVALID_IMAGE},
		{name: "empty", image: "", code: pb.ReasonCode_INVALID_IMAGE},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := spec("wait")
			s.GetContainer().Image, s.GetContainer().PullPolicy = test.image, test.policy
			err := f.runtime.Prepare(t.Context(), agent.Work{Item: runtimetest.Item("image", s)})
			if test.code == 0 {
				if err != nil {
					t.Error(err)
				}
			} else if err == nil || reasonOf(t, err).Code != test.code {
				t.Errorf("%v, want %s", err, test.code)
			}
		})
	}
	in, err := f.apply(runtimetest.Item("image", spec("wait")), agent.Policy{})
	if err != nil || !strings.HasPrefix(in.ImageDigest, "sha256:") {
		t.Errorf("digest %q, %v", in.ImageDigest, err)
	}
	// By the digest of what is there.
	byID := spec("wait")
	byID.GetContainer().Image = in.ImageDigest
	if _, err := f.apply(runtimetest.Item("by-digest", byID), agent.Policy{}); err != nil {
		t.Errorf("by digest: %v", err)
	}
}

// registry answers like one that knows nothing, or nobody.
func registry(t *testing.T, status int, body string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/" {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		io.WriteString(w, body)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	return l.Addr().String()
}

func TestRegistryErrors(t *testing.T) {
	engineInfo(t)
	r := open(t, runtimetest.Node)
	for _, test := range []struct {
		name   string
		status int
		body   string
		code   pb.ReasonCode
	}{
		{"not there", 404, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`, pb.ReasonCode_IMAGE_NOT_FOUND},
		{"no such name", 404, `{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known to registry"}]}`, pb.ReasonCode_IMAGE_NOT_FOUND},
		{"not allowed", 401, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, pb.ReasonCode_IMAGE_PULL_AUTH_FAILED},
		{"broken", 500, `{"errors":[{"code":"UNKNOWN","message":"out of order"}]}`, pb.ReasonCode_IMAGE_PULL_FAILED},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := r.pull(t.Context(), registry(t, test.status, test.body)+"/web:1")
			if err == nil || reasonOf(t, err).Code != test.code {
				t.Errorf("%v, want %s", err, test.code)
			}
		})
	}
}

func TestPorts(t *testing.T) {
	f := newFixture(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := int32(free.Addr().(*net.TCPAddr).Port)
	item := runtimetest.Item("ports", spec("serve"))
	item.Assignment.Ports = []*pb.Port{{HostPort: port, ContainerPort: 8000}}
	_, err = f.apply(item, agent.Policy{})
	if err == nil || reasonOf(t, err).Code != pb.ReasonCode_PORT_BIND_CONFLICT || !reasonOf(t, err).Retryable {
		t.Errorf("a port that is taken: %v", err)
	}
	if all, err := f.runtime.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("left: %+v, %v", all, err)
	}
	free.Close()
	if _, err = f.apply(item, agent.Policy{}); err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	body := eventually(t, func() (string, error) {
		answer, err := http.Get("http://" + address)
		if err != nil {
			return "", err
		}
		defer answer.Body.Close()
		data, err := io.ReadAll(answer.Body)
		return string(data), err
	})
	if body != "ports 2\n" {
		t.Errorf("it answers %q", body)
	}
	for name, p := range map[string]*pb.Port{
		"no host port": {ContainerPort: 80}, "no container port": {HostPort: 1}, "too large": {HostPort: 70000, ContainerPort: 80},
		"not an address": {HostPort: 1, ContainerPort: 1, HostIp: "here"},
	} {
		bad := runtimetest.Item("bad-port", spec("serve"))
		bad.Assignment.Ports = []*pb.Port{p}
		if _, err := f.apply(bad, agent.Policy{}); err == nil || reasonOf(t, err).Code != pb.ReasonCode_INVALID_SPEC {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// eventually tries until it works; the engine's proxy needs a moment.
func eventually[T any](t *testing.T, try func() (T, error)) T {
	t.Helper()
	limit := time.Now().Add(runtimetest.Patience)
	for {
		v, err := try()
		if err == nil {
			return v
		}
		if time.Now().After(limit) {
			t.Fatal(err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func TestSettingsTakeEffect(t *testing.T) {
	f := newFixture(t)
	data := t.TempDir()
	if err := os.WriteFile(filepath.Join(data, "file"), []byte("from the node\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(data, 0o777); err != nil {
		t.Fatal(err)
	}
	policy := agent.Policy{BindRoots: []string{data}}
	for _, test := range []struct {
		name string
		args []string
		set  func(*pb.ContainerSpec)
		code int32
		says string
	}{
		{name: "user and working directory", args: []string{"where"}, says: "1234 1235 /tmp",
			set: func(c *pb.ContainerSpec) { c.User, c.WorkingDir = "1234:1235", "/tmp" }},
		{name: "command", says: "0 0 /", set: func(c *pb.ContainerSpec) { c.Command = []string{"/program", "where"} }},
		{name: "host name", args: []string{"cat", "/etc/hostname"}, says: "itself", set: func(c *pb.ContainerSpec) { c.Hostname = "itself" }},
		{name: "a writable root", args: []string{"write", "/tmp/x"}},
		{name: "a read-only root", args: []string{"write", "/tmp/x"}, code: 1, set: func(c *pb.ContainerSpec) { c.ReadOnlyRoot = true }},
		{name: "a mount", args: []string{"cat", "/mnt/file"}, says: "from the node",
			set: func(c *pb.ContainerSpec) {
				c.Volumes = []*pb.Mount{{HostPath: data, ContainerPath: "/mnt", ReadOnly: true}}
			}},
		{name: "a mount is read only", args: []string{"write", "/mnt/x"}, code: 1,
			set: func(c *pb.ContainerSpec) {
				c.Volumes = []*pb.Mount{{HostPath: data, ContainerPath: "/mnt", ReadOnly: true}}
			}},
		{name: "a mount is written to", args: []string{"write", "/mnt/x"},
			set: func(c *pb.ContainerSpec) { c.Volumes = []*pb.Mount{{HostPath: data, ContainerPath: "/mnt"}} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := spec(test.args...)
			if test.set != nil {
				test.set(s.GetContainer())
			}
			item := runtimetest.Item("set", s)
			in, err := f.apply(item, policy)
			if err != nil {
				t.Fatal(err)
			}
			ended, lines := f.ends(in)
			if ended.ExitCode != test.code || test.says != "" && !slices.Contains(lines, test.says) {
				t.Errorf("exit code %d, output %q", ended.ExitCode, lines)
			}
			if err := f.runtime.Remove(t.Context(), in, 0); err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(data, "x")); err != nil {
		t.Errorf("what was mounted is gone with the container: %v", err)
	}
	s := spec("wait")
	grace := int32(3)
	c := s.GetContainer()
	c.Init, c.PidsLimit, c.StopSignal, c.StopGraceSeconds = true, 50, "SIGINT", &grace
	s.Labels = map[string]string{"team": "blue", "persys.node": "forged"}
	item := runtimetest.Item("all", s)
	item.Spec.Resources = &pb.Resources{Cpu: "500m", Memory: "32Mi"}
	item.Assignment.CpuMillis, item.Assignment.MemoryBytes = 500, 32<<20
	in, err := f.apply(item, policy)
	if err != nil {
		t.Fatal(err)
	}
	found, err := f.api.ContainerInspect(t.Context(), in.ID, client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	h, config := found.Container.HostConfig, found.Container.Config
	if h.NanoCPUs != 5e8 || h.Memory != 32<<20 || h.MemorySwap != 32<<20 || *h.PidsLimit != 50 || !*h.Init || config.StopSignal != "SIGINT" ||
		config.Labels["team"] != "blue" || config.Labels["persys.node"] != runtimetest.Node || !h.RestartPolicy.IsNone() || h.LogConfig.Config["max-size"] == "" {
		t.Errorf("%+v %+v", h, config)
	}
	if in.Grace != 3*time.Second {
		t.Errorf("grace %s", in.Grace)
	}
}

func TestPolicyIsEnforced(t *testing.T) {
	f := newFixture(t)
	root := t.TempDir()
	if err := os.Symlink("/etc", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	for name, set := range map[string]func(*pb.ContainerSpec){
		"privileged": func(c *pb.ContainerSpec) { c.Privileged = true },
		"mount of everything": func(c *pb.ContainerSpec) {
			c.Volumes = []*pb.Mount{{HostPath: "/", ContainerPath: "/mnt"}}
		},
		"mount of the engine's socket": func(c *pb.ContainerSpec) {
			c.Volumes = []*pb.Mount{{HostPath: "/var/run/docker.sock", ContainerPath: "/s"}}
		},
		"mount through a link": func(c *pb.ContainerSpec) {
			c.Volumes = []*pb.Mount{{HostPath: filepath.Join(root, "link"), ContainerPath: "/mnt"}}
		},
	} {
		s := spec("wait")
		set(s.GetContainer())
		_, err := f.apply(runtimetest.Item("bad", s), agent.Policy{BindRoots: []string{root}})
		if err == nil || reasonOf(t, err).Code != pb.ReasonCode_INVALID_SPEC || reasonOf(t, err).Retryable {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all, err := f.runtime.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("left: %+v, %v", all, err)
	}
}

func TestEngineDown(t *testing.T) {
	r, err := New(Config{ClusterID: "c", NodeID: "n", Host: "unix://" + filepath.Join(t.TempDir(), "nobody.sock")})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if info := r.Info(t.Context()); info.GetHealthy() || !strings.Contains(info.GetMessage(), "failed to connect") {
		t.Errorf("info: %v", info)
	}
	item := runtimetest.Item("web", spec("wait"))
	in := agent.Instance{ID: "0123456789ab"}
	for name, err := range map[string]error{
		"list":       func() error { _, err := r.List(t.Context()); return err }(),
		"prepare":    r.Prepare(t.Context(), agent.Work{Item: item}),
		"apply":      func() error { _, err := r.Apply(t.Context(), agent.Work{Item: item}); return err }(),
		"stop":       r.Stop(t.Context(), in, time.Second),
		"stop hard":  r.Stop(t.Context(), in, 0),
		"remove":     r.Remove(t.Context(), in, 0),
		"logs":       r.Logs(t.Context(), in, &pb.WorkloadLogsRequest{}, nil),
		"pull image": r.pull(t.Context(), "127.0.0.1:1/x:1"),
	} {
		if err == nil || reasonOf(t, err).Code != pb.ReasonCode_RUNTIME_UNAVAILABLE {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What happens while the engine can't be heard is found when it can be again.
func TestEngineComesBack(t *testing.T) {
	f := newFixture(t)
	d := newDoor(t)
	r, err := New(Config{ClusterID: runtimetest.Cluster, NodeID: runtimetest.Node, Host: "unix://" + d.path})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	changed := make(chan struct{}, 1)
	watched := make(chan error, 1)
	go func() {
		watched <- r.Watch(ctx, func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
	}()
	defer func() {
		cancel()
		if err := <-watched; err != nil {
			t.Error(err)
		}
	}()
	in, err := r.Apply(t.Context(), agent.Work{Item: runtimetest.Item("web", spec("wait"))})
	if err != nil {
		t.Fatal(err)
	}
	until := func(what string, reached func([]agent.Instance, error) bool) {
		t.Helper()
		limit := time.After(runtimetest.Patience)
		for {
			all, err := r.List(t.Context())
			if reached(all, err) {
				return
			}
			select {
			case <-changed:
			case <-limit:
				t.Fatalf("%s: never; %+v, %v", what, all, err)
			}
		}
	}
	until("it runs", func(all []agent.Instance, err error) bool { return len(all) == 1 && all[0].Phase == agent.Running })
	if info := r.Info(t.Context()); !info.GetHealthy() || info.GetVersion() == "" {
		t.Errorf("info: %v", info)
	}
	d.close()
	if _, err := r.List(t.Context()); err == nil || reasonOf(t, err).Code != pb.ReasonCode_RUNTIME_UNAVAILABLE {
		t.Errorf("list through a closed door: %v", err)
	}
	if info := r.Info(t.Context()); info.GetHealthy() {
		t.Errorf("info: %v", info)
	}
	if err := f.runtime.Stop(t.Context(), in, 0); err != nil {
		t.Fatal(err)
	}
	d.start()
	until("its end is seen", func(all []agent.Instance, err error) bool {
		return err == nil && len(all) == 1 && all[0].Phase == agent.Exited
	})
	if _, err := r.Apply(t.Context(), agent.Work{Item: runtimetest.Item("web", spec("exit-after", "10", "4"))}); err != nil {
		t.Fatal(err)
	}
	// The same container as before: started again, it waits.
	if err := f.runtime.Stop(t.Context(), in, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	until("its next end is announced", func(all []agent.Instance, err error) bool {
		return err == nil && len(all) == 1 && all[0].Phase == agent.Exited && all[0].Finished.After(in.Started)
	})
}

func TestForeignContainersAreLeftAlone(t *testing.T) {
	f := newFixture(t)
	in, err := f.apply(runtimetest.Item("web", spec("wait")), agent.Policy{})
	if err != nil {
		t.Fatal(err)
	}
	// Somebody else's, under the name that ours would have.
	found, err := f.api.ContainerInspect(t.Context(), in.ID, client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(found.Container.Name, "/")
	if err := f.runtime.Remove(t.Context(), in, 0); err != nil {
		t.Fatal(err)
	}
	config := *found.Container.Config
	config.Labels = map[string]string{"somebody": "else"}
	other, err := f.api.ContainerCreate(t.Context(), client.ContainerCreateOptions{Name: name, Config: &config})
	if err != nil {
		t.Fatal(err)
	}
	defer f.api.ContainerRemove(context.Background(), other.ID, client.ContainerRemoveOptions{Force: true})
	if _, err := f.apply(runtimetest.Item("web", spec("wait")), agent.Policy{}); err == nil || !strings.Contains(err.Error(), "not ours") {
		t.Errorf("apply: %v", err)
	}
	if all, err := f.runtime.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("listed: %+v, %v", all, err)
	}
	if _, err := f.api.ContainerInspect(t.Context(), other.ID, client.ContainerInspectOptions{}); err != nil {
		t.Errorf("it is gone: %v", err)
	}
}

// That somebody else stopped a container is seen, whatever its program makes of
// the signal; a container that ends by itself was not stopped.
func TestStoppedByHand(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		_ = f.runtime.Watch(ctx, func() {})
	}()
	defer func() { cancel(); <-watching }()
	eventually(t, func() (bool, error) {
		f.runtime.cache.mu.Lock()
		defer f.runtime.cache.mu.Unlock()
		if !f.runtime.cache.on {
			return false, errors.New("the engine's events are not watched")
		}
		return true, nil
	})
	stopped, err := f.apply(runtimetest.Item("stopped", spec("wait")), agent.Policy{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.apply(runtimetest.Item("ended", spec("exit", "3")), agent.Policy{}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.runtime.api.ContainerStop(t.Context(), stopped.ID, client.ContainerStopOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() (bool, error) {
		all, err := f.runtime.List(t.Context())
		for _, in := range all {
			if err == nil && in.Phase != agent.Exited || in.Stopped != (in.ID == stopped.ID) {
				err = errors.New(in.ID + " is " + in.Phase.String())
			}
		}
		return true, err
	})
}
