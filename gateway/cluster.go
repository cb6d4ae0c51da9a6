package gateway

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// GetClusterSummary adds up: capacity is that of nodes that answer, reserved is
// that of all assignments.
func (g *Gateway) GetClusterSummary(ctx context.Context, _ *pb.ClusterSummaryRequest) (*pb.ClusterSummary, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	members, err := g.control.Members(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	out := &pb.ClusterSummary{
		Cluster: &pb.ClusterInfo{}, FailureTolerance: members.FailureTolerance, WorkloadsByState: map[string]int32{},
		Capacity: &pb.NodeCapacity{}, Reserved: &pb.NodeCapacity{}, Revision: v.Revision(), Version: g.config.Version,
	}
	for _, m := range members.Members {
		if m.Voter {
			out.Voters++
		}
		if m.Leader {
			out.Leader = m.Name
		}
	}
	epoch := &pb.LeaderEpoch{}
	if _, _, err := model.Load(v, model.EpochKey, epoch); err != nil {
		return nil, statusOf(err)
	}
	out.Epoch = epoch.Epoch
	if _, _, err := model.Load(v, model.ClusterKey, out.Cluster); err != nil {
		return nil, statusOf(err)
	}
	return out, statusOf(addTotals(v, out))
}

func addTotals(v *fsm.View, out *pb.ClusterSummary) error {
	for n, err := range nodes(v) {
		if err != nil {
			return err
		}
		out.Nodes++
		if n.State == pb.NodeState_READY || n.State == pb.NodeState_DRAINING {
			out.NodesReady++
			add(out.Capacity, n.Capacity)
		}
	}
	d, err := demandOf(v)
	if err != nil {
		return err
	}
	for _, sum := range d.reserved {
		add(out.Reserved, sum)
	}
	for kv := range v.Scan(model.WorkloadsPrefix) {
		id, sub, _ := model.SplitKey(model.WorkloadsPrefix, string(kv.Key))
		if sub != "" {
			continue
		}
		w := &pb.Workload{Spec: &pb.WorkloadSpec{Id: id}}
		if err := addStatus(v, w); err != nil {
			return err
		}
		out.WorkloadsByState[w.Status.State.String()]++
	}
	return nil
}

func add(sum, c *pb.NodeCapacity) {
	sum.CpuMillis += c.GetCpuMillis()
	sum.MemoryBytes += c.GetMemoryBytes()
	sum.DiskBytes += c.GetDiskBytes()
}

func (g *Gateway) GetSchedulerConfig(ctx context.Context, _ *pb.SchedulerConfigRequest) (*pb.SchedulerConfig, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	config, err := model.LoadSchedulerConfig(v)
	return config, statusOf(err)
}

func (g *Gateway) SetSchedulerConfig(ctx context.Context, req *pb.SchedulerConfig) (*pb.SchedulerConfig, error) {
	var config *pb.SchedulerConfig
	answer, err := g.change(ctx, meta(ctx), func(v *fsm.View, m model.Meta) (txn *pb.Txn, err error) {
		txn, config, err = model.SetSchedulerConfig(v, req, m)
		return txn, err
	})
	if err != nil {
		return nil, statusOf(err)
	}
	if answer != nil {
		config.ResourceVersion = answer.Revision
	}
	return config, nil
}

func (g *Gateway) ListMembers(ctx context.Context, _ *pb.ListMembersRequest) (*pb.ListMembersResponse, error) {
	out, err := g.control.Members(ctx)
	return out, statusOf(err)
}

func (g *Gateway) PromoteMember(ctx context.Context, req *pb.MemberRequest) (*pb.ListMembersResponse, error) {
	return g.changeMember(ctx, pb.ChangeMemberRequest_PROMOTE, req.Name)
}

func (g *Gateway) DemoteMember(ctx context.Context, req *pb.MemberRequest) (*pb.ListMembersResponse, error) {
	return g.changeMember(ctx, pb.ChangeMemberRequest_DEMOTE, req.Name)
}

func (g *Gateway) RemoveMember(ctx context.Context, req *pb.MemberRequest) (*pb.ListMembersResponse, error) {
	return g.changeMember(ctx, pb.ChangeMemberRequest_REMOVE, req.Name)
}

func (g *Gateway) TransferLeadership(ctx context.Context, req *pb.MemberRequest) (*pb.ListMembersResponse, error) {
	return g.changeMember(ctx, pb.ChangeMemberRequest_TRANSFER, req.Name)
}

func (g *Gateway) changeMember(ctx context.Context, change pb.ChangeMemberRequest_Change, name string) (*pb.ListMembersResponse, error) {
	anybody := change == pb.ChangeMemberRequest_TRANSFER && name == ""
	if !anybody && !model.IsDNSLabel(name) {
		return nil, badField("name", "%.100q is not allowed; allowed: the name of a server", name)
	}
	if err := g.control.ChangeMember(ctx, &pb.ChangeMemberRequest{Change: change, Name: name}); err != nil {
		return nil, statusOf(err)
	}
	return g.ListMembers(ctx, nil)
}

func (g *Gateway) CreateToken(ctx context.Context, req *pb.CreateTokenRequest) (*pb.CreateTokenResponse, error) {
	id, secret, err := pki.NewTokenSecret()
	if err != nil {
		return nil, statusOf(err)
	}
	out := &pb.CreateTokenResponse{}
	_, err = g.change(ctx, meta(ctx), func(_ *fsm.View, m model.Meta) (txn *pb.Txn, err error) {
		if txn, out.Token, err = model.CreateToken(req, id, pki.HashSecret(secret), m); err != nil {
			return nil, err
		}
		// Before it is stored: a token that cannot be written down is of no use.
		out.Secret, err = g.control.JoinToken(ctx, out.Token, secret)
		return txn, err
	})
	if err != nil {
		return nil, statusOf(err)
	}
	return out, nil
}

func (g *Gateway) ListTokens(ctx context.Context, _ *pb.ListTokensRequest) (*pb.ListTokensResponse, error) {
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	out := &pb.ListTokensResponse{}
	for kv := range v.Scan(model.TokensPrefix) {
		t := &pb.Token{}
		if err := model.Parse(kv, t); err != nil {
			return nil, statusOf(err)
		}
		out.Tokens = append(out.Tokens, model.ShowToken(t))
	}
	return out, nil
}

func (g *Gateway) RevokeToken(ctx context.Context, req *pb.TokenRequest) (*pb.Token, error) {
	var t *pb.Token
	_, err := g.change(ctx, meta(ctx), func(v *fsm.View, m model.Meta) (txn *pb.Txn, err error) {
		txn, t, err = model.RevokeToken(v, req, m)
		return txn, err
	})
	if err != nil {
		return nil, statusOf(err)
	}
	return t, nil
}

func (g *Gateway) ListEvents(ctx context.Context, req *pb.ListEventsRequest) (*pb.ListEventsResponse, error) {
	limit := int(req.Limit)
	switch {
	case limit < 0 || limit > maxEvents:
		return nil, badField("limit", "%d is out of range; allowed: 1 to %d, or 0 for %d", limit, maxEvents, defaultEvents)
	case limit == 0:
		limit = defaultEvents
	}
	if err := checkEventFilter(req.WorkloadId, req.NodeId); err != nil {
		return nil, err
	}
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	newest, err := newestEvents(v, req.WorkloadId, req.NodeId, limit)
	if err != nil {
		return nil, statusOf(err)
	}
	return &pb.ListEventsResponse{Events: newest, Revision: v.Revision()}, nil
}

// Bounds of what somebody without a certificate may send.
const (
	maxCSR       = 16 << 10
	maxAddresses = 64
	maxAddress   = 253
)

// Join redeems a join token. The certificate is signed first and handed out
// only when the token could be used up and the certificate recorded, in one
// transaction.
func (g *Gateway) Join(ctx context.Context, req *pb.JoinRequest) (*pb.JoinResponse, error) {
	if err := checkJoin(req); err != nil {
		return nil, err
	}
	v, err := g.view(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	cluster := &pb.ClusterInfo{}
	if _, ok, err := model.Load(v, model.ClusterKey, cluster); err != nil {
		return nil, statusOf(err)
	} else if !ok {
		return nil, status.Error(codes.Unavailable, "the cluster is being founded; try again")
	}
	if req.ClusterId != "" && req.ClusterId != cluster.Id {
		return nil, status.Errorf(codes.FailedPrecondition, "the join token is for cluster %.100q, this is cluster %q", req.ClusterId, cluster.Id)
	}
	redemption := model.Redemption{TokenID: req.TokenId, SecretHash: pki.HashSecret(req.Secret), Name: req.Name}
	m := meta(ctx)
	token, err := model.CheckToken(v, redemption, m.Now)
	if err != nil {
		return nil, statusOf(err)
	}
	out, cert, err := g.control.Issue(ctx, req, token)
	if err != nil {
		return nil, statusOf(err)
	}
	m.Actor = cert.Identity
	_, err = g.change(ctx, m, func(v *fsm.View, m model.Meta) (*pb.Txn, error) {
		txn, _, err := model.RedeemToken(v, redemption, cert, m)
		return txn, err
	})
	if err != nil {
		return nil, statusOf(err)
	}
	return out, nil
}

func checkJoin(req *pb.JoinRequest) error {
	switch {
	case req.TokenId == "" || req.Secret == "":
		return badField("secret", "missing; allowed: id and secret of a join token")
	case !model.IsDNSLabel(req.Name):
		return badField("name", "%.100q is not allowed; allowed: a DNS label: 1 to 63 lower case letters, digits and inner hyphens", req.Name)
	case len(req.Csr) == 0 || len(req.Csr) > maxCSR:
		return badField("csr", "has %d bytes; allowed: a PKCS #10 request of at most %d", len(req.Csr), maxCSR)
	case len(req.Addresses) > maxAddresses:
		return badField("addresses", "has %d entries; allowed: %d", len(req.Addresses), maxAddresses)
	}
	for _, a := range req.Addresses {
		if a == "" || len(a) > maxAddress {
			return badField("addresses", "%.100q is not allowed; allowed: host names and IP addresses", a)
		}
	}
	return nil
}
