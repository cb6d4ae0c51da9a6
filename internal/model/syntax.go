package model

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// maxDepth bounds the nesting of input; the deepest spec needs six levels.
const maxDepth = 64

// parseDocuments reads YAML or JSON into YAML nodes, which know their lines.
// JSON has its own reader, for YAML's differs in escapes and in tabs. Empty
// documents are left out.
func parseDocuments(data []byte) ([]*yaml.Node, error) {
	if !utf8.Valid(data) {
		return nil, FieldErrors{{Message: "the input is not UTF-8 text"}}
	}
	data = bytes.TrimPrefix(data, []byte("\uFEFF"))
	trimmed := bytes.TrimLeft(data, " \t\r\n")
	if len(trimmed) == 0 {
		return nil, nil
	}
	if trimmed[0] != '{' && trimmed[0] != '[' {
		return parseYAML(data)
	}
	docs, jsonErr := parseJSON(data)
	if jsonErr == nil {
		return docs, nil
	}
	// YAML's flow style looks like JSON: {id: web, kind: job}. With a quoted name
	// it was meant to be JSON, and YAML would be too forgiving a reader of it.
	if inner := bytes.TrimLeft(trimmed, "[{ \t\r\n"); len(inner) > 0 && inner[0] != '"' {
		if docs, err := parseYAML(data); err == nil {
			return docs, nil
		}
	}
	return nil, jsonErr
}

func parseYAML(data []byte) ([]*yaml.Node, error) {
	var docs []*yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		if err != nil {
			return nil, FieldErrors{{Message: "not YAML: " + strings.TrimPrefix(err.Error(), "yaml: ")}}
		}
		if len(doc.Content) == 0 || isNull(doc.Content[0]) {
			continue
		}
		docs = append(docs, doc.Content[0])
	}
}

// jsonReader turns JSON tokens into YAML nodes.
type jsonReader struct {
	dec  *json.Decoder
	data []byte
	// Lines before offset seen.
	line int
	seen int64
}

func parseJSON(data []byte) ([]*yaml.Node, error) {
	r := &jsonReader{dec: json.NewDecoder(bytes.NewReader(data)), data: data, line: 1}
	r.dec.UseNumber()
	var docs []*yaml.Node
	for {
		tok, err := r.dec.Token()
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		var n *yaml.Node
		if err == nil {
			n, err = r.node(tok, 0)
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("unexpected end")
			}
			return nil, FieldErrors{{Line: r.here(), Message: "not JSON: " + err.Error()}}
		}
		if !isNull(n) {
			docs = append(docs, n)
		}
	}
}

// here is the line of the last token read.
func (r *jsonReader) here() int {
	end := min(r.dec.InputOffset(), int64(len(r.data)))
	r.line += bytes.Count(r.data[r.seen:end], []byte("\n"))
	r.seen = end
	return r.line
}

func (r *jsonReader) node(tok json.Token, depth int) (*yaml.Node, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested deeper than %d levels", maxDepth)
	}
	n := &yaml.Node{Kind: yaml.ScalarNode, Line: r.here()}
	switch v := tok.(type) {
	case nil:
		n.Tag, n.Value = "!!null", "null"
	case bool:
		n.Tag, n.Value = "!!bool", fmt.Sprint(v)
	case json.Number:
		n.Tag, n.Value = "!!int", v.String()
		if strings.ContainsAny(n.Value, ".eE") {
			n.Tag = "!!float"
		}
	case string:
		n.Tag, n.Value = "!!str", v
	case json.Delim:
		n.Kind, n.Tag = yaml.SequenceNode, "!!seq"
		if v == '{' {
			n.Kind, n.Tag = yaml.MappingNode, "!!map"
		}
		for r.dec.More() {
			tok, err := r.dec.Token()
			if err != nil {
				return nil, err
			}
			child, err := r.node(tok, depth+1)
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, child)
		}
		if _, err := r.dec.Token(); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}
