package gossip

import (
	"bytes"
	"context"
	"log/slog"
)

// delegate gives memberlist our description; nothing else travels with it.
type delegate struct{ gossip *Gossip }

func (d delegate) NodeMeta(int) []byte           { return *d.gossip.description.Load() }
func (delegate) NotifyMsg([]byte)                {}
func (delegate) GetBroadcasts(int, int) [][]byte { return nil }
func (delegate) LocalState(bool) []byte          { return nil }
func (delegate) MergeRemoteState([]byte, bool)   {}

// logWriter brings memberlist's lines, "[LEVEL] memberlist: text", to slog.
type logWriter struct{ logger *slog.Logger }

var logLevels = map[string]slog.Level{
	// What memberlist calls an error is a peer that does not answer or a
	// packet it cannot read: everyday matters for a hint.
	"DEBUG": slog.LevelDebug, "INFO": slog.LevelDebug, "WARN": slog.LevelInfo, "ERR": slog.LevelInfo, "ERROR": slog.LevelInfo,
}

func (w *logWriter) Write(line []byte) (int, error) {
	level, text := slog.LevelInfo, bytes.TrimSpace(line)
	if rest, ok := bytes.CutPrefix(text, []byte("[")); ok {
		if name, rest, ok := bytes.Cut(rest, []byte("] ")); ok {
			if known, ok := logLevels[string(name)]; ok {
				level, text = known, rest
			}
		}
	}
	w.logger.Log(context.Background(), level, "gossip: "+string(bytes.TrimPrefix(text, []byte("memberlist: "))))
	return len(line), nil
}
