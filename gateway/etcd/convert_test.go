package etcd

import (
	"testing"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"pgregory.net/rapid"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// sameOnTheWire reports whether two messages of different names have the same
// content: ours use etcd's field numbers.
func sameOnTheWire(t testing.TB, etcds, ours proto.Message) bool {
	t.Helper()
	data, err := proto.Marshal(etcds)
	if err != nil {
		t.Fatal(err)
	}
	read := ours.ProtoReflect().New().Interface()
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, read); err != nil {
		t.Fatal(err)
	}
	return proto.Equal(read, ours)
}

// No field of a request is lost, whatever is in it, and what a store answers to it
// can be told.
func FuzzTxnRequest(f *testing.F) {
	for seed := range 20 {
		r := rapid.Custom(func(t *rapid.T) *etcdpb.TxnRequest { return newGenerator(t).txn(0) }).Example(seed)
		data, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := new(etcdpb.TxnRequest)
		// What etcd does not have is nothing of ours.
		if (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, r) != nil || checkTxn(r, 128) != nil {
			return
		}
		txn := txnRequest(r)
		if !sameOnTheWire(t, r, txn) {
			t.Fatalf("%v became %v", r, txn)
		}
		results, _, err := fsm.New().Apply(1, &pb.Entry{FeatureLevel: fsm.FeatureLevel, Txns: []*pb.Txn{txn}})
		if err != nil {
			t.Fatal(err)
		}
		if answer := results[0].Response; answer != nil {
			told := txnResponse(&etcdpb.ResponseHeader{Revision: answer.Revision}, answer)
			if told.Succeeded != answer.Succeeded || len(told.Responses) != len(answer.Responses) {
				t.Fatalf("%v became %v", answer, told)
			}
		}
	})
}

// Every field of every message that is translated.
func TestTranslationIsWhole(t *testing.T) {
	for _, c := range []struct {
		from proto.Message
		to   func(proto.Message) proto.Message
	}{
		{&etcdpb.RangeRequest{}, func(m proto.Message) proto.Message { return rangeRequest(m.(*etcdpb.RangeRequest)) }},
		{&etcdpb.PutRequest{}, func(m proto.Message) proto.Message { return putRequest(m.(*etcdpb.PutRequest)) }},
		{&etcdpb.DeleteRangeRequest{}, func(m proto.Message) proto.Message { return deleteRequest(m.(*etcdpb.DeleteRangeRequest)) }},
		{&etcdpb.Compare{}, func(m proto.Message) proto.Message { return compare(m.(*etcdpb.Compare)) }},
	} {
		fields := c.from.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			m := proto.Clone(c.from)
			fill(m.ProtoReflect(), fields.Get(i))
			if to := c.to(m); !sameOnTheWire(t, m, to) {
				t.Errorf("%T {%v} became {%v}", m, m, to)
			}
		}
	}
	kv := &mvccpb.KeyValue{Key: []byte("k"), CreateRevision: 1, ModRevision: 2, Version: 3, Value: []byte("v"), Lease: 4}
	ours := &pb.KeyValue{Key: []byte("k"), CreateRevision: 1, ModRevision: 2, Version: 3, Value: []byte("v"), Lease: 4}
	if !proto.Equal(keyValue(ours), kv) || !proto.Equal(keyValues([]*pb.KeyValue{ours})[0], kv) {
		t.Errorf("%v became %v", ours, keyValue(ours))
	}
}

func fill(m protoreflect.Message, f protoreflect.FieldDescriptor) {
	switch f.Kind() {
	case protoreflect.BytesKind:
		m.Set(f, protoreflect.ValueOfBytes([]byte("x")))
	case protoreflect.BoolKind:
		m.Set(f, protoreflect.ValueOfBool(true))
	case protoreflect.EnumKind:
		m.Set(f, protoreflect.ValueOfEnum(1))
	default:
		m.Set(f, protoreflect.ValueOfInt64(7))
	}
}
