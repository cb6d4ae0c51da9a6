package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

var outputFormats = []string{"table", "wide", "json", "yaml", "name"}

// printer writes answers in the format that was asked for.
type printer struct {
	format   string
	w, notes io.Writer
	color    bool
}

func newPrinter(format string, w, notes io.Writer, color bool) (*printer, error) {
	if !slices.Contains(outputFormats, format) {
		return nil, usageErrorf("output format %q is not known; there are %s", format, strings.Join(outputFormats, ", "))
	}
	return &printer{format, w, notes, color}, nil
}

// forPeople reports whether what is printed is read by a person and not by a
// program.
func (p *printer) forPeople() bool { return p.format == "table" || p.format == "wide" }

// listing is one kind of thing as a table, as names, or as the answer itself.
type listing struct {
	// One per row.
	names []string
	table table
	// For json and yaml.
	message proto.Message
	// What a person is told when there is nothing, on stderr.
	empty string
}

func (p *printer) list(l listing) error {
	switch p.format {
	case "json", "yaml":
		return p.message(l.message)
	case "name":
		for _, n := range l.names {
			if _, err := fmt.Fprintln(p.w, n); err != nil {
				return err
			}
		}
		return nil
	}
	if len(l.table.rows) == 0 {
		_, err := fmt.Fprintln(p.notes, l.empty)
		return err
	}
	return l.table.write(p.w, p.format == "wide", p.color)
}

// message writes one message as JSON or YAML. Names of fields are those of the
// spec (snake_case), which `persys apply` reads again.
func (p *printer) message(m proto.Message) error { return p.document(marshal(m)) }

func (p *printer) document(data []byte, err error) error {
	if err != nil {
		return err
	}
	if p.format == "yaml" {
		if data, err = yamlOf(data); err != nil {
			return err
		}
	}
	_, err = p.w.Write(data)
	return err
}

// line writes one message of a stream: JSON in one line, or a YAML document.
func (p *printer) line(m proto.Message) error { return p.streamed(marshal(m)) }

func (p *printer) streamed(data []byte, err error) error {
	if err != nil {
		return err
	}
	if p.format == "yaml" {
		if _, err := io.WriteString(p.w, "---\n"); err != nil {
			return err
		}
		return p.document(data, nil)
	}
	var line bytes.Buffer
	if err := json.Compact(&line, data); err != nil {
		return err
	}
	line.WriteByte('\n')
	_, err = p.w.Write(line.Bytes())
	return err
}

// marshal is protojson with an output that does not vary: its own varies white
// space on purpose.
func marshal(m proto.Message) ([]byte, error) {
	data, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, data, "", "  "); err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// indented is what is no message as JSON.
func indented(v any) ([]byte, error) {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	return append(data, '\n'), nil
}

// yamlOf turns JSON, which is YAML already, into the form people write; the
// order of fields stays.
func yamlOf(data []byte) ([]byte, error) {
	var node yaml.Node
	if err := yaml.Unmarshal(data, &node); err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	plain(&node)
	var out bytes.Buffer
	encoder := yaml.NewEncoder(&out)
	encoder.SetIndent(2)
	if err := encoder.Encode(&node); err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	return out.Bytes(), nil
}

// Words that YAML 1.1 takes for a truth value, and many readers still do.
var boolsOfOld = []string{"y", "n", "yes", "no", "on", "off"}

// plain takes JSON's style off; the encoder quotes again what needs it.
func plain(n *yaml.Node) {
	if n.Kind != yaml.ScalarNode || !strings.Contains(n.Value, "\n") {
		n.Style = 0
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!str" {
		switch {
		case strings.Contains(n.Value, "\n"):
			n.Style = yaml.LiteralStyle
		case slices.Contains(boolsOfOld, strings.ToLower(n.Value)):
			n.Style = yaml.DoubleQuotedStyle
		}
	}
	for _, c := range n.Content {
		plain(c)
	}
}
