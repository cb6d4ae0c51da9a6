package etcd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Ranges over a=3 b=2 c=1 d=2, of versions 1 2 3 1, made in the order d c b a.
func TestRanges(t *testing.T) {
	c := newCluster(t, 1, nil)
	client, ctx := c.client(), within(t, patience)
	first := putKey(t, client, "d", "2") // +0
	putKey(t, client, "c", "x")          // +1
	putKey(t, client, "c", "y")          // +2
	putKey(t, client, "b", "x")          // +3
	putKey(t, client, "b", "2")          // +4
	putKey(t, client, "a", "3")          // +5
	last := putKey(t, client, "c", "1")  // +6
	all := clientv3.WithRange("e")
	by := func(target clientv3.SortTarget, order clientv3.SortOrder) clientv3.OpOption {
		return clientv3.WithSort(target, order)
	}
	for name, c := range map[string]struct {
		opts  []clientv3.OpOption
		keys  string
		more  bool
		count int64
	}{
		"all":                        {nil, "a b c d", false, 4},
		"from key":                   {[]clientv3.OpOption{clientv3.WithFromKey()}, "a b c d", false, 4},
		"limit":                      {[]clientv3.OpOption{clientv3.WithLimit(2)}, "a b", true, 4},
		"limit of all":               {[]clientv3.OpOption{clientv3.WithLimit(4)}, "a b c d", false, 4},
		"end before key":             {[]clientv3.OpOption{clientv3.WithRange("A")}, "", false, 0},
		"count":                      {[]clientv3.OpOption{clientv3.WithCountOnly(), clientv3.WithLimit(1)}, "", false, 4},
		"by key, last first":         {[]clientv3.OpOption{by(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(3)}, "d c b", true, 4},
		"by value":                   {[]clientv3.OpOption{by(clientv3.SortByValue, clientv3.SortAscend)}, "c b d a", false, 4},
		"by value, keys only":        {[]clientv3.OpOption{by(clientv3.SortByValue, clientv3.SortAscend), clientv3.WithKeysOnly()}, "c b d a", false, 4},
		"by value, greatest two":     {[]clientv3.OpOption{by(clientv3.SortByValue, clientv3.SortDescend), clientv3.WithLimit(2)}, "a b", true, 4},
		"by version":                 {[]clientv3.OpOption{by(clientv3.SortByVersion, clientv3.SortDescend)}, "c b a d", false, 4},
		"by creation":                {[]clientv3.OpOption{by(clientv3.SortByCreateRevision, clientv3.SortAscend)}, "d c b a", false, 4},
		"by change":                  {[]clientv3.OpOption{by(clientv3.SortByModRevision, clientv3.SortAscend)}, "d b a c", false, 4},
		"a target without order":     {[]clientv3.OpOption{by(clientv3.SortByModRevision, clientv3.SortNone)}, "d b a c", false, 4},
		"and a limit, before it":     {[]clientv3.OpOption{by(clientv3.SortByModRevision, clientv3.SortNone), clientv3.WithLimit(2)}, "b a", true, 4},
		"changed from":               {[]clientv3.OpOption{clientv3.WithMinModRev(first + 5)}, "a c", false, 4},
		"changed up to":              {[]clientv3.OpOption{clientv3.WithMaxModRev(first + 4)}, "b d", false, 4},
		"created between":            {[]clientv3.OpOption{clientv3.WithMinCreateRev(first + 1), clientv3.WithMaxCreateRev(first + 3)}, "b c", false, 4},
		"filter, then limit":         {[]clientv3.OpOption{clientv3.WithMinModRev(first + 4), clientv3.WithLimit(1)}, "a", true, 4},
		"limit that the filter fits": {[]clientv3.OpOption{clientv3.WithMinModRev(first + 5), clientv3.WithLimit(2)}, "a c", false, 4},
		"count takes no filter":      {[]clientv3.OpOption{clientv3.WithMinModRev(first + 5), clientv3.WithCountOnly()}, "", false, 4},
		"then":                       {[]clientv3.OpOption{clientv3.WithRev(first + 3)}, "b c d", false, 3},
		"then, limited":              {[]clientv3.OpOption{clientv3.WithRev(first + 3), clientv3.WithLimit(2)}, "b c", true, 3},
		"serializable":               {[]clientv3.OpOption{clientv3.WithSerializable()}, "a b c d", false, 4},
	} {
		t.Run(name, func(t *testing.T) {
			opts := append([]clientv3.OpOption{all}, c.opts...)
			answer, err := client.Get(ctx, "a", opts...)
			if err != nil {
				t.Fatal(err)
			}
			var keys []string
			for _, kv := range answer.Kvs {
				keys = append(keys, string(kv.Key))
			}
			if got := strings.Join(keys, " "); got != c.keys || answer.More != c.more || answer.Count != c.count || answer.Header.Revision != last {
				t.Errorf("%q, more %v, count %d at %d", got, answer.More, answer.Count, answer.Header.Revision)
			}
			stream, err := client.GetStream(ctx, "a", opts...)
			if err != nil {
				t.Fatal(err)
			}
			streamed, err := clientv3.GetStreamToGetResponse(stream)
			if err != nil || !proto.Equal((*etcdpb.RangeResponse)(streamed), (*etcdpb.RangeResponse)(answer)) {
				t.Errorf("streamed: %v, %v", streamed, err)
			}
		})
	}
}

// Compares, those of nested transactions too, see what was before the transaction;
// operations see those before them.
func TestTransactions(t *testing.T) {
	c := newCluster(t, 1, nil)
	client, ctx := c.client(), within(t, patience)
	begin := putKey(t, client, "a", "1")
	answer, err := client.Txn(ctx).Then(
		clientv3.OpPut("a", "2"),
		clientv3.OpTxn(
			[]clientv3.Cmp{clientv3.Compare(clientv3.Value("a"), "=", "1"), clientv3.Compare(clientv3.ModRevision("a"), "=", begin)},
			[]clientv3.Op{clientv3.OpGet("a"), clientv3.OpGet("a", clientv3.WithRev(begin)), clientv3.OpPut("b", "3", clientv3.WithPrevKV())},
			[]clientv3.Op{clientv3.OpPut("c", "else")},
		),
		clientv3.OpDelete("b\x00", clientv3.WithFromKey()),
	).Commit()
	if err != nil {
		t.Fatal(err)
	}
	inner := answer.Responses[1].GetResponseTxn()
	if !inner.Succeeded {
		t.Fatal("the nested compare saw the put before it")
	}
	if kv := inner.Responses[0].GetResponseRange().Kvs[0]; string(kv.Value) != "2" || kv.ModRevision != begin+1 || kv.Version != 2 {
		t.Errorf("read after the put: %v", kv)
	}
	if kv := inner.Responses[1].GetResponseRange().Kvs[0]; string(kv.Value) != "1" {
		t.Errorf("read of before the put: %v", kv)
	}
	if prev := inner.Responses[2].GetResponsePut().PrevKv; prev != nil {
		t.Errorf("a new key was %v before", prev)
	}
	if answer.Header.Revision != begin+1 {
		t.Errorf("revision %d, want %d", answer.Header.Revision, begin+1)
	}
}

// Compares on a key that there is, on one that there is not, and on ranges.
func TestCompares(t *testing.T) {
	c := newCluster(t, 1, nil)
	client, ctx := c.client(), within(t, patience)
	if _, err := client.Grant(ctx, 1000); err != nil {
		t.Fatal(err)
	}
	rev := putKey(t, client, "a", "m")
	putKey(t, client, "b", "n")
	for _, c := range []struct {
		cmp  clientv3.Cmp
		want bool
	}{
		{clientv3.Compare(clientv3.Value("a"), "=", "m"), true},
		{clientv3.Compare(clientv3.Value("a"), "<", "n"), true},
		{clientv3.Compare(clientv3.Value("a"), "!=", "m"), false},
		{clientv3.Compare(clientv3.Version("a"), "=", 1), true},
		{clientv3.Compare(clientv3.CreateRevision("a"), ">", rev-1), true},
		{clientv3.Compare(clientv3.ModRevision("a"), ">", rev), false},
		{clientv3.Compare(clientv3.LeaseValue("a"), "=", 0), true},
		{clientv3.Compare(clientv3.Value("none"), "=", ""), false},
		{clientv3.Compare(clientv3.Value("none"), "!=", "x"), false},
		{clientv3.Compare(clientv3.Version("none"), "=", 0), true},
		{clientv3.Compare(clientv3.CreateRevision("none"), "=", 0), true},
		{clientv3.Compare(clientv3.ModRevision("none"), "<", 1), true},
		{clientv3.Compare(clientv3.LeaseValue("none"), "!=", 1), true},
		{clientv3.Compare(clientv3.Value("a"), ">", "l").WithRange("c"), true},
		{clientv3.Compare(clientv3.Value("a"), "<", "n").WithRange("c"), false},
		{clientv3.Compare(clientv3.Value("none").WithPrefix(), "<", "n"), false},
		{clientv3.Compare(clientv3.Version("none").WithPrefix(), "<", 1), true},
		{clientv3.Compare(clientv3.ModRevision("a"), "<", rev+2).WithRange("\x00"), true},
	} {
		read, err := client.Txn(ctx).If(c.cmp).Commit()
		if err != nil || read.Succeeded != c.want {
			t.Errorf("read only: %v: %v, %v", c.cmp, read, err)
		}
		written, err := client.Txn(ctx).If(c.cmp).Then(clientv3.OpDelete("nothing")).Else(clientv3.OpDelete("nothing")).Commit()
		if err != nil || written.Succeeded != c.want {
			t.Errorf("through the log: %v: %v, %v", c.cmp, written, err)
		}
	}
}

func TestIgnoring(t *testing.T) {
	c := newCluster(t, 1, nil)
	client, ctx := c.client(), within(t, patience)
	lease, err := client.Grant(ctx, 1000)
	if err != nil {
		t.Fatal(err)
	}
	putKey(t, client, "k", "v", clientv3.WithLease(lease.ID))
	putKey(t, client, "k", "w", clientv3.WithIgnoreLease())
	putKey(t, client, "k", "", clientv3.WithIgnoreValue(), clientv3.WithIgnoreLease())
	answer, err := client.Put(ctx, "k", "", clientv3.WithIgnoreValue(), clientv3.WithPrevKV())
	if err != nil {
		t.Fatal(err)
	}
	if prev := answer.PrevKv; string(prev.Value) != "w" || prev.Lease != int64(lease.ID) || prev.Version != 3 {
		t.Errorf("before: %v", prev)
	}
	got, err := client.Get(ctx, "k")
	if err != nil {
		t.Fatal(err)
	}
	if kv := got.Kvs[0]; string(kv.Value) != "w" || kv.Lease != 0 {
		t.Errorf("after: %v", kv)
	}
}

// countingStore counts what goes into the log, and which reads ask the cluster.
type countingStore struct {
	Store
	proposed, asked atomic.Int64
}

func (s *countingStore) Propose(ctx context.Context, txn *pb.Txn) (*pb.TxnResponse, error) {
	s.proposed.Add(1)
	return s.Store.Propose(ctx, txn)
}

func (s *countingStore) Linearizable(ctx context.Context) (*fsm.View, error) {
	s.asked.Add(1)
	return s.Store.Linearizable(ctx)
}

func TestReadsStayOutOfTheLog(t *testing.T) {
	var store *countingStore
	c := newCluster(t, 1, func(c *Config) {
		store = &countingStore{Store: c.Store}
		c.Store = store
	})
	client, ctx := c.client(), within(t, patience)
	putKey(t, client, "k", "v")
	local := clientv3.OpGet("k", clientv3.WithSerializable())
	for name, c := range map[string]struct {
		op    clientv3.Op
		asked int64
	}{
		"range":                         {clientv3.OpGet("k"), 1},
		"range at a revision":           {clientv3.OpGet("k", clientv3.WithRev(1)), 1},
		"serializable range":            {local, 0},
		"transaction":                   {clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpGet("k"), local}, nil), 1},
		"serializable":                  {clientv3.OpTxn(nil, []clientv3.Op{local, local}, nil), 0},
		"serializable in both branches": {clientv3.OpTxn(nil, []clientv3.Op{local}, []clientv3.Op{clientv3.OpGet("k")}), 1},
		"nested":                        {clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpTxn(nil, []clientv3.Op{local}, nil)}, nil), 1},
		"compares":                      {clientv3.OpTxn([]clientv3.Cmp{clientv3.Compare(clientv3.Version("k"), "=", 1)}, nil, nil), 1},
	} {
		proposed, asked := store.proposed.Load(), store.asked.Load()
		if _, err := client.Do(ctx, c.op); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := store.proposed.Load() - proposed; got != 0 {
			t.Errorf("%s: proposed %d times", name, got)
		}
		if got := store.asked.Load() - asked; got != c.asked {
			t.Errorf("%s: the cluster was asked %d times, want %d", name, got, c.asked)
		}
	}
}

// Without a majority a replica answers serializable reads, and no others.
func TestSerializableWithoutMajority(t *testing.T) {
	c := newCluster(t, 3, nil)
	last := c.follower()
	client := c.client(last.endpoint)
	putKey(t, client, "k", "v")
	for _, r := range c.replicas {
		if r != last {
			r.kill()
		}
	}
	local := clientv3.WithSerializable()
	ctx := within(t, patience)
	if answer, err := client.Get(ctx, "k", local); err != nil || len(answer.Kvs) != 1 {
		t.Errorf("serializable: %v, %v", answer, err)
	}
	if answer, err := client.Txn(ctx).Then(clientv3.OpGet("k", local)).Commit(); err != nil || len(answer.Responses) != 1 {
		t.Errorf("serializable transaction: %v, %v", answer, err)
	}
	if answer, err := client.Get(within(t, time.Second), "k"); err == nil {
		t.Errorf("linearizable: %v", answer)
	}
}

// A stream sends pieces no larger than a request may be, the last of which alone
// has a header.
func TestRangeStreamInPieces(t *testing.T) {
	const keys, most = 2*pageKeys + 10, 64 << 10
	c := newCluster(t, 1, func(c *Config) { c.MaxRequestBytes = most })
	client, ctx := c.client(), within(t, patience)
	for from := 0; from < keys; from += 100 {
		var ops []clientv3.Op
		for i := from; i < min(from+100, keys); i++ {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("k%05d", i), strings.Repeat("v", 200)))
		}
		if _, err := client.Txn(ctx).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	putKey(t, client, "k00500", strings.Repeat("v", most-100))
	then := putKey(t, client, "l", "")
	putKey(t, client, "k00600", "changed")
	kv := etcdpb.NewKVClient(dial(t, c.replicas[0].endpoint))
	for name, r := range map[string]*etcdpb.RangeRequest{
		"all":            {},
		"serializable":   {Serializable: true},
		"limited":        {Limit: pageKeys + 20},
		"limited to all": {Limit: keys},
		"a whole page":   {Limit: pageKeys},
		"before":         {Revision: then},
		"last first":     {SortOrder: etcdpb.RangeRequest_DESCEND},
		"filtered":       {MinModRevision: then - 5},
		"keys":           {KeysOnly: true},
		"count":          {CountOnly: true},
		"everything":     {Key: []byte{0}, RangeEnd: []byte{0}},
	} {
		t.Run(name, func(t *testing.T) {
			if r.Key == nil {
				r.Key, r.RangeEnd = []byte("k"), []byte("l")
			}
			want, err := kv.Range(ctx, r)
			if err != nil {
				t.Fatal(err)
			}
			stream, err := kv.RangeStream(ctx, r)
			if err != nil {
				t.Fatal(err)
			}
			whole, ended := &etcdpb.RangeResponse{}, false
			for {
				piece, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if ended {
					t.Fatal("a piece after the last")
				}
				if n := proto.Size(piece); n > most {
					t.Errorf("a piece of %d bytes", n)
				}
				ended = piece.RangeResponse.Header != nil
				proto.Merge(whole, piece.RangeResponse)
			}
			if !ended || !proto.Equal(whole, want) {
				t.Errorf("%d keys, more %v, count %d; want %d, %v, %d",
					len(whole.Kvs), whole.More, whole.Count, len(want.Kvs), want.More, want.Count)
			}
		})
	}
	if stream, err := kv.RangeStream(ctx, &etcdpb.RangeRequest{Key: []byte("k"), Revision: 1 << 40}); err == nil {
		if _, err = stream.Recv(); err == nil {
			t.Error("streamed from the future")
		}
	}
}
