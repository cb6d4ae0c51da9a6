package etcd

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

func TestMemberListThroughEachReplica(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	for _, r := range c.replicas {
		client := c.client(r.endpoint)
		answer, err := client.MemberList(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(answer.Members) != 3 || answer.Header.MemberId != ID(r.name) {
			t.Errorf("%s: %v", r.name, answer)
		}
		for _, m := range answer.Members {
			if m.ID != ID(m.Name) || m.IsLearner || len(m.PeerURLs) != 1 || len(m.ClientURLs) != 1 {
				t.Errorf("%s: %v", r.name, m)
			}
		}
		if err := client.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		if n := len(client.Endpoints()); n != 3 {
			t.Errorf("%s: %d endpoints after a sync", r.name, n)
		}
		if _, err := client.Put(ctx, "k", r.name); err != nil {
			t.Error(err)
		}
	}
}

func TestIDs(t *testing.T) {
	// They are in clients' hands and in stored alarms: they never change.
	if got := ID("s1.3f2a"); got != 0x3f1d2c555386bfc8 {
		t.Errorf("%#x", got)
	}
}

func TestPeerURLs(t *testing.T) {
	for urls, valid := range map[string]bool{
		"http://10.0.0.1:2380": true, "https://a.example:1,http://[::1]:2": true,
		"": false, "10.0.0.1:2380": false, "http://there": false, "http://:80": false, "http://a:1/path": false, "unix://a:1": false, "http://a:1,": false,
	} {
		if validURLs(strings.Split(urls, ",")) != valid {
			t.Errorf("%q: valid should be %t", urls, valid)
		}
	}
	if validURLs(nil) {
		t.Error("none are valid")
	}
}

func TestMembershipIsRefusedAsInEtcd(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	client := c.client()
	list, err := client.MemberList(ctx)
	if err != nil {
		t.Fatal(err)
	}
	first := list.Members[0]
	others := []string{"http://127.0.0.1:1"}
	for name, try := range map[string]struct {
		call func() error
		want error
		says string
	}{
		"add":                {func() error { _, err := client.MemberAdd(ctx, others); return err }, nil, "persys token create --role server"},
		"add a learner":      {func() error { _, err := client.MemberAddAsLearner(ctx, others); return err }, nil, "persys join TOKEN"},
		"add twice":          {func() error { _, err := client.MemberAdd(ctx, first.PeerURLs); return err }, rpctypes.ErrPeerURLExist, ""},
		"remove nobody":      {func() error { _, err := client.MemberRemove(ctx, 5); return err }, rpctypes.ErrMemberNotFound, ""},
		"update nobody":      {func() error { _, err := client.MemberUpdate(ctx, 5, others); return err }, rpctypes.ErrMemberNotFound, ""},
		"update":             {func() error { _, err := client.MemberUpdate(ctx, first.ID, others); return err }, nil, "grpc_port"},
		"update to the same": {func() error { _, err := client.MemberUpdate(ctx, first.ID, first.PeerURLs); return err }, nil, ""},
		"promote nobody":     {func() error { _, err := client.MemberPromote(ctx, 5); return err }, rpctypes.ErrMemberNotFound, ""},
		"promote a voter":    {func() error { _, err := client.MemberPromote(ctx, first.ID); return err }, rpctypes.ErrMemberNotLearner, ""},
	} {
		err := try.call()
		switch {
		case try.want != nil && !errors.Is(err, try.want):
			t.Errorf("%s: %v, want %v", name, err, try.want)
		case try.says != "" && (err == nil || !strings.Contains(err.Error(), try.says)):
			t.Errorf("%s: %v, want it to say %q", name, err, try.says)
		case try.want == nil && try.says == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMemberRemove(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	leader, gone := c.leader(), c.follower()
	client := c.client(leader.endpoint)
	gone.kill()
	killed := time.Now()
	eventually(t, "the leader counts it as gone", func() error {
		if since := time.Since(killed); since < 4*300*time.Millisecond {
			return fmt.Errorf("only %s ago", since)
		}
		return nil
	})
	// Only two of three are there: none of them may go.
	if _, err := client.MemberRemove(ctx, ID(c.follower().name)); !errors.Is(err, rpctypes.ErrUnhealthy) {
		t.Fatalf("the last healthy follower was removed: %v", err)
	}
	answer, err := client.MemberRemove(ctx, ID(gone.name))
	if err != nil {
		t.Fatal(err)
	}
	if len(answer.Members) != 2 || slices.ContainsFunc(answer.Members, func(m *etcdpb.Member) bool { return m.ID == ID(gone.name) }) {
		t.Errorf("after the removal of %s: %v", gone.name, answer.Members)
	}
	if _, err := client.MemberRemove(ctx, ID(gone.name)); !errors.Is(err, rpctypes.ErrMemberNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

// A server that is asked to remove itself still answers.
func TestMemberRemoveOfItself(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	gone := c.follower()
	answer, err := c.client(gone.endpoint).MemberRemove(ctx, ID(gone.name))
	if err != nil || len(answer.Members) != 2 {
		t.Errorf("%v, %v", answer, err)
	}
}

func TestMemberPromote(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	client := c.client(c.leader().endpoint)
	if _, err := client.Put(ctx, "k", "v"); err != nil {
		t.Fatal(err)
	}
	learner := &replica{t: t, name: "s2", dir: filepath.Join(t.TempDir(), "s2")}
	c.replicas = append(c.replicas, learner)
	learner.start(c, false)
	t.Cleanup(learner.kill)
	address := learner.raft
	learner.kill()
	if err := c.leader().store.AddNonvoter(ctx, learner.name, address); err != nil {
		t.Fatal(err)
	}
	list, err := client.MemberList(ctx)
	if err != nil || len(list.Members) != 2 || !list.Members[1].IsLearner {
		t.Fatalf("%v, %v", list, err)
	}
	if _, err := client.MemberPromote(ctx, ID(learner.name)); !errors.Is(err, rpctypes.ErrMemberLearnerNotReady) {
		t.Errorf("a learner that is down was promoted: %v", err)
	}
	if _, err := client.MoveLeader(ctx, ID(learner.name)); !errors.Is(err, rpctypes.ErrBadLeaderTransferee) {
		t.Errorf("leadership moved to a learner: %v", err)
	}
	learner.start(c, false)
	eventually(t, "it shows that it is a learner", func() error {
		status, err := client.Status(ctx, learner.endpoint)
		if err == nil && (!status.IsLearner || status.Leader != ID("s1")) {
			err = fmt.Errorf("%v", status)
		}
		return err
	})
	eventually(t, "promoted", func() error { _, err := client.MemberPromote(ctx, ID(learner.name)); return err })
	if list, err = client.MemberList(ctx); err != nil || list.Members[1].IsLearner {
		t.Errorf("%v, %v", list, err)
	}
}

func TestMoveLeader(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	old, next := c.leader(), c.follower()
	if _, err := c.client(next.endpoint).MoveLeader(ctx, ID(next.name)); !errors.Is(err, rpctypes.ErrNotLeader) {
		t.Errorf("moved by a follower: %v", err)
	}
	client := c.client(old.endpoint)
	if _, err := client.MoveLeader(ctx, 5); !errors.Is(err, rpctypes.ErrBadLeaderTransferee) {
		t.Errorf("moved to nobody: %v", err)
	}
	if _, err := client.MoveLeader(ctx, ID(old.name)); err != nil {
		t.Errorf("moved to itself: %v", err)
	}
	if _, err := client.MoveLeader(ctx, ID(next.name)); err != nil {
		t.Fatal(err)
	}
	status, err := client.Status(ctx, old.endpoint)
	if err != nil || status.Leader != ID(next.name) {
		t.Errorf("%v, %v", status, err)
	}
	if _, err := client.Put(ctx, "k", "v"); err != nil {
		t.Error(err)
	}
}
