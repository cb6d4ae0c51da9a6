package gateway

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/internal/model"
)

// problem is an error as RFC 9457 has it.
type problem struct {
	Type     string `json:"type"`
	Title    string `json:"title"`
	Status   int    `json:"status"`
	Detail   string `json:"detail"`
	Instance string `json:"instance,omitempty"`
	// The gRPC code, and the reason: one of ReasonCode, or the code again.
	Code   string         `json:"code"`
	Reason string         `json:"reason"`
	Errors []problemField `json:"errors,omitempty"`
}

type problemField struct {
	Field  string `json:"field"`
	Detail string `json:"detail"`
}

// httpError is an error with an HTTP status that no gRPC code stands for.
type httpError struct {
	status int
	err    error
}

func (e *httpError) Error() string { return e.err.Error() }
func (e *httpError) Unwrap() error { return e.err }

// httpStatus differs from grpc-gateway's in what is a conflict (409) and in
// history that is gone (410).
func httpStatus(c codes.Code) int {
	switch c {
	case codes.InvalidArgument:
		return http.StatusBadRequest
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.NotFound:
		return http.StatusNotFound
	case codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
		return http.StatusConflict
	case codes.OutOfRange:
		return http.StatusGone
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	case codes.Canceled:
		return 499
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

func problemOf(r *http.Request, err error) problem {
	var fields model.FieldErrors
	if b, ok := r.Body.(*body); ok && b.err != nil && errors.As(b.err, &fields) {
		// The generated code has made text of it.
		if err = statusOf(fields); b.spec {
			err = specStatus(fields)
		}
	}
	var own *httpError
	code := 0
	if errors.As(err, &own) {
		code, err = own.status, own.err
	}
	s, _ := status.FromError(err)
	switch {
	case code != 0:
	case s.Code() == codes.Aborted && (r.Header.Get("If-Match") != ""):
		code = http.StatusPreconditionFailed
	case s.Code() == codes.AlreadyExists && r.Header.Get("If-None-Match") != "":
		code = http.StatusPreconditionFailed
	default:
		code = httpStatus(s.Code())
	}
	p := problem{
		Type: "about:blank", Title: http.StatusText(code), Status: code, Detail: s.Message(), Instance: r.URL.Path, Code: codeName(s.Code()),
	}
	p.Reason = p.Code
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			p.Reason = d.Reason
		case *errdetails.BadRequest:
			for _, v := range d.FieldViolations {
				p.Errors = append(p.Errors, problemField{v.Field, v.Description})
			}
		}
	}
	return p
}

// codeName is the code as gRPC's documents write it: NOT_FOUND.
func codeName(c codes.Code) string {
	var b strings.Builder
	for i, r := range c.String() {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToUpper(b.String())
}

func writeProblem(w http.ResponseWriter, r *http.Request, err error) {
	p := problemOf(r, err)
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.Itoa(1))
	}
	writeDocument(w, p.Status, "application/problem+json", p)
}

func writeDocument(w http.ResponseWriter, code int, kind string, document any) {
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(code)
	// What cannot be written any more has no reader.
	_ = json.NewEncoder(w).Encode(document)
}

func writeRoutingProblem(w http.ResponseWriter, r *http.Request, code int) {
	switch code {
	case http.StatusMethodNotAllowed:
		err := status.Errorf(codes.Unimplemented, "%s is not possible on %s; /openapi.json lists what is", r.Method, r.URL.Path)
		writeProblem(w, r, &httpError{code, err})
	case http.StatusBadRequest:
		writeProblem(w, r, status.Errorf(codes.InvalidArgument, "the path %s is malformed", r.URL.Path))
	default:
		writeProblem(w, r, status.Errorf(codes.NotFound, "there is nothing at %s; /openapi.json lists what there is", r.URL.Path))
	}
}
