package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const web = `{"id": "web", "replicas": 2, "container": {"image": "nginx:1"}}`

// call makes a request; headers are "Name: value" pairs.
func (w *world) call(method, path, body string, headers ...string) (*http.Response, string) {
	w.Helper()
	req, err := http.NewRequestWithContext(w.Context(), method, w.url+path, strings.NewReader(body))
	if err != nil {
		w.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		w.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		w.Fatal(err)
	}
	return resp, string(data)
}

func (w *world) want(code int, method, path, body string, headers ...string) (*http.Response, map[string]any) {
	w.Helper()
	resp, text := w.call(method, path, body, headers...)
	if resp.StatusCode != code {
		w.Fatalf("%s %s: %d, want %d\n%s", method, path, resp.StatusCode, code, text)
	}
	var document map[string]any
	if strings.Contains(resp.Header.Get("Content-Type"), "json") {
		if err := json.Unmarshal([]byte(text), &document); err != nil {
			w.Fatalf("%s %s: %v\n%s", method, path, err, text)
		}
	}
	return resp, document
}

// One wrong input at each door, and what is answered.
func TestProblems(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	w.apply("{id: all, kind: global, process: {command: sleep}}")
	w.put(model.NodeKey("n1"), &pb.Node{Id: "n1", State: pb.NodeState_READY})
	w.apply("{id: going, process: {command: sleep}}")
	w.want(202, "DELETE", "/v1/workloads/going", "")

	var out strings.Builder
	door := func(method, path, body string, headers ...string) {
		t.Helper()
		resp, text := w.call(method, path, body, headers...)
		if len(body) > 200 {
			body = fmt.Sprintf("(%d bytes)", len(body))
		}
		fmt.Fprintf(&out, "> %s\n", strings.TrimSpace(strings.Join(append([]string{method, path, body}, headers...), " ")))
		var indented bytes.Buffer
		if err := json.Indent(&indented, []byte(text), "", "  "); err != nil {
			indented.Reset()
			indented.WriteString(text)
		}
		fmt.Fprintf(&out, "%d %s\n%s\n\n", resp.StatusCode, resp.Header.Get("Content-Type"), strings.TrimSpace(indented.String()))
		if resp.StatusCode < 400 {
			t.Errorf("%s %s %s: accepted with %d", method, path, body, resp.StatusCode)
		}
	}
	door("POST", "/v1/workloads", `{"id": "web2", "container": {"imge": "nginx"}}`)
	door("POST", "/v1/workloads", "id: web2\nreplicas: 1.5\nkind: daemon\n")
	door("POST", "/v1/workloads", `{"id": "Web", "replicas": -1, "container": {"image": ""}}`)
	door("POST", "/v1/workloads", `{"id": "web2", "compose": {"inline_yaml": "x"}}`)
	door("POST", "/v1/workloads", `{"id": `)
	door("POST", "/v1/workloads", "")
	door("POST", "/v1/workloads", `{}{}`)
	door("POST", "/v1/workloads", strings.Repeat("x", maxBody+1))
	door("POST", "/v1/workloads", `{}`, "Content-Type: text/html")
	door("POST", "/v1/workloads", `{}`, "Content-Encoding: gzip")
	door("POST", "/v1/workloads?create_onl=true", web)
	door("POST", "/v1/workloads?create_only=yes", web)
	door("POST", "/v1/workloads?create_only=true", web)
	door("POST", "/v1/workloads?if_version=1&if_version=2", web)
	door("POST", "/v1/workloads?spec.id=a", web)
	door("PUT", "/v1/workloads/web", `{"id": "other", "container": {"image": "nginx"}}`)
	door("PUT", "/v1/workloads/web", `{"container": {"image": "nginx:2"}}`, `If-Match: "1"`)
	door("PUT", "/v1/workloads/web", `{"container": {"image": "nginx:2"}}`, `If-Match: web`)
	door("PUT", "/v1/workloads/web", web, "If-None-Match: *")
	door("PUT", "/v1/workloads/web", web, `If-None-Match: "5"`)
	door("PUT", "/v1/workloads/web?if_version=3", web, `If-Match: "3"`)
	door("PUT", "/v1/workloads/web", `{"kind": "job", "container": {"image": "nginx"}}`)
	door("PUT", "/v1/workloads/going", `{"process": {"command": "sleep"}}`)
	door("GET", "/v1/workloads/none", "")
	door("GET", "/v1/workloads/Not_A_Label", "")
	door("GET", "/v1/workloads/web", "surprise")
	door("GET", "/v1/workloads/web", "", "Idempotency-Key: k")
	door("GET", "/v1/workloads?page_size=-1", "")
	door("GET", "/v1/workloads?page_size=many", "")
	door("GET", "/v1/workloads?page_token=xyz", "")
	door("GET", "/v1/workloads?label_selector=app", "")
	door("DELETE", "/v1/workloads/none", "")
	door("DELETE", "/v1/workloads/web", "", `If-Match: "1"`)
	door("POST", "/v1/workloads/web/scale", `{"replicas": 10001}`)
	door("POST", "/v1/workloads/web/scale", `{"replica": 3}`)
	door("POST", "/v1/workloads/web/scale?replicas=3", "")
	door("POST", "/v1/workloads/web/scale", "")
	door("POST", "/v1/workloads/web/scale", "{}")
	door("POST", "/v1/workloads/web/scale", `{"id": "other", "replicas": 3}`)
	door("POST", "/v1/workloads/web/scale", `{"replicas": 3}`, `If-Match: "1"`)
	door("POST", "/v1/workloads/all/scale", `{"replicas": 3}`)
	door("POST", "/v1/workloads/none/start", "")
	door("POST", "/v1/workloads/none/stop", "")
	door("POST", "/v1/workloads/going/restart", "")
	door("POST", "/v1/workloads/none/retry", "")
	door("GET", "/v1/workloads/none/why", "")
	door("POST", "/v1/plan", `{"id": "Web", "container": {}}`)
	door("POST", "/v1/plan", web, `If-None-Match: *`)
	door("POST", "/v1/plan", web, `If-Match: "1"`)
	door("POST", "/v1/plan", web, `Idempotency-Key: k`)
	door("GET", "/v1/workloads/none/logs", "")
	door("GET", "/v1/workloads/web/logs?tail=-1", "")
	door("GET", "/v1/workloads/web/logs?since=yesterday", "")
	door("GET", "/v1/workloads/web/logs?replica=7", "", "Accept: text/event-stream")
	door("GET", "/v1/workloads/web/logs", "")
	door("GET", "/v1/watch/workloads?from_revision=99999", "")
	door("GET", "/v1/watch/workloads?from=1", "")
	door("GET", "/v1/watch/events?tail=-1", "", "Accept: text/event-stream")
	door("GET", "/v1/nodes/none", "")
	door("GET", "/v1/nodes?ready=true", "")
	door("POST", "/v1/nodes/none/cordon", "")
	door("POST", "/v1/nodes/none/uncordon", "")
	door("POST", "/v1/nodes/n1/drain", `{"delay": "1h"}`)
	door("POST", "/v1/nodes/n1/labels", `{"set": {"a b": "c"}}`)
	door("DELETE", "/v1/nodes/n1", "")
	door("POST", "/v1/members/s9/promote", "")
	door("POST", "/v1/members/S9/demote", "")
	door("DELETE", "/v1/members/s9", "")
	door("POST", "/v1/cluster/transfer-leader", `{"name": "s9"}`)
	door("POST", "/v1/tokens", `{"role": "king"}`)
	door("POST", "/v1/tokens", `{"role": "admin", "ttl": "1y"}`)
	door("POST", "/v1/tokens", `{"role": "admin", "ttl": "1000h", "uses": -1}`)
	door("DELETE", "/v1/tokens/none", "")
	door("GET", "/v1/events?limit=-1", "")
	door("GET", "/v1/events?workload_id=A", "")
	door("GET", "/v1/nothing", "")
	door("PATCH", "/v1/workloads/web", web)
	door("GET", "/nothing", "")
	door("GET", "/workloads/none", "")
	door("POST", "/workloads/schedule", `{"name": "web"}`)
	w.role = pb.Role_ROLE_UNSPECIFIED
	door("GET", "/v1/workloads", "")
	door("GET", "/v1/watch/workloads", "")
	door("GET", "/metrics", "")
	door("GET", "/openapi.json", "")
	w.role = pb.Role_ROLE_AGENT
	door("GET", "/v1/nodes", "")
	door("GET", "/metrics", "")
	w.role = pb.Role_ROLE_VIEWER
	door("POST", "/v1/workloads", web)
	door("GET", "/v1/tokens", "")
	w.role = pb.Role_ROLE_METRICS
	door("GET", "/v1/workloads", "")
	w.role = pb.Role_ROLE_ADMIN
	w.store.down = errUnwell
	door("GET", "/v1/workloads", "")
	door("POST", "/v1/workloads", web)
	door("GET", "/readyz", "")
	door("GET", "/readyz?verbose", "")
	door("GET", "/health", "")
	w.store.down = nil
	// Versions depend on how many writes came before.
	text := regexp.MustCompile(`is at version \d+`).ReplaceAllString(out.String(), "is at version N")
	text = regexp.MustCompile(`1 to \d+, the newest`).ReplaceAllString(text, "1 to N, the newest")
	recorded(t, "testdata/problems.txt", text)
}

func TestWorkloadsOverREST(t *testing.T) {
	w := newWorld(t)
	resp, created := w.want(201, "POST", "/v1/workloads", web)
	etag := resp.Header.Get("ETag")
	if created["outcome"] != "CREATED" || resp.Header.Get("Location") != "/v1/workloads/web" || !regexp.MustCompile(`^"\d+"$`).MatchString(etag) {
		t.Errorf("created: %v, %v", created, resp.Header)
	}
	_, got := w.want(200, "GET", "/v1/workloads/web", "")
	spec := got["spec"].(map[string]any)
	if spec["type"] != "CONTAINER" || spec["kind"] != "SERVICE" || spec["desired_state"] != "DESIRED_RUNNING" || spec["replicas"] != 2.0 || got["status"].(map[string]any)["state"] != "PENDING" {
		t.Errorf("got: %v", got)
	}
	// What is answered can be written back.
	spec["id"] = "copy"
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	w.want(201, "POST", "/v1/workloads", string(data))
	resp, again := w.want(200, "PUT", "/v1/workloads/web", "id: web\nreplicas: 2\ncontainer: {image: nginx:1}\n", "Content-Type: application/yaml")
	if again["outcome"] != "UNCHANGED" || resp.Header.Get("ETag") != etag {
		t.Errorf("again: %v", again)
	}
	resp, changed := w.want(200, "PUT", "/v1/workloads/web", `{"container": {"image": "nginx:2"}}`, "If-Match: "+etag)
	if changed["outcome"] != "UPDATED" || resp.Header.Get("ETag") == etag {
		t.Errorf("changed: %v", changed)
	}
	w.want(412, "PUT", "/v1/workloads/web", `{"container": {"image": "nginx:3"}}`, "If-Match: "+etag)
	_, scaled := w.want(200, "POST", "/v1/workloads/web/scale", `{"replicas": 5}`)
	if scaled["spec"].(map[string]any)["replicas"] != 5.0 {
		t.Errorf("scaled: %v", scaled)
	}
	w.want(200, "POST", "/v1/workloads/web/stop", "")
	w.want(200, "POST", "/v1/workloads/web/start", "{}")
	_, restarted := w.want(200, "POST", "/v1/workloads/web/restart", "", "Content-Type: application/json")
	if restarted["restart_generation"] != "1" {
		t.Errorf("restarted: %v", restarted)
	}
	_, why := w.want(200, "GET", "/v1/workloads/web/why", "")
	if fmt.Sprint(why["lines"]) != "[pending: cpu (3 nodes)]" {
		t.Errorf("why: %v", why)
	}
	w.want(202, "DELETE", "/v1/workloads/web", "")
	w.want(202, "DELETE", "/v1/workloads/web", "")
	_, events := w.want(200, "GET", "/v1/events?workload_id=web&limit=2", "")
	list := events["events"].([]any)
	if len(list) != 2 || list[1].(map[string]any)["message"] != "deletion asked for" || list[1].(map[string]any)["actor"] != "admin/ann" {
		t.Errorf("events: %v", events)
	}
}

func TestRolloutsOverREST(t *testing.T) {
	w := newWorld(t)
	w.want(201, "POST", "/v1/workloads", web)
	w.want(409, "POST", "/v1/workloads/web/rollback", "")
	w.want(409, "POST", "/v1/workloads/web/promote", "")
	_, first := w.want(200, "GET", "/v1/workloads/web", "")
	if first["rollout"] != nil {
		t.Errorf("rollout: %v", first["rollout"])
	}
	_, second := w.want(200, "PUT", "/v1/workloads/web", `{"update": {"canary": 1}, "container": {"image": "nginx:2"}}`)
	revision := second["workload"].(map[string]any)["revision"].(string)
	w.put(model.RolloutKey("web"), &pb.Rollout{State: pb.RolloutState_ROLLOUT_AWAITING_PROMOTION, Revision: revision, Canaries: 1})
	_, got := w.want(200, "GET", "/v1/workloads/web", "")
	if r, _ := got["rollout"].(map[string]any); r["state"] != "ROLLOUT_AWAITING_PROMOTION" || r["canaries"] != 1.0 {
		t.Errorf("got: %v", got)
	}
	if _, promoted := w.want(200, "POST", "/v1/workloads/web/promote", ""); promoted["promoted_revision"] != revision {
		t.Errorf("promoted: %v", promoted)
	}
	if _, back := w.want(200, "POST", "/v1/workloads/web/rollback", "{}"); back["revision"] != first["revision"] {
		t.Errorf("back: %v", back)
	}
	w.want(404, "POST", "/v1/workloads/web/rollback", `{"revision": "feed"}`)
	_, list := w.want(200, "GET", "/v1/workloads/web/revisions", "")
	if all := list["revisions"].([]any); len(all) != 2 || list["current"] != first["revision"] || all[1].(map[string]any)["revision"] != revision {
		t.Errorf("revisions: %v", list)
	}
	w.want(404, "GET", "/v1/workloads/none/revisions", "")
}

func TestPlanOverREST(t *testing.T) {
	w := newWorld(t)
	_, created := w.want(200, "POST", "/v1/plan", web)
	if created["outcome"] != "CREATED" || created["revision"] == "" || len(created["placements"].([]any)) != 1 {
		t.Errorf("created: %v", created)
	}
	w.want(404, "GET", "/v1/workloads/web", "")
	w.want(201, "POST", "/v1/workloads", web)
	_, same := w.want(200, "POST", "/v1/plan", web)
	if same["outcome"] != "UNCHANGED" || len(same["changes"].([]any)) != 0 || same["unchanged"] != 1.0 {
		t.Errorf("unchanged: %v", same)
	}
	w.role = pb.Role_ROLE_VIEWER
	_, changed := w.want(200, "POST", "/v1/plan", `{"id": "web", "replicas": 3, "container": {"image": "nginx:2"}}`)
	if fmt.Sprint(changed["changes"]) != "[map[new:3 old:2 path:replicas] map[new:nginx:2 old:nginx:1 path:container.image]]" || changed["outcome"] != "UPDATED" {
		t.Errorf("changed: %v", changed)
	}
}

func TestIdempotencyKey(t *testing.T) {
	w := newWorld(t)
	_, first := w.want(201, "POST", "/v1/workloads?create_only=true", web, "Idempotency-Key: k1")
	w.want(200, "PUT", "/v1/workloads/web", `{"container": {"image": "nginx:other"}}`)
	_, again := w.want(201, "POST", "/v1/workloads?create_only=true", web, "Idempotency-Key: k1")
	if again["outcome"] != "CREATED" || again["workload"].(map[string]any)["uid"] != first["workload"].(map[string]any)["uid"] {
		t.Errorf("again: %v", again)
	}
	_, now := w.want(200, "GET", "/v1/workloads/web", "")
	if image := now["spec"].(map[string]any)["container"].(map[string]any)["image"]; image != "nginx:other" {
		t.Errorf("carried out again: %v", image)
	}
	w.want(400, "POST", "/v1/workloads", `{"id": "web", "container": {"image": "a"}}`, "Idempotency-Key: k1")
	w.want(409, "POST", "/v1/workloads?create_only=true", web, "Idempotency-Key: k2")
	// Another caller's key is another key.
	w.role = pb.Role_ROLE_OPERATOR
	w.want(409, "POST", "/v1/workloads?create_only=true", web, "Idempotency-Key: k1")
}

func TestPages(t *testing.T) {
	w := newWorld(t)
	for i := range 25 {
		w.apply(fmt.Sprintf("{id: w%02d, labels: {parity: %d}, process: {command: a}}", i, i%2))
	}
	w.apply("{id: w00-a, process: {command: a}}")
	seen := map[string]int{}
	token, pages := "", 0
	for {
		_, page := w.want(200, "GET", "/v1/workloads?page_size=7&page_token="+token, "")
		for _, one := range page["workloads"].([]any) {
			seen[one.(map[string]any)["spec"].(map[string]any)["id"].(string)]++
		}
		pages++
		if token, _ = page["next_page_token"].(string); token == "" {
			break
		}
		// What is put between pages is seen if it comes after.
		if pages == 1 {
			w.apply("{id: w99, process: {command: a}}")
		}
	}
	if len(seen) != 27 || pages != 4 {
		t.Errorf("%d workloads on %d pages", len(seen), pages)
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("%s seen %d times", id, n)
		}
	}
	_, odd := w.want(200, "GET", "/v1/workloads?label_selector=parity%3D1&page_size=5", "")
	if len(odd["workloads"].([]any)) != 5 {
		t.Errorf("odd: %v", odd)
	}
	w.want(400, "GET", "/v1/workloads?page_token="+odd["next_page_token"].(string), "")
	_, camel := w.want(200, "GET", "/v1/workloads?labelSelector=parity%3D1&pageSize=12", "")
	if len(camel["workloads"].([]any)) != 12 || camel["next_page_token"] != "" {
		t.Errorf("all odd: %v", camel["next_page_token"])
	}
}

func TestFormerRoutes(t *testing.T) {
	w := newWorld(t)
	w.put(model.NodeKey("n1"), &pb.Node{Id: "n1", State: pb.NodeState_READY})
	w.want(201, "POST", "/workloads/schedule", web)
	_, list := w.want(200, "GET", "/workloads?page_size=5", "")
	if len(list["workloads"].([]any)) != 1 {
		t.Errorf("list: %v", list)
	}
	w.want(200, "GET", "/workloads/web", "")
	w.want(200, "POST", "/workloads/web/retry", "")
	w.want(202, "DELETE", "/workloads/web", "")
	w.want(200, "GET", "/nodes", "")
	w.want(200, "GET", "/nodes/n1", "")
	w.want(200, "GET", "/clusters/c/nodes/n1", "")
	w.want(200, "GET", "/clusters/c/cluster/metrics", "")
	w.want(404, "GET", "/clusters/c2/nodes/n1", "")
	_, summary := w.want(200, "GET", "/cluster/metrics", "")
	if summary["nodes_ready"] != 1.0 || summary["leader"] != "s1" || summary["failure_tolerance"] != 1.0 {
		t.Errorf("summary: %v", summary)
	}
}

func TestNodesAndSummary(t *testing.T) {
	w := newWorld(t)
	w.put(model.NodeKey("n1"), &pb.Node{Id: "n1", State: pb.NodeState_READY, Capacity: &pb.NodeCapacity{CpuMillis: 4000, MemoryBytes: 100}})
	w.put(model.NodeLeaseKey("n1"), &pb.NodeLease{})
	w.put(model.NodeKey("n2"), &pb.Node{Id: "n2", State: pb.NodeState_NOT_READY, Capacity: &pb.NodeCapacity{CpuMillis: 4000}})
	w.put(model.AssignmentKey("web", 0), &pb.Assignment{WorkloadId: "web", NodeId: "n1", CpuMillis: 500, MemoryBytes: 10})
	w.put(model.AssignmentKey("web", 1), &pb.Assignment{WorkloadId: "web", Replica: 1, NodeId: "n1", CpuMillis: 500})
	w.apply(web)
	_, list := w.want(200, "GET", "/v1/nodes", "")
	if len(list["nodes"].([]any)) != 2 {
		t.Errorf("list: %v", list)
	}
	_, n := w.want(200, "GET", "/v1/nodes/n1", "")
	if n["assignments"] != 2.0 || n["reserved"].(map[string]any)["cpu_millis"] != "1000" || n["usage"].(map[string]any)["cpu_percent"] != 12.5 || n["last_heartbeat"] != "1970-01-01T00:00:01Z" {
		t.Errorf("node: %v", n)
	}
	_, n = w.want(200, "POST", "/v1/nodes/n1/drain", "")
	if n["draining"] != true || n["state"] != "DRAINING" {
		t.Errorf("drain: %v", n)
	}
	if _, n = w.want(200, "POST", "/v1/nodes/n1/drain", `{"deadline": "600s"}`); n["drain_deadline"] == nil {
		t.Errorf("drain by a deadline: %v", n)
	}
	w.want(400, "POST", "/v1/nodes/n1/drain", `{"deadline": "-1s"}`)
	w.want(200, "POST", "/v1/nodes/n1/uncordon", "")
	if _, c := w.want(200, "GET", "/v1/scheduler", ""); c["rebalance"] != nil && c["rebalance"] != false || c["rebalance_moves"] != 5.0 {
		t.Errorf("scheduler: %v", c)
	}
	_, c := w.want(200, "PUT", "/v1/scheduler", `{"rebalance": true, "rebalance_moves": 2}`)
	if c["rebalance"] != true || c["rebalance_moves"] != 2.0 || c["rebalance_threshold"] != 20.0 || c["resource_version"] == nil {
		t.Errorf("scheduler: %v", c)
	}
	w.want(400, "PUT", "/v1/scheduler", `{"rebalance_threshold": 200}`)
	w.want(409, "PUT", "/v1/scheduler", `{"resource_version": "1"}`)
	w.want(200, "POST", "/v1/nodes/n1/cordon", "")
	_, n = w.want(200, "POST", "/v1/nodes/n1/labels", "set: {zone: eu}")
	if n["user_labels"].(map[string]any)["zone"] != "eu" {
		t.Errorf("labels: %v", n)
	}
	_, n = w.want(200, "POST", "/v1/nodes/n1/taints", "set: [{key: dedicated, value: gpu, effect: NO_EXECUTE}]")
	if n["user_taints"].([]any)[0].(map[string]any)["effect"] != "NO_EXECUTE" {
		t.Errorf("taints: %v", n)
	}
	_, n = w.want(200, "POST", "/v1/nodes/n1/taints", "remove: [dedicated]")
	if n["user_taints"] != nil && len(n["user_taints"].([]any)) != 0 {
		t.Errorf("taints: %v", n)
	}
	_, s := w.want(200, "GET", "/v1/cluster", "")
	if s["nodes"] != 2.0 || s["nodes_ready"] != 1.0 || s["voters"] != 3.0 || s["capacity"].(map[string]any)["cpu_millis"] != "4000" ||
		s["reserved"].(map[string]any)["memory_bytes"] != "10" || s["workloads_by_state"].(map[string]any)["PENDING"] != 1.0 || s["cluster"].(map[string]any)["name"] != "test" {
		t.Errorf("summary: %v", s)
	}
	w.want(200, "DELETE", "/v1/nodes/n2", "")
	w.want(404, "GET", "/v1/nodes/n2", "")
}

func TestMembersOverREST(t *testing.T) {
	w := newWorld(t)
	w.want(200, "GET", "/v1/members", "")
	w.want(200, "POST", "/v1/members/s2/promote", "")
	w.want(200, "POST", "/v1/members/s2/demote", "")
	w.want(200, "DELETE", "/v1/members/s2", "")
	w.want(200, "POST", "/v1/cluster/transfer-leader", "")
	w.want(200, "POST", "/v1/cluster/transfer-leader", `{"name": "s3"}`)
	if got := strings.Join(w.control.changes, ", "); got != "PROMOTE s2, DEMOTE s2, REMOVE s2, TRANSFER , TRANSFER s3" {
		t.Errorf("changes: %s", got)
	}
}

func TestOtherRoutes(t *testing.T) {
	w := newWorld(t)
	w.role = pb.Role_ROLE_UNSPECIFIED
	for path, want := range map[string]string{
		"/livez": "ok\n", "/readyz": "ok\n", "/readyz?verbose": "[+] disk ok\n[+] leader ok\nok\n",
		"/health": `{"status":"ok","version":"v0","checks":{"disk":"ok","leader":"ok"}}` + "\n",
	} {
		if resp, text := w.call("GET", path, ""); resp.StatusCode != 200 || text != want {
			t.Errorf("%s: %d %q", path, resp.StatusCode, text)
		}
	}
	w.role = pb.Role_ROLE_METRICS
	if resp, text := w.call("GET", "/metrics", ""); resp.StatusCode != 200 || !strings.Contains(text, "persys_test 0") {
		t.Errorf("metrics: %d %s", resp.StatusCode, text)
	}
	w.role = pb.Role_ROLE_VIEWER
	_, api := w.want(200, "GET", "/openapi.json", "")
	if api["paths"].(map[string]any)["/v1/workloads"] == nil {
		t.Errorf("openapi: %v", api["info"])
	}
}

// The routes that are checked are those that the generated code has.
func TestRoutesMatchThePatterns(t *testing.T) {
	all, err := routes()
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	for key := range all {
		method, pattern, _ := strings.Cut(key, " ")
		path := regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(pattern, "x1")
		// Nobody asks, so that watches end.
		w.role = pb.Role_ROLE_UNSPECIFIED
		resp, text := w.call(method, path, "")
		if resp.StatusCode != 401 {
			t.Errorf("%s: %d %s", key, resp.StatusCode, text)
		}
	}
	if len(all) < 29 {
		t.Errorf("only %d routes", len(all))
	}
}

func TestRedeemOverGateway(t *testing.T) {
	w := newWorld(t)
	_, created := w.want(200, "POST", "/v1/tokens", `{"role": "agent", "ttl": "1h", "labels": {"zone": "eu"}}`)
	id, secret, _ := strings.Cut(created["secret"].(string), ".")
	_, list := w.want(200, "GET", "/v1/tokens", "")
	if text := fmt.Sprint(list); strings.Contains(text, secret) || strings.Contains(text, "secret_hash:[") || !strings.Contains(text, id) {
		t.Errorf("tokens: %s", text)
	}
	request := &pb.JoinRequest{TokenId: id, Secret: secret, Name: "n1", Csr: []byte("serial-1"), ClusterId: "c"}
	refused := func(want string, change func(*pb.JoinRequest)) {
		t.Helper()
		r := proto.CloneOf(request)
		change(r)
		if out, err := w.gateway.Join(t.Context(), r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v %v", r, out, err)
		}
	}
	refused(`the join token is for cluster "d", this is cluster "c"`, func(r *pb.JoinRequest) { r.ClusterId = "d" })
	refused("is not known to this cluster", func(r *pb.JoinRequest) { r.Secret = "x" })
	refused("secret: missing", func(r *pb.JoinRequest) { r.Secret = "" })
	refused("name:", func(r *pb.JoinRequest) { r.Name = "N1" })
	refused("csr:", func(r *pb.JoinRequest) { r.Csr = nil })
	refused("addresses:", func(r *pb.JoinRequest) { r.Addresses = []string{""} })
	out, err := w.gateway.Join(t.Context(), request)
	if err != nil || out.Role != pb.Role_ROLE_AGENT || out.Labels["zone"] != "eu" {
		t.Fatalf("%v %v", out, err)
	}
	if _, ok := w.store.View().Get(model.CertificateKey("serial-1")); !ok {
		t.Error("the certificate is not recorded")
	}
	refused("the join token is used up", func(r *pb.JoinRequest) { r.Csr = []byte("serial-2") })
	_, revoked := w.want(200, "DELETE", "/v1/tokens/"+id, "")
	if revoked["uses_left"] != 0.0 {
		t.Errorf("revoked: %v", revoked)
	}
}
