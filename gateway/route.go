package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// route is what one pattern of the API takes, read from the annotations of the
// proto files: what is not in it is refused, where the generated code would pass
// it over.
type route struct {
	method *methodInfo
	// Fields that the query may set, by each of their names.
	query map[string]protoreflect.FieldDescriptor
	// "" for no body, "*" for the request, else the field that the body is.
	body string
}

type methodInfo struct {
	fullName  string
	input     protoreflect.MessageType
	output    protoreflect.MessageType
	streaming bool
}

// routes are keyed by verb and pattern, as the generated code names patterns:
// "GET /v1/workloads/{id=*}".
func routes() (map[string]*route, error) {
	all := map[string]*route{}
	services := pb.File_persys_v1_api_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			rule, ok := proto.GetExtension(m.Options(), annotations.E_Http).(*annotations.HttpRule)
			if !ok || rule == nil {
				continue
			}
			info := &methodInfo{fullName: fmt.Sprintf("/%s/%s", services.Get(i).FullName(), m.Name()), streaming: m.IsStreamingServer()}
			var err error
			if info.input, err = protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName()); err != nil {
				return nil, fmt.Errorf("input of %s: %w", info.fullName, err)
			}
			if info.output, err = protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName()); err != nil {
				return nil, fmt.Errorf("output of %s: %w", info.fullName, err)
			}
			for _, r := range append([]*annotations.HttpRule{rule}, rule.AdditionalBindings...) {
				key, one := newRoute(info, r)
				all[key] = one
			}
		}
	}
	return all, nil
}

func newRoute(info *methodInfo, rule *annotations.HttpRule) (key string, r *route) {
	var verb, path string
	switch p := rule.Pattern.(type) {
	case *annotations.HttpRule_Get:
		verb, path = "GET", p.Get
	case *annotations.HttpRule_Post:
		verb, path = "POST", p.Post
	case *annotations.HttpRule_Put:
		verb, path = "PUT", p.Put
	case *annotations.HttpRule_Delete:
		verb, path = "DELETE", p.Delete
	}
	r = &route{method: info, body: rule.Body, query: map[string]protoreflect.FieldDescriptor{}}
	if rule.Body != "*" {
		fields := info.input.Descriptor().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			inPath := strings.Contains(path, "{"+string(f.Name())+"}")
			if !inPath && string(f.Name()) != rule.Body {
				r.query[string(f.Name())] = f
				r.query[f.JSONName()] = f
			}
		}
	}
	return verb + " " + strings.ReplaceAll(path, "}", "=*}"), r
}

// takes reports whether the query, or a header that stands for it, may set the
// field.
func (r *route) takes(field string) bool { return r.query[field] != nil }

// decodeQuery reads the query into a request by the rules for bodies, so that
// what is wrong is said in the same words.
func (r *route) decodeQuery(query url.Values, request proto.Message) error {
	document := map[string]any{}
	for name := range query {
		var value any = query.Get(name)
		if r.query[name].Kind() == protoreflect.BoolKind && (value == "true" || value == "false") {
			value = value == "true"
		}
		document[name] = value
	}
	data, err := json.Marshal(document)
	if err != nil {
		return fmt.Errorf("query: %w", err)
	}
	err = model.DecodeInto(data, request)
	var fields model.FieldErrors
	if errors.As(err, &fields) {
		for i := range fields {
			fields[i].Line = 0 // of what was made here
		}
		return fields
	}
	return err
}

// allowedQuery names the fields for a refusal.
func (r *route) allowedQuery() string {
	names := map[string]bool{}
	for _, f := range r.query {
		names[string(f.Name())] = true
	}
	if len(names) == 0 {
		return "no parameters"
	}
	return strings.Join(slices.Sorted(maps.Keys(names)), ", ")
}
