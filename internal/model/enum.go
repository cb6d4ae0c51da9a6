package model

import (
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// enumSigns are other spellings of values, beside those that follow from the names.
var enumSigns = map[protoreflect.FullName]map[string]protoreflect.EnumNumber{
	pb.Constraint_IN.Descriptor().FullName(): {
		"=": pb.Constraint_IN.Number(), "==": pb.Constraint_IN.Number(), "!=": pb.Constraint_NOT_IN.Number(),
		">": pb.Constraint_GREATER.Number(), "<": pb.Constraint_LESS.Number(),
	},
}

// parseEnum reads a value by name, ignoring case, separators and the type's
// prefix ("container", "Running", "bin-pack", "DESIRED_STOPPED"), or by number.
func parseEnum(e protoreflect.EnumDescriptor, s string) (protoreflect.EnumNumber, error) {
	if number, ok := enumSigns[e.FullName()][s]; ok {
		return number, nil
	}
	values := e.Values()
	want := squash(s)
	for i := range values.Len() {
		v := values.Get(i)
		if want != "" && (want == squash(string(v.Name())) || want == squash(shortName(v))) {
			return v.Number(), nil
		}
	}
	if number, err := strconv.ParseInt(s, 10, 32); err == nil && values.ByNumber(protoreflect.EnumNumber(number)) != nil {
		return protoreflect.EnumNumber(number), nil
	}
	return 0, fmt.Errorf("%q is unknown; allowed: %s", clip(s), strings.Join(enumNames(e), ", "))
}

// squash makes spellings of one name equal.
func squash(s string) string {
	return strings.ToLower(strings.NewReplacer("_", "", "-", "", " ", "").Replace(s))
}

// shortName is the value's name without the words that it shares with its type:
// WORKLOAD_TYPE_UNSPECIFIED → UNSPECIFIED, DESIRED_RUNNING → RUNNING.
func shortName(v protoreflect.EnumValueDescriptor) string {
	name, kind := string(v.Name()), squash(string(v.Parent().Name()))
	for {
		word, rest, more := strings.Cut(name, "_")
		after, shared := strings.CutPrefix(kind, strings.ToLower(word))
		if !more || !shared {
			return name
		}
		name, kind = rest, after
	}
}

// enumNames are the values as people write them, but for the unspecified one.
func enumNames(e protoreflect.EnumDescriptor) []string {
	var names []string
	for i := range e.Values().Len() {
		short := strings.ToLower(shortName(e.Values().Get(i)))
		if short != "unspecified" {
			names = append(names, short)
		}
	}
	return names
}
