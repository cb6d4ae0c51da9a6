package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/persys-dev/persys/internal/server"
)

func testFlags() (*pflag.FlagSet, *server.Config) {
	f, c := pflag.NewFlagSet("test", pflag.ContinueOnError), &server.Config{}
	f.StringVar(&c.Name, "name", "from-default", "")
	f.IntVar(&c.GRPCPort, "grpc-port", 1, "")
	f.DurationVar(&c.LeaseTTL, "lease-ttl", time.Second, "")
	f.BoolVar(&c.Agent, "agent", false, "")
	f.StringSliceVar(&c.AllowBindRoots, "allow-bind-root", nil, "")
	f.StringToStringVar(&c.Labels, "label", nil, "")
	f.String("secret", "", "not a setting")
	documentVar(f, &c.Devices, "devices", "")
	settings(f, "name", "grpc-port", "lease-ttl", "agent", "allow-bind-root=allow_bind_roots", "label=labels", "devices")
	return f, c
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "server.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPrecedence(t *testing.T) {
	for _, x := range []struct {
		args []string
		env  string
		file string
		want string
	}{
		{want: "from-default"},
		{file: "name: from-file", want: "from-file"},
		{file: "name: from-file", env: "from-env", want: "from-env"},
		{file: "name: from-file", env: "from-env", args: []string{"--name", "from-flag"}, want: "from-flag"},
		{args: []string{"--name="}, file: "name: from-file", want: ""},
		{file: "name: ~", want: "from-default"},
		{file: "", want: "from-default"},
		{file: "# nothing\n", want: "from-default"},
	} {
		flags, c := testFlags()
		if err := flags.Parse(x.args); err != nil {
			t.Fatal(err)
		}
		if err := fromEnvironment(flags, func(k string) (string, bool) { return x.env, k == "PERSYS_NAME" }); err != nil {
			t.Fatal(err)
		}
		if err := fromFile(flags, writeFile(t, x.file)); err != nil {
			t.Fatal(err)
		}
		if c.Name != x.want {
			t.Errorf("%+v: got %q", x, c.Name)
		}
	}
}

func TestFileOfAllKinds(t *testing.T) {
	flags, c := testFlags()
	err := fromFile(flags, writeFile(t, `
name: s1
grpc_port: 7000
lease_ttl: 30s
agent: true
allow_bind_roots: [/srv, "/a,b"]
labels: {zone: eu, note: "a=b,c"}
devices:
  - {name: gpu, ids: ["0", 1], paths: [/dev/a, /dev/b], attributes: {memory: "40"}}
`))
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprintf("%s %d %s %v %q %q %q", c.Name, c.GRPCPort, c.LeaseTTL, c.Agent, c.AllowBindRoots, c.Labels, c.Devices)
	want := `s1 7000 30s true ["/srv" "/a,b"] map["note":"a=b,c" "zone":"eu"] [{"gpu" ["0" "1"] ["/dev/a" "/dev/b"] map["memory":"40"]}]`
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestFileRefused(t *testing.T) {
	for text, want := range map[string]string{
		"name: a\nnmae: b":         `:2: unknown key "nmae" (did you mean "name"?)`,
		"grpc-port: 1":             `:1: unknown key "grpc-port" (did you mean "grpc_port"?)`,
		"secret: x":                `:1: unknown key "secret"`,
		"name: a\nname: b":         `:2: key "name" is there twice`,
		"grpc_port: many":          `:1: grpc_port: "many"`,
		"agent: perhaps":           `:1: agent: "perhaps"`,
		"lease_ttl: 5":             `:1: lease_ttl: "5"`,
		"name: [a]":                `:1: name: must be a single value`,
		"allow_bind_roots: /srv\n": "",
		"allow_bind_roots: {a: b}": `:1: allow_bind_roots: must be a list`,
		"allow_bind_roots: [[a]]":  `:1: allow_bind_roots: must be a list of plain values`,
		"labels: zone":             `:1: labels: must be keys with values`,
		"labels: {zone: [eu]}":     `:1: labels: must be keys with plain values`,
		"devices: gpu":             `:1: devices: must be a list`,
		"devices: [{nmae: gpu}]":   `:1: devices: `,
		"- name":                   `:1: must be keys with values`,
		"name: 'a":                 `found unexpected end of stream`,
	} {
		flags, _ := testFlags()
		path := writeFile(t, text)
		err := fromFile(flags, path)
		switch {
		case want == "" && err != nil:
			t.Errorf("%q: %v", text, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), path)):
			t.Errorf("%q: got %v, want ...%s", text, err, want)
		}
	}
	flags, _ := testFlags()
	if err := fromFile(flags, "/nowhere.yaml"); err == nil {
		t.Error("a file that is not there was accepted")
	}
}

func TestEnvironmentRefused(t *testing.T) {
	flags, _ := testFlags()
	err := fromEnvironment(flags, func(k string) (string, bool) { return "many", k == "PERSYS_GRPC_PORT" })
	if err == nil || !strings.Contains(err.Error(), `environment variable PERSYS_GRPC_PORT: "many"`) {
		t.Errorf("got %v", err)
	}
}

func TestDidYouMean(t *testing.T) {
	for word, want := range map[string]string{"workload": ` (did you mean "workloads"?)`, "xyzzy": "", "": ""} {
		if got := didYouMean(word, []string{"nodes", "workloads"}); got != want {
			t.Errorf("%q: got %q", word, got)
		}
	}
	if d := editDistance("kitten", "sitting"); d != 3 {
		t.Errorf("distance %d", d)
	}
}
