package model

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestDecodeForms(t *testing.T) {
	want := &pb.WorkloadSpec{
		Id: "web", Type: pb.WorkloadType_CONTAINER, DesiredState: pb.DesiredState_DESIRED_STOPPED, Replicas: proto.Int32(3),
		Labels:    map[string]string{"tier": "1", "on": "true"},
		Resources: &pb.Resources{Cpu: "1.5", Memory: "256Mi"},
		Placement: &pb.Placement{
			Policy: pb.PlacementPolicy_BIN_PACK,
			Constraints: []*pb.Constraint{
				{Label: "cores", Operator: pb.Constraint_GREATER, Values: []string{"4"}},
				{Label: "zone", Operator: pb.Constraint_NOT_IN, Values: []string{"eu"}},
			},
		},
		Restart: &pb.RestartPolicy{Condition: pb.RestartPolicy_ON_FAILURE},
		Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{
			Image: "nginx:1", Args: []string{"-p", "8080"}, Env: map[string]string{"PORT": "8080"},
			Ports: []*pb.Port{{HostPort: 80, ContainerPort: 8080}},
		}},
	}
	for name, in := range map[string]string{
		"snake case": `
id: web
type: container
desired_state: Stopped
replicas: 3
labels: {tier: 1, on: true}
resources: {cpu: 1.5, memory: 256Mi}
placement:
  policy: BinPack
  constraints:
  - {label: cores, operator: ">", values: [4]}
  - {label: zone, operator: notIn, values: [eu]}
restart: {condition: on-failure}
container:
  image: nginx:1
  args: [-p, 8080]
  env: {PORT: 8080}
  ports: [{host_port: 80, container_port: 8080}]
`,
		"camel case, anchors, merges and nulls": `
id: web
type: Container
desiredState: desired_stopped
replicas: "3"
labels: {<<: &l {tier: 2, on: true}, tier: 1}
update: null
exclusive: ~
resources: &r
  cpu: "1.5"
  memory: 256Mi
placement:
  policy: 1
  constraints: [{label: cores, operator: greater, values: ["4"]}, {label: zone, operator: "!=", values: [eu]}]
restart: {condition: ON_FAILURE}
container: {image: "nginx:1", args: ["-p", "8080"], env: {PORT: "8080"}, ports: [{hostPort: 80, containerPort: 8080}]}
`,
		"json": protojson.Format(want),
	} {
		got, err := Decode([]byte(in))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(got) != 1 || !proto.Equal(got[0], want) {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

func TestDecodeSeveral(t *testing.T) {
	for name, in := range map[string]string{
		"yaml documents": "---\nid: a\n---\n---\nid: b\n...\n",
		"yaml list":      "- id: a\n- id: b\n",
		"json list":      `[{"id":"a"},{"id":"b"}]`,
		"json documents": "{\"id\":\"a\"}\n\n{\"id\":\"b\"}",
		"flow":           "{id: a}\n---\n{id: b}",
	} {
		got, err := Decode([]byte(in))
		if err != nil || len(got) != 2 || got[0].Id != "a" || got[1].Id != "b" {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestDecodeJSONText(t *testing.T) {
	got, err := Decode([]byte("{\"id\":\"a\",\n\t\"env\":{\"S\":\"\\ud83d\\ude00\\/\\u0041\"}}"))
	if err != nil || got[0].Env["S"] != "😀/A" {
		t.Errorf("%v, %v", got, err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", "there is no workload in the input"},
		{"[]", "there is no workload in the input"},
		{"---\n# nothing\n", "there is no workload in the input"},
		{"id: web\ncontainer:\n  imge: x\n", `line 3: container: unknown field "imge" (did you mean "image"?)`},
		{"id: web\nContainer: {}\n", `line 2: unknown field "Container" (did you mean "container"?)`},
		{"id: web\nquux: 1\n", `line 2: unknown field "quux"; allowed: compose, container, `},
		{"id: web\nresources: {memory_mb: 5}\n", `line 2: resources: unknown field "memory_mb" (write "memory", such as "256Mi")`},
		{"id: web\nid: web2\n", `line 2: id: given twice, first in line 1`},
		{"desired_state: running\ndesiredState: stopped\n", `line 2: desired_state: given twice, first in line 1`},
		{"id: web\nreplicas: 1.5\n", `line 2: replicas: "1.5" is not a whole number of 32 bits`},
		{"replicas: 3.0", `replicas: "3.0" is not a whole number`},
		{"replicas: 010", `replicas: "010" is not a whole number`},
		{"replicas: 99999999999", `replicas: "99999999999" is out of the range of a whole number of 32 bits`},
		{"replicas: many", `replicas: "many" is not a whole number`},
		{"replicas: [1]", `replicas: must be a whole number of 32 bits, not a list`},
		{"exclusive: yes", `exclusive: "yes" is not true or false`},
		{"exclusive: \"true\"", `exclusive: "true" is not true or false`},
		{"type: docker", `type: "docker" is unknown; allowed: container, compose, vm, process`},
		{"type: ''", `type: "" is unknown`},
		{"desired_state: 7", `desired_state: "7" is unknown; allowed: running, stopped, deleted`},
		{"container: nginx", `container: must be a mapping of fields, not "nginx"`},
		{"container: {args: serve}", `container.args: must be a list, not "serve"`},
		{"container: {args: [[a]]}", `container.args[0]: must be text, not a list`},
		{"container: {args: [~]}", `container.args[0]: has no value`},
		{"env: {A: ~}", `env.A: has no value; write ""`},
		{"env: [A=1]", `env: must be a mapping, not a list`},
		{"env: {A: 1, A: 2}", `env.A: given twice`},
		{"env: {A: {b: c}}", `env.A: must be text, not a mapping`},
		{"env: {? [a] : b}", `env: a field's name must be plain text, not a list`},
		{"container: {image: a}\nprocess: {command: b}", `line 2: process: not together with container; allowed: one of container, compose, vm, process`},
		{"just text", `must be a mapping of fields, not "just text"`},
		{"id: a\n---\nid: a", `line 3: id: workload "a" is given twice, first in line 1`},
		{"id: a\n  b: c", "not YAML: line 2"},
		{"id: \xff", "the input is not UTF-8 text"},
		{"{\"id\": \"a\",\n \"replicas\": }", "line 2: not JSON: "},
		{"{\"id\": \"a\"", "not JSON: unexpected end"},
		{`{"id": "a", "id": "b"}`, `id: given twice`},
		{"a: &a [*a]", `unknown field "a"`},
		{"labels: {<<: 5}", "labels: << must be given a mapping"},
	} {
		got, err := Decode([]byte(tt.in))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q:\n got %v (%v)\nwant %s", tt.in, err, got, tt.want)
		}
	}
}

func TestDecodeReportsAll(t *testing.T) {
	_, err := Decode([]byte("idd: web\nreplicas: x\ncontainer:\n  imag: nginx\n"))
	want := `line 1: unknown field "idd" (did you mean "id"?)
line 2: replicas: "x" is not a whole number of 32 bits
line 4: container: unknown field "imag" (did you mean "image"?)`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v", err)
	}
}

func TestDecodeIsBounded(t *testing.T) {
	var laughs strings.Builder
	laughs.WriteString("a0: &a0 {id: x}\n")
	for i := 1; i < 60; i++ {
		prev := string(rune('0'+(i-1)/10)) + string(rune('0'+(i-1)%10))
		this := string(rune('0'+i/10)) + string(rune('0'+i%10))
		if i == 1 {
			prev = "0"
		}
		laughs.WriteString("a" + this + ": &a" + this + " {<<: [*a" + prev + ", *a" + prev + "]}\n")
	}
	laughs.WriteString("labels: *a59\n")
	for name, in := range map[string]string{
		"laughs":       laughs.String(),
		"deep json":    strings.Repeat("[", 100_000),
		"deep yaml":    "labels: " + strings.Repeat("[", 5000) + strings.Repeat("]", 5000),
		"own ancestor": "labels: &a {<<: *a}",
	} {
		if _, err := Decode([]byte(in)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestDecodeInto(t *testing.T) {
	var req pb.CreateTokenRequest
	if err := DecodeInto([]byte(`{"role": "agent", "ttl": "3h", "labels": {"zone": 1}}`), &req); err != nil {
		t.Fatal(err)
	}
	if req.Role != pb.Role_ROLE_AGENT || req.Ttl.Seconds != 3*3600 || req.Labels["zone"] != "1" {
		t.Errorf("%v", &req)
	}
	for in, want := range map[string]string{
		`{"ttl": "soon"}`:      `ttl: "soon" is no duration; allowed: "90s"`,
		`{"role": "king"}`:     `role: "king" is unknown; allowed: server, agent, admin`,
		`{"uses": 1}{}`:        "more than one document",
		`{"rol": "agent"}`:     `did you mean "role"?`,
		`{"uses": "1.0"}`:      `uses: "1.0" is not a whole number`,
		`[]`:                   "must be a mapping of fields, not a list",
		`{"since":"yesterday"`: "not JSON",
	} {
		if err := DecodeInto([]byte(in), &pb.CreateTokenRequest{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", in, err, want)
		}
	}
	if err := DecodeInto([]byte(" \n"), &req); err != nil {
		t.Errorf("empty: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		"id: web\nreplicas: 3\ncontainer: {image: nginx, env: {A: 1}}\n", `{"id":"web","process":{"command":"x","ports":[{"host_port":1}]}}`,
		"a: &a [*a]\n", "labels: {<<: [*x]}\n", "---\n- id: a\n---\n", "{id: web, ? [x]: y}", "env: !!binary aGk=", "id: !!int 5\n", "ttl: 3h",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		specs, err := Decode(data)
		if (err == nil) != (len(specs) > 0) {
			t.Fatalf("%d specs and error %v", len(specs), err)
		}
		for _, s := range specs {
			// What was decoded is written back as JSON that decodes to the same.
			out, err := protojson.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			_, _, _ = Validate(s), Validate(Normalize(s)), Revision(s)
			again, err := Decode(out)
			if string(out) == "{}" {
				continue
			}
			if err != nil || len(again) != 1 || !proto.Equal(again[0], s) {
				t.Fatalf("%s: %v, %v", out, again, err)
			}
		}
	})
}
