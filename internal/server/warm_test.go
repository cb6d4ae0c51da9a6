package server

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/prototext"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/scheduler"
)

// A server that may have to lead next knows what one would that reads the whole
// state: its picture, followed from event to event, is the same.
func TestFollowersKeepThePictureWarm(t *testing.T) {
	c := newTestCluster(t)
	s1 := c.init("s1")
	c.voters(s1, 1)
	servers := []*testHost{s1, c.join(pb.Role_ROLE_SERVER, "s2"), c.join(pb.Role_ROLE_SERVER, "s3")}
	for _, s := range servers {
		c.voters(s, 3)
	}
	fleet := c.fleetOf(6, servers...)
	client := c.workloads(s1)
	apply := func(id string, replicas int32) {
		t.Helper()
		if _, err := client.ApplyWorkload(t.Context(), &pb.ApplyWorkloadRequest{Spec: smallProcess(id, replicas)}); err != nil {
			t.Fatal(err)
		}
		c.eventually(fmt.Sprintf("%d of %s run", replicas, id), func() error {
			if n := running(s1.replica.Load(), id); n != int(replicas) {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
	}
	for n := range 5 {
		apply(fmt.Sprintf("w%d", n), 40)
	}
	apply("w0", 60)
	apply("w1", 3)
	if _, err := client.DeleteWorkload(t.Context(), &pb.DeleteWorkloadRequest{Id: "w2"}); err != nil {
		t.Fatal(err)
	}
	fleet.agents[0].stop()
	c.nodeState(s1, fleet.agents[0].name, pb.NodeState_NOT_READY)
	apply("w3", 50)

	for _, s := range servers {
		c.eventually("the picture of "+s.config.Name+" is the state's", func() error { return warm(s.replica.Load()) })
	}
}

// warm compares what a server's picture says with what one says that is built
// anew from the same state.
func warm(r *replica) error {
	r.picture.mu.Lock()
	defer r.picture.mu.Unlock()
	v := r.store.View()
	own := r.picture.current
	if own.Revision() != v.Revision() {
		return fmt.Errorf("it is at revision %d of %d", own.Revision(), v.Revision())
	}
	fresh, err := scheduler.Build(v.Scan(""), v.Revision())
	if err != nil {
		return err
	}
	now := time.Now()
	if got, want := said(own, v, now), said(fresh, v, now); !slices.Equal(got, want) {
		for i := range min(len(got), len(want)) {
			if got[i] != want[i] {
				return fmt.Errorf("it says %s; built anew, %s", got[i], want[i])
			}
		}
		return fmt.Errorf("it says %d things; built anew, %d", len(got), len(want))
	}
	return nil
}

// said is all that others ask a picture: what is where, why, and what is to be
// done.
func said(p *scheduler.Picture, v *fsm.View, now time.Time) []string {
	var all []string
	for _, id := range nodeIDs(v) {
		for what, keys := range map[string][]*pb.ReplicaKey{"assigned": p.AssignedTo(id), "recorded": p.RecordedOn(id)} {
			for _, k := range keys {
				all = append(all, fmt.Sprintf("%s to %s: %s/%d at %d", what, id, k.WorkloadId, k.Replica, k.Generation))
			}
		}
	}
	for kv := range v.Scan(model.WorkloadsPrefix) {
		if id, sub, ok := model.SplitKey(model.WorkloadsPrefix, string(kv.Key)); ok && sub == "" {
			why, _ := p.Explain(id)
			all = append(all, prototext.Format(why))
		}
	}
	slices.Sort(all)
	for _, s := range scheduler.Decide(p, now, scheduler.Options{}).Steps {
		all = append(all, prototext.Format(s.Txn))
	}
	return all
}
