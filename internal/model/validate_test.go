package model

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func decodeOne(t *testing.T, in string) *pb.WorkloadSpec {
	t.Helper()
	specs, err := Decode([]byte(in))
	if err != nil {
		t.Fatalf("%s: %v", in, err)
	}
	return specs[0]
}

func TestValidateAccepts(t *testing.T) {
	for _, in := range []string{
		"{id: web, container: {image: nginx}}",
		"{id: 0, type: process, process: {command: sleep, args: [inf]}}",
		"{id: web, replicas: 0, container: {image: 'registry.example:5000/team/app:v1'}}",
		"{id: web, replicas: 10000, container: {image: nginx, ports: [{host_port: 80, container_port: 80}]}}",
		"{id: web, kind: global, container: {image: nginx, privileged: true}}",
		"{id: web, kind: job, restart: {condition: never}, process: {command: /bin/true}}",
		"{id: web, kind: job, schedule: {cron: '*/5 9-17 * jan,jul mon-fri', timezone: Europe/Berlin, concurrency: replace, start_deadline_seconds: 1, keep_completed: 0, keep_failed: 100, suspend: true}, process: {command: a}}",
		"{id: 0123456789012345678901234567890123456789012345678901, kind: job, schedule: {cron: '@daily'}, process: {command: a}}",
		"{id: web, container: {image: nginx, ports: [{host_port: 53, container_port: 53}, {host_port: 53, container_port: 53, protocol: UDP}]}}",
		"{id: web, container: {image: nginx, ports: [{host_port: 53, container_port: 53, host_ip: 10.0.0.1}, {host_port: 53, container_port: 54, host_ip: 10.0.0.2}]}}",
		"{id: web, container: {image: nginx, ports: [{container_port: 53}, {container_port: 53}]}}",
		"{id: web, container: {image: nginx, user: '1000:1000', stop_signal: SIGRTMIN+3, env: {discovery.type: x}, volumes: [{host_path: /data/a, container_path: /data}]}}",
		"{id: web, container: {image: nginx, stop_signal: '9', stop_grace_seconds: 0, hostname: h1}}",
		"{id: web, resources: {cpu: 1m, memory: 6Mi, disk: 1}, container: {image: nginx}}",
		"{id: web, placement: {constraints: [{label: cores, operator: '>', values: [2.5]}, {label: zone, values: [a, b]}, {label: gpu, operator: exists}]}, process: {command: a}}",
		"{id: web, placement: {pools: [gpu, default], tolerations: [{}, {key: a}, {key: a, value: '', effect: NoExecute}]}, process: {command: a}}",
		"{id: web, kind: global, placement: {pools: ['*']}, process: {command: a}}",
		"{id: web, placement: {workload_affinities: [{workload: db}, {labels: {app: x, tier: ''}, topology: zone, anti: true, weight: 100}]}, process: {command: a}}",
		"{id: web, resources: {devices: [{name: nvidia/a100, count: 2, constraints: [{label: memory, operator: '>', values: [40]}]}, {name: fpga}]}, process: {command: a}}",
		"{id: web, resources: {storage: [{pool: data, size: 10Gi}, {driver: nfs, size: 1G}, {size: 1}]}, process: {command: a}}",
		"{id: web, placement: {max_per_node: 1, affinities: [{label: a, operator: exists}, {label: a, values: [b], weight: -100}]}, process: {command: a}}",
		"{id: web, placement: {spread: [{label: zone, targets: [{value: a, percent: 70}, {value: b, percent: 30}]}, {label: rack, weight: 1, max_skew: 1}]}, process: {command: a}}",
	} {
		spec := decodeOne(t, in)
		if err := Validate(spec); err != nil {
			t.Errorf("%s: %v", in, err)
		}
		if err := Validate(Normalize(spec)); err != nil {
			t.Errorf("normalized %s: %v", in, err)
		}
	}
}

func TestValidateRefuses(t *testing.T) {
	const run = ", container: {image: nginx}}"
	for _, tt := range []struct{ in, want string }{
		{"{container: {image: a}}", "id: missing; allowed: a DNS label: 1 to 63 lower case letters, digits and inner hyphens"},
		{"{id: Web" + run, `id: "Web" is not allowed; allowed: a DNS label`},
		{"{id: a/b" + run, `id: "a/b" is not allowed`},
		{"{id: -a" + run, `id: "-a" is not allowed`},
		{"{id: " + strings.Repeat("a", 64) + run, "…\" is not allowed"},
		{"{id: web}", "says nothing to run; allowed: one of container, process"},
		{"{id: web, type: vm" + run, "type: vm contradicts the container spec that is given; allowed: container, or leave it out"},
		{"{id: web, compose: {source_type: inline}}", "compose: not supported by this version; allowed: container, process"},
		{"{id: web, vm: {vcpus: 2}}", "vm: not supported by this version"},
		{"{id: web, desired_state: deleted" + run, "desired_state: deleted cannot be applied"},
		{"{id: web, replicas: -1" + run, "replicas: -1 is out of range; allowed: 0 to 10000"},
		{"{id: web, replicas: 10001" + run, "replicas: 10001 is out of range"},
		{"{id: web, kind: global, replicas: 1" + run, "replicas: not with kind global"},
		{"{id: web, labels: {'a=b': c}" + run, `labels: name "a=b" is not allowed`},
		{"{id: web, labels: {a: 'x,y'}" + run, `labels.a: value "x,y" is not allowed`},
		{"{id: web, resources: {cpu: 0}" + run, `resources.cpu: "0" is out of range; allowed: 1m to 1000000`},
		{"{id: web, resources: {cpu: -1}" + run, `resources.cpu: "-1": negative; allowed: cores`},
		{"{id: web, resources: {cpu: 1.5x}" + run, `resources.cpu: "1.5x": not a quantity; allowed: cores`},
		{"{id: web, resources: {memory: 256MB}" + run, `resources.memory: "256MB": not a quantity; allowed: bytes with an optional suffix k, M, G`},
		{"{id: web, resources: {memory: 9999999999999999999}" + run, `resources.memory: "9999999999999999999": too large`},
		{"{id: web, resources: {memory: 4Mi}" + run, `resources.memory: "4Mi" is out of range; allowed: 6Mi to 1024Ti`},
		{"{id: web, resources: {disk: 0}" + run, `resources.disk: "0" is out of range`},
		{"{id: web, placement: {constraints: [{operator: exists}]}" + run, "placement.constraints[0].label: missing"},
		{"{id: web, placement: {constraints: [{label: a}]}" + run, "placement.constraints[0].values: missing; allowed: one value or more for operator in"},
		{"{id: web, placement: {constraints: [{label: a, operator: exists, values: [b]}]}" + run, "placement.constraints[0].values: 1 given; allowed: none for operator exists"},
		{"{id: web, placement: {constraints: [{label: a, operator: '>', values: [1, 2]}]}" + run, "placement.constraints[0].values: 2 given; allowed: exactly one for operator greater"},
		{"{id: web, placement: {constraints: [{label: a, operator: '<', values: [x]}]}" + run, `placement.constraints[0].values[0]: "x" is not a number`},
		{"{id: web, placement: {constraints: [{label: a, operator: '<', values: [NaN]}]}" + run, `"NaN" is not a number`},
		{"{id: web, placement: {nodes: [a, a]}" + run, `placement.nodes[1]: "a" is listed twice`},
		{"{id: web, placement: {pools: ['*', gpu]}" + run, `placement.pools[0]: "*" is all pools; allowed: alone`},
		{"{id: web, placement: {pools: [gpu, gpu]}" + run, `placement.pools[1]: "gpu" is listed twice`},
		{"{id: web, placement: {pools: ['']}" + run, "placement.pools[0]: missing; allowed: a DNS label"},
		{"{id: web, placement: {tolerations: [{key: 'a b'}]}" + run, `placement.tolerations[0].key: "a b" is not allowed`},
		{"{id: web, placement: {tolerations: [{value: 'a b'}]}" + run, `placement.tolerations[0].value: value "a b" is not allowed`},
		{"{id: web, placement: {workload_affinities: [{}]}" + run, "placement.workload_affinities[0]: says of no workload; allowed: workload, an id, or labels"},
		{"{id: web, placement: {workload_affinities: [{workload: db, labels: {a: b}}]}" + run, "placement.workload_affinities[0].labels: not with workload"},
		{"{id: web, placement: {workload_affinities: [{workload: Db}]}" + run, `placement.workload_affinities[0].workload: "Db" is not allowed`},
		{"{id: web, placement: {workload_affinities: [{labels: {'a b': c}}]}" + run, `placement.workload_affinities[0].labels: name "a b" is not allowed`},
		{"{id: web, placement: {workload_affinities: [{workload: db, topology: 'a b'}]}" + run, `placement.workload_affinities[0].topology: "a b" is not allowed`},
		{"{id: web, placement: {workload_affinities: [{workload: db, weight: -1}]}" + run, "placement.workload_affinities[0].weight: -1 is out of range; allowed: 0 to 100"},
		{"{id: web, kind: global, placement: {workload_affinities: [{workload: db}]}" + run, "placement.workload_affinities: not with kind global"},
		{"{id: web, resources: {devices: [{}]}" + run, `resources.devices[0].name: "" is not allowed`},
		{"{id: web, resources: {devices: [{name: a/b}, {name: a-b}]}" + run, `resources.devices[1].name: "a-b" is listed twice, or differs from another in punctuation only`},
		{"{id: web, resources: {devices: [{name: gpu, count: -1}]}" + run, "resources.devices[0].count: -1 is out of range; allowed: 0 to 1024"},
		{"{id: web, resources: {devices: [{name: gpu, constraints: [{label: a}]}]}" + run, "resources.devices[0].constraints[0].values: missing"},
		{"{id: web, resources: {storage: [{pool: data}]}" + run, "resources.storage[0].size: missing"},
		{"{id: web, resources: {storage: [{pool: data, size: 0}]}" + run, `resources.storage[0].size: "0" is out of range`},
		{"{id: web, resources: {storage: [{pool: a b, size: 1}]}" + run, `resources.storage[0].pool: "a b" is not allowed`},
		{"{id: web, resources: {storage: [{pool: data, size: 1}, {pool: data, driver: x, size: 2}]}" + run, "resources.storage[1]: the same storage is listed twice"},
		{"{id: web, placement: {max_per_node: -1}" + run, "placement.max_per_node: -1 is out of range; allowed: 0 to 10000"},
		{"{id: web, kind: global, placement: {spread: [{label: a}]}" + run, "placement.spread: not with kind global, which runs one replica on each matching node"},
		{"{id: web, placement: {affinities: [{label: a}]}" + run, "placement.affinities[0].values: missing"},
		{"{id: web, placement: {affinities: [{label: a, operator: exists, weight: 0}]}" + run, "placement.affinities[0].weight: 0 is out of range; allowed: 1 to 100, or -1 to -100"},
		{"{id: web, placement: {affinities: [{label: a, operator: exists, weight: 101}]}" + run, "placement.affinities[0].weight: 101 is out of range"},
		{"{id: web, placement: {spread: [{}]}" + run, "placement.spread[0].label: missing"},
		{"{id: web, placement: {spread: [{label: a}, {label: a}]}" + run, `placement.spread[1].label: "a" is listed twice`},
		{"{id: web, placement: {spread: [{label: a, weight: 200}]}" + run, "placement.spread[0].weight: 200 is out of range; allowed: 1 to 100, 0 for the default of 50"},
		{"{id: web, placement: {spread: [{label: a, max_skew: -1}]}" + run, "placement.spread[0].max_skew: -1 is out of range"},
		{"{id: web, placement: {spread: [{label: a, max_skew: 1, targets: [{value: b, percent: 10}]}]}" + run, "placement.spread[0].max_skew: contradicts targets"},
		{"{id: web, placement: {spread: [{label: a, targets: [{value: b, percent: 40}, {value: b, percent: 40}]}]}" + run, `placement.spread[0].targets[1].value: "b" is listed twice`},
		{"{id: web, placement: {spread: [{label: a, targets: [{value: b, percent: 60}, {value: c, percent: 60}]}]}" + run, "placement.spread[0].targets: add up to 120 percent; allowed: at most 100"},
		{"{id: web, placement: {nodes: [A]}" + run, `placement.nodes[0]: "A" is not allowed`},
		{"{id: web, update: {max_parallel: -1}" + run, "update.max_parallel: -1 is negative"},
		{"{id: web, schedule: {cron: '@daily'}" + run, "schedule: only with kind job; allowed: kind job, or leave it out"},
		{"{id: web, kind: job, schedule: {}" + run, "schedule.cron: missing; allowed: five fields (minute, hour, day of month, month, day of week), or @hourly"},
		{"{id: web, kind: job, schedule: {cron: '* * * *'}" + run, `schedule.cron: "* * * *" is not a schedule: expected exactly 5 fields, found 4`},
		{"{id: web, kind: job, schedule: {cron: '60 * * * *'}" + run, `schedule.cron: "60 * * * *" is not a schedule: end of range (60) above maximum (59)`},
		{"{id: web, kind: job, schedule: {cron: '@every 5m'}" + run, `schedule.cron: "@every 5m" is not a schedule; allowed: five fields`},
		{"{id: web, kind: job, schedule: {cron: 'TZ=UTC'}" + run, `schedule.cron: "TZ=UTC" is not a schedule; allowed: five fields`},
		{"{id: web, kind: job, schedule: {cron: '0 0 31 2 *'}" + run, `schedule.cron: "0 0 31 2 *" names a day that never comes`},
		{"{id: web, kind: job, schedule: {cron: ', * * * *'}" + run, `schedule.cron: ", * * * *" names a day that never comes`},
		{"{id: web, kind: job, schedule: {cron: '@daily', timezone: Europe/Atlantis}" + run, `schedule.timezone: "Europe/Atlantis" is not a time zone; allowed: an IANA name`},
		{"{id: web, kind: job, schedule: {cron: '@daily', timezone: Local}" + run, `schedule.timezone: "Local" is not a time zone`},
		{"{id: web, kind: job, schedule: {cron: '@daily', timezone: ../../etc/passwd}" + run, `schedule.timezone: "../../etc/passwd" is not a time zone`},
		{"{id: web, kind: job, schedule: {cron: '@daily', start_deadline_seconds: 0}" + run, "schedule.start_deadline_seconds: 0 is out of range; allowed: 1 to 604800"},
		{"{id: web, kind: job, schedule: {cron: '@daily', keep_failed: 101}" + run, "schedule.keep_failed: 101 is out of range; allowed: 0 to 100"},
		{"{id: w0123456789012345678901234567890123456789012345678901, kind: job, schedule: {cron: '@daily'}" + run, "id: has 53 characters; allowed: 52 with a schedule"},
		{"{id: web, kind: job, restart: {condition: always}" + run, "restart.condition: always contradicts kind job, which runs to completion; allowed: on_failure, never"},
		{"{id: web, restart: {max_attempts: -1}" + run, "restart.max_attempts: -1 is negative"},
		{"{id: web, restart: {condition: never, max_attempts: 1}" + run, "restart.max_attempts: contradicts condition never"},
		{"{id: web, priority: 101" + run, "priority: 101 is out of range; allowed: 0 to 100"},
		{"{id: web, env: {1A: x}" + run, `env: name "1A" is not allowed; allowed: letters, digits and -_.`},
		{"{id: web, env: {'A=B': x}" + run, `env: name "A=B" is not allowed`},
		{"{id: web, env: {PERSYS_EPOCH: x}" + run, "env.PERSYS_EPOCH: names that begin with PERSYS_"},
		{`{id: web, env: {A: "x\0y"}` + run, "env.A: has a zero byte"},
		{`{id: web, container: {image: a, args: ["\0"]}}`, "container.args[0]: has a zero byte"},
		{"{id: web, container: {}}", "container.image: missing"},
		{"{id: web, container: {image: 'Nginx:latest'}}", `container.image: "Nginx:latest": invalid reference format: repository name (library/Nginx) must be lowercase; allowed: an image reference`},
		{"{id: web, container: {image: 'a b'}}", `container.image: "a b": invalid reference format`},
		{"{id: web, container: {image: a, env: {'': x}}}", `container.env: name "" is not allowed`},
		{"{id: web, container: {image: a, ports: [{host_port: 80}]}}", "container.ports[0].container_port: 0 is out of range; allowed: 1 to 65535"},
		{"{id: web, container: {image: a, ports: [{host_port: 65536, container_port: 1}]}}", "container.ports[0].host_port: 65536 is out of range; allowed: 0 to 65535"},
		{"{id: web, container: {image: a, ports: [{host_port: 80, container_port: 1}, {host_port: 80, container_port: 2, protocol: tcp}]}}", "container.ports[1].host_port: 80 is taken by ports[0]"},
		{"{id: web, container: {image: a, ports: [{host_port: 80, container_port: 1, host_ip: '::'}, {host_port: 80, container_port: 2, host_ip: 10.0.0.1}]}}", "container.ports[1].host_port: 80 is taken by ports[0]"},
		{"{id: web, container: {image: a, ports: [{container_port: 1, protocol: sctp}]}}", `container.ports[0].protocol: "sctp" is unknown; allowed: tcp, udp`},
		{"{id: web, container: {image: a, ports: [{container_port: 1, host_ip: localhost}]}}", `container.ports[0].host_ip: "localhost" is not an IP address`},
		{"{id: web, container: {image: a, volumes: [{host_path: data, container_path: /d}]}}", `container.volumes[0].host_path: "data" is relative; allowed: an absolute path`},
		{"{id: web, container: {image: a, volumes: [{host_path: /a/../b, container_path: /d}]}}", `container.volumes[0].host_path: "/a/../b" is not in its shortest form; allowed: "/b"`},
		{"{id: web, container: {image: a, volumes: [{host_path: /a}]}}", "container.volumes[0].container_path: missing"},
		{"{id: web, container: {image: a, volumes: [{host_path: /a, container_path: /}]}}", "container.volumes[0].container_path: the root cannot be mounted over"},
		{"{id: web, container: {image: a, volumes: [{host_path: /a, container_path: /d}, {host_path: /b, container_path: /d}]}}", `container.volumes[1].container_path: "/d" is mounted by volumes[0] already`},
		{"{id: web, container: {image: a, working_dir: app}}", `container.working_dir: "app" is relative`},
		{"{id: web, container: {image: a, user: 'a b'}}", `container.user: "a b" is not allowed`},
		{"{id: web, container: {image: a, hostname: a.b}}", `container.hostname: "a.b" is not allowed`},
		{"{id: web, container: {image: a, stop_grace_seconds: -1}}", "container.stop_grace_seconds: -1 is out of range"},
		{"{id: web, container: {image: a, stop_signal: SIGFOO}}", `container.stop_signal: "SIGFOO" is not a signal that stops`},
		{"{id: web, container: {image: a, pids_limit: -1}}", "container.pids_limit: -1 is out of range"},
		{"{id: web, process: {}}", "process.command: missing"},
		{"{id: web, process: {command: ./run}}", `process.command: "./run" is relative`},
		{"{id: web, process: {command: a, user: 'a:b'}}", `process.user: "a:b" is not allowed; allowed: a user's name or number`},
		{"{id: web, process: {command: a, ports: [{container_port: 80}]}}", "process.ports[0].container_port: a process has no ports of its own inside"},
		{"{id: web, process: {command: a, ports: [{host_ip: 10.0.0.1}]}}", "process.ports[0].host_ip: a process chooses itself where it listens"},
	} {
		spec := decodeOne(t, tt.in)
		for _, s := range []*pb.WorkloadSpec{spec, Normalize(spec)} {
			err := Validate(s)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s:\n got %v\nwant %s", tt.in, err, tt.want)
			}
			var all FieldErrors
			if err != nil && (!errors.As(err, &all) || len(all) != 1) {
				t.Errorf("%s: %d problems: %v", tt.in, len(all), err)
			}
		}
	}
}

func TestValidateReportsAll(t *testing.T) {
	err := Validate(decodeOne(t, "{id: X, replicas: -1, priority: 200, container: {image: '', ports: [{container_port: 0}]}}"))
	want := `id: "X" is not allowed; allowed: a DNS label: 1 to 63 lower case letters, digits and inner hyphens
replicas: -1 is out of range; allowed: 0 to 10000
priority: 200 is out of range; allowed: 0 to 100
container.image: missing; allowed: an image reference such as "nginx:1.27"
container.ports[0].container_port: 0 is out of range; allowed: 1 to 65535`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v", err)
	}
}

func TestValidateRefusesWhatItDoesNotKnow(t *testing.T) {
	spec := decodeOne(t, "{id: web, container: {image: nginx}}")
	spec.GetContainer().PullPolicy = 7
	spec.Kind = 9
	spec.GetContainer().ProtoReflect().SetUnknown([]byte{0xc0, 0x3e, 0x01}) // field 1000, varint 1
	spec.GetContainer().Args = make([]string, 257)
	got := Validate(spec).Error()
	for _, want := range []string{
		"kind: value 9 is unknown to this version; allowed: service, global, job",
		"container: field number 1000 is unknown to this version",
		"container.pull_policy: value 7 is unknown",
		"container.args: has 257 entries; allowed: 256",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	big := decodeOne(t, "{id: web, container: {image: nginx}}")
	big.Env = map[string]string{"A": strings.Repeat("x", MaxSpecBytes)}
	if err := Validate(big); err == nil || !strings.Contains(err.Error(), "allowed: 262144") {
		t.Errorf("big: %v", err)
	}
	if err := Validate(nil); err == nil || err.Error() != "spec: missing" {
		t.Errorf("nil: %v", err)
	}
}

func TestNormalize(t *testing.T) {
	got := Normalize(decodeOne(t, "{id: web, resources: {cpu: 0.5, memory: 1024Mi}, placement: {}, container: {image: nginx, ports: [{container_port: 80}, {container_port: 53, protocol: UDP}]}}"))
	want := &pb.WorkloadSpec{
		Id: "web", Type: pb.WorkloadType_CONTAINER, Replicas: proto.Int32(1), Priority: proto.Int32(50),
		Resources: &pb.Resources{Cpu: "500m", Memory: "1Gi"}, Update: &pb.UpdateStrategy{MaxParallel: 1},
		Restart: &pb.RestartPolicy{Condition: pb.RestartPolicy_ALWAYS},
		Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{
			Image: "nginx", StopGraceSeconds: proto.Int32(10),
			Ports: []*pb.Port{{ContainerPort: 80, Protocol: "tcp"}, {ContainerPort: 53, Protocol: "udp"}},
		}},
	}
	if !proto.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	if again := Normalize(got); !proto.Equal(again, got) {
		t.Errorf("twice: %v", again)
	}
	if g := Normalize(decodeOne(t, "{id: a, kind: global, process: {command: a}}")); g.Replicas != nil {
		t.Errorf("global has replicas: %v", g)
	}
	if j := Normalize(decodeOne(t, "{id: a, kind: job, process: {command: a}}")); j.Restart.Condition != pb.RestartPolicy_ON_FAILURE || j.Restart.MaxAttempts != 3 {
		t.Errorf("job restarts %v", j.Restart)
	}
}

func TestRevision(t *testing.T) {
	base := decodeOne(t, "{id: web, env: {A: 1}, resources: {cpu: 0.5}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}]}}")
	// Recorded: a change of it replaces every replica of every cluster that upgrades.
	const recorded = "1ab40e7af958897b"
	if got := Revision(base); got != recorded {
		t.Errorf("revision %s, recorded %s", got, recorded)
	}
	if Revision(Normalize(base)) != Revision(base) {
		t.Error("normalizing changes the revision")
	}
	for _, same := range []string{
		"{id: other, env: {A: 1}, resources: {cpu: 500m}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}]}}",
		"{id: web, env: {A: 1, B: 2}, resources: {cpu: 0.5}, container: {image: nginx, ports: [{container_port: 80}]}}",
		"{id: web, env: {A: 1, B: 3}, resources: {cpu: 0.5}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80, protocol: TCP}], stop_grace_seconds: 10}}",
		"{id: web, replicas: 5, priority: 1, labels: {a: b}, desired_state: stopped, update: {max_parallel: 2}, placement: {policy: binpack}, restart: {condition: always}, env: {A: 1}, resources: {cpu: 0.5}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}]}}",
	} {
		if Revision(decodeOne(t, same)) != recorded {
			t.Errorf("other revision: %s", same)
		}
	}
	for _, other := range []string{
		"{id: web, env: {A: 2}, resources: {cpu: 0.5}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}]}}",
		"{id: web, env: {A: 1}, resources: {cpu: 0.6}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}]}}",
		"{id: web, env: {A: 1}, resources: {cpu: 0.5}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}], stop_grace_seconds: 0}}",
		"{id: web, exclusive: true, env: {A: 1}, resources: {cpu: 0.5}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}]}}",
		"{id: web, restart: {condition: never}, env: {A: 1}, resources: {cpu: 0.5}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}]}}",
		"{id: web, kind: global, env: {A: 1}, resources: {cpu: 0.5}, container: {image: nginx, env: {B: 2}, ports: [{container_port: 80}]}}",
	} {
		if Revision(decodeOne(t, other)) == recorded {
			t.Errorf("same revision: %s", other)
		}
	}
}

func TestSelectLabels(t *testing.T) {
	got, err := SelectLabels("app=web,tier=1")
	if err != nil || len(got) != 2 || got["app"] != "web" || got["tier"] != "1" {
		t.Errorf("%v, %v", got, err)
	}
	for in, want := range map[string]string{
		"app":       `label_selector: "app" has no =`,
		"app=a,":    `label_selector: "" has no =`,
		"=x":        `label_selector: name "" is not allowed`,
		"a=b c":     `label_selector.a: value "b c" is not allowed`,
		"a=1,a=2":   `"a" is wanted to be both "1" and "2"`,
		"app!=test": `label_selector: name "app!" is not allowed`,
	} {
		if _, err := SelectLabels(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", in, err)
		}
	}
}
