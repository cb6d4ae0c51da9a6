package model

import (
	"strconv"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Diff is what differs between two specs, field by field, in the order of the
// fields in a spec. Paths and values are as in a file; what is not there is empty.
// Either spec may be nil. Specs that mean the same do not differ.
func Diff(old, new *pb.WorkloadSpec) []*pb.FieldChange {
	var d differ
	was, is := &pb.WorkloadSpec{}, &pb.WorkloadSpec{}
	if old != nil {
		was = Normalize(old)
	}
	if new != nil {
		is = Normalize(new)
	}
	d.message("", was.ProtoReflect(), is.ProtoReflect())
	return d.changes
}

type differ struct{ changes []*pb.FieldChange }

func (d *differ) message(path string, old, new protoreflect.Message) {
	fields := old.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !old.Has(f) && !new.Has(f) {
			continue
		}
		at := path + string(f.Name())
		switch {
		case f.IsMap():
			d.entries(at, f, old.Get(f).Map(), new.Get(f).Map())
		case f.IsList():
			d.elements(at, f, old.Get(f).List(), new.Get(f).List())
		case f.Message() != nil:
			// Where one is not there, all that is in the other differs.
			d.message(at+".", old.Get(f).Message(), new.Get(f).Message())
			if old.Has(f) != new.Has(f) && !anySet(old.Get(f).Message()) && !anySet(new.Get(f).Message()) {
				d.scalar(at, presence(old.Has(f)), presence(new.Has(f)))
			}
		default:
			d.scalar(at, textOf(f, old.Get(f), old.Has(f)), textOf(f, new.Get(f), new.Has(f)))
		}
	}
}

// presence is how an empty object is written.
func presence(there bool) string {
	if there {
		return "{}"
	}
	return ""
}

func anySet(m protoreflect.Message) bool {
	set := false
	m.Range(func(protoreflect.FieldDescriptor, protoreflect.Value) bool {
		set = true
		return false
	})
	return set
}

func (d *differ) scalar(path, old, new string) {
	if old != new {
		d.changes = append(d.changes, &pb.FieldChange{Path: path, Old: old, New: new})
	}
}

func (d *differ) entries(path string, f protoreflect.FieldDescriptor, old, new protoreflect.Map) {
	keys := map[string]protoreflect.MapKey{}
	for _, m := range []protoreflect.Map{old, new} {
		m.Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool {
			keys[k.String()] = k
			return true
		})
	}
	for _, name := range sortedKeys(keys) {
		k := keys[name]
		d.scalar(path+"."+name, textOf(f.MapValue(), old.Get(k), old.Has(k)), textOf(f.MapValue(), new.Get(k), new.Has(k)))
	}
}

func (d *differ) elements(path string, f protoreflect.FieldDescriptor, old, new protoreflect.List) {
	for i := range max(old.Len(), new.Len()) {
		at := path + "[" + strconv.Itoa(i) + "]"
		if f.Message() == nil {
			d.scalar(at, element(f, old, i), element(f, new, i))
			continue
		}
		was, is := old.NewElement().Message(), old.NewElement().Message()
		if i < old.Len() {
			was = old.Get(i).Message()
		}
		if i < new.Len() {
			is = new.Get(i).Message()
		}
		d.message(at+".", was, is)
		if !anySet(was) && !anySet(is) {
			d.scalar(at, presence(i < old.Len()), presence(i < new.Len()))
		}
	}
}

func element(f protoreflect.FieldDescriptor, list protoreflect.List, i int) string {
	if i >= list.Len() {
		return ""
	}
	return textOf(f, list.Get(i), true)
}

// textOf is a value as in a file. Text that would be taken for nothing is quoted.
func textOf(f protoreflect.FieldDescriptor, v protoreflect.Value, there bool) string {
	switch {
	case !there:
		return ""
	case f.Kind() == protoreflect.EnumKind:
		if value := f.Enum().Values().ByNumber(v.Enum()); value != nil {
			return strings.ToLower(shortName(value))
		}
		return strconv.Itoa(int(v.Enum()))
	case f.Kind() == protoreflect.StringKind && v.String() == "":
		return `""`
	}
	return v.String()
}
