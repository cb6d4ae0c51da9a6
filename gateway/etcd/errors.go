package etcd

import (
	"context"
	"errors"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// statusOf is the one place where errors become those that etcd's clients know.
func statusOf(err error) error {
	var (
		txn     *fsm.Error
		refused *model.Refusal
		fields  model.FieldErrors
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &txn):
		return txnStatus(txn)
	case errors.As(err, &refused):
		return status.Error(refused.Code, refused.Message)
	case errors.As(err, &fields):
		return status.Error(codes.InvalidArgument, fields.Error())
	case errors.Is(err, context.Canceled):
		return rpctypes.ErrGRPCCanceled
	case errors.Is(err, context.DeadlineExceeded):
		return rpctypes.ErrGRPCDeadlineExceeded
	}
	// Not by status.FromError, which makes the status of what is wrapped a part of
	// the message: clients compare it whole.
	var known interface{ GRPCStatus() *status.Status }
	if errors.As(err, &known) {
		return known.GRPCStatus().Err()
	}
	return status.Error(codes.Unavailable, err.Error())
}

func txnStatus(e *fsm.Error) error {
	switch e.Code {
	case pb.TxnError_TXN_ERROR_COMPACTED:
		return rpctypes.ErrGRPCCompacted
	case pb.TxnError_TXN_ERROR_FUTURE_REVISION:
		return rpctypes.ErrGRPCFutureRev
	case pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND:
		return rpctypes.ErrGRPCLeaseNotFound
	case pb.TxnError_TXN_ERROR_LEASE_EXISTS:
		return rpctypes.ErrGRPCLeaseExist
	case pb.TxnError_TXN_ERROR_KEY_NOT_FOUND:
		return rpctypes.ErrGRPCKeyNotFound
	case pb.TxnError_TXN_ERROR_DUPLICATE_KEY:
		return rpctypes.ErrGRPCDuplicateKey
	case pb.TxnError_TXN_ERROR_NO_SPACE:
		return rpctypes.ErrGRPCNoSpace
	}
	return status.Error(codes.InvalidArgument, e.Message)
}
