package etcd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	etcdgw "go.etcd.io/etcd/api/v3/etcdserverpb/gw"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/gateway/local"
	"github.com/persys-dev/persys/proto/etcd/v3electionpb"
	"github.com/persys-dev/persys/proto/etcd/v3lockpb"
)

// JSON is etcd's API as HTTP with JSON, below /v3/: each method as etcd's gateway
// maps it. admit is asked for each call; the caller's token is in the incoming
// metadata, its certificate in the peer.
//
// Names, numbers as text and left-out defaults are as in etcd. Errors have the
// fields of etcd 3.4 (error, message, code; in streams grpc_code, http_code,
// message, http_status), which clients such as Patroni read, and of the later ones.
func (s *Server) JSON(admit local.Admit) (http.Handler, error) {
	conn := local.New(admit)
	s.Register(conn)
	mux := runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, codec),
		runtime.WithErrorHandler(writeError),
		runtime.WithRoutingErrorHandler(func(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, _ *http.Request, code int) {
			http.Error(w, http.StatusText(code), code)
		}),
		// No header becomes metadata by itself: see withCaller.
		runtime.WithIncomingHeaderMatcher(func(string) (string, bool) { return "", false }),
		runtime.WithDisablePathLengthFallback(),
	)
	ctx := context.Background()
	if err := errors.Join(
		registerJSON(ctx, mux, conn),
		v3lockpb.RegisterLockHandlerClient(ctx, mux, v3lockpb.NewLockClient(conn)),
		v3electionpb.RegisterElectionHandlerClient(ctx, mux, v3electionpb.NewElectionClient(conn)),
	); err != nil {
		return nil, err
	}
	protection := http.NewCrossOriginProtection()
	protection.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		writeError(r.Context(), nil, nil, w, r, status.Error(codes.PermissionDenied, "a page of another site may not call this API"))
	}))
	return protection.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r, end := s.prepareJSON(w, r)
		defer end()
		mux.ServeHTTP(w, r)
	})), nil
}

// prepareJSON makes of a request what the generated code wants. What it returns is
// to be called at the end.
func (s *Server) prepareJSON(w http.ResponseWriter, r *http.Request) (*http.Request, func()) {
	ctx, fail := context.WithCancelCause(withCaller(r))
	r = r.Clone(ctx)
	// As etcd's clients of before 3.4 have it.
	for _, before := range []string{"/v3beta/", "/v3alpha/"} {
		if rest, ok := strings.CutPrefix(r.URL.Path, before); ok {
			r.URL.Path, r.URL.RawPath = "/v3/"+rest, ""
		}
	}
	release := func() {}
	if r.ProtoMajor == 1 && r.ContentLength < 0 {
		release = duplex(w, r.Body)
	}
	// Base64 makes three bytes four; the names are in the other half.
	limit := int64(2*s.config.MaxRequestBytes + 64*1024)
	r.Body = &requestBody{http.MaxBytesReader(w, r.Body, limit), fail}
	return r, func() {
		fail(nil)
		release()
	}
}

// duplex lets a watch take requests while it answers, which HTTP/2 does anyway. The
// connection ends with the call: a body of unknown length may have been left unread.
func duplex(w http.ResponseWriter, body io.Closer) (release func()) {
	c := http.NewResponseController(w)
	if c.EnableFullDuplex() != nil {
		return func() {}
	}
	w.Header().Set("Connection", "close")
	return func() {
		// The generated code may still wait for a request.
		_ = c.SetReadDeadline(time.Now())
		_ = body.Close()
	}
}

// withCaller notes what package auth asks of a call: the token that the
// Authorization header is, and the certificate.
func withCaller(r *http.Request) context.Context {
	ctx := r.Context()
	if token := r.Header.Get("Authorization"); token != "" {
		ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("authorization", token))
	}
	p := &peer.Peer{Addr: httpAddr(r.RemoteAddr)}
	if r.TLS != nil {
		p.AuthInfo = tlsInfo(r.TLS)
	}
	return peer.NewContext(ctx, p)
}

// asJSON reports whether a call came as JSON.
func asJSON(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	_, ok = p.Addr.(httpAddr)
	return ok
}

func tlsInfo(state *tls.ConnectionState) credentials.TLSInfo {
	return credentials.TLSInfo{State: *state, CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
}

type httpAddr string

var _ net.Addr = httpAddr("")

func (httpAddr) Network() string  { return "tcp" }
func (a httpAddr) String() string { return string(a) }

// requestBody ends the call when it can't be read: the generated code would let a
// stream wait for more.
type requestBody struct {
	io.ReadCloser
	fail context.CancelCauseFunc
}

func registerJSON(ctx context.Context, mux *runtime.ServeMux, conn grpc.ClientConnInterface) error {
	return errors.Join(
		etcdgw.RegisterKVHandlerClient(ctx, mux, etcdpb.NewKVClient(conn)),
		etcdgw.RegisterWatchHandlerClient(ctx, mux, etcdpb.NewWatchClient(conn)),
		etcdgw.RegisterLeaseHandlerClient(ctx, mux, etcdpb.NewLeaseClient(conn)),
		etcdgw.RegisterClusterHandlerClient(ctx, mux, etcdpb.NewClusterClient(conn)),
		etcdgw.RegisterMaintenanceHandlerClient(ctx, mux, etcdpb.NewMaintenanceClient(conn)),
		etcdgw.RegisterAuthHandlerClient(ctx, mux, etcdpb.NewAuthClient(conn)),
	)
}

// jsonCodec is etcd's JSON, on one line: protojson adds spaces at random.
type jsonCodec struct{ *runtime.JSONPb }

var codec = jsonCodec{&runtime.JSONPb{
	MarshalOptions:   protojson.MarshalOptions{UseProtoNames: true},
	UnmarshalOptions: protojson.UnmarshalOptions{DiscardUnknown: true},
}}

func (jsonCodec) ContentType(any) string { return "application/json" }

func (c jsonCodec) Marshal(v any) ([]byte, error) {
	if chunk, ok := v.(map[string]proto.Message); ok {
		if s, ok := chunk["error"].(*spb.Status); ok {
			return json.Marshal(map[string]streamError{"error": newStreamError(s)})
		}
	}
	data, err := c.JSONPb.Marshal(v)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Compact(&b, data); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func (c jsonCodec) NewDecoder(r io.Reader) runtime.Decoder {
	d := c.JSONPb.NewDecoder(r)
	return runtime.DecoderFunc(func(v any) error {
		err := d.Decode(v)
		if body, ok := r.(*requestBody); ok && err != nil && !errors.Is(err, io.EOF) {
			err = badBody(err)
			body.fail(err)
		}
		return err
	})
}

func badBody(err error) error {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return rpctypes.ErrGRPCRequestTooLarge
	}
	return status.Error(codes.InvalidArgument, err.Error())
}

// streamError is an error after which a stream ends.
type streamError struct {
	GRPCCode   int32  `json:"grpc_code"`
	HTTPCode   int    `json:"http_code"`
	Message    string `json:"message"`
	HTTPStatus string `json:"http_status"`
	Code       int32  `json:"code"`
}

func newStreamError(s *spb.Status) streamError {
	code := runtime.HTTPStatusFromCode(codes.Code(s.Code))
	return streamError{GRPCCode: s.Code, HTTPCode: code, Message: s.Message, HTTPStatus: http.StatusText(code), Code: s.Code}
}

// writeError answers with the error of a call, or with what was wrong with its
// body.
func writeError(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, err error) {
	if cause := context.Cause(r.Context()); cause != nil {
		err = cause
	}
	s := status.Convert(statusOf(err))
	w.Header().Del("Transfer-Encoding")
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(runtime.HTTPStatusFromCode(s.Code()))
	// A client that is gone needs no answer.
	_ = json.NewEncoder(w).Encode(struct {
		Error   string     `json:"error"`
		Message string     `json:"message"`
		Code    codes.Code `json:"code"`
	}{s.Message(), s.Message(), s.Code()})
}
