package model

import (
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The functions below admit whole objects, as JSON or YAML: what was read is
// changed and put back. What the system writes into an object must be as it is,
// or be left out; so a document that was read before somebody else's change is
// refused, and nothing is taken and then ignored.

// PutWorkload is ApplyWorkload of a document, which is a spec or a workload. Of a
// workload that does not exist (any more) only the spec counts: a document that
// was kept brings it back.
func PutWorkload(v Reader, id string, document []byte, m Meta) (*pb.Txn, *pb.Workload, error) {
	given, err := decodeWorkload(document)
	if err != nil {
		return nil, nil, err
	}
	if given.Spec != nil {
		if err := nameOf(&given.Spec.Id, id); err != nil {
			return nil, nil, err
		}
	}
	stored := &pb.Workload{}
	mod, exists, err := Load(v, WorkloadKey(id), stored)
	if err != nil {
		return nil, nil, err
	}
	if exists {
		if err := checkVersion(id, mod, given.ResourceVersion); err != nil {
			return nil, nil, err
		}
		if err := checkKept(stored, given, "spec", "resource_version"); err != nil {
			return nil, nil, err
		}
	}
	txn, _, w, err := ApplyWorkload(v, &pb.ApplyWorkloadRequest{Spec: given.Spec}, m)
	return txn, w, err
}

// decodeWorkload takes a document with the field spec for a workload, and any other
// for a spec.
func decodeWorkload(document []byte) (*pb.Workload, error) {
	doc, err := oneDocument(document)
	if err != nil {
		return nil, err
	}
	w, d := &pb.Workload{}, &decoder{}
	if hasField(doc, "spec") {
		d.message(doc, w.ProtoReflect(), "", 0)
	} else {
		w.Spec = &pb.WorkloadSpec{}
		d.message(doc, w.Spec.ProtoReflect(), "", 0)
	}
	return w, d.problems.err()
}

func oneDocument(data []byte) (*yaml.Node, error) {
	docs, err := parseDocuments(data)
	switch {
	case err != nil:
		return nil, err
	case len(docs) == 0:
		return nil, FieldErrors{{Message: "the document is empty"}}
	case len(docs) > 1:
		return nil, FieldErrors{{Line: docs[1].Line, Message: "more than one document; allowed: one"}}
	}
	return docs[0], nil
}

func hasField(doc *yaml.Node, name string) bool {
	doc = resolve(doc)
	for i := 0; doc.Kind == yaml.MappingNode && i+1 < len(doc.Content); i += 2 {
		if doc.Content[i].Value == name {
			return true
		}
	}
	return false
}

// nameOf gives a document the name that its key has.
func nameOf(given *string, id string) error {
	if *given == "" {
		*given = id
	}
	if *given != id {
		return invalid("id", "%s contradicts the key; allowed: %s, or leave it out", strconv.Quote(clip(*given)), strconv.Quote(clip(id)))
	}
	return nil
}

// checkKept wants the fields of given, but for the excepted ones, to be as they
// are stored or not there.
func checkKept(stored, given proto.Message, except ...string) error {
	var errs FieldErrors
	was, is := stored.ProtoReflect(), given.ProtoReflect()
	fields := is.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if slices.Contains(except, string(f.Name())) || !is.Has(f) {
			continue
		}
		if !was.Has(f) || !is.Get(f).Equal(was.Get(f)) {
			errs.add(string(f.Name()), "is written by the system and cannot be changed; allowed: as it is, or leave it out")
		}
	}
	return errs.err()
}

// PutNode changes what users say of a node: user_labels, user_taints,
// unschedulable, draining and drain_deadline, which mean none, none, false, false
// and none where they are left out.
func PutNode(v Reader, id string, document []byte, m Meta) (*pb.Txn, *pb.Node, error) {
	given, d := &pb.Node{}, &decoder{}
	doc, err := oneDocument(document)
	if err != nil {
		return nil, nil, err
	}
	if d.message(doc, given.ProtoReflect(), "", 0); len(d.problems) > 0 {
		return nil, nil, d.problems
	}
	if err := nameOf(&given.Id, id); err != nil {
		return nil, nil, err
	}
	if _, known := v.Get(NodeKey(id)); !known {
		return nil, nil, refuse(codes.NotFound, "there is no node %q; a machine becomes one when it joins", clip(id))
	}
	stored, err := loadNode(v, id)
	if err != nil {
		return nil, nil, err
	}
	if given.ResourceVersion != 0 && given.ResourceVersion != stored.ResourceVersion {
		return nil, nil, refuse(codes.Aborted, "node %q is at version %d, not %d: somebody changed it; read it again", id, stored.ResourceVersion, given.ResourceVersion)
	}
	if err := checkKept(stored, given, "user_labels", "user_taints", "unschedulable", "draining", "drain_deadline"); err != nil {
		return nil, nil, err
	}
	edits, err := nodeEdits(stored, given)
	if err != nil {
		return nil, nil, err
	}
	var messages []string
	for _, e := range edits {
		messages = append(messages, e.message)
	}
	return editNode(v, id, m, strings.Join(messages, ", "), func(n *pb.Node) {
		for _, e := range edits {
			e.edit(n)
		}
	})
}

// nodeEdits are the changes, as users ask for them one by one, that lead from one
// node to the other.
func nodeEdits(from, to *pb.Node) ([]nodeEdit, error) {
	var edits []nodeEdit
	change := &pb.LabelNodeRequest{Set: map[string]string{}}
	for k, v := range to.UserLabels {
		if old, ok := from.UserLabels[k]; !ok || old != v {
			change.Set[k] = v
		}
	}
	for _, k := range sortedKeys(from.UserLabels) {
		if _, ok := to.UserLabels[k]; !ok {
			change.Remove = append(change.Remove, k)
		}
	}
	if len(change.Set)+len(change.Remove) > 0 {
		if err := ValidateLabels("user_labels", change.Set); err != nil {
			return nil, err
		}
		edits = append(edits, labelEdit(change))
	}
	if taints, changed, err := taintChange(from, to); err != nil {
		return nil, err
	} else if changed {
		edits = append(edits, taintEdit(taints))
	}
	deadline := to.DrainDeadline
	switch {
	case deadline != nil && deadline.CheckValid() != nil:
		return nil, invalid("drain_deadline", "is no time; allowed: RFC 3339, or leave it out")
	case deadline != nil && !to.Draining && !proto.Equal(deadline, from.DrainDeadline):
		return nil, invalid("drain_deadline", "the node is not drained; allowed: leave it out, or draining true")
	case to.Draining && from.Draining && !to.Unschedulable:
		return nil, invalid("unschedulable", "a node that is drained takes no new work; allowed: true, or draining false")
	case to.Draining && (!from.Draining || !proto.Equal(deadline, from.DrainDeadline)):
		edits = append(edits, drainEdit(deadline))
	case from.Draining && !to.Draining:
		edits = append(edits, uncordonEdit)
		if to.Unschedulable {
			edits = append(edits, cordonEdit)
		}
	case to.Draining:
	case to.Unschedulable && !from.Unschedulable:
		edits = append(edits, cordonEdit)
	case from.Unschedulable && !to.Unschedulable:
		edits = append(edits, uncordonEdit)
	}
	return edits, nil
}

// taintChange is how the taints that users set in from become those in to.
func taintChange(from, to *pb.Node) (*pb.TaintNodeRequest, bool, error) {
	if err := ValidateTaints("user_taints", to.UserTaints); err != nil {
		return nil, false, err
	}
	has := func(list []*pb.Taint, t *pb.Taint) bool {
		return slices.ContainsFunc(list, func(o *pb.Taint) bool { return proto.Equal(o, t) })
	}
	change := &pb.TaintNodeRequest{}
	for _, t := range from.UserTaints {
		if !has(to.UserTaints, t) && !slices.Contains(change.Remove, t.Key) {
			change.Remove = append(change.Remove, t.Key)
		}
	}
	for _, t := range to.UserTaints {
		// With one effect of a key gone, the others are set anew.
		if !has(from.UserTaints, t) || slices.Contains(change.Remove, t.Key) {
			change.Set = append(change.Set, t)
		}
	}
	return change, len(change.Set)+len(change.Remove) > 0, nil
}
