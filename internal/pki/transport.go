package pki

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// TransportCredentials are for a gRPC server on Mux.GRPC: the handshake has
// been made, and is shown to handlers as credentials.TLSInfo.
func TransportCredentials() credentials.TransportCredentials { return handshaken{} }

type handshaken struct{}

func (handshaken) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	// A connection that is not TLS, or not yet, must not pass for one that is.
	shaken, ok := conn.(*tls.Conn)
	if !ok {
		return nil, nil, fmt.Errorf("connection is a %T, not one that the TLS handshake was made for", conn)
	}
	state := shaken.ConnectionState()
	if !state.HandshakeComplete || state.NegotiatedProtocol != ALPNGRPC {
		return nil, nil, errors.New("connection is not one that the TLS handshake for gRPC was made for")
	}
	return shaken, credentials.TLSInfo{
		State:          state,
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

func (handshaken) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for the answering side only")
}

func (handshaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (h handshaken) Clone() credentials.TransportCredentials { return h }

func (handshaken) OverrideServerName(string) error { return nil }

// DialOption makes gRPC calls with these credentials, to servers of the cluster
// that want, where given, does not object to.
func (c *Credentials) DialOption(want func(Identity) error) grpc.DialOption {
	return grpc.WithTransportCredentials(credentials.NewTLS(c.ClientTLS(want)))
}

// RaftStream is a raft.StreamLayer: connections between servers of the cluster,
// each with its certificate, told from gRPC by ALPN.
type RaftStream struct {
	net.Listener // Mux.Raft
	creds        *Credentials
	advertise    string
}

var _ raft.StreamLayer = (*RaftStream)(nil)

// NewRaftStream makes the stream layer of the server that others reach at
// advertise (host:port).
func NewRaftStream(listener net.Listener, creds *Credentials, advertise string) *RaftStream {
	return &RaftStream{Listener: listener, creds: creds, advertise: advertise}
}

// Addr is the advertised address.
func (s *RaftStream) Addr() net.Addr { return advertised(s.advertise) }

// A host name may be advertised too, which a net.TCPAddr cannot hold.
type advertised string

func (advertised) Network() string  { return "tcp" }
func (a advertised) String() string { return string(a) }

// Dial connects and makes the handshake within the time-out. That the other
// side refuses us shows with the first read, as always in TLS 1.3.
func (s *RaftStream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	// net.Dialer takes 0 for no bound at all, and so would a caller mean it.
	dialer := tls.Dialer{
		NetDialer: &net.Dialer{Timeout: timeout},
		Config:    s.creds.ClientTLS(RequireRole(pb.Role_ROLE_SERVER), ALPNRaft),
	}
	conn, err := dialer.Dial("tcp", string(address))
	if err != nil {
		return nil, fmt.Errorf("raft connection to %s: %w", address, err)
	}
	if shaken, ok := conn.(*tls.Conn); !ok || shaken.ConnectionState().NegotiatedProtocol != ALPNRaft {
		return nil, errors.Join(fmt.Errorf("raft connection to %s: the other side does not speak %s", address, ALPNRaft), conn.Close())
	}
	return conn, nil
}
