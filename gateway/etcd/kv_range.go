package etcd

import (
	"bytes"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// pageKeys is how many keys a streamed range reads at a time.
const pageKeys = 1000

// RangeStream is Range in pieces, all read from one view: each has keys, the last
// one also what else is in the answer of Range. Unlike etcd's own it takes every
// order and filter; then the keys, but not the values, are held in memory at once.
func (s *Server) RangeStream(r *etcdpb.RangeRequest, stream grpc.ServerStreamingServer[etcdpb.RangeStreamResponse]) error {
	if err := checkRange(r); err != nil {
		return err
	}
	v, who, err := s.readable(stream.Context(), r.Serializable, func(_ *fsm.View, who *caller) error { return who.mayRead(r.Key, r.RangeEnd) })
	if err != nil {
		return statusOf(err)
	}
	pieces := pieces{stream: stream, most: s.config.MaxRequestBytes}
	last, err := pages(v, rangeRequest(r), who.shown(), pieces.add)
	if err != nil {
		return statusOf(err)
	}
	return pieces.send(&etcdpb.RangeResponse{Header: s.header(last.Revision), More: last.More, Count: last.Count})
}

// pages reads a range page by page where that gives the same keys at no greater
// cost, else at once. The answer that it returns is the whole one but for its keys.
func pages(v *fsm.View, r *pb.RangeRequest, shown owner, each func([]*pb.KeyValue) error) (*pb.RangeResponse, error) {
	byKey := r.SortTarget == pb.RangeRequest_KEY && r.SortOrder != pb.RangeRequest_DESCEND
	newest := r.Revision <= 0 || r.Revision == v.Revision()
	filtered := r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0
	if !byKey || !newest || filtered || r.CountOnly || len(r.RangeEnd) == 0 || touches(r.Key, r.RangeEnd) {
		answer, err := rangeView(v, r, shown)
		if err != nil {
			return nil, err
		}
		return answer, each(answer.Kvs)
	}
	var whole *pb.RangeResponse
	for left := r.Limit; ; {
		page := proto.CloneOf(r)
		page.Limit = pageKeys
		if r.Limit > 0 {
			page.Limit = min(left, pageKeys)
		}
		answer, err := rangeView(v, page, shown)
		if err != nil {
			return nil, err
		}
		if whole == nil {
			whole = answer
		}
		whole.More = answer.More
		if err := each(answer.Kvs); err != nil {
			return nil, err
		}
		left -= int64(len(answer.Kvs))
		if !answer.More || r.Limit > 0 && left == 0 {
			return whole, nil
		}
		last := answer.Kvs[len(answer.Kvs)-1].Key
		r.Key = append(bytes.Clone(last), 0)
	}
}

// pieces sends keys in messages of at most so many bytes, as far as one key fits.
type pieces struct {
	stream grpc.ServerStreamingServer[etcdpb.RangeStreamResponse]
	most   int

	held  []*pb.KeyValue
	bytes int
}

// pieceOverhead bounds what a message has beside its keys, pairOverhead what a key
// has beside its bytes and those of its value: tags, lengths and numbers.
const (
	pieceOverhead = 128
	pairOverhead  = 64
)

func (p *pieces) add(kvs []*pb.KeyValue) error {
	for _, kv := range kvs {
		size := len(kv.Key) + len(kv.Value) + pairOverhead
		if len(p.held) > 0 && p.bytes+size+pieceOverhead > p.most {
			if err := p.send(new(etcdpb.RangeResponse)); err != nil {
				return err
			}
		}
		p.held = append(p.held, kv)
		p.bytes += size
	}
	return nil
}

// send sends the keys that are held, in the answer.
func (p *pieces) send(answer *etcdpb.RangeResponse) error {
	answer.Kvs = keyValues(p.held)
	p.held, p.bytes = p.held[:0], 0
	return p.stream.Send(&etcdpb.RangeStreamResponse{RangeResponse: answer})
}
