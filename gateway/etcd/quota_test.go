package etcd

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestQuota(t *testing.T) {
	const limit = 64 << 10
	c := newCluster(t, 3, func(cfg *Config) { cfg.QuotaBytes = limit })
	ctx := within(t, patience)
	client := c.client()
	value := strings.Repeat("v", 1000)
	n := 0
	for ; ; n++ {
		_, err := client.Put(ctx, fmt.Sprintf("key%d", n), value)
		if errors.Is(err, rpctypes.ErrNoSpace) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if n > 200 {
			t.Fatal("200 puts of 1,000 bytes fit into 64 KiB")
		}
	}
	if n < 50 {
		t.Fatalf("only %d puts of 1,000 bytes fit into 64 KiB", n)
	}
	alarms, err := client.AlarmList(ctx)
	if err != nil || len(alarms.Alarms) != 1 || alarms.Alarms[0].Alarm != etcdpb.AlarmType_NOSPACE {
		t.Fatalf("%v, %v", alarms, err)
	}
	raisedBy := alarms.Alarms[0].MemberID
	if !slices.ContainsFunc(c.replicas, func(r *replica) bool { return ID(r.name) == raisedBy }) {
		t.Errorf("raised by %x", raisedBy)
	}

	// Every replica refuses what grows, however little, and nothing else.
	for _, r := range c.replicas {
		one := c.client(r.endpoint)
		put := clientv3.OpPut("small", "")
		absent := clientv3.Compare(clientv3.Version("absent"), "=", 0)
		for name, call := range map[string]func() error{
			"put":   func() error { _, err := one.Put(ctx, "small", ""); return err },
			"txn":   func() error { _, err := one.Txn(ctx).Then(put).Commit(); return err },
			"else":  func() error { _, err := one.Txn(ctx).If(absent).Else(put).Commit(); return err },
			"lease": func() error { _, err := one.Grant(ctx, 60); return err },
			"nested": func() error {
				_, err := one.Txn(ctx).Then(clientv3.OpTxn(nil, []clientv3.Op{put}, nil)).Commit()
				return err
			},
		} {
			// The others look at the keyspace ten times a second.
			eventually(t, name+" is refused at "+r.name, func() error {
				if err := call(); !errors.Is(err, rpctypes.ErrNoSpace) {
					return fmt.Errorf("answered %w", err)
				}
				return nil
			})
		}
		if got, err := one.Get(ctx, "key0"); err != nil || len(got.Kvs) != 1 {
			t.Errorf("read at %s: %v, %v", r.name, got, err)
		}
		s, err := one.Status(ctx, r.endpoint)
		if err != nil || len(s.Errors) != 1 || !strings.Contains(s.Errors[0], "NOSPACE") || s.DbSizeQuota != limit {
			t.Errorf("status of %s: %v, %v", r.name, s, err)
		}
	}

	// Deletes and compactions make room, and the alarm stays until it is disarmed.
	deleted, err := client.Delete(ctx, "key", clientv3.WithPrefix())
	if err != nil || deleted.Deleted != int64(n) {
		t.Fatalf("%v, %v", deleted, err)
	}
	if _, err := client.Compact(ctx, deleted.Header.Revision); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(ctx, "small", ""); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("put before the alarm is disarmed: %v", err)
	}
	gone, err := client.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	if err != nil || len(gone.Alarms) != 1 || gone.Alarms[0].MemberID != raisedBy {
		t.Fatalf("%v, %v", gone, err)
	}
	for _, r := range c.replicas {
		if _, err := c.client(r.endpoint).Put(ctx, "key", value); err != nil {
			t.Errorf("put at %s after all: %v", r.name, err)
		}
	}
}

func TestAlarms(t *testing.T) {
	c := newCluster(t, 1, nil)
	ctx := within(t, patience)
	client := c.client()
	raw := etcdpb.NewMaintenanceClient(client.ActiveConnection())
	do := func(action etcdpb.AlarmRequest_AlarmAction, member uint64, alarm etcdpb.AlarmType) string {
		t.Helper()
		answer, err := raw.Alarm(ctx, &etcdpb.AlarmRequest{Action: action, MemberID: member, Alarm: alarm})
		if err != nil {
			t.Fatal(err)
		}
		if answer.Header.GetMemberId() == 0 || answer.Header.Revision == 0 {
			t.Errorf("header %v", answer.Header)
		}
		var all []string
		for _, a := range answer.Alarms {
			all = append(all, fmt.Sprintf("%d %s", a.MemberID, a.Alarm))
		}
		return strings.Join(all, ", ")
	}
	const get, on, off = etcdpb.AlarmRequest_GET, etcdpb.AlarmRequest_ACTIVATE, etcdpb.AlarmRequest_DEACTIVATE
	const none, nospace, corrupt = etcdpb.AlarmType_NONE, etcdpb.AlarmType_NOSPACE, etcdpb.AlarmType_CORRUPT
	for i, step := range []struct {
		action etcdpb.AlarmRequest_AlarmAction
		member uint64
		alarm  etcdpb.AlarmType
		want   string
	}{
		{get, 0, none, ""},
		{on, 7, none, ""},
		{off, 7, nospace, ""},
		{on, 7, nospace, "7 NOSPACE"},
		{on, 7, nospace, "7 NOSPACE"},
		{on, 9, nospace, "9 NOSPACE"},
		{on, 7, corrupt, "7 CORRUPT"},
		{get, 0, none, "7 CORRUPT, 7 NOSPACE, 9 NOSPACE"},
		{get, 9, nospace, "7 NOSPACE, 9 NOSPACE"}, // as in etcd the member does not count
		{off, 9, nospace, "9 NOSPACE"},
		{off, 7, nospace, "7 NOSPACE"},
		{get, 0, none, "7 CORRUPT"},
	} {
		if got := do(step.action, step.member, step.alarm); got != step.want {
			t.Errorf("step %d: %q, want %q", i, got, step.want)
		}
	}

	// Nobody writes into what may be corrupt.
	for name, call := range map[string]func() error{
		"put":     func() error { _, err := client.Put(ctx, "k", "v"); return err },
		"delete":  func() error { _, err := client.Delete(ctx, "k"); return err },
		"compact": func() error { _, err := client.Compact(ctx, 1); return err },
	} {
		if err := call(); !errors.Is(err, rpctypes.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	do(off, 7, corrupt)
	if _, err := client.Put(ctx, "k", "v"); err != nil {
		t.Error(err)
	}

	for _, bad := range []*etcdpb.AlarmRequest{{Alarm: 9}, {Action: 9}} {
		if _, err := raw.Alarm(ctx, bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// Without a bound nothing is refused, and an alarm still is one.
func TestNoQuota(t *testing.T) {
	q := newQuota(-1)
	c := newCluster(t, 1, nil)
	v := c.leader().store.View()
	if q.admits(1) {
		t.Error("admitted before a look")
	}
	if err := q.look(v, 1<<40); err != nil || !q.admits(1<<40) || !q.admits(0) {
		t.Errorf("%v", err)
	}
	if _, err := c.leader().etcd.setAlarm(within(t, patience), &etcdpb.AlarmMember{MemberID: 7, Alarm: etcdpb.AlarmType_NOSPACE}, true); err != nil {
		t.Fatal(err)
	}
	if err := q.look(c.leader().store.View(), 1); !errors.Is(err, rpctypes.ErrGRPCNoSpace) || q.admits(1) || !q.admits(0) {
		t.Errorf("%v", err)
	}
}

func TestGrowth(t *testing.T) {
	put := func(n int) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k"), Value: make([]byte, n-1)}}}
	}
	grant := &pb.RequestOp{Request: &pb.RequestOp_LeaseGrant{LeaseGrant: &pb.LeaseGrant{Id: 1, TtlSeconds: 1}}}
	del := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("k")}}}
	nested := &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.Txn{
		Compare: []*pb.Compare{{Key: []byte("k")}}, Success: []*pb.RequestOp{put(3)}, Failure: []*pb.RequestOp{put(5), del},
	}}}
	for want, txn := range map[int64]*pb.Txn{
		0:              {Success: []*pb.RequestOp{del, {}}},
		10:             {Success: []*pb.RequestOp{put(10)}},
		20:             {Success: []*pb.RequestOp{del}, Failure: []*pb.RequestOp{put(11), put(9)}},
		15:             {Success: []*pb.RequestOp{nested, put(10)}, Failure: []*pb.RequestOp{put(14)}},
		leaseCost + 30: {Success: []*pb.RequestOp{grant, put(30)}},
	} {
		if got := growth(txn); got != want {
			t.Errorf("%d, want %d", got, want)
		}
	}
}

func BenchmarkQuotaAdmits(b *testing.B) {
	q := newQuota(1 << 40)
	q.until.Store(1 << 62)
	q.room.Store(1 << 62)
	q.open.Store(true)
	for b.Loop() {
		if !q.admits(256) {
			b.Fatal("refused")
		}
	}
}
