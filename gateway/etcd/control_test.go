package etcd

import (
	"context"
	"errors"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/raftstore"
)

// testControl is the part of a server that membership takes, over raft alone.
type testControl struct {
	c *cluster
	r *replica
}

func (t testControl) Members(context.Context, *fsm.View) ([]*etcdpb.Member, error) {
	servers, err := t.r.store.Servers()
	if err != nil {
		return nil, rpctypes.ErrGRPCStopped
	}
	var all []*etcdpb.Member
	for _, s := range servers {
		m := &etcdpb.Member{ID: ID(s.ID), Name: s.ID, PeerURLs: []string{"http://" + s.Address}, IsLearner: !s.Voter}
		for _, r := range t.c.replicas {
			if r.name == s.ID {
				m.ClientURLs = []string{"http://" + r.endpoint}
			}
		}
		all = append(all, m)
	}
	return all, nil
}

func (t testControl) Status() Status {
	st := t.r.store.Status()
	out := Status{Term: st.Term, Commit: st.Commit, Applied: st.Applied}
	if st.Leader != "" {
		out.Leader = ID(st.Leader)
	}
	return out
}

func (t testControl) RemoveMember(ctx context.Context, m *etcdpb.Member) error {
	return t.asEtcd(t.c.leader().store.Remove(ctx, m.Name))
}

func (t testControl) PromoteMember(ctx context.Context, m *etcdpb.Member) error {
	return t.asEtcd(t.c.leader().store.Promote(ctx, m.Name))
}

func (t testControl) MoveLeader(ctx context.Context, m *etcdpb.Member) error {
	if err := t.r.store.TransferLeadership(ctx, m.Name); err != nil {
		return t.asEtcd(err)
	}
	for {
		changed := t.r.store.LeaderChanged()
		if id, _, ok := t.r.store.Leader(); ok && id == m.Name {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (t testControl) Snapshot(ctx context.Context) error { return t.r.store.Snapshot(ctx) }

func (testControl) asEtcd(err error) error {
	switch {
	case errors.Is(err, raftstore.ErrNotCaughtUp):
		return rpctypes.ErrGRPCLearnerNotReady
	case errors.Is(err, raftstore.ErrQuorum):
		return rpctypes.ErrGRPCUnhealthy
	}
	return err
}
