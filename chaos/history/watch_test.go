package history

import (
	"testing"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestCheckWatch(t *testing.T) {
	was := func(kind Kind, value string, out Output) porcupine.Operation {
		return porcupine.Operation{Input: Input{Kind: kind, Key: "k", Value: value}, Output: out}
	}
	all := []porcupine.Operation{
		was(Put, "a", Output{Revision: 2}),
		was(Put, "b", Output{Unknown: true}),
		was(Delete, "", Output{Revision: 4, OK: true}),
		was(Swap, "c", Output{Revision: 5, OK: true}),
		was(Swap, "d", Output{Revision: 5}),
		was(Delete, "", Output{Unknown: true}),
	}
	put := func(value string, created, revision, version int64) *clientv3.Event {
		return &clientv3.Event{Kv: &mvccpb.KeyValue{
			Key: []byte("k"), Value: []byte(value), CreateRevision: created, ModRevision: revision, Version: version,
		}}
	}
	del := func(revision int64) *clientv3.Event {
		return &clientv3.Event{Type: mvccpb.DELETE, Kv: &mvccpb.KeyValue{Key: []byte("k"), ModRevision: revision}}
	}
	a, b, c := put("a", 2, 2, 1), put("b", 2, 3, 2), put("c", 5, 5, 1)
	for name, w := range map[string]struct {
		events []*clientv3.Event
		ok     bool
	}{
		"all":                          {[]*clientv3.Event{a, b, del(4), c, del(6)}, true},
		"without what is not known":    {[]*clientv3.Event{a, del(4), c}, true},
		"one is missing":               {[]*clientv3.Event{b, del(4), c}, false},
		"the last one is missing":      {[]*clientv3.Event{a, b, del(4)}, false},
		"a delete is missing":          {[]*clientv3.Event{a, b, c}, false},
		"twice":                        {[]*clientv3.Event{a, a, del(4), c}, false},
		"out of order":                 {[]*clientv3.Event{b, a, del(4), c}, false},
		"a gap between versions":       {[]*clientv3.Event{a, put("b", 2, 3, 3), del(4), c}, false},
		"another value":                {[]*clientv3.Event{put("x", 2, 2, 1), del(4), c}, false},
		"another revision":             {[]*clientv3.Event{put("a", 3, 3, 1), del(4), c}, false},
		"a swap that was refused":      {[]*clientv3.Event{a, del(4), c, put("d", 5, 6, 2)}, false},
		"what is not known, but twice": {[]*clientv3.Event{a, b, del(4), c, del(6), put("b", 7, 7, 1)}, false},
		"a delete of nothing":          {[]*clientv3.Event{a, del(4), del(5)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if err := CheckWatch(all, w.events); (err == nil) != w.ok {
				t.Errorf("%v", err)
			}
		})
	}
	if left := Latest([]*clientv3.Event{a, b, del(4), c}); len(left) != 1 || left["k"] != c.Kv {
		t.Errorf("%v", left)
	}
	if left := Latest([]*clientv3.Event{a, del(4)}); len(left) != 0 {
		t.Errorf("%v", left)
	}
}
