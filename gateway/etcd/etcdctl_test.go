package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/persys-dev/persys/fsm"
)

// etcdctl runs Debian's etcdctl against the endpoints; both outputs are returned.
func (c *cluster) etcdctl(endpoints []string, args ...string) (string, error) {
	c.t.Helper()
	path, err := exec.LookPath("etcdctl")
	if err != nil {
		c.t.Skip("etcdctl is not installed; hack/setup.sh installs it")
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "ETCDCTL_API=3", "ETCDCTL_ENDPOINTS="+strings.Join(endpoints, ","))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// ctl is etcdctl at all replicas, which must succeed.
func (c *cluster) ctl(args ...string) string {
	c.t.Helper()
	out, err := c.etcdctl(c.endpoints(), args...)
	if err != nil {
		c.t.Fatalf("etcdctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func TestEtcdctlMaintenance(t *testing.T) {
	c := newCluster(t, 3, nil)
	leader, follower := c.leader(), c.follower()
	wants := func(out string, all ...string) {
		t.Helper()
		for _, want := range all {
			if !strings.Contains(out, want) {
				t.Errorf("%q is missing in:\n%s", want, out)
			}
		}
	}
	for i := range 20 {
		c.ctl("put", fmt.Sprintf("key%d", i), "value")
	}

	members := c.ctl("member", "list", "-w", "table")
	for _, r := range c.replicas {
		wants(members, fmt.Sprintf("%x", ID(r.name)), "http://"+r.endpoint)
	}
	wants(c.ctl("endpoint", "status", "--cluster", "-w", "table"), "3.7.3", "true", "false", fmt.Sprintf("%x", ID(follower.name)))
	wants(c.ctl("endpoint", "health", "--cluster"), "is healthy")

	hashes := map[string]bool{}
	for line := range strings.Lines(c.ctl("endpoint", "hashkv", "--cluster")) {
		_, hash, _ := strings.Cut(strings.TrimSpace(line), ", ")
		hashes[hash] = true
	}
	if len(hashes) != 1 {
		t.Errorf("%v", hashes)
	}

	file := filepath.Join(t.TempDir(), "snapshot.db")
	if out, err := c.etcdctl([]string{follower.endpoint}, "snapshot", "save", file); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := fsm.Restore(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if kv, ok := s.View().Get("key19"); !ok || string(kv.Value) != "value" {
		t.Errorf("saved %v", kv)
	}

	wants(c.ctl("compaction", fmt.Sprint(s.View().Revision())), "compacted revision")
	out, err := c.etcdctl(c.endpoints(), "compaction", "2")
	if err == nil {
		t.Error("compacted to what is compacted")
	}
	wants(out, "mvcc: required revision has been compacted")
	out, err = c.etcdctl(c.endpoints(), "compaction", "100000")
	if err == nil {
		t.Error("compacted to the future")
	}
	wants(out, "mvcc: required revision is a future revision")

	wants(c.ctl("defrag", "--cluster"), "Finished defragmenting")
	c.moveLeader(leader, follower, wants)

	out, err = c.etcdctl(c.endpoints(), "member", "add", "s4", "--peer-urls=http://127.0.0.1:1")
	if err == nil {
		t.Error("a server was added without a token")
	}
	wants(out, "persys token create --role server")
	out, err = c.etcdctl(c.endpoints(), "member", "remove", "abc")
	if err == nil {
		t.Error("nobody was removed")
	}
	wants(out, "member not found")
	wants(c.ctl("member", "remove", fmt.Sprintf("%x", ID(leader.name))), "removed from cluster")
	if members = c.ctl("member", "list"); strings.Contains(members, leader.name) {
		t.Errorf("%s was removed:\n%s", leader.name, members)
	}
}

func (c *cluster) moveLeader(from, to *replica, wants func(string, ...string)) {
	c.t.Helper()
	out, err := c.etcdctl([]string{to.endpoint}, "move-leader", fmt.Sprintf("%x", ID(to.name)))
	if err == nil {
		c.t.Error("moved by a follower")
	}
	wants(out, "no leader endpoint given")
	wants(c.ctl("move-leader", fmt.Sprintf("%x", ID(to.name))), fmt.Sprintf("Leadership transferred from %x to %x", ID(from.name), ID(to.name)))
	eventually(c.t, "the new leader reigns", func() error {
		if !to.store.IsLeader() {
			return errors.New("not yet")
		}
		return nil
	})
}

func TestEtcdctlAlarm(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.QuotaBytes = 20_000 })
	value := strings.Repeat("v", 1000)
	full := false
	for i := 0; i < 30 && !full; i++ {
		out, err := c.etcdctl(c.endpoints(), "put", "key", value)
		if full = err != nil; full && !strings.Contains(out, "etcdserver: mvcc: database space exceeded") {
			t.Fatal(out)
		}
	}
	if !full {
		t.Fatal("30 puts of 1,000 bytes fit into 20,000")
	}
	raised := fmt.Sprintf("memberID:%d alarm:NOSPACE", ID("s1"))
	if out := c.ctl("alarm", "list"); !strings.Contains(out, raised) {
		t.Errorf("%q", out)
	}
	if out := c.ctl("endpoint", "status"); !strings.Contains(out, "alarm:NOSPACE") {
		t.Errorf("%q", out)
	}
	c.ctl("compaction", fmt.Sprint(c.leader().store.View().Revision()))
	if out := c.ctl("alarm", "disarm"); !strings.Contains(out, raised) {
		t.Errorf("%q", out)
	}
	if out := c.ctl("put", "key", value); !strings.Contains(out, "OK") {
		t.Errorf("%q", out)
	}
	if out := c.ctl("alarm", "list"); out != "" {
		t.Errorf("%q", out)
	}
}
