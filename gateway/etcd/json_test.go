package etcd

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// httpServer serves what the port for etcd's clients serves over HTTP.
func httpServer(t *testing.T, r *replica) string {
	t.Helper()
	handler, err := r.etcd.Handler(
		func(ctx context.Context, method string) (context.Context, error) {
			if method == "/etcdserverpb.Maintenance/Defragment" {
				return nil, status.Error(codes.PermissionDenied, "not admitted")
			}
			return ctx, nil
		},
		http.NotFoundHandler())
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(OnlyLocal(handler))
	t.Cleanup(s.Close)
	return s.URL
}

func send(t *testing.T, method, url, body string, header ...string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(within(t, patience), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
		if header[i] == "Host" {
			r.Host = header[i+1]
		}
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, strings.TrimSpace(string(data))
}

// varying is what differs from run to run.
var varying = regexp.MustCompile(`"(cluster_id|member_id)":"\d+",|,"raft_term":"\d+"`)

// What Patroni's etcd3.py sends, and what of the answers it looks at.
func TestPatroniConversation(t *testing.T) {
	c := newCluster(t, 1, nil)
	url := httpServer(t, c.leader())
	const leader, lease = "L3NlcnZpY2UvYi9sZWFkZXI=", "7587848390530" // /service/b/leader
	for _, x := range []struct {
		path, body string
		code       int
		want       string
	}{
		{"/v3/lease/grant", `{"TTL":30,"ID":"` + lease + `"}`, 200, `"ID":"` + lease + `","TTL":"30"}`},
		{"/v3/lease/keepalive", `{"ID":"` + lease + `"}`, 200, `{"result":{"header":{"revision":"2"},"ID":"` + lease + `","TTL":"30"}}`},
		{"/v3/kv/txn", `{"compare":[{"target":"CREATE","create_revision":"0","key":"` + leader + `"}],"success":[{"request_put":{"key":"` + leader + `","value":"bTE=","lease":"` + lease + `"}}]}`,
			200, `"succeeded":true,"responses":[{"response_put":{"header":{"revision":"3"}}}]}`},
		{"/v3/kv/txn", `{"compare":[{"target":"CREATE","create_revision":"0","key":"` + leader + `"}],"success":[{"request_put":{"key":"` + leader + `","value":"bTI="}}]}`, 200, `{"header":{"revision":"3"}}`},
		{"/v3/kv/range", `{"key":"L3NlcnZpY2UvYi8=","range_end":"L3NlcnZpY2UvYjA=","serializable":true}`, 200,
			`{"header":{"revision":"3"},"kvs":[{"key":"` + leader + `","create_revision":"3","mod_revision":"3","version":"1","value":"bTE=","lease":"` + lease + `"}],"count":"1"}`},
		{"/v3beta/kv/range", `{"key":"` + leader + `"}`, 200, `"count":"1"}`},
		{"/v3alpha/kv/range", `{"key":"` + leader + `"}`, 200, `"count":"1"}`},
		{"/v3/kv/put", `{"key":"` + leader + `","value":"bTE=","lease":"12"}`, 404, `{"error":"etcdserver: requested lease not found","message":"etcdserver: requested lease not found","code":5}`},
		{"/v3/kv/deleterange", `{"key":"` + leader + `"}`, 200, `{"header":{"revision":"4"},"deleted":"1"}`},
		{"/v3/auth/authenticate", `{"name":"u","password":"p"}`, 400, `{"error":"etcdserver: authentication is not enabled","message":"etcdserver: authentication is not enabled","code":9}`},
		{"/v3/cluster/member/list", `{}`, 200, `"clientURLs":["`},
		{"/v3/kv/range", `{}`, 400, `{"error":"etcdserver: key is not provided","message":"etcdserver: key is not provided","code":3}`},
		{"/v3/kv/range", `{"key":"YQ==","unknown":1}`, 200, `{"header":{"revision":"4"}}`}, // as in etcd
		{"/v3/kv/range", `{"key":"***"}`, 400, `"code":3}`},
		{"/v3/kv/range", `{"key":`, 400, `{"error":"unexpected EOF","message":"unexpected EOF","code":3}`},
		{"/v3/kv/range", `{"key":"YQ==","revision":"99"}`, 400, `"error":"etcdserver: mvcc: required revision is a future revision"`},
		{"/v3/watch", `{"create_request":5}`, 400, `"code":3}`}, // not a watch without end
		{"/v3/maintenance/defragment", `{}`, 403, `"error":"not admitted"`},
		{"/v3/lock/unlock", `{"key":"YQ=="}`, 200, `{"header":{"revision":"4"}}`},
		{"/v3/kv/none", `{}`, 404, `Not Found`},
		{"/v3/kv/put", `{"key":"YQ==","value":"` + strings.Repeat("YWFh", 1<<20) + `"}`, 400, `"error":"etcdserver: request is too large"`},
	} {
		code, got := send(t, http.MethodPost, url+x.path, x.body)
		if got = varying.ReplaceAllString(got, ""); code != x.code || !strings.Contains(got, x.want) {
			t.Errorf("%s %.200s\n got %d %.300s\nwant %d %s", x.path, x.body, code, got, x.code, x.want)
		}
	}
}

func TestHTTP(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.leader()
	url := httpServer(t, r)
	for _, x := range []struct {
		method, path string
		header       []string
		code         int
		want         string
	}{
		{"GET", "/version", nil, 200, `{"etcdserver":"3.`},
		{"GET", "/health", nil, 200, `{"health":"true","reason":""}`},
		{"GET", "/health?serializable=true", nil, 200, `{"health":"true","reason":""}`},
		{"POST", "/health", nil, 405, ""},
		{"GET", "/livez", nil, 200, "ok"},
		{"GET", "/readyz", nil, 200, "ok"},
		{"GET", "/v3/kv/range", nil, 405, ""},
		{"GET", "/", nil, 404, ""},
		{"GET", "/version", []string{"Host", "localhost:2379"}, 200, ""},
		{"GET", "/version", []string{"Host", "[::1]:2379"}, 200, ""},
		{"GET", "/version", []string{"Host", "evil.example"}, 421, "loopback"},
		{"POST", "/v3/kv/range", []string{"Origin", "http://evil.example"}, 403, `"code":7}`},
		{"POST", "/v3/kv/range", []string{"Sec-Fetch-Site", "cross-site"}, 403, `"code":7}`},
	} {
		if code, got := send(t, x.method, url+x.path, "", x.header...); code != x.code || !strings.Contains(got, x.want) {
			t.Errorf("%s %s %v: %d %s; want %d %s", x.method, x.path, x.header, code, got, x.code, x.want)
		}
	}
	if code, got := send(t, "POST", url+"/v3/maintenance/alarm", `{"action":"ACTIVATE","alarm":"NOSPACE"}`); code != 200 {
		t.Fatalf("%d %s", code, got)
	}
	for path, want := range map[string]string{
		"/health": `503 {"health":"false","reason":"ALARM NOSPACE"}`, "/health?exclude=NOSPACE": `200 {"health":"true","reason":""}`,
		"/health?exclude=CORRUPT": `503 {"health":"false","reason":"ALARM NOSPACE"}`, "/readyz": "503 ALARM NOSPACE", "/livez": "200 ok",
	} {
		if code, got := send(t, "GET", url+path, ""); fmt.Sprint(code, " ", got) != want {
			t.Errorf("%s: %d %s; want %s", path, code, got, want)
		}
	}
}

// A token of etcd's auth comes in the Authorization header, and in no other.
func TestTokenOverHTTP(t *testing.T) {
	c := newCluster(t, 1, func(c *Config) { c.BcryptCost = 4 })
	url, ctx, client := httpServer(t, c.leader()), within(t, patience), c.client()
	if _, err := client.UserAdd(ctx, "root", "pw"); err != nil {
		t.Fatal(err)
	}
	if _, err := client.UserGrantRole(ctx, "root", "root"); err != nil {
		t.Fatal(err)
	}
	if _, err := client.AuthEnable(ctx); err != nil {
		t.Fatal(err)
	}
	// Patroni asks for the members before it has a token.
	if code, got := send(t, "POST", url+"/v3/cluster/member/list", `{}`); code != 200 {
		t.Errorf("members: %d %s", code, got)
	}
	code, answer := send(t, "POST", url+"/v3/auth/authenticate", `{"name":"root","password":"pw"}`)
	var authenticated struct{ Token string }
	if err := json.Unmarshal([]byte(answer), &authenticated); err != nil || code != 200 || authenticated.Token == "" {
		t.Fatalf("%d %s", code, answer)
	}
	const get = `{"key":"YQ=="}`
	if code, got := send(t, "POST", url+"/v3/kv/range", get, "Authorization", authenticated.Token); code != 200 {
		t.Errorf("%d %s", code, got)
	}
	for header, want := range map[string]string{
		"Authorization": `401 {"error":"etcdserver: invalid auth token"`, "Grpc-Metadata-Token": `400 {"error":"etcdserver: user name is empty"`,
	} {
		token := authenticated.Token
		if header == "Authorization" {
			token += "x"
		}
		if code, got := send(t, "POST", url+"/v3/kv/range", get, header, token); !strings.HasPrefix(fmt.Sprint(code, " ", got), want) {
			t.Errorf("%s: %d %s", header, code, got)
		}
	}
}

// A watch over HTTP answers while it is asked, and says why it ends.
func TestWatchOverHTTP(t *testing.T) {
	c := newCluster(t, 1, nil)
	url, ctx, client := httpServer(t, c.leader()), within(t, patience), c.client()
	requests, ask := io.Pipe()
	defer ask.Close()
	r, err := http.NewRequestWithContext(ctx, "POST", url+"/v3/watch", requests)
	if err != nil {
		t.Fatal(err)
	}
	go fmt.Fprint(ask, `{"create_request":{"key":"YQ==","watch_id":"1"}}`)
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	expect := func(want string) {
		t.Helper()
		if !lines.Scan() || varying.ReplaceAllString(lines.Text(), "") != want {
			t.Fatalf("got %q, %v\nwant %s", lines.Text(), lines.Err(), want)
		}
	}
	expect(`{"result":{"header":{"revision":"2"},"watch_id":"1","created":true}}`)
	if _, err := client.Put(ctx, "a", "b"); err != nil {
		t.Fatal(err)
	}
	expect(`{"result":{"header":{"revision":"3"},"watch_id":"1","events":[{"kv":{"key":"YQ==","create_revision":"3","mod_revision":"3","version":"1","value":"Yg=="}}]}}`)
	go fmt.Fprint(ask, `{"create_request":{"key":"Yg==","watch_id":"2"}}`)
	expect(`{"result":{"header":{"revision":"3"},"watch_id":"2","created":true}}`)
	if _, err := client.Put(ctx, "b", "c", clientv3.WithPrevKV()); err != nil {
		t.Fatal(err)
	}
	expect(`{"result":{"header":{"revision":"4"},"watch_id":"2","events":[{"kv":{"key":"Yg==","create_revision":"4","mod_revision":"4","version":"1","value":"Yw=="}}]}}`)
	go fmt.Fprint(ask, `{"create_request":"nonsense"}`)
	if !lines.Scan() || !strings.Contains(lines.Text(), `"grpc_code":`) || !strings.Contains(lines.Text(), `"http_code":`) {
		t.Errorf("%q, %v", lines.Text(), lines.Err())
	}
	if lines.Scan() {
		t.Errorf("it goes on: %q", lines.Text())
	}
}
