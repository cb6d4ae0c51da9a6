package model

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// maxNodes bounds what YAML aliases can blow up to.
	maxNodes = 200_000
	// More problems than this help nobody.
	maxProblems = 50
)

// Decode reads workload specs: YAML or JSON, several documents, each a spec or
// a list of specs. It is forgiving about form (snake_case and lowerCamelCase,
// enums in any case with or without their prefix, numbers where text is stored,
// such as "cpu: 1.5") and about nothing else: an unknown or repeated field, a
// wrong type or a fraction where whole numbers are stored are refused with
// their line. Null is the same as leaving the field out. Decoding does not
// validate.
func Decode(data []byte) ([]*pb.WorkloadSpec, error) {
	docs, err := parseDocuments(data)
	if err != nil {
		return nil, err
	}
	var specs []*pb.WorkloadSpec
	d := &decoder{}
	lines := map[string]int{}
	for _, doc := range docs {
		list := []*yaml.Node{doc}
		if doc.Kind == yaml.SequenceNode {
			list = doc.Content
		}
		for _, n := range list {
			spec := &pb.WorkloadSpec{}
			d.message(n, spec.ProtoReflect(), "", 0)
			if first, twice := lines[spec.Id]; twice && spec.Id != "" {
				d.problem(n, "id", "workload %q is given twice, first in line %d", spec.Id, first)
			}
			lines[spec.Id] = n.Line
			specs = append(specs, spec)
		}
	}
	if err := d.problems.err(); err != nil {
		return nil, err
	}
	if len(specs) == 0 {
		return nil, FieldErrors{{Message: "there is no workload in the input"}}
	}
	return specs, nil
}

// DecodeInto reads one document into m by the rules of Decode. Empty input
// leaves m as it is.
func DecodeInto(data []byte, m proto.Message) error {
	docs, err := parseDocuments(data)
	if err != nil {
		return err
	}
	if len(docs) == 0 {
		return nil
	}
	if len(docs) > 1 {
		return FieldErrors{{Line: docs[1].Line, Message: "more than one document; allowed: one"}}
	}
	d := &decoder{}
	d.message(docs[0], m.ProtoReflect(), "", 0)
	return d.problems.err()
}

// decoder fills messages by their descriptors and gathers what is wrong.
type decoder struct {
	problems FieldErrors
	nodes    int
}

func (d *decoder) problem(n *yaml.Node, path, format string, args ...any) {
	if len(d.problems) < maxProblems {
		d.problems = append(d.problems, FieldError{Line: n.Line, Path: path, Message: fmt.Sprintf(format, args...)})
	}
}

// enter follows aliases and keeps the bounds.
func (d *decoder) enter(n *yaml.Node, path string, depth int) (*yaml.Node, bool) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if depth > maxDepth {
		d.problem(n, path, "nested deeper than %d levels", maxDepth)
	}
	return n, d.spend(n, path) && depth <= maxDepth
}

func (d *decoder) spend(n *yaml.Node, path string) bool {
	if d.nodes++; d.nodes == maxNodes {
		d.problem(n, path, "the input is too large: more than %d values", maxNodes)
	}
	return d.nodes < maxNodes
}

func (d *decoder) message(n *yaml.Node, m protoreflect.Message, path string, depth int) {
	n, ok := d.enter(n, path, depth)
	if !ok || d.wellKnown(n, m, path) {
		return
	}
	if n.Kind != yaml.MappingNode {
		d.problem(n, path, "must be a mapping of fields, not %s", kindName(n))
		return
	}
	given := map[protoreflect.FullName]*yaml.Node{}
	for _, e := range d.entries(n, path, depth) {
		f := fieldNamed(m.Descriptor(), e.key.Value)
		if f == nil {
			d.problem(e.key, path, "unknown field %q%s", clip(e.key.Value), suggest(m.Descriptor(), e.key.Value))
			continue
		}
		if isNull(resolve(e.value)) {
			continue
		}
		if first := given[f.FullName()]; first != nil {
			d.problem(e.key, join(path, string(f.Name())), "given twice, first in line %d", first.Line)
			continue
		}
		given[f.FullName()] = e.key
		if one := f.ContainingOneof(); one != nil && !one.IsSynthetic() {
			if other := m.WhichOneof(one); other != nil {
				d.problem(e.key, join(path, string(f.Name())), "not together with %s; allowed: one of %s", other.Name(), oneofNames(one))
				continue
			}
		}
		d.field(e.value, m, f, join(path, string(f.Name())), depth+1)
	}
}

func (d *decoder) field(n *yaml.Node, m protoreflect.Message, f protoreflect.FieldDescriptor, path string, depth int) {
	n, ok := d.enter(n, path, depth)
	if !ok {
		return
	}
	switch {
	case f.IsMap():
		if n.Kind != yaml.MappingNode {
			d.problem(n, path, "must be a mapping, not %s", kindName(n))
			return
		}
		values := m.Mutable(f).Map()
		for _, e := range d.entries(n, path, depth) {
			at := path + "." + clip(e.key.Value)
			key := protoreflect.ValueOfString(e.key.Value).MapKey()
			if values.Has(key) {
				d.problem(e.key, at, "given twice")
				continue
			}
			if v, ok := d.value(e.value, f.MapValue(), values.NewValue, at, depth+1); ok {
				values.Set(key, v)
			}
		}
	case f.IsList():
		if n.Kind != yaml.SequenceNode {
			d.problem(n, path, "must be a list, not %s", kindName(n))
			return
		}
		list := m.Mutable(f).List()
		for i, item := range n.Content {
			if v, ok := d.value(item, f, list.NewElement, fmt.Sprintf("%s[%d]", path, i), depth+1); ok {
				list.Append(v)
			}
		}
	default:
		if v, ok := d.value(n, f, func() protoreflect.Value { return m.NewField(f) }, path, depth); ok {
			m.Set(f, v)
		}
	}
}

func (d *decoder) value(n *yaml.Node, f protoreflect.FieldDescriptor, fresh func() protoreflect.Value, path string, depth int) (protoreflect.Value, bool) {
	if f.Kind() == protoreflect.MessageKind {
		v := fresh()
		d.message(n, v.Message(), path, depth)
		return v, true
	}
	n, ok := d.enter(n, path, depth)
	if !ok {
		return protoreflect.Value{}, false
	}
	if n.Kind != yaml.ScalarNode {
		d.problem(n, path, "must be %s, not %s", wanted(f), kindName(n))
		return protoreflect.Value{}, false
	}
	if isNull(n) {
		d.problem(n, path, `has no value; write "" for an empty text`)
		return protoreflect.Value{}, false
	}
	if f.Kind() == protoreflect.EnumKind {
		number, err := parseEnum(f.Enum(), n.Value)
		if err != nil {
			d.problem(n, path, "%v", err)
			return protoreflect.Value{}, false
		}
		return protoreflect.ValueOfEnum(number), true
	}
	v, err := scalar(n, f)
	if err != nil {
		d.problem(n, path, "%v", err)
		return protoreflect.Value{}, false
	}
	return v, true
}

// scalar reads a value of a field that is neither message nor enum. Numbers may
// be quoted, as JSON writers do with large ones.
func scalar(n *yaml.Node, f protoreflect.FieldDescriptor) (protoreflect.Value, error) {
	refused := func(err error) error {
		if ne, ok := err.(*strconv.NumError); ok && ne.Err == strconv.ErrRange {
			return fmt.Errorf("%q is out of the range of %s", clip(n.Value), wanted(f))
		}
		return fmt.Errorf("%q is not %s", clip(n.Value), wanted(f))
	}
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(n.Value), nil
	case protoreflect.BoolKind:
		if n.ShortTag() != "!!bool" {
			return protoreflect.Value{}, refused(nil)
		}
		return protoreflect.ValueOfBool(strings.EqualFold(n.Value, "true")), nil
	case protoreflect.BytesKind:
		b, err := base64.StdEncoding.DecodeString(n.Value)
		if err != nil {
			return protoreflect.Value{}, refused(err)
		}
		return protoreflect.ValueOfBytes(b), nil
	case protoreflect.Int32Kind, protoreflect.Int64Kind:
		bits := 64
		if f.Kind() == protoreflect.Int32Kind {
			bits = 32
		}
		// Only plain decimals: 010 is eight to some readers and ten to others.
		v, err := strconv.ParseInt(n.Value, 10, bits)
		if err != nil || strings.HasPrefix(n.Value, "+") || strings.TrimLeft(n.Value, "-0123456789") != "" || leadingZero(n.Value) {
			return protoreflect.Value{}, refused(err)
		}
		if bits == 32 {
			return protoreflect.ValueOfInt32(int32(v)), nil
		}
		return protoreflect.ValueOfInt64(v), nil
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		bits := 64
		if f.Kind() == protoreflect.Uint32Kind {
			bits = 32
		}
		v, err := strconv.ParseUint(n.Value, 10, bits)
		if err != nil || leadingZero(n.Value) {
			return protoreflect.Value{}, refused(err)
		}
		if bits == 32 {
			return protoreflect.ValueOfUint32(uint32(v)), nil
		}
		return protoreflect.ValueOfUint64(v), nil
	case protoreflect.DoubleKind:
		v, err := strconv.ParseFloat(n.Value, 64)
		if err != nil {
			return protoreflect.Value{}, refused(err)
		}
		return protoreflect.ValueOfFloat64(v), nil
	}
	return protoreflect.Value{}, fmt.Errorf("fields of kind %s cannot be written here", f.Kind())
}

func leadingZero(s string) bool {
	s = strings.TrimPrefix(s, "-")
	return len(s) > 1 && s[0] == '0'
}

// wellKnown reads the types that are written as text: "3h", RFC 3339.
func (d *decoder) wellKnown(n *yaml.Node, m protoreflect.Message, path string) bool {
	seconds, nanos := int64(0), int32(0)
	switch m.Descriptor().FullName() {
	case "google.protobuf.Duration":
		v, err := time.ParseDuration(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil {
			d.problem(n, path, `%s is no duration; allowed: "90s", "15m", "3h"`, shown(n))
			return true
		}
		seconds, nanos = int64(v/time.Second), int32(v%time.Second)
	case "google.protobuf.Timestamp":
		v, err := time.Parse(time.RFC3339Nano, n.Value)
		if n.Kind != yaml.ScalarNode || err != nil {
			d.problem(n, path, `%s is no time; allowed: RFC 3339, such as "2026-01-31T12:00:00Z"`, shown(n))
			return true
		}
		seconds, nanos = v.Unix(), int32(v.Nanosecond())
	default:
		return false
	}
	fields := m.Descriptor().Fields()
	m.Set(fields.ByName("seconds"), protoreflect.ValueOfInt64(seconds))
	m.Set(fields.ByName("nanos"), protoreflect.ValueOfInt32(nanos))
	return true
}

type entry struct{ key, value *yaml.Node }

// entries are the pairs of a mapping with its merge keys (<<) resolved: what is
// written wins over what is merged, and the first merged over the later.
func (d *decoder) entries(n *yaml.Node, path string, depth int) []entry {
	var own, merged []entry
	for i := 0; i+1 < len(n.Content) && d.spend(n, path); i += 2 {
		key, value := resolve(n.Content[i]), n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			d.problem(key, path, "a field's name must be plain text, not %s", kindName(key))
			continue
		}
		if key.ShortTag() != "!!merge" {
			own = append(own, entry{key, value})
			continue
		}
		value = resolve(value)
		sources := []*yaml.Node{value}
		if value.Kind == yaml.SequenceNode {
			sources = value.Content
		}
		for _, s := range sources {
			s, ok := d.enter(s, path, depth+1)
			if !ok {
				break
			}
			if s.Kind != yaml.MappingNode {
				d.problem(s, path, "<< must be given a mapping, not %s", kindName(s))
				continue
			}
			merged = append(merged, d.entries(s, path, depth+1)...)
		}
	}
	seen := map[string]bool{}
	for _, e := range own {
		seen[e.key.Value] = true
	}
	for _, e := range merged {
		if !seen[e.key.Value] {
			seen[e.key.Value] = true
			own = append(own, e)
		}
	}
	return own
}

func resolve(n *yaml.Node) *yaml.Node {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

func fieldNamed(m protoreflect.MessageDescriptor, name string) protoreflect.FieldDescriptor {
	if f := m.Fields().ByName(protoreflect.Name(name)); f != nil {
		return f
	}
	return m.Fields().ByJSONName(name)
}

func oneofNames(o protoreflect.OneofDescriptor) string {
	var names []string
	for i := range o.Fields().Len() {
		names = append(names, string(o.Fields().Get(i).Name()))
	}
	return strings.Join(names, ", ")
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	return shown(n)
}

func shown(n *yaml.Node) string {
	switch {
	case n.Kind != yaml.ScalarNode:
		return kindName(n)
	case isNull(n):
		return "nothing"
	}
	return strconv.Quote(clip(n.Value))
}

func wanted(f protoreflect.FieldDescriptor) string {
	switch f.Kind() {
	case protoreflect.StringKind:
		return "text"
	case protoreflect.BoolKind:
		return "true or false"
	case protoreflect.BytesKind:
		return "base64"
	case protoreflect.EnumKind:
		return "one of " + strings.Join(enumNames(f.Enum()), ", ")
	case protoreflect.DoubleKind:
		return "a number"
	case protoreflect.Int32Kind:
		return "a whole number of 32 bits"
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		return "a whole number, not negative"
	}
	return "a whole number"
}

// formerly are fields of the predecessor's specs, by message, that are called
// otherwise now.
var formerly = map[protoreflect.Name]map[string]string{
	"WorkloadSpec": {
		"name":           `"id"`,
		"restart_policy": `"restart", such as restart: {condition: always}`,
	},
	"ContainerSpec": {
		"restart_policy":  `"restart" of the workload`,
		"managed_volumes": `"volumes", which are bind mounts; managed volumes are not supported by this version`,
	},
	"Resources": {
		"cpu_millicores": `"cpu", such as "500m"`,
		"memory_mb":      `"memory", such as "256Mi"`,
		"disk_gb":        `"disk", such as "10Gi"`,
	},
}

// suggest names the field that was probably meant.
func suggest(m protoreflect.MessageDescriptor, name string) string {
	if now, ok := formerly[m.Name()][name]; ok {
		return " (write " + now + ")"
	}
	best, distance := "", len(name)/3+2
	var all []string
	for i := range m.Fields().Len() {
		f := string(m.Fields().Get(i).Name())
		all = append(all, f)
		if d := editDistance(strings.ToLower(name), f, distance); d < distance {
			best, distance = f, d
		}
	}
	if best != "" {
		return fmt.Sprintf(" (did you mean %q?)", best)
	}
	slices.Sort(all)
	return "; allowed: " + strings.Join(all, ", ")
}

// editDistance is Levenshtein's, or bound where it is at least that.
func editDistance(a, b string, bound int) int {
	if len(a)-len(b) >= bound || len(b)-len(a) >= bound {
		return bound
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return min(row[len(b)], bound)
}
