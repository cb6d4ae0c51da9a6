package fsm_test

import (
	"bytes"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// allowedImports is all that a deterministic state machine needs. What is not
// here is not imported without thinking about it: no clock, network, disk or
// chance.
var allowedImports = []string{
	"bufio", "bytes", "cmp", "crypto/sha256", "encoding/binary", "errors", "fmt", "hash", "io", "iter", "math/bits", "slices", "sort", "strings", "sync", "time", "unsafe",
	"github.com/cespare/xxhash/v2",
	"github.com/tidwall/btree",
	"google.golang.org/protobuf/proto",
	"github.com/persys-dev/persys/proto/persys/v1",
}

// ofTime is what may be used of package time: conversions, no clock, no timers.
var ofTime = []string{"Time", "Unix"}

// TestPurity: no import beyond the list, no clock, no goroutine, no channel, and
// no iteration over a map, whose order would differ between replicas.
func TestPurity(t *testing.T) {
	fset := token.NewFileSet()
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var files []*ast.File
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
		for _, i := range f.Imports {
			if name, _ := strconv.Unquote(i.Path.Value); !slices.Contains(allowedImports, name) || i.Name != nil && i.Name.Name == "." {
				t.Errorf("%s imports %s", fset.Position(i.Pos()), i.Path.Value)
			}
		}
	}
	if len(files) < 5 {
		t.Fatalf("only %d files found", len(files))
	}
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: importer.ForCompiler(fset, "gc", exportData(t))}
	if _, err := config.Check("fsm", fset, files, info); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		ast.Inspect(f, func(n ast.Node) bool {
			if n == nil {
				return false
			}
			at := fset.Position(n.Pos())
			switch n := n.(type) {
			case *ast.RangeStmt:
				switch info.Types[n.X].Type.Underlying().(type) {
				case *types.Map, *types.Chan:
					t.Errorf("%s: iterates over a map or a channel", at)
				}
			case *ast.GoStmt, *ast.SelectStmt, *ast.SendStmt:
				t.Errorf("%s: %T", at, n)
			case *ast.BasicLit:
				if n.Kind == token.FLOAT {
					t.Errorf("%s: floating point", at)
				}
			case *ast.Ident:
				object := info.Uses[n]
				if object == nil || object.Pkg() == nil {
					break
				}
				_, isFunc := object.(*types.Func)
				_, isType := object.(*types.TypeName)
				if object.Pkg().Path() == "time" && (isFunc && object.Parent() != nil || isType) && !slices.Contains(ofTime, object.Name()) {
					t.Errorf("%s: time.%s", at, object.Name())
				}
			}
			return true
		})
	}
}

// exportData finds the compiled packages that this one imports.
func exportData(t *testing.T) func(path string) (io.ReadCloser, error) {
	t.Helper()
	out, err := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}}={{.Export}}", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	files := map[string]string{}
	for line := range bytes.Lines(out) {
		if path, file, ok := strings.Cut(strings.TrimSpace(string(line)), "="); ok {
			files[path] = file
		}
	}
	return func(path string) (io.ReadCloser, error) { return os.Open(files[path]) }
}
