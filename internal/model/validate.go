package model

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Limits of a spec.
const (
	MaxReplicas = 10_000
	// MaxSpecBytes bounds a stored spec: it travels in each assignment.
	MaxSpecBytes = 256 << 10
	MaxPriority  = 100

	maxCPUMillis     = 1_000_000 * 1000
	maxResourceBytes = 1024 << 40
	maxGraceSeconds  = 24 * 3600
	maxListed        = 256
	// The Docker Engine starts no container with less.
	minContainerMemory = 6 << 20
)

// Validate says everything that is wrong with a spec, at once, as FieldErrors;
// nil where nothing is. What it accepts takes effect: a field that this version
// does not honour is refused with its name. Defaults need not be filled in.
func Validate(spec *pb.WorkloadSpec) error {
	if spec == nil {
		return FieldErrors{{Path: "spec", Message: "missing"}}
	}
	var errs FieldErrors
	checkKnown(&errs, "", spec.ProtoReflect())
	if size := proto.Size(spec); size > MaxSpecBytes {
		errs.add("", "the spec has %d bytes; allowed: %d", size, MaxSpecBytes)
	}
	checkID(&errs, "id", spec.Id)
	checkType(&errs, spec)
	checkKind(&errs, spec)
	checkLabels(&errs, "labels", spec.Labels)
	checkResources(&errs, spec)
	checkPlacement(&errs, spec)
	checkUpdate(&errs, spec)
	checkRestart(&errs, spec)
	if spec.Priority != nil {
		checkRange(&errs, "priority", *spec.Priority, 0, MaxPriority)
	}
	checkSchedule(&errs, spec)
	checkEnv(&errs, "env", spec.Env)
	switch s := spec.Spec.(type) {
	case *pb.WorkloadSpec_Container:
		checkContainer(&errs, "container", s.Container)
	case *pb.WorkloadSpec_Process:
		checkProcess(&errs, "process", s.Process)
	}
	return errs.err()
}

// checkKnown refuses what this version does not know, which a newer client may
// send, and text that no runtime can be given.
func checkKnown(errs *FieldErrors, path string, m protoreflect.Message) {
	for raw := m.GetUnknown(); len(raw) > 0; {
		number, _, n := protowire.ConsumeField(raw)
		if n <= 0 {
			errs.add(path, "has bytes that are no field")
			break
		}
		errs.add(path, "field number %d is unknown to this version", number)
		raw = raw[n:]
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !m.Has(f) {
			continue
		}
		at, v := join(path, string(f.Name())), m.Get(f)
		switch {
		case f.IsMap():
			var bad []string
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				if f.MapValue().Kind() == protoreflect.StringKind && strings.ContainsRune(v.String(), 0) {
					bad = append(bad, k.String())
				}
				return true
			})
			slices.Sort(bad)
			for _, k := range bad {
				errs.add(at+"."+clip(k), "has a zero byte")
			}
		case f.IsList():
			if n := v.List().Len(); n > maxListed {
				errs.add(at, "has %d entries; allowed: %d", n, maxListed)
				continue
			}
			for j := range v.List().Len() {
				checkKnownValue(errs, fmt.Sprintf("%s[%d]", at, j), f, v.List().Get(j))
			}
		default:
			checkKnownValue(errs, at, f, v)
		}
	}
}

func checkKnownValue(errs *FieldErrors, at string, f protoreflect.FieldDescriptor, v protoreflect.Value) {
	switch f.Kind() {
	case protoreflect.MessageKind:
		checkKnown(errs, at, v.Message())
	case protoreflect.EnumKind:
		if f.Enum().Values().ByNumber(v.Enum()) == nil {
			errs.add(at, "value %d is unknown to this version; allowed: %s", v.Enum(), strings.Join(enumNames(f.Enum()), ", "))
		}
	case protoreflect.StringKind:
		if strings.ContainsRune(v.String(), 0) {
			errs.add(at, "has a zero byte")
		}
	}
}

// TypeOf is the type that follows from the spec that is given.
func TypeOf(spec *pb.WorkloadSpec) pb.WorkloadType {
	switch spec.GetSpec().(type) {
	case *pb.WorkloadSpec_Container:
		return pb.WorkloadType_CONTAINER
	case *pb.WorkloadSpec_Compose:
		return pb.WorkloadType_COMPOSE
	case *pb.WorkloadSpec_Vm:
		return pb.WorkloadType_VM
	case *pb.WorkloadSpec_Process:
		return pb.WorkloadType_PROCESS
	}
	return pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED
}

func checkType(errs *FieldErrors, spec *pb.WorkloadSpec) {
	given := TypeOf(spec)
	switch {
	case given == pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED:
		errs.add("", "says nothing to run; allowed: one of container, process")
	case given == pb.WorkloadType_COMPOSE || given == pb.WorkloadType_VM:
		errs.add(strings.ToLower(given.String()), "not supported by this version; allowed: container, process")
	}
	if spec.Type != pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED && given != pb.WorkloadType_WORKLOAD_TYPE_UNSPECIFIED && spec.Type != given {
		name := strings.ToLower(given.String())
		errs.add("type", "%s contradicts the %s spec that is given; allowed: %s, or leave it out", strings.ToLower(spec.Type.String()), name, name)
	}
}

func checkKind(errs *FieldErrors, spec *pb.WorkloadSpec) {
	if spec.DesiredState == pb.DesiredState_DESIRED_DELETED {
		errs.add("desired_state", "deleted cannot be applied: delete the workload; allowed: running, stopped")
	}
	if spec.Replicas == nil {
		return
	}
	if spec.Kind == pb.WorkloadKind_GLOBAL {
		errs.add("replicas", "not with kind global, which runs one replica on each matching node; allowed: leave it out")
		return
	}
	checkRange(errs, "replicas", *spec.Replicas, 0, MaxReplicas)
}

func checkResources(errs *FieldErrors, spec *pb.WorkloadSpec) {
	r := spec.Resources
	if s := r.GetCpu(); s != "" {
		if n, err := ParseCPU(s); err != nil {
			errs.add("resources.cpu", "%v", trimSubject(err))
		} else if n < 1 || n > maxCPUMillis {
			errs.add("resources.cpu", "%q is out of range; allowed: 1m to %s, or leave it out", s, FormatCPU(maxCPUMillis))
		}
	}
	least := int64(1)
	if spec.GetContainer() != nil {
		least = minContainerMemory
	}
	checkBytes(errs, "resources.memory", r.GetMemory(), least)
	checkBytes(errs, "resources.disk", r.GetDisk(), 1)
	checkDeviceRequests(errs, r.GetDevices())
	checkStorageRequests(errs, r.GetStorage())
}

func checkBytes(errs *FieldErrors, at, s string, least int64) {
	if s == "" {
		return
	}
	if n, err := ParseBytes(s); err != nil {
		errs.add(at, "%v", trimSubject(err))
	} else if n < least || n > maxResourceBytes {
		errs.add(at, "%q is out of range; allowed: %s to %s, or leave it out", s, FormatBytes(least), FormatBytes(maxResourceBytes))
	}
}

// trimSubject drops what the field's path says already.
func trimSubject(err error) string {
	s := err.Error()
	return strings.TrimPrefix(strings.TrimPrefix(s, "cpu "), "quantity ")
}

func checkRestart(errs *FieldErrors, spec *pb.WorkloadSpec) {
	r := spec.Restart
	if r.GetCondition() == pb.RestartPolicy_ALWAYS && spec.Kind == pb.WorkloadKind_JOB {
		errs.add("restart.condition", "always contradicts kind job, which runs to completion; allowed: on_failure, never")
	}
	if r.GetMaxAttempts() < 0 {
		errs.add("restart.max_attempts", "%d is negative; allowed: 1 or more, 0 for the default (of a job 3, else no bound)", r.MaxAttempts)
	}
	if r.GetMaxAttempts() > 0 && r.GetCondition() == pb.RestartPolicy_NEVER {
		errs.add("restart.max_attempts", "contradicts condition never; allowed: leave it out")
	}
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
