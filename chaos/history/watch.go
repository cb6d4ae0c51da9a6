package history

import (
	"fmt"
	"maps"
	"slices"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// change is what an operation or an event does to a key.
type change struct {
	key, value string
	deleted    bool
}

// CheckWatch fails unless the events are all changes of the operations' keys, each
// once and in order, as a watch from the first revision must give them. What has an
// unknown outcome may be among them, or not. Values must not be written twice.
func CheckWatch(all []porcupine.Operation, events []*clientv3.Event) error {
	if err := checkOrder(events); err != nil {
		return err
	}
	acknowledged, unknown := map[int64]change{}, map[change]int{}
	for _, o := range all {
		in, out := o.Input.(Input), o.Output.(Output)
		c := change{key: in.Key, value: in.Value, deleted: in.Kind == Delete}
		switch {
		case out.Unknown:
			unknown[c]++
		case changed(o):
			acknowledged[out.Revision] = c
		}
	}
	for _, e := range events {
		c := change{key: string(e.Kv.Key), value: string(e.Kv.Value), deleted: e.Type == mvccpb.DELETE}
		switch was, ok := acknowledged[e.Kv.ModRevision]; {
		case ok && was == c:
			delete(acknowledged, e.Kv.ModRevision)
		case ok:
			return fmt.Errorf("history: the watch gave %+v at revision %d, which was acknowledged to %+v", c, e.Kv.ModRevision, was)
		case unknown[c] > 0:
			unknown[c]--
		default:
			return fmt.Errorf("history: the watch gave %+v at revision %d, which nobody asked for, or was told otherwise", c, e.Kv.ModRevision)
		}
	}
	if len(acknowledged) > 0 {
		revision := slices.Min(slices.Collect(maps.Keys(acknowledged)))
		return fmt.Errorf("history: %+v was acknowledged at revision %d, and the watch did not give it", acknowledged[revision], revision)
	}
	return nil
}

// checkOrder fails where revisions do not grow or the versions of a key have a gap.
func checkOrder(events []*clientv3.Event) error {
	keys := map[string]*mvccpb.KeyValue{}
	last := int64(0)
	for _, e := range events {
		if e.Kv.ModRevision <= last {
			return fmt.Errorf("history: the watch gave %v after revision %d", e, last)
		}
		last = e.Kv.ModRevision
		key := string(e.Kv.Key)
		was := keys[key]
		if e.Type == mvccpb.DELETE {
			if was == nil {
				return fmt.Errorf("history: the watch gave %v, where there was no such key", e)
			}
			delete(keys, key)
			continue
		}
		if e.Kv.Version != was.GetVersion()+1 || was != nil && e.Kv.CreateRevision != was.CreateRevision {
			return fmt.Errorf("history: the watch gave %v after %v", e, was)
		}
		keys[key] = e.Kv
	}
	return nil
}

// Latest are the keys that the events leave.
func Latest(events []*clientv3.Event) map[string]*mvccpb.KeyValue {
	keys := map[string]*mvccpb.KeyValue{}
	for _, e := range events {
		if e.Type == mvccpb.DELETE {
			delete(keys, string(e.Kv.Key))
		} else {
			keys[string(e.Kv.Key)] = e.Kv
		}
	}
	return keys
}
