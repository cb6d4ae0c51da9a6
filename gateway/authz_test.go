package gateway

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

var update = flag.Bool("update", false, "write recorded answers anew")

// allMethods are those of every service in our proto files and etcd's, registered
// or not, and of the services that come with gRPC.
func allMethods(t *testing.T) []string {
	t.Helper()
	var methods []string
	for _, of := range []protoreflect.FullName{"persys.v1", "etcdserverpb", "v3lockpb", "v3electionpb"} {
		protoregistry.GlobalFiles.RangeFilesByPackage(of, func(file protoreflect.FileDescriptor) bool {
			for i := range file.Services().Len() {
				service := file.Services().Get(i)
				for j := range service.Methods().Len() {
					methods = append(methods, fmt.Sprintf("/%s/%s", service.FullName(), service.Methods().Get(j).Name()))
				}
			}
			return true
		})
	}
	if len(methods) < 80 {
		t.Fatalf("found only %d methods in the proto files", len(methods))
	}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, health.NewServer())
	reflection.Register(s)
	for service, info := range s.GetServiceInfo() {
		for _, method := range info.Methods {
			methods = append(methods, fmt.Sprintf("/%s/%s", service, method.Name))
		}
	}
	slices.Sort(methods)
	return methods
}

// Every method there is, and everybody who may call it: the recorded answer is
// what a reviewer reads.
func TestAuthorizationMatrix(t *testing.T) {
	methods := allMethods(t)
	for _, method := range methods {
		if _, ok := access[method]; !ok {
			t.Errorf("%s is not in the table", method)
		}
	}
	for method := range access {
		if !slices.Contains(methods, method) {
			t.Errorf("%s is in the table, and there is no such method", method)
		}
	}

	var roles []pb.Role
	for number := range pb.Role_name {
		roles = append(roles, pb.Role(number))
	}
	slices.Sort(roles)
	var got strings.Builder
	fmt.Fprintf(&got, "%-62s", "method")
	for _, role := range roles {
		fmt.Fprintf(&got, " %-8s", columnName(role))
	}
	got.WriteString("\n")
	for _, method := range methods {
		fmt.Fprintf(&got, "%-62s", method)
		for _, role := range roles {
			answer := "-"
			err := Authorize(method, pki.Identity{Cluster: "c1", Role: role, Name: "x"}, role != pb.Role_ROLE_UNSPECIFIED)
			if err == nil {
				answer = "yes"
			}
			checkRefusal(t, err, method, role)
			fmt.Fprintf(&got, " %-8s", answer)
		}
		got.WriteString("\n")
	}
	recorded(t, "testdata/authz.txt", trimLines(got.String()))
}

func columnName(role pb.Role) string {
	if role == pb.Role_ROLE_UNSPECIFIED {
		return "nobody"
	}
	return pki.RoleName(role)
}

func trimLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

func recorded(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s has changed; read the difference, then go test -update\n%s", path, got)
	}
}

func checkRefusal(t *testing.T, err error, method string, role pb.Role) {
	t.Helper()
	if err == nil {
		return
	}
	code, words := codes.PermissionDenied, []string{method, "role " + pki.RoleName(role)}
	if role == pb.Role_ROLE_UNSPECIFIED {
		code, words = codes.Unauthenticated, []string{method, "certificate"}
	}
	if status.Code(err) != code {
		t.Errorf("%s, %s: code %s, want %s", method, role, status.Code(err), code)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%s, %s: the refusal does not name %q: %v", method, role, word, err)
		}
	}
}

// The rules that the table must never break, whatever is added to it.
func TestAuthorizationRules(t *testing.T) {
	for method, allowed := range access {
		service := strings.Split(method, "/")[1]
		if allowed&byNobody != 0 && method != pb.Cluster_Join_FullMethodName {
			t.Errorf("%s is open to everybody", method)
		}
		if allowed.has(pb.Role_ROLE_AGENT) != (service == pb.Agents_ServiceDesc.ServiceName) {
			t.Errorf("%s, agent: %v", method, allowed.has(pb.Role_ROLE_AGENT))
		}
		if allowed.has(pb.Role_ROLE_METRICS) {
			t.Errorf("%s is open to metrics", method)
		}
		internal := service == pb.Consensus_ServiceDesc.ServiceName || service == pb.Fleet_ServiceDesc.ServiceName
		if internal && allowed != byServer {
			t.Errorf("%s is open to others than servers: %s", method, allowed.names())
		}
		if strings.HasPrefix(service, "persys.v1.") && !internal && service != pb.Agents_ServiceDesc.ServiceName && !allowed.has(pb.Role_ROLE_ADMIN) {
			t.Errorf("%s is closed to admins", method)
		}
	}
}

func TestAuthorizeDefaultDeny(t *testing.T) {
	admin := pki.Identity{Cluster: "c1", Role: pb.Role_ROLE_ADMIN, Name: "al"}
	for _, test := range []struct {
		name   string
		method string
		id     pki.Identity
		ok     bool
		code   codes.Code
	}{
		{"known", pb.Nodes_ListNodes_FullMethodName, admin, true, codes.OK},
		{"unknown method", "/persys.v1.Nodes/Destroy", admin, true, codes.PermissionDenied},
		{"no method", "", admin, true, codes.PermissionDenied},
		{"no slash", pb.Nodes_ListNodes_FullMethodName[1:], admin, true, codes.PermissionDenied},
		{"other case", strings.ToLower(pb.Nodes_ListNodes_FullMethodName), admin, true, codes.PermissionDenied},
		{"unknown method, nobody", "/persys.v1.Nodes/Destroy", pki.Identity{}, false, codes.Unauthenticated},
		{"identity that does not count", pb.Nodes_ListNodes_FullMethodName, admin, false, codes.Unauthenticated},
		{"identity without role", pb.Nodes_ListNodes_FullMethodName, pki.Identity{Cluster: "c1", Name: "x"}, true, codes.Unauthenticated},
		{"role from the future", pb.Nodes_ListNodes_FullMethodName, pki.Identity{Cluster: "c1", Role: 35, Name: "x"}, true, codes.PermissionDenied},
		{"negative role", pb.Nodes_ListNodes_FullMethodName, pki.Identity{Cluster: "c1", Role: -1, Name: "x"}, true, codes.PermissionDenied},
		{"joining", pb.Cluster_Join_FullMethodName, pki.Identity{}, false, codes.OK},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := Authorize(test.method, test.id, test.ok); status.Code(err) != test.code {
				t.Errorf("%v, want %s", err, test.code)
			}
		})
	}
}

func TestIdentityInContext(t *testing.T) {
	if id, ok := IdentityFrom(context.Background()); ok {
		t.Errorf("an empty context has %s", id)
	}
	want := pki.Identity{Cluster: "c1", Role: pb.Role_ROLE_AGENT, Name: "a1"}
	if got, ok := IdentityFrom(WithIdentity(context.Background(), want)); !ok || got != want {
		t.Errorf("%s %v", got, ok)
	}
}

// witness serves what it must to see who calls.
type witness struct {
	pb.UnimplementedNodesServer
	pb.UnimplementedAgentsServer
	pb.UnimplementedClusterServer
}

func (witness) ListNodes(ctx context.Context, _ *pb.ListNodesRequest) (*pb.ListNodesResponse, error) {
	return &pb.ListNodesResponse{Nodes: []*pb.Node{{Id: callerOf(ctx)}}}, nil
}

func (witness) Join(ctx context.Context, _ *pb.JoinRequest) (*pb.JoinResponse, error) {
	return &pb.JoinResponse{Name: callerOf(ctx)}, nil
}

func (witness) Session(stream grpc.BidiStreamingServer[pb.AgentMessage, pb.ServerMessage]) error {
	return stream.Send(&pb.ServerMessage{Message: &pb.ServerMessage_Welcome{Welcome: &pb.Welcome{ClusterId: callerOf(stream.Context())}}})
}

func callerOf(ctx context.Context) string {
	if id, ok := IdentityFrom(ctx); ok {
		return id.URI()
	}
	return "nobody"
}

// The interceptors on a real server, with real certificates.
func TestInterceptors(t *testing.T) {
	authority, err := pki.NewAuthority("c1")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(role pb.Role, name string) *pki.Credentials {
		key, csr, err := pki.NewKeyAndCSR(name)
		if err != nil {
			t.Fatal(err)
		}
		chain, _, _, err := authority.Issue(csr, pki.Identity{Cluster: "c1", Role: role, Name: name}, nil, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		c, err := pki.NewCredentials(key, chain, authority.Roots())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := pki.NewMux(listener, issue(pb.Role_ROLE_SERVER, "s1"), pki.MuxOptions{Logger: slog.New(slog.DiscardHandler)})
	grpcServer := grpc.NewServer(grpc.Creds(pki.TransportCredentials()), grpc.UnaryInterceptor(UnaryInterceptor), grpc.StreamInterceptor(StreamInterceptor))
	pb.RegisterNodesServer(grpcServer, witness{})
	pb.RegisterAgentsServer(grpcServer, witness{})
	pb.RegisterClusterServer(grpcServer, witness{})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	ended := make(chan error, 2)
	go func() { ended <- mux.Run(ctx) }()
	go func() { ended <- grpcServer.Serve(mux.GRPC()) }()
	defer func() {
		grpcServer.Stop()
		cancel()
		if err := errors.Join(<-ended, <-ended); err != nil {
			t.Error(err)
		}
	}()

	listNodes := func(conn *grpc.ClientConn) (string, error) {
		answer, err := pb.NewNodesClient(conn).ListNodes(ctx, &pb.ListNodesRequest{})
		if err != nil {
			return "", err
		}
		return answer.Nodes[0].Id, nil
	}
	session := func(conn *grpc.ClientConn) (string, error) {
		stream, err := pb.NewAgentsClient(conn).Session(ctx)
		if err != nil {
			return "", err
		}
		answer, err := stream.Recv()
		if err != nil {
			return "", err
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			return "", err
		}
		return answer.GetWelcome().ClusterId, nil
	}
	join := func(conn *grpc.ClientConn) (string, error) {
		answer, err := pb.NewClusterClient(conn).Join(ctx, &pb.JoinRequest{})
		return answer.GetName(), err
	}
	as := func(role pb.Role, name string) grpc.DialOption { return issue(role, name).DialOption(nil) }
	anonymous := grpc.WithTransportCredentials(credentials.NewTLS(pki.PinnedTLS(authority.Pins())))
	for _, test := range []struct {
		name   string
		option grpc.DialOption
		call   func(*grpc.ClientConn) (string, error)
		caller string
		code   codes.Code
	}{
		{"viewer lists nodes", as(pb.Role_ROLE_VIEWER, "vi"), listNodes, "spiffe://c1/viewer/vi", codes.OK},
		{"agent lists nodes", as(pb.Role_ROLE_AGENT, "a1"), listNodes, "", codes.PermissionDenied},
		{"nobody lists nodes", anonymous, listNodes, "", codes.Unauthenticated},
		{"agent opens session", as(pb.Role_ROLE_AGENT, "a1"), session, "spiffe://c1/agent/a1", codes.OK},
		{"admin opens session", as(pb.Role_ROLE_ADMIN, "al"), session, "", codes.PermissionDenied},
		{"nobody opens session", anonymous, session, "", codes.Unauthenticated},
		{"nobody joins", anonymous, join, "nobody", codes.OK},
		{"metrics joins", as(pb.Role_ROLE_METRICS, "me"), join, "", codes.PermissionDenied},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn, err := grpc.NewClient("passthrough:///"+listener.Addr().String(), test.option)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			caller, err := test.call(conn)
			if status.Code(err) != test.code || caller != test.caller {
				t.Errorf("the handler saw %q, %v; want %q, %s", caller, err, test.caller, test.code)
			}
		})
	}
}

// Without TLS there is no identity, whatever the context says.
func TestInterceptorsWithoutTLS(t *testing.T) {
	forged := WithIdentity(context.Background(), pki.Identity{Cluster: "c1", Role: pb.Role_ROLE_ADMIN, Name: "al"})
	_, err := UnaryInterceptor(forged, nil, &grpc.UnaryServerInfo{FullMethod: pb.Nodes_ListNodes_FullMethodName},
		func(context.Context, any) (any, error) { t.Error("called"); return nil, nil })
	if status.Code(err) != codes.Unauthenticated {
		t.Error(err)
	}
}
