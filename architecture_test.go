// Package persys_test checks what docs/architecture.md says of the packages.
package persys_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "github.com/persys-dev/persys/"
	// More lines than this, and main does what belongs into a package.
	mainLines = 60
)

var quoted = regexp.MustCompile("`([^`]+)`")

// importTable reads the table of packages: which may import which of ours.
func importTable(t *testing.T) map[string][]string {
	t.Helper()
	data, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	table := map[string][]string{}
	inside := false
	for line := range strings.Lines(string(data)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		switch {
		case !strings.HasPrefix(line, "|"):
			inside = false
		case strings.TrimSpace(cells[0]) == "package":
			inside = true
		case inside && len(cells) == 3 && quoted.MatchString(cells[0]):
			name := quoted.FindStringSubmatch(cells[0])[1]
			if _, twice := table[name]; twice {
				t.Errorf("docs/architecture.md has %s twice", name)
			}
			table[name] = []string{}
			for _, m := range quoted.FindAllStringSubmatch(cells[2], -1) {
				table[name] = append(table[name], m[1])
			}
		}
	}
	if len(table) < 10 {
		t.Fatalf("the table of packages in docs/architecture.md was not found: %d rows", len(table))
	}
	return table
}

// packages are the directories with Go code, each with what its files other than
// tests import of ours, and the file that does.
func packages(t *testing.T) map[string]map[string]string {
	t.Helper()
	all := map[string]map[string]string{}
	fset := token.NewFileSet()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			// Other modules, test data and what is not ours have no say.
			_, notOurs := os.Stat(filepath.Join(path, "go.mod"))
			if path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin" || notOurs == nil) {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(fset, path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(path))
		if all[dir] == nil {
			all[dir] = map[string]string{}
		}
		for _, i := range f.Imports {
			name, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			if ours, ok := strings.CutPrefix(name, module); ok {
				all[dir][ours] = path
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestImportsAreThoseOfTheTable(t *testing.T) {
	table, found := importTable(t), packages(t)
	for dir, imports := range found {
		allowed, ok := table[dir]
		if !ok {
			t.Errorf("%s is not in the table of packages in docs/architecture.md: add it, with its reason", dir)
			continue
		}
		for name, file := range imports {
			if !slices.Contains(allowed, name) {
				t.Errorf("%s imports %s; docs/architecture.md allows %s: %s", file, name, dir, strings.Join(allowed, ", "))
			}
		}
		for _, name := range allowed {
			if _, used := imports[name]; !used {
				t.Errorf("docs/architecture.md allows %s to import %s, which it does not: take it out", dir, name)
			}
		}
	}
	for dir := range table {
		if _, ok := found[dir]; !ok {
			t.Errorf("docs/architecture.md has a package %s that is not there", dir)
		}
	}
}

func TestMainIsSmall(t *testing.T) {
	data, err := os.ReadFile("cmd/persys/main.go")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(data), "\n"); n > mainLines {
		t.Errorf("cmd/persys/main.go has %d lines; at most %d: what it does belongs into internal/cli", n, mainLines)
	}
}

// The keys of the table are those that internal/model knows.
func TestKeysAreThoseOfTheTable(t *testing.T) {
	doc, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("internal/model/keys.go")
	if err != nil {
		t.Fatal(err)
	}
	prefixes := regexp.MustCompile(`Prefix\s*= "(/[a-z]+/)"`).FindAllStringSubmatch(string(code), -1)
	if len(prefixes) < 8 {
		t.Fatalf("prefixes not found in internal/model/keys.go: %v", prefixes)
	}
	for _, p := range prefixes {
		if !strings.Contains(string(doc), "\n| `"+p[1]) {
			t.Errorf("docs/architecture.md does not say who writes %s", p[1])
		}
	}
}

// Links between the documents lead somewhere.
func TestLinksOfTheDocuments(t *testing.T) {
	files, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	for _, file := range append(files, "README.md") {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(data), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), m[1])); err != nil {
				t.Errorf("%s links to %s, which is not there", file, m[1])
			}
		}
	}
}
