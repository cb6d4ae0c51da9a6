package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// memory is a store of one replica that applies at once.
type memory struct {
	mu      sync.Mutex
	fsm     *fsm.Store
	index   uint64
	changed chan struct{}
	// before runs before each proposal: somebody else who is quicker.
	before func(*pb.Txn)
	// down is what every call answers with, if set.
	down error
}

func newMemory() *memory { return &memory{fsm: fsm.New(), changed: make(chan struct{})} }

func (s *memory) View() *fsm.View { return s.fsm.View() }

func (s *memory) Linearizable(ctx context.Context) (*fsm.View, error) {
	if s.down != nil {
		return nil, s.down
	}
	return s.View(), ctx.Err()
}

func (s *memory) Propose(_ context.Context, txn *pb.Txn) (*pb.TxnResponse, error) {
	if s.before != nil {
		s.before(txn)
	}
	if s.down != nil {
		return nil, s.down
	}
	return s.apply(txn)
}

func (s *memory) apply(txn *pb.Txn) (*pb.TxnResponse, error) {
	if err := fsm.ValidateTxn(txn); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index++
	results, _, err := s.fsm.Apply(s.index, &pb.Entry{FeatureLevel: fsm.FeatureLevel, TimeUnixNano: time.Now().UnixNano(), Txns: []*pb.Txn{txn}})
	if err != nil {
		return nil, err
	}
	close(s.changed)
	s.changed = make(chan struct{})
	if r := results[0]; r.Error != pb.TxnError_TXN_ERROR_NONE {
		return nil, &fsm.Error{Code: r.Error, Message: r.Message}
	}
	return proto.CloneOf(results[0].Response), nil
}

func (s *memory) Watch(key, end []byte, after int64) Watcher {
	return &memoryWatcher{s, string(key), string(end), after}
}

type memoryWatcher struct {
	s        *memory
	key, end string
	after    int64
}

func (w *memoryWatcher) Next(ctx context.Context) ([]*pb.KeyEvent, int64, error) {
	for {
		w.s.mu.Lock()
		changed := w.s.changed
		w.s.mu.Unlock()
		all, upTo, err := w.s.View().Events(w.after, 0)
		if err != nil {
			return nil, 0, err
		}
		w.after = upTo
		var events []*pb.KeyEvent
		for _, e := range all {
			if k := string(e.Kv.Key); k >= w.key && k < w.end {
				events = append(events, e)
			}
		}
		if len(events) > 0 {
			return events, upTo, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

// controlled is a server with one member, whose logs are what the test says.
type controlled struct {
	changes []string
	lines   map[string][]string // by node
}

func (c *controlled) Members(context.Context) (*pb.ListMembersResponse, error) {
	return &pb.ListMembersResponse{Members: []*pb.Member{{Name: "s1", Voter: true, Leader: true}, {Name: "s2", Voter: true}, {Name: "s3", Voter: true}}, FailureTolerance: 1}, nil
}

func (c *controlled) ChangeMember(_ context.Context, r *pb.ChangeMemberRequest) error {
	if r.Name == "s9" {
		return status.Error(codes.NotFound, `there is no server "s9"`)
	}
	c.changes = append(c.changes, fmt.Sprintf("%s %s", r.Change, r.Name))
	return nil
}

func (c *controlled) Plan(_ context.Context, _ *fsm.View, workload string, txn *pb.Txn) (*pb.WorkloadPlan, error) {
	plan := &pb.WorkloadPlan{Unchanged: 1}
	if txn != nil {
		plan.Placements = []*pb.PlannedChange{{WorkloadId: workload, Action: pb.PlannedChange_PLACE, NodeId: "n1"}}
	}
	return plan, nil
}

func (c *controlled) Explain(_ context.Context, id string) (*pb.Explanation, error) {
	return &pb.Explanation{Id: id, State: pb.State_PENDING, Lines: []string{"pending: cpu (3 nodes)"}}, nil
}

func (c *controlled) Usage(context.Context) ([]*pb.Node, error) {
	return []*pb.Node{{Id: "n1", Usage: &pb.NodeUsage{CpuPercent: 12.5}, LastHeartbeat: timestamppb.New(time.Unix(1, 0))}}, nil
}

func (c *controlled) Logs(ctx context.Context, node string, r *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error {
	lines, ok := c.lines[node]
	if !ok {
		return status.Errorf(codes.Unavailable, "node %s is not attached to any replica now", node)
	}
	for _, l := range lines {
		if err := send(&pb.LogChunk{Replica: r.GetReplica(), NodeId: node, Line: []byte(l)}); err != nil {
			return err
		}
	}
	if r.Follow {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (c *controlled) JoinToken(_ context.Context, t *pb.Token, secret string) (string, error) {
	return t.Id + "." + secret, nil
}

func (c *controlled) Issue(_ context.Context, r *pb.JoinRequest, t *pb.Token) (*pb.JoinResponse, *pb.Certificate, error) {
	return &pb.JoinResponse{Name: r.Name, Role: t.Role, Labels: t.Labels, Certificate: [][]byte{r.Csr}},
		&pb.Certificate{Serial: string(r.Csr), Identity: "agent/" + r.Name}, nil
}

// world is a gateway with its store and its HTTP server.
type world struct {
	*testing.T
	store   *memory
	control *controlled
	gateway *Gateway
	url     string
	client  *http.Client
	// role of the caller; unspecified: nobody.
	role pb.Role
}

var errUnwell = errors.New("no leader is known")

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, store: newMemory(), control: &controlled{}, role: pb.Role_ROLE_ADMIN}
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "persys_test", Help: "test"}))
	w.gateway = New(Config{
		Store: w.store, Control: w.control, Gatherer: registry, Version: "v0", Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Live:  []Check{{"disk", func(context.Context) error { return nil }}},
		Ready: []Check{{"disk", func(context.Context) error { return nil }}, {"leader", func(context.Context) error { return w.store.down }}},
	})
	handler := w.gateway.Handler()
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if w.role != pb.Role_ROLE_UNSPECIFIED {
			r = r.WithContext(WithIdentity(r.Context(), pki.Identity{Cluster: "c", Role: w.role, Name: "ann"}))
		}
		handler.ServeHTTP(rw, r)
	}))
	t.Cleanup(server.Close)
	w.url, w.client = server.URL, server.Client()
	w.put(model.ClusterKey, &pb.ClusterInfo{Id: "c", Name: "test"})
	return w
}

func (w *world) put(key string, m proto.Message) int64 {
	w.Helper()
	return w.do(&pb.Txn{Success: []*pb.RequestOp{model.Put(key, m, 0)}})
}

func (w *world) do(txn *pb.Txn) int64 {
	w.Helper()
	r, err := w.store.apply(txn)
	if err != nil {
		w.Fatal(err)
	}
	return r.Revision
}

// as is a context with a caller.
func (w *world) as(role pb.Role) context.Context {
	return WithIdentity(w.Context(), pki.Identity{Cluster: "c", Role: role, Name: "ann"})
}

func (w *world) apply(spec string) *pb.Workload {
	w.Helper()
	out, err := w.gateway.ApplyWorkload(w.as(pb.Role_ROLE_ADMIN), &pb.ApplyWorkloadRequest{Spec: specOf(w.T, spec)})
	if err != nil {
		w.Fatal(err)
	}
	return out.Workload
}

func specOf(t *testing.T, in string) *pb.WorkloadSpec {
	t.Helper()
	specs, err := model.Decode([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	return specs[0]
}
