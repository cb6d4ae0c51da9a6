package gateway

import (
	"context"
	"strings"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/proto/etcd/v3electionpb"
	"github.com/persys-dev/persys/proto/etcd/v3lockpb"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// callers is a set of roles, one bit for each.
type callers uint32

const (
	// A role is never unspecified in an identity, so its bit stands for who
	// has none.
	byNobody   callers = 1 << pb.Role_ROLE_UNSPECIFIED
	byServer   callers = 1 << pb.Role_ROLE_SERVER
	byAgent    callers = 1 << pb.Role_ROLE_AGENT
	byAdmin    callers = 1 << pb.Role_ROLE_ADMIN
	byOperator callers = 1 << pb.Role_ROLE_OPERATOR
	byViewer   callers = 1 << pb.Role_ROLE_VIEWER

	// Servers are in all three, because they pass on what others asked of them.
	mayAdminister = byAdmin | byServer
	mayOperate    = mayAdminister | byOperator
	mayRead       = mayOperate | byViewer
)

// access says who may call which method. What is not here, nobody may call. The
// metrics role is nowhere: it reads /metrics, over HTTPS.
var access = map[string]callers{
	pb.Workloads_ApplyWorkload_FullMethodName:   mayOperate,
	pb.Workloads_GetWorkload_FullMethodName:     mayRead,
	pb.Workloads_ListWorkloads_FullMethodName:   mayRead,
	pb.Workloads_DeleteWorkload_FullMethodName:  mayOperate,
	pb.Workloads_ScaleWorkload_FullMethodName:   mayOperate,
	pb.Workloads_StartWorkload_FullMethodName:   mayOperate,
	pb.Workloads_StopWorkload_FullMethodName:    mayOperate,
	pb.Workloads_RestartWorkload_FullMethodName: mayOperate,
	pb.Workloads_RetryWorkload_FullMethodName:   mayOperate,
	pb.Workloads_ExplainWorkload_FullMethodName: mayRead,
	pb.Workloads_WatchWorkloads_FullMethodName:  mayRead,
	pb.Workloads_WorkloadLogs_FullMethodName:    mayRead,
	// A plan says nothing that a reader could not find out, and changes nothing.
	pb.Workloads_PlanWorkload_FullMethodName:     mayRead,
	pb.Workloads_ListRevisions_FullMethodName:    mayRead,
	pb.Workloads_RollbackWorkload_FullMethodName: mayOperate,
	pb.Workloads_PromoteWorkload_FullMethodName:  mayOperate,
	pb.Workloads_RunWorkload_FullMethodName:      mayOperate,

	pb.Nodes_ListNodes_FullMethodName:    mayRead,
	pb.Nodes_GetNode_FullMethodName:      mayRead,
	pb.Nodes_CordonNode_FullMethodName:   mayOperate,
	pb.Nodes_UncordonNode_FullMethodName: mayOperate,
	pb.Nodes_DrainNode_FullMethodName:    mayOperate,
	pb.Nodes_LabelNode_FullMethodName:    mayOperate,
	pb.Nodes_TaintNode_FullMethodName:    mayOperate,
	pb.Nodes_RemoveNode_FullMethodName:   mayOperate,

	pb.Cluster_GetClusterSummary_FullMethodName:  mayRead,
	pb.Cluster_ListMembers_FullMethodName:        mayRead,
	pb.Cluster_PromoteMember_FullMethodName:      mayAdminister,
	pb.Cluster_DemoteMember_FullMethodName:       mayAdminister,
	pb.Cluster_RemoveMember_FullMethodName:       mayAdminister,
	pb.Cluster_TransferLeadership_FullMethodName: mayAdminister,
	pb.Cluster_GetSchedulerConfig_FullMethodName: mayRead,
	pb.Cluster_SetSchedulerConfig_FullMethodName: mayAdminister,
	pb.Cluster_CreateToken_FullMethodName:        mayAdminister,
	pb.Cluster_ListTokens_FullMethodName:         mayAdminister,
	pb.Cluster_RevokeToken_FullMethodName:        mayAdminister,
	pb.Cluster_ListEvents_FullMethodName:         mayRead,
	pb.Cluster_WatchEvents_FullMethodName:        mayRead,
	// The token in the request is what lets somebody in.
	pb.Cluster_Join_FullMethodName: mayAdminister | byNobody,

	// That an agent speaks for its own node only is seen by the session, which
	// knows the node.
	pb.Agents_Session_FullMethodName: byAgent,
	pb.Agents_Tunnel_FullMethodName:  byAgent,

	pb.Consensus_Propose_FullMethodName:       byServer,
	pb.Consensus_ReadIndex_FullMethodName:     byServer,
	pb.Consensus_KeepAlive_FullMethodName:     byServer,
	pb.Consensus_LeaseTimes_FullMethodName:    byServer,
	pb.Consensus_ReplicaStatus_FullMethodName: byServer,

	pb.Fleet_Relay_FullMethodName:        byServer,
	pb.Fleet_Enroll_FullMethodName:       byServer,
	pb.Fleet_FindSession_FullMethodName:  byServer,
	pb.Fleet_AgentLogs_FullMethodName:    byServer,
	pb.Fleet_ListUsage_FullMethodName:    byServer,
	pb.Fleet_ChangeMember_FullMethodName: byServer,

	// What a viewer may not do in a transaction, gateway/etcd knows: it sees the
	// operations.
	etcdpb.KV_Range_FullMethodName:       mayRead,
	etcdpb.KV_RangeStream_FullMethodName: mayRead,
	etcdpb.KV_Put_FullMethodName:         mayOperate,
	etcdpb.KV_DeleteRange_FullMethodName: mayOperate,
	etcdpb.KV_Txn_FullMethodName:         mayRead,
	etcdpb.KV_Compact_FullMethodName:     mayOperate,

	etcdpb.Watch_Watch_FullMethodName: mayRead,

	etcdpb.Lease_LeaseGrant_FullMethodName:      mayOperate,
	etcdpb.Lease_LeaseRevoke_FullMethodName:     mayOperate,
	etcdpb.Lease_LeaseKeepAlive_FullMethodName:  mayOperate,
	etcdpb.Lease_LeaseTimeToLive_FullMethodName: mayRead,
	etcdpb.Lease_LeaseLeases_FullMethodName:     mayRead,

	etcdpb.Cluster_MemberList_FullMethodName:    mayRead,
	etcdpb.Cluster_MemberAdd_FullMethodName:     mayAdminister,
	etcdpb.Cluster_MemberRemove_FullMethodName:  mayAdminister,
	etcdpb.Cluster_MemberUpdate_FullMethodName:  mayAdminister,
	etcdpb.Cluster_MemberPromote_FullMethodName: mayAdminister,

	etcdpb.Maintenance_Status_FullMethodName: mayRead,
	etcdpb.Maintenance_Hash_FullMethodName:   mayRead,
	etcdpb.Maintenance_HashKV_FullMethodName: mayRead,
	// One method lists, raises and clears alarms; gateway/etcd lets readers list.
	etcdpb.Maintenance_Alarm_FullMethodName:      mayRead,
	etcdpb.Maintenance_Defragment_FullMethodName: mayAdminister,
	// A snapshot holds what no reader is shown, such as the hashes of passwords.
	etcdpb.Maintenance_Snapshot_FullMethodName:   mayAdminister,
	etcdpb.Maintenance_MoveLeader_FullMethodName: mayAdminister,
	etcdpb.Maintenance_Downgrade_FullMethodName:  mayAdminister,

	etcdpb.Auth_Authenticate_FullMethodName:         mayRead,
	etcdpb.Auth_AuthStatus_FullMethodName:           mayRead,
	etcdpb.Auth_UserGet_FullMethodName:              mayRead,
	etcdpb.Auth_UserList_FullMethodName:             mayRead,
	etcdpb.Auth_RoleGet_FullMethodName:              mayRead,
	etcdpb.Auth_RoleList_FullMethodName:             mayRead,
	etcdpb.Auth_AuthEnable_FullMethodName:           mayAdminister,
	etcdpb.Auth_AuthDisable_FullMethodName:          mayAdminister,
	etcdpb.Auth_UserAdd_FullMethodName:              mayAdminister,
	etcdpb.Auth_UserDelete_FullMethodName:           mayAdminister,
	etcdpb.Auth_UserChangePassword_FullMethodName:   mayAdminister,
	etcdpb.Auth_UserGrantRole_FullMethodName:        mayAdminister,
	etcdpb.Auth_UserRevokeRole_FullMethodName:       mayAdminister,
	etcdpb.Auth_RoleAdd_FullMethodName:              mayAdminister,
	etcdpb.Auth_RoleDelete_FullMethodName:           mayAdminister,
	etcdpb.Auth_RoleGrantPermission_FullMethodName:  mayAdminister,
	etcdpb.Auth_RoleRevokePermission_FullMethodName: mayAdminister,

	v3lockpb.Lock_Lock_FullMethodName:             mayOperate,
	v3lockpb.Lock_Unlock_FullMethodName:           mayOperate,
	v3electionpb.Election_Campaign_FullMethodName: mayOperate,
	v3electionpb.Election_Proclaim_FullMethodName: mayOperate,
	v3electionpb.Election_Resign_FullMethodName:   mayOperate,
	v3electionpb.Election_Leader_FullMethodName:   mayRead,
	v3electionpb.Election_Observe_FullMethodName:  mayRead,

	healthpb.Health_Check_FullMethodName: mayRead,
	healthpb.Health_List_FullMethodName:  mayRead,
	healthpb.Health_Watch_FullMethodName: mayRead,

	reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName:      mayRead,
	reflectionalphapb.ServerReflection_ServerReflectionInfo_FullMethodName: mayRead,
}

func (c callers) has(role pb.Role) bool {
	return role >= 0 && role < 32 && c&(1<<role) != 0
}

// names are those whom a refusal names: whom one can ask for a certificate.
func (c callers) names() string {
	var names []string
	for _, role := range []pb.Role{pb.Role_ROLE_ADMIN, pb.Role_ROLE_OPERATOR, pb.Role_ROLE_VIEWER, pb.Role_ROLE_AGENT, pb.Role_ROLE_SERVER} {
		if c.has(role) {
			names = append(names, pki.RoleName(role))
		}
	}
	if len(names) == 0 {
		return "nobody"
	}
	return strings.Join(names, ", ")
}

// Authorize says whether id may call the gRPC method ("/package.Service/Method").
// ok is false where there is no identity. The error is a status:
// UNAUTHENTICATED for nobody, PERMISSION_DENIED for the wrong role. Whatever
// calls a service past the interceptors, as REST does in process, asks here first.
func Authorize(method string, id pki.Identity, ok bool) error {
	allowed := access[method]
	if !ok || id.Role == pb.Role_ROLE_UNSPECIFIED {
		if allowed&byNobody != 0 {
			return nil
		}
		return status.Errorf(codes.Unauthenticated, "%s needs a client certificate of this cluster, and none was presented", method)
	}
	if !allowed.has(id.Role) {
		return status.Errorf(codes.PermissionDenied, "%s may not call %s: role %s is not one of those that may (%s)", id, method, pki.RoleName(id.Role), allowed.names())
	}
	return nil
}

type identityKey struct{}

// WithIdentity notes who calls.
func WithIdentity(ctx context.Context, id pki.Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

// IdentityFrom is who calls, as the interceptors or the HTTP middleware found
// out; false where the caller has no identity.
func IdentityFrom(ctx context.Context) (pki.Identity, bool) {
	id, ok := ctx.Value(identityKey{}).(pki.Identity)
	return id, ok
}

// identify takes the identity from the connection, and nowhere else, and asks the
// table.
func identify(ctx context.Context, method string) (context.Context, error) {
	id, ok := peerIdentity(ctx)
	if err := Authorize(method, id, ok); err != nil {
		return nil, err
	}
	if ok {
		ctx = WithIdentity(ctx, id)
	}
	return ctx, nil
}

func peerIdentity(ctx context.Context) (pki.Identity, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return pki.Identity{}, false
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return pki.Identity{}, false
	}
	return pki.PeerIdentity(info.State)
}

// UnaryInterceptor refuses calls that the table does not allow, and gives the
// handler the caller's identity.
func UnaryInterceptor(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := identify(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handler(ctx, request)
}

// StreamInterceptor is UnaryInterceptor for streams.
func StreamInterceptor(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := identify(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return handler(service, &identifiedStream{ServerStream: stream, ctx: ctx})
}

type identifiedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *identifiedStream) Context() context.Context { return s.ctx }
