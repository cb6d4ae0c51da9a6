package raftstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestWatchRanges(t *testing.T) {
	c := newCluster(t, 1, nil)
	r := c.replicas[0]
	start := r.View().Revision()
	r.mustPropose(&pb.Txn{Success: []*pb.RequestOp{putOp("a", "1", 0), putOp("b", "1", 0), putOp("b/x", "1", 0)}})
	r.mustPropose(put("c", "2"))
	r.mustPropose(put("b", "3"))
	for _, w := range []struct {
		key, end string
		want     string
	}{
		{"b", "", "b@2 b@4"},
		{"b", "c", "b@2 b/x@2 b@4"},
		{"b", "\x00", "b@2 b/x@2 c@3 b@4"},
		{"a", "b", "a@2"},
		{"\x00", "\x00", "a@2 b@2 b/x@2 c@3 b@4"},
	} {
		t.Run(fmt.Sprintf("%q-%q", w.key, w.end), func(t *testing.T) {
			watcher := r.Watch(WatchRange{Key: []byte(w.key), End: []byte(w.end), After: start})
			var got []string
			for watcher.Revision() < r.View().Revision() {
				ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
				events, _, err := watcher.Next(ctx)
				cancel()
				if err != nil {
					break
				}
				for _, e := range events {
					got = append(got, fmt.Sprintf("%s@%d", e.Kv.Key, e.Kv.ModRevision-start+1))
				}
			}
			if strings.Join(got, " ") != w.want {
				t.Errorf("got %v, want %s", got, w.want)
			}
		})
	}
	r.mustPropose(&pb.Txn{Success: []*pb.RequestOp{{Request: &pb.RequestOp_Compact{Compact: &pb.Compact{Revision: r.View().Revision()}}}}})
	_, _, err := r.Watch(WatchRange{Key: []byte("a"), After: start - 1}).Next(within(t, patience))
	var refused *fsm.Error
	if !errors.As(err, &refused) || refused.Code != pb.TxnError_TXN_ERROR_COMPACTED {
		t.Errorf("watch from before the compaction: %v", err)
	}
	// It waits for what is to come, and ends with the store.
	next := make(chan error, 2)
	for _, key := range []string{"later", "never"} {
		w := r.Watch(WatchRange{Key: []byte(key), After: r.View().Revision()})
		go func() {
			events, _, err := w.Next(context.Background())
			if err == nil && string(events[0].Kv.Value) != "x" {
				err = fmt.Errorf("events %v", events)
			}
			next <- err
		}()
	}
	r.mustPropose(put("later", "x"))
	if err := <-next; err != nil {
		t.Error(err)
	}
	r.shut()
	if err := <-next; !errors.Is(err, ErrClosed) {
		t.Errorf("a watch at the end of the store: %v", err)
	}
}

// Watchers that wait cost no goroutine of ours and no memory that grows with what
// they do not read.
func TestManyStalledWatchers(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) {
		cfg.Retention = Retention{Revisions: 100, Age: time.Millisecond, Check: 10 * time.Millisecond}
	})
	r := c.replicas[0]
	start := r.View().Revision()
	before := runtime.NumGoroutine()
	var stalled []*Watcher
	for range 1000 {
		stalled = append(stalled, r.Watch(WatchRange{Key: []byte("k"), After: start}))
	}
	if n := runtime.NumGoroutine() - before; n > 10 {
		t.Errorf("%d goroutines for watchers that do nothing", n)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				if _, err := r.Propose(within(t, patience), put("k", strings.Repeat("v", 100))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	eventually(t, "the history they have not read is forgotten", func() error {
		if v := r.View(); v.CompactRevision() < start+200 {
			r.mustPropose(put("k", "more"))
			return fmt.Errorf("compacted to %d of %d", v.CompactRevision(), v.Revision())
		}
		return nil
	})
	if _, _, err := stalled[0].Next(within(t, patience)); err == nil {
		t.Error("a watcher reads what was forgotten")
	}
}

func TestWriteSnapshotIsWhatTheFSMRestores(t *testing.T) {
	c := newCluster(t, 1, nil)
	c.replicas[0].mustPropose(put("k", "v"))
	var out bytes.Buffer
	if err := c.replicas[0].WriteSnapshot(&out); err != nil {
		t.Fatal(err)
	}
	state, err := fsm.Restore(&out)
	if err != nil {
		t.Fatal(err)
	}
	if state.View().Hash() != c.replicas[0].View().Hash() {
		t.Error("the state is another")
	}
}

func TestSnapshotOnRequest(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.Retention.TrailingEntries = 1 })
	r := c.replicas[0]
	for range 5 {
		r.mustPropose(put("k", "v"))
	}
	if err := r.Snapshot(within(t, patience)); err != nil {
		t.Fatal(err)
	}
	snapshots, err := r.disk.snaps.List()
	if err != nil || len(snapshots) != 1 || snapshots[0].Index != r.Status().LastIndex {
		t.Errorf("%v, %v", snapshots, err)
	}
	if first, err := r.disk.logs.FirstIndex(); err != nil || first != r.Status().LastIndex {
		t.Errorf("the log begins at %d of %d: %v", first, r.Status().LastIndex, err)
	}
}

func TestLoggerSpeaksSlog(t *testing.T) {
	var out bytes.Buffer
	l := newLogger(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo})))
	l.Debug("hidden")
	l.With("peer", "s2").Named("net").Error("cannot reach", "servers", hclog.Fmt("%+v", []int{1}))
	l.StandardLogger(nil).Println("by the way")
	got := out.String()
	for _, want := range []string{`level=WARN msg="raft: cannot reach" peer=s2 servers=[1]`, `msg="raft: by the way"`} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
	if strings.Contains(got, "hidden") || l.IsDebug() || !l.IsInfo() || l.GetLevel() != hclog.Info {
		t.Errorf("debug is on: %s", got)
	}
}
