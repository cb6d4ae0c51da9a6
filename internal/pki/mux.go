package pki

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Protocols on the gRPC port, by ALPN.
const (
	ALPNRaft = "persys-raft"
	ALPNGRPC = "h2"
)

// MuxOptions bound what callers can take. A zero field means its default.
type MuxOptions struct {
	// From accept to the end of the handshake; 10 s.
	HandshakeTimeout time.Duration
	// At once; 256. One address gets at most a quarter of them, the rest of
	// its connections wait: it cannot keep others out.
	Handshakes int
	// Open connections of one address (of one /64 for IPv6); 4,096, because a
	// whole site of agents may come from one.
	PerAddress int
	// Open connections of all addresses; 16,384.
	Total  int
	Logger *slog.Logger
}

func (o MuxOptions) withDefaults() MuxOptions {
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.Handshakes == 0 {
		o.Handshakes = 256
	}
	if o.PerAddress == 0 {
		o.PerAddress = 4096
	}
	if o.Total == 0 {
		o.Total = 16384
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return o
}

// Mux takes the connections of one port, makes their handshakes and hands them,
// as *tls.Conn, to raft or gRPC. Raft gets servers of the cluster only. Who may
// call what over gRPC is not decided here: a caller without a certificate gets
// through, because joining needs it.
type Mux struct {
	listener   net.Listener
	creds      *Credentials
	options    MuxOptions
	config     *tls.Config
	handshakes chan struct{}
	raft, grpc *protocolListener

	mutex   sync.Mutex
	total   int
	sources map[netip.Addr]*source
	warned  time.Time // when a bound was last complained about
}

// source is an address that connections come from.
type source struct {
	open       int
	handshakes chan struct{}
}

// NewMux makes the Mux of a listener; nothing is accepted before Run.
func NewMux(listener net.Listener, creds *Credentials, options MuxOptions) *Mux {
	options = options.withDefaults()
	return &Mux{
		listener:   listener,
		creds:      creds,
		options:    options,
		config:     creds.ServerTLS(ALPNGRPC, ALPNRaft),
		handshakes: make(chan struct{}, options.Handshakes),
		raft:       newProtocolListener(listener.Addr()),
		grpc:       newProtocolListener(listener.Addr()),
		sources:    make(map[netip.Addr]*source),
	}
}

// Raft is where connections for raft arrive.
func (m *Mux) Raft() net.Listener { return m.raft }

// GRPC is where connections for gRPC arrive, for a server made with
// TransportCredentials.
func (m *Mux) GRPC() net.Listener { return m.grpc }

// Run accepts until ctx ends. Then it closes the listener and the handshakes
// under way, and ends the listeners of both protocols; connections that were
// handed over stay, they belong to who accepted them.
func (m *Mux) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	defer m.raft.Close()
	defer m.grpc.Close()
	stop := context.AfterFunc(ctx, func() { m.listener.Close() })
	defer stop()
	defer m.listener.Close()

	var pause time.Duration
	for {
		conn, err := m.listener.Accept()
		switch {
		case err == nil:
			pause = 0
		case ctx.Err() != nil:
			return nil
		case outOfResources(err):
			// Something else may free what is missing.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			m.warn("cannot accept connections", "error", err)
			select {
			case <-time.After(pause):
				continue
			case <-ctx.Done():
				return nil
			}
		default:
			return fmt.Errorf("accept on %s: %w", m.listener.Addr(), err)
		}
		counted, from, err := m.admit(conn)
		if err != nil {
			m.warn("connection refused", "peer", conn.RemoteAddr(), "error", err)
			conn.Close()
			continue
		}
		group.Go(func() {
			if err := m.serve(ctx, counted, from); err != nil {
				counted.Close()
				m.options.Logger.Info("connection refused", "peer", conn.RemoteAddr(), "error", err)
			}
		})
	}
}

func outOfResources(err error) bool {
	for _, passing := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, passing) {
			return true
		}
	}
	return false
}

// warn logs at most once a second, for what a crowd of callers can cause.
func (m *Mux) warn(message string, attrs ...any) {
	m.mutex.Lock()
	now := time.Now()
	quiet := now.Sub(m.warned) < time.Second
	if !quiet {
		m.warned = now
	}
	m.mutex.Unlock()
	if !quiet {
		m.options.Logger.Warn(message, attrs...)
	}
}

// admit counts the connection until it is closed.
func (m *Mux) admit(conn net.Conn) (*countedConn, *source, error) {
	address := sourceOf(conn.RemoteAddr())
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if m.total >= m.options.Total {
		return nil, nil, fmt.Errorf("%d connections are open, no more are taken", m.total)
	}
	from := m.sources[address]
	if from == nil {
		from = &source{handshakes: make(chan struct{}, max(1, m.options.Handshakes/4))}
		m.sources[address] = from
	}
	if from.open >= m.options.PerAddress {
		return nil, nil, fmt.Errorf("%d connections are open from %s, no more are taken", from.open, address)
	}
	from.open++
	m.total++
	return &countedConn{Conn: conn, release: func() {
		m.mutex.Lock()
		defer m.mutex.Unlock()
		m.total--
		if from.open--; from.open == 0 {
			delete(m.sources, address)
		}
	}}, from, nil
}

// sourceOf is the address that a caller cannot choose at will: of IPv6 the
// network only. What has no IP address counts as one.
func sourceOf(address net.Addr) netip.Addr {
	parsed, err := netip.ParseAddrPort(address.String())
	if err != nil {
		return netip.Addr{}
	}
	ip := parsed.Addr().Unmap().WithZone("")
	if ip.Is6() {
		ip = netip.PrefixFrom(ip, 64).Masked().Addr()
	}
	return ip
}

// serve makes the handshake and hands the connection over. Waiting for a
// place, shaking hands and waiting for who accepts share one deadline.
func (m *Mux) serve(ctx context.Context, conn net.Conn, from *source) error {
	ctx, cancel := context.WithTimeout(ctx, m.options.HandshakeTimeout)
	defer cancel()
	shaken, err := m.handshake(ctx, conn, from)
	if err != nil {
		return err
	}
	state := shaken.ConnectionState()
	switch state.NegotiatedProtocol {
	case ALPNGRPC:
		return m.grpc.deliver(ctx, shaken)
	case ALPNRaft:
		id, ok := PeerIdentity(state)
		if !ok {
			return fmt.Errorf("raft: %w", errNoCertificate)
		}
		if err := RequireRole(pb.Role_ROLE_SERVER)(id); err != nil {
			return fmt.Errorf("raft: %w", err)
		}
		return m.raft.deliver(ctx, shaken)
	default:
		return fmt.Errorf("the caller speaks neither %s nor %s", ALPNGRPC, ALPNRaft)
	}
}

func (m *Mux) handshake(ctx context.Context, conn net.Conn, from *source) (*tls.Conn, error) {
	for _, places := range []chan struct{}{from.handshakes, m.handshakes} {
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for a handshake: %w", ctx.Err())
		}
	}
	shaken := tls.Server(conn, m.config)
	if err := shaken.HandshakeContext(ctx); err != nil {
		if refused, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			err = explain(refused.Err, refused.UnverifiedCertificates, m.creds.Identity().Cluster)
		}
		return nil, fmt.Errorf("handshake: %w", err)
	}
	return shaken, nil
}

// countedConn gives its place back when it is closed.
type countedConn struct {
	net.Conn
	once    sync.Once
	release func()
}

func (c *countedConn) Close() error {
	defer c.once.Do(c.release)
	return c.Conn.Close()
}

// protocolListener is a net.Listener that connections are delivered to.
type protocolListener struct {
	address net.Addr
	conns   chan net.Conn
	once    sync.Once
	closed  chan struct{}
}

func newProtocolListener(address net.Addr) *protocolListener {
	return &protocolListener{address: address, conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *protocolListener) deliver(ctx context.Context, conn net.Conn) error {
	select {
	case l.conns <- conn:
		return nil
	case <-l.closed:
		return net.ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting to be accepted: %w", ctx.Err())
	}
}

func (l *protocolListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *protocolListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *protocolListener) Addr() net.Addr { return l.address }
