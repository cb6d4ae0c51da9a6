package fsm

import (
	"errors"
	"fmt"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Apply fails with one of these; the replica must then stop, since it can no
// longer follow the log. Every later Apply fails in the same way.
var (
	// ErrFeatureLevel: the entry was written by a version whose meaning of
	// entries this one does not know.
	ErrFeatureLevel = errors.New("unknown feature level")
	// ErrDiverged: the state had another hash than the leader's at a checkpoint.
	ErrDiverged = errors.New("state has diverged from the leader's")
)

// Error is why a transaction or a read was refused. Nothing was changed.
type Error struct {
	Code    pb.TxnError
	Message string
}

func (e *Error) Error() string { return e.Message }

func refuse(code pb.TxnError, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) *Error {
	return refuse(pb.TxnError_TXN_ERROR_INVALID, format, args...)
}
