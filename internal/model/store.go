package model

import (
	"fmt"
	"iter"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Reader is the keyspace at one revision: *fsm.View, or a picture that is kept
// elsewhere.
type Reader interface {
	Get(key string) (*pb.KeyValue, bool)
	// Scan gives the newest version of each key that begins with prefix, in key order.
	Scan(prefix string) iter.Seq[*pb.KeyValue]
}

// Load reads the message stored at key into the given one. modRevision is 0
// where the key does not exist: what Unchanged wants to hear.
func Load[T proto.Message](v Reader, key string, into T) (modRevision int64, ok bool, err error) {
	kv, ok := v.Get(key)
	if !ok {
		return 0, false, nil
	}
	if err := Parse(kv, into); err != nil {
		return 0, false, err
	}
	return kv.ModRevision, true, nil
}

// Parse reads the message that kv holds.
func Parse(kv *pb.KeyValue, into proto.Message) error {
	if err := proto.Unmarshal(kv.Value, into); err != nil {
		return fmt.Errorf("value of %s is no %s: %w", kv.Key, into.ProtoReflect().Descriptor().Name(), err)
	}
	return nil
}

// SplitKey takes apart a key below prefix: "/workloads/web/status" is "web" and
// "status"; sub is empty for the object itself.
func SplitKey(prefix, key string) (id, sub string, ok bool) {
	rest, ok := strings.CutPrefix(key, prefix)
	if !ok || rest == "" {
		return "", "", false
	}
	id, sub, _ = strings.Cut(rest, "/")
	return id, sub, true
}

// Put stores msg at key, attached to lease (0: none).
func Put(key string, msg proto.Message, lease int64) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: Encode(msg), Lease: lease}}}
}

// Delete removes the key, if it exists.
func Delete(key string) *pb.RequestOp {
	return deleteRange(&pb.DeleteRangeRequest{Key: []byte(key)})
}

// DeletePrefix removes all keys that begin with prefix.
func DeletePrefix(prefix string) *pb.RequestOp {
	return deleteRange(&pb.DeleteRangeRequest{Key: []byte(prefix), RangeEnd: PrefixEnd(prefix)})
}

func deleteRange(r *pb.DeleteRangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}}
}

// Unchanged holds while key is as it was read: at this mod_revision, or, with
// 0, not there.
func Unchanged(key string, modRevision int64) *pb.Compare {
	return &pb.Compare{
		Target: pb.Compare_MOD, Result: pb.Compare_EQUAL, Key: []byte(key),
		TargetUnion: &pb.Compare_ModRevision{ModRevision: modRevision},
	}
}

// Missing holds while key does not exist.
func Missing(key string) *pb.Compare { return Unchanged(key, 0) }

// Exists holds while key exists, in whatever version.
func Exists(key string) *pb.Compare {
	c := Unchanged(key, 0)
	c.Result = pb.Compare_GREATER
	return c
}

// Encode is how messages are stored: deterministic for one binary, so that an
// equal message is an equal value.
//
// Marshalling fails for one reason only, text that is no UTF-8 (a runtime's
// error message, say); such text is mended, for a stored object with a � is
// better than one that cannot be stored.
func Encode(msg proto.Message) []byte {
	opt := proto.MarshalOptions{Deterministic: true}
	data, err := opt.Marshal(msg)
	if err == nil {
		return data
	}
	msg = proto.Clone(msg)
	mendText(msg.ProtoReflect())
	if data, err = opt.Marshal(msg); err != nil {
		panic(fmt.Sprintf("model: %s cannot be marshalled: %v", msg.ProtoReflect().Descriptor().FullName(), err))
	}
	return data
}

func mendText(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			mendMap(m.Mutable(f).Map(), f.MapValue().Kind())
		case f.IsList():
			list := m.Mutable(f).List()
			for i := range list.Len() {
				if nv, ok := mended(list.Get(i), f.Kind()); ok {
					list.Set(i, nv)
				}
			}
		default:
			if nv, ok := mended(v, f.Kind()); ok {
				m.Set(f, nv)
			}
		}
		return true
	})
}

func mendMap(values protoreflect.Map, kind protoreflect.Kind) {
	type entry struct {
		key   protoreflect.MapKey
		value protoreflect.Value
	}
	var fresh []entry
	values.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		if s, ok := k.Interface().(string); ok {
			k = protoreflect.ValueOfString(strings.ToValidUTF8(s, "\uFFFD")).MapKey()
		}
		if nv, ok := mended(v, kind); ok {
			v = nv
		}
		fresh = append(fresh, entry{k, v})
		return true
	})
	values.Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool {
		values.Clear(k)
		return true
	})
	for _, e := range fresh {
		values.Set(e.key, e.value)
	}
}

// mended changes messages in place and answers with a new value for text.
func mended(v protoreflect.Value, kind protoreflect.Kind) (protoreflect.Value, bool) {
	switch kind {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(strings.ToValidUTF8(v.String(), "\uFFFD")), true
	case protoreflect.MessageKind, protoreflect.GroupKind:
		mendText(v.Message())
	}
	return v, false
}
