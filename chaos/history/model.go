package history

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

// Kind is what is asked.
type Kind int

const (
	Get Kind = iota
	Put
	Delete
	Swap
)

// Input is what was asked.
type Input struct {
	Kind       Kind
	Key, Value string
	// If, for Swap, is the revision that the key must have; 0 for none.
	If int64
}

// Output is what was answered.
type Output struct {
	// Revision of the keyspace.
	Revision int64
	// OK: Delete found the key, Swap wrote it.
	OK bool
	// Found is what Get read, and Swap where it did not write.
	Found Found
	// Unknown: whether it took effect was not learned, and nothing else is set.
	Unknown bool
}

// Found is a key as it was read. Revision is that of its last change; 0 says that
// there was no such key.
type Found struct {
	Value    string
	Revision int64
}

// unlearned is the revision of a change whose answer was lost, until it is read.
const unlearned = -1

// model is one key: its state is a Found.
var model = porcupine.Model{
	Init: func() any { return Found{} },
	Step: func(state, in, out any) (bool, any) { return step(state.(Found), in.(Input), out.(Output)) },
}

// step reports whether a key that is in the state may give the answer, and how it
// is then.
func step(state Found, in Input, out Output) (bool, Found) {
	exists := state.Revision != 0
	written := Found{Value: in.Value, Revision: out.Revision}
	if out.Unknown {
		written.Revision = unlearned
	}
	switch in.Kind {
	case Get:
		return reads(state, out.Found)
	case Put:
		return out.Unknown || out.Revision > state.Revision, written
	case Delete:
		return out.Unknown || out.OK == exists, Found{}
	default:
		switch {
		case state.Revision == in.If:
			return out.OK || out.Unknown, written
		case out.Unknown:
			return true, state
		case out.OK || out.Found.Revision == in.If:
			return false, state
		}
		return reads(state, out.Found)
	}
}

// reads reports whether a key in the state may be read as found, and what is known
// of it then.
func reads(state, found Found) (bool, Found) {
	if state.Revision == unlearned && found.Revision > 0 {
		return state.Value == found.Value, found
	}
	return state == found, state
}

// Check fails where no order of the operations, each at one moment between call and
// return, explains all answers, or where revisions contradict the order of time. It
// gives up on a key after a while, which is a failure too.
func Check(all []porcupine.Operation, patience time.Duration) error {
	if err := checkRevisions(all); err != nil {
		return err
	}
	byKey := map[string][]porcupine.Operation{}
	for _, o := range all {
		key := o.Input.(Input).Key
		byKey[key] = append(byKey[key], o)
	}
	for _, key := range slices.Sorted(maps.Keys(byKey)) {
		operations := byKey[key]
		switch result, info := porcupine.CheckOperationsVerbose(model, operations, patience); result {
		case porcupine.Ok:
		case porcupine.Unknown:
			return fmt.Errorf("history: not decided within %s whether %d operations on %q are linearizable", patience, len(operations), key)
		default:
			return fmt.Errorf("history: %d operations on %q are not linearizable: %s", len(operations), key, longest(info))
		}
	}
	return nil
}

// longest describes the end of the longest order that explains a part of the
// answers: what comes after it is what is wrong.
func longest(info porcupine.LinearizationInfo) string {
	var most []porcupine.Operation
	for _, orders := range info.PartialLinearizationsOperations() {
		for _, order := range orders {
			if len(order) > len(most) {
				most = order
			}
		}
	}
	const shown = 10
	return fmt.Sprintf("nothing can follow the first %d, which end with %+v", len(most), most[max(0, len(most)-shown):])
}

// checkRevisions looks at what one key alone does not show: that what is asked
// after an answer is answered at no older revision, and that no two changes have
// the same one.
func checkRevisions(all []porcupine.Operation) error {
	var known []porcupine.Operation
	for _, o := range all {
		if !o.Output.(Output).Unknown {
			known = append(known, o)
		}
	}
	byCall := slices.Clone(known)
	slices.SortFunc(byCall, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	slices.SortFunc(known, func(a, b porcupine.Operation) int { return cmp.Compare(a.Return, b.Return) })
	var newest porcupine.Operation
	seen := int64(0)
	for _, o := range byCall {
		for len(known) > 0 && known[0].Return < o.Call {
			if rev := known[0].Output.(Output).Revision; rev > seen {
				newest, seen = known[0], rev
			}
			known = known[1:]
		}
		if rev := o.Output.(Output).Revision; rev < seen {
			return fmt.Errorf("history: %+v was answered at revision %d, after %+v at %d", o, rev, newest, seen)
		}
	}
	changes := map[int64]porcupine.Operation{}
	for _, o := range byCall {
		if !changed(o) {
			continue
		}
		rev := o.Output.(Output).Revision
		if other, twice := changes[rev]; twice {
			return fmt.Errorf("history: %+v and %+v both made revision %d", other, o, rev)
		}
		changes[rev] = o
	}
	return nil
}

func changed(o porcupine.Operation) bool {
	return o.Input.(Input).Kind == Put || o.Input.(Input).Kind != Get && o.Output.(Output).OK
}
