package server

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
)

const (
	// Transactions of one relay that are proposed at once.
	relayConcurrency = 256
	// A transaction that lost a race is made anew from what is there now.
	conflictRetries = 10
)

// errStale: what a transaction was made from has changed meanwhile.
var errStale = errors.New("changed meanwhile")

// leading is one term of leadership: what its duties share, and the leader's
// memory of the agents, which is gone with it.
type leading struct {
	epoch int64
	store *raftstore.Store
	ttl   time.Duration

	mu     sync.Mutex
	agents map[string]*agentMemory
}

// agentMemory is what heartbeats say. It is never written: an idle cluster
// writes nothing.
type agentMemory struct {
	member      string
	incarnation string
	lease       int64
	heard       time.Time
	usage       *pb.NodeUsage
}

func newLeading(store *raftstore.Store, epoch int64, ttl time.Duration) *leading {
	return &leading{epoch: epoch, store: store, ttl: ttl, agents: map[string]*agentMemory{}}
}

// propose carries out what decide makes of the current state, again when it
// lost a race. A nil transaction means that there is nothing to do.
func (l *leading) propose(ctx context.Context, decide func(*fsm.View) (*pb.Txn, error)) error {
	for range conflictRetries {
		txn, err := decide(l.store.View())
		if err != nil || txn == nil {
			return err
		}
		response, err := l.store.ProposeAsLeader(ctx, l.epoch, txn)
		if err != nil {
			return err
		}
		if response.Succeeded {
			return nil
		}
	}
	return errStale
}

// relay takes in what the agents attached to one replica said.
func (l *leading) relay(ctx context.Context, request *pb.RelayRequest) (*pb.RelayResponse, error) {
	response := &pb.RelayResponse{Epoch: l.epoch, Results: make([]*pb.AgentReportResult, len(request.Reports))}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(relayConcurrency)
	for i, report := range request.Reports {
		group.Go(func() error {
			result, err := l.hear(ctx, request.MemberId, report)
			response.Results[i] = result
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return response, l.keepAlive(ctx, request, response)
}

func (l *leading) hear(ctx context.Context, member string, report *pb.AgentReport) (*pb.AgentReportResult, error) {
	result := &pb.AgentReportResult{Ok: true, LeaseTtlSeconds: int64(l.ttl / time.Second)}
	if report.Hello != nil {
		var refusal error
		err := l.propose(ctx, func(v *fsm.View) (*pb.Txn, error) {
			fresh := model.Lease{ID: newLeaseID(), TTLSeconds: int64(l.ttl / time.Second)}
			txn, err := model.RegisterNode(v, report.Hello, fresh, time.Now())
			refusal = err
			return txn, err
		})
		if refusal != nil {
			return &pb.AgentReportResult{Message: refusal.Error()}, nil
		}
		if err != nil {
			return nil, err
		}
	}
	if !l.remember(member, report) {
		return &pb.AgentReportResult{Unknown: true}, nil
	}
	for _, s := range report.Status {
		err := l.propose(ctx, func(v *fsm.View) (*pb.Txn, error) {
			return model.ReportStatus(v, report.NodeId, s, time.Now())
		})
		if err != nil {
			return nil, fmt.Errorf("status of node %s: %w", report.NodeId, err)
		}
	}
	return result, nil
}

// remember takes in a heartbeat. It answers false where the node holds no lease
// as this incarnation: then its agent has to introduce itself again.
func (l *leading) remember(member string, report *pb.AgentReport) bool {
	lease := &pb.NodeLease{}
	_, ok, err := model.Load(l.store.View(), model.NodeLeaseKey(report.NodeId), lease)
	if err != nil || !ok || lease.Incarnation != report.Incarnation {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.agents[report.NodeId]
	if a == nil {
		a = &agentMemory{}
		l.agents[report.NodeId] = a
	}
	a.member, a.incarnation, a.lease, a.heard = member, report.Incarnation, lease.LeaseId, time.Now()
	if u := report.GetHeartbeat().GetUsage(); u != nil {
		a.usage = u
	}
	return true
}

// keepAlive renews the leases of those that were heard.
func (l *leading) keepAlive(ctx context.Context, request *pb.RelayRequest, response *pb.RelayResponse) error {
	var ids []int64
	var of []int
	l.mu.Lock()
	for i, report := range request.Reports {
		if a := l.agents[report.NodeId]; a != nil && response.Results[i].Ok {
			ids, of = append(ids, a.lease), append(of, i)
		}
	}
	l.mu.Unlock()
	if len(ids) == 0 {
		return nil
	}
	ttls, err := l.store.KeepAlive(ctx, ids...)
	if err != nil {
		return fmt.Errorf("keep alive: %w", err)
	}
	for n, ttl := range ttls {
		if ttl == 0 {
			response.Results[of[n]] = &pb.AgentReportResult{Unknown: true}
		}
	}
	return nil
}

// usage is what the leader remembers of each node.
func (l *leading) usage() *pb.ListUsageResponse {
	l.mu.Lock()
	defer l.mu.Unlock()
	response := &pb.ListUsageResponse{}
	for id, a := range l.agents {
		response.Nodes = append(response.Nodes, &pb.Node{Id: id, Usage: a.usage, LastHeartbeat: timestamppb.New(a.heard)})
	}
	return response
}

// session is the replica that the node's agent was last heard from.
func (l *leading) session(node string) (member string, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.agents[node]
	if a == nil {
		return "", false
	}
	return a.member, true
}

func newLeaseID() int64 {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // crypto/rand never fails
	}
	id := int64(binary.BigEndian.Uint64(b[:]) >> 1)
	return max(id, 1)
}

// fleet serves pb.Fleet: what concerns agents and members, between replicas.
type fleet struct {
	pb.UnimplementedFleetServer
	replica *replica
}

var errNotLeading = status.Error(codes.FailedPrecondition, "not the leader")

func (f *fleet) Relay(ctx context.Context, request *pb.RelayRequest) (*pb.RelayResponse, error) {
	l := f.replica.leading.Load()
	if l == nil {
		return nil, errNotLeading
	}
	return l.relay(ctx, request)
}

func (f *fleet) ListUsage(context.Context, *pb.ListUsageRequest) (*pb.ListUsageResponse, error) {
	l := f.replica.leading.Load()
	if l == nil {
		return nil, errNotLeading
	}
	return l.usage(), nil
}

func (f *fleet) FindSession(_ context.Context, request *pb.FindSessionRequest) (*pb.FindSessionResponse, error) {
	l := f.replica.leading.Load()
	if l == nil {
		return nil, errNotLeading
	}
	id, ok := l.session(request.NodeId)
	if !ok {
		return nil, status.Errorf(codes.Unavailable, "node %s has not been heard from", request.NodeId)
	}
	member := &pb.Member{}
	if _, ok, err := model.Load(f.replica.store.View(), model.MemberKey(id), member); err != nil || !ok {
		return nil, status.Errorf(codes.Unavailable, "node %s is attached to %s, which is unknown", request.NodeId, id)
	}
	return &pb.FindSessionResponse{MemberId: id, GrpcAddress: member.GrpcAddress}, nil
}

// AgentLogs serves the logs of a node that is attached here.
func (f *fleet) AgentLogs(request *pb.AgentLogsRequest, stream pb.Fleet_AgentLogsServer) error {
	return f.replica.localLogs(stream.Context(), request.NodeId, request.Logs, stream.Send)
}

func (f *fleet) Enroll(ctx context.Context, request *pb.EnrollRequest) (*pb.EnrollResponse, error) {
	l := f.replica.leading.Load()
	if l == nil {
		return nil, errNotLeading
	}
	return f.replica.enroll(ctx, l, request.Member)
}

func (f *fleet) ChangeMember(ctx context.Context, request *pb.ChangeMemberRequest) (*pb.ChangeMemberResponse, error) {
	l := f.replica.leading.Load()
	if l == nil {
		return nil, errNotLeading
	}
	return &pb.ChangeMemberResponse{}, f.replica.changeMember(ctx, l, request)
}
