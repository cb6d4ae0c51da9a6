package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/gateway"
	"github.com/persys-dev/persys/gateway/etcd"
	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// asEtcd is the cluster's membership as a host tells it to etcd's clients.
func (c *testCluster) asEtcd(h *testHost) (etcdControl, []*etcdpb.Member) {
	c.t.Helper()
	control := etcdControl{h.replica.Load()}
	v, err := control.store.Linearizable(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	all, err := control.Members(c.t.Context(), v)
	if err != nil {
		c.t.Fatal(err)
	}
	return control, all
}

func named(all []*etcdpb.Member, name string) *etcdpb.Member {
	i := slices.IndexFunc(all, func(m *etcdpb.Member) bool { return m.Name == name })
	if i < 0 {
		return nil
	}
	return all[i]
}

func TestEtcdMembership(t *testing.T) {
	c := newTestCluster(t)
	s1 := c.init("s1")
	c.voters(s1, 1)
	c.eventually("s1 is enrolled", func() error {
		if _, all := c.asEtcd(s1); len(all) != 1 {
			return fmt.Errorf("%v", all)
		}
		return nil
	})
	control, all := c.asEtcd(s1)
	if err := control.RemoveMember(t.Context(), all[0]); !errors.Is(err, rpctypes.ErrGRPCMemberNotEnoughStarted) {
		t.Errorf("the only server was removed: %v", err)
	}

	s2, s3 := c.join(pb.Role_ROLE_SERVER, "s2"), c.join(pb.Role_ROLE_SERVER, "s3")
	c.voters(s1, 3)
	c.voters(s2, 3)
	c.voters(s3, 3)
	s4 := c.join(pb.Role_ROLE_SERVER, "s4")
	for _, h := range []*testHost{s1, s2, s3} {
		c.eventually("four servers, as "+h.config.Name+" tells it", func() error {
			if _, all := c.asEtcd(h); len(all) != 4 {
				return fmt.Errorf("%v", all)
			}
			return nil
		})
		control, all := c.asEtcd(h)
		for _, m := range all {
			grpcURL := "https://" + map[string]*testHost{"s1": s1, "s2": s2, "s3": s3, "s4": s4}[m.Name].config.grpcAddress()
			if m.IsLearner != (m.Name == "s4") || !slices.Equal(m.PeerURLs, []string{grpcURL}) || !slices.Equal(m.ClientURLs, []string{grpcURL}) {
				t.Errorf("%s: %v", h.config.Name, m)
			}
		}
		if s := control.Status(); s.Leader == 0 || s.Applied == 0 || s.Commit < s.Applied || s.Term == 0 || s.Errors != nil {
			t.Errorf("%s: %+v", h.config.Name, s)
		}
	}

	t.Log("a learner that is down can't vote; one that keeps up can")
	control, all = c.asEtcd(s2)
	c.stop(s4)
	if err := control.PromoteMember(t.Context(), named(all, "s4")); !errors.Is(err, rpctypes.ErrGRPCLearnerNotReady) {
		t.Errorf("%v", err)
	}
	c.start(s4)
	c.eventually("s4 is promoted", func() error { return control.PromoteMember(t.Context(), named(all, "s4")) })
	if _, all = c.asEtcd(s2); named(all, "s4").IsLearner {
		t.Errorf("%v", all)
	}

	t.Log("the leader is moved, removed, and so is a follower")
	// On a busy machine another one may come to lead at any time.
	c.eventually("s3 is made the leader, by the leader alone", func() error {
		s3 := named(all, "s3")
		var err error
		for _, h := range []*testHost{s1, s2, s4} {
			by, _ := c.asEtcd(h)
			if by.Status().Leader == s3.ID {
				return nil
			}
			leads := h.replica.Load().store.IsLeader()
			moved := by.MoveLeader(t.Context(), s3)
			if !leads && !errors.Is(moved, rpctypes.ErrGRPCNotLeader) && !h.replica.Load().store.IsLeader() {
				t.Errorf("moved by %s, a follower: %v", h.config.Name, moved)
			}
			err = errors.Join(err, moved)
		}
		return cmp.Or(err, errors.New("not yet known to all"))
	})
	for _, name := range []string{"s3", "s4"} {
		c.eventually(name+" is removed", func() error {
			if err := control.RemoveMember(t.Context(), named(all, name)); !errors.Is(err, rpctypes.ErrGRPCMemberNotFound) {
				return err
			}
			return nil
		})
		if err := control.RemoveMember(t.Context(), named(all, name)); !errors.Is(err, rpctypes.ErrGRPCMemberNotFound) {
			t.Errorf("%s twice: %v", name, err)
		}
	}
	if _, left := c.asEtcd(s2); len(left) != 2 || named(left, "s1") == nil || named(left, "s2") == nil {
		t.Errorf("%v", left)
	}
	if err := control.Snapshot(t.Context()); err != nil {
		t.Error(err)
	}
}

// Who has no certificate of the cluster is sent to the port for etcd's clients.
func TestEtcdClientURLs(t *testing.T) {
	c := newTestCluster(t)
	s1 := c.init("s1")
	c.voters(s1, 1)
	control := etcdControl{s1.replica.Load()}
	s := fsm.New()
	txn := &pb.Txn{Success: []*pb.RequestOp{
		model.Put(model.MemberKey("a.1"), &pb.Member{Id: "a.1", Name: "a", GrpcAddress: "10.0.0.1:7481", HttpsAddress: "10.0.0.1:7480", EtcdUrl: "http://127.0.0.1:2379"}, 0),
		model.Put(model.MemberKey("b.2"), &pb.Member{Id: "b.2", Name: "b", GrpcAddress: "10.0.0.2:7481"}, 0),
		model.Put(model.MemberKey("c.3"), &pb.Member{Id: "c.3", Name: "c", GrpcAddress: "10.0.0.3:7481", Removed: true}, 0),
	}}
	if _, _, err := s.Apply(1, &pb.Entry{FeatureLevel: fsm.FeatureLevel, Txns: []*pb.Txn{txn}}); err != nil {
		t.Fatal(err)
	}
	all, err := control.Members(t.Context(), s.View())
	if err != nil || len(all) != 2 || all[0].ID != etcd.ID("a.1") || all[0].ClientURLs[0] != "http://127.0.0.1:2379" || all[1].ClientURLs[0] != "https://10.0.0.2:7481" {
		t.Errorf("%v, %v", all, err)
	}
	certified := gateway.WithIdentity(t.Context(), pki.Identity{Name: "admin", Role: pb.Role_ROLE_ADMIN})
	if all, err = control.Members(certified, s.View()); err != nil || len(all) != 2 || all[0].ClientURLs[0] != "https://10.0.0.1:7481" {
		t.Errorf("%v, %v", all, err)
	}
	overHTTPS := context.WithValue(certified, overHTTPS{}, true)
	if all, err = control.Members(overHTTPS, s.View()); err != nil || len(all) != 2 || all[0].ClientURLs[0] != "https://10.0.0.1:7480" {
		t.Errorf("%v, %v", all, err)
	}
}
