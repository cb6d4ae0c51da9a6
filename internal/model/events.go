package model

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// PutEvent stores an event that happened now. The discriminator tells events of
// one nanosecond apart: what they are about, say.
func PutEvent(e *pb.Event, now time.Time, discriminator string) *pb.RequestOp {
	e.Time = timestamppb.New(now)
	if e.Actor == "" {
		e.Actor = "system"
	}
	return Put(EventKey(now, discriminator), e, 0)
}
