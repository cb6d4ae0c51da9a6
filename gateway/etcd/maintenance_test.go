package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/api/v3/version"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
)

func TestStatus(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	client := c.client()
	if _, err := client.Put(ctx, "key", "value"); err != nil {
		t.Fatal(err)
	}
	leader := c.leader()
	for _, r := range c.replicas {
		eventually(t, "the status of "+r.name, func() error {
			s, err := client.Status(ctx, r.endpoint)
			if err != nil {
				return err
			}
			v := r.store.View()
			if s.Header.MemberId != ID(r.name) || s.Leader != ID(leader.name) || s.IsLearner || s.RaftTerm == 0 || s.RaftTerm != s.Header.RaftTerm ||
				s.RaftIndex < s.RaftAppliedIndex || s.RaftAppliedIndex < v.Index() || s.Header.Revision != v.Revision() ||
				s.DbSize != v.Bytes() || s.DbSizeInUse != v.Bytes() || s.DbSize == 0 || s.DbSizeQuota != defaultQuotaBytes ||
				s.Version != version.Version || s.StorageVersion != "3.7.0" || s.DowngradeInfo.GetEnabled() || len(s.Errors) != 0 {
				return fmt.Errorf("%v", s)
			}
			return nil
		})
	}
	for _, r := range c.replicas[1:] {
		r.kill()
	}
	eventually(t, "the status of one that is alone", func() error {
		s, err := client.Status(ctx, c.replicas[0].endpoint)
		if err == nil && (s.Leader != 0 || len(s.Errors) != 1 || s.Errors[0] != "etcdserver: no leader") {
			err = fmt.Errorf("%v", s)
		}
		return err
	})
}

// hashes asks all replicas for their hash at a revision, and wants one answer.
func (c *cluster) hash(ctx context.Context, client *clientv3.Client, revision int64) uint32 {
	c.t.Helper()
	var first *clientv3.HashKVResponse
	for _, r := range c.replicas {
		answer, err := client.HashKV(ctx, r.endpoint, revision)
		if err != nil {
			c.t.Fatalf("%s: %v", r.name, err)
		}
		if answer.HashRevision != revision || answer.Header.Revision < revision || answer.Header.MemberId != ID(r.name) {
			c.t.Errorf("%s: %v", r.name, answer)
		}
		if first == nil {
			first = answer
		}
		if answer.Hash != first.Hash || answer.CompactRevision != first.CompactRevision {
			c.t.Errorf("%s: %v, %s: %v", c.replicas[0].name, first, r.name, answer)
		}
	}
	return first.Hash
}

func TestHashKV(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	client := c.client()
	writing, stop := context.WithCancel(ctx)
	defer stop()
	acknowledged := make(chan int64, 1<<16)
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			for n := 0; writing.Err() == nil; n++ {
				answer, err := client.Put(writing, fmt.Sprintf("k%d", (i+n)%7), fmt.Sprint(i, n))
				if err != nil {
					continue
				}
				acknowledged <- answer.Header.Revision
				if n%5 == 0 {
					_, _ = client.Delete(writing, fmt.Sprintf("k%d", n%7))
				}
			}
		})
	}
	for range 20 {
		c.hash(ctx, client, <-acknowledged)
	}
	stop()
	writers.Wait()

	status, err := client.Status(ctx, c.leader().endpoint)
	if err != nil {
		t.Fatal(err)
	}
	at := status.Header.Revision
	before := c.hash(ctx, client, at)
	// One replica starts anew from a snapshot.
	again := c.follower()
	if _, err := client.Defragment(ctx, again.endpoint); err != nil {
		t.Fatal(err)
	}
	again.kill()
	if _, err := client.Put(ctx, "k1", "later"); err != nil {
		t.Fatal(err)
	}
	again.start(c, false)
	eventually(t, "it answers", func() error { _, err := client.HashKV(ctx, again.endpoint, at); return err })
	if after := c.hash(ctx, client, at); after != before {
		t.Errorf("%x before, %x after", before, after)
	}
	if _, err := client.HashKV(ctx, again.endpoint, at+1000); !errors.Is(err, rpctypes.ErrFutureRev) {
		t.Errorf("in the future: %v", err)
	}
	if _, err := client.Compact(ctx, at); err != nil {
		t.Fatal(err)
	}
	c.hash(ctx, client, at)
	if _, err := client.HashKV(ctx, again.endpoint, at-1); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("in the compacted past: %v", err)
	}
	newest, err := client.HashKV(ctx, again.endpoint, 0)
	if err != nil || newest.HashRevision != newest.Header.Revision || newest.CompactRevision != at {
		t.Errorf("%v, %v", newest, err)
	}
}

func TestSnapshotWhileWritesGoOn(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	writer, client := c.client(), c.client(c.follower().endpoint)
	for i := range 200 { // more than one message
		if _, err := writer.Put(ctx, fmt.Sprintf("large%d", i), string(bytes.Repeat([]byte{byte(i)}, 8<<10))); err != nil {
			t.Fatal(err)
		}
	}
	writing, stop := context.WithCancel(ctx)
	defer stop()
	last := make(chan int, 1<<20)
	var wait sync.WaitGroup
	wait.Go(func() {
		for n := 0; ; n++ {
			if _, err := writer.Put(writing, "counter", fmt.Sprint(n)); err != nil {
				return
			}
			last <- n
		}
	})
	for range 5 {
		n := <-last
		for len(last) > 0 {
			n = <-last
		}
		answer, err := client.SnapshotWithVersion(ctx)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(answer.Snapshot)
		if err != nil {
			t.Fatal(err)
		}
		s, err := fsm.Restore(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		v := s.View()
		kv, _ := v.Get("counter")
		var saved int
		if _, err := fmt.Sscan(string(kv.GetValue()), &saved); err != nil || saved < n {
			t.Errorf("%q was saved after %d was acknowledged", kv.GetValue(), n)
		}
		if v.Revision() != answer.Header.Revision || answer.Version != "3.7.0" || v.Len() < 201 {
			t.Errorf("revision %d with %d keys is said to be %v", v.Revision(), v.Len(), answer)
		}
	}
	stop()
	wait.Wait()
}

func TestSnapshotSaysHowMuchIsToCome(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	client := c.client(c.leader().endpoint)
	if _, err := client.Put(ctx, "key", string(make([]byte, 1<<20))); err != nil {
		t.Fatal(err)
	}
	stream, err := etcdpb.NewMaintenanceClient(client.ActiveConnection()).Snapshot(ctx, &etcdpb.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var remaining []uint64
	var sizes []int
	for {
		m, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		remaining, sizes = append(remaining, m.RemainingBytes), append(sizes, len(m.Blob))
	}
	total := uint64(0)
	for i := len(sizes) - 1; i >= 0; i-- {
		if remaining[i] != total {
			t.Errorf("message %d of %d says that %d bytes are to come, not %d", i, len(sizes), remaining[i], total)
		}
		total += uint64(sizes[i])
	}
	if len(sizes) < 4 || slices.Max(sizes) > snapshotPiece || total%512 != 32 {
		t.Errorf("%d messages, %d bytes", len(sizes), total)
	}
}

// A replica without a leader is still saved and looked at.
func TestMaintenanceWithoutALeader(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	left := c.follower()
	client := c.client(left.endpoint)
	if _, err := client.Put(ctx, "key", "value"); err != nil {
		t.Fatal(err)
	}
	for _, r := range c.replicas {
		if r != left {
			r.kill()
		}
	}
	eventually(t, "it knows no leader", func() error {
		if id, _, ok := left.store.Leader(); ok {
			return errors.New(id)
		}
		return nil
	})
	body, err := client.Snapshot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s, err := fsm.Restore(body)
	if err != nil {
		t.Fatal(err)
	}
	if kv, ok := s.View().Get("key"); !ok || string(kv.Value) != "value" {
		t.Errorf("%v", kv)
	}
	if _, err := client.HashKV(ctx, left.endpoint, 0); err != nil {
		t.Error(err)
	}
	if list, err := client.MemberList(ctx, clientv3.WithSerializable()); err != nil || len(list.Members) != 3 {
		t.Errorf("%v, %v", list, err)
	}
}

func TestHashIsEqualWhereTheStateIs(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	if _, err := c.client().Put(ctx, "key", "value"); err != nil {
		t.Fatal(err)
	}
	seen := map[uint32]bool{}
	for _, r := range c.replicas {
		answer, err := etcdpb.NewMaintenanceClient(c.client(r.endpoint).ActiveConnection()).Hash(ctx, &etcdpb.HashRequest{})
		if err != nil {
			t.Fatal(err)
		}
		seen[answer.Hash] = true
	}
	if len(seen) != 1 {
		t.Errorf("%v", seen)
	}
}

func TestDowngradeIsRefused(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	client := c.client(c.leader().endpoint)
	for _, action := range []clientv3.DowngradeAction{clientv3.DowngradeValidate, clientv3.DowngradeEnable} {
		if _, err := client.Downgrade(ctx, action, "3.6.0"); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%v: %v", action, err)
		}
	}
	if _, err := client.Downgrade(ctx, clientv3.DowngradeCancel, ""); !errors.Is(err, rpctypes.ErrNoInflightDowngrade) {
		t.Errorf("%v", err)
	}
}
