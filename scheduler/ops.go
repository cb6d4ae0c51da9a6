package scheduler

import (
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// ops makes the parts of transactions. A placement is a put and two compares,
// each of several messages that point at each other: they are taken from
// blocks, and a key that is compared and put is made once.
type ops struct {
	compares []compareBlock
	puts     []putBlock
}

type compareBlock struct {
	compare  pb.Compare
	revision pb.Compare_ModRevision
}

type putBlock struct {
	op     pb.RequestOp
	choice pb.RequestOp_RequestPut
	put    pb.PutRequest
}

const opsPerBlock = 64

// unchanged is model.Unchanged.
func (o *ops) unchanged(key []byte, mod int64) *pb.Compare {
	if len(o.compares) == 0 {
		o.compares = make([]compareBlock, opsPerBlock)
	}
	b := &o.compares[0]
	o.compares = o.compares[1:]
	b.revision.ModRevision = mod
	b.compare.Target, b.compare.Key, b.compare.TargetUnion = pb.Compare_MOD, key, &b.revision
	return &b.compare
}

// put is model.Put.
func (o *ops) put(key []byte, msg proto.Message) *pb.RequestOp {
	if len(o.puts) == 0 {
		o.puts = make([]putBlock, opsPerBlock)
	}
	b := &o.puts[0]
	o.puts = o.puts[1:]
	b.put.Key, b.put.Value = key, model.Encode(msg)
	b.choice.RequestPut = &b.put
	b.op.Request = &b.choice
	return &b.op
}
