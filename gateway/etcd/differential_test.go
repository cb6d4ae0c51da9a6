package etcd

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"pgregory.net/rapid"
)

// The same sequences of requests are sent to an etcd and to a replica of ours, and
// all answers are compared, errors included. Requests go out as messages, without
// the client's own checks and retries.
//
// Each sequence begins with all keys deleted and all before it compacted, at a
// revision that each side has for itself. Revisions in requests that are at least
// relative mean so many after that; those in answers are shown likewise.
func TestDifferential(t *testing.T) {
	theirs := startEtcd(t)
	c := newCluster(t, 1, nil)
	sides := [2]*side{newSide(t, "etcd", theirs), newSide(t, "ours", c.replicas[0].endpoint)}
	rapid.Check(t, func(t *rapid.T) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for _, s := range sides {
			s.begin(ctx, t)
		}
		g := newGenerator(t)
		for range rapid.IntRange(1, 20).Draw(t, "requests") {
			r := g.request()
			answers := [2]string{sides[0].ask(ctx, r), sides[1].ask(ctx, r)}
			if answers[0] != answers[1] && !bothRefuse(r, answers) {
				t.Fatalf("%T {%s}\netcd: %s\nours: %s", r, prototext.Format(r), answers[0], answers[1])
			}
			g.revision = sides[0].revision - sides[0].base
		}
		watched := g.watch()
		seen := [2]string{sides[0].watched(ctx, t, watched), sides[1].watched(ctx, t, watched)}
		if seen[0] != seen[1] {
			t.Fatalf("watch {%s}\netcd: %s\nours: %s", prototext.Format(watched), seen[0], seen[1])
		}
	})
}

// How operations are counted that are nested, and which refusal comes first.
func TestDifferentialLimits(t *testing.T) {
	theirs := startEtcd(t, "--max-txn-ops", "4")
	c := newCluster(t, 1, func(c *Config) { c.MaxTxnOps = 4 })
	sides := [2]*side{newSide(t, "etcd", theirs), newSide(t, "ours", c.replicas[0].endpoint)}
	rapid.Check(t, func(t *rapid.T) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for _, s := range sides {
			s.begin(ctx, t)
		}
		r := newGenerator(t).txn(0)
		if a, b := sides[0].ask(ctx, r), sides[1].ask(ctx, r); a != b && !bothRefuse(r, [2]string{a, b}) {
			t.Fatalf("{%s}\netcd: %s\nours: %s", prototext.Format(r), a, b)
		}
	})
}

// bothRefuse reports whether a transaction is refused on both sides for what its
// operations find. Of several such refusals etcd 3.4 gives the first of a put, if
// there is one; since 3.6, and here, it is the first of any operation.
func bothRefuse(r proto.Message, answers [2]string) bool {
	if _, ok := r.(*etcdpb.TxnRequest); !ok {
		return false
	}
	for _, answer := range answers {
		if !slices.ContainsFunc([]error{
			rpctypes.ErrGRPCKeyNotFound, rpctypes.ErrGRPCLeaseNotFound, rpctypes.ErrGRPCCompacted, rpctypes.ErrGRPCFutureRev,
		}, func(err error) bool { return answer == err.Error() }) {
			return false
		}
	}
	return true
}

// startEtcd runs Debian's etcd until the end of the test, and returns its address.
func startEtcd(t *testing.T, flags ...string) string {
	t.Helper()
	program, err := exec.LookPath("etcd")
	if err != nil {
		t.Skip("there is no etcd to compare with; hack/setup.sh installs it")
	}
	client, peer := freeAddress(t), freeAddress(t)
	cmd := exec.Command(program, "--data-dir", filepath.Join(t.TempDir(), "etcd"),
		"--listen-client-urls", "http://"+client, "--advertise-client-urls", "http://"+client,
		"--listen-peer-urls", "http://"+peer, "--initial-advertise-peer-urls", "http://"+peer,
		"--initial-cluster", "default=http://"+peer, "--logger", "zap", "--log-level", "fatal")
	cmd.Args = append(cmd.Args, flags...)
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() && said.Len() > 0 {
			t.Logf("etcd said: %s", said.String())
		}
	})
	kv := etcdpb.NewKVClient(dial(t, client))
	eventually(t, "etcd answers", func() error {
		_, err := kv.Range(within(t, patience), &etcdpb.RangeRequest{Key: []byte("k")})
		return err
	})
	return client
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func dial(t testing.TB, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// side is one of the two that are compared.
type side struct {
	name  string
	kv    etcdpb.KVClient
	lease etcdpb.LeaseClient
	watch etcdpb.WatchClient
	base  int64
	// Revision of the newest answer, and up to which all is forgotten.
	revision, compacted int64
}

func newSide(t testing.TB, name, address string) *side {
	conn := dial(t, address)
	return &side{
		name: name, kv: etcdpb.NewKVClient(conn), lease: etcdpb.NewLeaseClient(conn), watch: etcdpb.NewWatchClient(conn),
	}
}

type fataler interface{ Fatalf(string, ...any) }

// begin makes the side as good as new. Two changes make sure that the revision
// is past those that requests give as they are.
func (s *side) begin(ctx context.Context, t fataler) {
	all := &etcdpb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	for range 2 {
		if _, err := s.kv.Put(ctx, &etcdpb.PutRequest{Key: []byte("k")}); err != nil {
			t.Fatalf("%s: put: %v", s.name, err)
		}
		answer, err := s.kv.DeleteRange(ctx, all)
		if err != nil {
			t.Fatalf("%s: delete all: %v", s.name, err)
		}
		s.base, s.revision = answer.Header.Revision, answer.Header.Revision
	}
	if _, err := s.kv.Compact(ctx, &etcdpb.CompactionRequest{Revision: s.base, Physical: true}); err != nil {
		t.Fatalf("%s: compact: %v", s.name, err)
	}
	s.compacted = s.base
	for _, id := range someLeases {
		_, _ = s.lease.LeaseRevoke(ctx, &etcdpb.LeaseRevokeRequest{ID: id}) // if there is one
	}
}

// ask sends a request and describes the answer.
func (s *side) ask(ctx context.Context, r proto.Message) string {
	r = proto.Clone(r)
	eachRevision(r.ProtoReflect(), s.absolute)
	answer, err := s.send(ctx, r)
	if err != nil {
		return status.Convert(err).Err().Error()
	}
	if a, ok := answer.(interface {
		GetHeader() *etcdpb.ResponseHeader
	}); ok {
		s.revision = a.GetHeader().GetRevision()
	}
	s.normalise(answer.ProtoReflect())
	return prototext.MarshalOptions{Multiline: true, Indent: " "}.Format(answer)
}

func (s *side) send(ctx context.Context, r proto.Message) (proto.Message, error) {
	switch r := r.(type) {
	case *etcdpb.RangeRequest:
		return s.kv.Range(ctx, r)
	case *etcdpb.PutRequest:
		return s.kv.Put(ctx, r)
	case *etcdpb.DeleteRangeRequest:
		return s.kv.DeleteRange(ctx, r)
	case *etcdpb.TxnRequest:
		return s.kv.Txn(ctx, r)
	case *etcdpb.CompactionRequest:
		answer, err := s.kv.Compact(ctx, r)
		if err == nil {
			s.compacted = r.Revision
		}
		return answer, err
	case *etcdpb.LeaseGrantRequest:
		return s.lease.LeaseGrant(ctx, r)
	case *etcdpb.LeaseRevokeRequest:
		return s.lease.LeaseRevoke(ctx, r)
	case *etcdpb.LeaseTimeToLiveRequest:
		answer, err := s.lease.LeaseTimeToLive(ctx, r)
		if answer.GetTTL() > 0 {
			answer.TTL = answer.GrantedTTL // it was just granted
		}
		slices.SortFunc(answer.GetKeys(), bytes.Compare) // in no order at etcd
		return answer, err
	case *etcdpb.LeaseLeasesRequest:
		answer, err := s.lease.LeaseLeases(ctx, r)
		slices.SortFunc(answer.GetLeases(), func(a, b *etcdpb.LeaseStatus) int { return cmp.Compare(a.ID, b.ID) })
		return answer, err
	}
	return nil, fmt.Errorf("no way to send a %T", r)
}

// watched describes what a watch shows, up to a change that is made for its end.
func (s *side) watched(ctx context.Context, t *rapid.T, r *etcdpb.WatchCreateRequest) string {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	last := []byte("b\xff")
	if _, err := s.kv.Put(ctx, &etcdpb.PutRequest{Key: last}); err != nil {
		t.Fatalf("%s: put: %v", s.name, err)
	}
	stream, err := s.watch.Watch(ctx)
	if err != nil {
		t.Fatalf("%s: watch: %v", s.name, err)
	}
	r = proto.CloneOf(r)
	eachRevision(r.ProtoReflect(), s.absolute)
	err = stream.Send(&etcdpb.WatchRequest{RequestUnion: &etcdpb.WatchRequest_CreateRequest{CreateRequest: r}})
	if err != nil {
		t.Fatalf("%s: watch: %v", s.name, err)
	}
	// In how many answers the events come is left to each side.
	whole := &etcdpb.WatchResponse{}
	for {
		answer, err := stream.Recv()
		if err != nil {
			t.Fatalf("%s: watch: %v", s.name, err)
		}
		proto.Merge(whole, answer)
		n := len(whole.Events)
		if answer.Canceled || n > 0 && bytes.Equal(whole.Events[n-1].Kv.Key, last) {
			break
		}
	}
	// Before 3.4.34 etcd forgets a delete at the revision that is compacted; later ones
	// keep it for watches from there on.
	whole.Events = slices.DeleteFunc(whole.Events, func(e *mvccpb.Event) bool {
		return e.Type == mvccpb.DELETE && e.Kv.ModRevision == s.compacted
	})
	s.normalise(whole.ProtoReflect())
	return prototext.Format(whole)
}

// relative and more in a request is a revision of the sequence.
const relative = 1 << 40

func (s *side) absolute(rev int64) int64 {
	if rev >= relative {
		return rev - relative + s.base
	}
	return rev
}

// eachRevision changes all revisions in a message.
func eachRevision(m protoreflect.Message, change func(int64) int64) {
	eachField(m, func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
		if strings.HasSuffix(string(f.Name()), "revision") {
			m.Set(f, protoreflect.ValueOfInt64(change(m.Get(f).Int())))
		}
	})
}

// normalise takes out of an answer what the sides may have of their own.
func (s *side) normalise(m protoreflect.Message) {
	eachRevision(m, func(rev int64) int64 {
		if rev > 0 {
			return rev - s.base + relative
		}
		return rev
	})
	eachField(m, func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
		switch f.Name() {
		case "cluster_id", "member_id", "raft_term":
			m.Set(f, protoreflect.ValueOfUint64(1))
		}
	})
}

// eachField visits the fields that are set, those of inner messages too.
func eachField(m protoreflect.Message, visit func(protoreflect.Message, protoreflect.FieldDescriptor)) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				eachField(v.List().Get(i).Message(), visit)
			}
		case f.Message() != nil:
			eachField(v.Message(), visit)
		default:
			visit(m, f)
		}
		return true
	})
}
