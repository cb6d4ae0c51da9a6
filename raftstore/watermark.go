package raftstore

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

var watermarkKey = []byte("persys/log-reaches")

// watermarkEvery is how far the watermark may lag behind the log.
const watermarkEvery = time.Second

// watermark remembers in the stable store up to where the log was once durable. The
// WAL takes damage near its end for a write that was torn by a crash and drops what
// follows; without the mark acknowledged entries would be gone in silence.
type watermark struct {
	stable raft.StableStore
	last   atomic.Uint64 // newest entry that is durable

	mu     sync.Mutex
	stored uint64
}

// openWatermark fails where the log has become shorter by itself.
func openWatermark(stable raft.StableStore, last uint64) (*watermark, error) {
	w := &watermark{stable: stable}
	w.last.Store(last)
	stored, err := stable.GetUint64(watermarkKey)
	if err != nil && err.Error() != raftboltdb.ErrKeyNotFound.Error() {
		return nil, fmt.Errorf("raftstore: read the end of the log: %w", err)
	}
	if last < stored {
		return nil, fmt.Errorf("raftstore: the log on disk is damaged: it ends at entry %d and once reached to %d; "+
			"empty the directory and join again", last, stored)
	}
	w.stored = stored
	return w, nil
}

// advance writes the mark where the log has grown.
func (w *watermark) advance() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.store(max(w.stored, w.last.Load()))
}

// cut is called before entries from first on are deleted.
func (w *watermark) cut(first uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last.Store(first - 1)
	return w.store(min(w.stored, first-1))
}

// store is called with w.mu held.
func (w *watermark) store(index uint64) error {
	if index == w.stored {
		return nil
	}
	if err := w.stable.SetUint64(watermarkKey, index); err != nil {
		return fmt.Errorf("raftstore: write the end of the log: %w", err)
	}
	w.stored = index
	return nil
}

// run advances the mark until ctx ends.
func (w *watermark) run(ctx context.Context, failed func(error)) {
	ticker := time.NewTicker(watermarkEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if err := w.advance(); err != nil {
				failed(err)
			}
		}
	}
}

// markedLog is a log store that keeps the watermark.
type markedLog struct {
	raft.LogStore
	mark *watermark
}

func (l markedLog) IsMonotonic() bool {
	m, ok := l.LogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

func (l markedLog) StoreLog(log *raft.Log) error { return l.StoreLogs([]*raft.Log{log}) }

func (l markedLog) StoreLogs(logs []*raft.Log) error {
	if err := l.LogStore.StoreLogs(logs); err != nil {
		return err
	}
	l.mark.last.Store(logs[len(logs)-1].Index)
	return nil
}

func (l markedLog) DeleteRange(first, last uint64) error {
	if last >= l.mark.last.Load() {
		if err := l.mark.cut(first); err != nil {
			return err
		}
	}
	return l.LogStore.DeleteRange(first, last)
}
