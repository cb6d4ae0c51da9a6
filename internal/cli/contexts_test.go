package cli

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestUserConfigOnDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "persys", "config.yaml")
	if c, err := loadUserConfig(path); err != nil || len(c.Contexts) != 0 {
		t.Fatalf("without a file: %+v, %v", c, err)
	}
	one, two := &clusterContext{Endpoints: []string{"a:1", "b:2"}, CA: "ca\nca\n", Key: "k"}, &clusterContext{Endpoints: []string{"c:3"}, CAFile: "ca.pem"}
	var group sync.WaitGroup
	for name, x := range map[string]*clusterContext{"one": one, "two": two} {
		group.Go(func() {
			if err := updateUserConfig(path, func(c *userConfig) error { return c.add(name, x, name == "one") }); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	c, err := loadUserConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := map[string]*clusterContext{"one": one, "two": two}; c.CurrentContext != "one" || !reflect.DeepEqual(c.Contexts, want) {
		t.Errorf("got %+v", c)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	err = updateUserConfig(path, func(c *userConfig) error { return c.add("one", &clusterContext{CA: "other"}, true) })
	if exitCode(err) != exitConflict {
		t.Errorf("another cluster's context was replaced: %v", err)
	}
	if err := updateUserConfig(path, func(c *userConfig) error { return c.add("one", one, true) }); err != nil {
		t.Errorf("the same cluster's context was not replaced: %v", err)
	}
}

func TestConfigFileStaysALink(t *testing.T) {
	dir := t.TempDir()
	real, link := filepath.Join(dir, "real.yaml"), filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(real, []byte("output: wide\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	if err := updateUserConfig(link, func(c *userConfig) error { return c.add("x", &clusterContext{}, true) }); err != nil {
		t.Fatal(err)
	}
	if c, err := loadUserConfig(real); err != nil || c.Output != "wide" || c.Contexts["x"] == nil {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestUserConfigRefused(t *testing.T) {
	for text, want := range map[string]string{
		"contexts:\n  a:\n    endpoint: x": `line 3: unknown key "endpoint"`,
		"contexts:\n  a:":                  `context "a" is empty`,
		"contexts: [a]":                    `line 1: cannot unmarshal`,
		"a: b: c":                          `mapping values are not allowed`,
	} {
		path := writeFile(t, text)
		if _, err := loadUserConfig(path); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: got %v", text, err)
		}
	}
}

func TestContextPEM(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "key.pem"), []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "config.yaml")
	_, key, _, err := (&clusterContext{CA: "a", Cert: "b", KeyFile: "key.pem"}).pem(config)
	if err != nil || string(key) != "from a file" {
		t.Errorf("got %q, %v", key, err)
	}
	for want, x := range map[string]*clusterContext{
		"both ca and ca_file": {CA: "a", CAFile: "b", Cert: "c", Key: "d"},
		"key is missing":      {CA: "a", Cert: "c"},
		"cert_file: open":     {CA: "a", CertFile: "not-there", Key: "d"},
	} {
		if _, _, _, err := x.pem(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestCleanEndpoints(t *testing.T) {
	got, err := cleanEndpoints([]string{"s1", " s2:99", "", "s1:7481", "::1", "[::1]:5"})
	if want := []string{"s1:7481", "s2:99", "[::1]:7481", "[::1]:5"}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := cleanEndpoints([]string{"https://s1:7480"}); exitCode(err) != exitUsage {
		t.Errorf("got %v", err)
	}
}

func TestWhichCluster(t *testing.T) {
	x := newTrust(t)
	here, there := &fakeCluster{}, &fakeCluster{}
	hereAddress, thereAddress := x.serve(here), x.serve(there)
	u := newUser(t)
	if r := u.types("get", "workloads"); r.code != exitUsage || !strings.Contains(r.errors, "no cluster to talk to") {
		t.Errorf("without any: %+v", r)
	}
	u.knows(x, hereAddress)
	if err := updateUserConfig(u.config(), func(c *userConfig) error { return c.add("other", x.context(thereAddress), false) }); err != nil {
		t.Fatal(err)
	}
	expect := func(f *fakeCluster, args ...string) {
		t.Helper()
		before := f.called(pb.Workloads_ListWorkloads_FullMethodName)
		if r := u.types(append([]string{"get", "workloads"}, args...)...); r.code != exitOK {
			t.Errorf("%+v", r)
		}
		if f.called(pb.Workloads_ListWorkloads_FullMethodName) != before+1 {
			t.Errorf("%v went elsewhere", args)
		}
	}
	expect(here)
	expect(there, "--context", "other")
	u.env["PERSYS_CONTEXT"] = "other"
	expect(there)
	expect(here, "--context", "test")
	u.env["PERSYS_ENDPOINT"] = deadAddress(t) + "," + hereAddress
	expect(here)
	expect(there, "--endpoint", thereAddress)
	clear(u.env)
	if r := u.types("get", "workloads", "--context", "tset"); r.code != exitUsage || !strings.Contains(r.errors, `did you mean "test"?`) {
		t.Errorf("%+v", r)
	}
	if r := u.types("context", "use", "other"); r.code != exitOK {
		t.Errorf("%+v", r)
	}
	expect(there)
	if r := u.types("context", "ls"); r.out != "CURRENT   NAME    ENDPOINTS\n*         other   "+thereAddress+"\n          test    "+hereAddress+"\n" {
		t.Errorf("got %q", r.out)
	}
	if r := u.types("context", "rm", "other"); r.code != exitOK {
		t.Errorf("%+v", r)
	}
	expect(here) // the only one left
	if r := u.types("context", "rm", "other"); r.code != exitNotFound {
		t.Errorf("%+v", r)
	}
}

func TestCredentialsFromFlags(t *testing.T) {
	x := newTrust(t)
	c := x.context()
	dir := t.TempDir()
	for name, text := range map[string]string{"ca": c.CA, "cert": c.Cert, "key": c.Key} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	u := newUser(t)
	args := []string{"get", "workloads", "--endpoint", x.serve(&fakeCluster{}), "--ca-file", dir + "/ca", "--cert-file", dir + "/cert"}
	if r := u.types(args...); r.code != exitUsage || !strings.Contains(r.errors, "key is missing") {
		t.Errorf("%+v", r)
	}
	if r := u.types(append(args, "--key-file", dir+"/key")...); r.code != exitOK {
		t.Errorf("%+v", r)
	}
}

// A command line that knows one server of three survives its loss.
func TestServersAreLearned(t *testing.T) {
	x := newTrust(t)
	f := &fakeCluster{}
	first, stop := x.serveUntil(f)
	second := x.serve(f)
	f.members = []*pb.Member{{Name: "s2", GrpcAddress: second}, {Name: "s1", GrpcAddress: first}, {Name: "s0", GrpcAddress: "127.0.0.1:1", Removed: true}}
	u := newUser(t).knows(x, first)
	if r := u.types("get", "workloads"); r.code != exitOK {
		t.Fatalf("%+v", r)
	}
	before, err := os.ReadFile(u.config())
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if r := u.types("get", "workloads"); r.code != exitOK {
		t.Fatalf("%+v", r)
	}
	if after, err := os.ReadFile(u.config()); err != nil || string(after) != string(before) {
		t.Errorf("the user's own file was rewritten: %v", err)
	}
	if got := loadKnownServers(u.config(), "test"); len(got) != 2 {
		t.Errorf("knows %q", got)
	}
	if r := u.types("context", "rm", "test"); r.code != exitOK || loadKnownServers(u.config(), "test") != nil {
		t.Errorf("%+v", r)
	}
}

func TestExpiredCertificate(t *testing.T) {
	x := newTrust(t)
	creds := x.issue(pb.Role_ROLE_ADMIN, "admin", time.Nanosecond)
	certificate, key, roots, err := creds.PEM()
	if err != nil {
		t.Fatal(err)
	}
	u := newUser(t)
	c := &clusterContext{Endpoints: []string{"127.0.0.1:1"}, CA: string(roots), Cert: string(certificate), Key: string(key)}
	if err := updateUserConfig(u.config(), func(f *userConfig) error { return f.add("old", c, true) }); err != nil {
		t.Fatal(err)
	}
	if r := u.types("get", "nodes"); r.code != exitDenied || !strings.Contains(r.errors, "expired on") {
		t.Errorf("%+v", r)
	}
}

func TestReadableKeyIsWarnedAbout(t *testing.T) {
	x := newTrust(t)
	u := newUser(t).knows(x, x.serve(&fakeCluster{}))
	if err := os.Chmod(u.config(), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := u.types("get", "nodes"); r.code != exitOK || !strings.Contains(r.errors, "chmod 600") {
		t.Errorf("%+v", r)
	}
}

func TestContextExport(t *testing.T) {
	x := newTrust(t)
	u := newUser(t).knows(x, "192.0.2.1:7481")
	dir := filepath.Join(t.TempDir(), "it's")
	want := "export ETCDCTL_API=3\nexport ETCDCTL_ENDPOINTS=192.0.2.1:7481\nexport ETCDCTL_CACERT='" + strings.ReplaceAll(dir, "'", `'\''`) + "/ca.crt'\n"
	r := u.types("context", "export", dir)
	if r.code != exitOK || !strings.HasPrefix(r.out, want) {
		t.Fatalf("%+v, want %q", r, want)
	}
	config, err := loadUserConfig(u.config())
	if err != nil {
		t.Fatal(err)
	}
	c := config.Contexts["test"]
	for name, pem := range map[string]string{"ca.crt": c.CA, "client.crt": c.Cert, "client.key": c.Key} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != pem {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	if r := u.types("context", "export"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
}
