package procs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestWorkloadsThroughEtcd runs a workload's whole life with puts, watches and
// deletes of an etcd client, beside REST.
func TestWorkloadsThroughEtcd(t *testing.T) {
	c := New(t, program)
	listen := fmt.Sprintf("127.%d.%d.1:7483", 100+os.Getpid()%100, c.network)
	server := c.Init("s1", "--etcd-listen", listen)
	c.Join("agent", "a1", "--docker-host", "none")
	c.clean()
	c.Eventually("a node is ready", soon, func() error { return c.readyNodes(1) })
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + listen}, DialTimeout: callTimeout})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*callTimeout)
	defer cancel()

	watch := client.Watch(ctx, "/workloads/web", clientv3.WithCreatedNotify())
	<-watch
	const key = "/workloads/web"
	if _, err := client.Put(ctx, key, `{"replicas": 2, "process": {"command": "sleep", "args": ["1000"]}}`); err != nil {
		t.Fatal(err)
	}
	c.runs("web", 2)
	shown, err := client.Get(ctx, key)
	if err != nil || len(shown.Kvs) != 1 {
		t.Fatalf("%v, %v", shown, err)
	}
	// What etcd shows is what REST shows, but for what is kept elsewhere.
	_, body, err := c.REST(ctx, server, http.MethodGet, "/v1"+key, "")
	if err != nil {
		t.Fatal(err)
	}
	var one, other map[string]any
	if err := errors.Join(json.Unmarshal(shown.Kvs[0].Value, &one), json.Unmarshal([]byte(body), &other)); err != nil {
		t.Fatal(err)
	}
	delete(other, "status")
	delete(other, "replicas")
	delete(other, "rollout")
	if a, b := fmt.Sprint(one), fmt.Sprint(other); a != b {
		t.Errorf("etcd shows\n%s\nand REST\n%s", a, b)
	}

	// Read, modify, write; and what is refused.
	if _, err := client.Put(ctx, key, strings.Replace(string(shown.Kvs[0].Value), `"replicas":2`, `"replicas":1`, 1)); err != nil {
		t.Fatal(err)
	}
	c.runs("web", 1)
	if _, err := client.Put(ctx, "/assignments/x", "y"); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "written only by the scheduler") {
		t.Errorf("put of an assignment: %v", err)
	}
	if _, err := client.Put(ctx, "/nodes/a1", `{"unschedulable": true}`); err != nil {
		t.Errorf("cordon: %v", err)
	}

	// A delete takes effect, and then the key goes.
	if gone, err := client.Delete(ctx, "/workloads/", clientv3.WithPrefix()); err != nil || gone.Deleted != 1 {
		t.Fatalf("%v, %v", gone, err)
	}
	c.Eventually("all of it is gone", soon, func() error {
		for _, prefix := range []string{"/workloads/", "/assignments/", "/replicas/"} {
			left, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
			if err != nil || left.Count != 0 {
				return fmt.Errorf("below %s: %v, %v", prefix, left, err)
			}
		}
		return nil
	})
	var seen []string
	for len(seen) == 0 || seen[len(seen)-1] != "DELETE" {
		answer, ok := <-watch
		if err := answer.Err(); !ok || err != nil {
			t.Fatalf("the watch ended: %v", err)
		}
		for _, e := range answer.Events {
			what := e.Type.String()
			if strings.Contains(string(e.Kv.Value), "DESIRED_DELETED") {
				what = "deleting"
			}
			seen = append(seen, what)
		}
	}
	if got := strings.Join(seen, " "); got != "PUT PUT deleting DELETE" {
		t.Errorf("watched: %s", got)
	}
}
