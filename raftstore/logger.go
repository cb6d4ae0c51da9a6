package raftstore

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// slogger is hashicorp's logger interface over log/slog. Raft logs each failed
// heartbeat as an error; to the rest of the program a peer that is away is a
// warning, so its errors are logged one level lower. What really is an error here
// comes back from Run. What repeats itself, as all about a peer that is away does
// several times a second, is counted instead.
type slogger struct {
	out     *slog.Logger
	name    string
	args    []any
	repeats *repeats
}

func newLogger(out *slog.Logger) hclog.Logger {
	return &slogger{out: out, repeats: &repeats{said: map[string]*repeat{}}}
}

const (
	// Of lines that say the same about the same peer, so many are logged in each
	// repeatWithin. There are few kinds of lines and few peers, so the memory of
	// them is small; it is thrown away when it grows beyond maxRepeats.
	repeatBurst  = 4
	repeatWithin = 30 * time.Second
	maxRepeats   = 1024
)

// repeats counts lines.
type repeats struct {
	mu   sync.Mutex
	said map[string]*repeat
}

type repeat struct {
	since        time.Time
	lines, muted int
}

// pass reports whether a line is logged, and how many like it were not since the
// last that was.
func (r *repeats) pass(line string, now time.Time) (muted int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.said[line]
	if s == nil {
		if len(r.said) >= maxRepeats {
			clear(r.said)
		}
		s = &repeat{since: now}
		r.said[line] = s
	}
	if now.Sub(s.since) >= repeatWithin {
		s.since, s.lines = now, 0
	}
	if s.lines++; s.lines > repeatBurst {
		s.muted++
		return 0, false
	}
	muted, s.muted = s.muted, 0
	return muted, true
}

// lineOf is a line without what differs each time.
func lineOf(msg string, args []any) string {
	for i := 0; i+1 < len(args); i += 2 {
		switch args[i] {
		case "peer", "target", "server-id", "from", "leader", "candidate":
			msg = fmt.Sprint(msg, "\x00", args[i+1])
		}
	}
	return msg
}

func levelOf(l hclog.Level) slog.Level {
	switch {
	case l >= hclog.Warn:
		return slog.LevelWarn
	case l >= hclog.Info:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}

func (l *slogger) Log(level hclog.Level, msg string, args ...any) {
	at := levelOf(level)
	ctx := context.Background()
	if !l.out.Enabled(ctx, at) {
		return
	}
	muted := 0
	if at > slog.LevelDebug {
		var ok bool
		if muted, ok = l.repeats.pass(lineOf(msg, args), time.Now()); !ok {
			return
		}
	}
	attrs := make([]any, len(args), len(args)+2)
	for i, a := range args {
		// Raft passes formats (hclog.Fmt) and structures that only print well so.
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			if s, ok := f[0].(string); ok {
				a = fmt.Sprintf(s, f[1:]...)
			}
		}
		if s, ok := a.(fmt.Stringer); ok {
			a = s.String()
		}
		attrs[i] = a
	}
	if muted > 0 {
		attrs = append(attrs, "repeated", muted)
	}
	l.out.Log(ctx, at, "raft: "+msg, attrs...)
}

func (l *slogger) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *slogger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *slogger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *slogger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *slogger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *slogger) enabled(level hclog.Level) bool {
	return l.out.Enabled(context.Background(), levelOf(level))
}

func (l *slogger) IsTrace() bool        { return false }
func (l *slogger) IsDebug() bool        { return l.enabled(hclog.Debug) }
func (l *slogger) IsInfo() bool         { return l.enabled(hclog.Info) }
func (l *slogger) IsWarn() bool         { return l.enabled(hclog.Warn) }
func (l *slogger) IsError() bool        { return l.enabled(hclog.Error) }
func (l *slogger) ImpliedArgs() []any   { return l.args }
func (l *slogger) Name() string         { return l.name }
func (l *slogger) SetLevel(hclog.Level) {}
func (l *slogger) GetLevel() hclog.Level {
	for _, level := range []hclog.Level{hclog.Debug, hclog.Info} {
		if l.enabled(level) {
			return level
		}
	}
	return hclog.Warn
}

func (l *slogger) With(args ...any) hclog.Logger {
	return &slogger{out: l.out.With(args...), name: l.name, repeats: l.repeats, args: append(l.args[:len(l.args):len(l.args)], args...)}
}

func (l *slogger) Named(name string) hclog.Logger {
	if l.name != "" {
		name = l.name + "." + name
	}
	return l.ResetNamed(name)
}

func (l *slogger) ResetNamed(name string) hclog.Logger {
	return &slogger{out: l.out, name: name, args: l.args, repeats: l.repeats}
}

func (l *slogger) StandardLogger(opts *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(opts), "", 0)
}

func (l *slogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return lineWriter{l} }

// lineWriter logs each write as a line, for code that knows only log.Logger.
type lineWriter struct{ to *slogger }

func (w lineWriter) Write(line []byte) (int, error) {
	w.to.Info(strings.TrimSpace(string(line)))
	return len(line), nil
}
