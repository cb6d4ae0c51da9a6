package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// listener reads a stream line by line.
type listener struct {
	t     *testing.T
	resp  *http.Response
	lines *bufio.Scanner
}

func (w *world) listen(path string, headers ...string) *listener {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 20*time.Second)
	w.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, "GET", w.url+path, nil)
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
	w.Cleanup(func() { resp.Body.Close() })
	return &listener{w.T, resp, bufio.NewScanner(resp.Body)}
}

// next is the next line that is not empty.
func (l *listener) next() string {
	l.t.Helper()
	for l.lines.Scan() {
		if l.lines.Text() != "" {
			return l.lines.Text()
		}
	}
	l.t.Fatalf("the stream has ended: %v", l.lines.Err())
	return ""
}

// event is the next event: its id and its document.
func (l *listener) event() (string, map[string]any) {
	l.t.Helper()
	id := ""
	for {
		line := l.next()
		if v, ok := strings.CutPrefix(line, "id: "); ok {
			id = v
		}
		if v, ok := strings.CutPrefix(line, "data: "); ok {
			var document map[string]any
			if err := json.Unmarshal([]byte(v), &document); err != nil {
				l.t.Fatal(err)
			}
			return id, document
		}
	}
}

func changeOf(document map[string]any) string {
	w := document["workload"].(map[string]any)
	spec := w["spec"].(map[string]any)
	if document["deleted"] == true {
		return fmt.Sprint(spec["id"], " deleted")
	}
	return fmt.Sprintf("%s %v %v %v", spec["id"], spec["replicas"], w["status"].(map[string]any)["state"], len(w["replicas"].([]any)))
}

const sse = "Accept: text/event-stream"

func TestWatchWorkloads(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	w.apply("{id: web-2, process: {command: a}}")
	all := w.listen("/v1/watch/workloads", sse)
	if _, document := w.listen("/v1/watch/workloads?id=nothing", sse).event(); changeOf(document) != "nothing deleted" {
		t.Errorf("what is not there: %v", document)
	}
	if kind := all.resp.Header.Get("Content-Type"); kind != "text/event-stream" {
		t.Fatalf("content type %s", kind)
	}
	want := func(l *listener, text string) string {
		t.Helper()
		id, document := l.event()
		if got := changeOf(document); got != text {
			t.Errorf("%s, want %s", got, text)
		}
		if id != document["revision"] {
			t.Errorf("id %s, revision %v", id, document["revision"])
		}
		return id
	}
	want(all, "web 2 PENDING 0")
	resume := want(all, "web-2 1 PENDING 0")
	w.apply(strings.Replace(web, "2", "3", 1))
	want(all, "web 3 PENDING 0")
	one := w.listen("/v1/watch/workloads?id=web", sse)
	want(one, "web 3 PENDING 0")
	w.put(model.ReplicaKey("web-2", 0), &pb.Replica{WorkloadId: "web-2"})
	w.put(model.ReplicaKey("web", 0), &pb.Replica{WorkloadId: "web", State: pb.State_RUNNING})
	want(one, "web 3 PENDING 1")
	w.put(model.WorkloadStatusKey("web"), &pb.WorkloadStatus{State: pb.State_RUNNING})
	want(one, "web 3 RUNNING 1")
	want(all, "web 3 RUNNING 0")
	w.do(&pb.Txn{Success: []*pb.RequestOp{model.Delete(model.WorkloadKey("web")), model.Delete(model.WorkloadStatusKey("web"))}})
	want(all, "web deleted")
	want(one, "web deleted")
	// What was missed is told to a browser that reconnects.
	again := w.listen("/v1/watch/workloads", sse, "Last-Event-ID: "+resume)
	want(again, "web deleted")
	w.apply(web)
	for _, l := range []*listener{again, all, one} {
		_, document := l.event()
		if !strings.HasPrefix(changeOf(document), "web 2 PENDING") {
			t.Errorf("created again: %v", document)
		}
	}
}

func TestWatchCompacted(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	from := w.store.View().Revision()
	lines := w.listen(fmt.Sprintf("/v1/watch/workloads?from_revision=%d", from))
	if kind := lines.resp.Header.Get("Content-Type"); kind != "application/x-ndjson" {
		t.Fatalf("content type %s", kind)
	}
	w.apply("{id: late, process: {command: a}}")
	if line := lines.next(); !strings.Contains(line, `"id":"late"`) {
		t.Errorf("line %s", line)
	}
	rev := w.put("/other", &pb.Workload{})
	w.do(&pb.Txn{Success: []*pb.RequestOp{{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: rev}}}}})
	resp, text := w.call("GET", fmt.Sprintf("/v1/watch/workloads?from_revision=%d", from), "")
	if resp.StatusCode != http.StatusGone || !strings.Contains(text, "compacted: ") || !strings.Contains(text, `"code":"OUT_OF_RANGE"`) {
		t.Errorf("%d %s", resp.StatusCode, text)
	}
}

func TestWatchEvents(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	w.apply("{id: other, process: {command: a}}")
	w.apply(strings.Replace(web, "2", "3", 1))
	l := w.listen("/v1/watch/events?tail=5&workload_id=web", sse)
	for i, want := range []string{"WORKLOAD_SUBMITTED", "WORKLOAD_UPDATED", "WORKLOAD_UPDATED"} {
		if i == 2 {
			w.apply("{id: other, process: {command: b}}")
			w.apply(strings.Replace(web, "2", "4", 1))
		}
		if _, e := l.event(); e["type"] != want || e["workload_id"] != "web" || e["id"] == "" {
			t.Errorf("event %v, want %s", e, want)
		}
	}
}

func TestLogs(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	w.put(model.AssignmentKey("web", 0), &pb.Assignment{WorkloadId: "web", Replica: 0, NodeId: "n1", Generation: 1})
	w.put(model.AssignmentKey("web", 1), &pb.Assignment{WorkloadId: "web", Replica: 1, NodeId: "n2", Generation: 1})
	w.control.lines = map[string][]string{"n1": {"a", "b"}}
	one := w.listen("/v1/workloads/web/logs?replica=0&follow=true", sse)
	for _, want := range []string{"a", "b"} {
		if _, chunk := one.event(); chunk["line"] != want || chunk["node_id"] != "n1" {
			t.Errorf("chunk %v", chunk)
		}
	}
	both := w.listen("/v1/workloads/web/logs")
	var got []string
	for range 3 {
		got = append(got, both.next())
	}
	if !strings.Contains(got[0], `"line":"a"`) || !strings.Contains(got[1], `"line":"b"`) || !strings.Contains(got[2], "replica 1 on n2: ") || !strings.HasPrefix(got[2], `{"error":{`) {
		t.Errorf("lines %v", got)
	}
	// Whether the stream has begun by then, and so 200 is said, is a matter of time.
	if _, text := w.call("GET", "/v1/workloads/web/logs?replica=1", ""); !strings.Contains(text, `"code":"UNAVAILABLE"`) {
		t.Errorf("logs of a node that is away: %s", text)
	}
}

// A job with a schedule has no logs itself, and that is no matter of waiting.
func TestLogsOfSchedule(t *testing.T) {
	w := newWorld(t)
	w.apply("{id: tick, kind: job, schedule: {cron: '@daily'}, process: {command: a}}")
	if _, text := w.call("GET", "/v1/workloads/tick/logs", ""); !strings.Contains(text, "persys describe tick lists the runs") {
		t.Errorf("%s", text)
	}
}

// A change is admitted anew when somebody was quicker, but not for ever.
func TestConflicts(t *testing.T) {
	w := newWorld(t)
	w.apply(web)
	times := 3
	w.store.before = func(*pb.Txn) {
		if times--; times >= 0 {
			wl := &pb.Workload{}
			if _, _, err := model.Load(w.store.View(), model.WorkloadKey("web"), wl); err != nil {
				t.Error(err)
			}
			wl.RestartGeneration++
			w.put(model.WorkloadKey("web"), wl)
		}
	}
	for _, key := range []string{"", "k"} {
		times = 3
		out, err := w.gateway.ApplyWorkload(w.as(pb.Role_ROLE_ADMIN), &pb.ApplyWorkloadRequest{Spec: specOf(t, "{id: web, env: {KEY: 'x"+key+"'}, container: {image: a}}"), IdempotencyKey: key})
		if err != nil || out.Workload.RestartGeneration == 0 {
			t.Errorf("key %q: %v %v", key, out, err)
		}
	}
	times = 1000
	_, err := w.gateway.ScaleWorkload(w.as(pb.Role_ROLE_ADMIN), &pb.ScaleWorkloadRequest{Id: "web", Replicas: proto.Int32(7)})
	if status.Code(err) != codes.Aborted {
		t.Errorf("conflicts without end: %v", err)
	}
}

// The identity is that of the TLS connection and of nothing else.
func TestIdentityOverTLS(t *testing.T) {
	w := newWorld(t)
	authority, err := pki.NewAuthority("c")
	if err != nil {
		t.Fatal(err)
	}
	credentials := func(role pb.Role, name string) *pki.Credentials {
		key, csr, err := pki.NewKeyAndCSR(name)
		if err != nil {
			t.Fatal(err)
		}
		chain, _, _, err := authority.Issue(csr, pki.Identity{Cluster: "c", Role: role, Name: name}, []string{"127.0.0.1"}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		c, err := pki.NewCredentials(key, chain, authority.Roots())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	server := httptest.NewUnstartedServer(w.gateway.Handler())
	server.TLS = credentials(pb.Role_ROLE_SERVER, "s1").ServerTLS("http/1.1")
	server.StartTLS()
	t.Cleanup(server.Close)
	w.url = server.URL
	as := func(c *pki.Credentials) {
		tls := c.ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "http/1.1")
		w.client = &http.Client{Transport: &http.Transport{TLSClientConfig: tls}}
		t.Cleanup(w.client.CloseIdleConnections)
	}
	as(credentials(pb.Role_ROLE_VIEWER, "vic"))
	w.want(200, "GET", "/v1/workloads", "")
	spoof := []string{"Grpc-Metadata-Identity: admin/ann", "Grpcgateway-Authorization: admin", "X-Forwarded-Client-Cert: URI=spiffe://c/admin/ann", "Authorization: Bearer admin"}
	if _, p := w.want(403, "POST", "/v1/workloads", web, spoof...); !strings.HasPrefix(p["detail"].(string), "viewer/vic may not call") {
		t.Errorf("problem: %v", p)
	}
	as(credentials(pb.Role_ROLE_OPERATOR, "olga"))
	w.want(201, "POST", "/v1/workloads", web)
	_, events := w.want(200, "GET", "/v1/events", "")
	if actor := events["events"].([]any)[0].(map[string]any)["actor"]; actor != "operator/olga" {
		t.Errorf("actor: %v", actor)
	}
	nobody := credentials(pb.Role_ROLE_VIEWER, "x").ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "http/1.1")
	nobody.Certificates, nobody.GetClientCertificate = nil, nil
	w.client = &http.Client{Transport: &http.Transport{TLSClientConfig: nobody}}
	t.Cleanup(w.client.CloseIdleConnections)
	w.want(200, "GET", "/livez", "")
	w.want(401, "GET", "/v1/workloads", "", spoof...)
}
