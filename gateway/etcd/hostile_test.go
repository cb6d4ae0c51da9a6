package etcd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/persys-dev/persys/proto/etcd/v3electionpb"
	"github.com/persys-dev/persys/proto/etcd/v3lockpb"
)

// methods is all that a client can call, by name.
func methods() []protoreflect.MethodDescriptor {
	var all []protoreflect.MethodDescriptor
	for _, file := range []protoreflect.FileDescriptor{etcdpb.File_rpc_proto, v3lockpb.File_v3lock_proto, v3electionpb.File_v3election_proto} {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				all = append(all, service.Methods().Get(j))
			}
		}
	}
	return all
}

// waits are the calls that take as long as the caller likes.
func waits(m protoreflect.MethodDescriptor) bool {
	return m.IsStreamingClient() || slices.Contains([]protoreflect.Name{"Lock", "Campaign", "Observe"}, m.Name())
}

// raw sends requests as they are on the wire, and takes answers so.
type raw struct{}

func (raw) Name() string                    { return "proto" }
func (raw) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (raw) Unmarshal(b []byte, v any) error { *v.(*[]byte) = b; return nil }

// hostile makes messages of odd values.
type hostile struct{ *rand.Rand }

func pick[T any](h hostile, from ...T) T { return from[h.IntN(len(from))] }

func (h hostile) message(d protoreflect.MessageDescriptor, depth int) protoreflect.Message {
	m := dynamicpb.NewMessage(d)
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		if f.Message() != nil && depth == 0 || h.IntN(3) == 0 {
			continue
		}
		if !f.IsList() {
			m.Set(f, h.value(f, depth))
			continue
		}
		list := m.Mutable(f).List()
		for range h.IntN(4) {
			list.Append(h.value(f, depth))
		}
	}
	return m
}

func (h hostile) value(f protoreflect.FieldDescriptor, depth int) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(h.IntN(2) == 0)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(pick(h, 0, 1, 2, 3, 4, -1, 99, math.MinInt32, protoreflect.EnumNumber(math.MaxInt32)))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(pick(h, 0, 1, -1, math.MinInt32, int32(math.MaxInt32)))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(pick(h, 0, 1, uint32(math.MaxUint32)))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(pick(h, 0, 1, 2, 3, 5, -1, math.MinInt64, math.MinInt64+1, math.MaxInt64-1, int64(math.MaxInt64)))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(pick(h, 0, 1, uint64(math.MaxUint64)))
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(pick(h, "", "root", "u", "/", "\x00", "http://x:1", strings.Repeat("n", 100)))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(pick(h, "", "\x00", "a", "b", "b/5", "\xff", "/", "0", "//", "/nodes", "/nodes/", "/nodes/n", "/nodes/n/lease", "/nodes/n/x/y",
			"/workloads/w", "/workloads/w/status", "/workloads/", "/workloads0", "/events/", "/tokens/t", "/system/", "/system/auth/", "/system/auth/users/root", "/system/alarms/x",
			"/system0", `{"spec":{}}`, "{}", strings.Repeat("k", 300))))
	case protoreflect.MessageKind:
		return protoreflect.ValueOfMessage(h.message(f.Message(), depth-1))
	}
	panic("no value of the kind " + f.Kind().String())
}

// rawCaller is a way to call a replica.
type rawCaller struct {
	conn *grpc.ClientConn
	root *clientv3.Client
	// Of users, by the name that a call gives.
	tokens []string
}

func newRawCaller(t testing.TB, auth bool) rawCaller {
	c := newCluster(t, 1, quick)
	client := c.client()
	r := rawCaller{root: client, tokens: []string{"", "not.a.token"}}
	if auth {
		addUser(t, client, "u", "rw a c", "r /nodes/ /nodes0", "w /workloads/ /workloads0")
		r.root = c.enableAuth(client)
		r.tokens = append(r.tokens, tokenOfUser(t, r.root, "root"), tokenOfUser(t, r.root, "u"))
	}
	var err error
	r.conn, err = grpc.NewClient(c.leader().endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	ok(t, err)
	t.Cleanup(func() { r.conn.Close() })
	return r
}

// call sends the request and returns how the call ended.
func (r rawCaller) call(t testing.TB, m protoreflect.MethodDescriptor, who int, request []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if waits(m) {
		stop := time.AfterFunc(20*time.Millisecond, cancel)
		defer stop.Stop()
	}
	if token := r.tokens[who%len(r.tokens)]; token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "token", token)
	}
	desc := &grpc.StreamDesc{ServerStreams: m.IsStreamingServer(), ClientStreams: m.IsStreamingClient()}
	stream, err := r.conn.NewStream(ctx, desc, fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name()), grpc.ForceCodec(raw{}))
	if err != nil {
		return err
	}
	if err := stream.SendMsg(&request); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if m.IsStreamingClient() { // the same once more, as who tries again does
		_ = stream.SendMsg(&request)
	}
	ok(t, stream.CloseSend())
	for {
		var answer []byte
		if err := stream.RecvMsg(&answer); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// unexpected reports an end of a call that no request may lead to.
func unexpected(m protoreflect.MethodDescriptor, err error) bool {
	switch s := status.Convert(err); s.Code() {
	case codes.Internal:
		return !strings.HasPrefix(s.Message(), "grpc: ")
	case codes.Unavailable:
		return !strings.HasPrefix(s.Message(), "etcdserver: ")
	case codes.Unknown:
		return !slices.ContainsFunc([]string{"auth: ", "election: ", "mutex: ", `"leader" field`}, func(p string) bool { return strings.HasPrefix(s.Message(), p) })
	case codes.DeadlineExceeded:
		return true
	case codes.Canceled:
		return !waits(m)
	case codes.Unimplemented, codes.DataLoss:
		return true
	}
	return false
}

// Whatever is sent, and whoever sends it, is answered with a status.
func FuzzRequests(f *testing.F) {
	all := methods()
	for i, m := range all {
		for seed := range 24 {
			h := hostile{rand.New(rand.NewPCG(uint64(i), uint64(seed)))}
			request, err := proto.Marshal(h.message(m.Input(), 4).Interface())
			ok(f, err)
			f.Add(uint8(i), uint8(seed), request)
		}
	}
	f.Add(uint8(0), uint8(0), []byte("\x0a\xff"))
	open, closed := newRawCaller(f, false), newRawCaller(f, true)
	f.Fuzz(func(t *testing.T, method, who uint8, request []byte) {
		m := all[int(method)%len(all)]
		for _, r := range []rawCaller{open, closed} {
			if err := r.call(t, m, int(who), request); unexpected(m, err) {
				t.Errorf("%s, caller %d, %x: %v", m.FullName(), who, request, err)
			}
			if m.Name() == "Alarm" { // with one raised all the rest would be refused
				_, _ = r.root.AlarmDisarm(within(t, patience), &clientv3.AlarmMember{})
			}
		}
	})
}

// What JSON can say and the wire cannot.
func TestHostileJSON(t *testing.T) {
	c := newCluster(t, 1, nil)
	url := httpServer(t, c.leader())
	for path, bodies := range map[string][]string{
		"/v3/kv/txn": {
			`null`, `[]`, `{"success":[null]}`, `{"success":[{}]}`, `{"success":[{"request_put":null}]}`, `{"compare":[null]}`, `{"compare":[{}]}`,
			`{"success":[{"request_txn":null}]}`, strings.Repeat(`{"success":[{"request_txn":`, 11_000),
		},
		"/v3/election/resign": {`{"leader":null}`},
		"/v3/auth/role/grant": {`{"name":"r","perm":null}`},
		"/v3/watch":           {`null`, `[]`, `{"create_request":[]}`},
	} {
		for _, body := range bodies {
			r, err := http.NewRequestWithContext(within(t, patience), http.MethodPost, url+path, strings.NewReader(body))
			ok(t, err)
			answer, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatalf("%s %.80s: %v", path, body, err)
			}
			answer.Body.Close()
		}
	}
	ok(t, errOf(c.client().Put(within(t, patience), "a", "b")))
}
