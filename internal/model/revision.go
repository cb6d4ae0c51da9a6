package model

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Defaults of a spec.
const (
	DefaultPriority     = 50
	defaultGraceSeconds = 10
	defaultMaxParallel  = 1
	defaultWeight       = 50
	// Local restarts of a job's replica: a job that can't succeed ends as failed.
	defaultJobAttempts = 3
)

// Normalize is a copy with the defaults written out, the type that follows from
// the spec, and quantities in one spelling. Specs that mean the same are equal
// after it. What is wrong stays as it is, for Validate to say.
func Normalize(spec *pb.WorkloadSpec) *pb.WorkloadSpec {
	s := reduce(spec)
	if s.Type == pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED {
		s.Type = TypeOf(s)
	}
	if s.Replicas == nil && s.Kind != pb.WorkloadKind_GLOBAL {
		s.Replicas = proto.Int32(1)
	}
	if s.Update == nil {
		s.Update = &pb.UpdateStrategy{}
	}
	normalizeUpdate(s.Update)
	if s.Restart == nil {
		s.Restart = &pb.RestartPolicy{}
	}
	if s.Restart.Condition == pb.RestartPolicy_DEFAULT {
		s.Restart.Condition = restartDefault(s.Kind)
	}
	for _, d := range s.Resources.GetDevices() {
		d.Count = cmp.Or(d.Count, 1)
	}
	for _, a := range s.Placement.GetAffinities() {
		if a.Weight == nil {
			a.Weight = proto.Int32(defaultWeight)
		}
	}
	for _, sp := range s.Placement.GetSpread() {
		sp.Weight = cmp.Or(sp.Weight, defaultWeight)
	}
	if n := attemptsDefault(s); n != 0 && s.Restart.MaxAttempts == 0 {
		s.Restart.MaxAttempts = n
	}
	if s.Priority == nil {
		s.Priority = proto.Int32(DefaultPriority)
	}
	normalizeSchedule(s.Schedule)
	for _, p := range portsOf(s) {
		p.Protocol = protocolOf(p)
	}
	if grace := graceOf(s); grace != nil && *grace == nil {
		*grace = proto.Int32(defaultGraceSeconds)
	}
	return s
}

// Revision is the hash of what makes a replica what it is: kind, env,
// resources, restart, exclusive and the container or process itself. Another
// one means that replicas are replaced. It says nothing of id, labels, replicas,
// desired_state, placement, update and priority: these take effect on what runs.
//
// It is taken over canonical JSON: fields by their proto names in alphabetical
// order, enums by name, nothing that is empty or has its default, the
// workload's env merged with the container's. So it is the same for every
// version that knows the fields that are used, and a default that a later
// version adds changes no revision.
func Revision(spec *pb.WorkloadSpec) string {
	s := reduce(spec)
	what := &pb.WorkloadSpec{
		Kind: s.Kind, Resources: s.Resources, Restart: s.Restart, Exclusive: s.Exclusive, Env: Env(s), Spec: s.Spec,
	}
	switch t := what.Spec.(type) {
	case *pb.WorkloadSpec_Container:
		t.Container.Env = nil
	case *pb.WorkloadSpec_Process:
		t.Process.Env = nil
	}
	var b bytes.Buffer
	writeCanonical(&b, what.ProtoReflect())
	sum := sha256.Sum256(b.Bytes())
	return hex.EncodeToString(sum[:8])
}

// Env is what a replica is given of users' variables: those of the workload,
// over them those of its container or process.
func Env(spec *pb.WorkloadSpec) map[string]string {
	own := spec.GetContainer().GetEnv()
	if p := spec.GetProcess(); p != nil {
		own = p.Env
	}
	if len(spec.GetEnv()) == 0 && len(own) == 0 {
		return nil
	}
	env := make(map[string]string, len(spec.Env)+len(own))
	maps.Copy(env, spec.Env)
	maps.Copy(env, own)
	return env
}

// reduce is a copy in which what has its default is left out and quantities and
// protocols have one spelling: the inverse of what Normalize writes out, as far
// as Revision looks at it.
func reduce(spec *pb.WorkloadSpec) *pb.WorkloadSpec {
	s := proto.CloneOf(spec)
	if r := s.Resources; r != nil {
		if n, err := ParseCPU(r.Cpu); err == nil {
			r.Cpu = FormatCPU(n)
		}
		if n, err := ParseBytes(r.Memory); err == nil {
			r.Memory = FormatBytes(n)
		}
		if n, err := ParseBytes(r.Disk); err == nil {
			r.Disk = FormatBytes(n)
		}
		for _, d := range r.Devices {
			if d.Count == 1 {
				d.Count = 0
			}
		}
		for _, st := range r.Storage {
			if n, err := ParseBytes(st.Size); err == nil {
				st.Size = FormatBytes(n)
			}
		}
	}
	if n := attemptsDefault(s); n != 0 && s.Restart.GetMaxAttempts() == n {
		s.Restart.MaxAttempts = 0
	}
	if s.Restart.GetCondition() == restartDefault(s.Kind) {
		s.Restart.Condition = pb.RestartPolicy_DEFAULT
	}
	for _, p := range portsOf(s) {
		p.Protocol = protocolOf(p)
		if p.Protocol == "tcp" {
			p.Protocol = ""
		}
	}
	if grace := graceOf(s); grace != nil && *grace != nil && **grace == defaultGraceSeconds {
		*grace = nil
	}
	s.Resources = unlessEmpty(s.Resources)
	s.Restart = unlessEmpty(s.Restart)
	s.Placement = unlessEmpty(s.Placement)
	return s
}

func unlessEmpty[M interface {
	comparable
	proto.Message
}](m M) M {
	var none M
	if m != none && proto.Size(m) == 0 {
		return none
	}
	return m
}

func restartDefault(kind pb.WorkloadKind) pb.RestartPolicy_Condition {
	if kind == pb.WorkloadKind_JOB {
		return pb.RestartPolicy_ON_FAILURE
	}
	return pb.RestartPolicy_ALWAYS
}

// attemptsDefault is the default of restart.max_attempts where it is not 0.
func attemptsDefault(s *pb.WorkloadSpec) int32 {
	if s.Kind == pb.WorkloadKind_JOB && s.Restart.GetCondition() != pb.RestartPolicy_NEVER {
		return defaultJobAttempts
	}
	return 0
}

func portsOf(s *pb.WorkloadSpec) []*pb.Port {
	if p := s.GetProcess(); p != nil {
		return p.Ports
	}
	return s.GetContainer().GetPorts()
}

func graceOf(s *pb.WorkloadSpec) **int32 {
	if c := s.GetContainer(); c != nil {
		return &c.StopGraceSeconds
	}
	if p := s.GetProcess(); p != nil {
		return &p.StopGraceSeconds
	}
	return nil
}

func writeCanonical(b *bytes.Buffer, m protoreflect.Message) {
	var fields []protoreflect.FieldDescriptor
	m.Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		fields = append(fields, f)
		return true
	})
	slices.SortFunc(fields, func(x, y protoreflect.FieldDescriptor) int {
		return strings.Compare(string(x.Name()), string(y.Name()))
	})
	b.WriteByte('{')
	for i, f := range fields {
		if i > 0 {
			b.WriteByte(',')
		}
		writeText(b, string(f.Name()))
		b.WriteByte(':')
		v := m.Get(f)
		switch {
		case f.IsMap():
			writeMap(b, f, v.Map())
		case f.IsList():
			b.WriteByte('[')
			for j := range v.List().Len() {
				if j > 0 {
					b.WriteByte(',')
				}
				writeValue(b, f, v.List().Get(j))
			}
			b.WriteByte(']')
		default:
			writeValue(b, f, v)
		}
	}
	b.WriteByte('}')
}

func writeMap(b *bytes.Buffer, f protoreflect.FieldDescriptor, m protoreflect.Map) {
	values := map[string]protoreflect.Value{}
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		values[k.String()] = v
		return true
	})
	b.WriteByte('{')
	for i, k := range sortedKeys(values) {
		if i > 0 {
			b.WriteByte(',')
		}
		writeText(b, k)
		b.WriteByte(':')
		writeValue(b, f.MapValue(), values[k])
	}
	b.WriteByte('}')
}

func writeValue(b *bytes.Buffer, f protoreflect.FieldDescriptor, v protoreflect.Value) {
	switch f.Kind() {
	case protoreflect.MessageKind:
		writeCanonical(b, v.Message())
	case protoreflect.EnumKind:
		if name := f.Enum().Values().ByNumber(v.Enum()); name != nil {
			writeText(b, string(name.Name()))
			return
		}
		b.WriteString(strconv.Itoa(int(v.Enum())))
	case protoreflect.StringKind:
		writeText(b, v.String())
	case protoreflect.BytesKind:
		writeText(b, hex.EncodeToString(v.Bytes()))
	default:
		// Booleans and whole numbers; specs have no fractions.
		b.WriteString(v.String())
	}
}

func writeText(b *bytes.Buffer, s string) {
	// Marshalling text cannot fail: what is no UTF-8 is replaced.
	data, _ := json.Marshal(s)
	b.Write(data)
}
