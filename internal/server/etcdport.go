package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/persys-dev/persys/internal/pki"
)

const (
	// From accept until it is known what is spoken.
	greetingTimeout = 10 * time.Second
	// Open connections of etcd's clients.
	mostEtcdConns = 16384
	// What a request may have beside what is limited, as in etcd.
	requestOverhead = 512 * 1024
	// Answers are as large as what was asked for, as in etcd.
	largestAnswer = 1<<31 - 1
)

// etcdPort is the port for etcd's clients. Like etcd's it carries gRPC and HTTP
// with JSON; connections are told apart by their first bytes, or, over TLS, by
// what the handshake agreed on.
type etcdPort struct {
	listener net.Listener
	tls      *tls.Config // nil: plain
	anybody  bool        // clients need no certificate
	grpc     *grpc.Server
	http     *http.Server
	log      *slog.Logger
}

// grpcOptions are those of a server for this port.
func (c EtcdConfig) grpcOptions() []grpc.ServerOption {
	var creds credentials.TransportCredentials = insecure.NewCredentials()
	if c.CertFile != "" {
		creds = pki.TransportCredentials()
	}
	return []grpc.ServerOption{
		grpc.Creds(creds),
		grpc.MaxRecvMsgSize(c.MaxRequestBytes + requestOverhead), grpc.MaxSendMsgSize(largestAnswer),
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow),
		grpc.MaxConcurrentStreams(uint32(c.MaxStreams)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
	}
}

// run serves until ctx ends.
func (p *etcdPort) run(ctx context.Context) error {
	forGRPC, forHTTP := newHandOver(p.listener.Addr()), newHandOver(p.listener.Addr())
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return serveGRPC(ctx, p.grpc, forGRPC) })
	group.Go(func() error { return serveHTTP(ctx, p.http, forHTTP) })
	group.Go(func() error { return p.accept(ctx, forGRPC, forHTTP) })
	return group.Wait()
}

// announce says where the port is, and how open it is. No port announces nothing.
func (p *etcdPort) announce() {
	switch {
	case p == nil:
	case p.tls == nil:
		p.log.Warn("etcd's clients are served WITHOUT ENCRYPTION OR CERTIFICATES: every program and every user of this machine may read and change all keys and run workloads, unless etcd's auth is enabled",
			"address", p.listener.Addr())
	case p.anybody:
		p.log.Warn("etcd's clients are served WITHOUT ASKING FOR CERTIFICATES: whoever reaches this address may read and change all keys and run workloads, unless etcd's auth is enabled",
			"address", p.listener.Addr())
	default:
		p.log.Info("etcd's clients are served with TLS", "address", p.listener.Addr())
	}
}

func (p *etcdPort) accept(ctx context.Context, forGRPC, forHTTP *handOver) error {
	var greeting sync.WaitGroup
	defer greeting.Wait()
	stop := context.AfterFunc(ctx, func() { p.listener.Close() })
	defer stop()
	open := make(chan struct{}, mostEtcdConns)
	for {
		select {
		case open <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		conn, err := p.listener.Accept()
		if err != nil {
			<-open
			if ctx.Err() != nil {
				return ctx.Err()
			}
			var temporary net.Error
			if !errors.As(err, &temporary) || errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("etcd_listen: %w", err)
			}
			// Out of file descriptors, most likely: some will be free again.
			p.log.Warn("connection not accepted", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		counted := &clientConn{Conn: conn, release: sync.OnceFunc(func() { <-open })}
		greeting.Go(func() { p.greet(ctx, counted, forGRPC, forHTTP) })
	}
}

// greet finds out what a client speaks and hands it over.
func (p *etcdPort) greet(ctx context.Context, conn *clientConn, forGRPC, forHTTP *handOver) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(greetingTimeout)) // fails only where reading does
	spoken, isGRPC, err := p.protocol(ctx, conn)
	if err != nil {
		conn.Close()
		p.log.Debug("connection not served", "from", conn.RemoteAddr(), "error", err)
		return
	}
	_ = conn.SetDeadline(time.Time{})
	if isGRPC {
		forGRPC.give(spoken)
	} else {
		forHTTP.give(spoken)
	}
}

func (p *etcdPort) protocol(ctx context.Context, conn *clientConn) (spoken net.Conn, isGRPC bool, err error) {
	if p.tls != nil {
		secured := tls.Server(conn, p.tls)
		if err := secured.HandshakeContext(ctx); err != nil {
			return nil, false, err
		}
		return secured, secured.ConnectionState().NegotiatedProtocol == pki.ALPNGRPC, nil
	}
	// HTTP/2 begins with "PRI * HTTP/2.0"; no method of HTTP/1 begins so.
	first := make([]byte, 3)
	if _, err := io.ReadFull(conn, first); err != nil {
		return nil, false, err
	}
	conn.first = first
	return conn, string(first) == "PRI", nil
}

// clientConn is a connection of which the first bytes may have been read.
type clientConn struct {
	net.Conn
	first   []byte
	release func()
}

func (c *clientConn) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

func (c *clientConn) Close() error {
	c.release()
	return c.Conn.Close()
}

// handOver is a listener for connections that were accepted elsewhere.
type handOver struct {
	address net.Addr
	conns   chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

func newHandOver(address net.Addr) *handOver {
	return &handOver{address: address, conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (h *handOver) give(conn net.Conn) {
	select {
	case h.conns <- conn:
	case <-h.closed:
		conn.Close()
	}
}

func (h *handOver) Accept() (net.Conn, error) {
	select {
	case conn := <-h.conns:
		return conn, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *handOver) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (h *handOver) Addr() net.Addr { return h.address }
