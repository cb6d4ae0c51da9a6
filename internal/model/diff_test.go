package model

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func changesText(changes []*pb.FieldChange) string {
	var b strings.Builder
	for _, c := range changes {
		fmt.Fprintf(&b, "%s: %s -> %s\n", c.Path, c.Old, c.New)
	}
	return b.String()
}

func TestDiff(t *testing.T) {
	decode := func(text string) *pb.WorkloadSpec {
		if text == "" {
			return nil
		}
		specs, err := Decode([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return specs[0]
	}
	for _, x := range []struct{ name, old, new, want string }{
		{"the same, written otherwise", "{id: a, resources: {cpu: 0.5}, container: {image: x}}", "{id: a, replicas: 1, resources: {cpu: 500m}, container: {image: x}}", ""},
		{
			"scalars, enums and presence",
			"{id: a, container: {image: x}}",
			"{id: a, replicas: 3, kind: service, priority: 70, exclusive: true, placement: {policy: bin-pack}, container: {image: y}}",
			"replicas: 1 -> 3\nplacement.policy:  -> bin_pack\npriority: 50 -> 70\nexclusive:  -> true\ncontainer.image: x -> y\n",
		},
		{
			"maps and lists",
			"{id: a, env: {A: 1, B: 2}, container: {image: x, args: [a, b], ports: [{container_port: 80}]}}",
			`{id: a, env: {B: "", C: 3}, container: {image: x, args: [a], ports: [{container_port: 81}, {container_port: 80, protocol: udp}]}}`,
			"env.A: 1 -> \nenv.B: 2 -> \"\"\nenv.C:  -> 3\ncontainer.args[1]: b -> \ncontainer.ports[0].container_port: 80 -> 81\n" +
				"container.ports[1].container_port:  -> 80\ncontainer.ports[1].protocol:  -> udp\n",
		},
		{
			"one kind of spec for another", "{id: a, container: {image: x}}", "{id: a, process: {command: x}}",
			"type: container -> process\ncontainer.image: x -> \ncontainer.stop_grace_seconds: 10 -> \nprocess.command:  -> x\nprocess.stop_grace_seconds:  -> 10\n",
		},
		{
			"a new one", "", "{id: a, process: {command: x}}",
			"id:  -> a\ntype:  -> process\nreplicas:  -> 1\nupdate.max_parallel:  -> 1\nrestart.condition:  -> always\npriority:  -> 50\nprocess.command:  -> x\nprocess.stop_grace_seconds:  -> 10\n",
		},
	} {
		t.Run(x.name, func(t *testing.T) {
			if got := changesText(Diff(decode(x.old), decode(x.new))); got != x.want {
				t.Errorf("got\n%swant\n%s", got, x.want)
			}
		})
	}
}

// Specs differ in no field if and only if they are equal as stored.
func TestDiffFindsEveryField(t *testing.T) {
	base := &pb.WorkloadSpec{Id: "a", Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: "x"}}}
	if d := Diff(base, proto.CloneOf(base)); len(d) != 0 {
		t.Errorf("a spec differs from itself: %v", d)
	}
	fields := base.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f, changed := fields.Get(i), proto.CloneOf(base)
		m := changed.ProtoReflect()
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString("k").MapKey(), protoreflect.ValueOfString("v"))
		case f.IsList():
			m.Mutable(f).List().AppendMutable()
		case f.Message() != nil:
			m.Set(f, m.NewField(f))
		default:
			m.Set(f, someValue(f))
		}
		same := proto.Equal(Normalize(base), Normalize(changed))
		if d := Diff(base, changed); (len(d) == 0) != same {
			t.Errorf("%s: equal %v, changes %v", f.Name(), same, d)
		}
	}
}

func someValue(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(2)
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(7)
	default:
		return protoreflect.ValueOfString("other")
	}
}
