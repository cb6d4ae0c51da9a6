package fsm_test

import (
	"bytes"
	"cmp"
	"maps"
	"slices"
	"sort"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// model is the keyspace in its simplest form: a whole copy of the map for each
// revision, and a list of everything that ever happened. It knows nothing of
// trees, batches or snapshots.
type model struct {
	rev, compacted int64
	states         map[int64]map[string]*pb.KeyValue
	log            []*pb.KeyEvent // with prev_kv
	leases         map[int64]int64
	answers        map[string]*pb.TxnResult
}

func newModel() *model {
	return &model{
		rev: 1, compacted: -1,
		states:  map[int64]map[string]*pb.KeyValue{1: {}},
		leases:  map[int64]int64{},
		answers: map[string]*pb.TxnResult{},
	}
}

type failure struct{ code pb.TxnError }

// apply works on a copy and throws it away when anything fails.
func (m *model) apply(t *pb.Txn) (result *pb.TxnResult, events []*pb.KeyEvent) {
	if first, ok := m.answers[string(t.RequestId)]; ok && len(t.RequestId) > 0 {
		return first, nil
	}
	if overlapping(t.Success) || overlapping(t.Failure) {
		return &pb.TxnResult{Error: pb.TxnError_TXN_ERROR_DUPLICATE_KEY}, nil
	}
	w := &modelTxn{m: m, begin: m.rev, compacted: m.compacted, kvs: maps.Clone(m.states[m.rev]), leases: maps.Clone(m.leases)}
	defer func() {
		if r := recover(); r != nil {
			result, events = &pb.TxnResult{Error: r.(failure).code}, nil
		}
	}()
	path := w.compares(t)
	response := w.txn(t, &path)
	w.settle(response)
	m.leases, m.compacted = w.leases, w.compacted
	if len(w.events) > 0 {
		m.rev++
		m.states[m.rev] = w.kvs
		m.log = append(m.log, w.events...)
	}
	result = &pb.TxnResult{Response: response}
	if len(t.RequestId) > 0 {
		m.answers[string(t.RequestId)] = result
	}
	return result, w.events
}

// eventsAfter is what a view must show: prev_kv only where it is not compacted.
func (m *model) eventsAfter(rev int64) []*pb.KeyEvent {
	var events []*pb.KeyEvent
	for _, e := range m.log {
		if e.Kv.ModRevision <= rev {
			continue
		}
		if e.Kv.ModRevision <= m.compacted {
			e = proto.CloneOf(e)
			e.PrevKv = nil
		}
		events = append(events, e)
	}
	return events
}

func inRange(key string, from, end []byte) bool {
	switch {
	case len(end) == 0:
		return key == string(from)
	case string(end) == "\x00":
		return key >= string(from)
	default:
		return key >= string(from) && key < string(end)
	}
}

func selected(kvs map[string]*pb.KeyValue, from, end []byte) []*pb.KeyValue {
	var found []*pb.KeyValue
	for _, key := range slices.Sorted(maps.Keys(kvs)) {
		if inRange(key, from, end) {
			found = append(found, kvs[key])
		}
	}
	return found
}

// read is etcd's server/etcdserver/txn/range.go, step by step.
func (m *model) read(r *pb.RangeRequest) (*pb.RangeResponse, pb.TxnError) {
	return readFrom(m.states, m.states[m.rev], m.rev, m.compacted, r)
}

func readFrom(states map[int64]map[string]*pb.KeyValue, newest map[string]*pb.KeyValue, rev, compacted int64, r *pb.RangeRequest) (*pb.RangeResponse, pb.TxnError) {
	kvs := newest
	if r.Revision > 0 {
		if r.Revision > rev {
			return nil, pb.TxnError_TXN_ERROR_FUTURE_REVISION
		}
		if r.Revision < compacted {
			return nil, pb.TxnError_TXN_ERROR_COMPACTED
		}
		if r.Revision < rev {
			kvs = states[r.Revision]
		}
	}
	found := selected(kvs, r.Key, r.RangeEnd)
	resp := &pb.RangeResponse{Revision: rev, Count: int64(len(found))}
	if r.CountOnly {
		return resp, 0
	}
	filtered := r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0
	if r.Limit > 0 && r.SortOrder == pb.RangeRequest_NONE && !filtered && int64(len(found)) > r.Limit {
		found = found[:r.Limit+1]
	}
	found = slices.DeleteFunc(found, func(kv *pb.KeyValue) bool {
		return r.MaxModRevision != 0 && kv.ModRevision > r.MaxModRevision ||
			kv.ModRevision < r.MinModRevision ||
			r.MaxCreateRevision != 0 && kv.CreateRevision > r.MaxCreateRevision ||
			kv.CreateRevision < r.MinCreateRevision
	})
	sign := 1
	if r.SortOrder == pb.RangeRequest_DESCEND {
		sign = -1
	}
	sort.SliceStable(found, func(i, j int) bool {
		a, b := found[i], found[j]
		var c int
		switch r.SortTarget {
		case pb.RangeRequest_KEY:
			c = bytes.Compare(a.Key, b.Key)
		case pb.RangeRequest_VERSION:
			c = cmp.Compare(a.Version, b.Version)
		case pb.RangeRequest_CREATE:
			c = cmp.Compare(a.CreateRevision, b.CreateRevision)
		case pb.RangeRequest_MOD:
			c = cmp.Compare(a.ModRevision, b.ModRevision)
		case pb.RangeRequest_VALUE:
			c = bytes.Compare(a.Value, b.Value)
		}
		return sign*c < 0
	})
	if r.Limit > 0 && int64(len(found)) > r.Limit {
		found, resp.More = found[:r.Limit], true
	}
	for _, kv := range found {
		kv = proto.CloneOf(kv)
		if r.KeysOnly {
			kv.Value = nil
		}
		resp.Kvs = append(resp.Kvs, kv)
	}
	return resp, 0
}

// overlapping is etcd's rule on puts and deletes of one key (checkIntervals in
// server/etcdserver/api/v3rpc/key.go), with lists.
func overlapping(ops []*pb.RequestOp) bool {
	_, _, bad := writes(ops)
	return bad
}

func writes(ops []*pb.RequestOp) (puts map[string]bool, dels []*pb.DeleteRangeRequest, bad bool) {
	puts = map[string]bool{}
	deleted := func(key string) bool {
		return slices.ContainsFunc(dels, func(d *pb.DeleteRangeRequest) bool {
			return string(d.RangeEnd) != "\x00" && inRange(key, d.Key, d.RangeEnd)
		})
	}
	for _, op := range ops {
		if d := op.GetRequestDeleteRange(); d != nil {
			dels = append(dels, d)
		}
	}
	for _, op := range ops {
		t := op.GetRequestTxn()
		if t == nil {
			continue
		}
		p1, d1, bad1 := writes(t.Success)
		p2, d2, bad2 := writes(t.Failure)
		if bad1 || bad2 {
			return nil, nil, true
		}
		maps.Copy(p1, p2)
		for key := range p1 {
			if puts[key] || deleted(key) {
				return nil, nil, true
			}
		}
		maps.Copy(puts, p1)
		dels = append(append(dels, d1...), d2...)
	}
	for _, op := range ops {
		if p := op.GetRequestPut(); p != nil {
			if puts[string(p.Key)] || deleted(string(p.Key)) {
				return nil, nil, true
			}
			puts[string(p.Key)] = true
		}
	}
	return puts, dels, false
}

// modelTxn is a transaction under way on a copy.
type modelTxn struct {
	m                *model
	begin, compacted int64
	kvs              map[string]*pb.KeyValue
	leases           map[int64]int64
	events           []*pb.KeyEvent
}

func fail(code pb.TxnError) { panic(failure{code}) }

func (w *modelTxn) revision() int64 {
	if len(w.events) > 0 {
		return w.begin + 1
	}
	return w.begin
}

func (w *modelTxn) compares(t *pb.Txn) []bool {
	all := true
	for _, c := range t.Compare {
		all = all && w.compare(c)
	}
	path := []bool{all}
	for _, op := range taken(t, all) {
		if n := op.GetRequestTxn(); n != nil {
			path = append(path, w.compares(n)...)
		}
	}
	return path
}

func taken(t *pb.Txn, ok bool) []*pb.RequestOp {
	if ok {
		return t.Success
	}
	return t.Failure
}

func (w *modelTxn) compare(c *pb.Compare) bool {
	found := selected(w.kvs, c.Key, c.RangeEnd)
	if len(found) == 0 {
		if c.Target == pb.Compare_VALUE {
			return false
		}
		found = []*pb.KeyValue{{}}
	}
	for _, kv := range found {
		var o int
		switch c.Target {
		case pb.Compare_VERSION:
			o = cmp.Compare(kv.Version, c.GetVersion())
		case pb.Compare_CREATE:
			o = cmp.Compare(kv.CreateRevision, c.GetCreateRevision())
		case pb.Compare_MOD:
			o = cmp.Compare(kv.ModRevision, c.GetModRevision())
		case pb.Compare_LEASE:
			o = cmp.Compare(kv.Lease, c.GetLease())
		case pb.Compare_VALUE:
			o = bytes.Compare(kv.Value, c.GetValue())
		}
		ok := map[pb.Compare_Result]bool{
			pb.Compare_EQUAL: o == 0, pb.Compare_GREATER: o > 0, pb.Compare_LESS: o < 0, pb.Compare_NOT_EQUAL: o != 0,
		}
		if !ok[c.Result] {
			return false
		}
	}
	return true
}

func (w *modelTxn) txn(t *pb.Txn, path *[]bool) *pb.TxnResponse {
	response := &pb.TxnResponse{Succeeded: (*path)[0]}
	*path = (*path)[1:]
	for _, op := range taken(t, response.Succeeded) {
		answer := new(pb.ResponseOp)
		switch r := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			resp, code := readFrom(w.m.states, w.kvs, w.revision(), w.compacted, r.RequestRange)
			switch rev := r.RequestRange.Revision; {
			case rev > w.begin:
				code = pb.TxnError_TXN_ERROR_FUTURE_REVISION
			case rev < w.compacted && rev != 0:
				code = pb.TxnError_TXN_ERROR_COMPACTED
			}
			if code != 0 {
				fail(code)
			}
			answer.Response = &pb.ResponseOp_ResponseRange{ResponseRange: resp}
		case *pb.RequestOp_RequestPut:
			answer.Response = &pb.ResponseOp_ResponsePut{ResponsePut: w.put(r.RequestPut)}
		case *pb.RequestOp_RequestDeleteRange:
			d := r.RequestDeleteRange
			resp := new(pb.DeleteRangeResponse)
			for _, kv := range selected(w.kvs, d.Key, d.RangeEnd) {
				resp.Deleted++
				if d.PrevKv {
					resp.PrevKvs = append(resp.PrevKvs, kv)
				}
				w.delete(kv)
			}
			answer.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: resp}
		case *pb.RequestOp_RequestTxn:
			answer.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: w.txn(r.RequestTxn, path)}
		case *pb.RequestOp_LeaseGrant:
			if w.leases[r.LeaseGrant.Id] != 0 {
				fail(pb.TxnError_TXN_ERROR_LEASE_EXISTS)
			}
			w.leases[r.LeaseGrant.Id] = r.LeaseGrant.TtlSeconds
		case *pb.RequestOp_LeaseRevoke:
			if w.leases[r.LeaseRevoke.Id] == 0 {
				fail(pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND)
			}
			for _, kv := range selected(w.kvs, []byte{0}, []byte{0}) {
				if kv.Lease == r.LeaseRevoke.Id {
					w.delete(kv)
				}
			}
			delete(w.leases, r.LeaseRevoke.Id)
		case *pb.RequestOp_Compact:
			if r.Compact.Revision <= w.compacted {
				fail(pb.TxnError_TXN_ERROR_COMPACTED)
			}
			if r.Compact.Revision > w.begin {
				fail(pb.TxnError_TXN_ERROR_FUTURE_REVISION)
			}
			w.compacted = r.Compact.Revision
		}
		response.Responses = append(response.Responses, answer)
	}
	return response
}

func (w *modelTxn) put(p *pb.PutRequest) *pb.PutResponse {
	prev, before := w.kvs[string(p.Key)], w.m.states[w.begin][string(p.Key)]
	kv := &pb.KeyValue{Key: p.Key, Value: p.Value, Lease: p.Lease, CreateRevision: w.begin + 1, ModRevision: w.begin + 1, Version: 1}
	if (p.IgnoreLease || p.IgnoreValue) && before == nil {
		fail(pb.TxnError_TXN_ERROR_KEY_NOT_FOUND)
	}
	if p.Lease != 0 && w.leases[p.Lease] == 0 {
		fail(pb.TxnError_TXN_ERROR_LEASE_NOT_FOUND)
	}
	if p.IgnoreValue {
		kv.Value = before.Value
	}
	if p.IgnoreLease && w.leases[before.Lease] != 0 {
		kv.Lease = before.Lease
	}
	if prev != nil {
		kv.CreateRevision, kv.Version = prev.CreateRevision, prev.Version+1
	}
	w.kvs[string(p.Key)] = kv
	w.events = append(w.events, &pb.KeyEvent{Kv: kv, PrevKv: prev})
	if p.PrevKv {
		return &pb.PutResponse{PrevKv: prev}
	}
	return new(pb.PutResponse)
}

func (w *modelTxn) delete(kv *pb.KeyValue) {
	delete(w.kvs, string(kv.Key))
	w.events = append(w.events, &pb.KeyEvent{
		Type: pb.KeyEvent_DELETE, Kv: &pb.KeyValue{Key: kv.Key, ModRevision: w.begin + 1}, PrevKv: w.m.states[w.begin][string(kv.Key)],
	})
}

func (w *modelTxn) settle(t *pb.TxnResponse) {
	t.Revision = w.revision()
	for _, op := range t.Responses {
		if n := op.GetResponseTxn(); n != nil {
			w.settle(n)
		}
	}
}
