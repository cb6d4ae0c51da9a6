package raftstore

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/segment"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

const (
	boltFile       = "raft.db"
	walDir         = "wal"
	keptSnapshots  = 2
	bytesInMemory  = 1 << 30 // address space for bbolt's map: remapping waits for readers
	lockPatience   = time.Second
	spareFile      = "wal.spare"
	walSegmentSize = 16 << 20
)

// disk is what lies below Config.Dir: raft.db, wal/ and wal.spare where chosen,
// snapshots/.
type disk struct {
	logs   raft.LogStore
	stable raft.StableStore
	snaps  raft.SnapshotStore
	mark   *watermark // nil without the WAL
	close  func() error
}

func openDisk(dir string, kind LogKind, logger hclog.Logger, log *slog.Logger) (_ *disk, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("raftstore: %w", err)
	}
	if err := sameLogKind(dir, kind); err != nil {
		return nil, err
	}
	bolt, err := raftboltdb.New(raftboltdb.Options{
		Path: filepath.Join(dir, boltFile),
		BoltOptions: &bbolt.Options{
			Timeout: lockPatience,
			// Written with each commit otherwise, and long after a large log was
			// truncated. It is rebuilt when the file is opened.
			NoFreelistSync:  true,
			FreelistType:    bbolt.FreelistMapType,
			InitialMmapSize: bytesInMemory,
		},
		MsgpackUseNewTimeFormat: true,
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("raftstore: %s is in use by another process", dir)
	case err != nil:
		return nil, fmt.Errorf("raftstore: open %s: %w", filepath.Join(dir, boltFile), err)
	}
	d := &disk{logs: bolt, stable: bolt, close: bolt.Close}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if kind == LogWAL {
		path := filepath.Join(dir, walDir)
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, fmt.Errorf("raftstore: %w", err)
		}
		segments, closeWAL, err := openWAL(path, filepath.Join(dir, spareFile), logger, log)
		if err != nil {
			return nil, err
		}
		d.close = func() error { return errors.Join(closeWAL(), bolt.Close()) }
		last, err := segments.LastIndex()
		if err != nil {
			return nil, fmt.Errorf("raftstore: read %s: %w", path, err)
		}
		if d.mark, err = openWatermark(bolt, last); err != nil {
			return nil, err
		}
		d.logs = markedLog{segments, d.mark}
		d.close = func() error { return errors.Join(d.mark.advance(), closeWAL(), bolt.Close()) }
	}
	d.snaps, err = raft.NewFileSnapshotStoreWithLogger(dir, keptSnapshots, logger)
	if err != nil {
		return nil, fmt.Errorf("raftstore: open snapshots below %s: %w", dir, err)
	}
	return d, nil
}

func openWAL(path, spare string, logger hclog.Logger, log *slog.Logger) (*wal.WAL, func() error, error) {
	files, err := newSegmentFS(spare, walSegmentSize, log)
	if err != nil {
		return nil, nil, err
	}
	// A new log begins in written space too, or all of its first segment would be slow.
	if there, err := os.ReadDir(path); err == nil && len(there) == 0 {
		files.making.Wait()
	}
	// The WAL does not close the file with its list of segments.
	meta := &metadb.BoltMetaDB{}
	segments, err := wal.Open(path, wal.WithLogger(logger), wal.WithMetaStore(meta),
		wal.WithSegmentSize(walSegmentSize), wal.WithSegmentFiler(segmentFiler{segment.NewFiler(path, files)}))
	if err != nil {
		files.close()
		return nil, nil, errors.Join(fmt.Errorf("raftstore: open %s: %w", path, err), meta.Close())
	}
	return segments, func() error {
		files.close()
		return errors.Join(segments.Close(), meta.Close())
	}, nil
}

// sameLogKind refuses a directory that was written with the other kind: its log
// would look empty, and an empty log under an old id loses acknowledged writes.
func sameLogKind(dir string, kind LogKind) error {
	_, errWAL := os.Stat(filepath.Join(dir, walDir))
	_, errBolt := os.Stat(filepath.Join(dir, boltFile))
	was := LogBolt
	if errWAL == nil {
		was = LogWAL
	}
	if errBolt == nil && was != kind {
		return fmt.Errorf("raftstore: %s was written with log store %q and cannot be opened with %q", dir, was, kind)
	}
	return nil
}
