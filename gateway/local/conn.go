// Package local calls gRPC services in the process that has them, streams
// included, as a client does over a connection: no socket, nothing is encoded. It
// is how REST and etcd's JSON reach the services.
//
// Nothing of a request but its message reaches a service by itself: who calls, and
// what of the headers is handed on, the Admit function decides.
package local

import (
	"context"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Admit says whether the caller may call the method ("/package.Service/Method"),
// and with what context. The error is a status.
type Admit func(ctx context.Context, method string) (context.Context, error)

// Conn is a connection to the services that were registered with it.
type Conn struct {
	admit   Admit
	unary   map[string]unary
	streams map[string]streaming
}

type unary struct {
	service any
	handler grpc.MethodHandler
}

type streaming struct {
	service any
	handler grpc.StreamHandler
}

var (
	_ grpc.ClientConnInterface = (*Conn)(nil)
	_ grpc.ServiceRegistrar    = (*Conn)(nil)
)

// New makes a connection to nothing yet; see RegisterService.
func New(admit Admit) *Conn {
	return &Conn{admit, map[string]unary{}, map[string]streaming{}}
}

// RegisterService adds a service, as a grpc.Server does; call it before all else.
func (c *Conn) RegisterService(desc *grpc.ServiceDesc, service any) {
	for _, m := range desc.Methods {
		c.unary["/"+desc.ServiceName+"/"+m.MethodName] = unary{service, m.Handler}
	}
	for _, m := range desc.Streams {
		c.streams["/"+desc.ServiceName+"/"+m.StreamName] = streaming{service, m.Handler}
	}
}

// Invoke calls a method that answers once.
func (c *Conn) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	m, ok := c.unary[method]
	if !ok {
		return status.Errorf(codes.Unimplemented, "there is no method %s", method)
	}
	ctx, err := c.admit(ctx, method)
	if err != nil {
		return err
	}
	answer, err := m.handler(m.service, ctx, func(request any) error { return transfer(request, args) }, nil)
	if err != nil {
		return statusOf(err)
	}
	return transfer(reply, answer)
}

// transfer copies a message into another one of its type.
func transfer(to, from any) error {
	dst, ok := to.(proto.Message)
	src, ok2 := from.(proto.Message)
	if !ok || !ok2 || dst.ProtoReflect().Descriptor() != src.ProtoReflect().Descriptor() {
		return status.Errorf(codes.Internal, "cannot hand a %T on as a %T", from, to)
	}
	proto.Merge(dst, src)
	return nil
}

// statusOf gives a handler's error the words that one over a connection has.
func statusOf(err error) error {
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return status.FromContextError(err).Err()
}

// NewStream calls a method with a stream on either side or both. The handler runs
// from now on, in a goroutine that ends with ctx: ctx must end.
func (c *Conn) NewStream(ctx context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	m, ok := c.streams[method]
	if !ok {
		return nil, status.Errorf(codes.Unimplemented, "there is no method %s that has a stream", method)
	}
	ctx, err := c.admit(ctx, method)
	if err != nil {
		return nil, err
	}
	s := &Stream{
		ctx: ctx, requests: make(chan proto.Message), answers: make(chan proto.Message),
		half: make(chan struct{}), header: make(chan struct{}), ended: make(chan struct{}),
	}
	go func() {
		s.err = m.handler(m.service, &serverStream{s})
		close(s.ended)
		s.sendHeader()
	}()
	return s, nil
}

// Stream is both ends of a call with streams. Nothing is buffered.
type Stream struct {
	ctx               context.Context
	requests, answers chan proto.Message

	halfOnce sync.Once
	half     chan struct{} // closed by CloseSend

	headerOnce sync.Once
	header     chan struct{} // closed by the first header or message, or the end
	ended      chan struct{} // closed at the end, err is set before
	err        error
}

var (
	_ grpc.ClientStream = (*Stream)(nil)
	_ grpc.ServerStream = (*serverStream)(nil)
)

// Context is the call's.
func (s *Stream) Context() context.Context { return s.ctx }

// Trailer is empty.
func (s *Stream) Trailer() metadata.MD { return nil }

// Ended is closed when the handler has returned.
func (s *Stream) Ended() <-chan struct{} { return s.ended }

func (s *Stream) sendHeader() { s.headerOnce.Do(func() { close(s.header) }) }

// Header waits until the service has said something.
func (s *Stream) Header() (metadata.MD, error) {
	select {
	case <-s.header:
		return metadata.MD{}, nil
	case <-s.ctx.Done():
		return nil, statusOf(s.ctx.Err())
	}
}

// SendMsg hands a copy to the service, as soon as it takes it. io.EOF means that
// the call has ended: RecvMsg says how.
func (s *Stream) SendMsg(m any) error {
	request, ok := m.(proto.Message)
	if !ok {
		return status.Errorf(codes.Internal, "cannot send a %T", m)
	}
	select {
	case s.requests <- proto.Clone(request):
		return nil
	case <-s.ended:
		return io.EOF
	case <-s.ctx.Done():
		return statusOf(s.ctx.Err())
	}
}

// CloseSend tells the service that nothing more comes.
func (s *Stream) CloseSend() error {
	s.halfOnce.Do(func() { close(s.half) })
	return nil
}

// RecvMsg waits for an answer; io.EOF is the good end.
func (s *Stream) RecvMsg(m any) error {
	select {
	case answer := <-s.answers:
		return transfer(m, answer)
	case <-s.ended:
		if s.err == nil {
			return io.EOF
		}
		return statusOf(s.err)
	case <-s.ctx.Done():
		return statusOf(s.ctx.Err())
	}
}

// serverStream is the service's end.
type serverStream struct{ s *Stream }

func (s *serverStream) Context() context.Context     { return s.s.ctx }
func (s *serverStream) SetHeader(metadata.MD) error  { return nil }
func (s *serverStream) SetTrailer(metadata.MD)       {}
func (s *serverStream) SendHeader(metadata.MD) error { s.s.sendHeader(); return nil }

func (s *serverStream) RecvMsg(m any) error {
	select {
	case request := <-s.s.requests:
		return transfer(m, request)
	case <-s.s.half:
		return io.EOF
	case <-s.s.ctx.Done():
		return s.s.ctx.Err()
	}
}

// SendMsg hands over a copy: a service may use its message again at once.
func (s *serverStream) SendMsg(m any) error {
	answer, ok := m.(proto.Message)
	if !ok {
		return fmt.Errorf("cannot send a %T", m)
	}
	s.s.sendHeader()
	select {
	case s.s.answers <- proto.Clone(answer):
		return nil
	case <-s.s.ctx.Done():
		return s.s.ctx.Err()
	}
}
