package procs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// The exit codes of docs/cli.md.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnavailable = 5
	exitDenied      = 7
)

// A wrong input is answered at once; with the race detector on a busy machine
// that takes this long.
const atOnce = 15 * time.Second

// wrong is one command line that can't be carried out.
type wrong struct {
	name string
	args []string
	// file is the content that FILE among args stands for.
	file string
	env  []string
	code int
	// says is in the one line on standard error.
	says string
}

// badInput is a cluster of one server and one agent, and what is around it.
type badInput struct {
	*Cluster
	s1, a1 *Process
	// The set-up of another cluster that never ran.
	other string
	// The set-up of an agent of this cluster that does not run.
	idle string
	// Addresses where nothing listens.
	free, nobody string
}

func newBadInput(t *testing.T) *badInput {
	c := New(t, program)
	b := &badInput{Cluster: c, s1: c.Init("s1")}
	b.a1 = c.Join("agent", "a1", "--docker-host", "none")
	b.free, b.nobody = c.host("free").IP, c.host("nobody").IP
	b.other, b.idle = filepath.Join(c.dir, "other"), filepath.Join(c.dir, "idle")
	c.Must("init", "--no-start", "--context", "other", "--name", "o1", "--data-dir", b.other, "--advertise", b.free)
	c.Must("context", "use", "default")
	c.Eventually("a1 is ready", soon, func() error { return c.readyNodes(1) })
	c.Must("run", "--process", "--name", "good", "--wait", "--", "sleep", "1000")
	c.Must("rollout", "status", "good", "--wait")
	return b
}

// TestBadInput types what clumsy and malicious users type at the real program:
// each gets the documented exit code and one line that names what is wrong, soon,
// and nothing has changed: no key, no file, no context.
func TestBadInput(t *testing.T) {
	b := newBadInput(t)
	tokens := b.tokens(t)
	groups := map[string][]wrong{
		"files": b.files(), "commands": b.commands(), "endpoints": b.endpoints(), "tokens": b.joins(tokens), "machines": b.machines(),
	}
	b.quiet(soon)
	before := b.state(t)
	for name, cases := range groups {
		t.Run(name, func(t *testing.T) { b.refuses(t, cases) })
	}
	t.Run("rest", b.rest)
	if after := b.state(t); after != before {
		t.Errorf("something has changed; before:\n%s\nafter:\n%s", before, after)
	}

	// Of two that vote the leader is refused for another reason than the only one.
	b.Join("server", "s2")
	b.Eventually("two voters", soon, func() error { return b.voters(2) })
	leader := b.leader()
	b.refuses(t, []wrong{
		{name: "the leader is removed", args: []string{"member", "rm", leader}, code: exitConflict, says: "transfer leadership first: persys member transfer-leader"},
		{name: "the leader is demoted", args: []string{"member", "demote", leader}, code: exitConflict, says: "transfer leadership first: persys member transfer-leader"},
	})
	if err := b.voters(2); err != nil {
		t.Error(err)
	}
}

// state is all that a wrong input must leave as it is.
func (b *badInput) state(t *testing.T) string {
	t.Helper()
	var s strings.Builder
	for _, args := range [][]string{{"get", "workloads"}, {"node", "ls"}, {"member", "ls"}, {"token", "ls"}, {"context", "ls"}} {
		fmt.Fprintln(&s, b.Must(append(args, "-o", "name")...))
	}
	var info struct {
		Revision string `json:"revision"`
	}
	b.decode(&info, "cluster", "info", "-o", "json")
	fmt.Fprintln(&s, "revision", info.Revision)
	return s.String()
}

func (b *badInput) refuses(t *testing.T, cases []wrong) {
	for _, w := range cases {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			b.refused(t, w)
		})
	}
}

// Among args, NEW is a data directory that does not exist, OTHER and IDLE copies
// of those of badInput, and FILE a file with the case's content.
func (b *badInput) refused(t *testing.T, w wrong) {
	dir := t.TempDir()
	place := func(name string) string { return filepath.Join(dir, name) }
	places := strings.NewReplacer("NEW", place("new"), "OTHER", place("other"), "IDLE", place("idle"), "FILE", place("file.yaml"))
	err := errors.Join(os.WriteFile(place("file.yaml"), []byte(w.file), 0o600), os.CopyFS(place("other"), os.DirFS(b.other)), os.CopyFS(place("idle"), os.DirFS(b.idle)))
	if err != nil {
		t.Fatal(err)
	}
	before := content(t, dir)
	args := make([]string, len(w.args))
	for i, a := range w.args {
		args[i] = places.Replace(a)
	}
	ctx, cancel := context.WithTimeout(context.Background(), atOnce)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.program, args...)
	cmd.Env = append(b.environment(), w.env...)
	var out, diagnostics bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &diagnostics
	err = cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("no end within %s: %s", atOnce, diagnostics.String())
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != w.code {
		t.Errorf("want exit code %d, got %v", w.code, err)
	}
	said := diagnostics.String()
	if out.Len() > 0 || strings.Count(said, "\n") != 1 || !strings.HasPrefix(said, "persys: ") || !strings.Contains(said, w.says) {
		t.Errorf("want one line with %q\nstandard error: %s\nstandard output: %s", w.says, said, out.String())
	}
	for _, inside := range []string{"rpc error", "strconv.", "goroutine", "panic", "runtime error", "%!"} {
		if strings.Contains(said, inside) {
			t.Errorf("%q says nothing to a user: %s", inside, said)
		}
	}
	if after := content(t, dir); after != before {
		t.Errorf("files have changed; before:\n%s\nafter:\n%s", before, after)
	}
}

// content is all files of a directory, but for the empty one that keeps two
// processes out of one data directory.
func content(t *testing.T, dir string) string {
	t.Helper()
	var s strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "LOCK" {
			return err
		}
		data, err := os.ReadFile(path)
		fmt.Fprintf(&s, "%s %x\n", path, sha256.Sum256(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.String()
}

// files are wrong descriptions of workloads.
func (*badInput) files() []wrong {
	apply := func(name, content, says string) wrong {
		return wrong{name: name, args: []string{"apply", "-f", "FILE"}, file: content, code: exitUsage, says: says}
	}
	process := "id: web\nprocess: {command: sh}\n"
	return []wrong{
		apply("unknown field", "id: web\ncontainer:\n  imge: x\n", `file.yaml: line 3: container: unknown field "imge" (did you mean "image"?)`),
		apply("unknown field, control characters", process+"\"a\\e[2J\\nb\": 1\n", `line 3: unknown field "a\x1b[2J\nb"`),
		apply("wrong type", process+"replicas: many\n", `line 3: replicas: "many" is not a whole number`),
		apply("fraction", process+"replicas: 1.5\n", `line 3: replicas: "1.5" is not a whole number`),
		apply("list instead of text", "id: [web]\n", "line 1: id: must be text, not a list"),
		apply("enumeration", process+"kind: cron\n", `line 3: kind: "cron"`),
		apply("negative replicas", process+"replicas: -1\n", "replicas: -1 is out of range; allowed: 0 to 10000"),
		apply("too many replicas", process+"replicas: 10001\n", "replicas: 10001 is out of range; allowed: 0 to 10000"),
		apply("replicas beyond numbers", process+"replicas: 99999999999999999999\n", "line 3: replicas: \"99999999999999999999\" is out of the range"),
		apply("cpu", process+"resources: {cpu: lots}\n", `resources.cpu: "lots": not a quantity; allowed: cores`),
		apply("negative cpu", process+"resources: {cpu: -1}\n", `resources.cpu: "-1": negative`),
		apply("infinite cpu", process+"resources: {cpu: 1e400}\n", `resources.cpu: "1e400": not a quantity`),
		apply("memory unit", process+"resources: {memory: 64MiB}\n", `resources.memory: "64MiB": not a quantity; allowed: bytes`),
		apply("memory of a universe", process+"resources: {memory: 99999999999Ti}\n", `resources.memory: "99999999999Ti": too large`),
		apply("too little memory", "id: web\ncontainer: {image: x}\nresources: {memory: 64}\n", `resources.memory: "64" is out of range; allowed: 6Mi to`),
		apply("id", "id: Web_1\nprocess: {command: sh}\n", `id: "Web_1" is not allowed; allowed: a DNS label`),
		apply("id with line break", "id: \"we\\nb\"\nprocess: {command: sh}\n", `id: "we\nb" is not allowed`),
		apply("long id", "id: "+strings.Repeat("a", 64)+"\nprocess: {command: sh}\n", "is not allowed; allowed: a DNS label: 1 to 63"),
		apply("endless id", "id: "+strings.Repeat("a", 900)+"\nprocess: {command: sh}\n", "file.yaml: document 1: id: "),
		apply("no id", "process: {command: sh}\n", "document 1: id: missing"),
		apply("two kinds of work", process+"container: {image: x}\n", "line 3: container: not together with process"),
		apply("no kind of work", "id: web\n", "says nothing to run; allowed: one of container, process"),
		apply("compose", "id: web\ncompose: {}\n", "compose: not supported by this version"),
		apply("vm", "id: web\nvm: {}\n", "vm: not supported by this version"),
		apply("port", "id: web\ncontainer: {image: x, ports: [{container_port: 70000}]}\n", "container.ports[0].container_port: 70000 is out of range; allowed: 1 to 65535"),
		apply("negative port", "id: web\ncontainer: {image: x, ports: [{container_port: 80, host_port: -4}]}\n", "container.ports[0].host_port: -4 is out of range"),
		apply("port twice", "id: web\ncontainer: {image: x, ports: [{container_port: 1, host_port: 8080}, {container_port: 2, host_port: 8080}]}\n", "container.ports[1].host_port: 8080 is taken by ports[0]"),
		apply("protocol", "id: web\ncontainer: {image: x, ports: [{container_port: 80, protocol: sctp}]}\n", `protocol: "sctp" is unknown; allowed: tcp, udp`),
		apply("image", "id: web\ncontainer: {image: \"bad image!\"}\n", `container.image: "bad image!"`),
		apply("zero byte", "id: web\nprocess: {command: \"s\\0h\"}\n", "process.command: has a zero byte"),
		apply("document twice", process+"---\n"+process, `line 4: id: workload "web" is given twice, first in line 1`),
		apply("field twice", "id: web\n"+process, "line 2: id: given twice, first in line 1"),
		apply("one of two is wrong", "id: fine\nprocess: {command: sh}\n---\nid: bad\nprocess: {comand: sh}\n", `line 5: process: unknown field "comand"`),
		apply("empty", "", "there is no workload in the input"),
		apply("only comments", "# nothing\n---\n---\n", "there is no workload in the input"),
		apply("null", "null\n", "there is no workload in the input"),
		apply("prose", "hello world\n", "line 1: must be a mapping of fields"),
		apply("garbage", "id: web\n  foo: [bar\n: :\n", "not YAML: line 2"),
		apply("tab", "id: web\n\tprocess: x\n", "not YAML: line 2: found a tab"),
		apply("cut off JSON", `{"id":"web","process":{"command":"sh"`, "not JSON: unexpected end"),
		apply("binary", "\x7fELF\x02\x01\x00\xff\xfe\x00\x80", "the input is not UTF-8 text"),
		apply("UTF-16", "\xff\xfei\x00d\x00:\x00", "the input is not UTF-8 text"),
		apply("alias of itself", "id: web\nprocess: &p {command: sh, env: *p}\n", "must be text, not a mapping"),
		apply("deep", "id: web\nlabels: "+strings.Repeat("[", 100_000)+strings.Repeat("]", 100_000)+"\n", "not YAML: line 2: exceeded max depth"),
		apply("large spec", "id: web\nprocess: {command: sh, env: {A: '"+strings.Repeat("x", 3<<20)+"'}}\n", "bytes; allowed: 262144"),
		apply("huge", strings.Repeat("a", 17<<20), "larger than 16 MiB"),
		{name: "no such file", args: []string{"apply", "-f", "NEW"}, code: exitUsage, says: "new: no such file or directory"},
		{name: "empty name", args: []string{"apply", "-f", ""}, code: exitUsage, says: "-f is given an empty name"},
		{name: "endless file", args: []string{"apply", "-f", "/dev/zero"}, code: exitUsage, says: "/dev/zero: larger than 16 MiB"},
		{name: "no file", args: []string{"apply"}, code: exitUsage, says: "persys apply needs -f FILE"},
		{name: "without -f", args: []string{"apply", "web.yaml"}, code: exitUsage, says: "`persys apply -f web.yaml`"},
		{name: "standard input without anything", args: []string{"apply", "-f", "-"}, code: exitUsage, says: "standard input: there is no workload in the input"},
		{name: "file twice", args: []string{"apply", "-f", "FILE", "-f", "FILE"}, file: process, code: exitUsage, says: `workload "web" is in`},
		{name: "dry run", args: []string{"apply", "--dry-run", "-f", "FILE"}, file: "id: web\n", code: exitUsage, says: "says nothing to run"},
		{name: "version of what is not there", args: []string{"apply", "-f", "FILE", "--if-version", "5"}, file: process, code: exitConflict, says: `workload "web" does not exist, and if_version asks for version 5`},
		{name: "it exists", args: []string{"apply", "-f", "FILE", "--create-only"}, file: "id: good\nprocess: {command: sh}\n", code: exitConflict, says: `workload "good" exists already`},
	}
}

// commands are wrong in themselves, or name what is not there.
func (*badInput) commands() []wrong {
	line := func(code int, says string, args ...string) wrong {
		return wrong{name: strings.Join(args, " "), args: args, code: code, says: says}
	}
	cases := []wrong{
		line(exitUsage, `unknown command "aply" for "persys" (did you mean "apply"?)`, "aply", "-f", "x"),
		line(exitUsage, `unknown command "" for "persys"`, ""),
		line(exitUsage, `unknown command "pods" for "persys get"`, "get", "pods"),
		line(exitUsage, `unknown command "frob" for "persys member"`, "member", "frob", "-o", "json"),
		line(exitUsage, `unknown command "nope" for "persys"`, "help", "nope"),
		line(exitUsage, `unknown command "tcsh" for "persys completion"`, "completion", "tcsh"),
		line(exitUsage, "unknown flag: --nope; see persys get workloads --help", "get", "workloads", "--nope"),
		line(exitUsage, "flag needs an argument: --output", "get", "workloads", "--output"),
		line(exitUsage, `output format "xml" is not known; there are table, wide, json, yaml, name`, "get", "workloads", "-o", "xml"),
		line(exitUsage, `--timeout: "5" is not a duration such as 90s`, "get", "workloads", "--timeout", "5"),
		line(exitUsage, "--timeout must not be negative", "get", "workloads", "--timeout", "-5s"),
		line(exitUsage, `--wait: "maybe" is not true or false`, "scale", "good", "1", "--wait=maybe"),
		line(exitUsage, `--limit: "999999999999" is out of range`, "events", "--limit", "999999999999"),
		line(exitUsage, "takes no arguments", "version", "x"),
		line(exitUsage, "persys scale needs ID REPLICAS", "scale", "good"),
		line(exitUsage, `REPLICAS must be a number from 0, not "many"`, "scale", "good", "many"),
		line(exitUsage, "unknown shorthand flag: '1' in -1", "scale", "good", "-1"),
		line(exitUsage, "replicas: 10001 is out of range", "scale", "good", "10001"),
		line(exitNotFound, `there is no workload "nope"`, "scale", "nope", "3"),
		line(exitUsage, "is not allowed; allowed: a DNS label", "describe", "Bad_Id"),
		line(exitUsage, "is not allowed; allowed: a DNS label", "delete", "../../etc"),
		line(exitUsage, "is not allowed; allowed: a DNS label", "logs", "a\nb"),
		line(exitUsage, `argument "\xff\xfe" is not UTF-8 text`, "why", "\xff\xfe"),
		line(exitUsage, "missing; allowed: a DNS label", "delete", ""),
		line(exitNotFound, `has no replica 99`, "logs", "good", "--replica", "99"),
		line(exitUsage, "--tail must not be negative", "logs", "good", "--tail", "-5"),
		line(exitUsage, `--since "yesterday": must be how long ago`, "logs", "good", "--since", "yesterday"),
		line(exitUsage, `label_selector: "!" has no =`, "get", "workloads", "-l", "!"),
		line(exitUsage, "must be [[IP:]NODE-PORT:]PORT", "run", "-p", "0:x", "img:1"),
		line(exitUsage, "must be NAME=VALUE", "run", "-e", "=1", "img:1"),
		line(exitUsage, "both absolute", "run", "-v", "a:b", "img:1"),
		line(exitUsage, `resources.cpu: "lots": not a quantity`, "run", "--cpu", "lots", "img:1"),
		line(exitUsage, "replicas: -3 is out of range", "run", "--replicas", "-3", "img:1"),
		line(exitUsage, "container.image", "run", "--name", "x", "bad image!"),
		line(exitConflict, `workload "good" exists already`, "run", "--name", "good", "img:1"),
		line(exitUsage, `--role must be server or agent, not "admin"`, "token", "create", "--role", "admin"),
		line(exitUsage, "--ttl must be positive", "token", "create", "--role", "agent", "--ttl", "-1h"),
		line(exitUsage, "ttl: 99999h0m0s is out of range", "token", "create", "--role", "agent", "--ttl", "99999h"),
		line(exitUsage, "uses: 99999 is out of range", "token", "create", "--role", "agent", "--uses", "99999"),
		line(exitUsage, "is not allowed; allowed: a DNS label", "token", "create", "--role", "agent", "--node", "A_B"),
		line(exitUsage, `--label: "zone" is not key=value`, "token", "create", "--role", "agent", "--label", "zone"),
		line(exitNotFound, `there is no token "nope"`, "token", "revoke", "nope"),
		line(exitUsage, "must be KEY=VALUE to set it, or KEY- to remove it", "node", "label", "a1", "zone"),
		line(exitUsage, `name "a b" is not allowed`, "node", "label", "a1", "a b=c"),
		line(exitConflict, "is running; drain it", "node", "rm", "a1"),
		line(exitConflict, "is the only one that votes; join another server first", "member", "rm", "s1"),
		line(exitConflict, "is the only one that votes; join another server first", "member", "demote", "s1"),
		line(exitConflict, "is the only one that votes; join another server first", "member", "transfer-leader"),
		line(exitUsage, "needs NAME", "member", "rm"),
		line(exitNotFound, `there is no context "nope"`, "context", "use", "nope"),
		line(exitUsage, "there is no administrator's certificate in", "context", "add", "x", "--endpoint", "s1", "--data-dir", "NEW"),
		line(exitUsage, `there is no context "nope"`, "get", "workloads", "--context", "nope"),
		{name: "environment", args: []string{"get", "workloads"}, env: []string{"PERSYS_TIMEOUT=soon"}, code: exitUsage, says: `environment variable PERSYS_TIMEOUT: "soon" is not a duration`},
	}
	for _, command := range []string{"get workload", "describe", "why", "logs", "start", "stop", "restart", "retry", "delete"} {
		cases = append(cases, line(exitNotFound, `there is no workload "nope"`, append(strings.Fields(command), "nope")...))
	}
	for _, command := range []string{"describe", "cordon", "uncordon", "drain", "rm"} {
		cases = append(cases, line(exitNotFound, `there is no node "nope"`, "node", command, "nope"))
	}
	cases = append(cases, line(exitNotFound, `node "nope"`, "node", "get", "nope"))
	for _, command := range []string{"promote", "demote", "rm", "transfer-leader"} {
		cases = append(cases, line(exitNotFound, `there is no server "nope"`, "member", command, "nope"))
	}
	return cases
}

// endpoints are servers that are not there, not ours, or not servers, and
// credentials that don't fit.
func (b *badInput) endpoints() []wrong {
	admin := filepath.Join(b.s1.DataDir, "pki", "admin", "credentials.pem")
	agent := filepath.Join(b.a1.DataDir, "pki", "agent", "credentials.pem")
	as := func(credentials string, more ...string) []string {
		return append([]string{"get", "workloads", "--ca-file", admin, "--cert-file", credentials, "--key-file", credentials, "--endpoint", b.s1.IP}, more...)
	}
	at := func(endpoint string) []string { return []string{"get", "workloads", "--endpoint", endpoint} }
	return []wrong{
		{name: "nobody there", args: at(b.nobody), code: exitUnavailable, says: "no server answers: " + b.nobody + ":7481: connection refused"},
		{name: "nobody at several", args: at(b.nobody + "," + b.free), code: exitUnavailable, says: b.free + ":7481: connection refused"},
		{name: "REST port", args: at(b.s1.IP + ":7480"), code: exitUnavailable, says: "is not the gRPC port of a server, which is 7481"},
		{name: "gossip port", args: at(b.s1.IP + ":7482"), code: exitUnavailable, says: b.s1.IP + ":7482: "},
		{name: "of another cluster", args: append(at(b.s1.IP), "--context", "other"), code: exitUnavailable, says: "server/s1 is of cluster"},
		{name: "scheme", args: at("https://" + b.s1.IP), code: exitUsage, says: "without a scheme"},
		{name: "colons", args: at(":::::"), code: exitUsage, says: `endpoint ":::::": must be host or host:port`},
		{name: "port", args: at(b.s1.IP + ":99999"), code: exitUsage, says: "must be host or host:port"},
		{name: "time was up", args: append(at(b.s1.IP), "--timeout", "1ns"), code: exitUnavailable, says: "timed out"},
		{name: "certificate of an agent", args: as(agent), code: exitDenied, says: "agent/a1 may not call"},
		{name: "certificate that is not there", args: as("NEW"), code: exitUsage, says: "cert_file: open"},
		{name: "certificate that is none", args: as("FILE"), file: "garbage", code: exitUsage, says: "--ca-file, --cert-file, --key-file: credentials: certificate: something that is not PEM"},
		{name: "configuration that is not there", args: []string{"get", "workloads", "--config", "NEW"}, code: exitUsage, says: "new: no such file or directory"},
		{name: "endless configuration", args: []string{"get", "workloads", "--config", "/dev/zero"}, code: exitUsage, says: "/dev/zero is larger than 1 MiB"},
		{name: "configuration with an unknown key", args: []string{"get", "workloads", "--config", "FILE"}, file: "curent_context: x\n", code: exitUsage, says: `line 1: unknown key "curent_context"`},
		{name: "configuration with garbage", args: []string{"get", "workloads", "--config", "FILE"}, file: "a: [\n", code: exitUsage, says: "file.yaml: "},
	}
}

// tokens are join tokens that are good for nothing, by what is wrong with them,
// and two good ones.
func (b *badInput) tokens(t *testing.T) map[string]string {
	t.Helper()
	tokens := map[string]string{
		"expired": b.Token("agent", "--ttl", "1s"), "named": b.Token("agent", "--node", "only"),
		"agent": b.Token("agent"), "server": b.Token("server"), "used": b.Token("agent"),
	}
	b.Must("join", tokens["used"], "--no-start", "--name", "idle", "--data-dir", b.idle, "--advertise", b.free)
	var made struct {
		Token struct {
			ID string `json:"id"`
		} `json:"token"`
		Secret string `json:"secret"`
	}
	b.decode(&made, "token", "create", "--role", "agent", "-o", "json")
	tokens["revoked"] = made.Secret
	b.Must("token", "revoke", made.Token.ID)

	good, err := pki.DecodeToken(tokens["agent"])
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*pki.JoinToken){
		"of another cluster": func(t *pki.JoinToken) { t.Cluster = "11111111-2222-4333-8444-555555555555" },
		"of another root":    func(t *pki.JoinToken) { t.Pins = [][]byte{bytes.Repeat([]byte{7}, 32)} },
		"forged":             func(t *pki.JoinToken) { t.Secret = strings.Repeat("a", len(t.Secret)) },
		"of nobody":          func(t *pki.JoinToken) { t.Servers = []string{net.JoinHostPort(b.nobody, "7481")} },
	} {
		changed := good
		change(&changed)
		if tokens[name], err = changed.Encode(); err != nil {
			t.Fatal(err)
		}
	}
	return tokens
}

// joins are joins that must fail.
func (b *badInput) joins(tokens map[string]string) []wrong {
	good := tokens["agent"]
	join := func(name, token string, code int, says string) wrong {
		return wrong{name: name, args: []string{"join", token, "--name", "j1", "--data-dir", "NEW", "--advertise", b.free}, code: code, says: says}
	}
	into := func(name, token, machine, dir string, code int, says string) wrong {
		return wrong{name: name, args: []string{"join", token, "--name", machine, "--data-dir", dir, "--advertise", b.free}, code: code, says: says}
	}
	const garbled = "join token is garbled: it was not copied as a whole"
	middle := len(good) / 2
	swapped := "A"
	if good[middle:middle+1] == swapped {
		swapped = "B"
	}
	return []wrong{
		join("expired", tokens["expired"], exitDenied, "make a new one: persys token create --role agent"),
		join("used up", tokens["used"], exitDenied, "join refused: the join token is used up"),
		join("revoked", tokens["revoked"], exitDenied, "join refused: the join token is not known to this cluster: it was revoked"),
		join("for another machine", tokens["named"], exitDenied, `the join token is for "only" only, not for "j1"`),
		join("for another cluster", tokens["of another cluster"], exitConflict, "join refused: the join token is for cluster"),
		join("of another root", tokens["of another root"], exitUnavailable, "no server of the token answers"),
		join("with another secret", tokens["forged"], exitDenied, "join refused: "),
		join("of nobody", tokens["of nobody"], exitUnavailable, "no server of the token answers: "+b.nobody+":7481"),
		join("empty", "", exitUsage, "join token is empty"),
		join("something else", "banana", exitUsage, "not a join token: it must begin with persys1-"),
		join("cut off", good[:60], exitUsage, garbled),
		join("longer", good+"x", exitUsage, garbled),
		join("twice", good+good, exitUsage, garbled),
		join("only the beginning", "persys1-", exitUsage, garbled),
		join("one character changed", good[:middle]+swapped+good[middle+1:], exitUsage, garbled),
		join("capitals", strings.ToUpper(good), exitUsage, "not a join token"),
		join("of a later version", "persys2-abc", exitUsage, "of format 2, which a newer version of persys made"),
		join("endless", strings.Repeat("x", 100_000), exitUsage, "at most 8192 are allowed"),
		into("a name that is none", good, "J_1", "NEW", exitUsage, `name: "J_1" is not a DNS label`),
		into("a name that is taken", good, "a1", "NEW", exitConflict, `a node named "a1" is running`),
		into("data of another cluster", good, "o1", "OTHER", exitConflict, "the token is for cluster"),
		into("data of another role", tokens["server"], "idle", "IDLE", exitConflict, "the token is for role server"),
		into("data of another name", good, "busy", "IDLE", exitConflict, `belongs to "idle", not to "busy"`),
		{name: "no token", args: []string{"join"}, code: exitUsage, says: "persys join needs a TOKEN"},
		{name: "token twice", args: []string{"join", good, "--token-file", "FILE"}, code: exitUsage, says: "the token is given twice"},
		{name: "no token file", args: []string{"join", "--token-file", "NEW"}, code: exitUsage, says: "token file: open"},
		{name: "endless token file", args: []string{"join", "--token-file", "/dev/zero"}, code: exitUsage, says: "token file: /dev/zero is larger than 1 MiB"},
		{name: "garbled environment", args: []string{"join"}, env: []string{"PERSYS_TOKEN=banana"}, code: exitUsage, says: "not a join token"},
		{name: "a setting that is wrong uses no token", args: append(join("", good, 0, "").args, "--cpu", "lots"), code: exitUsage, says: "not a quantity"},
	}
}

// machines are servers and agents that can't be founded or started.
func (b *badInput) machines() []wrong {
	found := func(says string, code int, more ...string) wrong {
		args := append([]string{"init", "--context", "new", "--name", "s1", "--data-dir", "NEW", "--advertise", b.free}, more...)
		return wrong{name: "init " + strings.Join(more, " "), args: args, code: code, says: says}
	}
	file := func(name, content, says string) wrong {
		w := found(says, exitUsage, "-c", "FILE")
		w.name, w.file = name, content
		return w
	}
	run := func(name string, code int, says string, args ...string) wrong {
		return wrong{name: name, args: args, code: code, says: says}
	}
	server := func(name, dir, machine, ip string, code int, says string, more ...string) wrong {
		return run(name, code, says, append([]string{"server", "--name", machine, "--data-dir", dir, "--advertise", ip}, more...)...)
	}
	lost, damaged, mixed := b.spoiled("lost"), b.spoiled("damaged"), b.spoiled("mixed")
	busy := "address already in use"
	return []wrong{
		found(`name: "S_1" is not a DNS label`, exitUsage, "--name", "S_1"),
		found(`"banana" is not an IP address`, exitUsage, "--advertise", "banana"),
		found("advertise: 0.0.0.0 can't be reached by others", exitUsage, "--advertise", "0.0.0.0"),
		found("cannot assign requested address", exitConflict, "--advertise", "192.0.2.1"),
		found("grpc_port: 99999 is not a port", exitUsage, "--grpc-port", "99999"),
		found(`--grpc-port: "x" is not a whole number`, exitUsage, "--grpc-port", "x"),
		found("https_port: 7481 is the grpc_port already", exitUsage, "--https-port", "7481"),
		found("gossip_port: 7480 is the https_port already", exitUsage, "--gossip-port", "7480"),
		found("lease_ttl: 1ms; allowed", exitUsage, "--lease-ttl", "1ms"),
		found(`log_level: "loud"; allowed: debug, info, warn, error`, exitUsage, "--log-level", "loud"),
		found(`log_format: "xml"; allowed: text, json`, exitUsage, "--log-format", "xml"),
		found(`"lots": not a quantity`, exitUsage, "--agent", "--cpu", "lots"),
		found(`memory: "0" offers nothing`, exitUsage, "--agent", "--memory", "0"),
		found(`labels: name "a b" is not allowed`, exitUsage, "--label", "a b=c"),
		found(`docker_host: "banana" is not an engine's address`, exitUsage, "--docker-host", "banana"),
		found(`allow_bind_roots: "srv" is relative`, exitUsage, "--allow-bind-root", "srv"),
		found("not a directory", exitFailure, "--data-dir", "/etc/passwd/x"),
		found("data_dir: missing", exitUsage, "--data-dir", ""),
		found("no such file", exitUsage, "-c", "NEW"),
		found("/dev/zero is larger than 1 MiB", exitUsage, "-c", "/dev/zero"),
		file("config file with an unknown key", "name: s1\nnmae: x\n", `file.yaml:2: unknown key "nmae" (did you mean "name"?)`),
		file("config file with a wrong type", "grpc_port: [1]\n", "file.yaml:1: grpc_port: must be a single value"),
		file("config file with a key twice", "disk: 1Gi\ndisk: 2Gi\n", `file.yaml:2: key "disk" is there twice`),
		file("config file with garbage", ":\n -:[", "file.yaml: "),
		file("config file that is a list", "[1]\n", "file.yaml:1: must be keys with values"),

		run("second init", exitConflict, `already belongs to the cluster of context "default"; start it with `+"`persys server`",
			"init", "--name", "s1", "--data-dir", b.s1.DataDir, "--advertise", b.s1.IP),
		run("second init of one that does not run", exitConflict, "already belongs to server \"o1\" of cluster",
			"init", "--context", "new", "--name", "o1", "--data-dir", "OTHER", "--advertise", b.free),
		run("init over an agent", exitConflict, `already belongs to agent "idle" of cluster`,
			"init", "--context", "new", "--name", "idle", "--data-dir", "IDLE", "--advertise", b.free),
		run("init over the context of another cluster", exitConflict, `context "default" in`,
			"init", "--name", "s1", "--data-dir", "NEW", "--advertise", b.free),
		run("init over a log without identity", exitConflict, "holds a cluster's log but no identity.json; it is not touched",
			"init", "--context", "new", "--name", "s1", "--data-dir", lost, "--advertise", b.free),
		run("init with busy ports", exitConflict, busy, "init", "--context", "new", "--name", "s1", "--data-dir", "NEW", "--advertise", b.s1.IP),

		server("empty directory", "NEW", "s1", b.free, exitConflict, "belongs to no cluster yet; found one with `persys init`, or join one with `persys join TOKEN`"),
		server("second process", b.s1.DataDir, "s1", b.free, exitConflict, "is in use by another process"),
		server("another name", "OTHER", "o2", b.free, exitConflict, `belongs to "o1", not to "o2"`),
		server("an agent's directory", "IDLE", "idle", b.free, exitConflict, "start it with `persys agent`"),
		run("a server's directory", exitConflict, "start it with `persys server`", "agent", "--name", "o1", "--data-dir", "OTHER", "--advertise", b.free),
		server("busy gRPC port", "OTHER", "o1", b.s1.IP, exitConflict, busy),
		server("busy HTTPS port", "OTHER", "o1", b.s1.IP, exitConflict, "https_port: ", "--grpc-port", "9481"),
		server("busy gossip port", "OTHER", "o1", b.s1.IP, exitConflict, "gossip_port: ", "--grpc-port", "9483", "--https-port", "9480"),
		run("busy gossip port of an agent", exitConflict, "gossip_port: ", "agent", "--name", "idle", "--data-dir", "IDLE", "--advertise", b.s1.IP),
		server("damaged identity", damaged, "o1", b.free, exitFailure, "identity.json is damaged"),
		server("certificates of another cluster", mixed, "o1", b.free, exitConflict, "but its certificate is server/s1 of cluster"),
		run("join with a damaged identity", exitFailure, "identity.json is damaged", "join", b.Token("agent"), "--name", "o1", "--data-dir", damaged, "--advertise", b.free),
	}
}

// spoiled makes a data directory in which something is not as it was written.
func (b *badInput) spoiled(how string) string {
	b.t.Helper()
	dir := filepath.Join(b.dir, how)
	steps := map[string]func() error{
		"lost": func() error { return os.MkdirAll(filepath.Join(dir, "raft"), 0o700) },
		"damaged": func() error {
			return errors.Join(os.CopyFS(dir, os.DirFS(b.other)), os.Truncate(filepath.Join(dir, "identity.json"), 20))
		},
		"mixed": func() error {
			return errors.Join(os.CopyFS(dir, os.DirFS(b.other)), os.RemoveAll(filepath.Join(dir, "pki")),
				os.CopyFS(filepath.Join(dir, "pki"), os.DirFS(filepath.Join(b.s1.DataDir, "pki"))))
		},
	}
	if err := steps[how](); err != nil {
		b.t.Fatal(err)
	}
	return dir
}

// rest asks the HTTPS port for what it refuses; each answer is a problem
// document that says why.
func (b *badInput) rest(t *testing.T) {
	admin, agent, anybody := b.caller(t, b.s1, "admin"), b.caller(t, b.a1, "agent"), b.caller(t, b.s1, "")
	const workloads = "/v1/workloads"
	for _, q := range []struct {
		name               string
		as                 *http.Client
		method, path, body string
		status             int
		says               string
	}{
		{"no certificate", anybody, "GET", workloads, "", 401, "needs a client certificate of this cluster"},
		{"no certificate, metrics", anybody, "GET", "/metrics", "", 401, "needs a client certificate of this cluster"},
		{"certificate of an agent", agent, "GET", workloads, "", 403, "agent/a1 may not call"},
		{"certificate of an agent, write", agent, "POST", workloads, `{"id":"x"}`, 403, "agent/a1 may not call"},
		{"unknown route", admin, "GET", "/v1/nope", "", 404, "there is nothing at /v1/nope; /openapi.json lists what there is"},
		{"out of the API", admin, "GET", workloads + "/..%2f..%2fetc", "", 404, "there is nothing at"},
		{"wrong method", admin, "PATCH", workloads, "", 405, "PATCH is not possible on /v1/workloads"},
		{"unknown query", admin, "GET", workloads + "?foo=1", "", 400, "foo: unknown query parameter; allowed:"},
		{"unknown field", admin, "POST", workloads, "{\n\"id\":\"x\",\"process\":{\"comand\":\"x\"}}", 400, `line 2: process: unknown field "comand" (did you mean "command"?)`},
		{"wrong type", admin, "POST", workloads, `{"id":"x","replicas":"many","process":{"command":"x"}}`, 400, `replicas: "many" is not a whole number`},
		{"impossible quantity", admin, "POST", workloads, `{"id":"x","process":{"command":"x"},"resources":{"cpu":"-1"}}`, 400, `resources.cpu: "-1": negative`},
		{"id", admin, "POST", workloads, `{"id":"X_","process":{"command":"x"}}`, 400, `id: "X_" is not allowed`},
		{"id in the path", admin, "GET", workloads + "/Bad_Id", "", 400, `id: "Bad_Id" is not allowed`},
		{"two ids", admin, "PUT", workloads + "/x", `{"id":"y","process":{"command":"x"}}`, 400, "contradicts the path"},
		{"two kinds of work", admin, "POST", workloads, `{"id":"x","process":{"command":"x"},"container":{"image":"x"}}`, 400, "not together with process"},
		{"two documents", admin, "POST", workloads, "id: x\n---\nid: y\n", 400, "more than one document"},
		{"no body", admin, "POST", workloads, "", 400, "spec: missing"},
		{"cut off body", admin, "POST", workloads, "{", 400, "not JSON: unexpected end"},
		{"binary body", admin, "POST", workloads, "\x7fELF\x00\xff", 400, "the input is not UTF-8 text"},
		{"body too large", admin, "POST", workloads, strings.Repeat(" ", 2<<20), 413, "the body is larger than 1048576 bytes"},
		{"no such workload", admin, "GET", workloads + "/nope", "", 404, `there is no workload "nope"`},
		{"scale of no such workload", admin, "POST", workloads + "/nope/scale", `{"replicas":1}`, 404, `there is no workload "nope"`},
		{"scale out of range", admin, "POST", workloads + "/good/scale", `{"replicas":-1}`, 400, "replicas: -1 is out of range"},
		{"no such node", admin, "DELETE", "/v1/nodes/nope", "", 404, `there is no node "nope"`},
		{"token for an administrator", admin, "POST", "/v1/tokens", `{"role":"admin"}`, 400, "role: admin cannot join"},
	} {
		t.Run(q.name, func(t *testing.T) {
			request, err := http.NewRequestWithContext(t.Context(), q.method, "https://"+net.JoinHostPort(b.s1.IP, "7480")+q.path, strings.NewReader(q.body))
			if err != nil {
				t.Fatal(err)
			}
			response, err := q.as.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			body, err := io.ReadAll(response.Body)
			if err != nil {
				t.Fatal(err)
			}
			var problem struct {
				Status int    `json:"status"`
				Detail string `json:"detail"`
			}
			if err := json.Unmarshal(body, &problem); err != nil || response.Header.Get("Content-Type") != "application/problem+json" {
				t.Fatalf("no problem document: %s", body)
			}
			if response.StatusCode != q.status || problem.Status != q.status || !strings.Contains(problem.Detail, q.says) || strings.Contains(problem.Detail, "\n") {
				t.Errorf("want %d and %q, got %s", q.status, q.says, body)
			}
		})
	}
}

// caller makes requests with the certificate of a role that a machine has; with
// none where role is empty.
func (b *badInput) caller(t *testing.T, p *Process, role string) *http.Client {
	t.Helper()
	dir := role
	if role == "" {
		dir = "admin"
	}
	credentials, err := pki.LoadCredentials(filepath.Join(p.DataDir, "pki", dir))
	if err != nil {
		t.Fatal(err)
	}
	config := credentials.ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "http/1.1")
	if role == "" {
		config.Certificates = nil
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }
	}
	transport := &http.Transport{TLSClientConfig: config}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: atOnce}
}
