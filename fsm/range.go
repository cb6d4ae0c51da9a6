package fsm

import (
	"bytes"
	"cmp"
	"slices"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// readRevision is the revision that a read is for; 0 and less is the newest.
func (s *state) readRevision(asked int64) (int64, *Error) {
	if asked <= 0 {
		return s.revision, nil
	}
	return asked, s.kept(asked, s.compacted)
}

// kept refuses a revision that cannot be read when all before compacted is
// forgotten. As in etcd, a transaction may not ask for one less than 0 either,
// once something is compacted.
func (s *state) kept(asked, compacted int64) *Error {
	switch {
	case asked > s.revision:
		return refuse(pb.TxnError_TXN_ERROR_FUTURE_REVISION, "revision %d is in the future, the newest is %d", asked, s.revision)
	case asked < compacted && asked != 0:
		return refuse(pb.TxnError_TXN_ERROR_COMPACTED, "revision %d is compacted, the oldest is %d", asked, compacted)
	}
	return nil
}

// readTxn answers a transaction that is valid.
func (s *state) readTxn(t *pb.Txn) (*pb.TxnResponse, *Error) {
	response := &pb.TxnResponse{Revision: s.revision, Succeeded: s.holds(t.Compare)}
	for _, op := range branch(t, response.Succeeded) {
		switch r := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			if refused := s.kept(r.RequestRange.Revision, s.compacted); refused != nil {
				return nil, refused
			}
			answer, _ := s.read(r.RequestRange)
			response.Responses = append(response.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: answer}})
		case *pb.RequestOp_RequestTxn:
			answer, refused := s.readTxn(r.RequestTxn)
			if refused != nil {
				return nil, refused
			}
			response.Responses = append(response.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseTxn{ResponseTxn: answer}})
		default:
			return nil, invalid("the transaction does not only read")
		}
	}
	return response, nil
}

// read answers a range request, which is valid. As in etcd the count is of what
// is in the interval, filters or not; and where a sort target is given but no
// order and no filter, the limit is applied before the sort.
func (s *state) read(r *pb.RangeRequest) (*pb.RangeResponse, *Error) {
	rev, refused := s.readRevision(r.Revision)
	if refused != nil {
		return nil, refused
	}
	b := boundsOf(r.Key, r.RangeEnd)
	resp := &pb.RangeResponse{Revision: s.revision}
	if r.CountOnly {
		if rev == s.revision {
			resp.Count = s.countLive(b)
		} else {
			s.scanPast(b, rev, func(*version) bool { resp.Count++; return true })
		}
		return resp, nil
	}

	found := s.collect(b, rev, r, resp)
	if r.Limit > 0 && int64(len(found)) > r.Limit {
		found = found[:r.Limit]
		resp.More = true
	}
	if len(found) == 0 {
		return resp, nil
	}
	block := make([]pb.KeyValue, len(found))
	resp.Kvs = make([]*pb.KeyValue, len(found))
	for i, v := range found {
		v.fill(&block[i], r.KeysOnly)
		resp.Kvs[i] = &block[i]
	}
	return resp, nil
}

// collect finds, filters and sorts the versions of an answer, and counts the
// keys of the interval. It stops early where that cannot change the answer: one
// version past the limit is enough.
func (s *state) collect(b bounds, rev int64, r *pb.RangeRequest, resp *pb.RangeResponse) []*version {
	newest := rev == s.revision
	byKey := r.SortTarget == pb.RangeRequest_KEY
	descend := byKey && r.SortOrder == pb.RangeRequest_DESCEND
	scanned := byKey && !descend || !byKey && r.SortOrder == pb.RangeRequest_NONE && !filtered(r)
	enough := -1
	if r.Limit > 0 && r.Limit < int64(s.current.Len()) && newest && (scanned || descend) {
		enough = int(r.Limit) + 1
	}
	if descend && enough > 0 && !b.single {
		// The last ones, without a look at all that is before them.
		found := s.lastLive(b, r, enough)
		resp.Count = s.countLive(b)
		return found
	}

	var found []*version
	s.scan(b, rev, func(v *version) bool {
		resp.Count++
		if within(v, r) {
			found = append(found, v)
		}
		return len(found) != enough
	})
	if len(found) == enough {
		resp.Count = s.countLive(b)
	}
	if !newest && scanned && r.Limit > 0 && int64(len(found)) > r.Limit {
		found = found[:r.Limit+1]
	}
	switch {
	case descend:
		slices.Reverse(found)
	case !byKey:
		sortVersions(found, r)
	}
	return found
}

// lastLive is up to n live versions of the interval that pass the filter, last
// key first.
func (s *state) lastLive(b bounds, r *pb.RangeRequest, n int) []*version {
	var found []*version
	take := func(key string, v *version) bool {
		if key < b.from {
			return false
		}
		if !b.beyond(key) && within(v, r) {
			found = append(found, v)
		}
		return len(found) < n
	}
	if b.open {
		s.current.Reverse(take)
	} else {
		s.current.Descend(b.to, take)
	}
	return found
}

func filtered(r *pb.RangeRequest) bool {
	return r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0
}

func within(v *version, r *pb.RangeRequest) bool {
	return (r.MaxModRevision == 0 || v.mod <= r.MaxModRevision) &&
		(r.MinModRevision == 0 || v.mod >= r.MinModRevision) &&
		(r.MaxCreateRevision == 0 || v.create <= r.MaxCreateRevision) &&
		(r.MinCreateRevision == 0 || v.create >= r.MinCreateRevision)
}

// sortVersions sorts by another target than the key. Where etcd leaves the
// order of equals open, it is by key here, so that all replicas agree.
func sortVersions(found []*version, r *pb.RangeRequest) {
	var order func(a, b *version) int
	switch r.SortTarget {
	case pb.RangeRequest_VERSION:
		order = func(a, b *version) int { return cmp.Compare(a.ver, b.ver) }
	case pb.RangeRequest_CREATE:
		order = func(a, b *version) int { return cmp.Compare(a.create, b.create) }
	case pb.RangeRequest_MOD:
		order = func(a, b *version) int { return cmp.Compare(a.mod, b.mod) }
	default:
		order = func(a, b *version) int { return bytes.Compare(a.value(), b.value()) }
	}
	if r.SortOrder == pb.RangeRequest_DESCEND {
		ascend := order
		order = func(a, b *version) int { return ascend(b, a) }
	}
	slices.SortStableFunc(found, order)
}
