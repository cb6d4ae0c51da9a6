package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
	"github.com/persys-dev/persys/raftstore"
)

const (
	// Transactions of one relay that are proposed at once.
	relayConcurrency = 256
	// Replicas, and bytes of what is said of them, that one transaction takes in.
	reportWords = 512
	reportBytes = 256 << 10
	// A transaction that lost a race is made anew from what is there now.
	conflictRetries = 10
)

// errStale: what a transaction was made from has changed meanwhile.
var errStale = errors.New("changed meanwhile")

// leading is one term of leadership: what its duties share, and the leader's
// memory of the agents, which is gone with it.
type leading struct {
	epoch   int64
	store   *raftstore.Store
	picture *picture
	ttl     time.Duration

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

func newLeading(store *raftstore.Store, p *picture, epoch int64, ttl time.Duration) *leading {
	return &leading{epoch: epoch, store: store, picture: p, ttl: ttl, agents: map[string]*agentMemory{}}
}

// propose carries out what decide makes of the current state, again when it
// lost a race. A nil transaction means that there is nothing to do.
func (l *leading) propose(ctx context.Context, decide func(*fsm.View) (*pb.Txn, error)) error {
	for range conflictRetries {
		if done, err := l.try(ctx, decide); done || err != nil {
			return err
		}
	}
	return errStale
}

// try reports whether nothing had changed meanwhile.
func (l *leading) try(ctx context.Context, decide func(*fsm.View) (*pb.Txn, error)) (bool, error) {
	txn, err := decide(l.store.View())
	if err != nil || txn == nil {
		return err == nil, err
	}
	response, err := l.store.ProposeAsLeader(ctx, l.epoch, txn)
	return response.GetSucceeded(), err
}

// relay takes in what the agents attached to one replica said. Leases are
// renewed before what takes longer: status.
func (l *leading) relay(ctx context.Context, request *pb.RelayRequest) (*pb.RelayResponse, error) {
	response := &pb.RelayResponse{Epoch: l.epoch, Results: make([]*pb.AgentReportResult, len(request.Reports))}
	group, registering := errgroup.WithContext(ctx)
	group.SetLimit(relayConcurrency)
	for i, report := range request.Reports {
		response.Results[i] = &pb.AgentReportResult{Ok: true, LeaseTtlSeconds: int64(l.ttl / time.Second)}
		if report.Hello == nil {
			continue
		}
		group.Go(func() error {
			refusal, err := l.register(registering, report.Hello)
			if refusal != nil {
				response.Results[i] = &pb.AgentReportResult{Message: refusal.Error()}
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if err := l.keepAlive(ctx, request, response); err != nil {
		return nil, err
	}
	return response, l.takeStatus(ctx, request, response)
}

// register takes in the hello of an agent, or says why it is refused.
func (l *leading) register(ctx context.Context, hello *pb.AgentHello) (refusal, err error) {
	err = l.propose(ctx, func(v *fsm.View) (*pb.Txn, error) {
		fresh := model.Lease{ID: newLeaseID(), TTLSeconds: int64(l.ttl / time.Second)}
		var txn *pb.Txn
		txn, refusal = model.RegisterNode(v, hello, fresh, time.Now())
		return txn, nil
	})
	return refusal, err
}

// keepAlive takes in heartbeats, and renews the leases of those that were heard.
func (l *leading) keepAlive(ctx context.Context, request *pb.RelayRequest, response *pb.RelayResponse) error {
	var ids []int64
	var of []int
	view := l.store.View()
	for i, report := range request.Reports {
		if !response.Results[i].Ok {
			continue
		}
		lease, ok := l.remember(view, request.MemberId, report)
		if !ok {
			response.Results[i] = &pb.AgentReportResult{Unknown: true}
			continue
		}
		ids, of = append(ids, lease), append(of, i)
	}
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

// remember takes in a heartbeat. It is not ok where the node holds no lease as
// this incarnation: then its agent has to introduce itself again.
func (l *leading) remember(v *fsm.View, member string, report *pb.AgentReport) (leaseID int64, ok bool) {
	lease := &pb.NodeLease{}
	_, ok, err := model.Load(v, model.NodeLeaseKey(report.NodeId), lease)
	if err != nil || !ok || lease.Incarnation != report.Incarnation {
		return 0, false
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
	return lease.LeaseId, true
}

// takeStatus writes down what the agents say of their work. An agent's reports
// are taken in in their order, those of different agents together: a few
// transactions for all of them.
func (l *leading) takeStatus(ctx context.Context, request *pb.RelayRequest, response *pb.RelayResponse) error {
	for turn := 0; ; turn++ {
		var words []model.Word
		more := false
		for i, report := range request.Reports {
			if turn >= len(report.Status) || !response.Results[i].Ok {
				continue
			}
			more = true
			if err := l.tellDrifts(ctx, report.NodeId, report.Status[turn].Drifts); err != nil {
				return err
			}
			said, refusal, err := l.wordsOf(ctx, report.NodeId, report.Status[turn])
			if err != nil {
				return err
			}
			if refusal != nil {
				response.Results[i] = &pb.AgentReportResult{Message: refusal.Error()}
				continue
			}
			words = append(words, said...)
		}
		if !more {
			return nil
		}
		group, ctx := errgroup.WithContext(ctx)
		group.SetLimit(relayConcurrency)
		for len(words) > 0 {
			n := together(words)
			part := words[:n]
			words = words[n:]
			// In the order of keys, in which the state machine keeps them.
			slices.SortFunc(part, func(a, b model.Word) int {
				return cmp.Or(cmp.Compare(a.Replica.WorkloadId, b.Replica.WorkloadId), cmp.Compare(a.Replica.Replica, b.Replica.Replica))
			})
			group.Go(func() error { return l.takeWords(ctx, part) })
		}
		if err := group.Wait(); err != nil {
			return fmt.Errorf("status of nodes: %w", err)
		}
	}
}

func (l *leading) tellDrifts(ctx context.Context, node string, drifts []*pb.Drift) error {
	return l.propose(ctx, func(*fsm.View) (*pb.Txn, error) { return model.ReportDrifts(node, drifts, time.Now()), nil })
}

func (l *leading) wordsOf(ctx context.Context, node string, report *pb.StatusReport) (words []model.Word, refusal, err error) {
	var recorded []*pb.ReplicaKey
	if report.Full {
		// The picture is to show all that the report could know of.
		if recorded, err = l.picture.recordedOn(ctx, node, min(report.DesiredRevision, l.store.View().Revision())); err != nil {
			return nil, nil, err
		}
	}
	words, refusal = model.Words(node, report, recorded)
	return words, refusal, nil
}

// together is how many of the words one transaction takes in: no two are of the
// same replica.
func together(words []model.Word) int {
	seen := make(map[place]bool, min(len(words), reportWords))
	bytes := 0
	for i := range words {
		r := words[i].Replica
		key := place{r.WorkloadId, r.Replica}
		bytes += proto.Size(r)
		if i > 0 && (seen[key] || i == reportWords || bytes > reportBytes) {
			return i
		}
		seen[key] = true
	}
	return len(words)
}

// takeWords writes words down in one transaction; where it lost a race, in two.
func (l *leading) takeWords(ctx context.Context, words []model.Word) error {
	decide := func(words []model.Word) func(v *fsm.View) (*pb.Txn, error) {
		return func(v *fsm.View) (*pb.Txn, error) { return model.ReportStatus(v, words, time.Now()) }
	}
	if len(words) == 1 {
		return l.propose(ctx, decide(words))
	}
	if done, err := l.try(ctx, decide(words)); done || err != nil {
		return err
	}
	half := len(words) / 2
	return errors.Join(l.takeWords(ctx, words[:half]), l.takeWords(ctx, words[half:]))
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
