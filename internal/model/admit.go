package model

import (
	"crypto/sha256"
	"fmt"
	"math"
	"time"

	"google.golang.org/grpc/codes"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Meta is what every request comes with.
type Meta struct {
	Now time.Time
	// Who asks, as in Event.actor.
	Actor string
	// Not used before by anybody: names what the request creates.
	NewID string
}

// Refusal is why a request is not carried out. What is wrong with a field is
// said by FieldErrors instead.
type Refusal struct {
	Code    codes.Code
	Message string
}

func (r *Refusal) Error() string { return r.Message }

func refuse(code codes.Code, format string, args ...any) error {
	return &Refusal{Code: code, Message: fmt.Sprintf(format, args...)}
}

func invalid(path, format string, args ...any) error {
	return FieldErrors{{Path: path, Message: fmt.Sprintf(format, args...)}}
}

// event is the last operation of most transactions below.
func (m Meta) event(e *pb.Event) *pb.RequestOp {
	e.Actor = m.Actor
	return PutEvent(e, m.Now, m.NewID)
}

// RequestID is derived from what a caller chose: the same for each repetition
// of the call, another one for every other caller and kind of call.
func RequestID(actor, method, key string) []byte {
	h := sha256.New()
	for _, part := range []string{actor, method, key} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return h.Sum(nil)
}

// refusedOp makes a transaction fail as a whole, with FUTURE_REVISION, and so
// not be remembered under its request id.
func refusedOp() *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(SystemPrefix), Revision: math.MaxInt64}}}
}

// Recall asks what a request id was answered. It is refused with
// FUTURE_REVISION where the id is not remembered, and never changes anything.
func Recall(requestID []byte) *pb.Txn {
	return &pb.Txn{RequestId: requestID, Success: []*pb.RequestOp{refusedOp()}}
}

// get reads one key as an operation of a transaction.
func get(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}
}
