// Package doctest keeps parts of documents equal to what the code says. It is
// used by tests only.
package doctest

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strings"
	"testing"
)

// Constant is a constant of a source file with its comment, in one line.
type Constant struct{ Name, Comment string }

// Constants are the documented constants of the group that begins with one of
// the type, in order.
func Constants(t *testing.T, file, typ string) []Constant {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var out []Constant
	for _, d := range f.Decls {
		group, ok := d.(*ast.GenDecl)
		if !ok || group.Tok != token.CONST {
			continue
		}
		if first, ok := group.Specs[0].(*ast.ValueSpec).Type.(*ast.Ident); !ok || first.Name != typ {
			continue
		}
		for _, s := range group.Specs {
			if v := s.(*ast.ValueSpec); v.Doc != nil {
				out = append(out, Constant{v.Names[0].Name, strings.Join(strings.Fields(v.Doc.Text()), " ")})
			}
		}
	}
	if len(out) == 0 {
		t.Fatalf("%s: no documented constants of type %s", file, typ)
	}
	return out
}

// Section holds that the part of a document between two comments with this name
// is text; with update it writes it.
func Section(t *testing.T, document, name, text string, update bool) {
	t.Helper()
	old, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := fmt.Sprintf("<!-- %s begins -->\n", name), fmt.Sprintf("<!-- %s ends -->\n", name)
	before, rest, ok := bytes.Cut(old, []byte(begin))
	_, after, closed := bytes.Cut(rest, []byte(end))
	if !ok || !closed {
		t.Fatalf("%s has no section %q", document, name)
	}
	now := slices.Concat(before, []byte(begin), []byte(text), []byte(end), after)
	switch {
	case bytes.Equal(old, now):
	case update:
		if err := os.WriteFile(document, now, 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s is not what the code says; `go test -update` in this package writes it", document)
	}
}
