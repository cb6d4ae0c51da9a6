package scheduler

import (
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPurity walks the package's source: a decision has no clock, no randomness,
// no I/O and no goroutine, and nothing ranges over a map, whose order is another
// one each time. Maps are walked by their sorted keys.
func TestPurity(t *testing.T) {
	fset := token.NewFileSet()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: importer.ForCompiler(fset, "gc", exportData(t))}
	if _, err := conf.Check("scheduler", fset, files, info); err != nil {
		t.Fatal(err)
	}
	forbiddenImports := []string{"math/rand", "crypto/", "os", "net", "io", "sync", "log", "runtime", "unsafe", "bufio", "context", "syscall"}
	forbiddenUses := map[string]string{
		"time.Now": "a clock", "time.Since": "a clock", "time.Until": "a clock", "time.Sleep": "a clock", "time.After": "a clock",
		"time.Tick": "a clock", "time.NewTimer": "a clock", "time.NewTicker": "a clock", "time.AfterFunc": "a clock",
		"fmt.Print": "output", "fmt.Printf": "output", "fmt.Println": "output",
		"maps.All": "the order of a map", "maps.Values": "the order of a map", "maps.Collect": "the order of a map",
	}
	for _, f := range files {
		for _, imp := range f.Imports {
			path := strings.Trim(imp.Path.Value, `"`)
			for _, bad := range forbiddenImports {
				if path == strings.TrimSuffix(bad, "/") || strings.HasPrefix(path, strings.TrimSuffix(bad, "/")+"/") {
					t.Errorf("%s imports %s", fset.Position(imp.Pos()), path)
				}
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s starts a goroutine", fset.Position(n.Pos()))
			case *ast.SelectStmt, *ast.SendStmt, *ast.ChanType:
				t.Errorf("%s uses channels", fset.Position(n.Pos()))
			case *ast.RangeStmt:
				if _, ok := info.Types[n.X].Type.Underlying().(*types.Map); ok {
					t.Errorf("%s ranges over a map", fset.Position(n.Pos()))
				}
			case *ast.Ident:
				obj := info.Uses[n]
				if fn, ok := obj.(*types.Func); ok && fn.Pkg() != nil {
					name := fn.Pkg().Name() + "." + fn.Name()
					if why := forbiddenUses[name]; why != "" && fn.Signature().Recv() == nil {
						t.Errorf("%s: %s: %s", fset.Position(n.Pos()), name, why)
					}
					// Keys are taken out of a map in one place, which sorts them.
					if name == "maps.Keys" && !insideSortedKeys(f, n) {
						t.Errorf("%s: keys of a map outside sortedKeys", fset.Position(n.Pos()))
					}
				}
			}
			return true
		})
	}
}

// exportData finds the compiled form of what the package imports.
func exportData(t *testing.T) importer.Lookup {
	out, err := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}}={{.Export}}", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	where := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), "=")
		where[path] = file
	}
	return func(path string) (io.ReadCloser, error) { return os.Open(where[path]) }
}

func insideSortedKeys(f *ast.File, n ast.Node) bool {
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Name.Name == "sortedKeys" && fn.Pos() <= n.Pos() && n.End() <= fn.End() {
			return true
		}
	}
	return false
}
