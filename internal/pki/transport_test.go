package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// A real gRPC server behind the Mux sees who calls.
func TestGRPC(t *testing.T) {
	a := newTestAuthority(t, "c1")
	s1, a1 := issue(t, a, server, "s1", time.Hour), issue(t, a, agent, "a1", time.Hour)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := startMuxOn(t, listener, s1, MuxOptions{})
	callers := make(chan string, 1)
	grpcServer := grpc.NewServer(grpc.Creds(TransportCredentials()), grpc.UnaryInterceptor(
		func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			caller := "nobody"
			if p, ok := peer.FromContext(ctx); ok {
				if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
					if id, ok := PeerIdentity(info.State); ok {
						caller = id.URI()
					}
				}
			}
			callers <- caller
			return handler(ctx, request)
		}))
	healthpb.RegisterHealthServer(grpcServer, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- grpcServer.Serve(m.GRPC()) }()

	for _, test := range []struct {
		name   string
		option grpc.DialOption
		caller string
		err    string
	}{
		{"agent", a1.DialOption(nil), "spiffe://c1/agent/a1", ""},
		{"agent that wants this server", a1.DialOption(func(id Identity) error { return RequireRole(server)(id) }), "spiffe://c1/agent/a1", ""},
		{"agent that wants an admin", a1.DialOption(RequireRole(admin)), "", "server/s1 does not have role admin"},
		{"joining", grpc.WithTransportCredentials(credentials.NewTLS(PinnedTLS(a.Pins()))), "nobody", ""},
		{"joining another cluster", grpc.WithTransportCredentials(credentials.NewTLS(PinnedTLS(newTestAuthority(t, "c1").Pins()))), "", "none of those in the token"},
		{"plain text", grpc.WithTransportCredentials(insecure.NewCredentials()), "", "Unavailable"},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn, err := grpc.NewClient("passthrough:///"+m.address, test.option)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
			wantError(t, err, test.err)
			if err == nil {
				if caller := <-callers; caller != test.caller {
					t.Errorf("the server sees %s, want %s", caller, test.caller)
				}
			}
		})
	}
	grpcServer.GracefulStop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// What did not come through the Mux must not get an identity, or none, by it.
func TestTransportCredentialsRefuse(t *testing.T) {
	c := TransportCredentials()
	left, right := net.Pipe()
	defer left.Close()
	defer right.Close()
	s1 := issue(t, newTestAuthority(t, "c1"), server, "s1", time.Hour)
	for name, conn := range map[string]net.Conn{"plain": left, "before its handshake": tls.Server(left, s1.ServerTLS(ALPNGRPC))} {
		if _, _, err := c.ServerHandshake(conn); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, _, err := c.Clone().ClientHandshake(context.Background(), "", right); err == nil {
		t.Error("a call was made with credentials of the answering side")
	}
}

// Raft's own transport, over the Mux on both sides.
func TestRaftStream(t *testing.T) {
	a := newTestAuthority(t, "c1")
	transport := func(name string) *raft.NetworkTransport {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		creds := issue(t, a, server, name, time.Hour)
		m := startMuxOn(t, listener, creds, MuxOptions{})
		stream := NewRaftStream(m.Raft(), creds, m.address)
		transport := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Stream: stream, MaxPool: 2, Timeout: patience, Logger: nil})
		t.Cleanup(func() { transport.Close() })
		return transport
	}
	s1, s2 := transport("s1"), transport("s2")
	go func() {
		rpc := <-s2.Consumer()
		rpc.Respond(&raft.RequestVoteResponse{Term: rpc.Command.(*raft.RequestVoteRequest).Term + 1, Granted: true}, nil)
	}()
	var response raft.RequestVoteResponse
	if err := s1.RequestVote("s2", s2.LocalAddr(), &raft.RequestVoteRequest{Term: 7}, &response); err != nil {
		t.Fatal(err)
	}
	if response.Term != 8 || !response.Granted {
		t.Errorf("%+v", response)
	}
}

func TestRaftStreamDialRefuses(t *testing.T) {
	a := newTestAuthority(t, "c1")
	s1 := issue(t, a, server, "s1", time.Hour)
	serve := func(config *tls.Config) raft.ServerAddress {
		listener, err := tls.Listen("tcp", "127.0.0.1:0", config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					_ = conn.(*tls.Conn).Handshake()
				}()
			}
		}()
		return raft.ServerAddress(listener.Addr().String())
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, test := range []struct {
		name    string
		address raft.ServerAddress
		timeout time.Duration
		err     string
	}{
		{"another server", serve(issue(t, a, server, "s2", time.Hour).ServerTLS(ALPNRaft)), patience, ""},
		{"gRPC only", serve(issue(t, a, server, "s2", time.Hour).ServerTLS(ALPNGRPC)), patience, "no application protocol"},
		{"no protocols", serve(issue(t, a, server, "s2", time.Hour).ServerTLS()), patience, "does not speak persys-raft"},
		{"agent", serve(forge(t, a, func(c *x509.Certificate) { c.URIs[0].Path = "/agent/x" }).ServerTLS(ALPNRaft)), patience, "agent/x does not have role server"},
		{"other cluster", serve(issue(t, newTestAuthority(t, "c2"), server, "s2", time.Hour).ServerTLS(ALPNRaft)), patience, "server/s2 is of cluster c2, this is cluster c1"},
		{"silent", raft.ServerAddress(silent.Addr().String()), 50 * time.Millisecond, "deadline exceeded"},
		{"nobody", "127.0.0.1:1", patience, "connection refused"},
	} {
		t.Run(test.name, func(t *testing.T) {
			stream := NewRaftStream(newProtocolListener(nil), s1, "s1.example.com:7481")
			if got := stream.Addr(); got.String() != "s1.example.com:7481" || got.Network() != "tcp" {
				t.Errorf("advertised is %s", got)
			}
			conn, err := stream.Dial(test.address, test.timeout)
			if err == nil {
				conn.Close()
			}
			wantError(t, err, test.err)
		})
	}
}

func TestRoleNames(t *testing.T) {
	for number, name := range pb.Role_name {
		role := pb.Role(number)
		if role == pb.Role_ROLE_UNSPECIFIED {
			continue
		}
		if got, err := ParseRole(RoleName(role)); err != nil || got != role {
			t.Errorf("%s is written %s and read %s, %v", name, RoleName(role), got, err)
		}
	}
}
