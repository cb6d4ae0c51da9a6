package raftstore

import (
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRepeatedLinesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		l := newLogger(slog.New(slog.NewTextHandler(&out, nil)))
		fail := func(n int) {
			for i := range n {
				l.Error("failed to heartbeat to", "peer", "s2", "backoff time", time.Duration(i))
			}
		}
		lines := func() int { return strings.Count(out.String(), "heartbeat") }
		fail(100)
		l.Named("raft").With("a", "b").Error("failed to heartbeat to", "peer", "s2")
		if lines() != repeatBurst {
			t.Errorf("%d lines:\n%s", lines(), out.String())
		}
		l.Error("failed to heartbeat to", "peer", "s3")
		l.Info("entering leader state")
		if lines() != repeatBurst+1 || !strings.Contains(out.String(), "leader state") {
			t.Errorf("other lines are kept back:\n%s", out.String())
		}
		time.Sleep(repeatWithin)
		fail(1)
		if want := "repeated=97"; lines() != repeatBurst+2 || !strings.Contains(out.String(), want) {
			t.Errorf("%d lines, no %s:\n%s", lines(), want, out.String())
		}
	})
}
