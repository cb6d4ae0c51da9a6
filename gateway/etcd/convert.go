package etcd

import (
	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The keyspace has etcd's messages under other names, so this is renaming. Bytes
// are shared, not copied: neither side changes them.

func rangeRequest(r *etcdpb.RangeRequest) *pb.RangeRequest {
	return &pb.RangeRequest{
		Key: r.Key, RangeEnd: r.RangeEnd, Limit: r.Limit, Revision: r.Revision,
		SortOrder: pb.RangeRequest_SortOrder(r.SortOrder), SortTarget: pb.RangeRequest_SortTarget(r.SortTarget),
		Serializable: r.Serializable, KeysOnly: r.KeysOnly, CountOnly: r.CountOnly,
		MinModRevision: r.MinModRevision, MaxModRevision: r.MaxModRevision,
		MinCreateRevision: r.MinCreateRevision, MaxCreateRevision: r.MaxCreateRevision,
	}
}

func putRequest(r *etcdpb.PutRequest) *pb.PutRequest {
	return &pb.PutRequest{
		Key: r.Key, Value: r.Value, Lease: r.Lease,
		PrevKv: r.PrevKv, IgnoreValue: r.IgnoreValue, IgnoreLease: r.IgnoreLease,
	}
}

func deleteRequest(r *etcdpb.DeleteRangeRequest) *pb.DeleteRangeRequest {
	return &pb.DeleteRangeRequest{Key: r.Key, RangeEnd: r.RangeEnd, PrevKv: r.PrevKv}
}

// txnRequest is for a transaction that was checked: there is no empty operation.
func txnRequest(r *etcdpb.TxnRequest) *pb.Txn {
	txn := &pb.Txn{Success: requestOps(r.Success), Failure: requestOps(r.Failure)}
	if len(r.Compare) > 0 {
		txn.Compare = make([]*pb.Compare, len(r.Compare))
	}
	for i, c := range r.Compare {
		txn.Compare[i] = compare(c)
	}
	return txn
}

func compare(c *etcdpb.Compare) *pb.Compare {
	to := &pb.Compare{
		Result: pb.Compare_Result(c.Result), Target: pb.Compare_Target(c.Target), Key: c.Key, RangeEnd: c.RangeEnd,
	}
	switch u := c.TargetUnion.(type) {
	case *etcdpb.Compare_Version:
		to.TargetUnion = &pb.Compare_Version{Version: u.Version}
	case *etcdpb.Compare_CreateRevision:
		to.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: u.CreateRevision}
	case *etcdpb.Compare_ModRevision:
		to.TargetUnion = &pb.Compare_ModRevision{ModRevision: u.ModRevision}
	case *etcdpb.Compare_Value:
		to.TargetUnion = &pb.Compare_Value{Value: u.Value}
	case *etcdpb.Compare_Lease:
		to.TargetUnion = &pb.Compare_Lease{Lease: u.Lease}
	}
	return to
}

func requestOps(ops []*etcdpb.RequestOp) []*pb.RequestOp {
	if len(ops) == 0 {
		return nil
	}
	to := make([]*pb.RequestOp, len(ops))
	for i, op := range ops {
		switch r := op.Request.(type) {
		case *etcdpb.RequestOp_RequestRange:
			to[i] = &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: rangeRequest(r.RequestRange)}}
		case *etcdpb.RequestOp_RequestPut:
			to[i] = putOp(r.RequestPut)
		case *etcdpb.RequestOp_RequestDeleteRange:
			to[i] = deleteOp(r.RequestDeleteRange)
		case *etcdpb.RequestOp_RequestTxn:
			to[i] = &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: txnRequest(r.RequestTxn)}}
		}
	}
	return to
}

func putOp(r *etcdpb.PutRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putRequest(r)}}
}

func deleteOp(r *etcdpb.DeleteRangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: deleteRequest(r)}}
}

func keyValue(kv *pb.KeyValue) *mvccpb.KeyValue {
	if kv == nil {
		return nil
	}
	to := new(mvccpb.KeyValue)
	fillKeyValue(to, kv)
	return to
}

func fillKeyValue(to *mvccpb.KeyValue, kv *pb.KeyValue) {
	to.Key, to.Value, to.Lease = kv.Key, kv.Value, kv.Lease
	to.CreateRevision, to.ModRevision, to.Version = kv.CreateRevision, kv.ModRevision, kv.Version
}

func keyValues(kvs []*pb.KeyValue) []*mvccpb.KeyValue {
	if len(kvs) == 0 {
		return nil
	}
	block := make([]mvccpb.KeyValue, len(kvs))
	to := make([]*mvccpb.KeyValue, len(kvs))
	for i, kv := range kvs {
		fillKeyValue(&block[i], kv)
		to[i] = &block[i]
	}
	return to
}

func rangeResponse(header *etcdpb.ResponseHeader, r *pb.RangeResponse) *etcdpb.RangeResponse {
	return &etcdpb.RangeResponse{Header: header, Kvs: keyValues(r.Kvs), More: r.More, Count: r.Count}
}

func putResponse(header *etcdpb.ResponseHeader, r *pb.PutResponse) *etcdpb.PutResponse {
	return &etcdpb.PutResponse{Header: header, PrevKv: keyValue(r.PrevKv)}
}

func deleteResponse(header *etcdpb.ResponseHeader, r *pb.DeleteRangeResponse) *etcdpb.DeleteRangeResponse {
	return &etcdpb.DeleteRangeResponse{Header: header, Deleted: r.Deleted, PrevKvs: keyValues(r.PrevKvs)}
}

// txnResponse gives each operation the header that etcd gives it: the revision as
// it was after it, and nothing else; that of a nested transaction is empty.
func txnResponse(header *etcdpb.ResponseHeader, r *pb.TxnResponse) *etcdpb.TxnResponse {
	revision := r.Revision
	if changes(r) {
		revision--
	}
	c := &revisions{now: revision, changed: r.Revision}
	return c.txn(header, r)
}

// changes reports whether any operation has changed something.
func changes(r *pb.TxnResponse) bool {
	for _, op := range r.Responses {
		switch r := op.Response.(type) {
		case *pb.ResponseOp_ResponsePut:
			return true
		case *pb.ResponseOp_ResponseDeleteRange:
			if r.ResponseDeleteRange.Deleted > 0 {
				return true
			}
		case *pb.ResponseOp_ResponseTxn:
			if changes(r.ResponseTxn) {
				return true
			}
		}
	}
	return false
}

// revisions follows the revision through the operations of a transaction.
type revisions struct {
	now     int64
	changed int64 // from the first change on
}

func (c *revisions) header() *etcdpb.ResponseHeader { return &etcdpb.ResponseHeader{Revision: c.now} }

func (c *revisions) txn(header *etcdpb.ResponseHeader, r *pb.TxnResponse) *etcdpb.TxnResponse {
	to := &etcdpb.TxnResponse{Header: header, Succeeded: r.Succeeded}
	if len(r.Responses) > 0 {
		to.Responses = make([]*etcdpb.ResponseOp, len(r.Responses))
	}
	for i, op := range r.Responses {
		to.Responses[i] = c.op(op)
	}
	return to
}

func (c *revisions) op(op *pb.ResponseOp) *etcdpb.ResponseOp {
	switch r := op.Response.(type) {
	case *pb.ResponseOp_ResponseRange:
		return &etcdpb.ResponseOp{Response: &etcdpb.ResponseOp_ResponseRange{ResponseRange: rangeResponse(c.header(), r.ResponseRange)}}
	case *pb.ResponseOp_ResponsePut:
		c.now = c.changed
		return &etcdpb.ResponseOp{Response: &etcdpb.ResponseOp_ResponsePut{ResponsePut: putResponse(c.header(), r.ResponsePut)}}
	case *pb.ResponseOp_ResponseDeleteRange:
		if r.ResponseDeleteRange.Deleted > 0 {
			c.now = c.changed
		}
		return &etcdpb.ResponseOp{Response: &etcdpb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: deleteResponse(c.header(), r.ResponseDeleteRange)}}
	case *pb.ResponseOp_ResponseTxn:
		return &etcdpb.ResponseOp{Response: &etcdpb.ResponseOp_ResponseTxn{ResponseTxn: c.txn(new(etcdpb.ResponseHeader), r.ResponseTxn)}}
	}
	return new(etcdpb.ResponseOp)
}
