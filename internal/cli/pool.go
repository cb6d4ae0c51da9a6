package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/internal/server"
)

const (
	// A server that connects but does not answer a call is given up for another
	// one after this long.
	attemptTimeout = 5 * time.Second
	// Between rounds over all servers, while there is hope (an election).
	roundPause = 200 * time.Millisecond
	// Rounds in which every server refused the connection before the command
	// fails: the second forgives a restart that is under way.
	hopelessRounds = 2
)

// connectTimeouts bound one attempt to connect, by round: short at first, so that
// a machine that is gone costs little, longer when nobody answered in time.
var connectTimeouts = []time.Duration{300 * time.Millisecond, time.Second, 3 * time.Second}

// pool is a client connection over several replicas. A call goes to the server
// that answered last, else to each in turn, until one answers or the deadline
// has passed. Calls are repeated only where the servers are unavailable; what
// the CLI calls is safe to repeat, or carries an idempotency key.
type pool struct {
	servers []*serverConn

	mu        sync.Mutex
	preferred int // index into servers
}

// serverConn is the connection to one replica, made when it is first needed.
type serverConn struct {
	address string
	creds   credentials.TransportCredentials

	mu   sync.Mutex
	conn *grpc.ClientConn
	// Why the last attempt to connect failed: gRPC itself does not tell.
	cause error
}

func newPool(addresses []string, creds credentials.TransportCredentials) *pool {
	p := &pool{}
	for _, a := range addresses {
		p.servers = append(p.servers, &serverConn{address: a, creds: creds})
	}
	return p
}

func (p *pool) close() {
	for _, s := range p.servers {
		s.drop()
	}
}

// Invoke implements grpc.ClientConnInterface.
func (p *pool) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return p.try(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		if len(p.servers) > 1 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, attemptTimeout)
			defer cancel()
		}
		return conn.Invoke(ctx, method, args, reply, opts...)
	})
}

// NewStream implements grpc.ClientConnInterface. Only opening the stream is
// tried elsewhere; when it breaks later its user opens another (see follow).
func (p *pool) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	var stream grpc.ClientStream
	err := p.try(ctx, func(_ context.Context, conn *grpc.ClientConn) error {
		var err error
		stream, err = conn.NewStream(ctx, desc, method, opts...)
		return err
	})
	return stream, err
}

// try makes the call on each server in turn.
func (p *pool) try(ctx context.Context, call func(context.Context, *grpc.ClientConn) error) error {
	var said []string
	hopeless := 0
	for round := 0; ; round++ {
		said = said[:0]
		refused := 0
		for range p.servers {
			i := p.current()
			s := p.servers[i]
			conn, err := s.connect(ctx, connectTimeouts[min(round, len(connectTimeouts)-1)])
			if err == nil {
				if err = call(ctx, conn); notGRPC(err) {
					err = errNotGRPC
					refused++
				} else if !outOfTime(ctx, err) && !tryElsewhere(ctx, err) {
					return err
				}
			} else if !errors.Is(err, errSlow) {
				refused++
			}
			if ctx.Err() != nil {
				return gaveUp(ctx, append(said, describeFailure(s.address, err)))
			}
			said = append(said, describeFailure(s.address, err))
			p.next(i)
		}
		if refused == len(p.servers) {
			hopeless++
		} else {
			hopeless = 0
		}
		if hopeless == hopelessRounds {
			return coded(exitUnavailable, "no server answers: %s", strings.Join(said, "; "))
		}
		select {
		case <-ctx.Done():
			return gaveUp(ctx, said)
		case <-time.After(roundPause):
		}
	}
}

var errNotGRPC = fmt.Errorf("what answers there is not the gRPC port of a server, which is %d where it was not changed", server.DefaultGRPCPort)

// notGRPC recognises what gRPC makes of an answer over plain HTTP.
func notGRPC(err error) bool {
	st, ok := statusOf(err)
	return ok && strings.HasPrefix(st.Message(), "unexpected HTTP status code received from server")
}

// outOfTime reports whether the command's time was up before the server answered,
// which gRPC says in several ways.
func outOfTime(ctx context.Context, err error) bool {
	return codeOf(err) == codes.DeadlineExceeded && errors.Is(ctx.Err(), context.DeadlineExceeded)
}

// tryElsewhere reports whether another server may answer better.
func tryElsewhere(ctx context.Context, err error) bool {
	switch codeOf(err) {
	case codes.Unavailable:
		return true
	case codes.DeadlineExceeded: // of the attempt, not of the command
		return ctx.Err() == nil
	}
	return false
}

func gaveUp(ctx context.Context, said []string) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return coded(exitUnavailable, "timed out: %s; /readyz?verbose of a server says what it misses", strings.Join(said, "; "))
}

func (p *pool) current() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.preferred
}

// next passes over server i, unless another caller did so already.
func (p *pool) next(i int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.preferred == i {
		p.preferred = (i + 1) % len(p.servers)
	}
}

var errSlow = errors.New("no answer yet")

// connect waits until the connection stands. A failed connection is thrown away,
// because gRPC would make the next attempt wait for its back-off. errSlow: it is
// still under way.
func (s *serverConn) connect(ctx context.Context, timeout time.Duration) (*grpc.ClientConn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := s.open()
	if err != nil {
		return nil, err
	}
	for {
		conn.Connect()
		state := conn.GetState()
		switch state {
		case connectivity.Ready:
			return conn, nil
		case connectivity.TransientFailure, connectivity.Shutdown:
			return nil, s.drop()
		}
		if !conn.WaitForStateChange(ctx, state) {
			return nil, errSlow
		}
	}
}

func (s *serverConn) open() (*grpc.ClientConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		return s.conn, nil
	}
	s.cause = nil
	conn, err := grpc.NewClient("passthrough:///"+s.address,
		grpc.WithTransportCredentials(&watchedCredentials{s.creds.Clone(), s}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
			s.note(err)
			return c, err
		}),
		// Notices a server that is frozen or cut off while a stream waits.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
	)
	if err != nil {
		return nil, fmt.Errorf("endpoint %q: %w", s.address, err)
	}
	s.conn = conn
	return conn, nil
}

// drop closes the connection and tells why it failed.
func (s *serverConn) drop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		_ = s.conn.Close() // nothing is lost with it
		s.conn = nil
	}
	if s.cause != nil {
		return s.cause
	}
	return errors.New("connection failed")
}

func (s *serverConn) note(err error) {
	if err == nil || errors.Is(err, context.Canceled) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cause = err
}

// watchedCredentials remembers why a handshake failed.
type watchedCredentials struct {
	credentials.TransportCredentials
	server *serverConn
}

func (w *watchedCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := w.TransportCredentials.ClientHandshake(ctx, authority, raw)
	w.server.note(err)
	return c, info, err
}

func (w *watchedCredentials) Clone() credentials.TransportCredentials {
	return &watchedCredentials{w.TransportCredentials.Clone(), w.server}
}

// The end of gRPC's own texts about a connection is what matters in them.
var innermost = regexp.MustCompile(`^.*desc = "?(.*?)"?$`)

// describeFailure is one server's part of an error message.
func describeFailure(address string, err error) string {
	text := "no answer"
	var op *net.OpError
	switch {
	case err == nil, errors.Is(err, errSlow), errors.Is(err, context.DeadlineExceeded):
	case errors.As(err, &op):
		text = strings.TrimPrefix(op.Err.Error(), "connect: ")
	default:
		text = err.Error()
		if st, ok := status.FromError(err); ok {
			text = st.Message()
			if st.Code() == codes.DeadlineExceeded {
				text = "no answer"
			}
		}
		text = innermost.ReplaceAllString(text, "$1")
	}
	return address + ": " + text
}

// follow reads a stream to its end and opens it again where the server went
// away; open continues from what each has seen. It ends with the stream, with
// an error of each, or when each says that it is done.
func follow[T any](ctx context.Context, p *pool, open func(context.Context) (grpc.ServerStreamingClient[T], error), each func(*T) (done bool, err error)) error {
	for {
		i := p.current()
		again, err := followOnce(ctx, open, each)
		if !again || ctx.Err() != nil {
			return err
		}
		p.next(i)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(roundPause):
		}
	}
}

func followOnce[T any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[T], error), each func(*T) (bool, error)) (again bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := open(ctx)
	if err != nil {
		return false, err // every server was tried
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return codeOf(err) == codes.Unavailable, endOf(err)
		}
		if done, err := each(m); done || err != nil {
			return false, err
		}
	}
}

// endOf is nil for the regular end of a stream.
func endOf(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
