package raftstore

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"
)

// segmentFS is the WAL's file system, with segments whose space has been written
// once already. A sync after an append then changes no metadata of the file and
// takes half the time. The zeros are written ahead, in the background, into a spare
// file outside the WAL's directory; where there is no spare in time, the space is
// only reserved, as the WAL's own file system does it.
type segmentFS struct {
	*walfs.FS
	spare string // path
	size  int64
	log   *slog.Logger

	making sync.WaitGroup
	mu     sync.Mutex
	ready  bool
	closed bool
}

// newSegmentFS begins with a spare. What is left of an earlier one is dropped: it
// may be half made.
func newSegmentFS(spare string, size int64, log *slog.Logger) (*segmentFS, error) {
	if err := os.RemoveAll(spare); err != nil {
		return nil, fmt.Errorf("raftstore: %w", err)
	}
	f := &segmentFS{FS: walfs.New(), spare: spare, size: size, log: log}
	f.prepare()
	return f, nil
}

// segmentFiler opens what the WAL calls sealed and has not sealed: when the end of
// the log is cut off, as followers do after a change of leadership, it marks the
// last segment without writing its index, and cannot read any entry of it after a
// restart (hashicorp/raft-wal issue 31, in 0.4.0, the last version that the module
// proxy has). Such a segment is read through like one that was being written.
type segmentFiler struct{ *segment.Filer }

func (f segmentFiler) Open(info types.SegmentInfo) (types.SegmentReader, error) {
	if info.IndexStart == 0 {
		return f.RecoverTail(info)
	}
	return f.Filer.Open(info)
}

func (f *segmentFS) prepare() {
	f.making.Go(func() {
		err := f.zeros()
		f.mu.Lock()
		f.ready = err == nil && !f.closed
		f.mu.Unlock()
		if err != nil {
			f.log.Warn("no spare log segment could be made", "error", err)
		}
	})
}

func (f *segmentFS) zeros() error {
	file, err := os.OpenFile(f.spare, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	// In steps, so that the syncs of the log beside it do not wait for all of it.
	block := make([]byte, 1<<20)
	for at := int64(0); at < f.size; at += int64(len(block)) {
		if f.isClosed() {
			return nil
		}
		if _, err := file.WriteAt(block[:min(int64(len(block)), f.size-at)], at); err != nil {
			return err
		}
		if err := syncData(file); err != nil {
			return err
		}
	}
	return file.Sync()
}

func (f *segmentFS) isClosed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closed
}

// Create is part of types.VFS.
func (f *segmentFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	f.mu.Lock()
	use := f.ready && size == uint64(f.size) && !f.closed
	if use {
		f.ready = false
	}
	f.mu.Unlock()
	if !use {
		return f.FS.Create(dir, name, size)
	}
	defer f.prepare()
	path := filepath.Join(dir, name)
	if err := os.Rename(f.spare, path); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &segmentFile{File: file, dir: dir}, nil
}

// OpenWriter is part of types.VFS.
func (f *segmentFS) OpenWriter(dir, name string) (types.WritableFile, error) {
	file, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &segmentFile{File: file, dir: dir}, nil
}

func (f *segmentFS) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.making.Wait()
}

// segmentFile syncs data only; the first time its directory too, since only then
// must the file survive.
type segmentFile struct {
	*os.File
	dir string

	once   sync.Once
	dirErr error
}

func (s *segmentFile) Sync() error {
	if err := syncData(s.File); err != nil {
		return err
	}
	s.once.Do(func() { s.dirErr = syncDir(s.dir) })
	return s.dirErr
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
