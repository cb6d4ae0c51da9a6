package fsm

import (
	"fmt"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What is remembered of request ids. Both bounds are part of the meaning of
// entries: all replicas must forget the same ids at the same time.
const (
	// MaxRequests is how many request ids are remembered.
	MaxRequests = 64 << 10
	// MaxRequestBytes bounds the encoded answers to them. The newest is always
	// kept.
	MaxRequestBytes = 32 << 20
	// MaxAnswer is the size up to which an answer is remembered as it is. Of a
	// longer one the keys and values that were read are left out.
	MaxAnswer = 1 << 20
)

// request is a remembered request id with its answer: an encoded pb.TxnResult.
type request struct {
	data  string // the id, then the answer
	idLen int
	hash  uint64
}

func (r request) id() string     { return r.data[:r.idLen] }
func (r request) answer() string { return r.data[r.idLen:] }

func newRequest(id []byte, result *pb.TxnResult) (request, error) {
	answer, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(make([]byte, 0, 64), result)
	if err != nil {
		return request{}, fmt.Errorf("fsm: encode the answer to request %x: %w", id, err)
	}
	// Not over the encoded answer, which another version of the encoder may
	// write in another way; its revision and outcome identify it.
	h := fold(hashRequest, xxhash.Sum64(id))
	h = fold(h, uint64(result.GetResponse().GetRevision()))
	if result.GetResponse().GetSucceeded() {
		h++
	}
	return request{data: string(id) + string(answer), idLen: len(id), hash: finish(h)}, nil
}

// recall answers a request id that is remembered.
func (s *Store) recall(id []byte) (*pb.TxnResult, bool, error) {
	p, ok := s.requestAt[string(id)]
	if !ok {
		return nil, false, nil
	}
	result := new(pb.TxnResult)
	if err := proto.Unmarshal([]byte(s.requests.at(p).answer()), result); err != nil {
		return nil, false, fmt.Errorf("fsm: decode the answer to request %x: %w", id, err)
	}
	return result, true, nil
}

// remember keeps the answer and forgets the oldest ones beyond the bounds.
func (s *Store) remember(id []byte, result *pb.TxnResult) error {
	if proto.Size(result) > MaxAnswer {
		result = proto.CloneOf(result)
		stripResponses(result.Response)
		result.Partial = true
	}
	r, err := newRequest(id, result)
	if err != nil {
		return err
	}
	s.keepRequest(r)
	for s.requests.len() > MaxRequests || s.requestBytes > MaxRequestBytes && s.requests.len() > 1 {
		oldest := s.requests.at(s.requests.start)
		delete(s.requestAt, oldest.id())
		s.requests.forget(s.requests.start + 1)
		s.requestBytes -= len(oldest.data)
		s.sum -= oldest.hash
	}
	return nil
}

func (s *Store) keepRequest(r request) {
	s.requestAt[r.id()] = s.requests.end
	s.requests.append(r)
	s.requestBytes += len(r.data)
	s.sum += r.hash
}

// stripResponses leaves what a transaction did and drops what it read.
func stripResponses(t *pb.TxnResponse) {
	for _, op := range t.GetResponses() {
		switch r := op.GetResponse().(type) {
		case *pb.ResponseOp_ResponseRange:
			r.ResponseRange.More = r.ResponseRange.More || len(r.ResponseRange.Kvs) > 0
			r.ResponseRange.Kvs = nil
		case *pb.ResponseOp_ResponsePut:
			r.ResponsePut.PrevKv = nil
		case *pb.ResponseOp_ResponseDeleteRange:
			r.ResponseDeleteRange.PrevKvs = nil
		case *pb.ResponseOp_ResponseTxn:
			stripResponses(r.ResponseTxn)
		}
	}
}
