package etcd

import "testing"

func TestPutIsSeenThroughAnyReplica(t *testing.T) {
	c := newCluster(t, 3, nil)
	ctx := within(t, patience)
	for _, r := range c.replicas {
		if _, err := c.client(r.endpoint).Put(ctx, "key", r.name); err != nil {
			t.Fatal(err)
		}
		for _, other := range c.replicas {
			answer, err := c.client(other.endpoint).Get(ctx, "key")
			if err != nil || len(answer.Kvs) != 1 || string(answer.Kvs[0].Value) != r.name {
				t.Errorf("put at %s, read at %s: %v, %v", r.name, other.name, answer, err)
			}
		}
	}
}
