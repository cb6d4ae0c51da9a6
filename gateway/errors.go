package gateway

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// errorDomain is that of reasons in error details.
const errorDomain = "persys.dev"

// unreachable marks an error of the store that is about the store itself.
type unreachable struct{ err error }

func (u unreachable) Error() string { return u.err.Error() }
func (u unreachable) Unwrap() error { return u.err }

// statusOf is the one place where errors become gRPC statuses.
func statusOf(err error) error {
	var (
		fields  model.FieldErrors
		refused *model.Refusal
		txn     *fsm.Error
		away    unreachable
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &fields):
		return fieldStatus(fields, "")
	case errors.As(err, &refused):
		return status.Error(refused.Code, refused.Message)
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the call was given up")
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "not done in the time given; whether it will be is not known")
	case errors.As(err, &txn):
		return status.Error(txnCode(txn.Code), txn.Message)
	case errors.As(err, &away):
		return status.Error(codes.Unavailable, err.Error())
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return status.Error(codes.Internal, err.Error())
}

func txnCode(e pb.TxnError) codes.Code {
	switch e {
	case pb.TxnError_TXN_ERROR_COMPACTED:
		return codes.OutOfRange
	case pb.TxnError_TXN_ERROR_NO_SPACE:
		return codes.ResourceExhausted
	}
	// What the gateway proposes is never malformed.
	return codes.Internal
}

// fieldStatus carries each problem as a field violation, and a reason if it has
// one.
func fieldStatus(fields model.FieldErrors, reason string) error {
	violations := &errdetails.BadRequest{}
	for _, f := range fields {
		description := f.Message
		if f.Line > 0 {
			description = fmt.Sprintf("line %d: %s", f.Line, description)
		}
		violations.FieldViolations = append(violations.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: f.Path, Description: description})
	}
	details := []protoadapt.MessageV1{violations}
	if reason != "" {
		details = append(details, &errdetails.ErrorInfo{Reason: reason, Domain: errorDomain})
	}
	s, err := status.New(codes.InvalidArgument, fields.Error()).WithDetails(details...)
	if err != nil {
		return status.Error(codes.InvalidArgument, fields.Error())
	}
	return s.Err()
}

// specStatus is statusOf for what is wrong with a workload's spec.
func specStatus(err error) error {
	var fields model.FieldErrors
	if errors.As(err, &fields) {
		return fieldStatus(fields, pb.ReasonCode_INVALID_SPEC.String())
	}
	return statusOf(err)
}

func badField(path, format string, args ...any) error {
	return fieldStatus(model.FieldErrors{{Path: path, Message: fmt.Sprintf(format, args...)}}, "")
}
