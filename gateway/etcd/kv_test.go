package etcd

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func TestPutIsSeenThroughAnyReplica(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	for _, r := range c.replicas {
		if _, err := c.client(r.endpoint).Put(ctx, "key", r.name); err != nil {
			t.Fatal(err)
		}
		for _, other := range c.replicas {
			answer, err := c.client(other.endpoint).Get(ctx, "key")
			if err != nil || len(answer.Kvs) != 1 || string(answer.Kvs[0].Value) != r.name {
				t.Errorf("put at %s, read at %s: %v, %v", r.name, other.name, answer, err)
			}
		}
	}
}

// Each refusal reaches the client as the error that its programs compare with.
func TestRefusedRequests(t *testing.T) {
	c := newCluster(t, 1, nil)
	client, ctx := c.client(), within(t, patience)
	puts := func(n int) []clientv3.Op {
		ops := make([]clientv3.Op, n)
		for i := range ops {
			ops[i] = clientv3.OpPut(fmt.Sprint("many/", i), "")
		}
		return ops
	}
	nest := func(ops ...clientv3.Op) clientv3.Op { return clientv3.OpTxn(nil, ops, nil) }
	compacted := putKey(t, client, "compacted", "1")
	putKey(t, client, "compacted", "2")
	if _, err := client.Compact(ctx, compacted+1); err != nil {
		t.Fatal(err)
	}
	putKey(t, client, "there", "")
	for name, c := range map[string]struct {
		op   clientv3.Op
		want error
	}{
		"range without key":         {clientv3.OpGet(""), rpctypes.ErrEmptyKey},
		"put without key":           {clientv3.OpPut("", "v"), rpctypes.ErrEmptyKey},
		"delete without key":        {clientv3.OpDelete(""), rpctypes.ErrEmptyKey},
		"compare without key":       {clientv3.OpTxn([]clientv3.Cmp{clientv3.Compare(clientv3.Version(""), "=", 0)}, nil, nil), rpctypes.ErrEmptyKey},
		"in the branch not taken":   {clientv3.OpTxn(nil, nil, []clientv3.Op{clientv3.OpPut("", "v")}), rpctypes.ErrEmptyKey},
		"value and ignore_value":    {clientv3.OpPut("there", "v", clientv3.WithIgnoreValue()), rpctypes.ErrValueProvided},
		"lease and ignore_lease":    {clientv3.OpPut("there", "", clientv3.WithLease(9), clientv3.WithIgnoreLease()), rpctypes.ErrLeaseProvided},
		"ignore_value of nothing":   {clientv3.OpPut("not there", "", clientv3.WithIgnoreValue()), rpctypes.ErrKeyNotFound},
		"ignore_lease of nothing":   {clientv3.OpPut("not there", "v", clientv3.WithIgnoreLease()), rpctypes.ErrKeyNotFound},
		"no such lease":             {clientv3.OpPut("there", "v", clientv3.WithLease(9)), rpctypes.ErrLeaseNotFound},
		"lease -1":                  {clientv3.OpPut("there", "v", clientv3.WithLease(-1)), rpctypes.ErrLeaseNotFound},
		"no such lease nor key":     {clientv3.OpPut("not there", "", clientv3.WithLease(9), clientv3.WithIgnoreValue()), rpctypes.ErrLeaseNotFound},
		"the same in a transaction": {nest(clientv3.OpPut("not there", "", clientv3.WithLease(9), clientv3.WithIgnoreValue())), rpctypes.ErrKeyNotFound},
		"129 operations":            {nest(puts(129)...), rpctypes.ErrTooManyOps},
		"128 and a nested one":      {nest(append(puts(127), nest(clientv3.OpGet("k"), clientv3.OpGet("k")))...), rpctypes.ErrTooManyOps},
		"a key put twice":           {nest(clientv3.OpPut("k", ""), clientv3.OpPut("k", "")), rpctypes.ErrDuplicateKey},
		"a key put and deleted":     {nest(clientv3.OpPut("k", ""), clientv3.OpDelete("a", clientv3.WithRange("z"))), rpctypes.ErrDuplicateKey},
		"a key put in two nested":   {nest(nest(clientv3.OpPut("k", "")), nest(clientv3.OpPut("k", ""))), rpctypes.ErrDuplicateKey},
		"range at what is gone":     {clientv3.OpGet("compacted", clientv3.WithRev(compacted)), rpctypes.ErrCompacted},
		"also in a transaction":     {nest(clientv3.OpGet("compacted", clientv3.WithRev(compacted))), rpctypes.ErrCompacted},
		"and one that writes":       {nest(clientv3.OpGet("compacted", clientv3.WithRev(compacted)), clientv3.OpPut("k", "")), rpctypes.ErrCompacted},
		"range in the future":       {clientv3.OpGet("k", clientv3.WithRev(1<<40)), rpctypes.ErrFutureRev},
		"future and serializable":   {clientv3.OpGet("k", clientv3.WithRev(1<<40), clientv3.WithSerializable()), rpctypes.ErrFutureRev},
		"the revision it will make": {nest(clientv3.OpPut("k", ""), clientv3.OpGet("k", clientv3.WithRev(1<<40))), rpctypes.ErrFutureRev},
		"a request of 1.5 MiB":      {clientv3.OpPut("k", strings.Repeat("v", 3<<19)), rpctypes.ErrRequestTooLarge},
		"a transaction of 1.5 MiB":  {nest(clientv3.OpPut("k", strings.Repeat("v", 3<<19))), rpctypes.ErrRequestTooLarge},
		"too large, and twice":      {nest(clientv3.OpPut("k", strings.Repeat("v", 3<<19)), clientv3.OpPut("k", "")), rpctypes.ErrDuplicateKey},
	} {
		t.Run(name, func(t *testing.T) {
			if answer, err := client.Do(ctx, c.op); !errors.Is(err, c.want) {
				t.Errorf("%v, %v; want %v", answer, err, c.want)
			}
		})
	}
	for rev, want := range map[int64]error{compacted: rpctypes.ErrCompacted, 1 << 40: rpctypes.ErrFutureRev, -1: rpctypes.ErrCompacted} {
		if _, err := client.Compact(ctx, rev); !errors.Is(err, want) {
			t.Errorf("compaction at %d: %v, want %v", rev, err, want)
		}
	}
}

// What no client of etcd's sends.
func TestMalformedRequests(t *testing.T) {
	c := newCluster(t, 1, nil)
	kv, ctx := etcdpb.NewKVClient(dial(t, c.replicas[0].endpoint)), within(t, patience)
	k := []byte("k")
	ask := func(r proto.Message) error {
		_, err := (&side{kv: kv}).send(ctx, r)
		return err
	}
	for name, c := range map[string]struct {
		request proto.Message
		want    error
	}{
		"order 3":        {&etcdpb.RangeRequest{Key: k, SortOrder: 3}, rpctypes.ErrGRPCInvalidSortOption},
		"target 5":       {&etcdpb.RangeRequest{Key: k, SortTarget: 5}, rpctypes.ErrGRPCInvalidSortOption},
		"no operation":   {&etcdpb.TxnRequest{Success: []*etcdpb.RequestOp{{}}}, rpctypes.ErrGRPCKeyNotFound},
		"no key at all":  {&etcdpb.TxnRequest{Compare: []*etcdpb.Compare{{}}}, rpctypes.ErrGRPCEmptyKey},
		"result 9":       {&etcdpb.TxnRequest{Compare: []*etcdpb.Compare{{Key: k, Result: 9}}}, status.Error(codes.InvalidArgument, "compare: unknown result 9")},
		"target -1":      {&etcdpb.TxnRequest{Compare: []*etcdpb.Compare{{Key: k, Target: -1}}}, status.Error(codes.InvalidArgument, "compare: unknown target -1")},
		"empty requests": {&etcdpb.PutRequest{}, rpctypes.ErrGRPCEmptyKey},
	} {
		if err := ask(c.request); err == nil || err.Error() != c.want.Error() {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if err := ask(&etcdpb.RangeRequest{Key: k, Revision: -5}); err != nil {
		t.Errorf("a revision below 0 is the newest: %v", err)
	}
}

// As large as a request may be, through a replica that does not lead.
func TestLargestRequest(t *testing.T) {
	c := newCluster(t, 3, nil)
	client, ctx := c.client(c.follower().endpoint), within(t, patience)
	// The request's tags and lengths take 7 bytes.
	value := strings.Repeat("v", 3<<19-requestOverhead-7)
	if _, err := client.Put(ctx, "k", value); err != nil {
		t.Error(err)
	}
	if _, err := client.Put(ctx, "k", value+"v"); !errors.Is(err, rpctypes.ErrRequestTooLarge) {
		t.Error(err)
	}
	if answer, err := client.Get(ctx, "k"); err != nil || len(answer.Kvs) != 1 || string(answer.Kvs[0].Value) != value {
		t.Errorf("%d keys, %v", len(answer.Kvs), err)
	}
}

// putKey gives the revision that it made.
func putKey(t testing.TB, client *clientv3.Client, key, value string, opts ...clientv3.OpOption) int64 {
	t.Helper()
	answer, err := client.Put(within(t, patience), key, value, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return answer.Header.Revision
}

// Headers are whole at the top. Inside a transaction they have the revision as it
// was after the operation, and nested transactions have an empty one.
func TestHeaders(t *testing.T) {
	c := newCluster(t, 1, nil)
	client, ctx := c.client(), within(t, patience)
	begin := putKey(t, client, "k", "")
	headers := map[string]*etcdpb.ResponseHeader{}
	get, err := client.Get(ctx, "k", clientv3.WithRev(begin))
	if err != nil {
		t.Fatal(err)
	}
	headers["get"] = get.Header
	none, err := client.Delete(ctx, "not there")
	if err != nil {
		t.Fatal(err)
	}
	headers["delete of nothing"] = none.Header
	read, err := client.Txn(ctx).Then(clientv3.OpGet("k")).Commit()
	if err != nil {
		t.Fatal(err)
	}
	headers["read in a transaction"] = read.Header
	compact, err := client.Compact(ctx, begin)
	if err != nil {
		t.Fatal(err)
	}
	headers["compact"] = compact.Header
	for name, h := range headers {
		if h.ClusterId != 1 || h.MemberId == 0 || h.Revision != begin || h.RaftTerm == 0 {
			t.Errorf("%s: %v", name, h)
		}
	}
	txn, err := client.Txn(ctx).Then(
		clientv3.OpGet("k"), clientv3.OpDelete("not there"),
		clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut("a", "")}, nil),
		clientv3.OpDelete("not there"), clientv3.OpGet("k"), clientv3.OpDelete("k"),
	).Commit()
	if err != nil {
		t.Fatal(err)
	}
	var inner []*etcdpb.ResponseHeader
	for _, r := range txn.Responses {
		switch r := r.Response.(type) {
		case *etcdpb.ResponseOp_ResponseRange:
			inner = append(inner, r.ResponseRange.Header)
		case *etcdpb.ResponseOp_ResponseDeleteRange:
			inner = append(inner, r.ResponseDeleteRange.Header)
		case *etcdpb.ResponseOp_ResponseTxn:
			inner = append(inner, r.ResponseTxn.Header, r.ResponseTxn.Responses[0].GetResponsePut().Header)
		}
	}
	for i, want := range []int64{begin, begin, 0, begin + 1, begin + 1, begin + 1, begin + 1} {
		if !proto.Equal(inner[i], &etcdpb.ResponseHeader{Revision: want}) {
			t.Errorf("header %d is %v, want revision %d alone", i, inner[i], want)
		}
	}
}
