package fsm

import (
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// answers hands out the messages of which results are made. It allocates those
// of a batch of transactions together, which costs a tenth of an allocation for
// each; they are short-lived, and all go at the same time.
type answers struct {
	txns slab[txnAnswer]
	puts slab[putAnswer]
	ops  []*pb.ResponseOp
}

type txnAnswer struct {
	result   pb.TxnResult
	response pb.TxnResponse
}

type putAnswer struct {
	op  pb.ResponseOp
	one pb.ResponseOp_ResponsePut
	put pb.PutResponse
}

const maxSlab = 64

func newAnswers(txns int) answers {
	n := max(1, min(txns, maxSlab))
	return answers{txns: slab[txnAnswer]{block: n}, puts: slab[putAnswer]{block: n}}
}

// result is a new result that holds a response.
func (a *answers) result() (*pb.TxnResult, *pb.TxnResponse) {
	t := a.txns.next()
	t.result.Response = &t.response
	return &t.result, &t.response
}

func (a *answers) refusal(e *Error) *pb.TxnResult {
	return &pb.TxnResult{Error: e.Code, Message: e.Message}
}

// put is a new operation's response that holds the answer to a put.
func (a *answers) put() (*pb.ResponseOp, *pb.PutResponse) {
	p := a.puts.next()
	p.one.ResponsePut = &p.put
	p.op.Response = &p.one
	return &p.op, &p.put
}

func (a *answers) responses(n int) []*pb.ResponseOp {
	if n > len(a.ops) {
		a.ops = make([]*pb.ResponseOp, max(n, a.txns.block))
	}
	ops := a.ops[:n:n]
	a.ops = a.ops[n:]
	return ops
}

// slab allocates values a block at a time.
type slab[T any] struct {
	block int
	free  []T
}

func (s *slab[T]) next() *T {
	if len(s.free) == 0 {
		s.free = make([]T, s.block)
	}
	v := &s.free[0]
	s.free = s.free[1:]
	return v
}
