package gateway

import (
	"context"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// localConn lets REST call the services in process, streams included, as a gRPC
// client does: no socket, nothing is encoded. It asks the same table who may
// call what as the interceptors do, which do not run here.
//
// The caller's identity is a value in the context, put there by the HTTP
// handler out of the TLS connection. Nothing that a request carries can set it;
// metadata, the only thing that headers could become, is dropped.
type localConn struct {
	unary   map[string]localUnary
	streams map[string]localStreaming
}

type localUnary struct {
	service any
	desc    grpc.MethodDesc
}

type localStreaming struct {
	service any
	desc    grpc.StreamDesc
}

func (g *Gateway) localConn() *localConn {
	c := &localConn{map[string]localUnary{}, map[string]localStreaming{}}
	for _, s := range []grpc.ServiceDesc{pb.Workloads_ServiceDesc, pb.Nodes_ServiceDesc, pb.Cluster_ServiceDesc} {
		for _, m := range s.Methods {
			c.unary["/"+s.ServiceName+"/"+m.MethodName] = localUnary{g, m}
		}
		for _, m := range s.Streams {
			c.streams["/"+s.ServiceName+"/"+m.StreamName] = localStreaming{g, m}
		}
	}
	return c
}

// admit asks who calls, and leaves of the context what a handler may see.
func (c *localConn) admit(ctx context.Context, method string) (context.Context, error) {
	id, ok := IdentityFrom(ctx)
	if err := Authorize(method, id, ok); err != nil {
		return nil, err
	}
	return metadata.NewOutgoingContext(ctx, metadata.MD{}), nil
}

func (c *localConn) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	m, ok := c.unary[method]
	if !ok {
		return status.Errorf(codes.Unimplemented, "there is no method %s", method)
	}
	ctx, err := c.admit(ctx, method)
	if err != nil {
		return err
	}
	answer, err := m.desc.Handler(m.service, ctx, func(request any) error { return transfer(request, args) }, nil)
	if err != nil {
		return statusOf(err)
	}
	return transfer(reply, answer)
}

// transfer moves a message into another one of its type.
func transfer(to, from any) error {
	dst, ok := to.(proto.Message)
	src, ok2 := from.(proto.Message)
	if !ok || !ok2 || dst.ProtoReflect().Descriptor() != src.ProtoReflect().Descriptor() {
		return status.Errorf(codes.Internal, "cannot hand a %T on as a %T", from, to)
	}
	proto.Merge(dst, src)
	return nil
}

func (c *localConn) NewStream(ctx context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	m, ok := c.streams[method]
	if !ok || m.desc.ClientStreams {
		return nil, status.Errorf(codes.Unimplemented, "there is no method %s that answers with a stream", method)
	}
	ctx, err := c.admit(ctx, method)
	if err != nil {
		return nil, err
	}
	return &localStream{
		ctx: ctx, method: m, messages: make(chan proto.Message), header: make(chan struct{}), ended: make(chan struct{}),
	}, nil
}

// localStream is both ends of a stream of answers to one request. The handler
// runs in a goroutine from the request on and ends with the context, at the
// latest when it sends.
type localStream struct {
	ctx      context.Context
	method   localStreaming
	request  proto.Message
	messages chan proto.Message

	headerOnce sync.Once
	header     chan struct{} // closed by the first header or message, or the end
	ended      chan struct{} // closed at the end, err is set before
	err        error
}

var (
	_ grpc.ClientStream = (*localStream)(nil)
	_ grpc.ServerStream = (*localServerStream)(nil)
)

func (s *localStream) Context() context.Context     { return s.ctx }
func (s *localStream) Trailer() metadata.MD         { return nil }
func (s *localStream) sendHeader()                  { s.headerOnce.Do(func() { close(s.header) }) }
func (s *localStream) Header() (metadata.MD, error) { return metadata.MD{}, s.wait(s.header) }

func (s *localStream) wait(until <-chan struct{}) error {
	select {
	case <-until:
		return nil
	case <-s.ctx.Done():
		return statusOf(s.ctx.Err())
	}
}

func (s *localStream) SendMsg(m any) error {
	request, ok := m.(proto.Message)
	if !ok || s.request != nil {
		return status.Error(codes.Internal, "a stream of answers takes one request")
	}
	s.request = proto.Clone(request)
	return nil
}

// CloseSend starts the handler: the request is complete.
func (s *localStream) CloseSend() error {
	go func() {
		s.err = s.method.desc.Handler(s.method.service, &localServerStream{s: s})
		close(s.ended)
		s.sendHeader()
	}()
	return nil
}

func (s *localStream) RecvMsg(m any) error {
	select {
	case got := <-s.messages:
		return transfer(m, got)
	case <-s.ended:
		if s.err == nil {
			return io.EOF
		}
		return statusOf(s.err)
	case <-s.ctx.Done():
		return statusOf(s.ctx.Err())
	}
}

type localServerStream struct {
	s        *localStream
	received bool
}

func (s *localServerStream) Context() context.Context     { return s.s.ctx }
func (s *localServerStream) SetHeader(metadata.MD) error  { return nil }
func (s *localServerStream) SetTrailer(metadata.MD)       {}
func (s *localServerStream) SendHeader(metadata.MD) error { s.s.sendHeader(); return nil }

func (s *localServerStream) RecvMsg(m any) error {
	if s.received {
		return io.EOF
	}
	s.received = true
	return transfer(m, s.s.request)
}

func (s *localServerStream) SendMsg(m any) error {
	message, ok := m.(proto.Message)
	if !ok {
		return errors.New("not a message")
	}
	s.s.sendHeader()
	select {
	case s.s.messages <- message:
		return nil
	case <-s.s.ctx.Done():
		return s.s.ctx.Err()
	}
}
