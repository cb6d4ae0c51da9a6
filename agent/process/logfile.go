package process

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Lines of the log are "<time> <o|e> <text>": o for standard output, e for
// standard error. Longer texts than maxText are cut into several lines.
const (
	stamp   = "2006-01-02T15:04:05.000000000Z07:00"
	maxText = 64 << 10
)

// logFile writes lines, and begins a new file at size: path is the newest,
// path.1 the one before it, up to files in all.
type logFile struct {
	path  string
	size  int64
	files int

	mu      sync.Mutex
	file    *os.File
	written int64
}

func openLog(path string, size int64, files int) (*logFile, error) {
	l := &logFile{path: path, size: size, files: max(files, 1)}
	return l, l.open()
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(fmt.Errorf("log: %w", err), f.Close())
	}
	l.file, l.written = f, info.Size()
	return nil
}

// write appends one line. Output that can't be kept, since the disk is full, is
// lost: the program is not made to wait for somebody to tidy up.
func (l *logFile) write(at time.Time, stream byte, text []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.written >= l.size && l.rotate() != nil {
		return
	}
	line := make([]byte, 0, len(stamp)+len(text)+4)
	line = at.UTC().AppendFormat(line, stamp)
	line = append(line, ' ', stream, ' ')
	line = append(line, text...)
	line = append(line, '\n')
	n, err := l.file.Write(line)
	l.written += int64(n)
	if err != nil && n > 0 {
		// Half a line must not become the beginning of the next.
		if l.file.Truncate(l.written-int64(n)) == nil {
			l.written -= int64(n)
		}
	}
}

func (l *logFile) rotate() error {
	if err := l.file.Close(); err != nil {
		return err
	}
	for n := l.files - 1; n > 0; n-- {
		from := numbered(l.path, n-1)
		if err := os.Rename(from, numbered(l.path, n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return errors.Join(err, l.open())
		}
	}
	if l.files == 1 {
		if err := os.Remove(l.path); err != nil {
			return errors.Join(err, l.open())
		}
	}
	return l.open()
}

func (l *logFile) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}

func numbered(path string, n int) string {
	if n == 0 {
		return path
	}
	return fmt.Sprintf("%s.%d", path, n)
}

// copyFrom writes what comes until the other side closes.
func (l *logFile) copyFrom(r io.Reader, stream byte) {
	buf := make([]byte, 0, 8<<10)
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		now := time.Now()
		rest := buf
		for {
			i := bytes.IndexByte(rest, '\n')
			if i < 0 && len(rest) < maxText {
				break
			}
			end := i + 1
			if i < 0 || i > maxText {
				i, end = maxText, maxText
			}
			l.write(now, stream, rest[:i])
			rest = rest[end:]
		}
		buf = buf[:copy(buf, rest)]
		if err != nil {
			if len(buf) > 0 {
				l.write(now, stream, buf)
			}
			return
		}
	}
}
