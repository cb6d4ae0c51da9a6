package etcd

import (
	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// admitted is a client's transaction after admission.
type admitted struct {
	txn *pb.Txn
	// guards hold as long as admission would decide the same.
	guards []*pb.Compare
	// restore makes of the answer to txn the one that the client expects.
	restore func(*pb.TxnResponse) *pb.TxnResponse
}

// touchesSystem reports whether any part of the transaction may concern the
// system's keys.
func touchesSystem(txn *pb.Txn) bool { return false }

// admit has model decide on what a client does to the system's keys.
func (s *Server) admit(v *fsm.View, who *caller, txn *pb.Txn) (*admitted, error) {
	return &admitted{txn: txn, restore: func(a *pb.TxnResponse) *pb.TxnResponse { return a }}, nil
}

// rangeView answers a read with the system's keys shown as documents.
func rangeView(v *fsm.View, r *pb.RangeRequest) (*pb.RangeResponse, error) { return v.Range(r) }

// sees reports whether a read or watch of [key, end) shows a key in it.
func sees(key, end, one []byte) bool { return true }

// show is a version of a key as clients see it.
func show(kv *pb.KeyValue) *pb.KeyValue { return kv }
