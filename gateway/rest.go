package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/gateway/local"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// maxBody bounds a request's body before anything is parsed.
	maxBody = 1 << 20
	// callTimeout bounds a call that answers once.
	callTimeout = 30 * time.Second
)

// restMux is the routes of the annotations, each behind prepare.
func restMux(conn *local.Conn) (http.Handler, error) {
	all, err := routes()
	if err != nil {
		return nil, err
	}
	mux := runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, codec{}),
		runtime.WithMiddlewares(func(next runtime.HandlerFunc) runtime.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request, path map[string]string) {
				pattern, _ := runtime.HTTPPattern(r.Context())
				route := all[r.Method+" "+pattern.String()]
				if route == nil {
					writeProblem(w, r, status.Errorf(codes.Internal, "no route for %s %s", r.Method, pattern))
					return
				}
				id, ok := IdentityFrom(r.Context())
				if err := Authorize(route.method.fullName, id, ok); err != nil {
					// Before a byte of the body is read; localConn asks again.
					writeProblem(w, r, err)
					return
				}
				r, err := prepare(w, r, route, path)
				switch {
				case err != nil:
					writeProblem(w, r, err)
				case route.method.streaming:
					serveStream(w, r, conn, route, path)
				default:
					ctx, cancel := context.WithTimeout(r.Context(), callTimeout)
					defer cancel()
					next(w, r.WithContext(ctx), path)
				}
			}
		}),
		runtime.WithForwardResponseOption(answerHeaders),
		runtime.WithErrorHandler(func(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, err error) {
			writeProblem(w, r, err)
		}),
		runtime.WithRoutingErrorHandler(func(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, code int) {
			writeRoutingProblem(w, r, code)
		}),
		// No header becomes metadata: see AdmitLocally.
		runtime.WithIncomingHeaderMatcher(func(string) (string, bool) { return "", false }),
		runtime.WithDisablePathLengthFallback(),
	)
	for _, register := range []func() error{
		func() error {
			return pb.RegisterWorkloadsHandlerClient(context.Background(), mux, pb.NewWorkloadsClient(conn))
		},
		func() error { return pb.RegisterNodesHandlerClient(context.Background(), mux, pb.NewNodesClient(conn)) },
		func() error {
			return pb.RegisterClusterHandlerClient(context.Background(), mux, pb.NewClusterClient(conn))
		},
	} {
		if err := register(); err != nil {
			return nil, err
		}
	}
	return mux, nil
}

// prepare refuses what the generated code would pass over, reads the body, and
// turns headers into the fields that they stand for.
func prepare(w http.ResponseWriter, r *http.Request, route *route, path map[string]string) (*http.Request, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return r, status.Errorf(codes.InvalidArgument, "the query is malformed: %v", err)
	}
	var errs model.FieldErrors
	for _, name := range slices.Sorted(maps.Keys(query)) {
		switch {
		case !route.takes(name):
			errs = append(errs, model.FieldError{Path: name, Message: "unknown query parameter; allowed: " + route.allowedQuery()})
		case len(query[name]) > 1:
			errs = append(errs, model.FieldError{Path: name, Message: "given more than once"})
		}
	}
	if len(errs) > 0 {
		return r, fieldStatus(errs, "")
	}
	if err := fieldsOfHeaders(r.Header, route, query); err != nil {
		return r, err
	}
	if err := route.decodeQuery(query, route.method.input.New().Interface()); err != nil {
		return r, statusOf(err)
	}
	body, err := readBody(w, r, route, path)
	if err != nil {
		return r, err
	}
	r = r.Clone(r.Context())
	r.URL.RawQuery = query.Encode()
	r.Body = body
	// The body is decoded by codec, whatever it is called.
	r.Header.Set("Content-Type", "application/json")
	return r, nil
}

// fieldsOfHeaders writes headers into the query, from where they are decoded
// like any other field.
func fieldsOfHeaders(h http.Header, route *route, query url.Values) error {
	set := func(header, field, value string) error {
		if !route.takes(field) {
			return status.Errorf(codes.InvalidArgument, "%s has no meaning here", header)
		}
		if query.Has(field) || query.Has(route.query[field].JSONName()) {
			return badField(field, "is given by %s already", header)
		}
		query.Set(field, value)
		return nil
	}
	if v := h.Get("Idempotency-Key"); v != "" {
		if err := set("Idempotency-Key", "idempotency_key", v); err != nil {
			return err
		}
	}
	if v := h.Get("If-Match"); v != "" {
		tag := strings.TrimSuffix(strings.TrimPrefix(v, `"`), `"`)
		if n, err := strconv.ParseInt(tag, 10, 64); err != nil || n <= 0 || len(tag)+2 != len(v) {
			return status.Errorf(codes.InvalidArgument, "If-Match: %.100q is not an ETag of this API; allowed: one that an answer gave, in quotes", v)
		}
		if err := set("If-Match", "if_version", tag); err != nil {
			return err
		}
	}
	if v := h.Get("If-None-Match"); v != "" {
		if v != "*" {
			return status.Errorf(codes.InvalidArgument, "If-None-Match: %.100q is not supported; allowed: *, when a workload is applied", v)
		}
		if err := set("If-None-Match", "create_only", "true"); err != nil {
			return err
		}
	}
	if v := h.Get("Last-Event-ID"); v != "" && route.takes("from_revision") && !query.Has("from_revision") && !query.Has("fromRevision") {
		query.Set("from_revision", v)
	}
	return nil
}

// body is a request's body, read, and what the path says of the object in it.
type body struct {
	*bytes.Reader
	data []byte
	// The path's parameter, which the body may repeat but not contradict.
	field, value string
	// Why it was not decoded, for the answer, and whether it is a spec.
	err  error
	spec bool
}

func (*body) Close() error { return nil }

func readBody(w http.ResponseWriter, r *http.Request, route *route, path map[string]string) (*body, error) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, &httpError{http.StatusRequestEntityTooLarge, status.Errorf(codes.InvalidArgument, "the body is larger than %d bytes", maxBody)}
	case err != nil:
		return nil, status.Errorf(codes.InvalidArgument, "the body cannot be read: %v", err)
	case route.body == "" && len(data) > 0:
		return nil, status.Errorf(codes.InvalidArgument, "%s takes no body here", r.Method)
	}
	if len(data) > 0 {
		if err := checkContentType(r.Header); err != nil {
			return nil, err
		}
	}
	b := &body{Reader: bytes.NewReader(data), data: data}
	for field, value := range path {
		b.field, b.value = field[strings.LastIndexByte(field, '.')+1:], value
	}
	return b, nil
}

// checkContentType accepts what is read as YAML or JSON anyway, and what curl
// says of any -d.
func checkContentType(h http.Header) error {
	if e := h.Get("Content-Encoding"); e != "" && e != "identity" {
		return &httpError{http.StatusUnsupportedMediaType, status.Errorf(codes.InvalidArgument, "Content-Encoding %.100q is not supported; allowed: none", e)}
	}
	full := h.Get("Content-Type")
	if full == "" {
		return nil
	}
	kind, _, err := mime.ParseMediaType(full)
	switch kind {
	case "application/json", "application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml", "application/x-www-form-urlencoded":
		if err == nil {
			return nil
		}
	}
	return &httpError{http.StatusUnsupportedMediaType, status.Errorf(codes.InvalidArgument, "Content-Type %.100q is not supported; allowed: application/json, application/yaml", full)}
}

// codec decodes bodies as people write them and answers in JSON.
type codec struct{}

var jsonOut = protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}

// marshalJSON is one line: protojson adds spaces at random, so that nobody
// compares its output.
func marshalJSON(m proto.Message) ([]byte, error) {
	if chunk, ok := m.(*pb.LogChunk); ok {
		return logJSON(chunk)
	}
	data, err := jsonOut.Marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Compact(&b, data); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// logJSON is a line of a log as text: protojson makes base64 of bytes, which
// nobody can read or search.
func logJSON(chunk *pb.LogChunk) ([]byte, error) {
	line := struct {
		Replica int32      `json:"replica"`
		Node    string     `json:"node_id"`
		Stderr  bool       `json:"stderr"`
		Line    string     `json:"line"`
		Time    *time.Time `json:"time,omitempty"`
	}{chunk.Replica, chunk.NodeId, chunk.Stderr, string(chunk.Line), nil}
	if chunk.Time != nil {
		at := chunk.Time.AsTime()
		line.Time = &at
	}
	return json.Marshal(line)
}

func (codec) ContentType(any) string { return "application/json" }

func (codec) Marshal(v any) ([]byte, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return json.Marshal(v)
	}
	data, err := marshalJSON(m)
	return append(data, '\n'), err
}

func (codec) Unmarshal(data []byte, v any) error { return decodeInto(data, v) }

func (c codec) NewEncoder(w io.Writer) runtime.Encoder {
	return runtime.EncoderFunc(func(v any) error {
		data, err := c.Marshal(v)
		if err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
}

func (codec) NewDecoder(r io.Reader) runtime.Decoder {
	return runtime.DecoderFunc(func(v any) error {
		b, ok := r.(*body)
		if !ok {
			data, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			return decodeInto(data, v)
		}
		if b.err = b.decode(v); b.err == nil && len(bytes.TrimSpace(b.data)) == 0 {
			return io.EOF
		}
		return b.err
	})
}

func (b *body) decode(v any) error {
	if len(bytes.TrimSpace(b.data)) == 0 {
		return nil
	}
	m, ok := messageIn(v)
	_, b.spec = m.(*pb.WorkloadSpec)
	if err := decodeInto(b.data, v); err != nil {
		return err
	}
	if !ok || b.field == "" {
		return nil
	}
	f := m.ProtoReflect().Descriptor().Fields().ByJSONName(b.field)
	if f == nil {
		return nil
	}
	if got := m.ProtoReflect().Get(f).String(); got != "" && got != b.value {
		return model.FieldErrors{{Path: b.field, Message: strconv.Quote(got) + " contradicts the path; allowed: " + strconv.Quote(b.value) + ", or leave it out"}}
	}
	return nil
}

func decodeInto(data []byte, v any) error {
	m, ok := messageIn(v)
	if !ok {
		return status.Errorf(codes.Internal, "cannot decode into %T", v)
	}
	return model.DecodeInto(data, m)
}

// messageIn is the message that v is, or, where v points to the field of a
// message that is nil yet, a new one put there.
func messageIn(v any) (proto.Message, bool) {
	if m, ok := v.(proto.Message); ok {
		return m, true
	}
	p := reflect.ValueOf(v)
	if p.Kind() != reflect.Pointer || p.Elem().Kind() != reflect.Pointer {
		return nil, false
	}
	if p.Elem().IsNil() {
		p.Elem().Set(reflect.New(p.Elem().Type().Elem()))
	}
	m, ok := p.Elem().Interface().(proto.Message)
	return m, ok
}

// answerHeaders gives the ETag of a workload and the status of what was done.
func answerHeaders(ctx context.Context, w http.ResponseWriter, m proto.Message) error {
	pattern, _ := runtime.RPCMethod(ctx)
	switch m := m.(type) {
	case *pb.Workload:
		setETag(w, m)
		if pattern == pb.Workloads_DeleteWorkload_FullMethodName {
			// It is gone once its replicas are.
			w.WriteHeader(http.StatusAccepted)
		}
	case *pb.ApplyWorkloadResponse:
		setETag(w, m.Workload)
		if m.Outcome == pb.ApplyWorkloadResponse_CREATED {
			w.Header().Set("Location", "/v1/workloads/"+m.Workload.Spec.GetId())
			w.WriteHeader(http.StatusCreated)
		}
	}
	return nil
}

func setETag(w http.ResponseWriter, wl *pb.Workload) {
	w.Header().Set("ETag", strconv.Quote(strconv.FormatInt(wl.GetResourceVersion(), 10)))
}
