package etcd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// show is a version of a key as clients see it: the system's with a document in
// the place of the value. What was deleted has none.
func show(kv *pb.KeyValue) *pb.KeyValue {
	if kv == nil || kv.Version == 0 || ownerOf(kv.Key) == users {
		return kv
	}
	return &pb.KeyValue{
		Key: kv.Key, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Version: kv.Version, Lease: kv.Lease,
		Value: document(kv),
	}
}

// document is what the key holds in the JSON of the REST API. What cannot be read
// is an object with the field error.
func document(kv *pb.KeyValue) []byte {
	k := kindOf(string(kv.Key))
	if k == nil {
		return errorDocument("what is stored here is not known to this version")
	}
	m := k.message.ProtoReflect().New().Interface()
	if err := model.Parse(kv, m); err != nil {
		return errorDocument("the stored value is no %s", m.ProtoReflect().Descriptor().Name())
	}
	if k.complete != nil {
		k.complete(m, kv)
	}
	data, err := marshal(m, k.without)
	if err != nil {
		return errorDocument("the stored %s has no form as JSON", m.ProtoReflect().Descriptor().Name())
	}
	return data
}

// documentJSON is that of the REST API.
var documentJSON = protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}

// marshal is one line, the same for an equal message: protojson adds spaces at
// random.
func marshal(m proto.Message, without []string) ([]byte, error) {
	data, err := documentJSON.Marshal(m)
	if err != nil {
		return nil, err
	}
	var values map[string]json.RawMessage
	if err := json.Unmarshal(data, &values); err != nil {
		return nil, err
	}
	out := bytes.NewBufferString("{")
	fields := m.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		name := string(fields.Get(i).Name())
		value, ok := values[name]
		if !ok || slices.Contains(without, name) {
			continue
		}
		if out.Len() > 1 {
			out.WriteByte(',')
		}
		out.WriteString(`"` + name + `":`)
		if err := json.Compact(out, value); err != nil {
			return nil, err
		}
	}
	out.WriteByte('}')
	return out.Bytes(), nil
}

// errorDocument takes the place of one that cannot be shown.
func errorDocument(format string, args ...any) []byte {
	return fmt.Appendf(nil, `{"error":%q}`, fmt.Sprintf(format, args...))
}
