package raftstore

import (
	"encoding/binary"
	"fmt"

	"github.com/cespare/xxhash/v2"
	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// maxEntryBytes and maxEntryTxns bound a batch; a single transaction may be
	// larger, up to maxTxnBytes.
	maxEntryBytes = 256 << 10
	maxEntryTxns  = 1024
	// maxTxnBytes is what one transaction may take, encoded.
	maxTxnBytes = 8 << 20
)

// tag names one log entry for ever: who proposed it, and a count. It travels in
// the log's Extensions, beside a checksum of the data.
type tag struct {
	session uint64 // random, new with each start of a store
	seq     uint64
}

const extensionLen = 24

// seal is what goes into raft.Log.Extensions.
func (t tag) seal(data []byte) []byte {
	b := make([]byte, 0, extensionLen)
	b = binary.BigEndian.AppendUint64(b, t.session)
	b = binary.BigEndian.AppendUint64(b, t.seq)
	return binary.BigEndian.AppendUint64(b, xxhash.Sum64(data))
}

// tagOf reads the tag of a log entry; the zero tag where there is none.
func tagOf(l *raft.Log) tag {
	if len(l.Extensions) != extensionLen {
		return tag{}
	}
	return tag{
		session: binary.BigEndian.Uint64(l.Extensions),
		seq:     binary.BigEndian.Uint64(l.Extensions[8:]),
	}
}

// verifyEntry finds bits that flipped on the disk: neither bbolt nor the segments
// of the WAL notice those when they read.
func verifyEntry(l *raft.Log) error {
	if l.Type != raft.LogCommand {
		return nil
	}
	if len(l.Extensions) != extensionLen {
		return fmt.Errorf("log entry %d has no checksum", l.Index)
	}
	if want, got := binary.BigEndian.Uint64(l.Extensions[16:]), xxhash.Sum64(l.Data); want != got {
		return fmt.Errorf("log entry %d is damaged: checksum %016x, should be %016x", l.Index, got, want)
	}
	return nil
}

// Field numbers of pb.Entry. An entry is put together from transactions that
// their callers have encoded already, so that the dispatcher only copies.
const (
	entryTime    protowire.Number = 1
	entryTxns    protowire.Number = 2
	entryFeature protowire.Number = 3
)

// appendTxn encodes a transaction as an element of pb.Entry.txns.
func appendTxn(b []byte, t *pb.Txn) ([]byte, error) {
	size := proto.Size(t)
	if size > maxTxnBytes {
		return nil, &fsm.Error{
			Code:    pb.TxnError_TXN_ERROR_INVALID,
			Message: fmt.Sprintf("the transaction has %d bytes, at most %d are allowed", size, maxTxnBytes),
		}
	}
	b = protowire.AppendTag(b, entryTxns, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b, t)
	if err != nil {
		return nil, &fsm.Error{Code: pb.TxnError_TXN_ERROR_INVALID, Message: "the transaction cannot be encoded: " + err.Error()}
	}
	return b, nil
}

// entryHeader begins an entry for size bytes of encoded transactions.
func entryHeader(unixNano int64, size int) []byte {
	b := make([]byte, 0, size+24)
	b = protowire.AppendTag(b, entryTime, protowire.VarintType)
	b = protowire.AppendVarint(b, uint64(unixNano))
	b = protowire.AppendTag(b, entryFeature, protowire.VarintType)
	return protowire.AppendVarint(b, uint64(fsm.FeatureLevel))
}

// revokeLease is the transaction that ends a lease.
func revokeLease(id int64) *pb.Txn {
	return &pb.Txn{Success: []*pb.RequestOp{{
		Request: &pb.RequestOp_LeaseRevoke{LeaseRevoke: &pb.LeaseRevoke{Id: id}},
	}}}
}

// effects is what entries did beside changing keys.
type effects struct {
	leases    []leaseEffect // in order
	compacted bool
}

// leaseEffect is that a lease was granted, or revoked.
type leaseEffect struct {
	id      int64
	revoked bool
}

// note looks through what was carried out of transactions.
func (e *effects) note(txns []*pb.Txn, results []*pb.TxnResult) {
	for i, t := range txns {
		e.txn(t, results[i].GetResponse())
	}
}

func (e *effects) txn(t *pb.Txn, answer *pb.TxnResponse) {
	if answer == nil {
		return // refused
	}
	ops := t.Failure
	if answer.Succeeded {
		ops = t.Success
	}
	for i, op := range ops {
		switch r := op.Request.(type) {
		case *pb.RequestOp_LeaseGrant:
			e.leases = append(e.leases, leaseEffect{id: r.LeaseGrant.GetId()})
		case *pb.RequestOp_LeaseRevoke:
			e.leases = append(e.leases, leaseEffect{id: r.LeaseRevoke.GetId(), revoked: true})
		case *pb.RequestOp_Compact:
			e.compacted = true
		case *pb.RequestOp_RequestTxn:
			e.txn(r.RequestTxn, answer.Responses[i].GetResponseTxn())
		}
	}
}
