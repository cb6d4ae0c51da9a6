package cli

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// A setting is a flag that the environment and a file may give a value to as
// well: --data-dir is PERSYS_DATA_DIR and data_dir. The flag wins over the
// environment, the environment over the file, the file over the default.
const settingAnnotation = "persys-setting"

// settings marks flags as settings. A flag that may be repeated can have a key
// in the plural: "label=labels".
func settings(flags *pflag.FlagSet, names ...string) {
	for _, name := range names {
		flag, key, plural := strings.Cut(name, "=")
		if !plural {
			key = strings.ReplaceAll(flag, "-", "_")
		}
		must(flags.SetAnnotation(flag, settingAnnotation, []string{key}))
	}
}

// settingKey is the name of a setting in files; ok is false for other flags.
func settingKey(f *pflag.Flag) (key string, ok bool) {
	a, ok := f.Annotations[settingAnnotation]
	if !ok {
		return "", false
	}
	return a[0], true
}

// settingsByKey are the settings among the flags.
func settingsByKey(flags *pflag.FlagSet) map[string]*pflag.Flag {
	all := map[string]*pflag.Flag{}
	flags.VisitAll(func(f *pflag.Flag) {
		if key, ok := settingKey(f); ok {
			all[key] = f
		}
	})
	return all
}

func environmentName(key string) string { return "PERSYS_" + strings.ToUpper(key) }

// fromEnvironment gives each setting that no flag gave a value the one in the
// environment. An empty variable is as good as none.
func fromEnvironment(flags *pflag.FlagSet, lookup func(string) (string, bool)) error {
	known := settingsByKey(flags)
	for _, key := range slices.Sorted(maps.Keys(known)) {
		f, name := known[key], environmentName(key)
		value, ok := lookup(name)
		if f.Changed || !ok || value == "" {
			continue
		}
		if err := flags.Set(f.Name, value); err != nil {
			return fmt.Errorf("environment variable %s: %w", name, causeOf(err))
		}
	}
	return nil
}

// causeOf takes pflag's wrapping off, which names a flag that nobody wrote, and
// says what the value should be where pflag tells how it was read.
func causeOf(err error) error {
	var invalid *pflag.InvalidValueError
	if !errors.As(err, &invalid) {
		return err
	}
	if errors.Is(err, strconv.ErrRange) {
		return fmt.Errorf("%q is out of range", invalid.GetValue())
	}
	wanted := ""
	switch invalid.GetFlag().Value.Type() {
	case "bool":
		wanted = "true or false"
	case "duration":
		wanted = "a duration such as 90s, 5m or 1h30m"
	case "int", "int32", "int64":
		wanted = "a whole number"
	case "stringToString":
		wanted = "key=value"
	default:
		return fmt.Errorf("%q: %w", invalid.GetValue(), invalid.Unwrap())
	}
	return fmt.Errorf("%q is not %s", invalid.GetValue(), wanted)
}

// fromFile gives each setting that has no value yet the one in the YAML file.
// Keys that are no setting are refused, with their line.
func fromFile(flags *pflag.FlagSet, path string) error {
	data, err := readSmallFile(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	var document yaml.Node
	if err := yaml.Unmarshal(data, &document); err != nil {
		return fmt.Errorf("%s: %s", path, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if len(document.Content) == 0 {
		return nil
	}
	root := document.Content[0]
	if root.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: must be keys with values, such as data_dir: /var/lib/persys", path, root.Line)
	}
	known, seen := settingsByKey(flags), map[string]bool{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		f := known[key.Value]
		if f == nil {
			return fmt.Errorf("%s:%d: unknown key %q%s", path, key.Line, key.Value, didYouMean(key.Value, slices.Sorted(maps.Keys(known))))
		}
		if seen[key.Value] {
			return fmt.Errorf("%s:%d: key %q is there twice", path, key.Line, key.Value)
		}
		seen[key.Value] = true
		if f.Changed {
			continue
		}
		if err := setFromNode(flags, f, value); err != nil {
			return fmt.Errorf("%s:%d: %s: %w", path, value.Line, key.Value, causeOf(err))
		}
	}
	return nil
}

func setFromNode(flags *pflag.FlagSet, f *pflag.Flag, value *yaml.Node) error {
	if d, ok := f.Value.(documentValue); ok {
		f.Changed = true
		return d.setNode(value)
	}
	list, isList := f.Value.(pflag.SliceValue)
	isMap := f.Value.Type() == "stringToString"
	switch {
	case value.Tag == "!!null":
		return nil
	case value.Kind == yaml.SequenceNode && isList:
		items := make([]string, len(value.Content))
		for i, item := range value.Content {
			if item.Kind != yaml.ScalarNode {
				return errors.New("must be a list of plain values")
			}
			items[i] = item.Value
		}
		f.Changed = true
		return list.Replace(items)
	case value.Kind == yaml.MappingNode && isMap:
		for i := 0; i+1 < len(value.Content); i += 2 {
			if value.Content[i+1].Kind != yaml.ScalarNode {
				return errors.New("must be keys with plain values")
			}
			pair := value.Content[i].Value + "=" + value.Content[i+1].Value
			if strings.Contains(pair, ",") {
				pair = `"` + pair + `"` // a comma would begin the next pair
			}
			if err := flags.Set(f.Name, pair); err != nil {
				return err
			}
		}
		return nil
	case value.Kind == yaml.ScalarNode && !isMap:
		return flags.Set(f.Name, value.Value)
	case isList:
		return errors.New("must be a list")
	case isMap:
		return errors.New("must be keys with values")
	default:
		return errors.New("must be a single value")
	}
}

// documentValue is a flag whose value is YAML, in a file as it is.
type documentValue struct {
	// How it was written last.
	text *string
	read func(*yaml.Node) error
}

func documentVar[T any](f *pflag.FlagSet, into *T, name, usage string) {
	f.Var(documentValue{new(string), func(n *yaml.Node) error {
		text, err := yaml.Marshal(n)
		if err != nil {
			return err
		}
		var zero T
		*into = zero
		decoder := yaml.NewDecoder(bytes.NewReader(text))
		decoder.KnownFields(true)
		if err := decoder.Decode(into); err != nil {
			// The lines are not those of the file.
			return errors.New(strings.TrimPrefix(yamlLine.ReplaceAllString(err.Error(), ""), "yaml: "))
		}
		return nil
	}}, name, usage)
}

var yamlLine = regexp.MustCompile(`line \d+: `)

func (d documentValue) String() string {
	if d.text == nil {
		return ""
	}
	return *d.text
}

func (d documentValue) Type() string { return "YAML" }

func (d documentValue) Set(text string) error {
	var document yaml.Node
	if err := yaml.Unmarshal([]byte(text), &document); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if len(document.Content) == 0 {
		return errors.New("must be a YAML list")
	}
	*d.text = text
	return d.setNode(document.Content[0])
}

func (d documentValue) setNode(n *yaml.Node) error {
	if n.Kind != yaml.SequenceNode {
		return errors.New("must be a list")
	}
	return d.read(n)
}

// didYouMean proposes the nearest of the known words, in words that continue a
// sentence, or says nothing.
func didYouMean(word string, known []string) string {
	best, distance := "", len(word)/3+2
	for _, k := range known {
		if d := editDistance(word, k); d < distance {
			best, distance = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", best)
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substitute := diagonal
			if a[i] != b[j] {
				substitute++
			}
			diagonal = row[j+1]
			row[j+1] = min(substitute, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
