package gateway

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// maxAttempts bounds how often a change is admitted anew because somebody else
// was quicker. Each failure is another's success, so few are ever needed.
const maxAttempts = 8

// view is linearizable: an answer never shows less than what was acknowledged.
func (g *Gateway) view(ctx context.Context) (*fsm.View, error) {
	v, err := g.store.Linearizable(ctx)
	if err != nil {
		return nil, storeError(err)
	}
	return v, nil
}

// storeError tells refusals of a transaction from a store that cannot be reached.
func storeError(err error) error {
	var refused *fsm.Error
	if errors.As(err, &refused) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return unreachable{err}
}

func meta(ctx context.Context) model.Meta {
	m := model.Meta{Now: time.Now(), Actor: "unknown", NewID: uuid.NewString()}
	if id, ok := IdentityFrom(ctx); ok {
		m.Actor = id.String()
	}
	return m
}

// change has admit decide on a view and proposes what it decided, again on a
// newer view where something changed in between. The answer is nil where there
// was nothing to change.
//
// The first view is what is known here, since a transaction compares what it was
// decided on; that nothing is to be done, or may be, is decided on the newest one.
func (g *Gateway) change(ctx context.Context, m model.Meta, admit func(v *fsm.View, m model.Meta) (*pb.Txn, error)) (*pb.TxnResponse, error) {
	for attempt := range maxAttempts {
		v := g.store.View()
		if attempt > 0 {
			var err error
			if v, err = g.view(ctx); err != nil {
				return nil, err
			}
		}
		txn, err := admit(v, m)
		if attempt == 0 && (err != nil || txn == nil) {
			continue
		}
		if err != nil || txn == nil {
			return nil, err
		}
		answer, err := g.store.Propose(ctx, txn)
		switch {
		case err != nil && isConflict(txn, err):
			continue
		case err != nil:
			return nil, storeError(err)
		case answer.Succeeded:
			return answer, nil
		}
	}
	return nil, status.Errorf(codes.Aborted, "others changed the same %d times in a row; try again", maxAttempts)
}

// isConflict: a transaction with a request id says by a refusal that its
// compares failed, for an answer would be remembered.
func isConflict(txn *pb.Txn, err error) bool {
	var refused *fsm.Error
	return len(txn.RequestId) > 0 && errors.As(err, &refused) && refused.Code == pb.TxnError_TXN_ERROR_FUTURE_REVISION
}

// recall is the answer that a request id was given, if it is remembered.
func (g *Gateway) recall(ctx context.Context, requestID []byte) (*pb.TxnResponse, bool, error) {
	txn := model.Recall(requestID)
	answer, err := g.store.Propose(ctx, txn)
	switch {
	case err == nil:
		return answer, true, nil
	case isConflict(txn, err):
		return nil, false, nil
	}
	return nil, false, storeError(err)
}
