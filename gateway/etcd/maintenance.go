package etcd

import (
	"bytes"
	"context"
	"io"
	"runtime/debug"
	"slices"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/api/v3/version"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
)

// catchUp is how long what concerns one replica waits for it to have all that was
// acknowledged before.
const catchUp = 3 * time.Second

// storageVersion is the release of etcd whose keyspace this one is like.
var storageVersion = version.APIVersion + ".0"

// newest is a linearizable view or, where there is no leader to ask, what this
// replica has: a cluster that has lost its majority can still be looked at and
// saved.
func (s *Server) newest(ctx context.Context) (*fsm.View, error) {
	limited, cancel := context.WithTimeout(ctx, catchUp)
	defer cancel()
	v, err := s.store.Linearizable(limited)
	switch {
	case err == nil:
		return v, nil
	case ctx.Err() == nil && s.config.Control.Status().Leader == 0:
		return s.store.View(), nil
	}
	return nil, statusOf(err)
}

// Status is about this replica, and answers whatever state it is in. The sizes are
// those of the keys and values of all versions that are kept, in memory; that is
// what the quota is about, and there are no gaps in it.
func (s *Server) Status(ctx context.Context, _ *etcdpb.StatusRequest) (*etcdpb.StatusResponse, error) {
	if err := s.mustBeUser(ctx); err != nil {
		return nil, err
	}
	v, members, err := s.members(ctx, false)
	if err != nil {
		return nil, err
	}
	own := slices.IndexFunc(members, func(m *etcdpb.Member) bool { return m.ID == s.config.Member })
	raft := s.config.Control.Status()
	answer := &etcdpb.StatusResponse{
		Header: s.header(v.Revision()), Version: version.Version, StorageVersion: storageVersion,
		DbSize: v.Bytes(), DbSizeInUse: v.Bytes(), DbSizeQuota: s.quota.limit,
		Leader: raft.Leader, RaftTerm: raft.Term, RaftIndex: raft.Commit, RaftAppliedIndex: raft.Applied,
		IsLearner: own >= 0 && members[own].IsLearner, Errors: raft.Errors,
		DowngradeInfo: &etcdpb.DowngradeInfo{},
	}
	if raft.Leader == 0 {
		answer.Errors = append(answer.Errors, rpctypes.ErrorDesc(rpctypes.ErrGRPCNoLeader))
	}
	for _, a := range alarms(v) {
		answer.Errors = append(answer.Errors, a.String())
	}
	return answer, nil
}

// Hash is that of the whole state, leases and remembered requests included.
func (s *Server) Hash(ctx context.Context, _ *etcdpb.HashRequest) (*etcdpb.HashResponse, error) {
	if err := s.mustBeRootHere(ctx); err != nil {
		return nil, err
	}
	v, err := s.newest(ctx)
	if err != nil {
		return nil, err
	}
	return &etcdpb.HashResponse{Header: s.header(v.Revision()), Hash: uint32(v.Hash())}, nil
}

// HashKV is that of all keys at a revision, the system's included. It is equal on
// all replicas, wherever each of them is compacted.
func (s *Server) HashKV(ctx context.Context, r *etcdpb.HashKVRequest) (*etcdpb.HashKVResponse, error) {
	if err := s.mustBeRootHere(ctx); err != nil {
		return nil, err
	}
	v, err := s.newest(ctx)
	if err != nil {
		return nil, err
	}
	hash, at, err := v.HashKV(r.Revision)
	if err != nil {
		return nil, statusOf(err)
	}
	return &etcdpb.HashKVResponse{
		Header: s.header(v.Revision()), Hash: uint32(hash), HashRevision: at, CompactRevision: v.CompactRevision(),
	}, nil
}

// Snapshot sends a snapshot of the whole state, secrets included, as fsm.Restore
// reads it. What was acknowledged before the call is in it.
func (s *Server) Snapshot(_ *etcdpb.SnapshotRequest, stream etcdpb.Maintenance_SnapshotServer) error {
	ctx := stream.Context()
	if err := s.mustBeRootHere(ctx); err != nil {
		return err
	}
	v, err := s.newest(ctx)
	if err != nil {
		return err
	}
	size, err := v.WriteSealed(io.Discard)
	if err != nil {
		return statusOf(err)
	}
	_, err = v.WriteSealed(&snapshotWriter{stream: stream, header: s.header(v.Revision()), remaining: uint64(size)})
	return statusOf(err)
}

// snapshotPiece is the size of a message: any client takes that.
const snapshotPiece = 256 << 10

// snapshotWriter sends what is written.
type snapshotWriter struct {
	stream    etcdpb.Maintenance_SnapshotServer
	header    *etcdpb.ResponseHeader
	remaining uint64
}

func (w *snapshotWriter) Write(p []byte) (int, error) {
	for piece := range slices.Chunk(p, snapshotPiece) {
		w.remaining -= uint64(len(piece))
		err := w.stream.Send(&etcdpb.SnapshotResponse{
			Header: w.header, RemainingBytes: w.remaining, Version: storageVersion,
			Blob: bytes.Clone(piece), // the sender may keep it, and the writer goes on
		})
		if err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// Defragment has this replica write a snapshot and drop the log before it, and
// gives memory that is free back to the machine. There are no gaps in the keyspace
// that could be closed: it is in memory.
func (s *Server) Defragment(ctx context.Context, _ *etcdpb.DefragmentRequest) (*etcdpb.DefragmentResponse, error) {
	if err := s.mustBeRootHere(ctx); err != nil {
		return nil, err
	}
	if err := s.config.Control.Snapshot(ctx); err != nil {
		return nil, statusOf(err)
	}
	debug.FreeOSMemory()
	return &etcdpb.DefragmentResponse{Header: s.header(s.store.View().Revision())}, nil
}

// MoveLeader has this replica, which must lead, hand over to another voter.
func (s *Server) MoveLeader(ctx context.Context, r *etcdpb.MoveLeaderRequest) (*etcdpb.MoveLeaderResponse, error) {
	if s.config.Control.Status().Leader != s.config.Member {
		return nil, rpctypes.ErrGRPCNotLeader
	}
	m, err := s.member(ctx, r.TargetID)
	if err == rpctypes.ErrGRPCMemberNotFound || err == nil && m.IsLearner {
		return nil, rpctypes.ErrGRPCBadLeaderTransferee
	}
	if err == nil && m.ID != s.config.Member {
		err = s.config.Control.MoveLeader(ctx, m)
	}
	if err != nil {
		return nil, statusOf(err)
	}
	return &etcdpb.MoveLeaderResponse{Header: s.header(s.store.View().Revision())}, nil
}

// Downgrade is refused: what is stored is not etcd's, of any version.
func (s *Server) Downgrade(ctx context.Context, r *etcdpb.DowngradeRequest) (*etcdpb.DowngradeResponse, error) {
	if err := s.mustBeRoot(ctx); err != nil {
		return nil, err
	}
	if r.Action == etcdpb.DowngradeRequest_CANCEL {
		return nil, rpctypes.ErrGRPCNoInflightDowngrade
	}
	return nil, status.Error(codes.FailedPrecondition, "etcdserver: Persys speaks etcd's API and stores nothing in etcd's format: there is no older version to go back to")
}
